"""Sequences packed along T without the kernels that know of them: each is computed by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from heron.ops import _graph, _packed
from heron.ops.wkv7 import chunked


def wkv7_packed(
    form: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """`form` over each packed sequence; an empty one keeps its state. In a graph it is one operator, in chunks.

    KernelError for numbers that do not go from 0 to T or that decrease.
    """
    if _graph.in_graph():
        return _operator(*inputs, state, cu_seqlens)
    return _joined(_each(form, inputs, state, cu_seqlens))


def _each(
    form: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    lengths = _packed.lengths("wkv7", inputs[0], cu_seqlens)
    for *xs, s in zip(*(x.split(lengths, dim=1) for x in inputs), state.split(1), strict=True):
        yield form(*xs, s) if xs[0].shape[1] else (xs[0], s)


def _joined(results: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ys, states = zip(*results, strict=True)
    return torch.cat(ys, dim=1), torch.cat(states)


def _run(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    return _joined(_each(chunked.run, (r, w, k, v, a, b), state, cu_seqlens))


def _run_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor,
    dy: Tensor, d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lengths, found = _packed.lengths("wkv7", r, cu_seqlens), []
    parts = (x.split(lengths, dim=1) for x in (r, w, k, v, a, b))
    for one in zip(*parts, state.split(1), dy.split(lengths, dim=1), d_state.split(1), strict=True):
        found.append(chunked.run_backward(*one) if one[0].shape[1] else (*one[:6], one[-1]))
    *of_inputs, d_initial = zip(*found, strict=True)
    dr, dw, dk, dv, da, db = (torch.cat(of_each, dim=1) for of_each in of_inputs)
    return dr, dw, dk, dv, da, db, torch.cat(d_initial)


_operator_backward = _graph.Operator(
    "wkv7_packed_backward",
    _run_backward,
    lambda r, w, k, v, a, b, state, *_: (*(r.new_empty(r.shape) for _ in range(6)), state.new_empty(state.shape)),
)
_operator = _graph.Operator(
    "wkv7_packed",
    _run,
    lambda r, w, k, v, a, b, state, cu_seqlens: (r.new_empty(r.shape), state.new_empty(state.shape)),
    keep=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, *gradients: (*_operator_backward(*ctx.saved_tensors, *gradients), None),
)
