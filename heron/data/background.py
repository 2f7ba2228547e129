"""Batches that are read ahead by processes of their own, in the order and with the content of `Batches.batch`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from heron.data.loader import Batches
from heron.errors import ConfigError, DataError

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_SECONDS_TO_GO = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1  # at whether the run should stop, while a batch is waited for


class Stream:
    """The batches of a run from sample `first` on, `count` samples each, one after another.

    With `workers` processes, worker i makes the batches i, i + workers, ... and holds each until it is fetched: the
    pipe to it is the buffer. A worker ignores the signals that stop a run, so that a step that has begun can end; it
    goes when its pipe is closed, be it that the run ended or was killed. Close the stream, or use it in a with
    statement.

    Args:
        workers: 0: each batch is made when it is asked for.
        stopped: asked while a batch is waited for.

    Raises:
        ConfigError: workers where processes cannot be forked.
    """

    def __init__(self, batches: Batches, first: int, count: int, workers: int, stopped: Callable[[], object]):
        self.next_sample = first
        self._batches, self._count, self._stopped = batches, count, stopped
        self._pipes: list[Connection] = []
        self._processes = []
        self._taken = 0
        if workers == 0:
            return
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError(f"num_workers {workers}: this system cannot fork processes; leave it at 0")
        context = multiprocessing.get_context("fork")
        for worker in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            self._pipes.append(ours)
            part = (batches, first + worker * count, workers * count, count)
            process = context.Process(target=_work, args=(*part, theirs, list(self._pipes)), daemon=True)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the worker ignores them
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._processes.append(process)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The next batch: x, y (count, T) int64. None when the run was asked to stop while it was waited for.

        Raises:
            DataError: the worker that should have made it has died.
        """
        if not self._pipes:
            batch = self._batches.batch(self.next_sample, self._count)
            self.next_sample += self._count
            return batch
        worker = self._taken % len(self._pipes)
        while not self._pipes[worker].poll(_SECONDS_BETWEEN_LOOKS):
            if self._stopped():
                return None
        try:
            raw = self._pipes[worker].recv_bytes()
        except EOFError:
            self._processes[worker].join()
            raise DataError(
                f"loader worker {worker} died with exit code {self._processes[worker].exitcode} at sample "
                f"{self.next_sample}; run the same command again, or with --num_workers 0"
            ) from None
        self._taken += 1
        self.next_sample += self._count
        rows = torch.from_numpy(np.frombuffer(bytearray(raw), dtype=np.int64).reshape(2, self._count, -1))
        return rows[0], rows[1]

    def close(self) -> None:
        """End the workers and wait until they are gone. One that is stuck, in a read of a dead disk say, is killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_SECONDS_TO_GO)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _work(batches: Batches, first: int, stride: int, count: int, out: Connection, ends: list[Connection]) -> None:
    """Send batch after batch until nobody reads any more."""
    _ignore_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for end in ends:  # copies of the reading ends; while one is open, a dead reader would go unnoticed
        end.close()
    torch.set_num_threads(1)  # the threads of the parent are not there after a fork
    with contextlib.suppress(BrokenPipeError):
        while True:
            x, y = batches.batch(first, count)
            out.send_bytes(torch.stack((x, y)).numpy())
            first += stride
    os._exit(0)  # what the parent would do at its end is not for this process to do


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
