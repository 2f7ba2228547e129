"""`heron prepare`: texts, rows and tables become a binidx dataset."""

from __future__ import annotations

import argparse

from heron.commands.settings import READING, given
from heron.commands.streams import note
from heron.config import TrainConfig
from heron.data.corpora import Reading
from heron.data.prepare import prepare


def run(options: argparse.Namespace) -> None:
    reading = {name: value for name, value in given(options, TrainConfig, "").items() if name in READING}
    stats = prepare(
        options.inputs, options.out, options.tokenizer, options.workers,
        overwrite=options.overwrite, on_bad_line=options.on_bad_line, hashes=options.hashes,
        eod=reading.pop("eod", None), reading=Reading(**reading), say=note,
    )  # fmt: skip
    print(stats)
