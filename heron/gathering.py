"""Weights of a block put together from their shards by copy engines, while multiprocessors compute.

NCCL, from 2.28 on, does so for processes of one host that reach each other's memory: in memory that they have told each
other of, and in a group that asks for it (:func:`heron.dist.nccl_options`). FSDP gathers in memory of the moment, which
nobody has been told of; :class:`CopiedGather` is the memory that all blocks take in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.cuda import nccl
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

_SINCE = (2, 28)  # of NCCL


def is_there(n_gpus: int) -> bool:
    """Whether `n_gpus`, those of this host that a run has, can do it, as far as this process sees."""
    mine = torch.cuda.current_device()
    others = (other for other in range(n_gpus) if other != mine)
    return nccl.version() >= _SINCE and all(torch.cuda.can_device_access_peer(mine, o) for o in others)


def numel(weights: Iterable[Tensor], processes: int) -> int:
    """How many numbers such weights are, gathered: FSDP rounds up the rows of each to a multiple of `processes`."""
    return sum(-(-len(weight) // processes) * processes * math.prod(weight.shape[1:]) for weight in weights)


class CopiedGather(DefaultAllGather):
    """Gathers the weights of blocks, one after another, in the same memory.

    It is for `FSDPModule.set_custom_all_gather` of each block. In a backward pass FSDP gathers a block when the one
    before it in that order has been copied to where its weights lie. In a forward pass it may do so earlier, so hooks
    say when a pass begins (:meth:`begin`, of what is called before the blocks) and when a block has its weights
    (:meth:`has_weights`, behind FSDP's own); the next one waits for that.

    Args:
        group: the processes. They have gathered other weights before.
        n: the most numbers that a block has, as :func:`numel` counts them.
    """

    def __init__(self, group: distributed.ProcessGroup, n: int):
        self._group, self._n = group, n
        self._memory: Tensor | None = None
        self._pool: Any = None  # it is what is registered, and must live as long
        self._read: Any = None  # the event

    def begin(self, *_: Any) -> None:
        """Nothing of this pass is in the memory."""
        self._read = None

    def has_weights(self, *_: Any) -> None:
        """The block that was gathered last has its weights, once the current stream comes here."""
        self._read = torch.cuda.current_stream().record_event()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory, for so many numbers; the current stream may write there."""
        if self._memory is None:
            self._memory = self._told(dtype, device)
        if self._read is not None:
            torch.cuda.current_stream().wait_event(self._read)
        return self._memory[: math.prod(map(int, size))]

    def _told(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of which all processes tell each other. They call it together."""
        backend: Any = self._group._get_backend(device)
        self._pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(self._pool):
            memory = torch.empty(self._n, dtype=dtype, device=device)
        torch.cuda.synchronize(device)
        backend.register_mem_pool(self._pool, True)
        return memory
