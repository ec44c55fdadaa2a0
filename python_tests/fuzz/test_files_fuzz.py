"""A bounded slice of the fuzzer of files; the whole: python python_tests/fuzz/files.py --files 2000."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fuzz_files", Path(__file__).with_name("files.py"))
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)


def test_damaged_files_are_refused_or_read_as_they_were():
    pytest.importorskip("huggingface_hub")
    kinds = [kind for kind in files.FORMATS if kind != "quantized"]  # which takes seconds to write
    assert files.fuzz(210, 7, kinds, say=lambda line: None) == []
