"""config.json files as flash-linear-attention and others write them, for the same tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import heron
from heron.checkpoint.formats import hf
from heron.errors import CheckpointError

ABSENT = object()


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(variant="v7", n_layer=2, n_embd=128, head_size=64, vocab_size=19)


@pytest.fixture
def folder(model, tmp_path):
    heron.save(model, tmp_path / "f", "hf", "integers:19")
    return tmp_path / "f"


def change(folder, **changes):
    config = json.loads((folder / hf.CONFIG).read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ABSENT}
    (folder / hf.CONFIG).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "changes",
    [
        dict(value_dim=128),
        dict(value_dim=None),
        dict(value_dim=ABSENT),
        dict(num_heads=None),
        dict(num_heads=ABSENT),
        dict(num_heads=32),  # the released folders have it, and fla goes by head_dim
        dict(head_dim=None),
        dict(head_dim=ABSENT),
        dict(head_dim=None, num_heads=None),
        dict(intermediate_size=None, hidden_ratio=4),
        dict(intermediate_size=None, hidden_ratio=None),
        dict(intermediate_size=ABSENT, hidden_ratio=ABSENT),
        dict(hidden_act="relu2"),
        dict(hidden_act=ABSENT),
        dict(norm_eps=0.00001),
        dict(norm_eps=ABSENT, norm_bias=ABSENT, norm_first=ABSENT),
        dict(dtype=ABSENT, torch_dtype="bfloat16"),
        dict(dtype="float16"),
        dict(attn=None, fuse_norm=True, max_position_embeddings=2048, architectures=["Rwkv7ForCausalLM"]),
        dict(decay_low_rank_dim=None, gate_low_rank_dim=None, a_low_rank_dim=ABSENT, v_low_rank_dim=ABSENT),
        dict(tie_word_embeddings=ABSENT),
        dict(eos_token_id=[0, 261], bos_token_id=1, pad_token_id=ABSENT),
        dict.fromkeys(("num_hidden_layers", "hidden_size", "vocab_size", "auto_map"), ABSENT),
    ],
)
def test_what_fla_takes_is_read(model, folder, changes):
    change(folder, **changes)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(heron.load(folder)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(value_dim=64), r"value_dim is \[64, 64\], but"),
        (dict(value_dim=[128]), "value_dim"),
        (dict(value_dim="128"), "value_dim"),
        (dict(head_dim=None, num_heads=4), "head_dim 64 alone, and this one is 32"),
        (dict(head_dim=128, num_heads=ABSENT), "head_dim 64 alone, and this one is 128"),
        (dict(hidden_act="swish"), "hidden_act is 'swish'"),
        (dict(norm_eps="1e-5"), "norm_eps"),
        (dict(intermediate_size=128), "intermediate_size is 128"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings True, but lm_head.weight is another matrix"),
    ],
)
def test_what_would_compute_something_else_is_refused(folder, changes, words):
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=words):
        heron.load(folder)


@pytest.mark.parametrize("holds_head", [True, False])
def test_a_head_that_is_the_embedding_is_read_as_a_matrix_of_its_own(model, folder, holds_head):
    change(folder, tie_word_embeddings=True)
    tensors = load_file(folder / hf.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    save_file(
        {name: value for name, value in tensors.items() if holds_head or name != "lm_head.weight"}, folder / hf.WEIGHTS
    )
    loaded = heron.load(folder)
    assert torch.equal(loaded.head.weight, model.emb.weight)
    assert loaded.head.weight is not loaded.emb.weight
