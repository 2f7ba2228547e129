"""heron.ops.sample_rows: its definition by the sampler of single rows, its kernel by the definition, bit for bit."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.generation import sampling
from heron.generation.sampling import Sampling
from heron.ops import _build, sample_rows
from heron.ops.sample_rows import cuda, sample_rows_choice
from heron.ops.sample_rows.reference import LOG2_E, weights
from tests.ops.kernels import (
    BFLOAT16,
    HALF,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)

EMULATOR = Path(__file__).parent / "emulator"
MIXED = (
    Sampling(),
    Sampling(top_p=1.0),
    Sampling(top_p=0.9, temperature=0.7),
    Sampling(top_p=0.3, top_k=5, temperature=2.5),
    Sampling(top_p=1.0, top_k=40, temperature=50.0),
    Sampling(temperature=0),
    Sampling(top_p=0.95, presence_penalty=0.5, frequency_penalty=0.25),
    Sampling(top_p=0.99999, temperature=1e-30),
    Sampling(top_p=1.0, temperature=1e300),
    Sampling(top_k=1, frequency_penalty=2.0),
    Sampling(top_p=0.5, top_k=10**9, presence_penalty=3.0),
    Sampling(top_p=0.9, presence_penalty=-2.0, frequency_penalty=-1.5),
    Sampling(top_p=1 - 2**-53, temperature=1e9),  # all that has a weight before the temperature
)


def settings_of(samplings):
    names = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
    return torch.tensor([[getattr(s, name) for name in names] for s in samplings], dtype=torch.float64)


def problem(n, vocab, dtype=torch.float32, seed=0):
    """Rows of many spreads, some with equal logits, some with the likeliest side by side; odd V: some ids barred."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.02, 1.0, 4.0, 15.0, 0.0, 300.0])[torch.arange(n) % 6, None]
    logits = spread * torch.randn(n, vocab, generator=generator) + 3
    logits[1::5] = logits[1::5].round()
    logits[2::7, ::3] = -math.inf
    logits[4::5, :450] += 20
    logits[3::11] -= 1e4 * (torch.rand(len(logits[3::11]), vocab, generator=generator) < 0.3)
    counts = (3 * torch.rand(n, vocab, generator=generator)).floor() * torch.rand(n, vocab, generator=generator)
    barred = torch.rand(vocab, generator=generator) < 0.1 * (vocab % 2)
    barred[vocab // 2] = False
    logits[:, vocab // 2] = logits[:, vocab // 2].clamp(min=-9.0)
    samplings = [MIXED[i % len(MIXED)] for i in range(n)]
    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    uniforms[::17], uniforms[5::17] = 0.0, 1 - 2**-53
    return logits.to(dtype), counts, barred, settings_of(samplings), uniforms


@pytest.fixture(scope="module")
def emulated():
    """sample_rows, computed by the kernel's source on a CPU."""
    flags = ("-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
    depends = [cuda.SOURCE, *(EMULATOR / name for name in ("hardware.h", "numbers.h", "together.h", "warp.h"))]
    library = _build.load_c_library("sample_rows_emulated", [EMULATOR / "sample_rows.cpp"], flags, depends)

    def draw(logits, counts, barred, settings, uniforms, aligned=True, blocks=1, holds=False):
        n, vocab = logits.shape
        ids, logprobs = torch.full((n,), -7), torch.full((n,), math.nan)
        here = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (counts, barred, settings, uniforms)]
        library.sample_rows_emulated(
            int(logits.dtype == torch.bfloat16), blocks, int(holds), ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int64(n), ctypes.c_int64(logits.stride(0)), *here, vocab, int(aligned),
            ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(logprobs.data_ptr()),
        )  # fmt: skip
        return ids, logprobs

    return draw


def compare(got, want):
    assert torch.equal(got[0].cpu(), want[0].cpu())
    fine = want[0].cpu() >= 0
    torch.testing.assert_close(got[1].cpu()[fine], want[1].cpu()[fine], rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("n", "vocab", "blocks", "holds", "dtype"),
    [
        *((*sizes, 1, False, torch.float32) for sizes in ((44, 7), (44, 300), (22, 1000), (22, 12001))),
        *((*sizes, 1, False, torch.bfloat16) for sizes in ((44, 7), (44, 300), (22, 1000), (22, 12001))),
        (4, 7, 8, True, torch.float32),
        (13, 60001, 8, True, torch.bfloat16),
        (5, 70001, 8, False, torch.float32),
    ],
)
def test_the_kernels_source_on_a_cpu_draws_what_the_definition_draws(emulated, n, vocab, blocks, holds, dtype):
    logits, *rest = problem(n, vocab, dtype)
    want = sample_rows(logits, *rest, impl="reference")
    compare(emulated(logits, *rest, aligned=vocab % 8 == 0, blocks=blocks, holds=holds), want)


def edges(vocab, seed):
    """Rows with distances that are hard for bins: at their edges, in one of them, equal, tiny, huge; any cut."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 1100, (vocab,), generator=generator) * 2**16 + 0x3D000000
    bits += torch.randint(-1, 2, (vocab,), generator=generator)
    at_edges = bits.int().view(torch.float32)
    chosen = torch.rand(vocab, generator=generator)
    distances = [
        at_edges,
        at_edges[:40][torch.randint(0, 40, (vocab,), generator=generator)],
        torch.zeros(vocab),
        torch.full((vocab,), 3.0),
        1 + chosen * 2**-7,
        chosen * 2**-30,
        10 ** (38 * chosen),
        torch.where(chosen < 0.1, chosen, 9 + 90 * chosen),
        torch.where(chosen < 0.5, 1.0, 1 + 2**-20),
        chosen * 2**-4,
        torch.where(torch.arange(vocab) < 280, 1 + chosen * 2**-8, 20.0),
    ]
    rows = -torch.stack(distances)
    rows[:, vocab // 3] = 0
    order = rows.sort(dim=1, descending=True, stable=True).values
    share = (order.double().exp().cumsum(1) / order.double().exp().sum(1, keepdim=True)).clamp(max=1)
    n = len(rows)
    most = torch.randint(2, vocab + 1, (n, 1), generator=generator)
    top_p = share.gather(1, most - 1)[:, 0].clamp(0.01, 0.9999)
    by_count = torch.rand(n, generator=generator) < 0.5
    settings = torch.zeros(n, 5, dtype=torch.float64)
    settings[:, 0] = 1e9
    settings[:, 1] = torch.where(by_count, 1.0, top_p)
    settings[:, 2] = torch.where(by_count, most[:, 0], 0)
    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    return rows, None, torch.zeros(vocab, dtype=torch.bool), settings, uniforms


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("vocab", "seed", "blocks", "holds"),
    [(vocab, seed, 1, False) for vocab in (200, 3000) for seed in range(4)]
    + [(20000, 4, 8, True), (20000, 5, 8, False)],
)
def test_cuts_at_the_edges_of_bins_and_among_equals_are_those_of_the_definition(emulated, vocab, seed, blocks, holds):
    rows, counts, barred, settings, uniforms = edges(vocab, seed)
    some = slice(seed % 3, None, 3) if blocks > 1 else slice(None)  # a cluster takes a second a row
    arguments = (rows[some].contiguous(), counts, barred, settings[some].contiguous(), uniforms[some].contiguous())
    want = sample_rows(*arguments, impl="reference")
    compare(emulated(*arguments, aligned=False, blocks=blocks, holds=holds), want)


@pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
def test_more_likely_tokens_side_by_side_than_a_warp_has_room_for(emulated):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 12001, generator=generator)
    logits[:, :450] += 20
    settings = settings_of([Sampling(top_p=top_p) for top_p in torch.linspace(0.1, 0.99, 9).tolist()])
    uniforms = torch.linspace(0.3, 0.999, 9, dtype=torch.float64)
    arguments = (logits, None, torch.zeros(12001, dtype=torch.bool), settings, uniforms)
    compare(emulated(*arguments, aligned=False), sample_rows(*arguments, impl="reference"))


def by_hand(logits, barred, sampling):
    """Probabilities (V,) of one row, from what sampling.sample documents, in fp64 and with Python's sort."""
    logits = logits.double().masked_fill(barred, -math.inf)
    probs = logits.softmax(0)
    kept = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    total, n = 0.0, 0
    while n < len(kept) and total < sampling.top_p:
        total += float(probs[kept[n]])
        n += 1
    kept = kept[: min(n, sampling.top_k or n)]
    tempered = torch.full_like(logits, -math.inf)
    tempered[kept] = (logits[kept] - logits.max()) / sampling.temperature
    return tempered.softmax(0)


RANDOM = [
    Sampling(top_p=1.0),
    Sampling(top_p=0.37),
    Sampling(top_p=0.93, temperature=0.4),
    Sampling(top_p=0.8, temperature=3.0, top_k=6),
    Sampling(top_p=1.0, temperature=20.0, top_k=3),
    Sampling(top_p=1.0, temperature=1e-300),
    Sampling(top_p=0.999, temperature=1e300),
]


@pytest.mark.parametrize("sampling", RANDOM)
@pytest.mark.parametrize("seed", range(4))
def test_every_uniform_number_gives_the_token_at_which_the_kept_probabilities_exceed_it(sampling, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, 23, generator=generator)
    if seed % 2:
        logits = logits.round() / 2 + 100  # many equal
    barred = torch.rand(23, generator=generator) < 0.2
    n = 1001
    uniforms = torch.arange(n, dtype=torch.float64) / n
    ids, logprobs = sample_rows(logits.expand(n, 23), None, barred, settings_of([sampling] * n), uniforms)
    reached = by_hand(logits[0], barred, sampling).cumsum(0)
    want = torch.searchsorted(reached, uniforms, right=True)
    near = (uniforms[:, None] - reached).abs().amin(dim=1) < 1e-6  # 0 among them: the lowest id may be barred
    assert torch.equal(ids[~near], want[~near])
    assert int(near.sum()) < 20
    torch.testing.assert_close(logprobs, logits[0].log_softmax(0)[ids])


@pytest.mark.parametrize("sampling", [s for s in RANDOM if 0 < s.temperature < 1e300])
@pytest.mark.parametrize("ties", [False, True])
def test_what_can_be_drawn_is_what_the_sampler_of_single_rows_keeps(sampling, ties):
    generator = torch.Generator().manual_seed(11)
    for _ in range(10):
        logits = 2 * torch.randn(1, 50, generator=generator)
        logits = logits.round() if ties else logits
        kept = torch.arange(50)
        if sampling.top_p < 1 or sampling.top_k:
            kept = sampling_module_kept(logits[0], sampling)
        flat = Sampling(temperature=1e9, top_p=sampling.top_p, top_k=sampling.top_k)
        n = 8 * len(kept)
        uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        ids, _ = sample_rows(
            logits.expand(n, 50), None, torch.zeros(50, dtype=torch.bool), settings_of([flat] * n), uniforms
        )
        assert torch.equal(ids.unique(), kept)


def sampling_module_kept(logits, settings):
    return torch.from_numpy(sampling._kept(sampling.log_softmax(logits), settings))


def test_greedy_rows_take_the_lowest_of_the_largest_and_penalties_are_those_of_the_sampler():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 30, generator=generator).round()
    counts = (3 * torch.rand(60, 30, generator=generator)).floor()
    barred = torch.zeros(30, dtype=torch.bool)
    for settings in (Sampling(temperature=0), Sampling(top_p=0), Sampling(top_k=1, presence_penalty=0.7)):
        got, _ = sample_rows(logits, counts, barred, settings_of([settings] * 60), torch.full((60,), 0.99).double())
        wanted = [sampling.sample(row, settings, count, None) for row, count in zip(logits, counts, strict=True)]
        assert got.tolist() == wanted
    drawn = Sampling(top_p=1.0, presence_penalty=0.5, frequency_penalty=0.3)
    uniforms = torch.rand(60, generator=generator, dtype=torch.float64)
    plain = torch.stack([drawn.penalised(row, count) for row, count in zip(logits, counts, strict=True)])
    got, logprobs = sample_rows(logits, counts, barred, settings_of([drawn] * 60), uniforms)
    want, _ = sample_rows(plain, None, barred, settings_of([Sampling(top_p=1.0)] * 60), uniforms)
    assert torch.equal(got, want)
    torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, got[:, None])[:, 0])


def bad_rows():
    logits = torch.zeros(8, 9)
    logits[1, 4], logits[2, 8], logits[3] = math.nan, math.inf, -math.inf
    logits[4, :8], logits[5, 3], logits[6, 8] = -math.inf, -math.inf, math.nan
    barred = torch.zeros(9, dtype=torch.bool)
    barred[8] = True  # which is all that row 4 has
    settings = settings_of([Sampling(), Sampling(temperature=0)] * 4)
    return (logits, None, barred, settings, torch.full((8,), 0.3, dtype=torch.float64)), [1, 2, 3, 4, 6]


@pytest.mark.parametrize("by_kernel", [False, True])
def test_rows_that_are_not_finite_are_told_from_their_neighbours(by_kernel, request):
    arguments, bad = bad_rows()
    draw = request.getfixturevalue("emulated") if by_kernel else sample_rows
    ids, _ = draw(*arguments, **(dict(aligned=False) if by_kernel else {}))
    assert (ids < 0).nonzero()[:, 0].tolist() == bad


@pytest.mark.parametrize("by_kernel", [False, True])
def test_the_largest_uniform_number_takes_the_last_token_and_0_the_first(by_kernel, request):
    draw = request.getfixturevalue("emulated") if by_kernel else sample_rows
    barred = torch.zeros(5000, dtype=torch.bool)
    barred[:3] = True
    uniforms = torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    ids, _ = draw(torch.zeros(2, 5000), None, barred, settings_of([Sampling(top_p=1.0)] * 2), uniforms)
    assert ids.tolist() == [4999, 3]


@pytest.mark.parametrize("by_kernel", [False, True])
def test_top_p_a_little_above_what_tokens_sum_to_keeps_one_more(by_kernel, request):
    draw = request.getfixturevalue("emulated") if by_kernel else sample_rows
    settings = settings_of([Sampling(top_p=0.5), Sampling(top_p=0.5 + 2**-44)])  # of 2 x 2^42
    uniforms = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    ids, _ = draw(torch.zeros(2, 2), None, torch.zeros(2, dtype=torch.bool), settings, uniforms)
    assert ids.tolist() == [0, 1]


def test_weights_are_powers_of_two_to_seven_digits():
    distance = torch.cat([torch.linspace(0, 29, 20001), torch.tensor([math.inf, 1e30])])[None]
    got = weights(distance, torch.tensor([[LOG2_E]], dtype=torch.float64))[0]
    want = torch.exp(-distance[0].double()) * 2**42
    assert int(got[0]) == 2**42
    assert got[-2:].tolist() == [0, 0]
    assert ((got - want).abs() <= 3e-6 * want + 1).all()  # fp32 exponents up to 42


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(7)), r"logits must be \(n, V\), floating.*got \(7,\)"),
        (dict(logits=torch.zeros(5, 3).t()), "last stride of logits must be 1, got 3"),
        (dict(counts=torch.zeros(3, 4)), r"counts must be \(3, 5\) torch.float32 and contiguous, got \(3, 4\)"),
        (dict(barred=torch.zeros(5)), r"barred must be \(5,\) torch.bool.*float32"),
        (dict(settings=torch.zeros(3, 5)), r"settings must be \(3, 5\) torch.float64"),
        (dict(uniforms=torch.zeros(3, dtype=torch.float64, device="meta")), "must be on cpu; uniforms is on meta"),
        (dict(impl="fast"), "impl must be auto, reference, cuda; got 'fast'"),
        (dict(impl="cuda"), 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    arguments = dict(
        logits=torch.zeros(3, 5),
        counts=None,
        barred=torch.zeros(5, dtype=torch.bool),
        settings=settings_of([Sampling()] * 3),
        uniforms=torch.zeros(3, dtype=torch.float64),
    )
    with pytest.raises(KernelError, match=message):
        sample_rows(**(arguments | change))


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = cuda.FORM, lambda: sample_rows_choice(torch.device("cuda")), "reference", "sample_rows"
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


# What nvcc makes of the source


@needs_nvcc
@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        ("90a", [("float", "8, true")]),
        pytest.param(
            "90a",
            [(t, "1, false") for t in ("float", BFLOAT16, HALF)]
            + [("float", "8, false"), (BFLOAT16, "8, true"), (BFLOAT16, "8, false")],
            marks=pytest.mark.long,
        ),
        pytest.param("80", [("float", "1, false")], marks=pytest.mark.long),
    ],
    ids=["a cluster", "90a", "80"],
)
def test_the_kernel_compiles_without_spilling(tmp_path, arch, kinds):
    arguments = "int64_t, const float*, const bool*, const double*, const double*, int, bool, int64_t*, float*"
    forms = [f"sample_rows<{t}, {kind}>(const {t}*, {arguments})" for t, kind in kinds]
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch)


# On a GPU


@pytest.fixture
def on_gpu():
    """A function: the arguments of a problem -> the same on the device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return lambda arguments: [None if x is None else x.cuda() for x in arguments]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "vocab"), [(2000, 7), (2000, 1000), (60, 8200), (2000, 50277), (2000, 65536), (60, 65537), (3, 2**20)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_the_definition(on_gpu, n, vocab, dtype):
    arguments = on_gpu(problem(n, vocab, dtype))
    got = sample_rows(*arguments, impl="cuda")
    again = sample_rows(*arguments, impl="cuda")
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1].nan_to_num(), again[1].nan_to_num())
    logits, counts, barred, settings, uniforms = arguments
    parts = []
    for i in range(0, n, 100):  # sorting needs much more memory
        some = slice(i, i + 100)
        parts.append(sample_rows(logits[some], counts[some], barred, settings[some], uniforms[some], impl="reference"))
    compare(got, [torch.cat(part) for part in zip(*parts, strict=True)])
    for some in (slice(None, None, 7), slice(0, 16), slice(0, 1), slice(1, 2)):  # many rows, few, one that is mixed
        few = torch.arange(n, device=logits.device)[some]
        alone = sample_rows(logits[few], counts[few], barred, settings[few], uniforms[few], impl="cuda")
        assert torch.equal(alone[0], got[0][few])
        assert torch.equal(alone[1].nan_to_num(), got[1][few].nan_to_num())
    view = sample_rows(logits[:, : vocab - 1], None, barred[:-1], settings, uniforms, impl="cuda")
    whole = sample_rows(logits[:, : vocab - 1].contiguous(), None, barred[:-1].clone(), settings, uniforms, impl="cuda")
    assert torch.equal(view[0], whole[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("n_times", "vocab"), [(1, 65536), (1, 70001), (2, 65536)])  # once: clusters
def test_kernel_cuts_at_the_edges_of_bins(on_gpu, n_times, vocab):
    for seed in range(5):
        arguments = edges(vocab, seed)
        want = sample_rows(*arguments, impl="reference")
        rows, _, barred, settings, uniforms = on_gpu(arguments)
        again = [x.repeat(n_times, *[1] * (x.dim() - 1)) for x in (rows, settings, uniforms)]
        got = sample_rows(again[0], None, barred, *again[1:], impl="cuda")
        compare(got, [x.repeat(n_times) for x in want])


@pytest.mark.gpu
def test_kernel_tells_rows_that_are_not_finite(on_gpu):
    arguments, bad = bad_rows()
    ids, _ = sample_rows(*on_gpu(arguments), impl="cuda")
    assert (ids < 0).nonzero()[:, 0].tolist() == bad
