"""ROSA over token streams gives the matches of the definition in every form and in pieces; so does an index."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heron.errors import KernelError
from heron.ops import _build, _choice
from heron.ops.rosa import memory, rosa
from heron.ops.rosa.levels import found_in
from heron.ops.rosa.memory import TokenIndex, TokenStream

needs_cpp = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
FORMS = ["torch", pytest.param("cpu", marks=needs_cpp)]


def shared(x, i, y, j, max_match, end):
    """Tokens that x[..i] and y[..j] end with, within one document."""
    n = 0
    while n < min(max_match, i + 1, j + 1) and x[i - n] == y[j - n] and not (n > 0 and x[i - n] == end):
        n += 1
    return n


def best_of(matches, followers, n_found):
    """Of (length, end), the latest of each length, the longest first, with different followers."""
    found, seen = [], set()
    for length in sorted({length for length, _ in matches}, reverse=True):
        end = max(end for n, end in matches if n >= length)
        if followers[end + 1] not in seen:
            seen.add(followers[end + 1])
            found.append((end, max(n for n, at in matches if at == end)))
    return (found + [(-1, 0)] * n_found)[:n_found]


def oracle(x, max_match, window=None, end=None, n_found=1):
    """What a stream finds, in the words of its definition: (T, n_found) each."""
    rows = []
    for i in range(len(x)):
        oldest = 0 if window is None else max(0, i - window)
        matches = [(n, j) for j in range(oldest, i) if (n := shared(x, i, x, j, max_match, end))]
        rows.append(best_of(matches, x, n_found))
    both = torch.tensor(rows, dtype=torch.int64).view(len(x), n_found, 2)
    return both[..., 0], both[..., 1]


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype == torch.int64
        assert torch.equal(one, other)


@st.composite
def streams(draw):
    """Random, periodic and constant streams over few ids."""
    alphabet = draw(st.integers(1, 5))
    part = draw(st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=60))
    return (part * draw(st.integers(1, 12)))[:60]


@pytest.mark.parametrize("impl", FORMS)
@settings(max_examples=150, deadline=None)
@given(
    x=streams(),
    max_match=st.integers(1, 20),
    window=st.none() | st.integers(1, 40),
    end=st.none() | st.integers(0, 4),
    n_found=st.integers(1, 4),
    cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_a_stream_read_in_pieces_finds_what_the_definition_says(impl, x, max_match, window, end, n_found, cuts):
    stream, wanted = TokenStream(max_match, window, end, impl), oracle(x, max_match, window, end, n_found)
    pieces = [torch.tensor(x)[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 60])]
    found = [stream.read(piece, n_found) for piece in pieces]
    assert_same([torch.cat(parts) for parts in zip(*found, strict=True)], wanted)
    assert len(stream) == len(x)


@settings(max_examples=100, deadline=None)
@given(x=streams(), max_match=st.integers(1, 70), window=st.none() | st.integers(1, 40))
def test_a_stream_is_rosa_of_ids_with_themselves(x, max_match, window):
    ids = torch.tensor([x, x[::-1]])
    wanted = rosa(ids, ids, max_match, "reference", window)
    for impl in ("auto", "dp", "stream"):
        assert_same(rosa(ids, ids, max_match, impl, window), wanted)
    assert_same(rosa(ids, ids.clone(), max_match, window=window), wanted)
    assert_same([part[:, 0] for part in found_in(ids[0], max_match, window)], [part[0] for part in wanted])


def test_rosa_says_which_forms_have_a_window_and_what_stream_needs():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for arguments, told in (
        (dict(max_match=2, window=2, impl="cpu"), 'impl="cpu" has no window'),
        (dict(max_match=2, window=0), "window must be None or an int of at least 1, got 0"),
        (dict(impl="stream"), "needs one tensor as q and as k, and a max_match"),
    ):
        with pytest.raises(KernelError, match=told):
            rosa(ids, ids, **arguments)
    assert rosa(ids[:, :0], ids[:, :0], 3)[0].shape == (1, 0)


@pytest.mark.parametrize("impl", FORMS)
@settings(max_examples=60, deadline=None)
@given(x=streams(), window=st.none() | st.integers(1, 30), at=st.integers(0, 60), n_found=st.integers(1, 2))
def test_copies_and_streams_that_go_on_find_the_same(impl, x, window, at, n_found):
    stream = TokenStream(7, window, None, impl)
    stream.read(torch.tensor(x[:at], dtype=torch.int64))
    copy, again = stream.copy(), stream.going_on(len(stream), stream.tokens())
    rest = torch.tensor(x[at:], dtype=torch.int64)
    wanted = stream.read(rest, n_found)
    assert_same(copy.read(rest, n_found), wanted)
    assert_same(again.read(rest, n_found), wanted)
    assert len(copy) == len(again) == len(stream) == len(x)


@needs_cpp
@settings(max_examples=150, deadline=None)
@given(x=streams(), y=streams(), max_match=st.integers(1, 12), end=st.none() | st.integers(0, 4), n=st.integers(0, 30))
def test_an_index_finds_the_longest_then_latest_of_its_tokens(x, y, max_match, end, n):
    index = TokenIndex.of(torch.tensor(x), max_match, end)
    rows = []
    for i in range(len(y) - min(n, len(y)), len(y)):
        matches = [(m, j) for j in range(len(x) - 1) if (m := shared(y, i, x, j, max_match, end))]
        rows.append(best_of(matches, x, 2))
    both = torch.tensor(rows, dtype=torch.int64).view(len(rows), 2, 2)
    assert_same(index.find(torch.tensor(y), len(rows), 2), (both[..., 0], both[..., 1]))


@needs_cpp
def test_large_ids_and_long_streams_agree_in_both_forms():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2**31, (50,), generator=generator)[torch.randint(0, 50, (3000,), generator=generator)]
    ids[1500:2500] = ids[:1000]
    for window in (None, 700):
        forms = [TokenStream(64, window, impl=impl).read(ids, 3) for impl in ("cpu", "torch")]
        assert_same(*forms)
    assert TokenStream(64).read(ids)[1].max() == 64


@needs_cpp
@pytest.mark.parametrize(
    ("name", "ids"),
    {
        "constant": torch.zeros(200_000, dtype=torch.int64),
        "ascending, then smaller ones ascending": torch.cat((torch.arange(30_000, 60_000), torch.arange(30_000))),
        "between ascending ids": torch.stack((torch.zeros(20_000).long(), torch.arange(20_000)), 1).flatten().repeat(3),
        "of long period": torch.randperm(5_000, generator=torch.Generator().manual_seed(1)).repeat(20),
    }.items(),
)
def test_no_stream_makes_a_list_of_a_tree(name, ids):
    """Seconds would be minutes. A list of 20,000 nodes that each token walks is 1.2e9 comparisons."""
    found = TokenStream(64).read(ids)[1]
    assert found.shape == (len(ids), 1), name


@needs_cpp
def test_a_window_bounds_the_memory():
    bounded, whole = TokenStream(16, window=1000), TokenStream(16)
    ids = torch.arange(20_000) % 3001
    for stream in (bounded, whole):
        stream.read(ids)
    assert bounded.nbytes < 24 * (1000 + 16) + 4 * memory.N_ROOTS + 100
    assert 12 * 20_000 <= whole.nbytes <= 24 * 20_000 + 4 * memory.N_ROOTS + 100
    assert len(bounded.tokens()) == 1016


def test_what_does_not_fit_is_refused(monkeypatch):
    for wrong, told in (
        (dict(max_match=0), "max_match must be"),
        (dict(max_match=65536), "1 to 65535"),
        (dict(window=0), "window must be None or an int of at least 1"),
        (dict(window=2**31), "less than 2147483648"),
        (dict(window=True), "window must be"),
        (dict(impl="cuda"), "impl must be auto, cpu, torch"),
    ):
        with pytest.raises(KernelError, match=told):
            TokenStream(**wrong)
    stream = TokenStream(impl="torch")
    for tokens, told in (
        (torch.zeros(2, 2, dtype=torch.int64), r"\(n,\) integers on the CPU, got \(2, 2\)"),
        (torch.zeros(3), "torch.float32"),
        (torch.tensor([1, -1]), "got -1 at position"),
    ):
        with pytest.raises(KernelError, match=told):
            stream.read(tokens)
    monkeypatch.setattr(memory, "MOST_TOKENS", 5)
    stream.read(torch.arange(5))
    with pytest.raises(KernelError, match="holds at most 5 tokens"):
        stream.read(torch.arange(1))


@needs_cpp
def test_a_damaged_index_is_refused_and_never_followed():
    index = TokenIndex.of(torch.arange(50) % 7)
    tokens, nodes, roots = index.parts
    with pytest.raises(KernelError, match="no index of tokens"):
        TokenIndex(tokens[:-1], nodes, roots, 64, None)
    with pytest.raises(KernelError, match="no index of tokens"):
        TokenIndex(tokens, nodes, roots[:-1], 64, None)
    loop = torch.arange(len(nodes)).unsqueeze(1).expand(-1, 2).to(torch.uint32)  # every node below itself
    for damaged in (loop, torch.full(nodes.shape, 10**6).to(torch.uint32)):
        with pytest.raises(KernelError, match="damaged; build it anew"):
            TokenIndex(tokens, damaged, roots, 64, None).find(torch.tensor([3, 3, 4]), 3)


def test_without_a_compiler_streams_go_on_in_pytorch_and_an_index_says_what_it_needs(monkeypatch, capsys):
    def none() -> None:
        raise KernelError("rosa_memory: no C++ compiler")

    monkeypatch.setattr(memory, "FORM", _choice.NativeForm("rosa", "cpu", "streams", lambda device: None, none))
    ids = torch.arange(40) % 9
    assert_same(TokenStream().read(ids), oracle(ids.tolist(), 64))
    assert "going on with the slower form" in capsys.readouterr().err
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        TokenIndex.of(ids)
