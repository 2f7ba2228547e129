"""What a run tells: lines on the console, files in its folder, TensorBoard and Weights & Biases, and the picture of it.

log.jsonl        one JSON record per logged step and per validation. null stands for NaN and infinity, which JSON
                 does not have; a value that is not known (val_bpb where bytes are not counted) has no key
train_log.txt    one line per mini-epoch and one at the end, as RWKV-LM writes it: epoch loss ppl lr time epoch
samples/         step-00000500.txt, ...: the texts that were sampled
tensorboard/     events, if asked for
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from heron.errors import ConfigError, DataError
from heron.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN_LINES = 20  # step lines of a whole run where the output is not a terminal
MEAN_OF = 20  # the loss on the console is the mean of this many log records
SECONDS_BETWEEN_REDRAWS = 0.1
COLUMNS = 80
PROMPT_COLUMNS = 30  # of a sample's prompt are shown


class Reporter:
    """Tells of one run, from `first_step` finished steps to `total_steps`. Close it, or use it in a with statement.

    A fresh run (`first_step` 0) begins with empty log files. A resumed one keeps the records up to `first_step` and
    cuts off those after it, so that each step stands in the logs once.

    Args:
        folder: the run folder; created if missing.
        tensorboard: also write events to ``folder/tensorboard``.
        wandb: also log to this Weights & Biases project; empty: do not. ``WANDB_MODE=offline`` works. Where it cannot
            be (not installed, no login), a warning says so, and the local logs are all there is.
        wandb_name: what the run is called there; the time of its start is added. None: as the folder.
        config: the run's settings as plain values, kept by Weights & Biases.
        steps_per_epoch: steps of a mini-epoch (RWKV-LM: 40,320 samples); None: the whole run.
        quiet: print nothing.
        say: takes what would be printed, line by line; None: the console.
        owed: what the last of the finished steps has yet to do; a "validation" of it is cut off as well.

    Raises:
        ConfigError: TensorBoard is asked for and not installed. The logs are as they were.
        DataError: the log to be resumed is damaged.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        wandb_name: str | None = None,
        config: dict[str, Any] | None = None,
        steps_per_epoch: int | None = None,
        quiet: bool = False,
        owed: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
    ):
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch or total_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events = _tensorboard(self.folder, first_step) if tensorboard else None
        self._wandb = _wandb(self.folder, wandb, wandb_name, config, first_step) if wandb else None
        self._weight_decay = (config or {}).get("weight_decay")
        self._console = None if quiet else _Console(total_steps, first_step, say)

        self._open(first_step, owed)

    def rewind(self, step: int) -> None:
        """Go on after an earlier step: the records of those that come again are cut off."""
        self._log.close()
        self._train_log.close()
        self._open(step, ())

    def sync(self) -> None:
        """Force the log onto the disk."""
        os.fsync(self._log.fileno())

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print what the run is: (name, value) pairs, aligned."""
        if self._console:
            self._console.header(rows)

    def step(self, record: dict[str, Any]) -> None:
        """Log a finished step.

        `record` has step (finished steps, from 1), tokens (trained on so far), loss (nats per token), lr, grad_norm,
        tokens_per_s and time (seconds since the run began). Further keys go to log.jsonl as they are.
        """
        self._write(record)
        if self._epoch and self._epoch_of(self._epoch[-1]) != self._epoch_of(record):
            self._end_epoch()
        self._epoch.append(record)
        if record["step"] % self.steps_per_epoch == 0:
            self._end_epoch()
        if self._console:
            self._console.step(record)
        if self._events:
            tags = {
                "train/loss": "loss",
                "train/lr": "lr",
                "train/grad_norm": "grad_norm",
                "perf/tokens_per_sec": "tokens_per_s",
            }
            for tag, key in tags.items():
                self._events.add_scalar(tag, record[key], record["step"])
        if self._wandb:
            values = {"loss": record["loss"], "lr": record["lr"], "wd": self._weight_decay}
            values |= {"Gtokens": record["tokens"] / 1e9, "kt/s": record["tokens_per_s"] / 1e3}
            self._wandb.log({k: v for k, v in values.items() if v is not None}, step=record["step"])

    def validation(self, record: dict[str, Any]) -> None:
        """Log a validation: step, val_loss (nats per token), val_bpb (bits per byte; None if not known) and time."""
        self._write(record)
        values = {key: record[key] for key in ("val_loss", "val_bpb") if record.get(key) is not None}
        if self._console:
            self._console.validation(record["step"], values)
        if self._events:
            for key, value in values.items():
                self._events.add_scalar(key.replace("_", "/"), value, record["step"])
        if self._wandb:
            self._wandb.log(values, step=record["step"])

    def refused(self, record: dict[str, Any]) -> None:
        """Log a batch that was passed over: its record goes to log.jsonl as it is."""
        self._write(record)

    def sample(self, step: int, text: str, prompt: str = "") -> None:
        """Keep a prompt and the text sampled behind it in ``samples/``; print the prompt's end and the beginning."""
        path = self.folder / "samples" / f"step-{step:08d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((prompt + text).encode("utf-8", "replace"))
        if self._console:
            # A prompt of one long line, as of integers, would take the room that what the model says is shown in.
            end = prompt if len(prompt) <= PROMPT_COLUMNS else "…" + prompt[-PROMPT_COLUMNS:]
            self._console.sample(step, end + text)

    def note(self, text: str) -> None:
        """Print a line."""
        if self._console:
            self._console.print(text)

    def close(self) -> None:
        """End the files and the live line. A mini-epoch that has begun gets its line in train_log.txt."""
        if self._epoch:
            self._end_epoch()
        self._log.close()
        self._train_log.close()
        if self._console:
            self._console.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, first_step: int, owed: Sequence[str]) -> None:
        kept = _cut_log(self.folder / "log.jsonl", first_step, owed)
        _cut_train_log(self.folder / "train_log.txt", first_step // self.steps_per_epoch)
        self._log = (self.folder / "log.jsonl").open("a", encoding="utf-8", newline="\n")
        self._train_log = (self.folder / "train_log.txt").open("a", encoding="utf-8", newline="\n")
        begun = first_step - first_step % self.steps_per_epoch
        self._epoch = [record for record in kept if "loss" in record and record["step"] > begun]

    def _write(self, record: dict[str, Any]) -> None:
        strict = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
            if value is not None
        }
        self._log.write(json.dumps(strict, allow_nan=False) + "\n")
        self._log.flush()

    def _epoch_of(self, record: dict[str, Any]) -> int:
        return (record["step"] - 1) // self.steps_per_epoch

    def _end_epoch(self) -> None:
        index, lr = self._epoch_of(self._epoch[-1]), self._epoch[-1]["lr"]
        loss = _mean([record["loss"] for record in self._epoch])
        perplexity = math.exp(loss) if not loss > 700 else math.inf
        line = f"{index} {loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.datetime.now()} {index}\n"
        self._train_log.write(line)
        self._train_log.flush()
        self._epoch.clear()


class _Console:
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
        # Redrawn from `step`, not from a thread of its own: a thread is trouble when data workers are forked.
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
            left = _duration(pace * (self._total - step))
        loss = _mean([record["loss"] for record in self._recent])
        speed = _thousands(last["tokens_per_s"])
        return f"{self._count(step)}  loss {loss:.4f}  lr {last['lr']:.2e}  {speed} tok/s  ETA {left}"


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of a run: its steps and its validations, each in the order they were written.

    Values that were not finite come back as NaN. A last line that was cut short (the run was killed within it, or is
    writing it) is left out.

    Args:
        run: the run folder, or its log.jsonl.

    Raises:
        DataError: no log, or a line that is not a record, with its number.
    """
    path = _log_path(run)
    if not _is_file(path):
        raise DataError(f"{path}: no such log; wanted the folder of a run that `heron train` made (its --out)")
    records = [record for _, record in _parse(path)]
    validations = [record for record in records if "val_loss" in record]
    return [record for record in records if "loss" in record], validations


def check_picture(out: Path) -> None:
    """ConfigError unless the file is named .png or .svg."""
    if out.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"plot: wanted a picture named .png or .svg, got {out}")


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draw loss, validation, learning rate, gradient norm and throughput of one or more runs over their steps.

    The validation panel is in bits per byte, which compare across tokenizers, if every run has them, else in nats
    per token.

    Args:
        runs: run folders (or log.jsonl files).
        out: the picture, .png or .svg. Its folder is created if missing.

    Raises:
        ConfigError: no run, or another ending.
        DataError: as :func:`read_log`, or a run without a single logged step.
        CheckpointError: the picture can't be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    runs, out = [Path(run) for run in runs], Path(out)
    if not runs:
        raise ConfigError("plot: wanted at least one run folder, got none; heron plot runs/first")
    check_picture(out)
    logs = [read_log(run) for run in runs]
    for run, (steps, _) in zip(runs, logs, strict=True):
        if not steps:
            raise DataError(f"{_log_path(run)}: holds no step yet; wait for the first one")

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "loss", "validation"], ["lr", "grad_norm", "tokens_per_s"]], height_ratios=(1.35, 1)
    )
    has_bits = all(validations and all("val_bpb" in v for v in validations) for _, validations in logs)
    val_key, val_unit = ("val_bpb", "bits per byte") if has_bits else ("val_loss", "nats per token")
    _dress(panels["loss"], "Training loss", "nats per token")
    _dress(panels["validation"], "Validation", val_unit)
    _dress(panels["lr"], "Learning rate", "")
    _dress(panels["grad_norm"], "Gradient norm before clipping", "")
    _dress(panels["tokens_per_s"], "Throughput", "tokens per second")

    names = [_drawable(name) for name in _names(runs)]
    for i, (name, (steps, validations)) in enumerate(zip(names, logs, strict=True)):
        style = dict(color=f"C{i % 10}", linestyle=("-", "--", ":", "-.")[i // 10 % 4])
        style["marker"] = "o" if len(steps) == 1 else ""
        x = _column(steps, "step")
        panels["lr"].plot(x, _column(steps, "lr"), **style)
        for key in ("loss", "grad_norm", "tokens_per_s"):
            y = _column(steps, key)
            width = _smoothing(len(y))
            panels[key].plot(x, y, color=style["color"], alpha=0.25, linewidth=0.8)
            label = name if width == 1 else f"{name} (mean of {width} records)"
            panels[key].plot(x, _smoothed(y, width), **style, label=label)
        x = _column(validations, "step")
        if len(runs) == 1 and validations:
            dots = dict(color="black", marker="o", markersize=4, linestyle="none")
            panels["loss"].plot(x, _column(validations, "val_loss"), **dots, label="validation")
        panels["validation"].plot(x, _column(validations, val_key), **{**style, "marker": "o"}, markersize=4)

    _cut_spikes(panels["loss"], [_column(steps, "loss") for steps, _ in logs])
    if any((_column(steps, "grad_norm") > 0).any() for steps, _ in logs):
        panels["grad_norm"].set_yscale("log")  # it falls by orders of magnitude in the first steps
    panels["lr"].yaxis.set_major_formatter(StrMethodFormatter("{x:.1e}"))
    panels["tokens_per_s"].yaxis.set_major_formatter(EngFormatter(sep=""))
    panels["tokens_per_s"].set_ylim(bottom=0)
    if not any(validations for _, validations in logs):
        panels["validation"].text(0.5, 0.5, "none yet", transform=panels["validation"].transAxes, ha="center")
    panels["loss"].legend(frameon=False, fontsize=9)
    if len(runs) == 1:
        figure.suptitle(_summary(names[0], *logs[0]), fontsize=11)

    with new_file(out) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in another script: a box is drawn
        figure.savefig(temporary, dpi=120)
    return out


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard: the package is not installed; pip install tensorboard") from None
    # Events of steps that will be replayed are hidden.
    return SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)


def _wandb(folder: Path, project: str, name: str | None, config: dict[str, Any] | None, first_step: int) -> Any:
    """A run of Weights & Biases; None, after a warning, where there can be none: training goes on without."""
    try:
        import wandb
    except ImportError:
        warnings.warn(
            f"wandb {project}: the package is not installed (pip install wandb); the run is logged in {folder} alone",
            stacklevel=3,
        )
        return None
    # A resumed run goes on under the id and the name it began with.
    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text(encoding="utf-8").strip() if first_step and id_file.exists() else None
    name = folder.name if name is None else f"{name} {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}"
    name = None if run_id else name
    try:
        run = wandb.init(project=project, name=name, config=config, dir=str(folder), id=run_id, resume="allow")
    except Exception as error:  # its own classes: no login, no network, a name it doesn't take
        warnings.warn(f"wandb {project}: {error}; the run is logged in {folder} alone", stacklevel=3)
        return None
    id_file.write_text(run.id + "\n", encoding="utf-8")
    return run


def _is_file(path: Path) -> bool:
    """Whether it is a file that can be read; a name that no file can have is none."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


def _log_path(run: Path) -> Path:
    run = Path(run)
    return run if run.suffix == ".jsonl" else run / "log.jsonl"


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line of a log with its record; a last line without its end is left out unless it is whole."""
    *lines, rest = path.read_bytes().split(b"\n")
    with contextlib.suppress(ValueError):
        json.loads(rest)
        lines.append(rest)
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and "step" in record):
            raise DataError(
                f"{path}, line {number}: wanted a JSON record with a step, "
                f"got {line[:60].decode('utf-8', 'replace')!r}; the file is damaged, remove that line"
            )
        parsed.append((line, {key: math.nan if value is None else value for key, value in record.items()}))
    return parsed


def _cut_log(path: Path, first_step: int, owed: Sequence[str]) -> list[dict[str, Any]]:
    """Leave only the records up to `first_step` in the log, without its validation if that is owed, and give them."""
    parsed = _parse(path) if first_step and path.exists() else []
    last = {"val_loss"} if "validation" in owed else set()
    kept = [
        (line, record)
        for line, record in parsed
        if record["step"] < first_step or record["step"] == first_step and not last & record.keys()
    ]
    _replace(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]


def _cut_train_log(path: Path, n_epochs: int) -> None:
    """Leave only the lines of the first `n_epochs` mini-epochs, those that were complete."""
    lines = path.read_bytes().splitlines(keepends=True) if n_epochs and path.exists() else []
    numbered = [(line.partition(b" ")[0], line) for line in lines if line.endswith(b"\n")]
    _replace(path, b"".join(line for index, line in numbered if index.isdigit() and int(index) < n_epochs))


def _replace(path: Path, content: bytes) -> None:
    """Give a file new content so that a crash leaves the old or the new, never a part."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _duration(seconds: float) -> str:
    """``0:07``, ``1:02:03``, ``3d 04h``; ``?`` for what is not a time."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    if days:
        return f"{days}d {rest:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _thousands(value: float) -> str:
    """Three or four figures: ``812``, ``12.3k``, ``1.20M``."""
    if not math.isfinite(value):
        return "?"
    if value < 999.5:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if value < 999_950 else f"{value / 1e6:.2f}M"


def _column(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([record.get(key, math.nan) for record in records], dtype=np.float64)


def _smoothing(n: int) -> int:
    """Odd number of records to average over: about a fiftieth of them."""
    return 2 * (n // 100) + 1


def _smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` (odd) values; fewer at the ends. Values that are not finite are left out."""
    finite = np.isfinite(y)
    reach = width // 2
    ends = np.arange(len(y))
    low, high = np.maximum(ends - reach, 0), np.minimum(ends + reach + 1, len(y))
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    n = count[high] - count[low]
    return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    folders = [_log_path(run).resolve().parent for run in runs]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def _drawable(name: str) -> str:
    """A folder's name as matplotlib draws it to the letter: it would read formulas between dollars."""
    name = name.encode(errors="replace").decode().replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # else legends leave it out


def _summary(name: str, steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> str:
    last = steps[-1]
    parts = [name, f"{last['step']:,} steps"]
    if "tokens" in last:
        parts.append(f"{_thousands(last['tokens'])} tokens")
    if validations:
        parts.append(f"validation {validations[-1]['val_loss']:.4f} nats per token")
        if "val_bpb" in validations[-1]:
            parts[-1] += f" = {validations[-1]['val_bpb']:.4f} bits per byte"
    return "  |  ".join(parts)


def _dress(axes: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)


def _cut_spikes(axes: Axes, runs: Sequence[np.ndarray]) -> None:
    """Let the frame end at the first value or the 99.5th percentile; a spike above would flatten all the rest."""
    runs = [values[np.isfinite(values)] for values in runs]
    runs = [values for values in runs if len(values)]
    if not runs:
        return
    top = max(max(values[0], np.quantile(values, 0.995)) for values in runs)
    low, high = min(values.min() for values in runs), max(values.max() for values in runs)
    if top < high and low < top:
        axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
