"""Recorded steps that compute as many places as their sequences need (``pytest -m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch

import heron
from heron import tokenizer
from heron.generation import Request, Sampling
from heron.generation.graphed import GraphedDecoder
from heron.generation.slots import PATIENCE
from tests.generation import accuracy
from tests.generation.lives import lived, lives

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = dict(n_layer=3, n_embd=192, head_size=64, vocab_size=100)
ODD = dict(n_layer=3, n_embd=48, head_size=16, ffn_dim=90, vocab_size=100)  # 90: matvec has no kernel for it
MODELS = {
    "v8": (dict(variant="v8", **SIZES), torch.bfloat16),
    "v7a memory": (dict(variant="v7a", memory="memory", **SIZES), torch.float32),
    "v7a memory, few rows": (dict(variant="v7a", memory="memory", **SIZES), torch.bfloat16),
    "odd": (dict(variant="v8", **ODD), torch.float16),
}
IDS = tokenizer.load("integers:100")


@pytest.mark.parametrize("form", MODELS)
def test_a_step_of_every_size_is_at_most_twice_as_far_from_fp64_as_the_model(random_model, form):
    settings, dtype = MODELS[form]
    model = random_model(**settings).to("cuda", dtype)
    texts = torch.randint(4 if "memory" in form else 100, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = GraphedDecoder(model, 5, fit_steps=True)
    assert len({tuple(step.graph.pool()) for step in decoder._largest_first()}) == len(decoder._steps[1])
    for n_beside, size in ((0, 1), (1, 2), (2, 4), (3, 4), (4, 5)):
        for sequence in range(n_beside):
            decoder.write(sequence, None)
        accuracy.check(decoder, n_beside, model, *texts)
        assert decoder._last.n == size


def test_one_sequence_in_an_engine_of_many_places_gets_the_bits_of_an_engine_of_one(random_model):
    model, told = random_model(variant="v8", **SIZES).to("cuda", torch.bfloat16), []
    for rows, fit_steps in ((1, False), (16, True)):
        told.append([])
        engine = heron.Engine(model, IDS, rows, fit_steps=fit_steps)
        for seed in range(3):
            row = engine.open([seed, 7], sampling=Sampling(top_p=0.9, presence_penalty=0.3), seed=seed)
            for _ in range(5):
                told[-1].append(engine.step()[0][1])
            assert engine._decoder.ahead
            told[-1] += engine.snapshot(row).state.to_list()
            engine.close(row)
    for mine, theirs in zip(*told, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_a_text_beside_others_gets_the_same_bits_for_all_numbers_of_one_kernel(random_model, variant, dtype):
    model, chance = random_model(variant=variant, **SIZES).to("cuda", dtype), random.Random(5)
    decoder, text, told = GraphedDecoder(model, 32, fit_steps=True), [chance.randrange(100) for _ in range(6)], []
    for n_beside, size in ((1, 2), (2, 4), (6, 8), (15, 16), (20, 32), (31, 32)):
        for sequence in range(32):
            decoder.free(sequence)
        mine, *others = chance.sample(range(32), n_beside + 1)
        order = [*others[: n_beside // 2], mine, *others[n_beside // 2 :]]
        for token in text:
            tokens = [token if sequence == mine else chance.randrange(100) for sequence in order]
            logits = decoder.step(order, tokens)
        assert decoder._last.n == size
        told.append([logits[order.index(mine)].clone(), *decoder.read(mine).to_list()])
    by_registers = 4 if torch.cuda.get_device_capability()[0] == 9 else len(told)  # others by boxes: heron.ops.few_rows
    for group in filter(None, (told[:by_registers], told[by_registers:])):
        for other in group[1:]:
            assert all(torch.equal(a, b) for a, b in zip(group[0], other, strict=True))


@pytest.mark.parametrize("memory", [None, "memory"])
@pytest.mark.parametrize("tables", ["device", "disk"])
def test_texts_that_come_and_go_are_those_of_an_engine_of_one_place(random_model, tmp_path, memory, tables):
    if memory and tables != "device":
        pytest.skip("tables off the device are those of a model without memory")
    model, chance = random_model(variant="v8", memory=memory, **SIZES).to("cuda"), random.Random(3)
    place = {} if tables == "device" else dict(tables=tables, tables_file=tmp_path / "tables", device="cuda")
    model = model if tables == "device" else model.cpu()
    requests = [
        Request(
            [chance.randrange(100) for _ in range(chance.randint(1, 9))],
            chance.choice((2, 5, 40)),
            Sampling(temperature=chance.choice((0, 1.0)), top_p=0.9, presence_penalty=chance.choice((0, 0.2))),
            seed=number,
        )
        for number in range(20)
    ]
    single = heron.Engine(model, IDS, **place)
    alone = [[piece.token for piece in single.run([request])] for request in requests]
    engine = heron.Engine(model, IDS, 8, fit_steps=True, **place)
    coming, going, said, sizes = list(enumerate(requests)), {}, [[] for _ in requests], set()
    while coming or going:
        for number, request in coming[: engine.n_free if chance.random() < 0.1 or not going else 0]:
            going[engine.add(request)] = number
            coming.pop(0)
        for sequence, token in engine.step():
            said[going[sequence]].append(token)
            sequence.text.push(token.id)
            if sequence.text.finish:
                engine.close(sequence)
                del going[sequence]
        sizes.add(engine._decoder._last.n)
    assert sizes == {1, 2, 4, 8}
    for mine, true in zip(said, alone, strict=True):
        assert [token.id for token in mine] == [token.id for token in true]
        assert [token.match for token in mine] == [token.match for token in true]
        assert [token.logprob for token in mine] == pytest.approx([token.logprob for token in true], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [dict(variant="v8"), dict(variant="v7a"), dict(variant="v8", memory="memory")])
def test_looking_ahead_with_many_changes_no_bit(random_model, monkeypatch, form, dtype):
    """In an engine of one size, whose sequences are each their own: they join, end, are cancelled and saved."""
    model, some, told = random_model(**form, **SIZES).to("cuda", dtype), lives(random.Random(5), 24, 100), []
    begun, begin = [], GraphedDecoder._look_ahead
    monkeypatch.setattr(GraphedDecoder, "_look_ahead", lambda *of: (begun.append(of), begin(*of)))
    for looks_ahead in (True, False):
        engine = heron.Engine(model, IDS, 5)
        if not looks_ahead:
            monkeypatch.setattr(engine._decoder, "look_ahead", lambda *_: None)
        begun.clear()
        told.append(lived(engine, some))
        assert bool(begun) == (looks_ahead and "memory" not in form)
    for number, (tokens, text, snapshot) in told[1].items():
        mine, my_text, behind = told[0][number]
        assert (mine, my_text, behind.pending) == (tokens, text, snapshot.pending)
        assert all(map(torch.equal, behind.state.to_list(), snapshot.state.to_list()))
        assert torch.equal(behind.generator, snapshot.generator)


def test_a_state_is_moved_as_it_is(random_model):
    model = random_model(variant="v8", **SIZES).to("cuda", torch.bfloat16)
    decoder = GraphedDecoder(model, 8, fit_steps=True)
    for token in range(3):
        decoder.step(list(range(8)), [token + i for i in range(8)])
    for sequence in range(7):
        decoder.free(sequence)
    for _ in range(PATIENCE - 1):
        decoder.step([7], [5])
    before = decoder.read(7).to_list()
    assert decoder._slots[7] == 7
    assert decoder._slots.moves() == [(7, 0)]
    decoder._states.move(7, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.read(7).to_list(), strict=True))
    decoder.step([7], [5])
    assert decoder._last.n == 1
