"""Runs CMake and Ninja and puts the native module into the wheel. Never imports torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = {"REPKERN_CUDA": "auto", "REPKERN_CUDA_ARCHS": "", "REPKERN_SIMT": "off", "REPKERN_SANITIZE": "off"}


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; it is a build requirement (pip install cmake ninja pybind11)")
        options = {name: os.environ.get(name, default) for name, default in OPTIONS.items()}
        sanitized = options["REPKERN_SANITIZE"].lower() in ("on", "1", "true")
        build = Path(self.build_temp).resolve() / ("cmake-sanitize" if sanitized else "cmake")
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        configure += [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("repkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
