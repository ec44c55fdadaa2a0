import json
import platform
from pathlib import Path

import pytest
import torch

import repkern
from repkern import _info, _native
from repkern.cli.info import _rows

SCHEMA = {
    "repkern": str,
    "python": str,
    "torch": str,
    "triton": (str, type(None)),
    "platform": str,
    "cpu": {
        "name": str,
        "cores": int,
        "threads": int,
        "isa_found": (str, type(None)),
        "isa_used": (str, type(None)),
    },
    "openmp": {"runtimes": list, "shared": (bool, type(None))},
    "native": {
        "built": bool,
        "missing": (str, type(None)),
        "compiler": (str, type(None)),
        "sanitized": (bool, type(None)),
    },
    "cuda": {
        "built": (float, type(None)),
        "archs": list,
        "torch_cuda": (str, type(None)),
        "driver": (str, type(None)),
        "gpus": list,
    },
    "backends": dict,
    "backend_forced": (str, type(None)),
}


def assert_schema(value, schema, where=""):
    if isinstance(schema, dict):
        assert set(value) == set(schema), where
        for name, part in schema.items():
            assert_schema(value[name], part, f"{where}.{name}")
    else:
        assert isinstance(value, schema), f"{where} is {value!r}"


def test_json_has_the_documented_form(command):
    code, out, err = command("info", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert_schema(found, SCHEMA)
    assert found == repkern.build_info()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["backends"] == repkern.available_backends()


def test_text_says_the_same_with_a_line_each(command):
    code, out, _ = command("info")
    assert code == 0
    lines = out.splitlines()
    for name, text in _rows(repkern.build_info()):
        assert f"{name:<17}  {text}" in lines
    for backend, reason in repkern.available_backends().items():
        wanted = "available" if reason is None else f"no: {reason}"
        assert f"{'backend ' + backend:<17}  {wanted}" in lines


TORCH = Path(torch.__file__).parent / "lib"


@pytest.mark.parametrize(
    ("files", "shared"),
    [
        ([TORCH / "libgomp.so.1"], True),
        ([Path("/usr/lib/libgomp.so.1")], True),
        ([TORCH / "libgomp.so.1", Path("/other.libs/libgomp-a34b3233.so.1")], True),
        ([TORCH / "libgomp-a34b3233.so.1", Path("/usr/lib/libgomp.so.1")], False),
        ([TORCH / "libgomp.so.1", Path("/usr/lib/libgomp.so.1")], False),
        ([TORCH / "libiomp5.so", Path("/usr/lib/libgomp.so.1")], False),
        ([TORCH / "libiomp5.so"], None),
    ],
)
def test_openmp_runtimes_of_torch_and_repkern(monkeypatch, files, shared):
    lines = [f"7f00-7f01 r-xp 00000000 fe:00 1 {file}" for file in (*files, *files, "/usr/lib/libcomp.so")]
    monkeypatch.setattr(_info.Path, "read_text", lambda self, encoding: "\n".join(lines))
    assert _info._openmp(native=True) == {"runtimes": sorted(file.name for file in files), "shared": shared}
    assert _info._openmp(native=False)["shared"] is None


@pytest.mark.skipif(not _native.native_build_info().get("isa_found"), reason="needs the native module")
def test_torch_and_repkern_share_one_openmp_runtime():
    found = repkern.build_info()["openmp"]
    if found["shared"] is None:
        pytest.skip("no OpenMP runtime to be seen here")
    assert found["shared"], found["runtimes"]


def test_a_missing_native_module_is_said(monkeypatch, command):
    monkeypatch.setattr(_native, "native_build_info", lambda: {"missing": "it was not built"})
    found = repkern.build_info()
    assert_schema(found, SCHEMA)
    assert found["native"]["built"] is False
    _, out, _ = command("info")
    assert "native code        none: it was not built" in out
