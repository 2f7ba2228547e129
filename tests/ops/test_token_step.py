"""heron.ops.token_step: the step in C++ by its definition, heron.generation.step, and by the model, in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from heron.errors import KernelError
from heron.generation.decoder import SequenceStates
from heron.generation.step import network_of
from heron.ops import _build
from heron.ops.token_step import (
    LowRankGate,
    TokenStep,
    cpu,
    token_step_choice,
)
from tests.ops.networks import (
    by_definition,
    check_distances,
    distance,
    network,
    of_codes,
    parts,
    tokens,
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
GROUPED = dict(C=192, head_size=64, hidden=320, ranks=(8, 24, 16, 40), vocab=77)  # multiples of 64, for 8 bits


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
