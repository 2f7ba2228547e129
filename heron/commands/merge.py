"""`heron merge`: an adapter added to the weights that it was trained on, written as a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.commands.convert import convert
from heron.commands.info import sizes
from heron.progress import progress


def run(options: argparse.Namespace) -> None:
    output = Path(options.output)
    format = options.format or (None if output.suffix else "safetensors")  # a folder holds every variant
    with progress(f"merging {options.adapter} into {options.base}"):
        _, model = convert(
            options.base, output, format=format, dtype=options.dtype, rosa=options.rosa, tokenizer=options.tokenizer,
            adapter=options.adapter, say=print,
        )  # fmt: skip
    print(f"wrote {output}: {sizes(model.config)}, with {options.adapter} in its weights")
