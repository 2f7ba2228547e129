"""token_step in C++ (csrc/token_step.cpp), one call a step, built at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build, _choice
from heron.ops.codes import CodedMatrix
from heron.ops.token_step.network import LayerStates, LayerWeights, Memory, Network

SOURCE = Path(__file__).parent / "csrc" / "token_step.cpp"
DTYPES = (torch.float32, torch.bfloat16)
_LANES, _LARGEST_HEAD = 16, 256
_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}  # by torch.backends.cpu.get_cpu_capability(); elsewhere what the compiler takes for granted


class Prepared:
    """A network as the library reads it: its addresses, and its vectors of channels in fp32.

    Contiguous matrices, and the states, are read where they are: the next step sees what is written into them.

    Raises:
        KernelError: states that are not contiguous, a low-rank gate, or as :meth:`FORM.require`.
    """

    def __init__(self, network: Network):
        (shift, wkv, _), (first, *_) = network.states[0], network.layers
        FORM.require(shift.device, shift.dtype, wkv.shape[3])
        if first.deep_embed == "low-rank":
            raise KernelError("token_step: it has no low-rank gate (v7a); TorchDecoder of heron.generation.decoder has")
        self.library = library()
        self.vocab, channels = network.head.shape
        self._kept: list[Tensor] = []  # whose addresses are in the structures
        self._layers = (_Layer * len(network.layers))(
            *(self._layer(*both) for both in zip(network.layers, network.states, strict=True))
        )
        self.structure = _Network(
            self._plain(network.embedding), *self._vectors(network.first_norm.weight, network.first_norm.bias),
            self._layers, *self._vectors(network.norm.weight, network.norm.bias), self._matrix(network.head),
            self._memory(network.memory),
            len(network.layers), channels, wkv.shape[1], first.ffn_key.shape[0], self.vocab,
            shift.dtype == torch.bfloat16, first.deep_embed == "hidden", network.norm.eps, first.head.eps,
        )  # fmt: skip

    def _layer(self, w: LayerWeights, states: LayerStates) -> _Layer:
        head, pointers, ranks = w.head, ctypes.c_void_p * 4, ctypes.c_int32 * 4
        of_values = None if head.v0 is None else self._vector(head.v0)
        return _Layer(
            *self._vectors(w.norm1.weight, w.norm1.bias, w.mix),
            *map(self._matrix, (w.receptance, w.key, w.value, w.output)),
            pointers(*(self._plain(part.down) for part in w.low_rank)),
            pointers(*(self._plain(part.up) for part in w.low_rank)),
            (ctypes.c_void_p * 3)(of_values, *self._vectors(head.w0, head.a0)),
            ranks(*(part.down.shape[0] for part in w.low_rank)),
            *self._vectors(head.k_k, head.k_a, head.r_k, head.norm_weight, head.norm_bias),
            *self._vectors(w.norm2.weight, w.norm2.bias, w.channel_mix),
            *map(self._matrix, (w.ffn_key, w.ffn_value)),
            *map(self._state, (states.att_shift, states.ffn_shift, states.wkv)),
        )

    def _memory(self, memory: Memory | None) -> _Memory:
        if memory is None:
            return _Memory()
        rows = memory.rows.to(torch.int32).contiguous()
        return _Memory(
            *self._vectors(memory.scale, memory.length, memory.copy),
            self._address(rows),
            *memory.copy.shape,
            len(rows) - 1,
        )

    def _vectors(self, *vectors: Tensor) -> list[int]:
        return [self._vector(vector) for vector in vectors]

    def _vector(self, vector: Tensor) -> int:
        return self._address(vector.detach().float().contiguous())

    def _matrix(self, matrix: Tensor | CodedMatrix) -> _Matrix:
        if isinstance(matrix, CodedMatrix):
            return _Matrix(*(None if part is None else self._plain(part) for part in matrix))
        return _Matrix(self._plain(matrix))

    def _plain(self, matrix: Tensor) -> int:
        return self._address(matrix.detach().contiguous())

    def _state(self, state: Tensor) -> int:
        if not state.is_contiguous():
            raise KernelError(f"token_step: states must be contiguous, got strides {state.stride()}")
        return self._address(state)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def token_step_cpu(
    prepared: Prepared,
    sequences: Sequence[int],
    tokens: Sequence[int],
    gates: Tensor | None,
    recalled: Tensor | None,
) -> Tensor:
    """See :class:`heron.ops.token_step.TokenStep`; on ``torch.get_num_threads()`` threads."""
    n = len(sequences)
    logits = torch.empty(n, prepared.vocab, dtype=torch.float32, device="cpu")
    gates = None if gates is None else gates.to("cpu", torch.float32).contiguous()
    recalled = None if recalled is None else recalled.to("cpu", torch.int64).contiguous()
    if prepared.library.heron_token_step(
        ctypes.byref(prepared.structure), n, (ctypes.c_int32 * n)(*sequences), (ctypes.c_int64 * n)(*tokens),
        None if recalled is None else recalled.data_ptr(), None if gates is None else gates.data_ptr(),
        logits.data_ptr(), torch.get_num_threads(),
    ):  # fmt: skip
        known = f"ids 0 to {prepared.vocab - 1}, of matches lengths 0 to {prepared.structure.memory.max_match}"
        found = "" if recalled is None else f" and matches {recalled.tolist()}"
        raise KernelError(f"token_step: wanted {known}; got {list(tokens)}{found}")
    return logits


def why_not(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the library does not run for such a network, as a clause; None where it does."""
    if head_size % _LANES or head_size > _LARGEST_HEAD:
        return f"it takes heads of {_LANES}, {2 * _LANES}, ... {_LARGEST_HEAD}, not of {head_size}"
    return _choice.why_not_dtype(dtype, DTYPES)


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built when needed; KernelError where it can't be."""
    capability = torch.backends.cpu.get_cpu_capability()
    # Without AVX-512 GCC moves a vector of 64 bytes 16 at a time, and what then reads 32 of them waits for two moves.
    moves = _build.known("-mmove-max=256", "-mstore-max=256") if capability == "AVX2" else ()
    flags = (*_FLAGS.get(capability, ()), *moves)
    built = _build.load_c_library("token_step", [SOURCE], ["-fno-math-errno", "-ffp-contract=fast", *flags])
    pointer, small = ctypes.c_void_p, ctypes.c_int32
    built.heron_token_step.argtypes = [pointer, small, pointer, pointer, pointer, pointer, pointer, small]
    return built


FORM = _choice.NativeForm("token_step", "cpu", "decoding", why_not, library)


class _Matrix(ctypes.Structure):
    """HeronMatrix of csrc/token_step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("numbers", "scales", "levels")]


class _Layer(ctypes.Structure):
    """HeronLayer of csrc/token_step.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm1_weight", "norm1_bias", "mix")),
        *((name, _Matrix) for name in ("receptance", "key", "value", "output")),
        ("down", ctypes.c_void_p * 4),
        ("up", ctypes.c_void_p * 4),
        ("bias", ctypes.c_void_p * 3),
        ("rank", ctypes.c_int32 * 4),
        *((name, ctypes.c_void_p) for name in ("k_k", "k_a", "r_k", "head_norm_weight", "head_norm_bias")),
        *((name, ctypes.c_void_p) for name in ("norm2_weight", "norm2_bias", "channel_mix")),
        *((name, _Matrix) for name in ("ffn_key", "ffn_value")),
        *((name, ctypes.c_void_p) for name in ("att_shift", "ffn_shift", "wkv")),
    ]


class _Memory(ctypes.Structure):
    """HeronMemory of csrc/token_step.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scale", "length", "copy", "rows")),
        *((name, ctypes.c_int32) for name in ("n_matches", "n_rows", "max_match")),
    ]


class _Network(ctypes.Structure):
    """HeronNetwork of csrc/token_step.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("embedding", "first_norm_weight", "first_norm_bias")),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")),
        ("head", _Matrix),
        ("memory", _Memory),
        *((name, ctypes.c_int32) for name in ("n_layer", "channels", "heads", "hidden", "vocab")),
        *((name, ctypes.c_int32) for name in ("in_half", "gates_hidden")),
        *((name, ctypes.c_float) for name in ("norm_eps", "head_norm_eps")),
    ]
