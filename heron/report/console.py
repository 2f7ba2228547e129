"""The lines of a run on the console."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from heron.report.figures import duration, mean, thousands

PLAIN_LINES = 20  # step lines of a whole run where the output is not a terminal
MEAN_OF = 20  # the loss on the console is the mean of this many log records
SECONDS_BETWEEN_REDRAWS = 0.1
COLUMNS = 80


class ConsoleLines:
    """The printed half: one live line on a terminal, about `PLAIN_LINES` plain ones elsewhere."""

    def __init__(self, total_steps: int, first_step: int, say: Callable[[str], None] | None = None):
        from rich.console import Console
        from rich.live import Live

        self._rich = Console(highlight=False, markup=False, emoji=False)
        self._say = say
        self._total = total_steps
        self._every = max(2, -(-total_steps // PLAIN_LINES))
        self._next = first_step + 1
        self._recent: deque[dict[str, Any]] = deque(maxlen=MEAN_OF)
        self._unprinted = ""
        on_terminal = sys.stdout.isatty() and self._rich.is_terminal and not self._rich.is_dumb_terminal
        # Redrawn by `step`, when something has changed, not by a thread of its own.
        self._live = Live(console=self._rich, auto_refresh=False) if on_terminal and say is None else None
        self._drawn = 0.0

    def print(self, text: str, style: str = "") -> None:
        """Print lines above the live one, with what the output's encoding lacks replaced."""
        if self._say is not None:
            for line in text.split("\n"):
                self._say(line)
            return
        encoding = self._rich.encoding
        text = text.encode(encoding, "replace").decode(encoding)
        self._rich.print(text, style=style or None, soft_wrap=True)

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        rows = [*rows, ("loss below", f"mean of the last {MEAN_OF} records of log.jsonl")]
        indent = max(len(name) for name, _ in rows) + 2
        for name, value in rows:
            self.print(
                textwrap.fill(
                    value,
                    min(COLUMNS, self._rich.width),
                    initial_indent=name.ljust(indent),
                    subsequent_indent=" " * indent,
                    break_on_hyphens=False,
                )
            )
        self.print("")

    def step(self, record: dict[str, Any]) -> None:
        self._recent.append(record)
        line = self._line(record["step"])
        if self._live:
            from rich.text import Text

            if not self._live.is_started:
                self._live.start()
            now = time.monotonic()
            due = now - self._drawn >= SECONDS_BETWEEN_REDRAWS
            self._drawn = now if due else self._drawn
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=due)
        elif record["step"] >= self._next or record["step"] == self._total:
            self._next = (record["step"] // self._every + 1) * self._every
            self._unprinted = ""
            self.print(line)
        else:
            self._unprinted = line

    def validation(self, step: int, values: dict[str, float]) -> None:
        bits = f"  {values['val_bpb']:.4f} bits per byte" if "val_bpb" in values else ""
        self.print(f"{self._count(step)}  validation loss {values['val_loss']:.4f}{bits}", "bold")

    def sample(self, step: int, text: str) -> None:
        from rich.text import Text

        self.print(f"{self._count(step)}  sample (all of it in samples/step-{step:08d}.txt)")
        lines = [line for line in text.expandtabs(4).splitlines() if line.strip()]
        for line in lines[:5]:
            # A model may well put out escape sequences; the terminal must not obey them.
            shown = Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))
            shown.truncate(min(COLUMNS, self._rich.width) - 4, overflow="ellipsis")
            self.print(f"    {shown.plain}", "dim")

    def close(self) -> None:
        if self._live:
            self._live.stop()
        elif self._unprinted:
            self.print(self._unprinted)
            self._unprinted = ""

    def _count(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"

    def _line(self, step: int) -> str:
        first, last = self._recent[0], self._recent[-1]
        left = "?"
        if last["step"] > first["step"]:
            pace = (last["time"] - first["time"]) / (last["step"] - first["step"])
            left = duration(pace * (self._total - step))
        loss = mean([record["loss"] for record in self._recent])
        speed = thousands(last["tokens_per_s"])
        return f"{self._count(step)}  loss {loss:.4f}  lr {last['lr']:.2e}  {speed} tok/s  ETA {left}"
