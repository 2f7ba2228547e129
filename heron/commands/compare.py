"""`heron compare`: the figures of several runs side by side, in Markdown, and their curves in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.files import refuse_foreign, write_text
from heron.report import compare, picture


def run(options: argparse.Namespace) -> None:
    out, drawn = (None if name is None else Path(name) for name in (options.out, options.plot))
    if out is not None:
        refuse_foreign(out, compare.is_ours)
    if drawn is not None:
        picture.check_picture(drawn)
        refuse_foreign(drawn, picture.is_ours)
    groups = compare.groups(compare.read([Path(folder) for folder in options.runs]))
    table = compare.table(groups, options.at)
    print(table)
    if out is not None:
        write_text(out, compare.as_file(table))
        print(f"\nwrote {out}")
    if drawn is not None:
        named = [(one.folder, group.name) for group in groups for one in group.runs]
        folders, names = zip(*named, strict=True)
        print(f"\nwrote {picture.plot(folders, drawn, names)}")
