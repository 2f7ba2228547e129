"""Products of matrices with few vectors each, at the speed at which the matrices can be read. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from heron.ops import _choice, _products
from heron.ops._products import Product
from heron.ops.few_rows import cuda
from heron.ops.few_rows.reference import few_rows_reference

__all__ = ["MOST", "Product", "few_rows", "few_rows_choice"]
MOST = cuda.MOST
_FORMS = {"reference": few_rows_reference, "cuda": cuda.few_rows_cuda}


def few_rows_choice(weights: Sequence[Tensor], n: int) -> _choice.Choice:
    """The form that "auto" takes for n vectors and `weights`, (out, in) each, of one dtype on one device."""
    device, dtype = weights[0].device, weights[0].dtype
    other = _choice.Choice("reference", f"matrix products, in PyTorch; runs on {device.type}")
    return cuda.FORM.choice("on tensor cores, each weight read once", other, device, dtype, weights, n)


def few_rows(products: Sequence[Product], impl: str = "auto") -> list[Tensor]:
    """``y = add + factor * activation(weight x)`` of each product, for n vectors x, all in one launch on a GPU.

    Everything is computed in fp32 (fp64 for fp64) and rounded once. The products do not read one another's results,
    and what one gives does not depend on the others. In a kernel, what a vector gives depends neither on the other
    vectors nor on how many there are, not by a bit; on compute capability 9.0 there is another kernel for 17 and more.
    No gradients.

    Args:
        products: :class:`Product`, of one n and one dtype on one device; their other sizes may differ.
        impl: "reference" (any device), "cuda" (a kernel for up to `MOST` vectors, built at first use), or "auto":
            "cuda" where it runs.

    Returns:
        y of each product, (n, out) in their dtype.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an unknown activation, an `impl` that does not
            exist or run here.
    """
    if not products:
        return []
    n = len(products[0].x) if products[0].x.dim() else 0
    _products.check("few_rows", products, n)
    if impl == "auto":
        impl = few_rows_choice([product.weight for product in products], n).impl
    return _choice.form_of("few_rows", impl, _FORMS)(products)
