"""Sampling against hand-computed cases, and streams against models whose every answer is known."""

from __future__ import annotations

import math
import types
from collections import Counter

import pytest
import tokenizers
import torch
from torch import nn

import heron
from heron import tokenizer
from heron.errors import ConfigError, DataError, HeronError
from heron.generation import Engine, Request, Sampling, Snapshot, engine, generate, sample, stream
from heron.generation.drawing import DeviceDraws
from heron.generation.sampling import increments
from heron.tokenizer.continuation import encode_pair
from heron.tokenizer.json_file import byte_alphabet
from tests.tokenizer.tokenizer_kinds import load

GREEDY = Sampling(temperature=0)


class Pieces:
    """A tokenizer with the given texts (or bytes) as tokens 0, 1, ...; None is an id that stands for nothing."""

    spec, is_text, byte_level = "pieces", True, True

    def __init__(self, *pieces, eod=None):
        self._pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        self.vocab_size, self.eod = len(pieces), eod

    def encode(self, text):
        return [self._pieces.index(character.encode()) for character in text]

    def decode_bytes(self, ids):
        for token in ids:
            if self._pieces[token] is None:
                raise DataError(f"id {token} stands for nothing")
        return b"".join(self._pieces[token] for token in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode()


class Fake(nn.Module):
    """A model that answers step n (from 0) with the row `logits(n)`; it keeps what it was asked and in which mode."""

    def __init__(self, vocab_size, logits):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=vocab_size)
        self.weight = nn.Parameter(torch.zeros(1))
        self.inner = nn.Dropout()
        self.logits, self.prefilled, self.asked, self.modes = logits, [], [], set()

    def forward(self, tokens, state=None):
        self.modes.add((self.training, self.inner.training, torch.is_inference_mode_enabled()))
        self.asked.append(tokens.tolist())
        return self.logits(len(self.asked) - 1).reshape(1, 1, -1), state

    def hidden_states(self, tokens, state=None):
        self.modes.add((self.training, self.inner.training, torch.is_inference_mode_enabled()))
        self.prefilled.append(tokens.tolist())
        return self.weight.expand(1, tokens.shape[1], 1), state


def saying(ids, vocab_size):
    """A model that says `ids` one after another, and the last of them for ever."""
    return Fake(vocab_size, lambda n: 9.0 * nn.functional.one_hot(torch.tensor(ids[min(n, len(ids) - 1)]), vocab_size))


class Recurrent(nn.Module):
    """h <- tanh(A h + emb[token]), logits = B h. Runs token by token, so cutting its input changes no bit."""

    def __init__(self, vocab_size=11, width=8):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=vocab_size)
        self.emb = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size)
        self.lengths = []

    def hidden_states(self, tokens, state=None):
        self.lengths.append(tokens.shape[1])
        h = torch.zeros(1, self.mix.in_features) if state is None else state
        hidden = []
        for token in tokens[0]:
            h = torch.tanh(3 * self.mix(h) + self.emb(token))
            hidden.append(h)
        return torch.stack(hidden, dim=1), h

    def forward(self, tokens, state=None):
        hidden, state = self.hidden_states(tokens, state)
        return 4 * self.head(hidden), state


def tiny_rwkv(dtype=torch.float64):
    """Two layers of RWKV-8, moved off the reference initial values: with those the past hardly changes an answer."""
    torch.manual_seed(3)
    model = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=2, n_embd=32, vocab_size=256, head_size=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


PROBS = (0.1, 0.4, 0.2, 0.3)


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(top_p=1), PROBS),
        (Sampling(top_p=0.35), (0, 1, 0, 0)),
        (Sampling(top_p=0.5), (0, 4, 0, 3)),
        (Sampling(top_p=0.75), (0, 4, 2, 3)),
        (Sampling(top_p=0.9999), PROBS),
        (Sampling(top_p=1, top_k=3), (0, 4, 2, 3)),
        (Sampling(top_p=1, top_k=9), PROBS),
        (Sampling(top_p=0.5, top_k=3), (0, 4, 0, 3)),
        (Sampling(top_p=0.75, top_k=2), (0, 4, 0, 3)),
        (Sampling(top_p=1, temperature=0.5), (1, 16, 4, 9)),
        # 0.65 is reached by two tokens as they are, by three after the temperature: the cut comes first.
        (Sampling(top_p=0.65, temperature=2), (0, math.sqrt(4), 0, math.sqrt(3))),
        (Sampling(top_p=1, temperature=1e-300), (0, 1, 0, 0)),
        (Sampling(top_p=1, temperature=1e300), (1, 1, 1, 1)),
    ],
)
def test_sample_draws_from_the_distribution_that_the_settings_describe(sampling, weights):
    logits, n = torch.tensor(PROBS).log() + 5, 1000
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(sample(logits, sampling, None, generator) for _ in range(n))
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(drawn[token] / n - p) <= 4 * math.sqrt(p * (1 - p) / n), (token, p, drawn)


def test_equal_probabilities_are_kept_from_the_lowest_id_on():
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(torch.zeros(10), Sampling(top_p=0.35), None, generator) for _ in range(200)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("n_tokens", [2, 7, 10, 22, 37, 1000])
def test_the_least_top_p_keeps_the_first_of_equal_tokens(n_tokens):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        flat = torch.zeros(n_tokens, dtype=dtype)
        assert {sample(flat, Sampling(top_p=1e-9), None, generator) for _ in range(5)} == {0}


@pytest.mark.filterwarnings("error")
def test_numbers_at_the_end_of_their_range_are_quiet():
    generator = torch.Generator().manual_seed(0)
    assert sample(torch.tensor([1.0, 3.0, 2.0]), Sampling(top_p=1, temperature=1e-308), None, generator) == 1
    assert sample(torch.tensor([-3e38, 3e38, 0.0]), Sampling(top_p=0.9), None, generator) == 1


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6])
def test_top_p_of_a_large_vocabulary_keeps_the_fewest_tokens_that_reach_it(top_p):
    torch.manual_seed(0)
    logits = 4 * torch.randn(3000)
    wanted, total = set(), 0.0
    for p, token in sorted(zip(torch.softmax(logits.double(), 0).tolist(), range(3000), strict=True), reverse=True):
        if total >= top_p:
            break
        wanted.add(token)
        total += p
    generator = torch.Generator().manual_seed(0)
    flat = Sampling(top_p=top_p, temperature=1e9)  # every kept token is as likely
    assert {sample(logits, flat, None, generator) for _ in range(20 * len(wanted))} == wanted


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_p=0), Sampling(top_k=1)])
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_greedy_is_the_exact_argmax_and_draws_nothing(sampling, dtype, step):
    logits = torch.ones(300, dtype=dtype)
    logits[271] += step
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(logits, sampling, None, generator) == 271
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # counts of token 0: 1, 1.5, 1.75 -> 2 - 0.525 < 1.5; then 0.875, 1.4375, 1.71875, 1.859375 -> 1.4422 < 1.4625
        (dict(frequency_penalty=0.3, penalty_decay=0.5), [0, 0, 0, 1, 0, 0, 0, 1]),
        (dict(frequency_penalty=0.3, penalty_decay=1), [0, 0, 1, 0, 1, 0, 2, 1]),
        (dict(presence_penalty=0.6), [0, 1, 0, 0, 0, 0, 0, 0]),
        (dict(presence_penalty=1.2, frequency_penalty=0.1, penalty_decay=1), [0, 1, 2, 0, 0, 0, 0, 0]),
        (dict(), [0] * 8),
    ],
)
def test_penalties_by_hand(settings, wanted):
    model = Fake(3, lambda n: torch.tensor([2.0, 1.5, 1.0]))
    text = "".join(stream(model, Pieces("a", "b", "c"), "aab", 8, Sampling(temperature=0, **settings)))
    assert ["abc".index(letter) for letter in text] == wanted


def test_logits_that_are_not_finite_are_refused_and_barred_tokens_are_not_drawn():
    generator = torch.Generator().manual_seed(0)
    for bad in (math.nan, math.inf):
        with pytest.raises(HeronError, match="token id 2"):
            sample(torch.tensor([0.0, 1.0, bad]), Sampling(), None, generator)
    with pytest.raises(HeronError):
        sample(torch.full((3,), -math.inf), GREEDY, None, generator)
    barred = torch.tensor([-math.inf, 0.0, -math.inf])
    assert {sample(barred, Sampling(top_p=1, temperature=9), None, generator) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("presence_penalty", -math.inf),
        ("frequency_penalty", math.nan),
        ("penalty_decay", 1.5),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ConfigError, match=f"^{setting}: wanted .* got"):
        Sampling(**{setting: value})


@pytest.mark.parametrize(
    ("pieces", "stop", "wanted"),
    [
        (["a", "b", "\n", "\nUs", "er:", " x"], ["\n\nUser:"], "ab"),  # over four tokens
        (["ab END cd"], ["END"], "ab "),  # within one
        (["E", "N", "ENDx"], ["END"], "EN"),  # a false start
        (["E", "N", "x"], ["END"], "ENx"),
        (["E", "N"], ["END"], "EN"),  # it ends before the stop text is whole
        (["aa", "ab"], ["aab"], "a"),  # overlaps itself
        (["abcd"], ["abcd", "bc"], "a"),  # the one that is complete first, however the text is cut
        (["ab", "cd"], ["abcd", "bc"], "a"),
        (["xa", "bc"], ["c", "abc"], "x"),  # both complete at once: the longer
        (["ab", "xb", "c"], "bc", "abx"),  # a lone text
        (["a", "b"], [], "ab"),
    ],
)
def test_no_part_of_a_stop_text_is_given_out(pieces, stop, wanted):
    tokens = Pieces(*pieces)
    model = saying(range(len(pieces)), len(pieces))
    given = list(stream(model, tokens, [0], len(pieces), GREEDY, stop))
    assert "".join(given) == wanted
    assert all(given)


def test_text_is_given_out_as_soon_as_no_stop_text_can_take_it_back():
    pieces = ["one ", "two E", "N ", "three"]
    assert list(stream(saying(range(4), 4), Pieces(*pieces), [0], 4, GREEDY, ["END"])) == [
        "one ",
        "two ",
        "EN ",
        "three",
    ]


def test_a_character_split_over_tokens_is_given_out_whole():
    text = "é日🙂!"
    data = text.encode()
    model = saying([*data], 256)
    assert list(stream(model, tokenizer.load("bytes"), "x", len(data), GREEDY)) == list(text)
    cut = generate(saying([*data], 256), tokenizer.load("bytes"), "x", len(data) - 3, temperature=0)
    assert cut == "é日\N{REPLACEMENT CHARACTER}"


def test_it_ends_at_the_end_of_document():
    pieces = Pieces("", "a", "b", eod=0)
    model = saying([1, 2, 0, 1], 3)
    assert generate(model, pieces, [1], 50, temperature=0) == "ab"
    assert len(model.asked) == 3


def test_nothing_is_computed_after_a_stop_text():
    model = saying([0, 1, 0, 1], 2)
    assert generate(model, Pieces("a", "b"), "a", 50, temperature=0, stop="b") == "a"
    assert len(model.asked) == 2


def test_an_empty_prompt_starts_from_the_end_of_document():
    model = saying([1], 3)
    assert generate(model, Pieces("", "a", "b", eod=0), "", 2) == "aa"
    assert model.asked == [[[0]], [[1]]]
    with pytest.raises(ConfigError, match="prompt.*end-of-document"):
        stream(saying([1], 3), Pieces("", "a", "b"), "")


def test_each_token_costs_one_step_and_the_prompt_no_logits(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 3)
    model = saying([1], 2)
    assert generate(model, Pieces("a", "b"), "abababab", 2) == "bb"
    assert model.prefilled == [[[0, 1, 0]], [[1, 0, 1]], [[0]]]
    assert model.asked == [[[1]], [[1]]]
    idle = saying([1], 2)
    assert generate(idle, Pieces("a", "b"), "abab", 0) == ""
    assert not idle.asked
    assert not idle.prefilled


@pytest.mark.parametrize("length", [1, 4, 5, 8, 13])
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(monkeypatch, length):
    torch.manual_seed(0)
    model, letters = Recurrent(), Pieces(*"abcdefghijk")
    prompt = "bagkfihcjedabcdefg"[:length]
    whole = generate(model, letters, prompt, 30, top_p=1.0)
    model.lengths.clear()
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 4)
    assert generate(model, letters, prompt, 30, top_p=1.0) == whole
    assert len(set(whole)) > 3
    assert max(model.lengths) <= 4
    assert sum(model.lengths) == length + 29


def test_rwkv_says_what_the_whole_sequence_at_once_predicts(monkeypatch):
    model, ids, said = tiny_rwkv(), list(b"The heron stands"), []
    for _ in range(12):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said]))[0][0, -1].argmax()))
    integers = tokenizer.load("integers:256")
    for pieces in (1, 5, 1024):
        monkeypatch.setattr(engine, "PREFILL_TOKENS", pieces)
        text = generate(model, integers, ids, 12, temperature=0)
        assert integers.encode(text) == said
    assert len(set(said)) > 3


def test_a_stream_goes_on_from_a_state():
    model, letters = tiny_rwkv(), tokenizer.load("bytes")
    with torch.no_grad():
        _, state = model(torch.tensor([list(b"one two ")]))
    kept = state.clone()
    settings = dict(max_tokens=16, sampling=Sampling(top_p=0.9), seed=5)
    expected = list(stream(model, letters, "one two three", **settings))
    assert list(stream(model, letters, "three", state=state, **settings)) == expected
    assert list(stream(model, letters, "three", **settings)) != expected
    assert all(torch.equal(a, b) for a, b in zip(state.to_list(), kept.to_list(), strict=True))


def test_the_seed_decides():
    torch.manual_seed(0)
    model, letters = Recurrent(), Pieces(*"abcdefghijk")
    global_rng = torch.get_rng_state()
    texts = [generate(model, letters, "abc", 40, top_p=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), global_rng)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_the_callers_own_between_two_pieces(training):
    model = saying([1], 2).train(training)
    pieces = stream(model, Pieces("a", "b"), "aa", 3)
    for _ in pieces:
        assert (model.training, model.inner.training) == (training, training)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert model.modes == {(False, False, True)}


def test_modes_come_back_after_an_error_and_a_part_in_evaluation_mode_stays_there():
    model = Fake(2, [torch.tensor([0.0, 1.0])].__getitem__).train()
    model.inner.eval()
    with pytest.raises(IndexError):
        generate(model, Pieces("a", "b"), "a")
    assert model.training
    assert not model.inner.training


def test_training_goes_on_after_generating():
    model = tiny_rwkv(torch.float32)
    generate(model, tokenizer.load("bytes"), "heron", 3)
    model(torch.tensor([[1, 2, 3]]))[0].square().mean().backward()
    assert model.emb.weight.grad.abs().sum() > 0


def test_ids_that_stand_for_nothing_are_never_drawn():
    holes = Pieces("a", None, "b", None)
    model = Fake(6, lambda n: torch.tensor([1.0, 8.0, 2.0, 7.0, 9.0, 9.0]))  # ids 4 and 5 only pad the model
    assert generate(model, holes, "a", 4, temperature=0) == "bbbb"
    assert set(generate(model, holes, "a", 60, top_p=1.0)) == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(max_tokens=-1), ConfigError, "max_tokens.*-1"),
        (dict(stop=["x", ""]), ConfigError, "stop.*empty"),
        (dict(tokenizer=Pieces(*"abcd")), ConfigError, "tokenizer has 4 .* model only 3"),
        (dict(prompt=[0, 1, 3]), DataError, "token 2 has id 3.*0 to 2"),
        (dict(prompt=[-1]), DataError, "token 0 has id -1"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_call(changes, error, words):
    arguments = {"tokenizer": Pieces(*"abc"), "prompt": "a", **changes}
    with pytest.raises(error, match=words):
        stream(saying([1], 3), **arguments)


# -- texts that go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "metaspace", "word piece", "byte level, space in front", "integers:1000"])
def test_what_follows_a_prompt_has_its_space(kind):
    tokens = load(kind)
    before, new = ("4 325 159", " 948 94 7") if "integers" in kind else ("the grey", " heron the")
    ids, read = tokens.encode(before + new), tokens.encode(before)
    model = saying(ids[len(read) :], tokens.vocab_size)
    n = len(ids) - len(read)
    assert generate(model, tokens, before, n, temperature=0) == new
    model.asked.clear()
    assert generate(model, tokens, read, n, temperature=0) == new  # ids say no less
    model.asked.clear()
    after = Snapshot(None, tuple(read))
    assert "".join(Engine(model, tokens).stream(Request((), n, GREEDY, after=after))) == new


def test_a_text_alone_has_no_space_in_front():
    numbers = tokenizer.load("integers:10:0")
    assert generate(saying([4, 5], 10), numbers, "", 2, temperature=0) == "4 5"
    llama = load("llama")
    ids = llama.encode("the heron")
    assert generate(saying(ids, llama.vocab_size), llama, "", len(ids), temperature=0) == "the heron"


def test_a_prompt_behind_a_snapshot_is_read_as_what_goes_on_there():
    for kind, before, text in (
        ("llama", "the heron", " waits"),
        ("metaspace", "a", "w"),
        ("byte level", "it is\n\n", "User: a"),
        ("world", "the", " river"),
    ):
        tokens = load(kind)
        read, goes_on = tokens.encode(before), encode_pair(tokens, before, text)[1]
        reader = Engine(saying([0], tokens.vocab_size), tokens)
        for pending in (read, read[-1:]):
            assert reader.prompt_ids(text, Snapshot(None, tuple(pending))) == [*pending, *goes_on]
        inside = reader.prompt_ids(text, Snapshot(torch.zeros(1)))  # a state, and nobody knows of what
        assert tokens.decode([*read, *inside]) == before + text
        assert reader.prompt_ids(text, Snapshot(None)) == tokens.encode(text)


def test_stop_texts_of_integers_are_whole_numbers():
    numbers = tokenizer.load("integers:1000")

    def said(*ids, stop):
        pieces = list(stream(saying([*ids], 1000), numbers, "7", len(ids), GREEDY, stop))
        assert all(pieces)
        return "".join(pieces)

    assert said(94, 40, 444, stop="4") == " 94 40 444"
    assert said(94, 4, 5, stop="4") == " 94"
    assert said(94, 4, 5, 6, stop=["4 6", " 5  6 "]) == " 94 4"
    assert said(4, 4, 5, 6, stop="4 5") == " 4"
    assert said(9, 4, stop="4 5") == " 9 4"  # it may have become one
    assert said(3, 1, 2, stop=["2", "1 2"]) == " 3"  # both complete at once: the longer
    for bad, words in (("x", "stop: .*integers"), ("", "at least one word"), ("1000", "0 to 999")):
        with pytest.raises(ConfigError, match=words):
            said(1, stop=bad)


def test_ids_end_a_text():
    letters = tokenizer.load("bytes")

    def pieces(stop_ids, stop=()):
        request = Request("x", 9, GREEDY, stop, stop_ids=stop_ids)
        return list(Engine(saying([*b"abcde"], 256), letters).run([request]))

    found = pieces([99, 7])
    assert "".join(piece.text for piece in found) == "ab"
    assert (found[-1].finish, found[-1].token.id) == ("stop", 99)
    assert "".join(piece.text for piece in pieces([99], stop="bx")) == "ab"  # what a stop text held back is given
    assert "".join(piece.text for piece in pieces([99], stop="b")) == "a"
    assert generate(saying([*b"abc"], 256), letters, "x", 9, temperature=0, stop_ids=(98,)) == "a"
    for bad in ("b", [256], [-1], [True], [1.5], 5):
        with pytest.raises(ConfigError, match="stop_ids"):
            pieces(bad)


# -- penalties, beside the package that they are from -----------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Path of a tokenizer.json whose ids stand for digits, several digits, spaces, letters, both."""
    pieces = ["0", "7", "45", "10", " ", "\t", " 7", "a", "01", "\n"]
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    vocab = {"".join(alphabet[byte] for byte in piece.encode()): index for index, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    path = tmp_path_factory.mktemp("digits") / "tokenizer.json"
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize("draws", ["host", "device"])
@pytest.mark.parametrize(
    ("presence", "frequency", "decay"),
    [(0.3, 0.3, 0.996), (0.0, 0.4, 0.9), (0.7, 0.0, 0.996), (0.3, 0.2, 0.0), (0, 1, 1)],
)
def test_penalties_are_those_of_the_rwkv_package(digits, monkeypatch, draws, presence, frequency, decay):
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    class Theirs:
        """What their pipeline asks of a model."""

        def forward(self, tokens, state):
            return logits.clone(), state

    tokens = tokenizer.load(digits)
    torch.manual_seed(1)
    for _ in range(6):
        logits = 0.6 * torch.randn(10)
        ids = []
        pipeline = PIPELINE(Theirs(), digits)
        args = PIPELINE_ARGS(temperature=0, alpha_presence=presence, alpha_frequency=frequency, alpha_decay=decay)
        sample_logits = pipeline.sample_logits
        pipeline.sample_logits = lambda *a, of=sample_logits, to=ids, **b: to.append(of(*a, **b)) or to[-1]
        pipeline.generate("a", 40, args)
        mine = Engine(Fake(10, lambda n, row=logits: row), tokens)
        if draws == "device":
            monkeypatch.setattr(mine, "_draws", DeviceDraws(tokens, 1, torch.device("cpu")))
        sampling = Sampling(0, 0.5, 0, float(presence), float(frequency), float(decay))
        assert [piece.token.id for piece in mine.run([Request("a", 40, sampling)])] == ids


def test_count_digits_counts_every_token(digits):
    tokens, row = tokenizer.load(digits), torch.tensor([5, 4.5, *[0.0] * 8])
    settings = dict(temperature=0, frequency_penalty=0.3, penalty_decay=1.0)

    def ids(**more):
        request = Request("a", 6, Sampling(**settings, **more))
        return [piece.token.id for piece in Engine(Fake(10, lambda n: row), tokens).run([request])]

    assert ids() == [0] * 6
    assert ids(count_digits=True) == [0, 0, 1, 0, 1, 0]
    assert generate(Fake(10, lambda n: row), tokens, "a", 6, **settings, count_digits=True) == "007070"
    with pytest.raises(ConfigError, match="count_digits"):
        Sampling(count_digits=1)


def test_which_tokens_are_not_counted(digits):
    assert (increments(tokenizer.load(digits))[0] < 1).tolist() == [
        True,
        True,
        True,
        False,
        True,
        True,
        *[False] * 2,
        True,
        False,
    ]
    world = tokenizer.load("world")
    uncounted = (increments(world)[0] < 1).nonzero().flatten().tolist()
    texts = [world.decode([token]) for token in uncounted if token < 65530]
    assert sorted(texts) == sorted(["", *"\t 0123456789", " \t", *(f"{n}{n + 1}" for n in range(9))])
    assert (increments(load("integers:100")) == 1).all()  # where a digit is a symbol as any other
    assert (increments(world)[1] == 1).all()
