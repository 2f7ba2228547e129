"""Files that heron.save writes, in the `rwkv` package that the rest of the world runs RWKV-7 with: the same logits.

v7a is what that package computes with its DeepEmbed switch.
"""

from __future__ import annotations

import pytest
import torch

import heron
from heron.config import PRESETS

TOKENS = torch.randint(50, (24,), generator=torch.Generator().manual_seed(0)).tolist()
PIECES = {"parallel": [24], "one by one": [1] * 24, "mixed": [7, 1, 1, 11, 1, 3]}


SIZES = ("0.1b", "1.5b", "2.9b", "7.2b", "13.3b")  # of releases; 0.4b has the ranks of 0.1b


def released_ranks(size):
    return {name: value for name, value in PRESETS[f"rwkv7-{size}"].items() if name.endswith("_rank")}


@pytest.mark.parametrize(("variant", "jit"), [("v7", False), ("v7", True), ("v7a", False)])
def test_logits_and_state_are_the_packages(random_model, rwkv_package, tmp_path, variant, jit):
    sizes = dict(variant=variant, head_size=64, vocab_size=50)
    models = {
        "tiny": (random_model(n_layer=2, n_embd=64, **sizes), 1e-5),
        "larger": (random_model(n_layer=3, n_embd=256, ffn_dim=1024, **sizes), 1e-4),
    }
    if variant == "v7" and not jit:
        small = dict(n_layer=2, n_embd=64, **sizes)
        models |= {size: (random_model(**small, **released_ranks(size)), 1e-5) for size in SIZES}
    for name, (model, _) in models.items():
        heron.save(model, tmp_path / f"{name}.pth")
    jobs = [(name, road) for name in models for road in (PIECES if name in ("tiny", "larger") else ["mixed"])]
    asked = [(tmp_path / name, TOKENS, PIECES[road]) for name, road in jobs]
    answers = rwkv_package(asked, jit, deep_embed=variant == "v7a")
    for (name, road), (want, want_state) in zip(jobs, answers, strict=True):
        model, tolerance = models[name]
        state, logits = None, []
        with torch.no_grad():
            for piece in torch.tensor([TOKENS]).split(PIECES[road], dim=1):
                out, state = model(piece, state)
                logits.append(out[0])
        logits = torch.cat(logits)
        assert logits.shape == want.shape
        assert want.std() > 0.5
        assert (logits - want).abs().max() < tolerance, (name, road)
        for got, part in zip(state.to_list(), want_state, strict=True):
            assert (got[0] - part).abs().max() < tolerance, (name, road)
