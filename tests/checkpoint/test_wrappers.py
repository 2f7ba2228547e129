"""Names that wrappers left, and dicts that trainers put around weights: read, or refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import heron
from heron.checkpoint import put_right, tuned_state
from heron.checkpoint.formats import hf, wrappers
from heron.errors import CheckpointError

STACKS = (
    "module.", "_orig_mod.", "model.", "_forward_module.", "_fsdp_wrapped_module.", "_forward_module._orig_mod.",
    "module.model.", "_orig_mod.module.", "model.module._orig_mod.", "student.network.",
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(random_model):
    return random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=19).state_dict()


def assert_loads(path, weights):
    loaded = heron.load(path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", STACKS)
def test_what_stands_before_every_name_is_taken_off(weights, tmp_path, prefix, suffix):
    path = tmp_path / f"x.{suffix}"
    (torch.save if suffix == "pth" else save_file)({prefix + name: value for name, value in weights.items()}, path)
    assert_loads(path, weights)
    assert put_right(path) == [f"names begin with {prefix!r}, as a wrapper saves them; read without it"]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_counter_of_an_averaged_model_is_left_out(random_model, tmp_path, suffix):
    model = random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=19)
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    assert "n_averaged" in averaged
    path = tmp_path / f"x.{suffix}"
    (torch.save if suffix == "pth" else save_file)(averaged, path)
    assert_loads(path, model.state_dict())
    assert put_right(path) == ["names begin with 'module.', as a wrapper saves them; read without it"]


def test_wrappers_of_single_blocks_are_taken_off(weights, tmp_path):
    for i, part in enumerate(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._orig_mod")):
        renamed = {name.replace("blocks.1.", f"blocks.1.{part}."): value for name, value in weights.items()}
        torch.save(renamed, tmp_path / f"{i}.pth")
        assert_loads(tmp_path / f"{i}.pth", weights)
        assert "names hold parts of wrappers" in put_right(tmp_path / f"{i}.pth")[0]


@pytest.mark.parametrize("format", ["safetensors", "hf"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "rwkv.", "_forward_module.module."])
def test_shards_of_a_folder_may_have_prefixes(random_model, tmp_path, format, prefix):
    model = random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=19)
    heron.save(model, tmp_path / "folder", format, "integers:19:0")
    tensors = load_file(tmp_path / "folder" / hf.WEIGHTS)
    parts = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in parts.items():
        save_file({prefix + name: tensors[name] for name in names}, tmp_path / "folder" / file)
    (tmp_path / "folder" / hf.WEIGHTS).unlink()
    index = {"weight_map": {prefix + name: file for file, names in parts.items() for name in names}}
    (tmp_path / "folder" / hf.INDEX).write_text(json.dumps(index))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(heron.load(tmp_path / "folder")(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "around",
    [
        lambda weights: {"state_dict": weights},
        lambda weights: {"model": weights, "epoch": 3, "loss": 2.5, "name": "a", "best": None},
        lambda weights: {"epoch": 3, "model_state_dict": weights},
        lambda weights: {"module": {f"module.{name}": value for name, value in weights.items()}},
        lambda weights: {"state_dict": {f"model._orig_mod.{name}": value for name, value in weights.items()}},
    ],
)
def test_a_dict_around_the_weights_is_looked_into(weights, tmp_path, around):
    for zipped in (True, False):
        torch.save(around(weights), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        assert_loads(tmp_path / "x.pth", weights)
        assert put_right(tmp_path / "x.pth")[0].startswith("the weights lie in a dict under '")


@pytest.mark.parametrize(
    ("besides", "words"),
    [
        ({"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, "'optimizer'"),
        ({"ema": {"emb.weight": torch.zeros(2)}, "epoch": 1}, "'ema'"),
        ({"step": torch.tensor(3)}, "'step'"),
    ],
)
def test_more_than_weights_is_refused_with_what_to_type(weights, tmp_path, besides, words):
    torch.save({"model": weights, **besides}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"beside the weights under 'model' it holds {words}.*torch\.save"):
        heron.load(tmp_path / "x.pth")


def test_names_that_become_one_are_refused(weights, tmp_path):
    for prefix in ("module.", "_orig_mod.", "_forward_module._orig_mod."):
        torch.save({**weights, f"{prefix}emb.weight": torch.zeros(19, 64)}, tmp_path / "x.pth")
        save_file({**weights, f"{prefix}emb.weight": torch.zeros(19, 64)}, tmp_path / "x.safetensors")
        for path in (tmp_path / "x.pth", tmp_path / "x.safetensors"):
            with pytest.raises(CheckpointError, match="comes twice, the other time as '.*emb.weight'; keep one"):
                heron.load(path)


def test_a_prefix_of_most_names_is_told(weights, tmp_path):
    """A module that holds the model and a head of its own: which is meant cannot be known."""
    renamed = {name if name == "head.weight" else f"model.{name}": value for name, value in weights.items()}
    torch.save(renamed, tmp_path / "x.pth")
    n = len(weights)
    with pytest.raises(CheckpointError, match=rf"emb.weight is missing.*; {n - 1} of {n} names begin with 'model\.'"):
        heron.load(tmp_path / "x.pth")


def test_tuned_states_may_have_prefixes_and_keep_their_blocks(random_model, tmp_path):
    config = random_model(variant="v7", n_layer=1, n_embd=64, head_size=64, vocab_size=19).config
    state = torch.randn(1, 64, 64)
    for name in ("blocks.0.att.time_state", "module.blocks.0.att.time_state"):
        torch.save({name: state}, tmp_path / "s.pth")
        assert torch.equal(tuned_state(tmp_path / "s.pth", config).layers[0].wkv[0], state)


def test_other_names_stay():
    assert wrappers.unwrapped(["emb.weight", "blocks.0.att.w1"]) == {n: n for n in ("emb.weight", "blocks.0.att.w1")}
    assert wrappers.unwrapped(["rosa1.emb0", "rosa1.emb1"])["rosa1.emb0"] == "rosa1.emb0"
    assert wrappers.unwrapped([]) == {}
