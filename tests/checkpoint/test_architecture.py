"""Every variant is known by its tensors alone, with all its sizes, and a file that is not quite one is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

import heron
from heron.checkpoint.architecture import build, config_of
from heron.errors import CheckpointError

FAMILY = {
    "v7": dict(variant="v7"),
    "v7a": dict(variant="v7a"),
    "v7b": dict(variant="v7b"),
    "v8": dict(variant="v8"),
    "v8 4x": dict(variant="v8", deep_embed_4x=True),
    "hybrid": dict(variant="v8-hybrid"),
    "hybrid 4x": dict(variant="v8-hybrid", deep_embed_4x=True),
}
LN0 = ("blocks.0.ln0.weight", "blocks.0.ln0.bias")
MAY_BE_ABSENT = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
every_variant = pytest.mark.parametrize("variant", FAMILY)


@pytest.mark.parametrize("n_layer", [1, 2])
@every_variant
def test_variant_and_sizes_come_from_the_tensors(random_model, tmp_path, variant, n_layer):
    model = random_model(**FAMILY[variant], n_layer=n_layer)
    assert config_of(model.state_dict(), "x") == model.config
    heron.save(model, tmp_path / "x.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = heron.load(tmp_path / "x.pth")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("variant", ["v7", "v7b", "v8", "hybrid 4x"])
def test_each_tensor_is_needed_in_its_shape_and_finite(random_model, variant):
    tensors = dict(random_model(**FAMILY[variant], n_layer=2).state_dict())
    may_be_absent = MAY_BE_ABSENT | (set(LN0) if variant.startswith("hybrid") else set())
    names = tensors.keys()
    if variant != "v7":  # whose tensors need no second look, but for ln0
        names -= random_model(variant="v7", n_layer=2).state_dict().keys() - set(LN0)
    for name in names:
        tensor = tensors[name]
        rest = {other: value for other, value in tensors.items() if other != name}
        damaged = {**tensors, name: torch.full_like(tensor, float("nan"))}
        misshapen = {**tensors, name: torch.cat((tensor, tensor))}
        if name in may_be_absent:
            assert config_of(rest, "x") == config_of(tensors, "x")
            bad = (damaged, misshapen)
        else:
            bad = (rest, damaged, misshapen)
        for content in bad:
            with pytest.raises(CheckpointError, match="^x: "):
                config_of(content, "x")
        with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
            config_of(damaged, "x")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.more is not part of a v"):
        config_of({**tensors, "blocks.0.more": torch.zeros(1)}, "x")


def test_a_table_of_the_4x_form_under_the_name_of_the_other_is_refused(random_model):
    tensors = dict(random_model(deep_embed_4x=True).state_dict())
    renamed = {name.replace("enn4", "enn"): tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"must be \(37, 32\), got \(37, 50\) \(a table this wide is the 4x form"):
        config_of(renamed, "x")


@pytest.mark.parametrize("held", [False, True])
def test_a_hybrid_may_hold_a_neutral_ln0_or_none(random_model, held):
    model, tokens = random_model(variant="v8-hybrid"), torch.arange(12).view(1, 12)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if held or name not in LN0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = build(dict(tensors), "x")
    assert again.config.has_ln0 is False
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert again.blocks[0].ln0.weight.eq(1).all()


def test_a_hybrid_that_was_trained_with_ln0_is_kept_and_needs_a_word(random_model, tmp_path):
    model, tokens = random_model(variant="v8-hybrid", has_ln0=True), torch.arange(12).view(1, 12)
    heron.save(model, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match=r"x\.pth: a v8-hybrid file cannot say whether its ln0.*has_ln0=True"):
        plain = heron.load(tmp_path / "x.pth")
    assert not torch.allclose(plain(tokens)[0], model(tokens)[0], atol=1e-2)
    assert torch.equal(plain.blocks[0].ln0.weight, model.blocks[0].ln0.weight)
    for has_ln0 in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            told = heron.load(tmp_path / "x.pth", has_ln0=has_ln0)
        assert torch.equal(told(tokens)[0], (model if has_ln0 else plain)(tokens)[0])
    with pytest.raises(CheckpointError, match="has_ln0 False is for v8-hybrid alone"):
        build(dict(random_model().state_dict()), "x", has_ln0=False)


def test_shift_vectors_of_attention_may_be_stored_in_either_shape(random_model):
    model, tokens = random_model(variant="v7b"), torch.arange(12).view(1, 12)
    tensors = {name: t.view(1, 1, -1) if ".qkv.x_" in name else t for name, t in model.state_dict().items()}
    again = build(tensors, "x")
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert again.blocks[1].qkv.x_v.shape == (32,)
    tensors["blocks.1.qkv.x_v"] = tensors["blocks.1.qkv.x_v"][..., 1:]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.qkv\.x_v must be \(32,\), got \(1, 1, 31\)"):
        build(tensors, "x")
