"""Write docs/compatibility.md from the table of the matrix test. --check: exit code 1 when it is stale."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "compatibility.md"
sys.path.insert(0, str(HERE))

from compat_matrix import page  # noqa: E402


def main():
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
