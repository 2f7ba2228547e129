"""The op on CUDA: the products beside the squared ReLU by csrc/squared_relu.cu, which is built at first use."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from heron.ops import _build, _choice, _graph

SOURCE = Path(__file__).parent / "csrc" / "squared_relu.cu"
HEADERS = [_build.BOXES, _build.BOX_MAPS]
DTYPES = (torch.bfloat16,)
FEWEST = 2048  # tokens; fewer leave multiprocessors without a tile
COLUMNS = 256  # hidden channels of a tile

_library = torch.library.Library("heron", "FRAGMENT")
# relu(x key^T)^2, and relu(x key^T)
_library.define("squared_relu(Tensor x, Tensor key) -> (Tensor, Tensor)")
# (d_y value) 2 roots, and roots^2
_library.define("squared_relu_backward(Tensor d_y, Tensor value, Tensor roots) -> (Tensor, Tensor)")


def squared_relu_mlp_cuda(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See :func:`heron.ops.squared_relu_mlp`; the kernels must have been built (:meth:`FORM.require`)."""
    y, _ = _operator(x.reshape(-1, x.shape[-1]).contiguous(), key.contiguous(), value.contiguous())
    return y.view(*x.shape[:-1], -1)


def why_not(device: torch.device, dtype: torch.dtype, tokens: int, depth: int, hidden: int) -> str | None:
    """Why the kernels do not run, as a clause; None where they do."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return "it is for compute capability 9.0"
    if against := _choice.why_not_dtype(dtype, DTYPES):
        return against
    if tokens < FEWEST:
        return f"it takes {FEWEST} tokens or more, not {tokens}"
    if hidden % COLUMNS or depth % 8 or depth == 0:
        return f"it takes F = {COLUMNS}, {2 * COLUMNS}, ... and C = 8, 16, ..., not {hidden} and {depth}"
    return None


@functools.cache
def library(capability: tuple[int, int]) -> None:
    """Build and load the kernels, if they are for this compute capability; KernelError where that fails."""
    if capability[0] == 9:
        _build.load_kernels_for(capability, "squared_relu_mlp", "squared_relu", [SOURCE], HEADERS)


FORM = _choice.NativeForm("squared_relu_mlp", "cuda", "the squared ReLU", why_not, library)


@torch.library.register_fake("heron::squared_relu", lib=_library)
def _(x, key):
    roots = x.new_empty(x.shape[0], key.shape[0])
    return roots, torch.empty_like(roots)


@torch.library.register_fake("heron::squared_relu_backward", lib=_library)
def _(d_y, value, roots):
    return torch.empty_like(roots), torch.empty_like(roots)


def _run(x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    squares, roots = torch.ops.heron.squared_relu(x, key)
    return squares @ value.T, roots


def _shapes(x, key, value):
    return x.new_empty(x.shape[0], value.shape[0]), x.new_empty(x.shape[0], key.shape[0])


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, d_y, _):
    x, key, value, roots = ctx.saved_tensors
    of_x, of_key, of_value = ctx.needs_input_grad
    d_y = d_y.contiguous()
    d, squares = torch.ops.heron.squared_relu_backward(d_y, value, roots)
    return d @ key if of_x else None, d.T @ x if of_key else None, d_y.T @ squares if of_value else None


_operator = _graph.Operator("squared_relu_mlp", _run, _shapes, _keep, _gradients)
