"""States of sequences in bf16: what a decoder for a GPU writes with them, run on a CPU."""

from __future__ import annotations

import pytest
import torch

import heron
from heron import tokenizer
from heron.errors import ConfigError
from heron.generation.decoder import TorchDecoder
from heron.generation.graphed import GraphedDecoder
from heron.model import State
from heron.tables.store import off_device

SIZES = dict(n_layer=2, n_embd=32, head_size=16, vocab_size=37)
INTEGERS = tokenizer.load("integers:37")


def read(decoder, sequence, tokens):
    """The logits behind each token, of a sequence that begins."""
    decoder.free(sequence)
    return torch.cat([decoder.step([sequence], [token]).clone() for token in tokens])


@pytest.fixture
def model(random_model):
    return random_model(variant="v7", **SIZES)


TOKENS = torch.randint(37, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("in_place", [False, True])
def test_logits_are_those_of_states_in_fp32_but_for_rounding(random_model, in_place):
    model = random_model(variant="v8", **SIZES)
    want, tables = read(TorchDecoder(model, 1), 0, TOKENS), None
    if in_place:  # steps that the host picks rows for don't look ahead, and new states go where the old ones were
        model, tables = off_device(model, torch.device("cpu"), None)
    got = read(GraphedDecoder(model, 3, tables, in_bf16=True), 1, TOKENS)
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert 1e-6 < error.max() < 0.02


def test_a_text_is_the_same_again_in_any_place(model):
    decoder = GraphedDecoder(model, 4, fit_steps=True, in_bf16=True)
    first = read(decoder, 0, TOKENS)
    decoder.step([0, 1, 2], [3, 4, 5])
    assert torch.equal(read(decoder, 0, TOKENS), first)
    states = []
    for sequences in ([0], [0, 1, 2], [2]):  # two of which move, once there are fewer
        for sequence in range(4):
            decoder.free(sequence)
        for token in TOKENS[:20]:
            decoder.step(sequences, [token] * len(sequences))
        states += [decoder.read(sequence) for sequence in sequences]
    for state in states[1:]:
        for mine, wanted in zip(state.to_list(), states[0].to_list(), strict=True):
            assert torch.allclose(mine, wanted, rtol=0, atol=1e-5)  # products may depend on how many there are


def test_a_state_comes_in_fp32_and_goes_back_in_as_it_was(model):
    decoder, other = (GraphedDecoder(model, 2, in_bf16=True) for _ in range(2))
    read(decoder, 0, TOKENS[:9])
    state = decoder.read(0)
    assert isinstance(state, State)
    assert all(layer.wkv.dtype == torch.float32 for layer in state.layers)
    other.write(1, state)
    for mine, wanted in zip(other.read(1).to_list(), state.to_list(), strict=True):
        assert torch.equal(mine, wanted)


def test_where_states_cannot_be_in_bf16_an_engine_says_so(model):
    with pytest.raises(ConfigError, match="states: in bf16 only those of a v7, v7a or v8 on a GPU"):
        heron.Engine(model, INTEGERS, states="bf16")
    with pytest.raises(ConfigError, match="states: wanted fp32 or bf16, got 'fp16'"):
        heron.Engine(model, INTEGERS, states="fp16")
