"""heron.ops.token_step: the step in C++ by its definition, heron.generation.step, and by the model, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heron.errors import KernelError
from heron.generation.decoder import SequenceStates
from heron.generation.step import PLAIN, channel_mix, layers_of, norm_of, time_mix
from heron.ops import _build
from heron.ops.head_step import HeadWeights
from heron.ops.int8 import Int8Matrix
from heron.ops.token_step import (
    LayerStates,
    LayerWeights,
    LowRank,
    LowRankGate,
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


GROUPED = dict(C=192, head_size=64, hidden=320, ranks=(8, 24, 16, 40), vocab=77)  # multiples of 64, for 8 bits


def network(C, head_size, hidden, ranks, vocab, layers=3, sequences=7, dtype=FP64, seed=0, gates=None):
    """Random weights, rounded to bf16 so that they are the same in every dtype, and states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0, shift=0.0, of=dtype):
        return (scale * torch.randn(*size, generator=generator, dtype=FP64) + shift).to(BF16).to(of)

    def matrix(out, n_in):
        return normal(out, n_in, scale=n_in**-0.5)

    def norm():
        return Norm(normal(C, scale=0.3, shift=1), normal(C, scale=0.3), 1e-5)

    def low_rank(rank):
        return LowRank(matrix(rank, C), matrix(C, rank))

    def layer(number):
        *of_head, v0 = (normal(C, scale=0.5, shift=1) for _ in range(8))
        of_head[4] = of_head[4].view(C // head_size, head_size)
        head = HeadWeights(*of_head, 64e-5, v0 if number else None)
        return LayerWeights(
            norm(), normal(6, C, scale=0.3, shift=0.5), *(matrix(C, C) for _ in range(4)), list(map(low_rank, ranks)),
            head, norm(), normal(1, C, scale=0.3, shift=0.5), matrix(hidden, C), matrix(C, hidden), gates, None,
        )  # fmt: skip

    def states():
        wkv = normal(sequences, C // head_size, head_size, head_size, of=FP64 if dtype == FP64 else FP32)
        return LayerStates(normal(sequences, C), wkv, normal(sequences, C))

    weights = [layer(number) for number in range(layers)]
    return Network(weights, [states() for _ in range(layers)], norm(), matrix(vocab, C))


def in_8_bits(network):
    """`network` with its large matrices in 8 bits, and with the matrices that these stand for."""
    names = "receptance", "key", "value", "output", "ffn_key", "ffn_value"
    eights = [
        layer._replace(**{name: Int8Matrix.of(getattr(layer, name)) for name in names}) for layer in network.layers
    ]
    stood_for = [
        layer._replace(**{name: getattr(layer, name).dequantized(network.head.dtype) for name in names})
        for layer in eights
    ]
    head = Int8Matrix.of(network.head)
    return (
        network._replace(layers=eights, head=head),
        network._replace(layers=stood_for, head=head.dequantized(network.head.dtype)),
    )


def by_definition(network, sequences, x, gates=None):
    """What TokenStep computes, by the definition of a block."""
    embedded, v_first = x, None
    for number, (layer, states) in enumerate(zip(network.layers, network.states, strict=True)):
        own = LayerStates(*(part[sequences] for part in states))
        x, v_first = time_mix(PLAIN, layer, x, own, v_first)
        x = channel_mix(PLAIN, layer, x, own, None if gates is None else gates[number], embedded)
        for part, new in zip(states, own, strict=True):
            part[sequences] = new
    weight, bias, eps = network.norm
    return F.linear(F.layer_norm(x, weight.shape, weight, bias, eps), network.head)


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


def parts(states):
    return [part.clone() for layer in states for part in layer]


@needs_compiler
@pytest.mark.parametrize("gates", [None, "output", "hidden"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"C{sizes['C']}")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_step_in_cpp_is_its_definition(sizes, gates, dtype):
    exact, built, eager = (network(**sizes, dtype=kind, gates=gates) for kind in (FP64, dtype, dtype))
    step = TokenStep(built)

    def near(got, written, want):
        return distance(got, want) < max(2 * distance(written, want), 1e-6)

    for seed, sequences in enumerate(([2, 0, 5, 1, 6], [4], [0, 4])):
        untouched = [i for i in range(7) if i not in sequences]
        before = parts(built.states)
        x, rows = tokens(sizes, len(sequences), gates, seed=seed)
        inputs = sequences, x.to(dtype), None if rows is None else rows.to(dtype)
        logits = step(*inputs)
        assert logits.dtype == FP32
        assert near(logits, by_definition(eager, *inputs), by_definition(exact, sequences, x, rows))
        states = map(parts, (built.states, eager.states, exact.states))
        for old, new, *others in zip(before, *states, strict=True):
            assert torch.equal(new[untouched], old[untouched])
            assert near(new[sequences], *(part[sequences] for part in others))


@needs_compiler
@pytest.mark.parametrize("gates", [None, "output", "hidden"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_matrices_in_8_bits_are_those_that_they_stand_for(dtype, gates):
    _, exact = in_8_bits(network(**GROUPED, gates=gates))
    built, _ = in_8_bits(network(**GROUPED, dtype=dtype, gates=gates))
    eager = in_8_bits(network(**GROUPED, dtype=dtype, gates=gates))[1]  # with states of its own
    step = TokenStep(built)
    for seed, sequences in enumerate(([2, 0, 5, 1, 6], [4], [0, 4])):
        x, rows = tokens(GROUPED, len(sequences), gates, seed=seed)
        inputs = sequences, x.to(dtype), None if rows is None else rows.to(dtype)
        want = by_definition(exact, sequences, x, rows)
        assert distance(step(*inputs), want) < max(2 * distance(by_definition(eager, *inputs), want), 1e-6)
        for new, one, true in zip(*map(parts, (built.states, eager.states, exact.states)), strict=True):
            assert distance(new, true) < max(2 * distance(one, true), 1e-6)


@pytest.mark.parametrize("form", [dict(variant="v7"), dict(), dict(deep_embed_4x=True), dict(variant="v7a")])
def test_the_definition_is_the_model(random_model, form):
    model = random_model(**form).double()
    states = SequenceStates(model, 2)
    network_ = Network(layers_of(model), states.layers, norm_of(model.ln_out), model.head.weight)
    ids = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want, after = model(ids)
        for t in range(5):
            tables = [
                next((m for n, m in b.ffn.named_children() if n in ("enn", "enn4", "s_emb")), None)
                for b in model.blocks
            ]
            gates = None if tables[0] is None else [table(ids[:, t]) for table in tables]
            got = by_definition(network_, [0, 1], model.embed(ids[:, t]), gates)
            assert distance(got, want[:, t]) < 1e-12
    for mine, true in zip(parts(states.layers), after.to_list(), strict=True):
        assert distance(mine, true) < 1e-12


@needs_compiler
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("sizes", "bits"), [(SIZES[0], None), (SIZES[1], None), (GROUPED, 8)], ids=["C48", "C128", "8-bits"]
)
def test_a_sequence_gets_the_same_bits_in_any_company_and_on_any_threads(sizes, bits, dtype):
    x, gates = tokens(sizes, 7, "output", dtype)
    results, threads = [], torch.get_num_threads()
    alone, in_two = [[i] for i in range(7)], [[6, 0, 3], [5, 1, 4, 2]]
    try:
        for number, companies in ((1, [list(range(7))]), (3, alone), (2, in_two)):
            torch.set_num_threads(number)
            network_ = network(**sizes, dtype=dtype, gates="output")
            step = TokenStep(network_ if bits is None else in_8_bits(network_)[0])
            logits = torch.empty(7, sizes["vocab"])
            for _ in range(2):
                for some in companies:
                    logits[some] = step(some, x[some], gates[:, some])
            results.append([logits, *parts(network_.states)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_the_applications_default_dtype_is_of_no_concern(default):
    x, _ = tokens(SIZES[1], 1, dtype=FP32)
    want = TokenStep(network(**SIZES[1], dtype=FP32))([0], x)
    try:
        torch.set_default_dtype(default)
        got = TokenStep(network(**SIZES[1], dtype=FP32))([0], x)
    finally:
        torch.set_default_dtype(FP32)
    assert torch.equal(got, want)


@needs_compiler
def test_not_a_number_goes_through():
    sizes = SIZES[1]
    x, _ = tokens(sizes, 2, dtype=FP32)
    x[1, 3] = torch.nan
    logits = TokenStep(network(**sizes, dtype=FP32))([0, 1], x)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@needs_compiler
def test_weights_and_states_are_read_where_they_are():
    sizes = SIZES[1]
    network_ = network(**sizes, dtype=FP32)
    step, (x, _) = TokenStep(network_), tokens(sizes, 1, dtype=FP32)
    before = step([0], x)
    network_.layers[1].ffn_key.mul_(2)
    for layer, fresh in zip(network_.states, network(**sizes, dtype=FP32).states, strict=True):
        for part, new in zip(layer, fresh, strict=True):
            part.copy_(new)
    assert not torch.equal(step([0], x), before)
    network_.layers[1].ffn_key.div_(2)
    for layer, fresh in zip(network_.states, network(**sizes, dtype=FP32).states, strict=True):
        for part, new in zip(layer, fresh, strict=True):
            part.copy_(new)
    assert torch.equal(step([0], x), before)


@needs_compiler
@pytest.mark.parametrize(
    ("sequences", "shape", "gates", "message"),
    [
        ([0, 0], (2, 48), (3, 2, 48), r"sequences must be different, 0 to 6; got \[0, 0\]"),
        ([7], (1, 48), (3, 1, 48), "sequences must be different, 0 to 6"),
        ([-1], (1, 48), (3, 1, 48), "sequences must be different, 0 to 6"),
        ([0], (2, 48), (3, 1, 48), r"x must be \(1, 48\), got \(2, 48\)"),
        ([0], (1, 48), (3, 1, 112), r"gates must be \(3, 1, 48\), got \(3, 1, 112\)"),
        ([0], (1, 48), None, r"gates must be \(3, 1, 48\), got None"),
    ],
)
def test_unfit_arguments_are_refused_in_words(sequences, shape, gates, message):
    step = TokenStep(network(**SIZES[0], dtype=FP32, gates="output"))
    with pytest.raises(KernelError, match=message):
        step(sequences, torch.zeros(shape), None if gates is None else torch.ones(gates))


@needs_compiler
def test_networks_that_it_is_not_for_are_refused_in_words():
    with pytest.raises(KernelError, match="it takes fp32 and bf16, not torch.float64"):
        TokenStep(network(**SIZES[0]))
    given = network(**SIZES[0], dtype=FP32)
    gate = LowRankGate(*(torch.zeros(1) for _ in range(4)))
    with pytest.raises(KernelError, match="it has no low-rank gate .* TorchDecoder of heron.generation.decoder has"):
        TokenStep(given._replace(layers=[given.layers[0]._replace(deep_embed="low-rank", low_rank_gate=gate)]))
    state = given.states[0]._replace(ffn_shift=torch.zeros(48, 7).t())
    with pytest.raises(KernelError, match="states must be contiguous"):
        TokenStep(given._replace(states=[state, *given.states[1:]]))


def test_where_it_does_not_run_is_said(monkeypatch, capsys):
    assert token_step_choice(torch.device("cpu"), FP32, 8).impl == "reference"
    assert token_step_choice(torch.device("cuda")).impl == "reference"

    def fail():
        raise KernelError("token_step: no compiler")

    monkeypatch.setattr(cpu.FORM, "load", fail)
    for _ in range(2):
        assert token_step_choice(torch.device("cpu")).impl == "reference"
    said = "heron: going on with the slower form of decoding in PyTorch: token_step: no compiler\n"
    assert capsys.readouterr().err == said
