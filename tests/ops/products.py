"""Products for the tests of heron.ops.matvec and few_rows, and what they are exactly."""

from __future__ import annotations

import ctypes

import torch

from heron.ops._products import ACTIVATIONS, Product
from heron.ops.codes import CodedMatrix, dense
from heron.ops.few_rows import MOST

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
    matrix. Those of (out, in, bits) are of codes."""
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    made = []
    for i, (n_out, n_in, *kind) in enumerate(shapes):
        activation, has_factor, has_add = FORMS[(5 * i + seed) % len(FORMS)]
        weight = numbers(n_out, n_in + 8 * (i % 2), scale=2 * n_in**-0.5)[:, :n_in]
        factor, add = (numbers(n, n_out) if wanted else None for wanted in (has_factor, has_add))
        made.append(
            Product(numbers(n, n_in), CodedMatrix.of(weight, *kind) if kind else weight, activation, factor, add)
        )
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


def by_source(function, some, *leading, with_codes=False):
    """Products by a kernel's source on a CPU.

    Args:
        function: of a library; takes `leading`, the pointers of each kind of tensor, and the sizes of each product.
        with_codes: whether it takes the scales and levels of weights of codes, behind the weights.
    """
    xs, weights, activations, factors, adds = zip(*some, strict=True)
    ys = [
        torch.full((len(x), weight.shape[0]), torch.nan, dtype=x.dtype) for x, weight in zip(xs, weights, strict=True)
    ]
    coded = [weight if isinstance(weight, CodedMatrix) else CodedMatrix(weight, None) for weight in weights]
    numbers, scales, levels = zip(*coded, strict=True)

    def pointers(tensors):
        return (ctypes.c_void_p * len(some))(*(None if x is None else x.data_ptr() for x in tensors))

    def integers(values, kind=ctypes.c_int):
        return (kind * len(some))(*values)

    tensors = (xs, numbers, *((scales, levels) if with_codes else ()), factors, adds, ys)
    error = function(
        *leading, *map(pointers, tensors), integers([each.stride(0) for each in numbers], ctypes.c_int64),
        integers([weight.shape[1] for weight in weights]), integers(map(len, numbers)),
        integers([list(ACTIVATIONS).index(name) for name in activations]),
    )  # fmt: skip
    assert error is None, error.decode()
    return ys


def check_that_vectors_keep_their_bits(multiply, shapes):
    """What each of MOST vectors in bf16 gives is the same bits whatever is beside it."""
    some = products(shapes, MOST, torch.bfloat16)
    for product in some:  # and it may be anything
        product.x[20] = torch.inf
        product.x[21] = torch.nan
    together = multiply(some)
    for chosen in ([3], [31, 3, 1], [*range(17)]):
        for alone, beside in zip(multiply(of_vectors(some, chosen)), together, strict=True):
            assert torch.equal(alone, beside[chosen])


def check_that_what_is_not_finite_stays_so(multiply, definition, activation):
    """Two vectors in bf16 with NaN and infinity among the weights give what the definition gives."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    weight[1, 7], weight[2, 0] = torch.nan, torch.inf
    some = [Product(torch.ones(2, 8, dtype=torch.bfloat16), weight, activation)]
    (got,), (want,) = multiply(some), definition(some)
    assert torch.equal(got.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))
