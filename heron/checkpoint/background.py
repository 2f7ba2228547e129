"""Saves of a run, one at a time: its caller waits for each, or goes on while a thread writes a copy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from heron import dist
from heron.checkpoint import run
from heron.config import TrainConfig

_TABLES = "tables"  # beside the files of a checkpoint


class Saved(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    folder: Path


class Saver:
    """Writes the checkpoints of a run. Use it in a with statement, whose end waits for what is under way.

    All processes of the run make the same calls.

    Args:
        config: of the run. Where its `background_save` leaves it open, a thread writes where a GPU trains, unless
            tables would be copied within the host's memory.
    """

    def __init__(self, config: TrainConfig, ranks: dist.Ranks):
        self._run_folder, self._keep = Path(config.out), config.keep
        on_gpu = config.device.startswith("cuda") and config.tables == "device"
        self._beside = config.background_save == "on" or (config.background_save == "auto" and on_gpu)
        self._ranks = ranks.apart(config.dist_timeout) if self._beside else ranks
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way: Future[Saved] | None = None
        self._copies = None  # what makes them; it has the room of the last ones

    def begin(self, contents: run.Contents) -> None:
        """Save this; what it is made of may change as soon as the call returns. Nothing else may be under way.

        Raises:
            HeronError: as :func:`heron.checkpoint.run.write`, unless a thread writes: then :meth:`wait` does.
        """
        assert self._under_way is None
        if self._beside:
            self._under_way = self._pool.submit(self._write, self._copied(contents))
        else:
            self._under_way = Future()
            self._under_way.set_result(self._write(contents))

    @property
    def failed(self) -> bool:
        """Whether the save under way has come to nothing, as :meth:`wait` will tell."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def done(self) -> Saved | None:
        """The last save, if it has succeeded since somebody asked."""
        return None if self._under_way is None or not self._under_way.done() or self.failed else self.wait()

    def wait(self) -> Saved | None:
        """The same, once it has; None if there is none. Raises what :meth:`begin` does."""
        under_way, self._under_way = self._under_way, None
        return None if under_way is None else under_way.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def _write(self, contents: run.Contents) -> Saved:
        return Saved(contents.step, run.write(self._run_folder, contents, self._keep, self._ranks))

    def _copied(self, contents: run.Contents) -> run.Contents:
        """With its tensors in the host's memory, where this process writes some."""
        from torch.distributed.checkpoint._state_dict_stager import StateDictStager

        mine = contents.tensors if contents.sharded or self._ranks.is_first else {}
        if not (mine or contents.tables):
            return contents
        if self._copies is None:
            # DefaultStager copies once and no more with PyTorch 2.11, and this is what it copies with (pytorch#183413).
            self._copies = StateDictStager(pin_memory=torch.cuda.is_available(), share_memory=False)
        copies: Any = self._copies.stage({**mine, _TABLES: contents.tables})
        tables = copies.pop(_TABLES)
        return contents._replace(tensors=copies if mine else contents.tensors, tables=tables)
