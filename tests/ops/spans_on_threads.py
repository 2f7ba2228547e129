"""Spans of a text whose holders are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from heron.ops import spans
from heron.ops.spans import Chain


def on_threads(size: int, job: Callable[[int, str], Any]) -> list[Any]:
    """What `job` gives for each index, and the name of its chain, with all of them running at once."""
    barrier, shared = threading.Barrier(size, timeout=60), [torch.empty(0)] * size

    def chain(index: int) -> Chain:
        def gather(x: Tensor) -> Tensor:
            shared[index] = x.detach().clone()
            barrier.wait()
            everyone = torch.stack(shared)
            barrier.wait()
            return everyone

        return Chain(index, size, gather)

    def run(index: int) -> Any:
        try:
            return job(index, names[index])
        except BaseException:
            barrier.abort()  # the others wait for it
            raise

    names = [f"thread {i}" for i in range(size)]
    spans.CHAINS.update({name: chain(i) for i, name in enumerate(names)})
    try:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(run, range(size)))
    finally:
        for name in names:
            del spans.CHAINS[name]
