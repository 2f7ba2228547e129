"""`heron memory`: documents become a file that ROSA looks into while a model runs, and such a file is described."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.commands.settings import READING, given
from heron.commands.streams import note
from heron.config import TrainConfig
from heron.data import token_index
from heron.data.corpora import Reading
from heron.tokenizer import load


def run(options: argparse.Namespace) -> None:
    if options.action == "info":
        tokenizer = None if options.tokenizer is None else load(options.tokenizer)
        print(token_index.describe(options.file, tokenizer, options.verify))
        return
    reading = {name: value for name, value in given(options, TrainConfig, "").items() if name in READING}
    tokenizer = load(options.tokenizer, reading.pop("eod", None))
    token_index.build(
        Path(options.out), options.inputs, tokenizer, options.max_match, options.across_documents == "on",
        Reading(**reading), note,
    )  # fmt: skip
    print(token_index.describe(options.out))
