"""Sequences that join, are cancelled, saved and gone on with by chance, each against the same sequence alone."""

from __future__ import annotations

import gc
import itertools
import queue
import random
import signal
import threading
import weakref

import pytest
import torch

from heron import tokenizer
from heron.config import RosaConfig
from heron.errors import ConfigError, DataError, HeronError
from heron.generation import Engine, Request, Sampling, Snapshot, engine
from heron.generation.drawing import DeviceDraws, HostDraws
from heron.generation.incoming import Incoming
from heron.generation.prefill import PromptReader

INTEGERS = tokenizer.load("integers:37")
GREEDY = Sampling(temperature=0)
PATIENCE_S = 60  # then a test fails that would wait without end
SETTINGS = (GREEDY, Sampling(top_p=0.9), Sampling(top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2))


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)


@pytest.fixture
def pieces(monkeypatch):
    """The prompt pieces that are read from now on, with a mark for every step of the decoder that `stepped` makes."""
    read, found = PromptReader.read, []
    monkeypatch.setattr(
        PromptReader, "read", lambda self, ids, state: found.append(list(ids)) or read(self, ids, state)
    )
    return found


def alone(model, request):
    """Tokens, and the snapshot before each of them, of a request by itself."""
    single = Engine(model, INTEGERS)
    sequence = single.open(request.prompt, request.after, request.sampling, request.seed)
    tokens, snapshots = [], []
    for _ in range(request.max_tokens):
        snapshots.append(single.snapshot(sequence))
        tokens += [token for _, token in single.step()]
    return tokens, snapshots


def same(a, b):
    """Whether two snapshots are the same bit for bit."""
    one, other = ([] if s.state is None else s.state.to_list() for s in (a, b))
    alike = len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    counts = (a.counts is None) == (b.counts is None) and (a.counts is None or torch.equal(a.counts, b.counts))
    return alike and counts and a.pending == b.pending and torch.equal(a.generator, b.generator)


def some_request(chance):
    prompt = [chance.randrange(37) for _ in range(chance.choice((1, 2, 4, 5, 9, 14, 23)))]
    return Request(prompt, chance.randint(1, 9), chance.choice(SETTINGS), seed=chance.randrange(99))


@pytest.mark.parametrize(
    ("draws", "form", "memory", "seed"),
    [
        *(("host", form, None, 0) for form in ("v8", "v7a", "v7b")),
        ("device", "v8", None, 1),
        *(("host", form, "memory", 1) for form in ("v8", "v7a", "v7b")),
        ("host", "v8", RosaConfig.preset("memory", window=6, max_match=4, n_matches=3), 2),
        ("device", "v8", "memory", 2),
    ],
)
def test_a_sequence_says_what_it_says_alone_whatever_joins_and_leaves(
    random_model, monkeypatch, draws, form, memory, seed
):
    model, chance = random_model(variant=form, memory=memory), random.Random(f"{seed} {form}")
    many = Engine(model, INTEGERS, rows=3)
    if draws == "device":
        monkeypatch.setattr(many, "_draws", DeviceDraws(INTEGERS, 3, torch.device("cpu")))
    said, wanted, n_cancelled, n_gone_on = {}, {}, 0, 0
    for _ in range(40):
        while many.n_free and chance.random() < 0.4:
            request = some_request(chance)
            sequence = many.add(request)
            said[sequence], wanted[sequence] = [], alone(model, request)
        for sequence, token in many.step():
            said[sequence].append(token)
            sequence.text.push(token.id)
            if sequence.text.finish:
                many.close(sequence)
        for sequence in [one for one in said if one.is_open]:
            tokens, snapshots = wanted[sequence]
            if draws == "host":
                assert said[sequence] == tokens[: len(said[sequence])]
            if chance.random() < 0.15:
                snapshot = many.snapshot(sequence)
                if sequence.is_read and draws == "host":
                    assert same(snapshot, snapshots[len(said[sequence])])
                many.close(sequence)  # while it is read or written
                n_cancelled += 1
                if chance.random() < 0.5:
                    rest = Request((), len(tokens) - len(said[sequence]), sequence.sampling, seed=5, after=snapshot)
                    again = many.add(rest)
                    said[again], wanted[again] = said[sequence].copy(), wanted[sequence]
                    n_gone_on += 1
    assert n_cancelled > n_gone_on > 2
    ended = [one for one in said if one.text.finish == "length"]
    assert len(ended) > 5
    for sequence in ended:
        assert [token.id for token in said[sequence]] == [token.id for token in wanted[sequence][0]]


def test_between_two_tokens_of_a_sequence_one_piece_of_a_prompt_is_read(random_model, pieces):
    many = Engine(random_model(), INTEGERS, rows=4)
    first = many.add(Request([1], 99, GREEDY))
    assert [one for one, _ in many.step()] == [first]
    assert pieces == []
    ids = list(range(30))
    long, short, other = (many.add(Request(prompt, 9, GREEDY)) for prompt in (ids, ids[:3], ids[:7]))
    begun = {}
    for n in range(1, 12):
        drawn = [one for one, _ in many.step()]
        assert first in drawn
        for one in drawn:
            begun.setdefault(one, n)
        assert len(pieces) == min(n, 8 + 1 + 2)
    assert [one.place for one in drawn] == [0, 1, 2, 3]  # whatever their turns were
    # They take turns: long, short, other, long, other, long, and from then on the long one alone.
    assert begun == {first: 1, short: 2, other: 5, long: 11}
    assert pieces == [
        ids[0:4],
        ids[0:2],
        ids[0:4],
        ids[4:8],
        ids[4:6],
        *(ids[i : min(i + 4, 29)] for i in range(8, 29, 4)),
    ]


def test_run_reads_a_long_prompt_between_the_tokens_of_others(random_model, pieces):
    requests = [Request([1, 2], 20, GREEDY), Request(list(range(30)), 2, GREEDY)]
    order = [piece.request for piece in Engine(random_model(), INTEGERS, rows=2).run(requests)]
    assert order[:9] == [0] * 8 + [0]  # eight pieces of four, and what the first one says meanwhile
    assert order.count(1) == 2
    assert len(pieces) == 1 + 8


def test_a_cancelled_prompt_is_read_no_further_and_its_place_is_free(random_model, pieces):
    many = Engine(random_model(), INTEGERS, rows=1)
    cancelled = many.add(Request(list(range(30)), 9, GREEDY))
    many.step()
    half = many.snapshot(cancelled)
    assert half.pending == tuple(range(4, 30))
    assert (many.n_free, cancelled.is_read) == (0, False)
    many.close(cancelled)
    assert many.n_free == 1
    assert many.step() == []
    assert len(pieces) == 1
    whole = alone(many.model, Request(list(range(30)), 4, GREEDY))[0]
    pieces.clear()
    many.open((), half, GREEDY)
    assert [many.step()[0][1] for _ in range(4)] == whole
    assert len(pieces) == 7  # of eight, one was read before


def test_what_was_said_before_a_cancellation_stays(random_model):
    many, request = Engine(random_model(), INTEGERS, rows=2), Request([1, 2], 9, GREEDY)
    whole = "".join(many.stream(request))
    sequence = many.add(request)
    text = "".join(sequence.text.push(many.step()[0][1].id) for _ in range(4)) + sequence.text.flush()
    many.close(sequence)
    assert whole.startswith(text)
    assert len(text.split()) == 4
    assert sequence.text.finish is None


def test_errors_name_what_is_wrong_with_a_sequence(random_model):
    one, two = Engine(random_model(), INTEGERS), Engine(random_model(), INTEGERS)
    sequence = one.add(Request([1]))
    with pytest.raises(ConfigError, match=r"the engine is full \(rows=1\); close a sequence, or give more rows"):
        one.add(Request([2]))
    for use in (two.close, two.snapshot):
        with pytest.raises(ConfigError, match="another engine's"):
            use(sequence)
        with pytest.raises(ConfigError, match="wanted what open or add gave, got int"):
            use(3)
    one.close(sequence)
    for use in (one.close, two.close, one.snapshot):
        with pytest.raises(ConfigError, match="this sequence is closed"):
            use(sequence)
    with pytest.raises(ConfigError, match="max_tokens: wanted at least 1"):
        one.add(Request([1], 0))
    with pytest.raises(DataError, match="token 0 has id 37"):
        one.add(Request([37]))
    for wrong, name in ((5, "int"), (Request([1]), "Request")):
        with pytest.raises(ConfigError, match=rf"requests: wanted several, as in run\(\[request\]\), got {name}"):
            next(one.run(wrong))
    assert one.n_free == two.n_free == 1
    running = one.run([Request([1], 9)])
    next(running)
    with pytest.raises(ConfigError, match="run is going on"):
        one.add(Request([1]))
    running.close()
    assert list(running) == []


@pytest.mark.parametrize("way", ["open", "add"])
def test_a_prompt_that_cannot_be_read_gives_its_place_back_or_waits(random_model, monkeypatch, way):
    many, want = Engine(random_model(), INTEGERS), alone(random_model(), Request([*range(9)], 3, GREEDY))[0]
    read = PromptReader.read
    for error in (KeyboardInterrupt, HeronError):
        with monkeypatch.context() as patch:
            failing = iter([False, True])
            patch.setattr(
                PromptReader,
                "read",
                lambda self, *a, n=failing, e=error: read(self, *a) if not next(n) else (_ for _ in ()).throw(e()),
            )
            if way == "open":
                with pytest.raises(error):
                    many.open([*range(9)], sampling=GREEDY)
                assert many.n_free == 1
                continue
            sequence = many.add(Request([*range(9)], 3, GREEDY))
            many.step()
            with pytest.raises(error):
                many.step()
        assert [many.step()[0][1] for _ in range(3)] == want  # the piece is read again
        many.close(sequence)


@pytest.mark.parametrize("form", ["v7", "v8", "v7a", "v7b"])
def test_an_interrupted_step_closes_what_it_drew_for_and_nothing_else(random_model, monkeypatch, form):
    """A token that was read, and is not known to be, would be read twice; a prompt that waits is as it was."""
    many, draw = Engine(random_model(variant=form), INTEGERS, rows=3), HostDraws._draw
    requests = [Request([n, *range(n)], 6, SETTINGS[2], seed=n) for n in (1, 3, 17)]
    want = [alone(many.model, request)[0] for request in requests]
    one, two, waits = map(many.add, requests)
    said = [many.step(), many.step(), many.step()]
    assert [token for drawn in said for sequence, token in drawn if sequence is two] == want[1][:2]
    before = many.snapshot(two)
    with monkeypatch.context() as patch:
        answers = iter([draw, None])  # None cannot be called: the first of the two has been drawn by then
        patch.setattr(HostDraws, "_draw", lambda *a: next(answers)(*a))
        with pytest.raises(TypeError):
            many.step()
    assert [one.is_open, two.is_open, waits.is_open, many.n_free] == [False, False, True, 2]
    again = many.open((), before, SETTINGS[2])
    told = [drawn for _ in range(12) for drawn in many.step()]
    assert [token for sequence, token in told if sequence is again][:4] == want[1][2:]
    assert [token for sequence, token in told if sequence is waits][:6] == want[2]


# -- requests that arrive ---------------------------------------------------------------------------------------------


def ended(thread):
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def the_thread():
    return next(thread for thread in threading.enumerate() if thread.name == "heron-incoming")


def test_text_goes_on_while_the_next_request_has_not_come(random_model):
    lines = queue.SimpleQueue()
    lines.put(Request([1], 5, GREEDY))
    many = Engine(random_model(), INTEGERS, rows=2)
    running = many.run(iter(lines.get, None))
    pieces = [next(running) for _ in range(5)]  # nobody has put a second one
    assert pieces[-1].finish == "length"
    lines.put(Request([2], 3, GREEDY))
    pieces += [next(running) for _ in range(3)]
    assert [piece.request for piece in pieces] == [0] * 5 + [1] * 3
    thread = the_thread()
    lines.put(None)
    assert list(running) == []
    assert ended(thread)


def test_an_iterator_is_asked_for_no_more_than_there_are_places(random_model):
    model, asked = random_model(), []

    def requests():
        for n in itertools.count():
            asked.append(n)
            yield Request([n % 37], 3, GREEDY)

    running = Engine(model, INTEGERS).run(requests())
    for n in range(1, 4):
        for _ in range(3):
            next(running)
        assert len(asked) == n
    running.close()
    assert len(asked) == 3


def test_an_iterator_and_a_list_give_the_same_texts(random_model):
    model, chance = random_model(), random.Random(4)
    requests = [some_request(chance) for _ in range(12)] + [Request([1], 0), Request([3], 2, GREEDY)]

    def texts(given):
        found = [""] * len(requests)
        for piece in Engine(model, INTEGERS, rows=3).run(given):
            found[piece.request] += piece.text
        return found

    assert texts(requests) == texts(tuple(requests)) == texts(iter(requests)) == texts(one for one in requests)


def test_requests_may_be_made_of_what_was_said_before(random_model):
    many, waiting = Engine(random_model(), INTEGERS), [[1]]

    def requests():
        while waiting:
            yield Request(waiting.pop(), 2, GREEDY)

    said = []
    for piece in many.run(requests()):
        said.append(piece.token.id)
        if piece.finish and len(said) < 8:
            waiting.append(said[-2:])
    assert len(said) == 8


def test_an_iterator_may_use_the_engine_that_asks_it(random_model):
    model = random_model()
    prompts = [[n, *range(20)] for n in range(6)]
    want = ["".join(Engine(model, INTEGERS).stream(Request(prompt, 5, GREEDY))) for prompt in prompts]
    many, texts = Engine(model, INTEGERS, rows=2), [""] * 6
    for piece in many.run(Request(p[12:], 5, GREEDY, after=Snapshot(many.prefill(p[:12]))) for p in prompts):
        texts[piece.request] += piece.text
    assert texts == want


@pytest.mark.parametrize("error", [OSError("pipe"), KeyboardInterrupt(), DataError("line 2"), SystemExit(3)])
@pytest.mark.parametrize("first", [0, 1])
def test_what_an_iterator_raises_reaches_the_caller(random_model, error, first):
    def requests():
        yield from [Request([1], 50, GREEDY)] * first
        raise error

    many = Engine(random_model(), INTEGERS, rows=2)
    with pytest.raises(type(error)) as raised:
        list(many.run(requests()))
    assert raised.value is error
    assert many.n_free == 2
    assert len(list(many.run([Request([1], 3, GREEDY)]))) == 3


@pytest.mark.parametrize("end", ["close", "drop", "throw", "bad request"])
@pytest.mark.parametrize("is_blocked", [False, True])
def test_a_run_that_is_left_leaves_no_thread_and_no_sequence(random_model, end, is_blocked):
    second, gate = threading.Event(), threading.Event()
    patience = threading.Timer(PATIENCE_S, gate.set)  # so that who waits for it fails, and does not hang
    patience.daemon = True
    patience.start()

    def requests():
        yield Request([1], 50, GREEDY)
        if is_blocked:
            (second if end == "bad request" else gate).wait()
        yield Request([99 if end == "bad request" else 2], 50, GREEDY)
        gate.wait()

    many = Engine(random_model(), INTEGERS, rows=2)
    running = many.run(requests())
    if end != "bad request":
        next(running)
    if end == "close":
        thread = the_thread()
        running.close()
    elif end == "drop":
        thread = the_thread()
        del running
        gc.collect()
    elif end == "throw":
        thread = the_thread()
        with pytest.raises(KeyboardInterrupt):
            running.throw(KeyboardInterrupt())
    else:
        threading.Timer(0.1, second.set).start()
        with pytest.raises(DataError, match="id 99"):
            list(running)
        thread = None
    assert not gate.is_set()  # nobody has waited for it
    patience.cancel()
    assert many.n_free == 2
    gate.set()
    assert thread is None or ended(thread)
    assert len(list(many.run([Request([1], 3, GREEDY)]))) == 3


def test_an_interrupt_ends_the_wait_for_a_request(random_model):
    import _thread

    gate = threading.Event()
    many = Engine(random_model(), INTEGERS)
    running = many.run(iter(gate.wait, None))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    try:
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            next(running)
    finally:
        signal.signal(signal.SIGINT, before)
    assert many.n_free == 1
    thread = the_thread()
    gate.set()
    assert ended(thread)


def test_incoming_lets_go_of_its_items():
    class Items:
        def __iter__(self):
            return iter([1, 2])

    items = Items()
    gone = weakref.ref(items)
    incoming = Incoming(items)
    del items
    assert gone() is None  # the iterator alone is kept
    assert incoming.take(5, wait=True) + incoming.take(5, wait=True) in ([1, 2], [1])
    incoming.close()
    assert incoming.take(1, wait=True) == []


def test_of_two_threads_one_alone_begins_a_run(random_model):
    class Blocked:
        """An iterable that takes its time to begin, as one that opens a file may."""

        def __iter__(self):
            begun.set()
            gate.wait()
            return iter([])

    begun, gate, many = threading.Event(), threading.Event(), Engine(random_model(), INTEGERS)
    other = threading.Thread(target=lambda: list(many.run(Blocked())), daemon=True)
    other.start()
    begun.wait()
    for use in (lambda: many.add(Request([1])), lambda: many.open([1]), many.step, lambda: next(many.run([]))):
        with pytest.raises(ConfigError, match="run is going on"):
            use()
    gate.set()
    other.join()
    assert len(many.open([1]).unread) == 1


def test_two_threads_may_use_one_engine(random_model):
    model = random_model()
    many, ids = Engine(model, INTEGERS, rows=2), [*range(23)]
    want_state, want = many.prefill(ids), alone(model, Request([1], 40, GREEDY))[0]
    states = []
    reader = threading.Thread(target=lambda: states.extend(many.prefill(ids) for _ in range(10)))
    many.open([1], sampling=GREEDY)
    reader.start()
    assert [many.step()[0][1] for _ in range(40)] == want
    reader.join()
    assert all(
        same(Snapshot(s, (), None, torch.zeros(1)), Snapshot(want_state, (), None, torch.zeros(1))) for s in states
    )
