"""The reporter of a run: it writes the logs, and hands each record to the console and to the services."""

from __future__ import annotations

import datetime
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from heron.errors import ConfigError
from heron.report.console import ConsoleLines
from heron.report.figures import mean
from heron.report.log import cut_log, cut_train_log

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
        self._console = None if quiet else ConsoleLines(total_steps, first_step, say)

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
        kept = cut_log(self.folder / "log.jsonl", first_step, owed)
        cut_train_log(self.folder / "train_log.txt", first_step // self.steps_per_epoch)
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
        loss = mean([record["loss"] for record in self._epoch])
        perplexity = math.exp(loss) if not loss > 700 else math.inf
        line = f"{index} {loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.datetime.now()} {index}\n"
        self._train_log.write(line)
        self._train_log.flush()
        self._epoch.clear()


class NoReporter(Reporter):
    """Of a process beside the one that reports: it writes nothing and prints nothing."""

    def __init__(self) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    rewind = sync = header = step = validation = refused = sample = note = close = _nothing


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
        import wandb  # pyright: ignore[reportMissingImports]
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
