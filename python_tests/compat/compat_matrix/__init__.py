"""The matrix "block x tool": blocks in `cases`, tools in the modules `tools_*`, what is expected in `table`."""

import importlib

from compat_matrix.cases import CASES
from compat_matrix.table import TOOLS, page

__all__ = ["CASES", "TOOLS", "page"]

# In the order of the page.
for _name in ("parameters", "geometry", "hooks", "tracing", "functional", "copies", "attributes"):
    importlib.import_module(f"compat_matrix.tools_{_name}")
