"""Print the command that the README gives: readme_command.py README.md run|test."""

import re
import sys
from pathlib import Path


def main() -> int:
    """Find the fenced block that follows `<!-- run -->` or `<!-- test -->`."""
    readme, name = Path(sys.argv[1]), sys.argv[2]
    found = re.search(rf"<!-- {name} -->\s*```[a-z]*\n(.*?)```", readme.read_text(), re.DOTALL)
    if not found:
        print(f"{readme} has no block marked <!-- {name} -->", file=sys.stderr)
        return 2
    print(found.group(1).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
