"""Products for the tests of heron.ops.matvec and few_rows, and what they are exactly."""

from __future__ import annotations

import torch

from heron.ops._products import ACTIVATIONS, Product
from heron.ops.int8 import Int8Matrix, dense

# Half a unit in the last place, relative, or more.
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
FORMS = [(name, factor, add) for name in ACTIVATIONS for factor in (False, True) for add in (False, True)]


class AsIfOnAGpu:
    """A weight (8, 8) in bf16 that says it is on a CUDA device."""

    device, dtype, shape = torch.device("cuda"), torch.bfloat16, (8, 8)

    def __getattr__(self, name):
        return getattr(torch.zeros(self.shape, dtype=self.dtype), name)


def products(shapes, n, dtype, device="cpu", seed=0):
    """One product of each shape (out, in) with n vectors, the forms in turn; every second weight is a part of a wider
    matrix. Those of (out, in, "int8") are in 8 bits."""
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    made = []
    for i, (n_out, n_in, *kind) in enumerate(shapes):
        activation, has_factor, has_add = FORMS[(5 * i + seed) % len(FORMS)]
        weight = numbers(n_out, n_in + 8 * (i % 2), scale=2 * n_in**-0.5)[:, :n_in]
        factor, add = (numbers(n, n_out) if wanted else None for wanted in (has_factor, has_add))
        made.append(Product(numbers(n, n_in), Int8Matrix.of(weight) if kind else weight, activation, factor, add))
    return made


def of_vectors(some, chosen):
    """The same products for `chosen` vectors alone."""
    parts = [[part[chosen].contiguous() if i != 1 and torch.is_tensor(part) else part for i, part in enumerate(product)]
             for product in some]  # fmt: skip
    return [Product(*part) for part in parts]


def exact(product):
    """The product in fp64, and what its terms are large at most."""
    product = product._replace(weight=dense(product.weight, torch.float64))
    x, weight, activation, factor, add = (part.double() if torch.is_tensor(part) else part for part in product)
    functions = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    y = functions.get(activation, lambda x: x.clamp(min=0) ** 2)(x @ weight.T)
    scale = (x.abs() @ weight.abs().T) * (1 + y.abs().sqrt()) + 1
    y = y * (1 if factor is None else factor)
    scale = scale * (1 if factor is None else factor.abs())
    return y + (0 if add is None else add), scale


def compare(got, wanted_of):
    """Each result is its product, but for rounding and for sums in fp32."""
    for y, product in zip(got, wanted_of, strict=True):
        want, scale = exact(product)
        assert y.shape == want.shape
        assert y.dtype == product.x.dtype
        in_fp32 = 0 if y.dtype == torch.float64 else 2e-6
        least = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps / 2  # half of what subnormals differ by
        limit = ROUNDING[y.dtype] * want.abs() + (in_fp32 + 1e-15) * scale + least
        assert ((y.double() - want).abs() <= limit).all()
