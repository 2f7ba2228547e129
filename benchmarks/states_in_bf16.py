"""What states in bf16 change over a long text. ``python benchmarks/states_in_bf16.py MODEL --data TEXT``

One sequence reads the text token after token with its states in fp32, in bf16 rounded at random (``--states bf16``),
and rounded to the nearest after each token, which no flag asks for. For each tenth of the text: the loss with states in
fp32, how much larger the others' is, and how far their logits are from those of fp32, relative.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timing import device_of
from torch import Tensor

import heron
from heron import machine
from heron.commands.sources import tokenizer_of
from heron.data.corpora import Reading
from heron.data.loader import load_tokens
from heron.generation.graphed import GraphedDecoder


def read(model: heron.RWKV, ids: list[int], in_bf16: bool, to_nearest: bool) -> Tensor:
    """The logits (len(ids), V) behind each token, of states that are kept so."""
    decoder = GraphedDecoder(model, 1, in_bf16=in_bf16)
    logits = torch.empty(
        len(ids), model.config.vocab_size, dtype=model.head.weight.dtype, device=model.head.weight.device
    )
    for i, token in enumerate(ids):
        logits[i] = decoder.step([0], [token])[0]
        if to_nearest:
            decoder._states._wkv.copy_(decoder._states._wkv.bfloat16())
    return logits


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a weights file, a checkpoint or a run folder")
    parser.add_argument("--data", required=True, help="a text, or builtin:NAME")
    parser.add_argument("--tokenizer")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    device = device_of(parser, args.device)
    model = heron.load(args.model, machine.DTYPES[args.dtype]).to(device)
    tokenizer = tokenizer_of(args.model, args.tokenizer, model.config.vocab_size)
    tokens, _ = load_tokens(args.data, tokenizer, model.config.vocab_size, Reading(), lambda text: None)
    ids = tokens[: args.tokens + 1].tolist()
    targets, n = torch.tensor(ids[1:], device=device), len(ids) - 1
    forms = {"fp32": (False, False), "at random": (True, False), "to nearest": (False, True)}
    logits = [read(model, ids[:-1], *form) for form in forms.values()]
    print(f"{args.model}, {args.dtype}, {n:,} tokens on {device}")
    print(f"{'tokens':>16}{'loss, fp32':>12}" + "".join(f"{name:>12}{'logits':>10}" for name in list(forms)[1:]))
    for begin, end in ((i * n // 10, (i + 1) * n // 10) for i in range(10)):
        exact, *rounded = (each[begin:end].float() for each in logits)
        of_fp32, *others = (F.cross_entropy(each, targets[begin:end]).item() for each in (exact, *rounded))
        away = [((each - exact).norm(dim=1) / exact.norm(dim=1)).mean().item() for each in rounded]
        parts = "".join(f"{loss - of_fp32:>+12.5f}{error:>10.5f}" for loss, error in zip(others, away, strict=True))
        print(f"{f'{begin:,} to {end:,}':>16}{of_fp32:>12.4f}{parts}")


if __name__ == "__main__":
    main()
