"""Steps that compute as many places as their sequences need: how many, which states move; no text changes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from heron import tokenizer
from heron.config import RosaConfig
from heron.generation import Request, Sampling, graphed
from heron.generation.graphed import GraphedDecoder
from heron.generation.slots import PATIENCE, Slots, sizes_up_to
from heron.generation.step import layers_of, way_for
from heron.model import compiled as compilation
from heron.ops._choice import Choice
from heron.tables.store import off_device
from tests.generation import accuracy
from tests.generation.recording import engine_as_on_a_gpu, recorded
from tests.ops.emulated_stream import emulate

INTEGERS = tokenizer.load("integers:37")
MODELS = {
    "v7": dict(variant="v7"),
    "v8": dict(variant="v8"),
    "v7a": dict(variant="v7a"),
    "memory": dict(variant="v8", memory="memory"),
    "window": dict(variant="v7a", memory=RosaConfig.preset("memory", window=9, max_match=5)),
}


@pytest.fixture
def computed(monkeypatch):
    """Of each layer of each step that was computed: how many slots."""
    numbers, time_mix = [], graphed.time_mix

    def noted(run, layer, x, *rest):
        numbers.append(len(x))
        return time_mix(run, layer, x, *rest)

    monkeypatch.setattr(graphed, "time_mix", noted)
    return numbers


def fitting(model, rows, fit_steps=True, **options):
    return engine_as_on_a_gpu(model, INTEGERS, rows, fit_steps, **options)


# -- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sizes"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])])
def test_sizes_are_powers_of_two_and_all(n, sizes):
    assert sizes_up_to(n) == sizes


def test_a_new_sequence_takes_the_lowest_free_slot():
    slots = Slots([1, 2, 4])
    assert [slots.take(sequence) for sequence in (3, 1, 0, 2)] == [0, 1, 2, 3]
    assert slots.take(0) == 2  # the one that it has
    slots.free(1)
    slots.free(3)
    assert slots.take(3) == 0
    assert (slots[0], 1 in slots) == (2, False)
    assert [slots.size([slots[i] for i in some]) for some in ([3], [0], [2, 3])] == [1, 4, 4]


def test_with_one_size_each_sequence_stays_in_the_slot_of_its_number():
    slots = Slots([8])
    assert [slots.take(sequence) for sequence in (5, 0, 7)] == [5, 0, 7]
    slots.free(0)
    assert [slots.moves() for _ in range(2 * PATIENCE)] == [[]] * 2 * PATIENCE
    assert slots.size([0]) == 8


def test_sequences_are_moved_once_a_smaller_step_has_held_all_for_some_steps():
    slots = Slots([1, 2, 4, 8])
    for sequence in range(8):
        slots.take(sequence)
    for sequence in (0, 2, 3, 5):
        slots.free(sequence)
    for _ in range(PATIENCE - 1):
        assert slots.moves() == []
    slots.take(0)  # one more: the larger step is needed again
    assert slots.moves() == []
    slots.free(0)
    waited = [slots.moves() for _ in range(PATIENCE)]
    assert waited == [[]] * (PATIENCE - 1) + [[(4, 0), (6, 2), (7, 3)]]
    assert [slots[i] for i in (1, 4, 6, 7)] == [1, 0, 2, 3]
    assert slots.moves() == []


def test_no_two_sequences_share_a_slot_and_no_state_is_copied_more_often_than_sequences_leave():
    chance, sizes = random.Random(0), sizes_up_to(20)
    slots, there, left, moved = Slots(sizes), [], 0, 0
    for _ in range(2000):
        for _ in range(chance.choice((0, 0, 0, 1, 3))):
            if len(there) < 20 and chance.random() < 0.5:
                there.append(chance.choice([i for i in range(20) if i not in there]))
                slots.take(there[-1])
            elif there:
                slots.free(there.pop(chance.randrange(len(there))))
                left += 1
        before = {i: slots[i] for i in there}
        moves = dict(slots.moves())
        assert {i: moves.get(slot, slot) for i, slot in before.items()} == {i: slots[i] for i in there}
        assert not set(moves.values()) & set(before.values())
        assert len({slots[i] for i in there}) == len(there)
        moved += len(moves)
    assert 0 < moved <= left


# -- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", MODELS)
def test_sequences_that_come_and_go_get_the_logits_of_each_alone(random_model, computed, form):
    model, chance = random_model(**MODELS[form]).double(), random.Random(1)
    fits, alone, there = recorded(GraphedDecoder(model, 9, fit_steps=True)), GraphedDecoder(model, 1), {}
    sizes = set()
    for step in range(48):
        wanted = (9, 2, 1)[step // 8 % 3]  # full and nearly empty by turns
        for sequence in list(there):
            if len(there) > wanted or chance.random() < 0.05:
                fits.free(sequence)
                del there[sequence]
        while len(there) < wanted and chance.random() < 0.7:
            sequence = chance.choice([i for i in range(9) if i not in there])
            fits.write(sequence, None)
            there[sequence] = None
        if not (order := chance.sample(sorted(there), len(there))):
            continue
        tokens = [chance.randrange(4) for _ in order]
        computed.clear()
        got = fits.step(order, tokens).clone()
        assert len(set(computed)) == 1
        assert computed[0] >= len(order)
        sizes.add(computed[0])
        matches = fits.longest
        for i, (sequence, token) in enumerate(zip(order, tokens, strict=True)):
            alone.write(0, there[sequence])
            assert accuracy.distance(got[i : i + 1], alone.step([0], [token])) < 1e-12
            there[sequence] = alone.read(0)
            assert matches is None or matches[i] == alone.longest[0]
        read = chance.choice(order)
        for mine, true in zip(fits.read(read).to_list(), there[read].to_list(), strict=True):
            assert accuracy.distance(mine, true) < 1e-12 or torch.equal(mine, true)
    assert sizes == {1, 2, 4, 8, 9}


@pytest.mark.parametrize("form", ["v7a", "memory"])
def test_all_sizes_above_one_are_compiled_once(random_model, monkeypatch, form):
    torch._dynamo.reset()
    model, made, made_by = random_model(**MODELS[form], n_layer=2).double(), [], {}
    plain, compiled = (GraphedDecoder(model, 9, fit_steps=True) for _ in range(2))
    compute = compiled._compute

    def backend(graph, _):
        made.append(graph)
        return graph

    def noted(size):
        logits = compute(size)
        made_by[size.n] = len(made)
        return logits

    monkeypatch.setattr(compiled, "_compute", noted)
    compiled._compile(lambda piece: compilation.compiled(piece, backend))
    assert list(made_by) == [9, 8, 4, 2, 1]
    assert len({made_by[n] for n in (9, 8, 4, 2)}) == 1
    for count in (9, 2, 1):
        order = list(range(count))
        got, want = (decoder.step(order, [3] * count).clone() for decoder in (compiled, plain))
        assert accuracy.distance(got, want) < 1e-12
        for decoder in (compiled, plain):
            for i in range(9):
                decoder.free(i)
    assert len(made) == made_by[1]


def _with_tables_off(model, n):
    moved = off_device(model, torch.device("cpu"), None)
    assert moved is not None
    return moved[0], n, moved[1]


@pytest.mark.parametrize(("form", "tables"), [("v8", None), ("v8", "host"), ("v7a", None), ("memory", None)])
def test_steps_of_few_sequences_that_have_a_kernel_of_their_own_are_the_same_steps(
    random_model, monkeypatch, form, tables
):
    """On a CPU by the kernel's definition; one, few and many sequences are computed in three ways."""
    choice = Choice("cuda", "as if there were a kernel"), Choice("reference", "they are too many")
    monkeypatch.setattr("heron.generation.step.few_rows_choice", lambda weights, n: choice[n > 4])
    model = random_model(**MODELS[form]).double()
    single = GraphedDecoder(model, 1)
    fits = GraphedDecoder(*(model, 9) if tables is None else _with_tables_off(model, 9), fit_steps=True)
    ways = {n: steps[0].form for n, steps in fits._steps.items()}
    assert [ways[1] is ways[2], ways[2] is ways[4], ways[4] is ways[8], ways[8] is ways[9]] == [
        False,
        True,
        False,
        True,
    ]
    assert ways[1].layers is ways[2].layers
    monkeypatch.setattr("heron.generation.step.FEWEST", 1)
    assert way_for(layers_of(model)[0], 1) == way_for(layers_of(model)[0], 2)
    for count in (2, 3, 7, 1):
        for sequence in range(9):
            fits.free(sequence)
        for token in (3, 5):
            got = fits.step(list(range(count)), [token] * count)
        single.write(0, None)
        for token in (3, 5):
            want = single.step([0], [token])
        assert all(accuracy.distance(row[None], want) < 1e-12 for row in got)


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("tables", ["device", "host"])
def test_texts_are_what_they_are_in_an_engine_of_one_place(random_model, monkeypatch, form, tables):
    """Requests come by chance; some are cancelled, and some are saved and gone on with."""
    if tables == "host" and form not in ("v8", "v7a"):
        pytest.skip("tables off the device are those of a v8 or v7a without memory")
    emulate(monkeypatch)
    model, chance = random_model(**MODELS[form]).double(), random.Random(form)
    requests = [
        Request(
            [chance.randrange(37) for _ in range(chance.randint(1, 6))],
            chance.choice((2, 3, 30)),
            Sampling(chance.choice((0, 1.0)), 0.9, presence_penalty=chance.choice((0, 0.4)), frequency_penalty=0.1),
            seed=number,
            logit_bias={3: 1.5},
            logprobs=chance.choice((None, 2)),
        )
        for number in range(14)
    ]
    single = fitting(model, 1, tables=tables)
    alone = [[piece.token for piece in single.run([request])] for request in requests]
    many, coming, going, said = fitting(model, 8, tables=tables), list(enumerate(requests)), {}, [[] for _ in requests]
    while coming or going:
        if coming and many.n_free and (chance.random() < 0.3 or not going):
            number, request = coming.pop(0)
            going[many.add(request)] = number
        for sequence, token in many.step():
            number = going[sequence]
            said[number].append(token)
            sequence.text.push(token.id)
            cancelled, saved = (number, len(said[number])) == (7, 2), chance.random() < 0.05
            if sequence.text.finish or cancelled or saved:
                snapshot = many.snapshot(sequence)
                many.close(sequence)
                del going[sequence]
                if not sequence.text.finish and not cancelled:
                    left = requests[number].max_tokens - len(said[number])
                    rest = dataclasses.replace(requests[number], prompt=(), after=snapshot, max_tokens=left)
                    going[many.add(rest)] = number
    del alone[7][2:]
    for mine, true in zip(said, alone, strict=True):
        assert [token.id for token in mine] == [token.id for token in true]
        assert [token.match for token in mine] == [token.match for token in true]
        assert [token.logprob for token in mine] == pytest.approx([token.logprob for token in true], abs=1e-5)
        assert [[i for i, _ in token.top] for token in mine] == [[i for i, _ in token.top] for token in true]


def test_a_step_costs_what_its_sequences_need(random_model, computed):
    model, steps = random_model(n_layer=1), {}
    for fit_steps in (True, False):
        engine = fitting(model, 16, fit_steps)
        sequences, steps[fit_steps] = [engine.open([1], seed=i) for i in range(16)], []
        computed.clear()
        for n in (16, 9, 1):
            for sequence in sequences[:-n]:
                engine.close(sequence)
            sequences = sequences[-n:]
            for _ in range(PATIENCE + 2):
                engine.step()
        steps[fit_steps] = list(computed)
    looked_ahead = 1  # the step behind the first token
    assert steps[False] == [16] * (looked_ahead + 3 * (PATIENCE + 2))
    before = PATIENCE - 1  # steps until sequences are moved
    assert steps[True] == [16] * (looked_ahead + 2 * (PATIENCE + 2) + before) + [1] * 3
