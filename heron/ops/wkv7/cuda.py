"""WKV7 on CUDA: the kernels in csrc as operators of PyTorch. README.md derives them.

Two layers. ``heron::wkv7s_*`` launch kernels into tensors that exist: csrc/wkv7s_op.cpp implements them for CUDA, and
the tests implement them for a CPU by emulation. ``heron::wkv7_kernels*`` above them build the kernels at first use,
allocate, know their gradient and their shapes, and so work under torch.compile, CUDA graphs and checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heron.ops import _build, _choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128)
SHARED_BYTES_128 = 165760  # of the general backward at N = 128, the largest block of all
STEP_TOKENS = 8  # up to here one kernel that keeps the state in registers beats chunks
_CSRC = Path(__file__).with_name("csrc")

_library = torch.library.Library("heron", "FRAGMENT")
_INPUTS = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b"
_PLAN = "Tensor? cu_seqlens, bool tensor_cores, int segments, int segment_tokens, bool mapped"
_library.define(
    f"wkv7s_forward({_INPUTS}, Tensor state, {_PLAN}, Tensor(a!) y, Tensor(b!) final_state, Tensor(c!)? saved, "
    "Tensor(d!)? transfer, Tensor(e!)? local, Tensor(f!)? edges) -> ()"
)
_library.define(
    f"wkv7s_backward({_INPUTS}, Tensor? dy, Tensor? d_final, Tensor saved, Tensor? transfer, {_PLAN}, Tensor(a!) dr, "
    "Tensor(b!) dw, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!) da, Tensor(f!) db, Tensor(g!) d_state, "
    "Tensor(h!)? local, Tensor(i!)? edges) -> ()"
)
_library.define(
    f"wkv7_kernels({_INPUTS}, Tensor state, Tensor? cu_seqlens, bool save, bool tensor_cores)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"wkv7_kernels_backward({_INPUTS}, Tensor? dy, Tensor? d_final, Tensor saved, Tensor transfer, Tensor? cu_seqlens, "
    "int n_states, bool tensor_cores) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "wkv7s_span(Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, int segments, int segment_tokens, "
    "Tensor(a!) transfer, Tensor(b!) local) -> ()"
)
_library.define(
    "wkv7s_span_backward(Tensor r, Tensor w, Tensor a, Tensor b, Tensor dy, int segments, int segment_tokens, "
    "Tensor(a!) local) -> ()"
)
_library.define(f"wkv7s_step({_INPUTS}, Tensor state, Tensor? cu_seqlens, Tensor(a!) y, Tensor(b!) final_state) -> ()")


def wkv7_cuda(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.wkv7` by the kernels in csrc; KernelError as :meth:`FORM.require`."""
    FORM.require(r.device, r.dtype, r.shape[-1])
    return wkv7_kernels(r, w, k, v, a, b, state, cu_seqlens)


def why_not(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why there is no kernel for this CUDA device and these inputs, as a clause; None where there is one."""
    if against := _choice.why_not_dtype(dtype, DTYPES):
        return against
    if head_size not in HEAD_SIZES:
        return f"it takes heads of {', '.join(map(str, HEAD_SIZES))}, not of {head_size}"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"it needs compute capability 8.0 or later; this GPU has {properties.major}.{properties.minor}"
    shared = properties.shared_memory_per_block_optin
    if head_size == 128 and shared < SHARED_BYTES_128:
        return f"it needs {SHARED_BYTES_128} bytes of shared memory in a block for N = 128; this GPU has {shared}"
    return None


@functools.cache
def library(*capability: tuple[int, int]) -> None:
    """Build (once) and load the kernels for the GPUs of this machine, and for devices of this compute capability.

    Raises:
        KernelError: there is no compiler, it failed, or building is forbidden; one line with the first error.
    """
    devices = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    capabilities = sorted({each for each in (*capability, *devices) if each >= (8, 0)})
    _build.load_op_library("wkv7s", sources(), cuda_flags(capabilities), headers())


FORM = _choice.NativeForm("wkv7", "cuda", "WKV7", why_not, library)


def sources() -> list[Path]:
    """The files to build."""
    return [_CSRC / "wkv7s.cu", _CSRC / "wkv7s_op.cpp"]


def headers() -> list[Path]:
    """What they include."""
    return sorted([*_CSRC.glob("*.cuh"), *_CSRC.glob("*.h")])


def cuda_flags(capabilities: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Flags of nvcc for GPUs of these compute capabilities."""
    targets = map(_build.arch_of, capabilities)
    roomy = all(major in (9, 10) for major, _ in capabilities)  # 227 KB of shared memory
    return (
        "-O3",
        f"-DHERON_BACKWARD_STAGES={2 if roomy else 1}",
        *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets),
    )


def wkv7_kernels(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    tensor_cores: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels, wherever ``heron::wkv7s_*`` are implemented. `tensor_cores` None: where they apply."""
    inputs = (r, w, k, v, a, b)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    if r.shape[1] <= STEP_TOKENS and not needs_gradient and tensor_cores is None:
        return torch.ops.heron.wkv7_kernels_step(*inputs, state, cu_seqlens)
    if tensor_cores is None:
        tensor_cores = on_tensor_cores(r.dtype, r.shape[-1])
    y, final, _, _ = torch.ops.heron.wkv7_kernels(*inputs, state, cu_seqlens, needs_gradient, tensor_cores)
    return y, final


def on_tensor_cores(dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernels for tensor cores apply."""
    return dtype == torch.bfloat16 and head_size in (64, 128)


def _in_segments(dtype: torch.dtype, head_size: int) -> bool:
    """Whether there are kernels for the maps of segments."""
    return dtype == torch.bfloat16 and head_size == 64


class _Plan(NamedTuple):
    """How the sequences are cut."""

    slots: int  # saved states
    segments: int
    segment_tokens: int


def plan_of(r: Tensor, cu_seqlens: Tensor | None, tensor_cores: bool) -> _Plan:
    B, T, H, N = r.shape
    chunk = 32 if tensor_cores else 16
    if cu_seqlens is not None:
        # Sequence i starts at slot cu_seqlens[i] // chunk + i, so no prefix sum has to wait for the device.
        return _Plan(T // chunk + cu_seqlens.numel() - 1, 1, T)
    segments = _segments(B * H, T) if tensor_cores and _in_segments(r.dtype, N) else 1
    segment_tokens = -(-T // (segments * 32)) * 32
    return _Plan(B * -(-T // chunk), -(-T // segment_tokens), segment_tokens)


def _segments(n_heads: int, n_tokens: int) -> int:
    """In how many segments to cut each of `n_heads` sequences, so that few long ones fill a GPU too.

    A cut sequence costs more than half the work again: that pays where a third of an H200's 132 multiprocessors would
    have none.
    """
    if 3 * n_heads > 2 * 132 or n_tokens < 2048:
        return 1
    return min(max(8, 512 // n_heads), n_tokens // 512)


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is strided or its rows are not 16-byte aligned, coincide or lie 2 GiB apart."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:  # the common case, and quicker to see
        return x
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    offsets = [x.data_ptr(), *(step * x.element_size() for step in steps)]
    is_near = x.shape[1] == 1 or x.stride(1) * x.element_size() < 2**31  # the kernels step in 32 bits
    if x.stride(-1) == 1 and is_near and all(offset and offset % 16 == 0 for offset in offsets):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _dense(state: Tensor) -> Tensor:
    """`state`, copied unless it is contiguous and 16-byte aligned."""
    return _aligned(state.contiguous())


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _between_segments(state: Tensor, plan: _Plan, names: int) -> list[Tensor | None]:
    """`names` workspaces of a state for each segment, or None where nothing is cut."""
    if plan.segments == 1:
        return [None] * names
    return [state.new_empty(state.shape[0] * plan.segments, *state.shape[1:]) for _ in range(names)]


def _build_for(x: Tensor) -> None:
    if x.is_cuda:
        library()


def run_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
    tensor_cores: bool,
    maps: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`maps`: the segments' transfers and what each leaves, where :func:`span_kernels` has found them."""
    _build_for(r)
    inputs = [_aligned(x) for x in (r, w, k, v, a, b)]
    state = _dense(state)
    plan = plan_of(r, cu_seqlens, tensor_cores)
    y, final, saved, kept = empty_results(r, state, plan, save, tensor_cores)
    if y.numel():
        transfer, local, edges = _between_segments(state, plan, 3)
        mapped = False
        if maps is not None and plan.segments > 1:
            (kept, local), mapped = maps, True
        cut = (_contiguous(cu_seqlens), tensor_cores, plan.segments, plan.segment_tokens, mapped)
        torch.ops.heron.wkv7s_forward(
            *inputs, state, *cut, y, final, saved if save else None, kept if kept.numel() else transfer, local, edges
        )
    return y, final, saved, kept


@torch.library.register_fake("heron::wkv7_kernels")
def _(r, w, k, v, a, b, state, cu_seqlens, save, tensor_cores):
    return empty_results(r, state, plan_of(r, cu_seqlens, tensor_cores), save, tensor_cores)


def empty_results(
    r: Tensor, state: Tensor, plan: _Plan, save: bool, tensor_cores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and for the backward the state before each chunk and the segments' transfer matrices."""
    square = state.shape[1:]
    saved = state.new_empty(plan.slots if save else 0, *square, dtype=torch.bfloat16 if tensor_cores else None)
    kept = state.new_empty(r.shape[0] * plan.segments if save and plan.segments > 1 else 0, *square)
    return r.new_empty(r.shape), state.new_empty(state.shape), saved, kept


def run_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor | None,
    d_final: Tensor | None,
    saved: Tensor,
    transfer: Tensor,
    cu_seqlens: Tensor | None,
    n_states: int,
    tensor_cores: bool,
    d_local: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`d_local`: what :func:`span_gradient_kernels` found of the segments."""
    inputs = [_aligned(x) for x in (r, w, k, v, a, b)]
    grads = empty_gradients(r, n_states)
    if r.numel():
        plan = plan_of(r, cu_seqlens, tensor_cores)
        local, edges = _between_segments(grads[-1], plan, 2)
        mapped = False
        if d_local is not None and plan.segments > 1:
            local, mapped = d_local, True
        torch.ops.heron.wkv7s_backward(
            *inputs,
            None if dy is None else _aligned(dy),
            None if d_final is None else _dense(d_final),
            saved,
            transfer if plan.segments > 1 else None,
            *(_contiguous(cu_seqlens), tensor_cores, plan.segments, plan.segment_tokens, mapped),
            *grads,
            local,
            edges,
        )
    return grads


@torch.library.register_fake("heron::wkv7_kernels_backward")
def _(r, w, k, v, a, b, dy, d_final, saved, transfer, cu_seqlens, n_states, tensor_cores):
    return empty_gradients(r, n_states)


def empty_gradients(r: Tensor, n_states: int) -> tuple[Tensor, ...]:
    H, N = r.shape[2:]
    return (*(r.new_empty(r.shape) for _ in range(6)), r.new_empty(n_states, H, N, N, dtype=torch.float32))


class _Kernels(torch.autograd.Function):
    """The gradient of ``heron::wkv7_kernels``. What torch.library would generate takes longer than short kernels do."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, state, cu_seqlens, _, tensor_cores = arguments
        y, final, saved, transfer = _below_autograd(*arguments)
        ctx.save_for_backward(*tensors, saved, transfer, cu_seqlens)
        ctx.n_states, ctx.tensor_cores = state.shape[0], tensor_cores
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, transfer)
        return y, final, saved, transfer

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final, _saved, _transfer):  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, saved, transfer, cu_seqlens = ctx.saved_tensors
        grads = torch.ops.heron.wkv7_kernels_backward(
            *inputs, dy, d_final, saved, transfer, cu_seqlens, ctx.n_states, ctx.tensor_cores
        )
        return (*grads, None, None, None)


def _below_autograd(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.heron.wkv7_kernels.default(*arguments)


def _with_gradient(*arguments):
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:7])
    return _Kernels.apply(*arguments) if needed else _below_autograd(*arguments)


for _device in ("CPU", "CUDA"):
    _library.impl("wkv7_kernels", run_forward, _device)
    _library.impl("wkv7_kernels_backward", run_backward, _device)
_library.impl("wkv7_kernels", _with_gradient, "Autograd")


@torch.library.custom_op("heron::wkv7_kernels_step", mutates_args=())
def _step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    _build_for(r)
    y, final = r.new_empty(r.shape), state.new_empty(state.shape)
    if y.numel():
        inputs = [_aligned(x) for x in (r, w, k, v, a, b)]
        torch.ops.heron.wkv7s_step(*inputs, _dense(state), _contiguous(cu_seqlens), y, final)
    return y, final


@_step.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens):
    return r.new_empty(r.shape), state.new_empty(state.shape)


def span_kernels(w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`heron.ops.wkv7_span` of each segment that a long sequence is cut into: (segments, B, H, N, N) each."""
    _build_for(w)
    B, _, H, N = w.shape
    if not _in_segments(w.dtype, N):
        identity = torch.eye(N, device=w.device).repeat(B, H, 1, 1)
        transfer = run_forward(k, w, k, torch.zeros_like(v), a, b, identity, None, False, False)[1]
        return transfer[None], run_forward(k, w, k, v, a, b, torch.zeros_like(identity), None, False, False)[1][None]
    plan = plan_of(w, None, True)
    transfer, local = w.new_empty(2, B * plan.segments, H, N, N, dtype=torch.float32)
    inputs = [_aligned(x) for x in (w, k, v, a, b)]
    torch.ops.heron.wkv7s_span(*inputs, plan.segments, plan.segment_tokens, transfer, local)
    return by_segment(transfer, B), by_segment(local, B)


def span_gradient_kernels(r: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """:func:`heron.ops.wkv7_span_gradient` of each segment: (segments, B, H, N, N)."""
    _build_for(w)
    B, _, H, N = w.shape
    if not _in_segments(w.dtype, N):
        zeros, state = torch.zeros_like(w), w.new_zeros(B, H, N, N, dtype=torch.float32)
        _, _, saved, transfer = run_forward(r, w, zeros, zeros, a, b, state, None, True, False)
        return run_backward(r, w, zeros, zeros, a, b, dy, None, saved, transfer, None, B, False)[-1][None]
    plan = plan_of(w, None, True)
    local = w.new_empty(B * plan.segments, H, N, N, dtype=torch.float32)
    inputs = [_aligned(x) for x in (r, w, a, b, dy)]
    torch.ops.heron.wkv7s_span_backward(*inputs, plan.segments, plan.segment_tokens, local)
    return by_segment(local, B)


def n_segments(w: Tensor) -> int:
    """Into how many segments :func:`span_kernels` cuts."""
    return plan_of(w, None, True).segments if _in_segments(w.dtype, w.shape[-1]) else 1


def by_segment(states: Tensor, n_rows: int) -> Tensor:
    """(B * segments, H, N, N), as the kernels have them, as (segments, B, H, N, N)."""
    return states.unflatten(0, (n_rows, -1)).transpose(0, 1)


def by_row(states: Tensor) -> Tensor:
    """The inverse of :func:`by_segment`."""
    return states.transpose(0, 1).flatten(0, 1)
