"""One model made into another: up-cycled logits are the old ones bit for bit, and nothing learned is dropped."""

from __future__ import annotations

import pytest
import torch

import heron
from heron.checkpoint.migrate import resize_vocabulary, upcycle
from heron.errors import CheckpointError, ConfigError

TOKENS = torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(0))
UP = [
    ("v7", "v7", {}), ("v7", "v7a", {}), ("v7", "v7b", {}), ("v7", "v8", {}), ("v7", "v8-hybrid", {}),
    ("v7", "v8", dict(deep_embed_4x=True)), ("v7a", "v7b", {}), ("v8", "v8-hybrid", {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("old", "new", "options"), UP)
def test_upcycled_logits_are_the_old_ones_bit_for_bit_and_the_model_trains(random_model, old, new, options, dtype):
    model = random_model(variant=old).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = upcycle(model, new, **options)
    assert other.config.variant == new
    with torch.no_grad():
        assert torch.equal(other(TOKENS)[0], model(TOKENS)[0])
    assert {parameter.dtype for parameter in other.parameters()} == {dtype}
    for name, value in other.state_dict().items():
        if name in before and not (new == "v8-hybrid" and (name == "emb.weight" or ".ln0." in name)):
            assert torch.equal(value, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if dtype != torch.float32:
        return
    optimizer = heron.build_optimizer(other, lr=1e-3)
    for _ in range(2):
        other.loss(TOKENS, TOKENS.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    added = other.state_dict().keys() - before.keys()
    assert all(torch.isfinite(value).all() for value in other.state_dict().values())
    gates = ("enn.weight", "enn4.weight", "s0", "s2", "lnv.weight", "lnv.bias")
    for name in (name for name in added if name.endswith(gates)):
        neutral = 1.0 if name.endswith(("enn.weight", "enn4.weight", "s0")) else 0.0
        assert not (other.state_dict()[name] == neutral).all(), f"{name} never learns"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_named_tensors_and_files_come_out_the_same(random_model, tmp_path):
    model = random_model(variant="v7")
    other = upcycle(dict(model.state_dict()), "v8")
    heron.save(other, tmp_path / "x.pth")
    again = heron.load(tmp_path / "x.pth")
    assert again.config.variant == "v8"
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize(("old", "new", "options"), [row for row in UP if row[1] != "v8-hybrid"])
def test_what_was_never_trained_can_be_taken_out_again(random_model, old, new, options):
    model = random_model(variant=old)
    back = upcycle(upcycle(model, new, **options), old)
    assert back.config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (dict(variant="v8"), "v7", r"a v8 cannot become a v7, .* blocks\.0\.ffn\.enn\.weight: it is not 1 everywhere"),
        (dict(variant="v8", deep_embed_4x=True), "v8", r"a v8 of the 4x form cannot become a v8, .*enn4\.weight"),
        (dict(variant="v7a"), "v8", r"a v7a cannot become a v8, .*ffn\.s2: it is not 0 everywhere"),
        (dict(variant="v8"), "v7b", r"a v8 cannot become a v7b, .*enn\.weight"),
        (dict(variant="v7b"), "v7a", r"qkv\.lnv\.weight: it is not 0 everywhere"),
        (dict(variant="v8-hybrid"), "v8", "does not normalise its embedding cannot become a v8, which always does"),
    ],
)
def test_nothing_that_was_learned_is_dropped(random_model, old, new, words):
    with pytest.raises(CheckpointError, match=words):
        upcycle(random_model(**old), new)


@pytest.mark.parametrize(
    ("old", "new", "part", "neutral"),
    [
        ("v8", "v7", "ffn.enn.weight", 1), ("v7a", "v7", "ffn.s2", 0), ("v7a", "v7", "ffn.s0", 1),
        ("v7b", "v7a", "qkv.lnv.weight", 0), ("v7b", "v7a", "qkv.lnv.bias", 0),
    ],
)  # fmt: skip
def test_one_number_that_was_learned_is_enough(random_model, old, new, part, neutral):
    model = upcycle(random_model(variant="v7"), old)
    with torch.no_grad():
        model.get_parameter(f"blocks.2.{part}").view(-1)[-1] += 1e-3
    with pytest.raises(CheckpointError, match=rf"blocks\.2\.{part}: it is not {neutral} everywhere"):
        upcycle(model, new)


def test_the_two_attentions_are_not_mistaken_for_each_other(random_model):
    """They share names (qkv.qq, qkv.lnv, ...), and nothing else."""
    model = random_model(variant="v7b")
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.s2.zero_()
            block.ffn.s0.fill_(1)
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.qkv\.lnv\.weight"):
        upcycle(model, "v8-hybrid")


def test_a_variant_that_does_not_exist_is_refused(random_model):
    with pytest.raises(ConfigError, match="variant: wanted one of"):
        upcycle(random_model(), "v9")
    with pytest.raises(ConfigError, match="deep_embed_4x is an option of v8"):
        upcycle(random_model(variant="v7"), "v7a", deep_embed_4x=True)


def tables(model):
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.shape[0] == model.config.vocab_size}


@pytest.mark.parametrize("rule", ["mean", "initial"])
@pytest.mark.parametrize("vocab_size", [30, 51])
@pytest.mark.parametrize("variant", ["v7b", "v8-hybrid"])
def test_ids_that_stay_keep_their_rows_and_logits(random_model, variant, vocab_size, rule):
    model = random_model(variant=variant)
    other = resize_vocabulary(model, vocab_size, rule)
    kept = min(vocab_size, 37)
    assert other.config == model.config.changed(vocab_size=vocab_size)
    assert len(tables(other)) == 2 + 3 * 3  # emb and head, and three tables a layer
    for name, tensor in other.state_dict().items():
        old = model.state_dict()[name]
        rows = slice(kept) if name in tables(other) else slice(None)
        assert torch.equal(tensor[rows], old[rows] if name in tables(other) else old)
    with torch.no_grad():
        logits, want = other(TOKENS)[0], model(TOKENS)[0]
        assert torch.allclose(logits[..., :kept], want[..., :kept], rtol=1e-6, atol=1e-6)
        assert torch.isfinite(other(torch.arange(vocab_size).unsqueeze(0))[0]).all()


def test_new_rows_are_the_mean_or_those_of_a_fresh_model(random_model):
    model = random_model(variant="v8", n_layer=1).to(torch.bfloat16)
    averaged = resize_vocabulary(model, 40).state_dict()
    for name, old in tables(model).items():
        assert averaged[name].dtype == torch.bfloat16
        want = old.float().mean(dim=0).to(torch.bfloat16)
        assert torch.equal(averaged[name][37:], want.expand(3, -1)), name
    fresh = resize_vocabulary(model, 40, "initial").state_dict()
    assert fresh["emb.weight"][37:].abs().max() <= 1e-4
    assert (fresh["blocks.0.ffn.enn.weight"][37:] == 1).all()
    assert 0.1 < float(fresh["head.weight"][37:].float().norm(dim=1).max()) < 2


@pytest.mark.parametrize(
    ("vocab_size", "rule", "words"),
    [(0, "mean", "vocab_size: wanted at least 1"), (40, "zero", "new_rows: wanted mean or initial, got")],
)
def test_a_vocabulary_that_cannot_be_is_refused(random_model, vocab_size, rule, words):
    with pytest.raises(ConfigError, match=words):
        resize_vocabulary(random_model(), vocab_size, rule)
