"""heron.ops.shift_mix: the layers it stands for, its kernels by fp64, and the operator's gradients where no GPU is."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from heron.errors import KernelError
from heron.ops import _build, shift_mix
from heron.ops.shift_mix import cuda, shift_mix_choice
from tests.ops.kernels import (
    BFLOAT16,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    kernels_launched,
    needs_nvcc,
)

EMULATOR = Path(__file__).parent / "emulator"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the norm of the difference


def problem(shape, n_mixes, dtype=torch.float64, branch=True, last=False, lengths=None, seed=0, device="cpu"):
    """Leaves by the names of shift_mix, cu_seqlens of sequences of `lengths`, and gradients of all that comes out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    C, n_seq = shape[-1], shape[0] if lengths is None else len(lengths)
    leaves = dict(x=3 * normal(*shape) + 1, branch=normal(*shape), weight=1 + 0.3 * normal(C), bias=normal(C))
    mixes = [0.5 + 0.4 * normal(1, 1, C) for _ in range(n_mixes)]
    leaves["last"] = normal(n_seq, C)
    for name, wanted in (("branch", branch), ("last", last)):
        if not wanted:
            leaves[name] = None
    for leaf in (*leaves.values(), *mixes):
        if leaf is not None:
            leaf.requires_grad_()
    offsets = None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return leaves, mixes, offsets, [*(normal(*shape) for _ in range(n_mixes + 1)), normal(n_seq, C)]


def results(leaves, mixes, offsets, gradients, **options):
    """What comes out, and the gradient of each leaf."""
    x, mixed, last = shift_mix(**leaves, mixes=mixes, cu_seqlens=offsets, **options)
    out = (x, *mixed, last)
    wanted = [leaf for leaf in (*leaves.values(), *mixes) if leaf is not None]
    return [*out, *torch.autograd.grad(out, wanted, gradients, allow_unused=True)]


def in_fp64(leaves, mixes, offsets, gradients):
    def converted(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_()

    leaves = {name: converted(leaf) for name, leaf in leaves.items()}
    return leaves, [*map(converted, mixes)], offsets, [gradient.double() for gradient in gradients]


def distances(got, want):
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, want, strict=True)]
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs]


def test_it_is_the_layers_it_stands_for():
    leaves, mixes, *_ = problem((2, 5, 16), 2, last=True)
    x, branch, weight, bias, last = leaves.values()
    norm = nn.LayerNorm(16, dtype=torch.float64)
    norm.load_state_dict(dict(weight=weight, bias=bias))
    total, mixed, new_last = shift_mix(x, branch, weight, bias, mixes, last)
    assert torch.equal(total, x + branch)
    for t in range(5):
        now = norm(x[:, t] + branch[:, t])
        before = norm(x[:, t - 1] + branch[:, t - 1]) if t else last
        for mix, got in zip(mixes, mixed, strict=True):
            torch.testing.assert_close(got[:, t], (1 - mix[0, 0]) * now + mix[0, 0] * before)
    torch.testing.assert_close(new_last, now)
    assert shift_mix(x, None, weight, bias, mixes)[0] is x
    for with_zeros, without in zip(
        shift_mix(x, branch, weight, bias, mixes, torch.zeros_like(last))[1],
        shift_mix(x, branch, weight, bias, mixes)[1],
        strict=True,
    ):
        assert torch.equal(with_zeros, without)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("lengths", [[7], [3, 4], [0, 1, 0, 0, 5, 1, 0]])
def test_packed_sequences_are_as_each_alone(lengths, last):
    leaves, mixes, offsets, gradients = problem((1, 7, 16), 2, last=last, lengths=lengths)
    got = results(leaves, mixes, offsets, gradients)
    alone = []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        before = None if leaves["last"] is None else leaves["last"][i : i + 1]
        if begin == end:
            nothing = leaves["x"][:, :0]
            alone.append([nothing] * 3 + [leaves["x"].new_zeros(1, 16) if before is None else before])
            continue
        x, branch = (leaves[name][:, begin:end] for name in ("x", "branch"))
        total, mixed, new_last = shift_mix(x, branch, leaves["weight"], leaves["bias"], mixes, before)
        alone.append([total, *mixed, new_last])
    out = [torch.cat(parts, dim=1) for parts in list(zip(*alone, strict=True))[:3]]
    out.append(torch.cat([parts[3] for parts in alone]))
    wanted = [leaf for leaf in (*leaves.values(), *mixes) if leaf is not None]
    want = [*out, *torch.autograd.grad(out, wanted, gradients)]
    assert max(distances(got, want)) < 1e-12


@pytest.fixture(scope="module")
def kernels_on_cpu():
    """heron::shift_mix for CPU tensors: the kernels' source, compiled for a CPU; in strips of three tokens.

    It gives a list to which each call of the backward adds how many sums over tokens it was asked for.
    """
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler on the path")
    depends = [cuda.SOURCE, _build.STRIPS, EMULATOR / "hardware.h", EMULATOR / "single_token.h"]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    emulated = _build.load_c_library("shift_mix_emulated", [EMULATOR / "shift_mix.cpp"], flags, depends)
    emulated.shift_mix_emulated.restype = ctypes.c_char_p
    strip, summed = 3, []

    def pointers(tensors):
        given = [x for x in tensors if x is not None]
        assert all(x.is_contiguous() for x in given)
        return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))

    def run(back, x, ins, norm, outs, begins, eps=0.0):
        B, T, C = x.shape
        n_seq = B if begins is None else len(begins) - 1
        error = emulated.shift_mix_emulated(
            int(x.dtype == torch.bfloat16), int(back), len(norm) - 2, pointers(ins), pointers(norm), pointers(outs),
            (ctypes.c_int * 5)(B * T, T, C, strip, n_seq),
            ctypes.c_void_p(None if begins is None else begins.data_ptr()), ctypes.c_float(eps),
        )  # fmt: skip
        assert error is None, error.decode()

    def of_sequences(x, begins, otherwise):
        n_seq = len(x) if begins is None else len(begins) - 1
        if begins is None:
            return torch.full((n_seq, x.shape[2]), torch.nan, dtype=x.dtype)
        return x.new_zeros(n_seq, x.shape[2]) if otherwise is None else otherwise.clone()

    def forward(x, branch, weight, bias, mixes, last, begins, eps):
        stats = torch.full((x.shape[0] * x.shape[1], 2), torch.nan)
        mixed = [torch.full_like(x, torch.nan) for _ in mixes]
        new_last = of_sequences(x, begins, last)
        total = None if branch is None else torch.full_like(x, torch.nan)
        outs = [*mixed, stats, new_last, total]
        run(False, x, [x, branch, last], [weight, bias, *mixes], outs, begins, eps)
        return outs if total is not None else outs[:-1]

    def backward(d_mixed, d_sum, d_new_last, total, stats, weight, bias, mixes, last, begins, of_weights):
        summed.append(len(mixes) + 2 if of_weights else 0)
        strips = -(-total.shape[0] * total.shape[1] // strip)
        d, of_strip = torch.full_like(total, torch.nan), None
        if of_weights:
            of_strip = torch.full((strips, summed[-1], total.shape[2]), torch.nan)
        d_last = None if last is None else of_sequences(total, begins, d_new_last)
        ins = [d_sum, d_new_last, total, stats, last, *d_mixed]
        run(True, total, ins, [weight, bias, *mixes], [d, of_strip, d_last], begins)
        *d_mixes, d_weight, d_bias = (None, None) if of_strip is None else of_strip.sum(0).to(total.dtype)
        return [x for x in (d, d_weight, d_bias, *d_mixes, d_last) if x is not None]

    library = torch.library.Library("heron", "IMPL")
    library.impl("shift_mix", forward, "CPU")
    library.impl("shift_mix_backward", backward, "CPU")
    yield summed
    library._destroy()


@pytest.fixture
def emulated(kernels_on_cpu, monkeypatch):
    """impl="cuda" runs on a CPU."""
    monkeypatch.setattr(cuda.FORM, "require", lambda *_: None)


def compare_with_fp64(given, dtype):
    """Within TOLERANCE, or twice the error of PyTorch in the same dtype."""
    want = results(*in_fp64(*given), impl="reference")
    away, eager = distances(results(*given, impl="cuda"), want), distances(results(*given, impl="reference"), want)
    assert all(a <= max(TOLERANCE[dtype], 2 * e) for a, e in zip(away, eager, strict=True)), (away, eager)


@pytest.mark.parametrize("n_mixes", [1, 2, 6])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("lengths", [None, [0, 1, 7, 0, 0, 2, 0]], ids=str)
def test_the_kernels_source_on_a_cpu_is_near_fp64(emulated, n_mixes, branch, last, lengths):
    shape = (2, 5, 40) if lengths is None else (1, 10, 40)
    compare_with_fp64(problem(shape, n_mixes, torch.float32, branch, last, lengths), torch.float32)


@pytest.mark.parametrize("n_mixes", [1, 6])
@pytest.mark.parametrize("lengths", [None, [3, 0, 4]], ids=str)
def test_the_kernels_source_in_bf16_on_a_cpu_is_near_fp64(emulated, n_mixes, lengths):
    shape = (2, 4, 40) if lengths is None else (1, 7, 40)
    compare_with_fp64(problem(shape, n_mixes, torch.bfloat16, True, True, lengths), torch.bfloat16)


def test_cut_anywhere_the_kernels_go_on_as_the_whole(emulated):
    leaves, mixes, _, _ = problem((2, 7, 16), 2, torch.float32, last=True)
    whole = shift_mix(**leaves, mixes=mixes, impl="cuda")
    for cut in range(1, 7):
        last, parts = leaves["last"], []
        for piece in (slice(0, cut), slice(cut, None)):
            given = {**leaves, "x": leaves["x"][:, piece], "branch": leaves["branch"][:, piece], "last": last}
            x, mixed, last = shift_mix(**given, mixes=mixes, impl="cuda")
            parts.append((x, *mixed))
        for got, want in zip(
            (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)), (whole[0], *whole[1]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(last, whole[2])


def test_gradients_reach_x_alone(emulated):
    leaves, mixes, _, gradients = problem((2, 5, 16), 6, torch.float32)
    got, want = (
        torch.autograd.grad(
            shift_mix(**leaves, mixes=mixes, impl=impl)[1], [leaves["x"], leaves["bias"]], gradients[1:7]
        )
        for impl in ("cuda", "reference")
    )
    assert max(distances(got, [part.double() for part in want])) < 1e-5


def with_frozen_weights(leaves, mixes, gradients, call=shift_mix):
    """The gradients of x, branch and last must be bit-equal whether or not those of the weights are computed."""
    every = results(leaves, mixes, None, gradients, impl="cuda")[len(mixes) + 2 :]
    every = dict(zip((name for name, leaf in leaves.items() if leaf is not None), every, strict=False))  # then mixes
    for weight in (leaves["weight"], leaves["bias"], *mixes):
        weight.requires_grad_(False)
    x, mixed, last = call(**leaves, mixes=mixes, impl="cuda")
    wanted = [name for name in ("x", "branch", "last") if leaves[name] is not None]
    got = torch.autograd.grad((x, *mixed, last), [leaves[name] for name in wanted], gradients)
    assert all(torch.equal(gradient, every[name]) for name, gradient in zip(wanted, got, strict=True))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_frozen_weights_are_not_summed_for(emulated, kernels_on_cpu, last, traced):
    leaves, mixes, _, gradients = problem((2, 5, 16), 6, torch.float32, last=last)
    torch._dynamo.reset()
    traceable = torch.compile(shift_mix, backend="aot_eager", fullgraph=True, dynamic=False)
    kernels_on_cpu.clear()
    with_frozen_weights(leaves, mixes, gradients, traceable if traced else shift_mix)
    assert kernels_on_cpu == [8, 0]


@pytest.mark.parametrize("trains", ["weight", "bias", 0, 5])
def test_one_weight_that_trains_has_its_gradient(emulated, trains):
    leaves, mixes, _, gradients = problem((2, 5, 16), 6, torch.float32)
    every = results(leaves, mixes, None, gradients, impl="cuda")[8:]  # of x, branch, weight, bias and the mixes
    weights = {"weight": leaves["weight"], "bias": leaves["bias"], **dict(enumerate(mixes))}
    for name, weight in weights.items():
        weight.requires_grad_(name == trains)
    x, mixed, last = shift_mix(**leaves, mixes=mixes, impl="cuda")
    (got,) = torch.autograd.grad((x, *mixed, last), [weights[trains]], gradients)
    assert torch.equal(got, every[2 + list(weights).index(trains)])


@pytest.mark.parametrize("last", [True, False])
def test_it_is_traced_with_its_gradients(emulated, last):
    leaves, mixes, _, gradients = problem((2, 5, 16), 6, torch.float32, last=last)
    run = torch.compile(shift_mix, backend="aot_eager", fullgraph=True, dynamic=False)
    x, mixed, new_last = run(**leaves, mixes=mixes, impl="cuda")
    wanted = [leaf for leaf in (*leaves.values(), *mixes) if leaf is not None]
    got = [x, *mixed, new_last, *torch.autograd.grad((x, *mixed, new_last), wanted, gradients)]
    want = results(leaves, mixes, None, gradients, impl="cuda")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("shape", "n_mixes"),
    [
        pytest.param(shape, n_mixes, marks=needs_gpu)
        for shape in ((1, 1, 8), (2, 3, 64), (3, 37, 264), (1, 700, 768), (5, 1024, 768), (2, 555, 2048))
        for n_mixes in (1, 2, 6)
    ],
)
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_near_fp64(shape, n_mixes, branch, last, dtype):
    given = problem(shape, n_mixes, dtype, branch, last, device="cuda")
    got, again = results(*given, impl="cuda"), results(*given, impl="cuda")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    compare_with_fp64(given, dtype)


@pytest.mark.parametrize("n_mixes", [pytest.param(n, marks=needs_gpu) for n in (1, 6)])
@pytest.mark.parametrize("lengths", [[5000], [1, 0, 700, 33, 0, 0, 2000, 1, 2265, 0], [7] * 714 + [2]], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_by_the_kernels_are_near_fp64(n_mixes, lengths, dtype):
    compare_with_fp64(problem((1, 5000, 264), n_mixes, dtype, True, True, lengths, device="cuda"), dtype)


@pytest.mark.parametrize("left_out", [pytest.param(None, marks=needs_gpu)])
def test_x_may_have_no_gradient_of_its_own_on_a_gpu(left_out):
    leaves, mixes, _, gradients = problem((2, 70, 128), 6, torch.float32, device="cuda")
    got, want = (
        torch.autograd.grad(
            shift_mix(**leaves, mixes=mixes, impl=impl)[1], [leaves["x"], leaves["bias"]], gradients[1:7]
        )
        for impl in ("cuda", "reference")
    )
    assert max(distances(got, [part.double() for part in want])) < 1e-5


@pytest.mark.parametrize("n_mixes", [pytest.param(n, marks=needs_gpu) for n in (1, 6)])
def test_on_a_gpu_frozen_weights_are_not_summed_for(n_mixes):
    leaves, mixes, _, gradients = problem((2, 70, 128), n_mixes, torch.bfloat16, device="cuda")
    results(leaves, mixes, None, gradients, impl="cuda")
    launched = kernels_launched(lambda: with_frozen_weights(leaves, mixes, gradients))
    assert launched.count("add_up_strips") == 1  # beside those of the weights
    assert launched.count("backward") == 2


def test_a_form_that_cannot_run_here_says_what_to_type():
    leaves, mixes, *_ = problem((1, 3, 8), 1)
    with pytest.raises(KernelError, match='impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'):
        shift_mix(**leaves, mixes=mixes, impl="cuda")
    with pytest.raises(KernelError, match="impl must be auto, reference, cuda; got 'fast'"):
        shift_mix(**leaves, mixes=mixes, impl="fast")
    with pytest.raises(KernelError, match="1, 2 or 6 mixes .* not 3 mixes"):
        shift_mix(**leaves, mixes=[mixes[0]] * 3, impl="cuda")
    with pytest.raises(KernelError, match=r"last must be \(n_seq, C\) = \(1, 8\), got \(2, 8\)"):
        shift_mix(**{**leaves, "last": torch.zeros(2, 8)}, mixes=mixes)
    for offsets, words in (
        (
            torch.tensor([0.0, 3.0]),
            r"must be \(n_seq \+ 1,\), n_seq >= 1, int32 or int64, on cpu; got \(2,\) torch.float",
        ),
        ([0, 3], "must be .* got list"),
        (torch.tensor([0, 4]), r"must go from 0 to T = 3 and never decrease; got \[0, 4\]"),
        (torch.tensor([1, 3]), r"must go from 0 to T = 3"),
        (torch.tensor([0, 2, 1, 3]), ".* never decrease"),
    ):
        with pytest.raises(KernelError, match=f"shift_mix: cu_seqlens {words}"):
            shift_mix(**leaves, mixes=mixes, cu_seqlens=offsets)
    for shape in ((1, 0, 8), (3, 8)):
        with pytest.raises(KernelError, match=r"x must be \(B, T, C\) with T >= 1"):
            shift_mix(**{**leaves, "x": torch.zeros(shape), "branch": None}, mixes=mixes)
    reason = cuda.why_not(torch.device("cuda"), torch.float16, 768)
    assert reason == "it takes fp32 and bf16, not torch.float16"
    assert cuda.why_not(torch.device("cuda"), torch.bfloat16, 2056) == "it takes C = 8, 16, ... 2048, not 2056"
    assert cuda.why_not(torch.device("cuda"), torch.bfloat16, 2048) is None


def test_kernels_that_cannot_be_built_are_said_once(monkeypatch, capsys):
    said = "reference", "shift_mix"
    check_that_a_failed_build_is_said_once(
        monkeypatch, capsys, cuda.FORM, lambda: shift_mix_choice(torch.device("cuda")), *said
    )


@needs_nvcc
def test_the_kernels_compile_without_spilling(tmp_path):
    forms = [
        form
        for t, width in (("float", 4), (BFLOAT16, 8))
        for n in (1, 6)
        for form in (f"forward<{t}, {width}, {n}>(const Forward<{t}>)", f"backward<{t}, {n}>(const Backward<{t}>)")
    ]
    part = dict(begin="constexpr int kMixes", end="#ifdef __CUDACC__\n// But for `strip`.", before="using std::min;")
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, "90a", ["algorithm", _build.STRIPS], **part)
