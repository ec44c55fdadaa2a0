"""Every block with every tool of other people's code."""

import collections

import pytest
from compat_matrix import TOOLS
from compat_matrix.cases import KINDS


def test_cell(cell):
    tool, case = cell
    error = tool.refused.get(case.kind)
    if error is None:
        tool.run(case)
    else:
        with pytest.raises(error):
            tool.run(case)


def test_every_tool_and_block_is_there():
    from compat_matrix.selection import cells

    tried = collections.Counter(tool.run.__name__ for tool, _ in cells(False))
    assert {tool.run.__name__ for tool in TOOLS} == set(tried)
    assert len({tool.title for tool in TOOLS}) == len(TOOLS) >= 30
    assert len(KINDS) >= 17
