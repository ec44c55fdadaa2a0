"""What is known about every tool: how it is tried, which blocks it is for, which refuse it; and the page made of it."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from compat_matrix.cases import KINDS

TOOLS = []
NOTICE = "<!-- Written by python_tests/compat/make_docs.py from the table of the matrix test. Do not edit. -->\n"
HEAD = """# Compatibility

What other people's code does to a network, tried on every block of `repkern.nn` in several geometries. "Works" means
that a value was compared: afterwards the block in eval mode equals its deployed form in float64, its parameters get
gradients, and where the tool writes something, a plain convolution with the same written to it gives the same.
Whatever is refused is refused with the error named here, never lost. The whole matrix:
`python -m pytest python_tests/compat --whole`; every test run has a slice with every block and every tool.
"""


class Tool(NamedTuple):
    """One row: `run(case)` tries it and asserts. refused: class -> error; only: the classes it is for, None for all."""

    title: str
    section: str
    run: Callable
    refused: dict
    only: tuple | None
    few: bool

    @property
    def what(self):
        return " ".join(inspect.getdoc(self.run).split())

    def suits(self, kind):
        return self.only is None or kind in self.only


def tool(title, section, *, refused=None, only=None, few=False):
    """Register a function of a case as a tool. refused: {class: error}; only: the classes it is for, or all of them.

    few: slow; in every test run on two classes only, and on a quarter of the geometries in the whole matrix.
    """

    def register(run):
        TOOLS.append(Tool(title, section, run, refused or {}, None if only is None else tuple(only), few))
        return run

    return register


def _names(kinds):
    return ", ".join(f"`{kind.__name__}`" for kind in kinds)


def _result(entry):
    working = [kind for kind in KINDS if entry.suits(kind) and kind not in entry.refused]
    unsuited = [kind for kind in KINDS if not entry.suits(kind)]
    if len(working) > len(KINDS) // 2:
        text = "works" + (f"; not applicable to {_names(unsuited)}" if unsuited else "")
    else:
        text = f"works; for {_names(working)}"
    by_error = {}
    for kind, error in entry.refused.items():
        by_error.setdefault(error, []).append(kind)
    refusals = [f"`{error.__name__}`: {_names(kinds)}" for error, kinds in by_error.items()]
    parts = [text] if working else []
    return "; ".join([*parts, *(f"refused with {refusal}" for refusal in refusals)])


def page():
    """docs/compatibility.md."""
    lines = [NOTICE + HEAD]
    for section in dict.fromkeys(entry.section for entry in TOOLS):
        lines += [f"## {section}", "", "| tool | what is done and compared | result |", "|---|---|---|"]
        lines += [f"| {entry.title} | {entry.what} | {_result(entry)} |" for entry in TOOLS if entry.section == section]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
