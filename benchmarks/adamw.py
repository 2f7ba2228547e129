"""The update of a training step on this GPU: norm, clipping, AdamW and the bf16 copies. ``python benchmarks/adamw.py``

`PyTorch` hands bf16 gradients over to fp32 ones, scales them in place, and makes the copies after its fused AdamW;
`kernel` is what a training run does, :func:`heron.ops.adamw.adamw_`. TB/s are of the bytes that each has to move.
"""

from __future__ import annotations

import argparse
import math

import torch
from timing import median_ms, need_gpu
from torch import Tensor, nn

import heron
from heron.ops.global_norm import global_norm, verdict

SIZES = {"L12-D768": (12, 768), "L24-D2048": (24, 2048)}
BYTES = {"PyTorch": 52, "norm": 2, "kernel": 30}  # a parameter: see heron/ops/adamw/README.md
CLIP = 1.0


def by_pytorch(masters: list[nn.Parameter], copies: list[nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    """A step from the copies' gradients."""
    block = masters[0].new_empty(sum(master.numel() for master in masters))
    parts = torch._C._nn.unflatten_dense_tensors(block, masters)
    torch._foreach_copy_(parts, [copy.grad for copy in copies])
    for master, part in zip(masters, parts, strict=True):
        master.grad = part
    norm = torch.nn.utils.get_total_norm(parts)
    torch._foreach_mul_(parts, (CLIP / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_copy_(copies, masters)


def by_kernel(gradients: list[Tensor], optimizer: heron.optim.CopiedAdamW) -> None:
    """The same."""
    norm = global_norm(gradients)
    optimizer.found_inf, optimizer.grad_scale = verdict(norm, norm, math.inf, CLIP)
    optimizer.step()


def measure(name: str, repeats: int) -> None:
    n_layer, n_embd = SIZES[name]
    with torch.device("cuda"):
        model = heron.RWKV(heron.ModelConfig(variant="v7", n_layer=n_layer, n_embd=n_embd))
    masters = list(model.parameters())
    copies = [nn.Parameter(master.detach().bfloat16()) for master in masters]
    for copy in copies:
        copy.grad = torch.randn_like(copy)
    gradients = [copy.grad for copy in copies]
    n = sum(master.numel() for master in masters)
    plain = heron.build_optimizer(model)
    took = {"PyTorch": median_ms(lambda: by_pytorch(masters, copies, plain), repeats)}
    plain.state.clear()
    torch.cuda.empty_cache()
    optimizer = heron.build_optimizer(model, copies=dict(zip(masters, copies, strict=True)))
    took["norm"] = median_ms(lambda: global_norm(gradients), repeats)
    took["kernel"] = median_ms(lambda: by_kernel(gradients, optimizer), repeats)
    for form, ms in took.items():
        print(f"{name:<10} {n / 1e6:6.0f} M  {form:<8}{ms:8.3f} ms {BYTES[form] * n / ms / 1e9:6.2f} TB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    need_gpu(parser)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: medians of {options.repeats}")
    for name in options.sizes:
        measure(name, options.repeats)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
