"""Which cells of the matrix a test run has."""

import zlib

from compat_matrix import CASES, TOOLS
from compat_matrix.cases import KINDS

FEW = ("OREPAConv2d", "RepVGGBlock")  # the classes on which slow tools are tried in every test run


def cells(whole):
    """(tool, case) pairs: every class with every tool once, in geometries that differ by tool.

    whole: every block in every geometry, for slow tools in every fourth.
    """
    chosen = []
    for tool in TOOLS:
        for kind in KINDS:
            cases = [case for case in CASES if case.kind is kind]
            if not tool.suits(kind) or (tool.few and not whole and kind.__name__ not in FEW):
                continue
            start = zlib.crc32(f"{tool.run.__name__} {kind.__name__}".encode()) % len(cases)
            several = cases[start % 4 :: 4] if tool.few else cases
            chosen += [(tool, case) for case in (several if whole else cases[start : start + 1])]
    return chosen
