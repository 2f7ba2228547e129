"""The next step of many sequences begins before the host has read their tokens: nothing that is said changes."""

from __future__ import annotations

import random

import pytest
import torch

from heron import tokenizer
from heron.errors import HeronError
from heron.generation import Sampling
from heron.generation.graphed import GraphedDecoder
from tests.generation import accuracy
from tests.generation.lives import lived, lives
from tests.generation.recording import engine_as_on_a_gpu, recorded
from tests.ops.emulated_stream import emulate

INTEGERS = tokenizer.load("integers:37")
GREEDY = Sampling(temperature=0)
MODELS = {
    "v7": dict(variant="v7"),
    "v7a": dict(variant="v7a"),
    "memory": dict(variant="v8", memory="memory"),
}
FITS = pytest.mark.parametrize("fit_steps", [True, False], ids=["fitting", "all places"])


def same(mine, true):
    """Whether two states are alike but for rounding, and their memories to the bit."""
    return all(
        torch.equal(a, b) or (a.is_floating_point() and accuracy.distance(a, b) < 1e-12)
        for a, b in zip(mine.to_list(), true.to_list(), strict=True)
    )


# -- decoders ---------------------------------------------------------------------------------------------------------


@FITS
@pytest.mark.parametrize("form", ["v7", "v8", "v7a"])
def test_sequences_that_come_and_go_while_a_step_is_ahead_get_what_each_gets_alone(random_model, form, fit_steps):
    """Each is read in the middle of a step that has begun, goes on, or goes while it runs and is void for it."""
    model, chance = random_model(variant=form).double(), random.Random(form)
    many, alone = recorded(GraphedDecoder(model, 6, fit_steps=fit_steps)), GraphedDecoder(model, 1)
    alone.step([0], [5])
    behind, tokens, begun = {}, {}, set()  # of each sequence: its state, and the token that it reads next
    for _ in range(60):
        for sequence in range(6):
            if sequence not in tokens and chance.random() < 0.1:
                behind[sequence], tokens[sequence] = alone.read(0), chance.randrange(37)  # from where another one was
                many.write(sequence, behind[sequence])
            elif sequence in tokens and chance.random() < 0.07:
                many.free(sequence)
                del behind[sequence], tokens[sequence]
        assert many.ahead == begun & set(tokens)
        assert all(same(many.read(sequence), state) for sequence, state in behind.items())
        turn = chance.sample(there, len(there)) if (there := sorted(many.ahead or tokens)) else []
        if not turn:
            begun = set()
            continue
        logits = many.step(turn, [tokens[sequence] for sequence in turn]).clone()
        for i, sequence in enumerate(turn):
            alone.write(0, behind[sequence])
            assert accuracy.distance(logits[i : i + 1], alone.step([0], [tokens[sequence]])) < 1e-12
            behind[sequence], tokens[sequence] = alone.read(0), chance.randrange(37)
        begun = set()
        others = {sequence: tokens[sequence] for sequence in tokens if sequence not in turn}
        if chance.random() < 0.8:
            many.look_ahead(turn, others)(torch.tensor([tokens[sequence] for sequence in turn]))
            begun = {*turn, *others}
        assert all(same(many.read(sequence), state) for sequence, state in behind.items())


def test_a_step_with_a_sequence_that_has_not_begun_is_refused(random_model):
    decoder = recorded(GraphedDecoder(random_model(), 3))
    decoder.step([0, 1], [5, 6])
    decoder.look_ahead([0, 1], {})(torch.tensor([7, 8]))
    decoder.write(2, None)
    with pytest.raises(HeronError, match=r"without the sequences \[2\] has begun"):
        decoder.step([0, 2], [7, 3])
    decoder.step([0, 1], [7, 8])


def test_a_token_that_could_not_be_drawn_spoils_its_own_sequence_alone(random_model):
    decoder, alone = (recorded(GraphedDecoder(random_model(), n)) for n in (2, 1))
    decoder.step([0, 1], [5, 6])
    before = decoder.read(0)
    decoder.look_ahead([0, 1], {})(torch.tensor([-1, 8]))
    assert torch.equal(decoder.read(0).layers[1].wkv, before.layers[1].wkv)
    decoder.free(0)
    alone.step([0], [6])
    assert accuracy.distance(decoder.step([1], [8]), alone.step([0], [8])) < 1e-5


# -- engines ----------------------------------------------------------------------------------------------------------


@FITS
@pytest.mark.parametrize("form", MODELS)
def test_looking_ahead_changes_nothing(random_model, monkeypatch, form, fit_steps):
    emulate(monkeypatch)
    model, some = random_model(**MODELS[form]).double(), lives(random.Random(form), 24)
    made = (engine_as_on_a_gpu(model, INTEGERS, 5, fit_steps, looks_ahead=looks_ahead) for looks_ahead in (True, False))
    ahead, plain = (lived(engine, some) for engine in made)
    assert {said[1][-1] for said in plain.values()} == {"length", "stop", None}
    for number, (tokens, pieces, snapshot) in plain.items():
        mine, text, behind = ahead[number]
        assert [token.id for token in mine] == [token.id for token in tokens]
        assert [token.match for token in mine] == [token.match for token in tokens]
        assert [token.logprob for token in mine] == pytest.approx([token.logprob for token in tokens], abs=1e-6)
        assert [[i for i, _ in token.top] for token in mine] == [[i for i, _ in token.top] for token in tokens]
        assert text == pieces
        assert behind.pending == snapshot.pending == (tokens[-1].id,)
        assert same(behind.state, snapshot.state)
        assert torch.equal(behind.generator, snapshot.generator)
        assert (behind.counts is None) == (snapshot.counts is None)
        assert behind.counts is None or torch.equal(behind.counts, snapshot.counts)


def test_of_the_same_sequences_looking_ahead_changes_no_bit(random_model):
    """They come together, so each step computes the same; one after another ends."""
    model, told = random_model(variant="v7"), []
    for looks_ahead in (True, False):
        engine = engine_as_on_a_gpu(model, INTEGERS, 4, fit_steps=False, looks_ahead=looks_ahead)
        sequences, told_now = [engine.open([i, 7], sampling=Sampling(top_p=0.9), seed=i) for i in range(4)], []
        for n in (4, 4, 3, 3, 2, 1, 1):
            for sequence in sequences[n:]:
                told_now += engine.snapshot(sequence).state.to_list()
                engine.close(sequence)
            sequences = sequences[:n]
            told_now += [token for _, token in engine.step()]
        told.append(told_now)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*told, strict=True))


@FITS
def test_a_step_of_all_begins_before_their_tokens_are_known_on_the_host(random_model, monkeypatch, fit_steps):
    engine, events = engine_as_on_a_gpu(random_model(), INTEGERS, 4, fit_steps), []
    run, receive = engine._decoder._run, engine._draws._receive
    monkeypatch.setattr(engine._decoder, "_run", lambda: (events.append("step"), run())[1])
    monkeypatch.setattr(engine._draws, "_receive", lambda n: (events.append(n), receive(n))[1])
    first = [engine.open([i, 2]) for i in range(3)]
    engine.step()
    engine.open([5, 6])
    engine.close(first[1])
    for _ in range(3):
        engine.step()
    assert events == ["step", "step", 3, "step", 2, "step", 3, "step", 3]  # the one that came joined the third


def test_one_that_comes_while_a_step_is_ahead_is_drawn_for_from_the_next_on(random_model):
    engine = engine_as_on_a_gpu(random_model(), INTEGERS, 3)
    first = engine.open([1, 2])
    engine.step()
    second = engine.open([3])
    before = engine.snapshot(second)
    assert [one for one, _ in engine.step()] == [first]
    assert (engine.snapshot(second).pending, before.pending) == ((3,), (3,))
    assert [one for one, _ in engine.step()] == [first, second]
    engine.close(first)
    third = engine.open([4])  # in the place of the one that was ahead
    assert [one for one, _ in engine.step()] == [second]
    engine.close(second)
    assert [one for one, _ in engine.step()] == [third]


def test_where_one_cannot_go_on_the_others_do(random_model):
    """Its token makes its own logits bad, in a step that had begun for all."""
    model = random_model(variant="v8", n_layer=1).double()
    alone = engine_as_on_a_gpu(model, INTEGERS, 1)
    want = {}
    for prompt in ((1, 2), (3, 4)):
        sequence = alone.open(prompt, sampling=GREEDY)
        want[prompt] = [alone.step()[0][1].id for _ in range(5)]
        alone.close(sequence)
    bad = next(token for token in want[1, 2] if token not in want[3, 4])
    with torch.no_grad():
        model.blocks[0].ffn.enn.weight[bad] = torch.inf
    engine = engine_as_on_a_gpu(model, INTEGERS, 2)
    spoilt, other = (engine.open(prompt, sampling=GREEDY) for prompt in want)
    drawn = [token for _ in range(5) for one, token in engine.step() if one is other]
    assert [token.id for token in drawn] == want[3, 4]
    assert (spoilt.is_open, other.is_open) == (False, True)
