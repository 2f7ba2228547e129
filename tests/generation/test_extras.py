"""Biases, constraints, the likeliest tokens and marks, on the host and as on a device; what fails ends alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from heron import tokenizer
from heron.errors import ConfigError, HeronError
from heron.generation import Engine, Request, Sampling, Snapshot, engine
from heron.generation.drawing import DeviceDraws
from heron.generation.prefill import PromptReader
from heron.model.tuned_state import TunedState

INTEGERS, LETTERS = tokenizer.load("integers:37"), tokenizer.load("bytes")
GREEDY, ALL = Sampling(temperature=0), Sampling(top_p=1.0)
SETTINGS = (GREEDY, Sampling(top_p=0.9), Sampling(top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2))


@pytest.fixture(params=["host", "device"])
def make(request, monkeypatch):
    """A function as Engine's constructor; the tokens are drawn on the host, or as on a CUDA device."""

    def made(model, tokens=INTEGERS, rows=1):
        new = Engine(model, tokens, rows)
        if request.param == "device":
            monkeypatch.setattr(new, "_draws", DeviceDraws(tokens, rows, torch.device("cpu")))
        return new

    return made


class Turns:
    """Ids of one remainder after another, over behind each round."""

    def __init__(self, n, n_ids=37):
        self.n, self.n_ids, self.at = n, n_ids, 0

    @property
    def is_over(self):
        return self.at == 0

    def allowed(self):
        return torch.arange(self.n_ids) % self.n == self.at

    def accept(self, token):
        assert token % self.n == self.at
        self.at = (self.at + 1) % self.n


class Failing(Turns):
    """Fails at the third token: it allows nothing, raises, refuses a token, or answers with numbers."""

    def __init__(self, way):
        super().__init__(1)
        self.way, self.left = way, 2

    def allowed(self):
        if self.left or self.way == "refuses":
            return super().allowed()
        if self.way == "raises":
            raise HeronError("the grammar is too deep")
        return torch.zeros(37, dtype=torch.int64 if self.way == "numbers" else torch.bool)

    def accept(self, token):
        if not self.left:
            raise HeronError("the grammar is too deep")
        self.left -= 1


def said(running, request, n=99):
    """The tokens of one request, stepped at most `n` times."""
    sequence, tokens = running.add(request), []
    while sequence.is_open and len(tokens) < n:
        for one, token in running.step():
            assert one is sequence
            tokens.append(token)
            sequence.text.push(token.id)
            if sequence.text.finish:
                running.close(sequence)
    return tokens


def logprobs_behind(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0][0, -1].log_softmax(0)


def some_request(chance):
    prompt = [chance.randrange(37) for _ in range(chance.choice((1, 2, 5, 9, 14)))]
    turns = Turns(3) if chance.random() < 0.4 else None
    bias = {chance.randrange(37): chance.uniform(-5, 5) for _ in range(3)} if chance.random() < 0.4 else {}
    marks = sorted(chance.sample(range(1, len(prompt)), chance.randrange(len(prompt))))
    rest = dict(logit_bias=bias, logprobs=chance.choice((None, 0, 4)), constraint=turns, marks=marks)
    return Request(prompt, chance.randint(1, 9), chance.choice(SETTINGS), seed=chance.randrange(99), **rest)


@pytest.mark.parametrize("form", ["v8", "v7a", "v7b"])
def test_eight_sequences_that_join_and_leave_say_what_each_says_alone(random_model, make, monkeypatch, form):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    model, chance = random_model(variant=form), random.Random(form)
    many, found, wanted = make(model, rows=8), {}, {}
    for _ in range(70):
        while many.n_free and chance.random() < 0.5:
            request = some_request(chance)
            wanted[sequence := many.add(request)] = said(make(model), request)
            found[sequence] = []
            if request.constraint is not None:
                request.constraint.at = 0
        for sequence, token in many.step():
            found[sequence].append(token)
            sequence.text.push(token.id)
            if sequence.text.finish or chance.random() < 0.01:
                many.close(sequence)
    assert sum(one.text.finish == "length" for one in found) > 10
    assert any(token.top for tokens in found.values() for token in tokens)
    for sequence, tokens in found.items():
        assert tokens == wanted[sequence][: len(tokens)]


def test_a_bias_moves_what_is_drawn_and_not_its_logprob(random_model, make):
    model = random_model()
    for value, n in ((100.0, 6), (-100, 0)):
        plain = said(make(model), Request([3, 4], 6, GREEDY))[0].id
        tokens = said(make(model), Request([3, 4], 6, GREEDY, logit_bias={plain: value}))
        assert [token.id for token in tokens].count(plain) == n
        ids = [3, 4]
        for token in tokens:
            assert token.logprob == pytest.approx(float(logprobs_behind(model, ids)[token.id]), abs=1e-5)
            ids.append(token.id)
    assert {token.id for token in said(make(model), Request([1], 50, ALL, logit_bias={5: 60.0, 9: 60.0}))} == {5, 9}


def test_a_bias_is_added_in_full_precision(random_model, make):
    """In bf16 both logits would be 100, and the lower id would always win."""
    model = random_model(variant="v7a").to(torch.bfloat16)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[9] = 0.001 * torch.sign(model.ln_out.bias)
        model.head.weight[9] *= torch.sign(model(torch.tensor([[1]]))[0][0, -1, 9])
    (token,) = said(make(model), Request([1], 1, GREEDY, logit_bias={5: 100, 9: 100}))
    assert token.id == 9


def test_the_likeliest_tokens_are_the_models(random_model, make):
    model = random_model()
    tokens = said(make(model), Request([3, 4], 5, SETTINGS[2], logprobs=7, logit_bias={2: 3.0}, seed=1))
    ids = [3, 4]
    for token in tokens:
        want = logprobs_behind(model, ids)
        assert [i for i, _ in token.top] == want.topk(7).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(want.topk(7).values.tolist(), abs=1e-5)
        assert all(p == token.logprob for i, p in token.top if i == token.id)
        ids.append(token.id)
    assert any(i == token.id for token in tokens for i, _ in token.top)
    assert said(make(model), Request([3, 4], 1, logprobs=0))[0].top == ()
    assert len(said(make(model), Request([3, 4], 1, logprobs=20))[0].top) == 20


def test_ids_that_stand_for_nothing_are_not_among_the_likeliest(random_model, make):
    model, world = random_model(vocab_size=65536, n_layer=1, n_embd=16), tokenizer.load("world")
    with torch.no_grad():
        model.head.weight[65530:] = 0
        model.head.weight[:65530] -= 10 * torch.sign(model.ln_out.bias)
    assert logprobs_behind(model, [1]).argmax() >= 65530
    (token,) = said(make(model, world), Request([1], 1, GREEDY, logprobs=20))
    assert len(token.top) == 20
    assert max(i for i, _ in token.top) < 65530


def test_a_constraint_is_obeyed_and_the_text_ends_only_where_it_is_over(random_model, make):
    model = random_model(vocab_size=256)
    ends = [LETTERS.eod]
    with torch.no_grad():
        model.head.weight[ends] = 10 * torch.sign(model.ln_out.bias)  # what it would say at once
    for n in (1, 2, 5):
        running = make(model, LETTERS)
        sequence = running.add(Request("ab", 40, ALL, constraint=Turns(n, 256), seed=n))
        sequence.extras.constraint.at = n - 1
        tokens = []
        while sequence.text.finish is None:
            tokens += [token.id for _, token in running.step()]
            sequence.text.push(tokens[-1])
        assert [token % n for token in tokens[:-1]] == [(n - 1 + i) % n for i in range(len(tokens) - 1)]
        assert sequence.text.finish == "end" and (len(tokens) - 2) % n == 0 if n > 1 else len(tokens) == 1


def test_of_a_constraint_that_is_over_stop_ids_end_the_text(random_model, make):
    class Over(Turns):
        is_over = True

        def allowed(self):
            return torch.zeros(37, dtype=torch.bool)

        def accept(self, token):
            raise HeronError(f"{token} is no part of the text")

    assert [t.id for t in said(make(random_model()), Request([1], 9, ALL, constraint=Over(1), stop_ids=[7]))] == [7]


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("nothing", "constraint: no token may come next"),
        ("raises", "the grammar is too deep"),
        ("refuses", "the grammar is too deep"),
        ("numbers", r"constraint: wanted \(37,\) torch.bool, got \(37,\) torch.int64"),
    ],
)
def test_a_constraint_that_fails_ends_its_sequence_alone(random_model, make, way, words):
    model, requests = random_model(), [Request([n], 9, ALL, seed=n) for n in range(3)]
    want = [said(make(model), request) for request in requests]
    many = make(model, rows=4)
    others = [many.add(request) for request in requests[:2]]
    failing = many.add(Request([9], 9, ALL, constraint=Failing(way)))
    others.append(many.add(requests[2]))
    found = {one: [] for one in (*others, failing)}
    for _ in range(9):
        for one, token in many.step():
            found[one].append(token)
    assert [found[one] for one in others] == want
    assert not failing.is_open
    assert many.n_free == 1
    *tokens, error = found[failing]
    assert len(tokens) == 2
    with pytest.raises(HeronError, match=words):
        raise error
    with pytest.raises(HeronError, match=words):
        list(make(model).run([Request([9], 9, ALL, constraint=Failing(way))]))


def test_logits_that_are_not_finite_end_their_sequence_alone(random_model, make):
    model = random_model()
    with torch.no_grad():
        model.blocks[0].ffn.enn.weight[30] = math.inf
    request = Request([2], 6, SETTINGS[2], logit_bias={30: -100.0})
    want = said(make(model), request)
    for extras in ({}, {"logprobs": 3}, {"constraint": Turns(1)}):
        many = make(model, rows=3)
        bad, good = many.add(Request([30], 6, SETTINGS[2], **extras)), many.add(request)
        (first, error), (second, token) = many.step()
        assert (first, second) == (bad, good)
        assert isinstance(error, HeronError)
        assert "wanted finite numbers, got nan" in str(error)
        assert (bad.is_open, many.n_free) == (False, 2)
        assert [token, *(many.step()[0][1] for _ in range(5))] == want


def test_logits_that_are_not_finite_are_seen_where_a_constraint_bars_them(random_model, make):
    model = random_model()
    with torch.no_grad():
        model.head.weight[5] = math.nan
    one = make(model)
    sequence = one.add(Request([1], constraint=Turns(2)))
    ((_, error),) = one.step()
    assert "wanted finite numbers, got nan at token id 5" in str(error)
    assert not sequence.is_open


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(logit_bias=[1]), "logit_bias: wanted a mapping of ids to numbers, got list"),
        (dict(logit_bias={37: 1.0}), "logit_bias: wanted ids from 0 to 36, got 37"),
        (dict(logit_bias={"1": 1.0}), "logit_bias: wanted ids from 0 to 36, got '1'"),
        (dict(logit_bias={1: 101}), "logit_bias: wanted numbers from -100 to 100, got 101 for id 1"),
        (dict(logit_bias={1: math.nan}), "logit_bias: wanted numbers from -100 to 100, got nan"),
        (dict(logit_bias={1: "x"}), "logit_bias: wanted numbers from -100 to 100, got 'x'"),
        (dict(logprobs=21), "logprobs: wanted a whole number from 0 to 20, or None, got 21"),
        (dict(logprobs=True), "logprobs: wanted a whole number"),
        (dict(constraint=3), "constraint: wanted one with allowed, accept, is_over, got int"),
        (dict(marks=[0]), "marks: wanted whole numbers from 1 on, before the last of 3 ids, got 0"),
        (
            dict(marks=[3], after=Snapshot(None, (1, 2))),
            "marks: wanted whole numbers from 1 on, before the last of 3",
        ),
        (dict(marks=[1.0]), "marks: wanted whole numbers"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(random_model, settings, words):
    one = Engine(random_model(), INTEGERS)
    for use in (one.check, one.add):
        with pytest.raises(ConfigError, match=words):
            use(Request([1, 2, 3], **settings))
    assert one.n_free == 1


# -- marks ------------------------------------------------------------------------------------------------------------


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.to_list(), b.to_list(), strict=True))


@pytest.mark.parametrize("memory", [None, "memory"])
@pytest.mark.parametrize("form", ["v8", "v7b"])
def test_from_every_mark_a_prompt_goes_on_to_the_same_bits(random_model, monkeypatch, form, memory):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    one, prompt, marks = (
        Engine(random_model(variant=form, memory=memory), INTEGERS),
        list(range(17)),
        (3, 4, 11, 16),
    )
    sequence = one.add(Request(prompt, 6, SETTINGS[2], seed=3, marks=marks))
    want = []
    while len(want) < 6:
        want += [token for _, token in one.step()]
    kept = sequence.snapshots
    one.close(sequence)
    assert sorted(kept) == list(marks)
    for mark in marks:
        after = [m - mark for m in marks if m > mark]
        tokens = said(one, Request(prompt[mark:], 6, SETTINGS[2], seed=3, after=kept[mark], marks=after))
        assert tokens == want
    assert said(one, Request(prompt, 6, SETTINGS[2], seed=3, marks=marks)) == want  # the snapshots are as they were


def test_a_mark_counts_the_ids_behind_those_that_are_pending(random_model):
    one = Engine(random_model(), INTEGERS)
    sequence = one.open([1, 2])
    before = one.snapshot(sequence)
    one.close(sequence)
    sequence = one.add(Request([5, 6, 7], after=before, marks=[2]))
    one.step()
    assert same_state(sequence.snapshots[2].state, one.prefill([2, 5, 6], one.prefill([1])))


def test_pieces_end_at_marks(random_model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    read, pieces = PromptReader.read, []
    monkeypatch.setattr(
        PromptReader, "read", lambda self, ids, state: pieces.append(len(ids)) or read(self, ids, state)
    )
    one = Engine(random_model(), INTEGERS)
    said(one, Request(list(range(17)), 1, marks=(3, 9)))
    assert pieces == [3, 4, 2, 4, 3]


# -- embeddings and tuned states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["v7", "v8", "v7b"])
def test_an_embedding_is_the_mean_of_the_last_hidden_states(random_model, monkeypatch, form):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    model, ids = random_model(variant=form), list(range(11))
    with torch.inference_mode():
        mean = model.hidden_states(torch.tensor([ids]))[0][0].double().mean(0)
    got = Engine(model, INTEGERS).embed(ids)
    assert (got.shape, got.dtype) == ((32,), torch.float32)
    assert torch.allclose(got.double(), mean / mean.norm(), atol=1e-6)
    assert torch.equal(got, Engine(model, INTEGERS).embed(" ".join(map(str, ids))))
    if form == "v8":
        assert torch.equal(got, Engine(model, INTEGERS, tables="host").embed(ids))
    with pytest.raises(ConfigError, match="prompt: it is empty"):
        Engine(model, INTEGERS).embed([])
    with torch.no_grad():
        model.ln_out.weight.fill_(math.nan)
    with pytest.raises(HeronError, match="wanted finite numbers"):
        Engine(model, INTEGERS).embed(ids)


@pytest.mark.parametrize("prompt", ["ab", ""])
def test_a_request_begins_from_a_tuned_state(random_model, make, prompt):
    model = random_model(vocab_size=256)
    tuned = TunedState(model.config)
    with torch.no_grad():
        for part in tuned.wkv:
            part.normal_(generator=torch.Generator().manual_seed(1))
        state = tuned(torch.zeros(1, 1, dtype=torch.int64))
    request = Request(prompt, 20, ALL, seed=1)
    want = "".join(Engine(model, LETTERS, start=state).stream(request))
    many = Engine(model, LETTERS, rows=2)
    plain, begun = many.add(request), many.add(Request(prompt, 20, ALL, seed=1, after=Snapshot(state)))
    texts = {plain: "", begun: ""}
    for _ in range(21):
        for one, token in many.step():
            if one.text.finish is None:
                texts[one] += one.text.push(token.id)
    assert texts[begun] == want != texts[plain]
