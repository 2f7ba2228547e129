"""Products of a channel mix with its squared ReLU, beside cuBLASLt's products and the compiler's elementwise kernels.

``python benchmarks/squared_relu.py`` on a GPU of compute capability 9.0. Microseconds, random numbers, bf16: the
fastest of cuBLASLt's algorithms (`heron.ops.large_product`) and what torch.compile makes of the rest, then each form of
our kernels, forward and backward. Every result is compared with PyTorch's, bit for bit.
"""

from __future__ import annotations

import argparse

import torch
from timing import need_gpu
from torch import Tensor

from heron.ops.large_product import large_product
from heron.ops.large_product.chosen import seconds
from heron.ops.squared_relu_product import cuda
from heron.ops.squared_relu_product.chosen import measured

SIZES = [(32768, 768, 3072), (8192, 768, 3072), (16384, 2048, 8192)]  # tokens, channels, hidden channels


@torch.compile
def squared(key: Tensor) -> Tensor:
    """What stands between the products, forward."""
    return torch.relu(key).square()


@torch.compile
def squared_again(key: Tensor, d_square: Tensor) -> tuple[Tensor, Tensor]:
    """The square, which is not kept, and the gradient of the key."""
    relu = torch.relu(key)
    return relu.square(), torch.where(relu <= 0, 0.0, d_square * (2 * relu))


def lines(n: int, n_in: int, hidden: int) -> list[str]:
    """Those of one size."""
    shapes = (n, n_in), (hidden, n_in), (n_in, hidden), (n, n_in)
    scales = 1.0, n_in**-0.5, n_in**-0.5, 1.0
    parts = [(scale * torch.randn(size, device="cuda")).bfloat16() for size, scale in zip(shapes, scales, strict=True)]
    x, of_key, of_value, d_out = parts
    key, d_square = x @ of_key.T, d_out @ of_value
    square, d_key = squared_again(key, d_square)
    times = [1e6 * seconds(run) for run in (
        lambda: large_product(x, of_key.T), lambda: squared(key),
        lambda: large_product(d_out, of_value), lambda: squared_again(key, d_square),
    )]  # fmt: skip
    found = [f"{n} x {n_in} x {hidden}: one by one {times[0]:.1f} + {times[1]:.1f} = {sum(times[:2]):.1f}, "
             f"backward {times[2]:.1f} + {times[3]:.1f} = {sum(times[2:]):.1f}"]  # fmt: skip
    for form in range(cuda.FORMS):
        forward = 1e6 * seconds(lambda form=form: cuda.by_boxes(x, of_key, None, form))
        backward = 1e6 * seconds(lambda form=form: cuda.by_boxes(d_out, of_value, square, form))
        same = torch.equal(cuda.by_boxes(x, of_key, None, form), square)
        same &= torch.equal(cuda.by_boxes(d_out, of_value, square, form), d_key)
        found.append(f"    form {form}: {forward:.1f}, backward {backward:.1f}{'' if same else ', OTHER BITS'}")
    return [*found, f"    chosen: {measured(x.device, n, n_in, hidden)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    need_gpu(parser)
    parser.parse_args()
    for sizes in SIZES:
        print("\n".join(lines(*sizes)), flush=True)


if __name__ == "__main__":
    main()
