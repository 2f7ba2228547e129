"""What a run is about to learn, on the console: samples with their learned tokens coloured, the others dim, and ids."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator

from heron.data.conversations import Sample, Samples
from heron.data.template import is_control
from heron.report.console import COLUMNS
from heron.tokenizer import Tokenizer

_STYLES = {"learned": "bold green", "masked": "dim", "ids": "dim"}
_LABEL = 9  # columns of the labels, which say without colours what is learned


def show(samples: Samples, tokenizer: Tokenizer, n: int, say: Callable[[str], None] | None = None) -> None:
    """Print the first `n` samples, in at most 80 columns; plain text where the output is not a terminal.

    Args:
        say: takes the lines in the place of the console.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    for number in range(min(n, len(samples))):
        sample = samples[number]
        head = f"{sample.where}: {len(sample.ids):,} tokens, {int(sample.learned[1:].sum()):,} learned"
        lines = [(line, "") for line in textwrap.wrap(head, COLUMNS, break_on_hyphens=False)]
        for line, style in itertools.chain(lines, _lines(sample, tokenizer), [("", "")]):
            if say is not None:
                say(line)
                continue
            encoding = console.encoding
            console.print(line.encode(encoding, "replace").decode(encoding), style=style or None, soft_wrap=True)
    sys.stdout.flush()


def _lines(sample: Sample, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Lines and their styles."""
    from rich.cells import chop_cells

    learned = [False, *sample.learned[1:].tolist()]  # nothing stands before the first, from which it could be predicted
    for flag, run in itertools.groupby(zip(learned, sample.ids.tolist(), strict=True), key=lambda pair: pair[0]):
        ids, kind = [token for _, token in run], "learned" if flag else "masked"
        text = tokenizer.decode(ids).replace("\n", "\\n\n")
        text = "".join(c if c == "\n" or not is_control(c) else "\N{REPLACEMENT CHARACTER}" for c in text)
        if ids[-1] == tokenizer.eod:
            text += "[end of document]"
        label = kind
        for part in text.removesuffix("\n").split("\n"):
            for piece in chop_cells(part, COLUMNS - _LABEL) or [""]:
                yield f"{label:<{_LABEL}}{piece}", _STYLES[kind]
                label = ""
        label = "ids"
        for line in textwrap.wrap(" ".join(map(str, ids)), COLUMNS - _LABEL):
            yield f"{label:<{_LABEL}}{line}", _STYLES["ids"]
            label = ""
