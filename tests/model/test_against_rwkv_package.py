"""Files that heron.save writes, in the `rwkv` package that the rest of the world runs RWKV-7 with: the same logits."""

from __future__ import annotations

import pytest
import torch

import heron

TOKENS = torch.randint(50, (24,), generator=torch.Generator().manual_seed(0)).tolist()
PIECES = {"parallel": [24], "one by one": [1] * 24, "mixed": [7, 1, 1, 11, 1, 3]}


@pytest.mark.parametrize("jit", [False, True])
def test_logits_and_state_are_the_packages(random_model, rwkv_package, tmp_path, jit):
    models = {
        "tiny": (random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=50), 1e-5),
        "larger": (random_model(variant="v7", n_layer=3, n_embd=256, head_size=64, vocab_size=50, ffn_dim=1024), 1e-4),
    }
    for name, (model, _) in models.items():
        heron.save(model, tmp_path / f"{name}.pth")
    jobs = [(name, road) for name in models for road in PIECES]
    answers = rwkv_package([(tmp_path / name, TOKENS, PIECES[road]) for name, road in jobs], jit)
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
