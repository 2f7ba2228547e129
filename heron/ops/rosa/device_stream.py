"""Token streams on a CUDA device (csrc/memory.cu), for ids that the host does not know yet; built at first use."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from heron.ops import _build, _choice
from heron.ops.rosa.memory import CSRC, TREES, TokenStream, stream_choice

_LEAST_ROOM = 1 << 16  # tokens


class DeviceStream:
    """A copy of a token stream on a device, which reads on there and finds what the stream would find, bit for bit.

    It takes 12 bytes for each token of the stream, and without a window as much for as many that may follow.

    Args:
        stream: of impl "cpu". It stays as it is.

    Raises:
        KernelError: another `impl`, no CUDA device, or the kernel can't be built.
    """

    def __init__(self, stream: TokenStream, device: torch.device):
        FORM.require(device)
        self._rules = stream.window or 0, stream.max_match, -1 if stream.end is None else stream.end
        self._is_ring = stream.window is not None
        ids, nodes, roots = (part.view(torch.int32) for part in stream.arrays())  # uint32 knows few operations
        self._n = stream.n_placed
        n_places = len(ids) if self._is_ring else max(_LEAST_ROOM, 2 * len(ids))
        self._ids = torch.empty(n_places, dtype=torch.int32, device=device)
        self._nodes = torch.empty(n_places, 2, dtype=torch.int32, device=device)
        self._roots = roots.to(device)
        self._ids[: len(ids)].copy_(ids)
        self._nodes[: len(nodes)].copy_(nodes)

    @property
    def is_full(self) -> bool:
        """Whether no more token can be read: a new copy of the stream has room again."""
        return not self._is_ring and self._n == len(self._ids)

    def read_one_(self, id: Tensor, read: Tensor, found: Tensor) -> None:
        """Read one id on the current stream of the device; the host waits for nothing.

        Args:
            id: (1,) int64; below 0 is read as 0.
            read: (1,) int64, gets the id that was read.
            found: (n_found, 2) int64, gets what followed each match and its length, as :meth:`TokenStream.recall`.
        """
        ring, place = self._is_ring, self._n
        torch.ops.heron.rosa_read_one_(id, self._ids, self._nodes, self._roots, place, ring, *self._rules, read, found)
        self._n += 1


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails."""
    _build.load_kernels_for(capability, "rosa", "rosa_memory", [CSRC / "memory.cu"], [TREES])


FORM = _choice.NativeForm("rosa", "cuda", "ROSA over token streams", lambda device: None, library)


def device_stream_choice(device: torch.device) -> _choice.Choice:
    """Whether token streams can be read on `device` ("cuda"), or on the host alone ("host")."""
    if (on_host := stream_choice()).impl != "cpu":
        return _choice.Choice("host", f"on the host: {on_host.reason}")
    other = _choice.Choice("host", "the host reads them")
    return FORM.choice("one warp a token, on the device", other, device)
