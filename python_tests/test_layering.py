"""The architecture, checked: one-way imports, one importer of the native code, and every op complete."""

import ast
from pathlib import Path

import pytest

from repkern.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "repkern"
# Each layer may import those before it (and itself).
LAYERS = (
    "_native",
    "ops",
    "testing",
    "nn",
    "models",
    "optim",
    "search",
    "data",
    "train",
    "deploy",
    "viz",
    "bench",
    "_info",
    "cli",
    "__main__",
)
SOURCES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "repkern":
                yield from (f"repkern.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = layer_of(path)
    if own == "__init__":
        return
    assert own in LAYERS, f"{path} is in no known layer; add it to LAYERS and docs/architecture.md"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "repkern" or len(parts) == 1 or parts[1] not in LAYERS:
            continue
        assert LAYERS.index(parts[1]) <= LAYERS.index(own), f"{path.name} ({own}) imports {name}"


COMMANDS = [path for path in (PACKAGE / "cli").glob("*.py") if path.stem not in ("__init__", "main")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_commands_import_no_commands(path):
    """What several need is in a module of cli that begins with an underscore."""
    parts = [name.split(".") for name in imports(path)]
    found = {name[2] for name in parts if name[:2] == ["repkern", "cli"] and len(name) > 2}
    assert [name for name in sorted(found) if not name.startswith("_")] == []


def test_only_one_file_imports_native_code():
    for path in SOURCES:
        if path.name != "_native.py":
            assert not any(name.startswith("repkern._C") for name in imports(path)), path


def test_pointers_are_taken_in_native_files_only():
    for path in (PACKAGE / "ops").rglob("*.py"):
        if path.name not in ("native.py", "_check.py"):
            assert "data_ptr(" not in path.read_text(), path


def test_native_code_knows_no_torch_and_python_only_in_bindings():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        text = path.read_text()
        assert "#include <torch" not in text, path
        assert "#include <ATen" not in text, path
        if not path.name.endswith("_bind.cpp") and path.parent.name != "bind":
            assert "pybind11" not in text, path


@pytest.mark.parametrize("stem", sorted({op.stem for op in OPS.values()}))
def test_every_op_is_complete(stem):
    # An op may be declared for some backends only, with the reason beside its define_op.
    backends = {backend for op in OPS.values() if op.stem == stem for backend in op.backends}
    for file in ("__init__.py", "reference.py", "native.py", "triton.py", "samples.py"):
        if file == "triton.py" and "triton" not in backends:
            continue
        assert (PACKAGE / "ops" / stem / file).is_file(), file
    for pattern in (".h", "_bind.cpp", "_cpu.cpp", "_avx2.cpp", "_avx512.cpp", "*_cuda.cu"):
        if pattern.endswith(".cu") and "cuda" not in backends:
            continue
        assert list((ROOT / "csrc" / stem).glob(stem + pattern)), pattern
    assert (ROOT / "docs" / "ops" / f"{stem}.md").is_file()
    assert (ROOT / "python_tests" / "ops" / f"test_{stem}.py").is_file()
    assert f"repkern_add_op({stem})" in (ROOT / "CMakeLists.txt").read_text()
    registry = (PACKAGE / "bench" / "registry.py").read_text()
    assert stem in registry, f"{stem} has no benchmark entry"
