"""Print the changelog's entry of a version that is about to be released. Usage: release_notes.py 1.2.3

Fails where `heron.__version__` is another one, or where CHANGELOG.md has no entry `## [1.2.3] - 2027-01-31` for it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(version: str) -> int:
    """Check, print the entry, and return the exit code."""
    code = re.search(r'^__version__ = "(.+)"', (ROOT / "heron/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if code is None or code[1] != version:
        print(f"heron.__version__ is {code and code[1]}, the tag says {version}", file=sys.stderr)
        return 1
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    entry = re.search(heading, changelog, re.MULTILINE | re.DOTALL)
    if entry is None:
        print(f"CHANGELOG.md: wanted an entry '## [{version}] - YYYY-MM-DD', found none", file=sys.stderr)
        return 1
    print(entry[1].strip())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
