"""Initial values against the formulas' golden numbers (spec: RWKV-LM, RWKV-v7/train_temp, before rounding to bf16)."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import heron
from heron.model.init import initial_value, rule

BIG = heron.ModelConfig(variant="v8", n_layer=12, n_embd=768, vocab_size=65536)


@functools.cache
def shapes(config):
    with torch.device("meta"):
        return {name: value.shape for name, value in heron.RWKV(config).state_dict().items()}


def value(name, config=BIG):
    return initial_value(name, shapes(config)[name], config).flatten()


@pytest.mark.parametrize(
    ("name", "channel", "golden"),
    [
        ("blocks.0.att.x_r", 100, 0.334838),
        ("blocks.0.att.x_g", 100, 0.334838),
        ("blocks.0.att.x_w", 100, 0.840348),
        ("blocks.0.att.x_a", 100, 0.840348),
        ("blocks.0.att.x_k", 100, 0.759980),
        ("blocks.0.att.x_v", 100, 0.759980),
        ("blocks.0.ffn.x_k", 100, 0.869792),
        ("blocks.0.att.w0", 100, -4.666711),
        ("blocks.0.att.a0", 100, -0.331726),
        ("blocks.3.att.x_r", 100, 0.263461),
        ("blocks.3.att.x_g", 100, 0.263461),
        ("blocks.3.att.x_w", 100, 0.747430),
        ("blocks.3.att.x_a", 100, 0.747430),
        ("blocks.3.att.x_k", 100, 0.657086),
        ("blocks.3.att.x_v", 100, 0.657086),
        ("blocks.3.ffn.x_k", 100, 0.475354),
        ("blocks.3.att.w0", 100, -5.252114),
        ("blocks.11.att.x_r", 384, 0.011486),
        ("blocks.11.att.w0", 384, -6.496086),
    ],
)
def test_golden_channels(name, channel, golden):
    assert float(value(name)[channel]) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("layer", range(12))
def test_golden_ends_of_every_layer(layer):
    ends = {"w0": (-8, 3), "a0": (-0.69, 0.31), "v0": (0.93, 0.53), "k_k": (0.76, 0.66)}
    for name, (first, last) in ends.items():
        got = value(f"blocks.{layer}.att.{name}")
        assert (float(got[0]), float(got[767])) == pytest.approx((first, last), abs=1e-6), name
    for name in [*(f"att.x_{letter}" for letter in "rwkvag"), "ffn.x_k"]:
        assert float(value(f"blocks.{layer}.{name}")[0]) == 1


@pytest.mark.parametrize(("layer", "golden"), [(0, 0.175620), (3, 0.463463), (11, 1.0)])
def test_golden_group_norm(layer, golden):
    assert value(f"blocks.{layer}.att.ln_x.weight").tolist() == pytest.approx([golden] * 768, abs=1e-6)


CONSTANTS = {
    "ln_out.weight": 1, "ln_out.bias": 0, "ln0.weight": 1, "ln0.bias": 0, "ln1.weight": 1, "ln1.bias": 0,
    "ln2.weight": 1, "ln2.bias": 0, "ln_x.bias": 0, "w1": 0, "a1": 0, "v1": 0, "g1": 0, "k_a": 1.02, "r_k": -0.04,
    "output.weight": 0, "ffn.value.weight": 0, "enn.weight": 1,
}  # fmt: skip
GAINS = {
    "receptance.weight": 1, "att.value.weight": 1, "ffn.key.weight": 1, "att.key.weight": 0.1,
    "w2": 0.1, "a2": 0.1, "v2": 0.1, "g2": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("vocab_size", [40, 200])
@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_constants_and_orthogonal_matrices(variant, vocab_size):
    ranks = dict(decay_rank=8, iclr_rank=24, value_rank=80, gate_rank=128)  # below and above C
    config = heron.ModelConfig(variant=variant, n_layer=2, n_embd=64, vocab_size=vocab_size, head_size=32, **ranks)
    torch.manual_seed(0)
    model = heron.RWKV(config)
    gains = {**GAINS, "head.weight": 0.5 * math.sqrt(vocab_size / 64) if vocab_size > 64 else 0.5}
    seen = 0
    for name, got in model.state_dict().items():
        constant = [wanted for tail, wanted in CONSTANTS.items() if name.endswith(tail)]
        gain = [wanted for tail, wanted in gains.items() if name.endswith(tail)]
        if constant:
            assert torch.equal(got, torch.full_like(got, constant[0])), name
        elif gain:
            rows, columns = got.shape
            factor = gain[0] * math.sqrt(rows / columns) if name[-1] == "2" and rows > columns else gain[0]
            gram = got @ got.T if rows <= columns else got.T @ got
            assert torch.allclose(gram, factor**2 * torch.eye(min(rows, columns)), atol=1e-5), name
        seen += bool(constant) + bool(gain)
    by_formula = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "ln_x.weight", "ffn.x_k"]
    assert seen == len(model.state_dict()) - 2 * len(by_formula) - len(["emb.weight"])
    emb = model.emb.weight.detach()
    assert emb.abs().max() <= 1e-4
    assert float(emb.std()) == pytest.approx(1e-4 / math.sqrt(3), rel=0.05)


def test_golden_gain_of_the_head():
    assert "4.619" in rule("head.weight", BIG).text
    config = heron.ModelConfig(variant="v7", n_layer=1, n_embd=16, vocab_size=1024, head_size=16, ffn_dim=16)
    head = value("head.weight", config).view(1024, 16)
    assert torch.allclose(head.T @ head, torch.eye(16) * 0.25 * 64, atol=1e-4)


def test_the_seed_decides():
    config = heron.ModelConfig(variant="v8", n_layer=2, n_embd=32, vocab_size=20, head_size=16)

    def make(seed):
        torch.manual_seed(seed)
        return heron.RWKV(config).state_dict()

    one, same, other = make(0), make(0), make(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_model_of_one_layer_has_finite_values():
    model = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=1, n_embd=32, vocab_size=20, head_size=16))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    w0 = model.blocks[0].att.w0.detach().flatten()
    assert (float(w0[0]), float(w0[-1])) == pytest.approx((-8, 3), abs=1e-6)  # as in layer 0 of a deep model


def test_a_fresh_v8_model_computes_what_v7_does():
    sizes = dict(n_layer=2, n_embd=32, vocab_size=20, head_size=16)
    logits = []
    for variant in ("v7", "v8"):
        torch.manual_seed(0)
        model = heron.RWKV(heron.ModelConfig(variant=variant, **sizes))
        logits.append(model(torch.arange(20).view(2, 10))[0])
    assert torch.equal(*logits)
    assert logits[0].std() > 0.1
