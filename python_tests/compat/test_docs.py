"""The page made from the matrix."""

from pathlib import Path

from compat_matrix import TOOLS, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "python python_tests/compat/make_docs.py writes it anew"


def test_every_tool_has_a_row():
    text = page()
    for tool in TOOLS:
        assert text.count(f"| {tool.title} |") == 1
