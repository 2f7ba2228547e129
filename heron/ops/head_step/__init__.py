"""One token of the time mix, between its products: gates, WKV7, norm and bonus of every head. README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.head_step import cuda
from heron.ops.head_step.reference import HeadInputs, HeadWeights, head_step_reference

__all__ = ["HeadInputs", "HeadWeights", "head_step", "head_step_choice"]
_FORMS = {"reference": head_step_reference, "cuda": cuda.head_step_cuda}


def head_step_choice(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> _choice.Choice:
    """The form that "auto" takes for inputs of `dtype` and `head_size` on `device`."""
    other = _choice.Choice("reference", f"elementwise, in PyTorch; runs on {device.type}")
    return cuda.FORM.choice("a block of threads a head, its state in registers", other, device, dtype, head_size)


def head_step(
    inputs: HeadInputs,
    weights: HeadWeights,
    wkv: Tensor,
    new_wkv: Tensor | None = None,
    drawn: Tensor | None = None,
    settled: bool = False,
    impl: str = "auto",
) -> Tensor:
    """What the output matrix of the time mix is multiplied with, for one token, and the states behind it.

    With ``iclr = sigmoid(a0 + iclr)``, and per head::

        v           <- v + (v_first - v) sigmoid(v0 + value)             where there is v_first
        removal_key  = k k_k / |k k_k|
        k           <- k (1 + (iclr - 1) k_a)
        S           <- S diag(exp(-exp(-0.5) sigmoid(w0 + w))) - (S removal_key) (removal_key iclr)^T + v k^T
        y            = (norm(S r) + (sum of r k r_k) v) gate

    Everything is computed in fp32 (fp64 for fp64) and rounded once. No gradients. :func:`heron.ops.head_mix` is the
    same for whole sequences. Source: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py.

    Args:
        inputs: :class:`HeadInputs`, (n, C) each, in one dtype, contiguous, C = H N.
        weights: :class:`HeadWeights`, in that dtype, contiguous.
        wkv: the states (n, H, N_value, N_key), contiguous, fp32 (fp64 for fp64). Or bf16: each number of the new ones
            becomes one of its two neighbours there, at random, so that what many tokens add up to is right on average.
        new_wkv: as `wkv`, where the new states go; None: into `wkv`.
        drawn: with states in bf16, what randomness is drawn from: (n,) int64, of a sequence another number each time.
        settled: whether none of the last few kernels of the stream writes `wkv`: it is then read while they still run.
        impl: "reference" (any device), "cuda" (a kernel, built at first use), or "auto": "cuda" where it runs.

    Returns:
        y (n, C), in the dtype of the inputs.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an `impl` that does not exist or run here.
    """
    new_wkv = wkv if new_wkv is None else new_wkv
    _check(inputs, weights, wkv, new_wkv, drawn)
    if impl == "auto":
        impl = head_step_choice(wkv.device, inputs.r.dtype, wkv.shape[3]).impl
    return _choice.form_of("head_step", impl, _FORMS)(inputs, weights, wkv, new_wkv, drawn, settled)


def _check(inputs: HeadInputs, weights: HeadWeights, wkv: Tensor, new_wkv: Tensor, drawn: Tensor | None) -> None:
    if wkv.dim() != 4 or wkv.shape[2] != wkv.shape[3]:
        raise KernelError(f"head_step: wkv must be (n, H, N, N), got {tuple(wkv.shape)}")
    if len({x is None for x in (inputs.value, inputs.v_first, weights.v0)}) > 1:
        raise KernelError("head_step: value, v_first and v0 come together, or not at all")
    n, H, N, _ = wkv.shape
    dtype, at_random = inputs.r.dtype, wkv.dtype == torch.bfloat16
    if at_random != (drawn is not None):
        raise KernelError(f"head_step: drawn comes with states in torch.bfloat16, and these are {wkv.dtype}")
    wanted = {
        **{name: (x, (n, H * N), dtype) for name, x in inputs._asdict().items()},
        **{name: (x, None, dtype) for name, x in weights._asdict().items() if name != "eps"},
        **{
            name: (x, tuple(wkv.shape), wkv.dtype if at_random else torch.promote_types(dtype, torch.float32))
            for name, x in (("wkv", wkv), ("new_wkv", new_wkv))
        },
        "drawn": (drawn, (n,), torch.int64),
    }
    for name, (tensor, shape, kind) in wanted.items():
        if tensor is None:
            continue
        fits = tensor.numel() == H * N if shape is None else tuple(tensor.shape) == shape
        if not fits or tensor.dtype != kind or not tensor.is_contiguous():
            raise KernelError(
                f"head_step: {name} must be {shape or f'of {H * N} values,'} {kind} and contiguous, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != wkv.device:
            raise KernelError(f"head_step: all tensors must be on {wkv.device}; {name} is on {tensor.device}")
