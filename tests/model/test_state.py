"""heron.State: shapes, dtypes, constant size, and the list form that upstream uses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import heron
from heron.errors import ConfigError

CPU = torch.device("cpu")


def test_zeros():
    config = heron.ModelConfig(variant="v7", n_layer=2, n_embd=64, vocab_size=10, head_size=32)
    for dtype, wkv_dtype in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        state = heron.State.zeros(config, 3, CPU, dtype)
        assert state.batch_size == 3
        assert len(state.layers) == 2
        for layer in state.layers:
            assert (layer.att_shift.shape, layer.wkv.shape, layer.ffn_shift.shape) == ((3, 64), (3, 2, 32, 32), (3, 64))
            assert (layer.att_shift.dtype, layer.wkv.dtype, layer.ffn_shift.dtype) == (dtype, wkv_dtype, dtype)
        assert not any(part.any() for part in state.to_list())


@pytest.mark.parametrize(("n_layer", "n_embd", "values"), [(12, 768, 608_256), (24, 2048, 3_244_032)])
def test_its_size_is_that_of_the_spec(n_layer, n_embd, values):
    config = heron.ModelConfig(n_layer=n_layer, n_embd=n_embd)
    state = heron.State.zeros(config, 1, torch.device("meta"), torch.float32)
    assert sum(part.numel() for part in state.to_list()) == values
    assert state.nbytes == 4 * values


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_kept_does_not_grow_with_the_tokens(random_model, tokens, grad):
    model = random_model()
    with torch.set_grad_enabled(grad):
        _, state = model(torch.zeros(2, tokens, dtype=torch.int64))
    assert state.nbytes == 3 * 2 * 4 * (32 + 2 * 16 * 16 + 32)
    assert sum(part.untyped_storage().nbytes() for part in state.to_list()) == state.nbytes


def test_the_list_has_upstreams_order_and_comes_back(random_model):
    model = random_model()
    _, state = model(torch.tensor([[1, 2, 3]]))
    parts = state.to_list()
    assert [part.shape for part in parts] == [(1, 32), (1, 2, 16, 16), (1, 32)] * 3
    assert parts[3] is state.layers[1].att_shift
    assert parts[4] is state.layers[1].wkv
    assert parts[5] is state.layers[1].ffn_shift
    again = heron.State.from_list(parts)
    assert all(a is b for a, b in zip(again.to_list(), parts, strict=True))
    for bad in ([], parts[:4]):
        with pytest.raises(ConfigError, match=f"state list: wanted 3 tensors per layer, .*got {len(bad)} tensors"):
            heron.State.from_list(bad)


def test_copies(random_model):
    model = random_model()
    _, state = model(torch.tensor([[1, 2, 3]]))
    assert all(part.requires_grad for part in state.to_list())
    for copy in (state.detach(), state.clone(), state.to("cpu"), state.map(lambda part: part + 0)):
        assert all(torch.equal(a, b) for a, b in zip(copy.to_list(), state.to_list(), strict=True))
    assert not any(part.requires_grad for part in state.detach().to_list())
    memory = {part.data_ptr() for part in state.to_list()}
    assert memory.isdisjoint(part.data_ptr() for part in state.clone().to_list())
    assert state.to("meta").layers[0].wkv.device.type == "meta"
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.layers = ()
