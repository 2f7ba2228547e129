"""Products of matrices with one vector each, at the speed at which the matrices can be read. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.matvec import cuda
from heron.ops.matvec.reference import ACTIVATIONS, Product, matvec_reference

__all__ = ["Product", "matvec", "matvec_choice"]
_FORMS = {"reference": matvec_reference, "cuda": cuda.matvec_cuda}


def matvec_choice(weights: Sequence[Tensor]) -> _choice.Choice:
    """The form that "auto" takes for products with `weights`, (out, in) each, of one dtype on one device."""
    device, dtype = weights[0].device, weights[0].dtype
    other = _choice.Choice("reference", f"an elementwise product and a sum, in PyTorch; runs on {device.type}")
    return cuda.FORM.choice("a warp for a row of a weight, each read once", other, device, dtype, weights)


def matvec(products: Sequence[Product], impl: str = "auto") -> list[Tensor]:
    """``y = add + factor * activation(weight x)`` of each product, all in one launch on a GPU.

    Everything is computed in fp32 (fp64 for fp64) and rounded once. The products do not read one another's results, and
    what one gives does not depend on the others. No gradients.

    Args:
        products: :class:`Product`, of one dtype on one device; their shapes may differ.
        impl: "reference" (any device), "cuda" (a kernel, built at first use), or "auto": "cuda" where it runs.

    Returns:
        y of each product, (1, out) in their dtype.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an unknown activation, an `impl` that does not
            exist or run here.
    """
    for number, product in enumerate(products):
        _check(number, product, products[0].weight)
    if not products:
        return []
    if impl == "auto":
        impl = matvec_choice([product.weight for product in products]).impl
    return _choice.form_of("matvec", impl, _FORMS)(products)


def _check(number: int, product: Product, first: Tensor) -> None:
    where, weight = f"matvec: product {number}:", product.weight
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape or weight.stride(1) != 1:
        raise KernelError(
            f"{where} weight must be (out, in), floating, not empty, its last stride 1; "
            f"got {tuple(weight.shape)} {weight.dtype}, strides {weight.stride()}"
        )
    if product.activation not in ACTIVATIONS:
        raise KernelError(f"{where} activation must be {', '.join(ACTIVATIONS)}; got {product.activation!r}")
    n_out, n_in = weight.shape
    wanted = {"x": n_in, "weight": None, "factor": n_out, "add": n_out}
    for name, size in wanted.items():
        tensor = getattr(product, name)
        if tensor is None:
            continue
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise KernelError(
                f"{where} all tensors must be {first.dtype} on {first.device}; "
                f"{name} is {tensor.dtype} on {tensor.device}"
            )
        if size is not None and (tuple(tensor.shape) != (1, size) or not tensor.is_contiguous()):
            raise KernelError(f"{where} {name} must be (1, {size}) and contiguous, got {tuple(tensor.shape)}")
