"""Lets the tests of this folder import what they share: `small_training`, which subprocesses import too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
