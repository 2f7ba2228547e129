"""heron.ops.token_step: its C++ form by its definition in fp64. Decoders are held to the model in test_engine."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build
from heron.ops.head_step import HeadWeights
from heron.ops.token_step import (
    LayerMemory,
    LayerWeights,
    LowRank,
    Network,
    Norm,
    TokenStep,
    cpu,
    token_step_choice,
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
SIZES = [
    dict(C=48, head_size=16, hidden=112, ranks=(5, 8, 13, 3), vocab=37),
    dict(C=128, head_size=64, hidden=512, ranks=(32, 32, 16, 64), vocab=1003),
    dict(C=256, head_size=256, hidden=90, ranks=(1, 40, 8, 8), vocab=5),
    dict(C=32, head_size=16, hidden=32, ranks=(8, 8, 8, 8), vocab=11),  # gates of one width for outputs and hidden
]


def network(C, head_size, hidden, ranks, vocab, layers=3, sequences=7, dtype=FP64, seed=0, gates=None):
    """Random weights, rounded to bf16 so that they are the same in every dtype, and memories."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0, shift=0.0, of=dtype):
        return (scale * torch.randn(*size, generator=generator, dtype=FP64) + shift).to(BF16).to(of)

    def matrix(out, n_in):
        return normal(out, n_in, scale=n_in**-0.5)

    def norm():
        return Norm(normal(C, scale=0.3, shift=1), normal(C, scale=0.3), 1e-5)

    def low_rank(rank, bias=True):
        return LowRank(matrix(rank, C), matrix(C, rank), normal(C) if bias else None)

    def layer():
        head = HeadWeights(*(normal(C, scale=0.5, shift=1) for _ in range(5)), 64e-5)
        gates = (*(low_rank(rank) for rank in ranks[:3]), low_rank(ranks[3], bias=False))
        return LayerWeights(
            norm(), normal(6, C, scale=0.3, shift=0.5), *(matrix(C, C) for _ in range(4)), *gates, head,
            norm(), normal(1, C, scale=0.3, shift=0.5), matrix(hidden, C), matrix(C, hidden),
        )  # fmt: skip

    def memory():
        wkv = normal(sequences, C // head_size, head_size, head_size, of=FP64 if dtype == FP64 else FP32)
        return LayerMemory(normal(sequences, C), wkv, normal(sequences, C))

    weights = [layer() for _ in range(layers)]
    return Network(weights, [memory() for _ in range(layers)], norm(), matrix(vocab, C), gates == "hidden")


def tokens(sizes, n, gates=None, dtype=FP64, layers=3, seed=1):
    """x (n, C) and gates (L, n, their width)."""
    generator = torch.Generator().manual_seed(seed)
    width = {"output": sizes["C"], "hidden": sizes["hidden"], None: None}[gates]
    x = torch.randn(n, sizes["C"], generator=generator).to(BF16).to(dtype)
    if width is None:
        return x, None
    return x, (1 + 0.5 * torch.randn(layers, n, width, generator=generator)).to(BF16).to(dtype)


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def parts(memories):
    return [part.clone() for memory in memories for part in memory]


@needs_compiler
@pytest.mark.parametrize("gates", [None, "output", "hidden"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"C{sizes['C']}")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_compiled_form_is_the_definition(sizes, gates, dtype):
    exact, compiled, eager = (network(**sizes, dtype=kind, gates=gates) for kind in (FP64, dtype, dtype))
    want, got, written = TokenStep(exact, "reference"), TokenStep(compiled, "cpu"), TokenStep(eager, "reference")

    def near(got, written, want):
        return distance(got, want) < max(2 * distance(written, want), 1e-6)

    for step, rows in enumerate(([2, 0, 5, 1, 6], [4], [0, 4])):
        untouched = [i for i in range(7) if i not in rows]
        before = parts(compiled.memories)
        x, of_tables = tokens(sizes, len(rows), gates, seed=step)
        inputs = rows, x.to(dtype), None if of_tables is None else of_tables.to(dtype)
        logits = got(*inputs)
        assert logits.dtype == FP32
        assert near(logits, written(*inputs), want(rows, x, of_tables))
        memories = map(parts, (compiled.memories, eager.memories, exact.memories))
        for old, new, *others in zip(before, *memories, strict=True):
            assert torch.equal(new[untouched], old[untouched])
            assert near(new[rows], *(part[rows] for part in others))


@needs_compiler
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("sizes", SIZES[:2], ids=lambda sizes: f"C{sizes['C']}")
def test_a_sequence_gets_the_same_bits_in_any_company_and_on_any_threads(sizes, dtype):
    x, gates = tokens(sizes, 7, "output", dtype)
    results, threads = [], torch.get_num_threads()
    alone, in_two = [[i] for i in range(7)], [[6, 0, 3], [5, 1, 4, 2]]
    try:
        for number, companies in ((1, [list(range(7))]), (3, alone), (2, in_two)):
            torch.set_num_threads(number)
            network_ = network(**sizes, dtype=dtype)
            step, logits = TokenStep(network_, "cpu"), torch.empty(7, sizes["vocab"])
            for _ in range(2):
                for rows in companies:
                    logits[rows] = step(rows, x[rows], gates[:, rows])
            results.append([logits, *parts(network_.memories)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_the_applications_default_dtype_is_of_no_concern(default):
    x, _ = tokens(SIZES[1], 1, dtype=FP32)
    want = TokenStep(network(**SIZES[1], dtype=FP32), "cpu")([0], x)
    try:
        torch.set_default_dtype(default)
        got = TokenStep(network(**SIZES[1], dtype=FP32), "cpu")([0], x)
    finally:
        torch.set_default_dtype(FP32)
    assert torch.equal(got, want)


@needs_compiler
def test_not_a_number_goes_through():
    sizes = SIZES[1]
    x, _ = tokens(sizes, 2, dtype=FP32)
    x[1, 3] = torch.nan
    logits = TokenStep(network(**sizes, dtype=FP32), "cpu")([0, 1], x)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@needs_compiler
def test_weights_and_memories_are_read_where_they_are():
    sizes = SIZES[1]
    network_ = network(**sizes, dtype=FP32)
    step, (x, _) = TokenStep(network_, "cpu"), tokens(sizes, 1, dtype=FP32)
    before = step([0], x)
    network_.layers[1].ffn_key.mul_(2)
    for memory, fresh in zip(network_.memories, network(**sizes, dtype=FP32).memories, strict=True):
        for part, new in zip(memory, fresh, strict=True):
            part.copy_(new)
    assert not torch.equal(step([0], x), before)
    network_.layers[1].ffn_key.div_(2)
    for memory, fresh in zip(network_.memories, network(**sizes, dtype=FP32).memories, strict=True):
        for part, new in zip(memory, fresh, strict=True):
            part.copy_(new)
    assert torch.equal(step([0], x), before)


@pytest.mark.parametrize(
    ("rows", "shape", "gates", "message"),
    [
        ([0, 0], (2, 48), None, r"rows must be different, 0 to 6; got \[0, 0\]"),
        ([7], (1, 48), None, "rows must be different, 0 to 6"),
        ([-1], (1, 48), None, "rows must be different, 0 to 6"),
        ([0], (2, 48), None, r"x must be \(1, 48\), got \(2, 48\)"),
        ([0], (1, 48), (3, 1, 112), r"gates must be \(3, 1, 48\), got \(3, 1, 112\)"),
    ],
)
def test_unfit_arguments_are_refused_in_words(rows, shape, gates, message):
    step = TokenStep(network(**SIZES[0]), "reference")
    with pytest.raises(KernelError, match=message):
        step(rows, torch.zeros(shape, dtype=FP64), None if gates is None else torch.ones(gates, dtype=FP64))


def test_what_it_is_not_for_is_named(monkeypatch, capsys):
    with pytest.raises(KernelError, match="impl must be auto, reference, cpu; got 'fast'"):
        TokenStep(network(**SIZES[0]), "fast")
    with pytest.raises(KernelError, match="it takes fp32 and bf16, not torch.float64"):
        TokenStep(network(**SIZES[0]), "cpu")
    assert token_step_choice(torch.device("cpu"), FP32, 8).impl == "reference"
    assert token_step_choice(torch.device("cuda")).impl == "reference"

    def fail():
        raise KernelError("token_step: no compiler")

    monkeypatch.setattr(cpu.FORM, "load", fail)
    for _ in range(2):
        assert token_step_choice(torch.device("cpu")).impl == "reference"
    said = "heron: going on with the slower form of decoding in PyTorch: token_step: no compiler\n"
    assert capsys.readouterr().err == said
