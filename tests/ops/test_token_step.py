"""heron.ops.token_step: the step in C++ by its definition, heron.generation.step, and by the model, in fp64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from heron.errors import KernelError
from heron.generation.decoder import SequenceStates
from heron.generation.step import PLAIN, channel_mix, network_of, time_mix
from heron.ops import _build
from heron.ops.codes import CodedMatrix
from heron.ops.head_step import HeadWeights
from heron.ops.token_step import (
    LayerStates,
    LayerWeights,
    LowRank,
    LowRankGate,
    Memory,
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


COMPANIES = [2, 0, 5, 1, 6], [4], [0, 4], [3, 1], [0, 1, 2, 3, 4, 5, 6]
LENGTHS = [*range(17), *(17,) * 4]  # the row of each length of a match, up to 20
GROUPED = dict(C=192, head_size=64, hidden=320, ranks=(8, 24, 16, 40), vocab=77)  # multiples of 64, for 8 bits


def network(C, head_size, hidden, ranks, vocab, layers=3, sequences=7, dtype=FP64, seed=0, gates=None, matches=0):
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

    def memory():
        scale, length, copy = (normal(matches, *size) for size in ((C,), (max(LENGTHS), C), (max(LENGTHS),)))
        return Memory(scale, length, copy, torch.tensor(LENGTHS))

    weights = [layer(number) for number in range(layers)]
    return Network(
        normal(vocab, C), norm(), weights, [states() for _ in range(layers)], norm(), matrix(vocab, C),
        memory() if matches else None,
    )  # fmt: skip


def of_codes(network, bits):
    """`network` with its large matrices of codes, and with the matrices that these stand for."""
    names = "receptance", "key", "value", "output", "ffn_key", "ffn_value"
    coded = [
        layer._replace(**{name: CodedMatrix.of(getattr(layer, name), bits) for name in names})
        for layer in network.layers
    ]
    stood_for = [
        layer._replace(**{name: getattr(layer, name).dequantized(network.head.dtype) for name in names})
        for layer in coded
    ]
    head = CodedMatrix.of(network.head, bits)
    return (
        network._replace(layers=coded, head=head),
        network._replace(layers=stood_for, head=head.dequantized(network.head.dtype)),
    )


def embedded(network, ids, recalled=None):
    """What the network begins with, (n, C)."""
    x = network.embedding[ids]
    for k, (predicted, length) in enumerate([] if recalled is None else recalled.permute(1, 2, 0)):
        memory = network.memory
        added = network.embedding[predicted] * memory.scale[k] + memory.length[k, memory.rows[length] - 1]
        x = torch.where((length > 0).unsqueeze(1), x + added, x)
    weight, bias, eps = network.first_norm
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def by_definition(network, sequences, ids, gates=None, recalled=None):
    """What TokenStep computes, by the definition of a block."""
    x, v_first = embedded(network, ids, recalled), None
    plain = x if recalled is None else embedded(network, ids)
    for number, (layer, states) in enumerate(zip(network.layers, network.states, strict=True)):
        own = LayerStates(*(part[sequences] for part in states))
        x, v_first = time_mix(PLAIN, layer, x, own, v_first)
        x = channel_mix(PLAIN, layer, x, own, None if gates is None else gates[number], plain)
        for part, new in zip(states, own, strict=True):
            part[sequences] = new
    weight, bias, eps = network.norm
    logits = F.linear(F.layer_norm(x, weight.shape, weight, bias, eps), network.head)
    for k, (predicted, length) in enumerate([] if recalled is None else recalled.permute(1, 2, 0)):
        raised = torch.where(length > 0, network.memory.copy[k, network.memory.rows[length] - 1], 0)
        logits.scatter_add_(1, predicted.unsqueeze(1), raised.unsqueeze(1).to(logits.dtype))
    return logits


def tokens(sizes, n, gates=None, layers=3, seed=1, matches=0):
    """n ids, gates (L, n, their width) in bf16, and matches (n, K, 2), of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = {"output": sizes["C"], "hidden": sizes["hidden"], None: None}[gates]
    ids = torch.randint(sizes["vocab"], (n,), generator=generator).tolist()
    rows = None if width is None else (1 + 0.5 * torch.randn(layers, n, width, generator=generator)).to(BF16)
    ends = torch.tensor([sizes["vocab"], len(LENGTHS)])
    recalled = (torch.rand(n, matches, 2, generator=generator) * ends).long() if matches else None
    if recalled is not None:
        recalled[0, 0, 1] = 0  # no match
    return ids, rows, recalled


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_distances(rounds):
    """At most twice eager's error: the root of the mean square over all rounds, of which one may be small by chance.

    A round has what the step gave, what eager gave, and the truth, of logits and of each part of the states.
    """
    for alike in zip(*rounds, strict=True):
        mine, eager = (math.sqrt(sum(distance(one[n], one[2]) ** 2 for one in alike) / len(alike)) for n in (0, 1))
        assert mine < max(2 * eager, 1e-6)


def parts(states):
    return [part.clone() for layer in states for part in layer]


@needs_compiler
@pytest.mark.parametrize(("gates", "matches"), [(None, 0), ("output", 0), ("hidden", 0), (None, 3), ("output", 2)])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"C{sizes['C']}")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_step_in_cpp_is_its_definition(sizes, gates, matches, dtype):
    exact, built, eager = (network(**sizes, dtype=kind, gates=gates, matches=matches) for kind in (FP64, dtype, dtype))
    step = TokenStep(built)

    rounds = []
    for seed, sequences in enumerate(COMPANIES, 3):
        untouched = [i for i in range(7) if i not in sequences]
        before = parts(built.states)
        inputs = sequences, *tokens(sizes, len(sequences), gates, seed=seed, matches=matches)
        logits = step(*inputs)
        assert logits.dtype == FP32
        found = [(logits, by_definition(eager, *inputs), by_definition(exact, *inputs))]
        states = map(parts, (built.states, eager.states, exact.states))
        for old, *alike in zip(before, *states, strict=True):
            assert torch.equal(alike[0][untouched], old[untouched])
            found.append([part[sequences] for part in alike])
        rounds.append(found)
    check_distances(rounds)


@needs_compiler
@pytest.mark.parametrize("gates", [None, "output", "hidden"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_of_codes_are_those_that_they_stand_for(dtype, gates, bits):
    sizes = GROUPED | dict(gates=gates, matches=2)
    _, exact = of_codes(network(**sizes), bits)
    built, _ = of_codes(network(**sizes, dtype=dtype), bits)
    eager = of_codes(network(**sizes, dtype=dtype), bits)[1]  # with states of its own
    step, rounds = TokenStep(built), []
    for seed, sequences in enumerate(COMPANIES, 3):
        inputs = sequences, *tokens(GROUPED, len(sequences), gates, seed=seed, matches=2)
        logits = step(*inputs), by_definition(eager, *inputs), by_definition(exact, *inputs)
        rounds.append([logits, *zip(*map(parts, (built.states, eager.states, exact.states)), strict=True)])
    check_distances(rounds)


@pytest.mark.parametrize(
    "form",
    [
        dict(variant="v7"), dict(), dict(deep_embed_4x=True), dict(variant="v7a"),
        dict(variant="v7", memory="memory"), dict(memory="memory"),
    ],
)  # fmt: skip
def test_the_definition_is_the_model(random_model, form):
    model = random_model(**form).double()
    states = SequenceStates(model, 2)
    network_ = network_of(model, states.layers)
    ids = torch.randint(5, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want, after = model(ids)
        recalled, _ = model.recall(ids, None)
        for t in range(30):
            tables = [
                next((m for n, m in b.ffn.named_children() if n in ("enn", "enn4", "s_emb")), None)
                for b in model.blocks
            ]
            gates = None if tables[0] is None else [table(ids[:, t]) for table in tables]
            got = by_definition(network_, [0, 1], ids[:, t], gates, None if recalled is None else recalled[:, t])
            assert distance(got, want[:, t]) < 1e-12
    for mine, true in zip(parts(states.layers), dataclasses.replace(after, memory=None).to_list(), strict=True):
        assert distance(mine, true) < 1e-12


@needs_compiler
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("sizes", "bits"),
    [(SIZES[0], None), (SIZES[1], None), (GROUPED, 8), (GROUPED, 4)],
    ids=["C48", "C128", "8-bits", "4-bits"],
)
def test_a_sequence_gets_the_same_bits_in_any_company_and_on_any_threads(sizes, bits, dtype):
    ids, gates, recalled = tokens(sizes, 7, "output", matches=2)
    results, threads = [], torch.get_num_threads()
    alone, in_two = [[i] for i in range(7)], [[6, 0, 3], [5, 1, 4, 2]]
    try:
        for number, companies in ((1, [list(range(7))]), (3, alone), (2, in_two)):
            torch.set_num_threads(number)
            network_ = network(**sizes, dtype=dtype, gates="output", matches=2)
            step = TokenStep(network_ if bits is None else of_codes(network_, bits)[0])
            logits = torch.empty(7, sizes["vocab"])
            for _ in range(2):
                for some in companies:
                    logits[some] = step(some, [ids[i] for i in some], gates[:, some], recalled[some])
            results.append([logits, *parts(network_.states)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_the_applications_default_dtype_is_of_no_concern(default):
    want = TokenStep(network(**SIZES[1], dtype=FP32))([0], [5])
    try:
        torch.set_default_dtype(default)
        got = TokenStep(network(**SIZES[1], dtype=FP32))([0], [5])
    finally:
        torch.set_default_dtype(FP32)
    assert torch.equal(got, want)


@needs_compiler
def test_not_a_number_goes_through():
    sizes = SIZES[1]
    network_ = network(**sizes, dtype=FP32)
    network_.embedding[6, 3] = torch.nan
    logits = TokenStep(network_)([0, 1], [5, 6])
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@needs_compiler
def test_weights_and_states_are_read_where_they_are():
    sizes = SIZES[1]
    network_ = network(**sizes, dtype=FP32)
    step = TokenStep(network_)
    before = step([0], [5])
    network_.layers[1].ffn_key.mul_(2)
    for layer, fresh in zip(network_.states, network(**sizes, dtype=FP32).states, strict=True):
        for part, new in zip(layer, fresh, strict=True):
            part.copy_(new)
    assert not torch.equal(step([0], [5]), before)
    network_.layers[1].ffn_key.div_(2)
    for layer, fresh in zip(network_.states, network(**sizes, dtype=FP32).states, strict=True):
        for part, new in zip(layer, fresh, strict=True):
            part.copy_(new)
    assert torch.equal(step([0], [5]), before)


@needs_compiler
@pytest.mark.parametrize(
    ("sequences", "ids", "gates", "matches", "message"),
    [
        ([0, 0], [1, 2], (3, 2, 48), (2, 2, 2), r"sequences must be different, 0 to 6; got \[0, 0\]"),
        ([7], [1], (3, 1, 48), (1, 2, 2), "sequences must be different, 0 to 6"),
        ([-1], [1], (3, 1, 48), (1, 2, 2), "sequences must be different, 0 to 6"),
        ([0], [1, 2], (3, 1, 48), (1, 2, 2), "tokens must be 1, one for each sequence, got 2"),
        ([0], [1], (3, 1, 112), (1, 2, 2), r"gates must be \(3, 1, 48\), got \(3, 1, 112\)"),
        ([0], [1], None, (1, 2, 2), r"gates must be \(3, 1, 48\), got None"),
        ([0], [1], (3, 1, 48), (1, 3, 2), r"recalled must be \(1, 2, 2\), got \(1, 3, 2\)"),
        ([0], [1], (3, 1, 48), None, r"recalled must be \(1, 2, 2\), got None"),
        ([0], [37], (3, 1, 48), (1, 2, 2), r"wanted ids 0 to 36, of matches lengths 0 to 20; got \[37\] and matches"),
        ([0], [-1], (3, 1, 48), (1, 2, 2), "wanted ids 0 to 36"),
    ],
)
def test_unfit_arguments_are_refused_in_words(sequences, ids, gates, matches, message):
    step = TokenStep(network(**SIZES[0], dtype=FP32, gates="output", matches=2))
    recalled = None if matches is None else torch.zeros(matches, dtype=torch.int64)
    with pytest.raises(KernelError, match=message):
        step(sequences, ids, None if gates is None else torch.ones(gates), recalled)


@needs_compiler
@pytest.mark.parametrize("match", [[37, 1], [-1, 1], [1, 21], [1, -1]])
def test_matches_that_can_not_be_are_refused_and_change_nothing(match):
    network_ = network(**SIZES[0], dtype=FP32, matches=2)
    before, step = parts(network_.states), TokenStep(network_)
    with pytest.raises(KernelError, match=r"wanted ids 0 to 36, of matches lengths 0 to 20; got \[1\] and matches"):
        step([0], [1], None, torch.tensor([[[5, 20], match]]))
    assert all(map(torch.equal, parts(network_.states), before))
    with pytest.raises(KernelError, match=r"recalled must be None, got \(1, 2, 2\)"):
        TokenStep(network(**SIZES[0], dtype=FP32))([0], [1], None, torch.zeros(1, 2, 2))


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
