"""token_step on a GPU (csrc/token_step.cu), for one sequence: one kernel a step, built at first use."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from heron.ops import _build, _choice
from heron.ops.codes import GROUP, CodedMatrix
from heron.ops.token_step.network import LayerStates, LayerWeights, LowRank, Network

_CSRC = Path(__file__).parent / "csrc"
SOURCE = _CSRC / "token_step.cu"
SHARED = (_build.BARRIERS, _build.HEAD, _build.PRODUCTS, _build.SHARED_ADDRESS)  # with other operators
INCLUDES = (*SHARED, *(_CSRC / f"{name}.cuh" for name in ("network", "instructions", "tiles")))
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZE = 64
RANKS = 32  # ranks are filled up to a multiple of it with zeros
HIGHEST_RANK = 1024  # a row of an upper low-rank matrix lies in a slot of the ring


class Prepared:
    """A network of one sequence as the kernel reads it.

    Args:
        network: its low-rank matrices contiguous.
        before: the states that a step goes on from, which stay as they are, but for those that are the network's own.
    """

    def __init__(self, network: Network, before: Sequence[LayerStates]):
        self._kept: list[Tensor] = []  # whose addresses are in the table
        rows = [self._layer(*of) for of in zip(network.layers, before, network.states, strict=True)]
        first, device = network.layers[0], network.norm.weight.device
        self.layers = torch.tensor(rows, dtype=torch.int64).to(device)
        self.head, self.head_scales = _parts(network.head)
        self.norm, self.eps_head = network.norm, first.head.eps
        self.gates_hidden = first.deep_embed == "hidden"
        self.ranks = [_filled_up(len(part.down)) for part in first.low_rank]
        self.hidden, channels = first.ffn_key.shape
        words = 7 * channels + channels // 2 + (sum(self.ranks) + self.hidden) // 2  # that blocks tell one another
        words += channels // 4  # a token, normed
        self.scratch = torch.zeros(words, dtype=torch.int64, device=device)
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)

    def __call__(self, x: Tensor, gates: Tensor | None) -> Tensor:
        return torch.ops.heron.token_step(
            x, self.layers, self.head, self.head_scales, self.norm.weight, self.norm.bias, gates,
            self.gates_hidden, self.scratch, self.counters, self.ranks, self.hidden, self.norm.eps, self.eps_head,
        )  # fmt: skip

    def _layer(self, w: LayerWeights, before: LayerStates, after: LayerStates) -> list[int]:
        """The addresses of `Layer` in the kernel's source."""
        head, low_rank = w.head, [_with_rank(part) for part in w.low_rank]
        pairs = [_parts(matrix) for matrix in (w.receptance, w.key, w.value)]
        pairs += [(part.down, None) for part in low_rank]
        pairs += [_parts(matrix) for matrix in (w.output, w.ffn_key, w.ffn_value)]
        tensors = [
            w.norm1.weight, w.norm1.bias, w.mix, *(part for pair in pairs for part in pair),
            *(part.up for part in low_rank),
            head.w0, head.a0, head.v0, head.k_k, head.k_a, head.r_k, head.norm_weight, head.norm_bias,
            w.norm2.weight, w.norm2.bias, w.channel_mix,
            before.att_shift, before.ffn_shift, after.att_shift, after.ffn_shift, before.wkv, after.wkv,
        ]  # fmt: skip
        self._kept += [tensor for tensor in tensors if tensor is not None]
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _parts(matrix: Tensor | CodedMatrix) -> tuple[Tensor, Tensor | None]:
    """The numbers of a matrix, or its codes and their scales, of which a row takes a multiple of 16 bytes."""
    if not isinstance(matrix, CodedMatrix):
        return matrix, None
    return matrix.codes, F.pad(matrix.scales, (0, -matrix.scales.shape[1] % 8))


def _filled_up(rank: int) -> int:
    return -(-rank // RANKS) * RANKS


def _with_rank(part: LowRank) -> LowRank:
    """`part` with a rank that the kernel takes."""
    missing = _filled_up(len(part.down)) - len(part.down)
    return part if missing == 0 else LowRank(F.pad(part.down, (0, 0, 0, missing)), F.pad(part.up, (0, missing)))


def why_not(device: torch.device, network: Network | None) -> str | None:
    """Why the kernel does not run for `network` (None: for any), as a clause; None where it does."""
    if (capability := torch.cuda.get_device_capability(device))[0] != 9:
        return f"it is for compute capability 9.0, this device has {'.'.join(map(str, capability))}"
    if network is None:
        return None
    first, states = network.layers[0], network.states[0]
    if against := _choice.why_not_dtype(network.norm.weight.dtype, DTYPES):
        return against
    if first.deep_embed == "low-rank":
        return "it has no low-rank gate (v7a)"
    if (head_size := first.head.r_k.shape[1]) != HEAD_SIZE:
        return f"it takes heads of {HEAD_SIZE}, not of {head_size}"
    if (hidden := first.ffn_key.shape[0]) % GROUP:
        return f"it takes a multiple of {GROUP} hidden channels, not {hidden}"
    if (rank := max(len(part.down) for part in first.low_rank)) > HIGHEST_RANK:
        return f"it takes low ranks of at most {HIGHEST_RANK}, not of {rank}"
    if states.wkv.dtype != torch.float32:
        return f"it takes states in fp32, not in {states.wkv.dtype}"
    if isinstance(first.key, CodedMatrix) and first.key.bits != 8:
        return f"it takes codes of 8 bits, not of {first.key.bits}"
    properties = torch.cuda.get_device_properties(device)
    channels, has = network.norm.weight.shape[0], properties.shared_memory_per_block_optin
    blocks = min(properties.multi_processor_count, 3 * channels // 8, hidden // 8)  # as the launch has it
    needed = shared_bytes(network, blocks)
    return f"this network needs {needed} bytes of shared memory, a block has {has}" if needed > has else None


def shared_bytes(network: Network, blocks: int) -> int:
    """The least that `shared_of` of the kernel's source can do with, by so many blocks."""
    first, channels = network.layers[0], network.norm.weight.shape[0]
    hidden, ranks = first.ffn_key.shape[0], [_filled_up(len(part.down)) for part in first.low_rank]
    has_codes = isinstance(network.head, CodedMatrix)
    in_codes, floats = _most_vectors(channels, ranks, blocks, has_codes)
    scales = -(-max(in_codes * channels, hidden) // GROUP // 4) * 16 if has_codes else 0
    vectors = max(2 * (in_codes + floats) * channels + 4 * channels, 2 * hidden)  # and the residual
    own = -(-channels // 8 // blocks) * 8 * 4  # rows of it
    tables = 352 * len(network.layers)  # sizeof(Layer)
    others = 3648 + 4608 + 128 + 256 + 64  # a head, sums of tiles and of the block, barriers, parts
    rest = tables + own + scales + 2 * sum(ranks) + others
    slots = 3 * 8 * (2048 + (64 if has_codes else 0))
    return -(-(vectors + rest) // 128) * 128 + slots


def _most_vectors(channels: int, ranks: Sequence[int], blocks: int, has_codes: bool) -> tuple[int, int]:
    """How many vectors a block multiplies by r, k, v and lower low-rank matrices, at most: by codes, and by floats."""
    projected = _vectors(zip((0, 1, 2), [channels] * 3, strict=True), blocks)
    # The lower low-rank matrices are for the last of the blocks that need one vector otherwise.
    free = [block for block in reversed(range(blocks)) if projected[block] == 1] or [*reversed(range(blocks))]
    squeezed = _vectors(zip((2, 3, 4, 5), ranks, strict=True), len(free))
    if has_codes:
        return max(projected), max(squeezed)
    both = projected.copy()
    for block, more in zip(free, squeezed, strict=True):
        both[block] += more
    return 0, max(both)


def _vectors(rows: Iterable[tuple[int, int]], blocks: int) -> list[int]:
    """How many vectors each block needs for so many rows of each, in tiles of 8 that lie side by side."""
    tiles = [vector for vector, n in rows for _ in range(-(-n // 8))]
    each, more = divmod(len(tiles), blocks)
    begins = [block * each + min(block, more) for block in range(blocks + 1)]
    return [len(set(tiles[begin:end])) for begin, end in itertools.pairwise(begins)]


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernel for devices of this compute capability; KernelError where that fails.

    For those that it does not run on there is nothing to build.
    """
    if capability[0] == 9:
        _build.load_kernels_for(capability, "token_step", "token_step_one", [SOURCE], INCLUDES)


FORM = _choice.NativeForm("token_step", "cuda", "one token of one sequence", why_not, library)
