"""Products of matrices with one vector each, at the speed at which the matrices can be read. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.ops import _choice, _products
from heron.ops._products import Product
from heron.ops.codes import CodedMatrix
from heron.ops.matvec import cuda
from heron.ops.matvec.reference import matvec_reference

__all__ = ["Product", "matvec", "matvec_choice"]
_FORMS = {"reference": matvec_reference, "cuda": cuda.matvec_cuda}


def matvec_choice(weights: Sequence[Tensor | CodedMatrix], dtype: torch.dtype) -> _choice.Choice:
    """The form that "auto" takes for products with `weights`, (out, in) each, on one device, and vectors of `dtype`."""
    device = weights[0].device
    other = _choice.Choice("reference", f"an elementwise product and a sum, in PyTorch; runs on {device.type}")
    return cuda.FORM.choice("a warp for a row of a weight, each read once", other, device, dtype, weights)


def matvec(products: Sequence[Product], impl: str = "auto") -> list[Tensor]:
    """``y = add + factor * activation(weight x)`` of each product, all in one launch on a GPU.

    Everything is computed in fp32 (fp64 for fp64) and rounded once. The products do not read one another's results, and
    what one gives does not depend on the others. No gradients.

    Args:
        products: :class:`Product`, each of one vector, of one dtype on one device; their shapes may differ. Weights may
            be of codes (:class:`heron.ops.codes.CodedMatrix`): they are read as they are.
        impl: "reference" (any device), "cuda" (a kernel, built at first use), or "auto": "cuda" where it runs.

    Returns:
        y of each product, (1, out) in their dtype.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit together, an unknown activation, an `impl` that does not
            exist or run here.
    """
    _products.check("matvec", products, 1, of_codes=True)
    if not products:
        return []
    if impl == "auto":
        impl = matvec_choice([product.weight for product in products], products[0].x.dtype).impl
    return _choice.form_of("matvec", impl, _FORMS)(products)
