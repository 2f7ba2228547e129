"""`heron plot`: the curves of one or more runs in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.report import plot


def run(options: argparse.Namespace) -> None:
    print(f"wrote {plot([Path(folder) for folder in options.runs], Path(options.out))}")
