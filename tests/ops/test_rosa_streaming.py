"""RosaStream: however the history came about, it goes on exactly as the whole sequences would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from heron.errors import KernelError
from heron.ops import _build, _select
from heron.ops.rosa import RosaStream, rosa, rosa_last

PREFILLS = ["steps", pytest.param("cpu", marks=pytest.mark.skipif(_build.find_compiler() is None, reason="no C++"))]


@pytest.fixture(params=PREFILLS)
def prefill_by(request, monkeypatch):
    """Prefill as without a compiler, and as with one."""
    if request.param == "steps":
        monkeypatch.setattr(_select, "rosa", lambda device: _select.Choice("dp", "no C++ in this test"))


def streams(n_streams=12, n_tokens=40, alphabet=2):
    """q and k: random, equal, constant, periodic and nearly constant ones."""
    generator = torch.Generator().manual_seed(n_tokens + alphabet)
    q, k = torch.randint(alphabet, (2, n_streams, n_tokens), generator=generator)
    k[1::6] = q[1::6]
    q[2::6] = k[2::6] = alphabet - 1
    q[3::6] = k[3::6] = torch.arange(n_tokens) % 3 % alphabet
    q[4::6], k[4::6] = 0, (torch.rand(k[4::6].shape, generator=generator) < 0.1).long()
    return q, k


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, y)


def part(whole, begin, end):
    return [x[:, begin:end] for x in whole]


@pytest.mark.parametrize("max_match", [None, 1, 3])
@pytest.mark.parametrize("alphabet", [2, 16, 256, 70000])
def test_steps_equal_the_whole(alphabet, max_match):
    q, k = streams(alphabet=alphabet)
    whole = rosa(q, k, max_match, "reference")
    stream = RosaStream(len(q), alphabet, q.shape[1], max_match)
    steps = [stream.step(q[:, i], k[:, i]) for i in range(q.shape[1])]
    assert_same([torch.stack(x, dim=1) for x in zip(*steps, strict=True)], whole)


@pytest.mark.parametrize("max_match", [None, 1, 3])
@pytest.mark.parametrize("alphabet", [2, 16])
def test_the_last_token_alone_with_and_without_the_lengths_before(alphabet, max_match):
    q, k = streams(alphabet=alphabet)
    src, _ = rosa(q, k, max_match, "reference")
    lengths = None
    for n in range(1, q.shape[1] + 1):
        before = lengths
        last, lengths = rosa_last(q[:, :n], k[:, :n], before, max_match)
        alone, found = rosa_last(q[:, :n], k[:, :n], None, max_match)
        assert torch.equal(last, src[:, n - 1])
        assert torch.equal(alone, last)
        assert torch.equal(found, lengths)
        assert lengths.dtype == torch.int16
    for bad in (lengths, lengths[1:, 1:]):
        with pytest.raises(KernelError, match=r"at least 1 token and lengths of one less, got \(12, 40\) and \(1"):
            rosa_last(q, k, bad)
    with pytest.raises(KernelError, match=r"got \(12, 0\) and None"):
        rosa_last(q[:, :0], k[:, :0])


@pytest.mark.parametrize("max_match", [None, 2])
def test_prefill_at_every_split_goes_on_as_the_whole(prefill_by, max_match):
    q, k = streams(n_tokens=16)
    whole = rosa(q, k, max_match, "reference")
    for split in range(17):
        stream = RosaStream(len(q), 2, 20, max_match)
        assert_same(stream.prefill(q[:, :split], k[:, :split]), part(whole, 0, split))
        if split < 15:
            src, length = stream.step(q[:, split], k[:, split])
            assert_same((src, length), (whole[0][:, split], whole[1][:, split]))
            split += 1
        assert_same(stream.prefill(q[:, split:], k[:, split:]), part(whole, split, 16))
        assert stream.n_tokens == 16


@pytest.mark.parametrize("max_match", [None, 2])
def test_truncated_anywhere_it_goes_on_as_if_the_rest_had_never_been(prefill_by, max_match):
    q, k = streams(n_tokens=14)
    other_q, other_k = 1 - q, k.roll(3, dims=1)
    for kept in range(15):
        stream = RosaStream(len(q), 2, 14, max_match)
        stream.prefill(q, k)
        stream.truncate(kept)
        assert stream.n_tokens == kept
        q_then, k_then = (torch.cat([x[:, :kept], y[:, kept:]], dim=1) for x, y in ((q, other_q), (k, other_k)))
        expected = rosa(q_then, k_then, max_match, "reference")
        for i in range(kept, 14):
            assert_same(stream.step(other_q[:, i], other_k[:, i]), [x[:, i] for x in expected])


def test_forks_go_their_own_ways():
    q, k = streams(n_tokens=24)
    stream = RosaStream(len(q), 2, 24)
    stream.prefill(q[:, :12], k[:, :12])
    twin = stream.fork()
    assert twin.nbytes == stream.nbytes
    other = torch.cat([k[:, :12], 1 - k[:, 12:]], dim=1)
    whole, otherwise = rosa(q, k, impl="reference"), rosa(q, other, impl="reference")
    for i in range(12, 24):
        assert_same(stream.step(q[:, i], k[:, i]), [x[:, i] for x in whole])
        assert_same(twin.step(q[:, i], other[:, i]), [x[:, i] for x in otherwise])


class AnyOrder(RuleBasedStateMachine):
    """Steps, prefills, forks and truncations in any order, beside the plain histories."""

    @initialize(alphabet=st.integers(1, 3), max_match=st.sampled_from([None, 1, 2]))
    def begin(self, alphabet, max_match):
        self.alphabet, self.max_match = alphabet, max_match
        empty = torch.zeros(2, 0, dtype=torch.int64)
        self.beams = [(RosaStream(2, alphabet, 30, max_match), empty, empty)]

    @rule(data=st.data())
    def grow(self, data):
        at = data.draw(st.integers(0, len(self.beams) - 1))
        stream, q, k = self.beams[at]
        n = data.draw(st.integers(0, min(6, 30 - stream.n_tokens)))
        symbols = st.lists(st.integers(0, self.alphabet - 1), min_size=2 * n, max_size=2 * n)
        more_q, more_k = (torch.tensor(data.draw(symbols), dtype=torch.int64).view(2, n) for _ in range(2))
        q, k = torch.cat([q, more_q], dim=1), torch.cat([k, more_k], dim=1)
        expected = part(rosa(q, k, self.max_match, "reference"), stream.n_tokens, None)
        if n == 1:
            assert_same([x[:, None] for x in stream.step(more_q[:, 0], more_k[:, 0])], expected)
        else:
            assert_same(stream.prefill(more_q, more_k), expected)
        self.beams[at] = (stream, q, k)

    @rule(data=st.data())
    def fork(self, data):
        if len(self.beams) < 3:
            stream, q, k = data.draw(st.sampled_from(self.beams))
            self.beams.append((stream.fork(), q, k))

    @rule(data=st.data())
    def truncate(self, data):
        at = data.draw(st.integers(0, len(self.beams) - 1))
        stream, q, k = self.beams[at]
        kept = data.draw(st.integers(0, stream.n_tokens))
        stream.truncate(kept)
        self.beams[at] = (stream, q[:, :kept], k[:, :kept])


def test_any_order_of_operations():
    run_state_machine_as_test(
        AnyOrder, settings=settings(max_examples=20, stateful_step_count=12, deadline=None, derandomize=True)
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(word=st.lists(st.integers(0, 2), min_size=1, max_size=6), times=st.integers(1, 12), cut=st.integers(0, 5))
def test_repeats_of_a_word(word, times, cut):
    x = torch.tensor([word * times + word[:cut]])
    stream = RosaStream(1, 3, x.shape[1])
    assert_same(stream.prefill(x, x), rosa(x, x, impl="dp"))


def test_thue_morse():
    x = torch.tensor([[bin(i).count("1") % 2 for i in range(256)]])
    stream = RosaStream(1, 2, 256)
    steps = [stream.step(x[:, i], x[:, i]) for i in range(256)]
    whole = rosa(x, x, impl="dp")
    assert_same([torch.stack(found, dim=1) for found in zip(*steps, strict=True)], whole)
    assert_same(rosa(x, x), whole)


@pytest.mark.parametrize(
    ("alphabet", "capacity", "bytes_per_symbol"), [(2, 100, 4), (257, 100, 10), (2, 2**15, 4), (2, 2**15 + 1, 6)]
)
def test_bytes_are_as_documented_and_do_not_grow(alphabet, capacity, bytes_per_symbol):
    stream = RosaStream(3, alphabet, capacity)
    assert stream.nbytes == 3 * capacity * bytes_per_symbol
    stream.prefill(torch.ones(3, 50, dtype=torch.uint8), torch.zeros(3, 50, dtype=torch.uint8))
    assert stream.nbytes == 3 * capacity * bytes_per_symbol


def test_an_exhausted_capacity_is_one_clear_error_and_changes_nothing():
    q, k = streams(n_tokens=10)
    stream = RosaStream(len(q), 2, 8)
    stream.prefill(q[:, :6], k[:, :6])
    with pytest.raises(KernelError, match="holds 6 of at most 8 symbols a stream, no room for 4 more"):
        stream.prefill(q[:, 6:], k[:, 6:])
    whole = rosa(q, k, impl="reference")
    assert_same(stream.prefill(q[:, 6:8], k[:, 6:8]), part(whole, 6, 8))
    with pytest.raises(KernelError, match="holds 8 of at most 8 symbols a stream, no room for 1 more"):
        stream.step(q[:, 8], k[:, 8])


ONES = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (ONES * 2, ONES, r"symbols of q must be in \[0, 2\), got 2 at position \[0, 0\]"),
        (ONES, ONES - 2, r"symbols of k must be in \[0, 2\), got -1 at position \[0, 0\]"),
        (ONES[:2], ONES[:2], "the history has 3 streams on cpu; got 2 on cpu"),
        (ONES, ONES[:2], "q and k must match"),
        (ONES, ONES.double(), "k must hold symbols of a signed integer dtype, uint8 or bool, got torch.float64"),
        (ONES[:, None], ONES[:, None], r"q must be \(S, T\), got \(3, 1, 1\)"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(q, k, message):
    stream = RosaStream(3, 2, 4)
    stream.step(ONES, ONES)
    with pytest.raises(KernelError, match=f"^rosa: .*{message}"):
        stream.step(q, k)
    assert stream.n_tokens == 1
    assert_same(stream.step(ONES, ONES), (ONES * 0, ONES))


def test_sizes_are_checked():
    for sizes in ((0, 2, 4), (3, 0, 4), (3, 2, 0), (3, 2, 4.0), (3, 2**31 + 1, 4)):
        with pytest.raises(KernelError, match=r"must be an int in \[1, 2147483648\], got"):
            RosaStream(*sizes)
    with pytest.raises(KernelError, match="max_match must be None or an int of at least 1, got 0"):
        RosaStream(3, 2, 4, max_match=0)
    with pytest.raises(KernelError, match="truncate takes 0 to 0 tokens, which the history holds; got 1"):
        RosaStream(3, 2, 4).truncate(1)
