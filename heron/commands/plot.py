"""`heron plot`: the curves of one or more runs in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.files import refuse_foreign
from heron.report import picture


def run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    picture.check_picture(out)
    refuse_foreign(out, picture.is_ours)
    print(f"wrote {picture.plot([Path(folder) for folder in options.runs], out)}")
