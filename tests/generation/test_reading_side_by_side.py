"""Short prompts that are read in one pass; here on a CPU, in fp64, where the rounding of products does not show."""

from __future__ import annotations

import random

import pytest
import torch

from heron import tokenizer
from heron.errors import ConfigError
from heron.generation import Engine, Request, Sampling, engine
from heron.generation.prefill import PromptReader
from heron.model import State

INTEGERS = tokenizer.load("integers:37")
CPU = torch.device("cpu")
SIZE = 12


def reader_of(model, most_packed=4):
    return PromptReader(model, CPU, SIZE, None, most_packed=most_packed)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", SIZE)


@pytest.mark.parametrize(
    ("lengths", "taken"),
    [
        ([3], [0]),
        ([SIZE, 1], [0]),  # a whole piece, which a graph reads alone
        ([3, 4, 5, 1], [0, 1, 2]),
        ([3, SIZE, 8, 1, 1], [0, 2, 3]),  # the second waits for its turn, and is first then
        ([1] * 9, [0, 1, 2, 3]),
    ],
)
def test_the_first_piece_is_read_and_what_fits_in_behind_it(random_model, lengths, taken):
    assert reader_of(random_model()).packable(lengths) == taken
    assert reader_of(random_model(), 1).packable(lengths) == [0]


@pytest.mark.parametrize("form", ["v7", "v8", "v7a"])
@pytest.mark.parametrize("begun", [0, 1, 3])
def test_pieces_side_by_side_come_to_what_each_comes_to_alone(random_model, form, begun):
    model, chance = random_model(variant=form).double(), random.Random(0)
    reader = reader_of(model)
    pieces = [[chance.randrange(37) for _ in range(n)] for n in (1, 5, 3)]
    states = [reader.read([7, 8, number], None) if number < begun else None for number in range(3)]
    kept = [state and state.clone() for state in states]
    packed = reader.read_packed(pieces, states)
    for piece, state, before, behind in zip(pieces, states, kept, packed, strict=True):
        assert isinstance(behind, State)
        for one, other in zip(behind.to_list(), reader.read(piece, state).to_list(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        if state is not None:  # which others may go on from, too
            assert all(map(torch.equal, state.to_list(), before.to_list()))


def test_an_engine_that_packs_says_what_one_says_that_does_not(random_model, short_pieces):
    model, chance = random_model().double(), random.Random(1)
    prompts = [[chance.randrange(37) for _ in range(chance.choice((1, 2, 5, 11, 30)))] for _ in range(24)]
    requests = [
        Request(ids, 5, Sampling(top_p=0.9), seed=n, marks=(len(ids) // 2,) if len(ids) > 2 else ())
        for n, ids in enumerate(prompts)
    ]
    said = []
    for packed in (1, 4):
        ids = [[] for _ in requests]
        for piece in Engine(model, INTEGERS, 6, packed=packed).run(requests):
            ids[piece.request].append(piece.token.id)
        said.append(ids)
    assert said[0] == said[1]


def test_many_short_prompts_need_few_passes_and_a_long_one_gets_on(random_model, short_pieces, monkeypatch):
    passes, read = [], PromptReader.read_packed

    def noted(self, pieces, states):
        passes.append([len(piece) for piece in pieces])
        return read(self, pieces, states)

    monkeypatch.setattr(PromptReader, "read_packed", noted)
    many = Engine(random_model(), INTEGERS, 10, packed=4)
    sequences = [many.add(Request([1] * n, 9)) for n in (30, *[4] * 9)]
    begun = {}
    for n in range(1, 7):
        for sequence, _ in many.step():
            begun.setdefault(sequence, n)
    # A whole piece of the long prompt alone, then short ones side by side, then the long one in its turn.
    assert passes == [[SIZE], [3, 3, 3, 3], [3, 3, 3, 3], [3], [SIZE], [5]]
    assert [begun[sequence] for sequence in sequences] == [6, *[2] * 4, *[3] * 4, 4]


@pytest.mark.parametrize(
    ("packed", "changes"),
    [(1, {}), (3, dict(variant="v7b")), (3, dict(memory="memory"))],
    ids=["not asked for", "attention", "memory"],
)
def test_other_prompts_are_read_one_by_one(random_model, monkeypatch, packed, changes):
    pieces, read = [], PromptReader.read
    monkeypatch.setattr(PromptReader, "read", lambda self, ids, state: pieces.append(ids) or read(self, ids, state))
    many = Engine(random_model(**changes), INTEGERS, 3, packed=packed)
    for _ in range(3):
        many.add(Request([1, 2, 3], 9))
    many.step()
    assert pieces == [[1, 2]]


@pytest.mark.parametrize("packed", [0, 1.5, True])
def test_a_number_that_is_none_is_refused(random_model, packed):
    with pytest.raises(ConfigError, match="packed: wanted a whole number from 1 on"):
        Engine(random_model(), INTEGERS, packed=packed)
