"""Initial values against the formulas' golden numbers (spec: RWKV-LM, RWKV-v7/train_temp, before rounding to bf16)."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import heron
from heron.config import VARIANTS as ALL
from heron.model.init import initial_value, rule

VARIANTS = [variant for variant in ALL if variant != "rosa-lm"]  # no v7 with additions: see test_rosa_layers.py
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
    "ln2.weight": 1, "ln2.bias": 0, "ln_x.bias": 0, "w1": 0, "a1": 0, "att.v1": 0, "g1": 0, "k_a": 1.02, "r_k": -0.04,
    "output.weight": 0, "ffn.value.weight": 0,
    # our own choices
    "enn.weight": 1, "enn4.weight": 1, "ffn.s0": 1, "ffn.s2": 0, "s_emb_x.weight": 0, "k_emb.weight": 1,
    "v_emb.weight": 1, "k_emb_x.weight": 0, "v_emb_x.weight": 0, "ennk.weight": 1, "emm.weight": 1, "qkv.x_q": 0,
    "qkv.x_k": 0, "qkv.x_v": 0, "lnq.weight": 1, "lnq.bias": 0, "lnk.weight": 1, "lnk.bias": 0, "lnv.weight": 0,
    "lnv.bias": 0,
}  # fmt: skip
GAINS = {
    "receptance.weight": 1, "att.value.weight": 1, "ffn.key.weight": 1, "att.key.weight": 0.1,
    "w2": 0.1, "a2": 0.1, "att.v2": 0.1, "g2": 0.1,
    # our own choices
    "ffn.s1": 0.1, "qq.weight": 1, "kk.weight": 1, "kkup.weight": 1, "vv.weight": 1, "vvup.weight": 1, "k1": 1, "k2": 1,
    "qkv.v1": 1, "qkv.v2": 1,
}  # fmt: skip


@pytest.mark.parametrize("vocab_size", [40, 200])
@pytest.mark.parametrize("variant", VARIANTS)
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
            widen = ".att." in name and name[-1] == "2" and rows > columns
            factor = gain[0] * math.sqrt(rows / columns) if widen else gain[0]
            gram = got @ got.T if rows <= columns else got.T @ got
            assert torch.allclose(gram, factor**2 * torch.eye(min(rows, columns)), atol=1e-5), name
        seen += bool(constant) + bool(gain)
    by_formula = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "ln_x.weight", "ffn.x_k"]
    rest = [name for name in model.state_dict() if name == "emb.weight" or name.endswith("s_emb.weight")]
    assert seen == len(model.state_dict()) - 2 * len(by_formula) - len(rest)
    for name in rest[1:]:
        assert float(model.state_dict()[name].std()) == pytest.approx(0.02, rel=0.03)
    emb = model.emb.weight.detach()
    if not config.has_ln0:
        assert torch.allclose(emb.mean(dim=1), torch.zeros(vocab_size), atol=1e-6)
        emb = emb / math.sqrt(1 / (1e-8 / 3 + 1e-5))
        assert float(emb.std()) == pytest.approx(1e-4 / math.sqrt(3), rel=0.05)
        return
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_one_layer_has_finite_values(variant):
    model = heron.RWKV(heron.ModelConfig(variant=variant, n_layer=1, n_embd=32, vocab_size=20, head_size=16))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    w0 = model.blocks[0].att.w0.detach().flatten()
    assert (float(w0[0]), float(w0[-1])) == pytest.approx((-8, 3), abs=1e-6)  # as in layer 0 of a deep model


@pytest.mark.parametrize(("variant", "deep_embed_4x"), [*((v, False) for v in VARIANTS[1:]), ("v8", True)])
def test_a_fresh_model_of_any_variant_computes_what_v7_does(variant, deep_embed_4x):
    sizes = dict(n_layer=2, n_embd=32, vocab_size=20, head_size=16)
    logits, weights = [], []
    for config in (dict(variant="v7"), dict(variant=variant, deep_embed_4x=deep_embed_4x)):
        torch.manual_seed(0)
        model = heron.RWKV(heron.ModelConfig(**config, **sizes))
        logits.append(model(torch.arange(20).view(2, 10))[0])
        weights.append(model.state_dict())
    assert torch.equal(*logits)
    assert logits[0].std() > 0.1
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if name != "emb.weight")


def test_our_own_choices_are_marked():
    for variant in ALL:
        config = heron.ModelConfig(variant=variant, n_layer=2, n_embd=32, vocab_size=20, head_size=16)
        reference = heron.ModelConfig(variant="v7", n_layer=2, n_embd=32, vocab_size=20, head_size=16)
        ours = {name for name in shapes(config) if rule(name, config).ours}
        added = shapes(config).keys() - shapes(reference).keys()
        assert ours == added | ({"emb.weight"} if variant == "v8-hybrid" else set())
