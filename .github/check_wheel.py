"""Does the wheel hold every file of `heron/` that git tracks, and nothing else? Usage: check_wheel.py FILE.whl"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(wheel: str) -> int:
    """Compare, print what differs, and return the exit code."""
    listing = subprocess.run(["git", "ls-files", "-z", "heron"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {name for name in listing.stdout.split("\0") if name}
    with zipfile.ZipFile(wheel) as archive:
        got = {name for name in archive.namelist() if ".dist-info/" not in name}
    for name in sorted(wanted - got):
        print(f"missing from the wheel: {name}")
    for name in sorted(got - wanted):
        print(f"in the wheel, but not tracked under heron/: {name}")
    sources = sum("/csrc/" in name for name in wanted & got)
    print(f"{wheel}: {len(wanted & got)} of {len(wanted)} files, {sources} of them C++ and CUDA sources")
    return int(wanted != got or not sources or "heron/py.typed" not in got)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
