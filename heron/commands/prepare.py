"""`heron prepare`: texts, rows and tables become a binidx dataset."""

from __future__ import annotations

import argparse

from heron.commands.settings import READING, given
from heron.commands.streams import note
from heron.config import TrainConfig
from heron.data import recalled
from heron.data.binidx import is_binidx
from heron.data.corpora import Reading
from heron.data.prepare import prepare
from heron.tokenizer import load


def run(options: argparse.Namespace) -> None:
    reading = {name: value for name, value in given(options, TrainConfig, "").items() if name in READING}
    eod = reading.pop("eod", None)
    memory = _rules(options, eod)
    if options.out is None and memory is not None and len(options.inputs) == 1 and is_binidx(options.inputs[0]):
        recalled.write(options.inputs[0], memory, options.overwrite)
        print(recalled.describe(options.inputs[0]))
        return
    if options.out is None:
        options.parser.error("the following arguments are required: --out")
    stats = prepare(
        options.inputs, str(options.out), options.tokenizer, options.workers,
        overwrite=options.overwrite, on_bad_line=options.on_bad_line, hashes=options.hashes,
        eod=eod, reading=Reading(**reading), say=note, memory=memory,
    )  # fmt: skip
    print(stats)


def _rules(options: argparse.Namespace, eod: str | None) -> recalled.Rules | None:
    """What --memory and its flags ask for."""
    numbers = {name: vars(options)[name] for name in ("n_matches", "max_match", "window")}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    if not options.memory:
        for name in (*numbers, "across_documents"):
            if vars(options)[name] is not None:
                options.parser.error(f"--{name} is a flag of --memory, which was not given")
        return None
    within = options.across_documents == "off"
    end = recalled.end_of(load(options.tokenizer, eod), across_documents=False) if within else None
    return recalled.Rules(**numbers, end=end)
