"""Models with ROSA memory, run: decoders against the model, sequences against themselves alone, documents, windows."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
import torch

import heron
from heron import tokenizer
from heron.config import RosaConfig
from heron.errors import ConfigError, DataError
from heron.generation import Engine, Request, Sampling, Snapshot, engine
from heron.generation.chat import Chat
from heron.generation.decoder import CppDecoder, ModelDecoder, TorchDecoder, is_fusible
from heron.generation.decoders import decoder_of
from heron.generation.graphed import GraphedDecoder, GraphedReader
from heron.generation.prefill import PromptReader
from heron.model.memory import Documents, Recollection
from heron.ops import _build
from heron.ops.rosa import TokenIndex, device_stream
from tests.generation import accuracy
from tests.ops.emulated_stream import emulate

INTEGERS = tokenizer.load("integers:37")
GREEDY = Sampling(temperature=0)
MEMORIES = {
    "memory": RosaConfig.preset("memory"),
    "3 matches": RosaConfig.preset("memory", n_matches=3, max_match=20),
    "window": RosaConfig.preset("memory", window=9, max_match=5),
    "documents end": RosaConfig.preset("memory", end=0),
}
FUSED = {
    "v7": dict(variant="v7"),
    "v8": dict(variant="v8"),
    "4x": dict(variant="v8", deep_embed_4x=True),
    "v7a": dict(variant="v7a"),
}
OTHERS = {"v7b": dict(variant="v7b"), "v8-hybrid": dict(variant="v8-hybrid"), "rosa": dict(rosa="qkv-1bit")}
DECODERS = [(TorchDecoder, 2), (CppDecoder, 3), (GraphedDecoder, 2), (GraphedDecoder, 1)]
needs_cpp = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


class Interrupted(Exception):
    """A piece of a prompt was not read to its end."""


@pytest.fixture
def remembering(random_model):
    """A function: the name of a memory, and ModelConfig fields -> a small random model whose memory has a say."""

    def make(memory: str = "memory", **changes) -> heron.RWKV:
        model = random_model(memory=MEMORIES[memory], **changes)
        with torch.no_grad():
            model.memory.copy += 3  # or what is drawn would hardly ever be what a match predicts
        return model

    return make


def text_of(n, seed=0, ids=5):
    """Few ids, so that they match at many lengths."""
    return torch.randint(1, ids, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def index_of(n=200, seed=9, **rules):
    return TokenIndex.of(torch.tensor(text_of(n, seed)), **rules)


def equal(a, b):
    a, b = a.to_list(), b.to_list()
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "form", "dtype"),
    [
        *(("memory", "v8", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *(("memory", form, torch.float32) for form in FUSED if form != "v8"),
        ("3 matches", "v8", torch.float32),
    ],
)
@pytest.mark.parametrize(("decoder_class", "n"), DECODERS)
def test_a_decoder_is_at_most_twice_as_far_from_fp64_as_the_model(remembering, form, memory, dtype, decoder_class, n):
    if decoder_class is CppDecoder and (form == "v7a" or dtype == torch.float64):
        pytest.skip("it is for v7 and v8 in fp32 and bf16")
    model = remembering(memory, **FUSED[form]).to(dtype)
    assert is_fusible(model)
    accuracy.check(decoder_class(model, n), n - 1, model, text_of(24, seed=1))


@pytest.mark.parametrize(("decoder_class", "n"), DECODERS)
def test_every_parameter_of_memory_matters_to_a_step(remembering, decoder_class, n):
    model, tokens = remembering(), text_of(30)

    def logits():
        decoder = decoder_class(model, n)
        return torch.cat([decoder.step([0], [token]).clone() for token in tokens])

    with torch.inference_mode():
        before = logits()
        for parameter in model.memory.parameters():
            kept = parameter.clone()
            parameter.mul_(1.5).add_(0.1)
            assert not torch.equal(logits(), before)
            parameter.copy_(kept)
        assert torch.equal(logits(), before)


@pytest.mark.parametrize("decoder_class", [TorchDecoder, CppDecoder, GraphedDecoder, ModelDecoder])
def test_a_step_takes_what_was_recalled_elsewhere(remembering, decoder_class):
    model, tokens = remembering(), text_of(20)
    found, _, _ = Recollection().read(torch.tensor(tokens), model.config.memory)
    reads, told = decoder_class(model, 2), decoder_class(model, 2)
    for i, token in enumerate(tokens):
        want, got = reads.step([0, 1], [token, token]).clone(), told.step([0, 1], [token] * 2, found[[i, i]]).clone()
        assert torch.equal(got, want)
        assert told.longest is None
    assert all(memory.n_read == 0 for memory in told.read(1).memory)
    without = decoder_class(heron.RWKV(dataclasses.replace(model.config, memory=None)), 1)
    with pytest.raises(ConfigError, match="no ROSA memory"):
        without.step([0], [1], found[:1])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("decoder_class", [TorchDecoder, CppDecoder])
def test_logits_and_states_do_not_depend_on_other_sequences_by_a_bit(remembering, decoder_class, memory):
    model = remembering(memory, n_embd=48, head_size=16, decay_rank=13)
    chance, alone, together = random.Random(1), decoder_class(model, 6), decoder_class(model, 6)
    tokens, at = [text_of(25, seed) for seed in range(6)], [0] * 6
    with torch.inference_mode():
        while rows := [row for row in range(6) if at[row] < 25]:
            chosen = chance.sample(rows, chance.randint(1, len(rows)))
            got = together.step(chosen, [tokens[row][at[row]] for row in chosen])
            matches = together.longest
            for i, row in enumerate(chosen):
                assert torch.equal(got[i : i + 1], alone.step([row], [tokens[row][at[row]]]))
                assert alone.longest == [matches[i]]
                at[row] += 1
        assert all(equal(together.read(row), alone.read(row)) for row in range(6))


@pytest.mark.parametrize(
    ("memory", "form"),
    [
        *(("memory", form) for form in (*FUSED, *OTHERS)),
        *((memory, form) for memory in MEMORIES if memory != "memory" for form in ("v8", "v7b")),
    ],
)
def test_a_state_that_was_read_stays_right_while_its_sequence_goes_on(remembering, form, memory):
    model = remembering(memory, **{**FUSED, **OTHERS}[form])
    decoder, tokens = decoder_of(model, 1), text_of(60)
    for token in tokens[:20]:
        decoder.step([0], [token])
    kept = decoder.read(0)
    later = [decoder.step([0], [token]).clone() for token in tokens[20:]]
    again = decoder_of(model, 1)
    again.write(0, kept)
    assert all(torch.equal(again.step([0], [token]), want) for token, want in zip(tokens[20:], later, strict=True))


def test_a_reader_of_fixed_pieces_gives_the_models_state(remembering):
    for form in FUSED:
        model, tokens = remembering(**FUSED[form]), text_of(15)
        reader, state, want = GraphedReader(model, 5), None, None
        memory = (Recollection(),)
        for start in (0, 5, 10):
            piece = torch.tensor([tokens[start : start + 5]])
            with torch.inference_mode():
                recalled, _ = model.recall(piece, want)
                _, want = model(piece, want)
            before = state if state is None else dataclasses.replace(state, memory=memory)
            state = reader.read(piece[0].tolist(), before, recalled)
            assert equal(state, dataclasses.replace(want, memory=None))


@pytest.mark.parametrize("memory", MEMORIES)
def test_looking_ahead_changes_nothing(remembering, monkeypatch, memory):
    """The device reads a token before the host does; some steps are dropped, and some begin without it."""
    emulate(monkeypatch)
    monkeypatch.setattr(device_stream, "_LEAST_ROOM", 1)
    model, chance = remembering(memory), random.Random(0)
    ahead, plain = GraphedDecoder(model, 1), GraphedDecoder(model, 1)
    ids, kept = text_of(60), []
    for i, token in enumerate(ids):
        kind = chance.choice(["ahead", "ahead", "ahead", "step", "dropped"]) if i else "step"
        if kind != "step":
            ahead.look_ahead([0], {})(torch.tensor([token if kind == "ahead" else 3]))
            assert equal(ahead.read(0), plain.read(0))
        if kind == "dropped":
            ahead.write(0, plain.read(0))
        assert torch.equal(ahead.step([0], [token]), plain.step([0], [token]))
        assert ahead.longest == plain.longest
        kept.append((i + 1, ahead.read(0)))
    for i, state in chance.sample(kept, 5):
        for decoder in (ahead, plain):
            decoder.write(0, state)
        for number, token in enumerate(ids[i : i + 20]):
            if number:
                ahead.look_ahead([0], {})(torch.tensor([token]))
            assert torch.equal(ahead.step([0], [token]), plain.step([0], [token]))


def test_no_step_is_begun_before_its_token_is_known_where_the_host_must_see_it(remembering, monkeypatch):
    def looks_ahead(n_sequences, *arguments, **options):
        decoder, sequences = GraphedDecoder(model, *arguments, **options), list(range(n_sequences))
        decoder.step(sequences, sequences)
        return decoder.look_ahead(sequences, {}) is not None

    model = remembering()
    assert not looks_ahead(1, 1)
    emulate(monkeypatch)
    assert looks_ahead(1, 1)
    assert looks_ahead(1, 2, fit_steps=True)
    assert not looks_ahead(2, 2, fit_steps=True)
    assert not looks_ahead(1, 2)
    assert not looks_ahead(1, 1, documents=Documents(index_of(), model.config))


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", {**FUSED, **OTHERS})
@pytest.mark.parametrize("memory", ["memory", "window"])
def test_text_is_what_the_model_gives_token_by_token(remembering, monkeypatch, form, memory):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    model, prompt = remembering(memory, **{**FUSED, **OTHERS}[form]), text_of(30)
    runs = Engine(model, INTEGERS)
    runs.open(prompt, sampling=GREEDY)
    said = [runs.step()[0][1] for _ in range(12)]
    ids, state = list(prompt), None
    with torch.inference_mode():
        for token in said:
            logits, _ = model(torch.tensor([ids]))
            best = logits[0, -1].topk(2).values
            assert int(logits[0, -1].argmax()) == token.id or float(best[0] - best[1]) < 1e-3
            ids.append(token.id)
    assert state is None


@pytest.mark.parametrize(
    ("form", "memory"), [*(("v8", memory) for memory in MEMORIES), ("v7a", "3 matches"), ("v7b", "documents end")]
)
def test_many_sequences_go_on_from_one_snapshot_each_by_itself(remembering, tmp_path, monkeypatch, form, memory):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    model, sampling = remembering(memory, variant=form), Sampling(top_p=0.95)
    runs = Engine(model, INTEGERS, rows=3)
    first = runs.open(text_of(40), sampling=sampling, seed=3)
    for _ in range(7):
        runs.step()
    snapshot = dataclasses.replace(runs.snapshot(first), generator=None)
    runs.close(first)
    runs.save(snapshot, tmp_path / "state")
    loaded = runs.load(tmp_path / "state")
    assert equal(loaded.state, snapshot.state)
    requests = [Request(text_of(n, n), 9, sampling, seed=n, after=snapshot) for n in (1, 5, 12, 0, 7, 30)]

    def texts(requests):
        said = [[] for _ in requests]
        for piece in runs.run(requests):
            said[piece.request].append(piece.token)
        return said

    together = texts(requests)
    assert together == texts(requests)
    assert together == [texts([dataclasses.replace(request, after=loaded)])[0] for request in requests]
    alone = Engine(model, INTEGERS)
    for request, want in zip(requests, together, strict=True):
        sequence = alone.open(request.prompt, request.after, sampling, request.seed)
        assert [alone.step()[0][1] for _ in range(9)] == want
        alone.close(sequence)
    assert any(token.match for tokens in together for token in tokens)


def test_a_state_that_is_handed_in_is_kept(remembering):
    model = remembering("window")
    runs = Engine(model, INTEGERS)
    state = runs.prefill(text_of(30))
    want = state.clone()
    runs.prefill(text_of(3000, 1), state)
    "".join(runs.stream(Request(text_of(99, 2), 50, after=Snapshot(state))))
    assert equal(state, want)
    assert runs.likeliest(Snapshot(state, (3,)), 5) == runs.likeliest(Snapshot(want, (3,)), 5)


@pytest.mark.parametrize("memory", ["memory", "window"])
def test_a_prompt_that_was_interrupted_is_read_again(remembering, monkeypatch, memory):
    """Even where the window has lost what came before by then."""
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 40)
    model, request = remembering(memory), Request(text_of(150), 5, GREEDY)
    want = "".join(Engine(model, INTEGERS).stream(request))
    runs, recall, fails = Engine(model, INTEGERS), PromptReader._recall, iter([False, True, False, True])

    def sometimes(self, *arguments):
        found = recall(self, *arguments)
        if next(fails, False):
            raise Interrupted
        return found

    monkeypatch.setattr(PromptReader, "_recall", sometimes)
    sequence, said = runs.add(request), ""
    for _ in range(4 + 2 + 4):  # pieces, two of which fail, and the other tokens
        with contextlib.suppress(Interrupted):
            said += "".join(sequence.text.push(token.id) for _, token in runs.step())
    assert said == want


def test_chat_remembers_and_answers_again(remembering):
    """What a turn reads is the whole conversation: another answer to it comes from the same memory."""
    model = remembering("window", vocab_size=256)
    talk = Chat(Engine(model, tokenizer.load("bytes")), GREEDY, max_tokens=40)
    first = "".join(talk.say("the cat sat on the mat, the cat sat"))
    assert "".join(talk.retry()) == first
    second = "".join(talk.say("the cat"))
    assert "".join(talk.retry()) == second


# -- matches and documents --------------------------------------------------------------------------------------------


def test_a_token_says_which_match_predicted_it(remembering):
    model = remembering()
    with torch.no_grad():
        model.memory.copy.fill_(0)[0] = 1000.0  # the longest match decides
    runs, prompt = Engine(model, INTEGERS), [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    runs.open(prompt, sampling=GREEDY)
    said = [runs.step()[0][1] for _ in range(9)]
    assert [token.id for token in said] == [4, 5, 6, 7, 1, 2, 3, 4, 5]
    assert [token.match.length for token in said] == list(range(3, 12))
    assert {(token.match.back, token.match.position) for token in said} == {(7, None)}
    runs = Engine(model, INTEGERS)
    runs.open([7], sampling=GREEDY)
    assert runs.step()[0][1].match is None


@needs_cpp
@pytest.mark.parametrize("form", {**FUSED, **OTHERS})
def test_documents_are_looked_into_beside_the_sequence(remembering, monkeypatch, form):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    model, index = remembering("3 matches", **{**FUSED, **OTHERS}[form]), index_of()
    documents, prompt = Documents(index, model.config), text_of(30)
    with torch.no_grad():
        model.memory.copy += 10
    runs = Engine(model, INTEGERS, documents=index)
    runs.open(prompt, sampling=Sampling(top_p=0.9), seed=1)
    ids = list(prompt)
    positions = set()
    for _ in range(40):
        (_, token) = runs.step()[0]
        with torch.inference_mode():
            recalled, _, _ = Recollection().read(torch.tensor(ids), model.config.memory, documents)
            logits, _ = model(torch.tensor([ids]), recalled=recalled[None])
        assert abs(token.logprob - float(logits[0, -1].log_softmax(0)[token.id])) < 1e-4
        predicted = recalled[-1, 0].tolist()
        assert (token.match is not None) == (predicted[0] == token.id and predicted[1] > 0)
        positions.add(token.match and token.match.position)
        if token.match and token.match.position is not None:
            stored, end = index.parts[0].tolist(), token.match.position
            assert stored[end] == token.id
            assert stored[end - token.match.length : end] == ids[-token.match.length :]
        ids.append(token.id)
    assert len(positions) > 1


@needs_cpp
def test_documents_have_one_hash_where_the_same_is_found_in_them(remembering):
    config, ids = remembering().config, torch.tensor(text_of(200, 9))
    changed = ids.clone()
    changed[100] += 1
    indices = index_of(), index_of(), TokenIndex.of(changed), TokenIndex.of(ids[:-1]), index_of(end=2)
    first, again, *others = (Documents(index, config).hash for index in indices)
    assert first == again
    assert len({first, *others}) == 4


@needs_cpp
def test_documents_that_do_not_fit_are_refused(remembering, random_model):
    for model in (random_model(), random_model(variant="v7b")):
        with pytest.raises(ConfigError, match="this model has no ROSA memory .* trained with --rosa memory"):
            Engine(model, INTEGERS, documents=index_of())
    with pytest.raises(ConfigError, match="this index holds no tokens"):
        Engine(remembering(), INTEGERS, documents=TokenIndex.of(torch.empty(0, dtype=torch.int64)))
    other = Engine(remembering(), INTEGERS, documents=TokenIndex.of(torch.tensor([5, 6, 70, 5, 6, 70, 7])))
    with pytest.raises(DataError, match=r"id 70 is in them, the model knows 0 to 36; build the index with the model's"):
        other.prefill([5, 6])
