"""How far decoders are away from the truth, which is the model in fp64, beside eager PyTorch in their own dtype."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import heron
from heron.generation.decoder import Decoder

LEAST = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0, torch.float16: 0}  # what is no error at all
READ = 5  # tokens that the model reads in parallel, before the decoder takes over

Parts = tuple[Tensor, Tensor, Tensor]  # what a decoder gave, what the model gave, and the truth


def check(decoder: Decoder, sequence: int, model: heron.RWKV, *texts: Sequence[int]) -> None:
    """The decoder's logits and states are at most twice as far from the truth as those of `model`, token by token.

    Distances are norms, of the logits of all tokens together and of each part of the final states; of several texts,
    the root of their mean square: with one, either error may be small by chance.
    """
    dtype = model.emb.weight.dtype
    exact = copy.deepcopy(model).cpu().double()
    of_texts = [_parts(decoder, sequence, model, exact, text) for text in texts]
    away = [
        (
            _mean(distance(mine, true) for mine, _, true in alike),
            _mean(distance(eager, true) for _, eager, true in alike),
        )
        for alike in zip(*of_texts, strict=True)
    ]
    assert all(mine <= max(2 * theirs, LEAST[dtype]) for mine, theirs in away), away


def _parts(decoder: Decoder, sequence: int, model: heron.RWKV, exact: heron.RWKV, tokens: Sequence[int]) -> list[Parts]:
    """Logits of all tokens behind the first few, then each part of the final states."""
    device, ids = model.emb.weight.device, torch.tensor(tokens)
    with torch.inference_mode():
        truth, true_state = exact(ids[None])
        _, state = model(ids[None, :READ].to(device))
        decoder.write(sequence, state)
        got, eager = [], []
        for token in tokens[READ:]:
            new, state = model(torch.tensor([[token]], device=device), state)
            eager.append(new[0])
            step = decoder.step([sequence], [token])
            assert step.shape == (1, model.config.vocab_size)
            got.append(step.clone())
    found = [(torch.cat(got), torch.cat(eager), truth[0, READ:])]
    written = decoder.read(sequence)
    assert written is not None
    for parts in zip(written.to_list(), state.to_list(), true_state.to_list(), strict=True):
        assert [(part.shape, part.dtype) for part in parts[:2]] == [(parts[1].shape, parts[1].dtype)] * 2
        found.append(parts)
    return found


def distance(got: Tensor, true: Tensor) -> float:
    """|got - true| / |true|; of ids too."""
    true = true.double()
    return float((got.double().cpu() - true).norm() / true.norm())


def _mean(values: Iterable[float]) -> float:
    squares = [value**2 for value in values]
    return math.sqrt(sum(squares) / len(squares))
