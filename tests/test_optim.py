"""The optimizer's groups and step, and the learning rate, against the reference recipe."""

from __future__ import annotations

import math

import pytest
import torch

import heron
from heron.errors import ConfigError
from heron.optim import group_of, lr_at, set_lr

MINIPILE = dict(max_tokens=1_498_226_207, ctx_len=512, micro_bsz=16, lr_init=6e-4, lr_final=6e-5, warmup_steps=10)


# Large matrices that the reference does not have; that they decay, and that no table does, is our own choice.
OWN_MATRICES = {
    "v7a": ("ffn.s_emb_x",),
    "v7b": ("ffn.s_emb_x", "qkv.qq", "qkv.k_emb_x", "qkv.v_emb_x"),
    "v8-hybrid": ("qkv.qq", "qkv.kk", "qkv.kkup", "qkv.vv", "qkv.vvup"),
}
TABLES = {
    "v7": (),
    "v7a": ("ffn.s_emb",),
    "v7b": ("ffn.s_emb", "qkv.k_emb", "qkv.v_emb"),
    "v8": ("ffn.enn",),
    "v8-hybrid": ("ffn.enn", "qkv.ennk", "qkv.emm"),
}


def reference_groups(variant, n_layer):
    """(lr factor, decays) of every parameter that isn't in the plain group."""
    table = {"emb.weight": (1, True), "head.weight": (1, True)}
    for i in range(n_layer):
        for name in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"):
            table[f"blocks.{i}.{name}.weight"] = (1, True)
        for name in OWN_MATRICES.get(variant, ()):
            table[f"blocks.{i}.{name}.weight"] = (1, True)
        table[f"blocks.{i}.att.w0"] = (2, False)
    return table


@pytest.mark.parametrize("head_size", [16, 32])  # with 32 there is one head, and r_k is (1, 32)
@pytest.mark.parametrize("variant", TABLES)
def test_groups_are_the_references(random_model, variant, head_size):
    model = random_model(variant=variant, n_layer=12, head_size=head_size)  # "blocks.1." and "blocks.11."
    optimizer = heron.build_optimizer(model, lr=3e-4, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-12)
    group_by_id = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    wanted = reference_groups(variant, 12)
    assert wanted.keys() <= dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        factor, decays = wanted.get(name, (1, False))
        group = group_by_id.pop(id(parameter))
        assert (group["lr"], group["lr_scale"]) == (3e-4 * factor, factor), name
        assert group["weight_decay"] == (0.05 if decays else 0), name
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-12)
        assert group["name"] == group_of(name, parameter).name
    assert not group_by_id
    names = {group["name"] for group in optimizer.param_groups}
    assert names == {"2x", "decay", "1x"} | ({"table"} if TABLES[variant] else set())
    tables = {name for name, parameter in model.named_parameters() if group_of(name, parameter).name == "table"}
    assert tables == {f"blocks.{i}.{name}.weight" for i in range(12) for name in TABLES[variant]}


def test_defaults_are_the_references(random_model):
    for group in heron.build_optimizer(random_model()).param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.99), 1e-18)
        assert group["weight_decay"] == (0.1 if group["name"] == "decay" else 0)
        assert group["lr"] == (12e-4 if group["name"] == "2x" else 6e-4)


def test_steps_are_adamw(random_model):
    """Two steps in fp64: decoupled decay, both moments corrected for their start at 0."""
    model = random_model().double()
    lr, decay, betas, eps = 3e-3, 0.1, (0.9, 0.99), 1e-18
    optimizer = heron.build_optimizer(model, lr, decay, betas, eps)
    table = reference_groups("v8", 3)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in wanted.items()}
    second = {name: torch.zeros_like(value) for name, value in wanted.items()}
    tokens = torch.arange(36).view(2, 18)
    for step in (1, 2):
        optimizer.zero_grad()
        model.loss(tokens, tokens + 1).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            factor, decays = table.get(name, (1, False))
            first[name] = betas[0] * first[name] + (1 - betas[0]) * parameter.grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * parameter.grad**2
            move = first[name] / (1 - betas[0] ** step) / ((second[name] / (1 - betas[1] ** step)).sqrt() + eps)
            wanted[name] = wanted[name] * (1 - lr * factor * decay * decays) - lr * factor * move
            assert torch.allclose(parameter, wanted[name], rtol=1e-12, atol=1e-14), (name, step)


def test_the_4x_table_is_a_table(random_model):
    model = random_model(variant="v8", deep_embed_4x=True)
    table = model.blocks[1].ffn.enn4.weight
    assert group_of("blocks.1.ffn.enn4.weight", table).name == "table"


@pytest.mark.parametrize("variant", TABLES)
def test_a_step_changes_every_parameter_that_is_used(random_model, variant):
    model = random_model(variant=variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss(torch.arange(36).view(2, 18), torch.arange(1, 37).view(2, 18)).backward()
    heron.build_optimizer(model).step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    never_used = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
    assert same == never_used | ({"blocks.0.ln0.weight", "blocks.0.ln0.bias"} if variant == "v8-hybrid" else set())


def test_frozen_parameters_are_left_out_and_an_empty_optimizer_is_refused(random_model):
    model = random_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        heron.build_optimizer(model)
    model.head.weight.requires_grad_(True)
    (group,) = heron.build_optimizer(model).param_groups
    assert group["params"][0] is model.head.weight


def test_set_lr_keeps_the_factors(random_model):
    optimizer = heron.build_optimizer(random_model())
    set_lr(optimizer, 1e-5)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "2x": 2e-5, "decay": 1e-5, "1x": 1e-5, "table": 1e-5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "golden"),
    [
        (0, 6.0e-6),
        (1, 6.54e-5),
        (5, 3.03e-4),
        (9, 5.406e-4),
        (10, 6.0e-4),
        (2519, 5.997492504e-4),
        (30239, 5.644063722e-4),
        (91444, 3.30025374e-4),
    ],
)
def test_golden_learning_rates(step, golden):
    assert lr_at(step, heron.TrainConfig(**MINIPILE)) == pytest.approx(golden, rel=1e-9)


def test_the_cosine_ends_at_lr_final_and_stays_there():
    config = heron.TrainConfig(max_steps=100, lr_init=1e-3, lr_final=1e-5, warmup_steps=0)
    rates = [lr_at(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(1e-3, rel=1e-12)
    assert rates[50] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-12)
    assert rates[100:] == pytest.approx([1e-5] * 10, rel=1e-9)
    assert rates[:101] == sorted(rates[:101], reverse=True)


def test_the_schedule_counts_tokens():
    """8 samples a step, however they are cut into passes, and however the length is given."""
    sizes = dict(ctx_len=64, lr_init=1e-3, lr_final=1e-4, warmup_steps=5)
    configs = [
        heron.TrainConfig(max_steps=200, micro_bsz=8, **sizes),
        heron.TrainConfig(max_steps=200, micro_bsz=2, accumulate=4, **sizes),
        heron.TrainConfig(max_tokens=200 * 8 * 64, micro_bsz=4, accumulate=2, **sizes),
    ]
    for step in range(205):
        p = min(max((step - 5) / 195, 0), 1)
        wanted = 1e-4 + 9e-4 * (1 + math.cos(math.pi * p)) / 2 * 1.0
        wanted *= 0.01 + 0.99 * step / 5 if step < 5 else 1
        assert [lr_at(step, config) for config in configs] == pytest.approx([wanted] * 3, rel=1e-12)


@pytest.mark.parametrize("max_steps", [1, 4, 10])
def test_a_run_no_longer_than_its_warm_up_only_warms_up(max_steps):
    config = heron.TrainConfig(max_steps=max_steps, warmup_steps=10, lr_init=1e-3, lr_final=1e-5)
    for step in range(max_steps):
        assert lr_at(step, config) == pytest.approx(1e-3 * (0.01 + 0.99 * step / 10), rel=1e-12)


def test_a_learning_rate_of_zero_is_zero():
    config = heron.TrainConfig(max_steps=20, lr_init=0, lr_final=0)
    assert [lr_at(step, config) for step in range(21)] == [0] * 21
