"""The log of a run, read, and cut back to the step that a run goes on from."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heron.errors import DataError
from heron.files import new_file


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of a run: its steps and its validations, each in the order they were written.

    Values that were not finite come back as NaN. A last line that was cut short (the run was killed within it, or is
    writing it) is left out.

    Args:
        run: the run folder, or its log.jsonl.

    Raises:
        DataError: no log, or a line that is not a record, with its number.
    """
    path = log_path(run)
    if not _is_file(path):
        raise DataError(f"{path}: no such log; wanted the folder of a run that `heron train` made (its --out)")
    records = [record for _, record in _parse(path)]
    validations = [record for record in records if "val_loss" in record]
    return [record for record in records if "loss" in record], validations


def _is_file(path: Path) -> bool:
    """Whether it is a file that can be read; a name that no file can have is none."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


def log_path(run: Path) -> Path:
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


def cut_log(path: Path, first_step: int, owed: Sequence[str]) -> list[dict[str, Any]]:
    """Leave only the records up to `first_step` in the log, without its validation if that is owed, and give them."""
    parsed = _parse(path) if first_step and path.exists() else []
    last = {"val_loss"} if "validation" in owed else set()
    kept = [
        (line, record)
        for line, record in parsed
        if record["step"] < first_step or record["step"] == first_step and not last & record.keys()
    ]
    _write(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]


def cut_train_log(path: Path, n_epochs: int) -> None:
    """Leave only the lines of the first `n_epochs` mini-epochs, those that were complete."""
    lines = path.read_bytes().splitlines(keepends=True) if n_epochs and path.exists() else []
    numbered = [(line.partition(b" ")[0], line) for line in lines if line.endswith(b"\n")]
    _write(path, b"".join(line for index, line in numbered if index.isdigit() and int(index) < n_epochs))


def _write(path: Path, content: bytes) -> None:
    with new_file(path) as temporary:
        temporary.write_bytes(content)
