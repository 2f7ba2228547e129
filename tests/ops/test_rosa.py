"""ROSA: every implementation gives the very indices and lengths of the definition."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from heron import ops
from heron.errors import KernelError
from heron.ops import _build, _choice
from heron.ops.rosa import cpu, rosa, rosa_choice

needs_cpp = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
FAST = ["dp", pytest.param("cpu", marks=needs_cpp)]


def oracle(q, k, max_match=None):
    """Source and length for one stream, in the words of the definition."""
    found = []
    for i in range(len(q)):
        best = (0, -1)
        for j in range(i):
            n = 0
            while n <= j and k[j - n] == q[i - n]:
                n += 1
            if max_match is not None:
                n = min(n, max_match)
            if n and (n, j) > best:
                best = (n, j)
        found.append((best[1], best[0]))
    return torch.tensor([src for src, _ in found]), torch.tensor([length for _, length in found])


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, y)


def mixed_streams(streams, tokens, alphabet, seed):
    """Random, periodic, constant and nearly constant pairs, and pairs where k is a shifted q."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    q, k = draw(alphabet, streams, tokens), draw(alphabet, streams, tokens)
    kind = torch.arange(streams) % 6
    period = 1 + draw(9, streams, 1)
    position = torch.arange(tokens)
    q = torch.where((kind == 1)[:, None], q.gather(1, position % period), q)
    k = torch.where((kind == 1)[:, None], k.gather(1, position % period), k)
    q = torch.where((kind >= 2)[:, None] & (kind <= 3)[:, None], q[:, :1], q)
    k = torch.where((kind == 2)[:, None], q[:, :1], k)
    rare = draw(12, streams, tokens) == 0
    k = torch.where((kind == 3)[:, None] & ~rare, q[:, :1], k)
    q = torch.where((kind == 4)[:, None], k.roll(1, dims=1), q)
    k = torch.where((kind == 5)[:, None], q, k)
    return q, k


@functools.cache
def mixed_streams_solved(streams, tokens, alphabet, max_match):
    q, k = mixed_streams(streams, tokens, alphabet, seed=tokens)
    return q, k, rosa(q, k, max_match, "reference")


@functools.cache
def every_sequence(alphabet, tokens):
    x = torch.tensor(list(itertools.product(range(alphabet), repeat=tokens)))
    return x, rosa(x, x, impl="reference")


@functools.cache
def every_binary_pair(tokens, max_match):
    words = torch.tensor(list(itertools.product((0, 1), repeat=tokens)))
    q, k = words.repeat_interleave(len(words), dim=0), words.repeat(len(words), 1)
    return q, k, rosa(q, k, max_match, "reference")


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_the_examples_of_the_definition(impl):
    x = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0]])
    assert_same(
        rosa(x, x, impl=impl), (torch.tensor([[-1, -1, 0, 1, 3, 2, 3, 2]]), torch.tensor([[0, 0, 1, 2, 1, 2, 3, 3]]))
    )
    assert rosa(x, x, 2, impl)[0].tolist() == [[-1, -1, 0, 1, 3, 2, 3, 5]]
    assert rosa(x, x, 1, impl)[0].tolist() == [[-1, -1, 0, 1, 3, 2, 4, 5]]
    q, k = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0]]), torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]])
    assert_same(
        rosa(q, k, impl=impl), (torch.tensor([[-1, 0, 1, 2, 3, 3, 4, 5]]), torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3]]))
    )
    assert rosa(q, k, 1, impl)[0].tolist() == [[-1, 0, 1, 2, 3, 3, 4, 6]]
    q, k = torch.tensor([[3, 7, 3, 7, 9, 3]]), torch.tensor([[3, 7, 9, 3, 7, 1]])
    assert_same(rosa(q, k, impl=impl), (torch.tensor([[-1, -1, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 2, 3, 4]])))
    ones, zeros = torch.ones(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)
    assert rosa(ones, zeros, impl=impl)[0].tolist() == [[-1] * 5]
    assert_same(rosa(ones, ones, impl=impl), (torch.arange(5)[None] - 1, torch.arange(5)[None]))


def test_the_reference_is_the_definition():
    for max_match in (None, 1, 2, 5):
        q, k = mixed_streams(60, 14, 2, seed=max_match or 0)
        src, length = rosa(q, k, max_match, "reference")
        for stream in range(len(q)):
            assert_same((src[stream], length[stream]), oracle(q[stream].tolist(), k[stream].tolist(), max_match))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("max_match", [None, 1, 2, 3])
def test_every_binary_pair_up_to_length_7(impl, max_match):
    for tokens in range(1, 8):
        q, k, expected = every_binary_pair(tokens, max_match)
        assert_same(rosa(q, k, max_match, impl), expected)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("alphabet", "longest"), [(2, 14), (3, 9), (4, 7)])
def test_every_self_sequence(impl, alphabet, longest):
    for tokens in (longest, 1, 2):  # shorter ones are prefixes of these, and the output of a prefix is a prefix
        x, expected = every_sequence(alphabet, tokens)
        assert_same(rosa(x, x, impl=impl), expected)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("alphabet", [2, 3, 4, 16])
def test_twenty_thousand_random_periodic_and_constant_streams(impl, alphabet):
    for tokens, streams in ((1, 100), (5, 1500), (16, 2200), (33, 900), (64, 300)):
        max_match = {5: 3, 33: 8}.get(tokens)
        q, k, expected = mixed_streams_solved(streams, tokens, alphabet, max_match)
        assert_same(rosa(q, k, max_match, impl), expected)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("alphabet", [17, 1000, 2**31])
def test_large_alphabets_and_streams_that_follow_each_other_in_one_workspace(alphabet, impl):
    q, k = mixed_streams(300, 60, 20, seed=7)
    spread = torch.randint(alphabet, (20,), generator=torch.Generator().manual_seed(1))
    q, k = spread[q], spread[k]
    assert_same(rosa(q, k, impl=impl), rosa(q, k, impl="reference"))


@needs_cpp
@pytest.mark.parametrize("alphabet", [2, 3, 16, 40])
def test_long_streams_agree_between_forms(alphabet):
    q, k = mixed_streams(12, 700, alphabet, seed=3)
    for max_match in (None, 20):
        assert_same(rosa(q, k, max_match, "cpu"), rosa(q, k, max_match, "dp"))


@pytest.mark.parametrize("impl", FAST)
def test_the_output_of_a_prefix_is_a_prefix_of_the_output(impl):
    q, k = mixed_streams(30, 40, 2, seed=5)
    src, length = rosa(q, k, impl=impl)
    for tokens in (1, 2, 17, 39):
        assert_same(rosa(q[:, :tokens], k[:, :tokens], impl=impl), (src[:, :tokens], length[:, :tokens]))
    changed = k.clone()
    changed[:, 17:] = 1 - changed[:, 17:]
    assert_same([x[:, :18] for x in rosa(q, changed, impl=impl)], (src[:, :18], length[:, :18]))


@pytest.mark.parametrize("impl", FAST)
def test_a_bound_that_no_match_reaches_is_none(impl):
    q, k = mixed_streams(30, 40, 2, seed=6)
    for bound in (40, 1000):
        assert_same(rosa(q, k, bound, impl), rosa(q, k, None, impl))


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 1)])
def test_empty_and_single(impl, shape):
    zeros = torch.zeros(shape, dtype=torch.int64)
    assert_same(rosa(zeros, zeros, impl=impl), (zeros - 1, zeros))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("impl", FAST)
def test_any_integer_dtype_and_any_strides(impl, dtype):
    q, k = mixed_streams(10, 30, 2, seed=8)
    expected = rosa(q, k, impl="reference")
    assert_same(rosa(q.to(dtype).t().contiguous().t(), k.to(dtype), impl=impl), expected)


@needs_cpp
def test_threads_do_not_change_the_result():
    q, k = mixed_streams(50, 50, 2, seed=9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        three = rosa(q, k, impl="cpu")
        torch.set_num_threads(1)
        assert_same(three, rosa(q, k, impl="cpu"))
    finally:
        torch.set_num_threads(threads)


X = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X[0]), r"q must be \(S, T\), got \(4,\)"),
        ((X, X.float()), "k must hold symbols of a signed integer dtype, uint8 or bool, got torch.float32"),
        ((X, X[:, :3]), r"q and k must match, got \(2, 4\) on cpu and \(2, 3\) on cpu"),
        ((X, X - 1), r"symbols of k must be in \[0, 2147483648\), got -1 at position \[0, 0\]"),
        ((X + 2**31, X), r"symbols of q must be in \[0, 2147483648\), got 2147483648 at position \[0, 0\]"),
        ((X, X, 0), "max_match must be None or an int of at least 1, got 0"),
        ((X, X, 2.0), "max_match must be None or an int of at least 1, got 2.0"),
        ((X, X, None, "gpu"), "impl must be auto, reference, dp, stream, cpu"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(KernelError, match=f"^rosa: .*{message}"):
        ops.rosa(*arguments)


def test_tensors_of_another_device_are_no_work_for_cpp():
    elsewhere = X.to("meta")
    with pytest.raises(KernelError, match='impl="cpu": it needs tensors on the CPU, got meta'):
        ops.rosa(elsewhere, elsewhere, impl="cpu")


@needs_cpp
def test_a_library_that_gives_wrong_answers_is_refused(monkeypatch):
    honest = cpu._run

    def off_by_one(*arguments):
        src, length = honest(*arguments)
        return src, length + (src == 40)

    monkeypatch.setattr(cpu, "_run", off_by_one)
    cpu.library.cache_clear()
    with pytest.raises(KernelError, match="gives wrong answers"):
        ops.rosa(X, X, impl="cpu")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    def forget():
        cpu.library.cache_clear()
        _choice._why_not_built.cache_clear()

    monkeypatch.setenv("HERON_CACHE", str(tmp_path))
    monkeypatch.setattr(_build, "find_compiler", lambda: None)
    monkeypatch.setattr(_build, "_outcomes", {})
    forget()
    yield
    forget()


def test_without_a_compiler_auto_says_so_once_and_takes_dp(no_compiler, capfd):
    q, k = mixed_streams(6, 20, 2, seed=4)
    for _ in range(2):
        assert_same(rosa(q, k), rosa(q, k, impl="reference"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "going on with the slower form of ROSA in PyTorch: rosa: no C++ compiler" in lines[0]
    with pytest.raises(KernelError, match="^rosa: no C\\+\\+ compiler"):
        rosa(q, k, impl="cpu")


def test_auto_takes_cpp_where_it_can_be_built():
    choice = rosa_choice(torch.device("cpu"))
    assert choice.impl == ("cpu" if _build.find_compiler() else "dp")


def test_auto_takes_streams_that_are_too_long_for_the_cuda_form():
    assert rosa_choice(torch.device("cuda"), 65536).impl == "dp"
