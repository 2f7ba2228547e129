"""heron.ops.shift_mix: the layers it stands for, its kernels by fp64, and the operator's gradients where no GPU is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heron.errors import KernelError
from heron.ops import _build, shift_mix
from heron.ops.shift_mix import cuda, shift_mix_choice
from tests.ops.kernels import BFLOAT16, check_that_a_failed_build_is_said_once, check_that_none_spills, needs_nvcc

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the norm of the difference


def problem(shape, n_mixes, dtype=torch.float64, branch=True, seed=0, device="cpu"):
    """x, branch, weight, bias and the mixes as leaves, and the gradients of x and of what is mixed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    C = shape[-1]
    leaves = [3 * normal(*shape) + 1, normal(*shape) if branch else None, 1 + 0.3 * normal(C), normal(C)]
    mixes = [0.5 + 0.4 * normal(1, 1, C) for _ in range(n_mixes)]
    for leaf in (*leaves, *mixes):
        if leaf is not None:
            leaf.requires_grad_()
    return leaves, mixes, [normal(*shape) for _ in range(n_mixes + 1)]


def results(leaves, mixes, gradients, **options):
    """What comes out, and the gradient of each leaf."""
    x, mixed = shift_mix(*leaves, mixes, **options)
    out = (x, *mixed)
    wanted = [leaf for leaf in (*leaves, *mixes) if leaf is not None]
    return [*out, *torch.autograd.grad(out, wanted, gradients, allow_unused=True)]


def in_fp64(leaves, mixes, gradients):
    def converted(tensors):
        return [None if t is None else t.detach().double().requires_grad_() for t in tensors]

    return converted(leaves), converted(mixes), [gradient.double() for gradient in gradients]


def distances(got, want):
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, want, strict=True)]
    return [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs]


def test_it_is_the_layers_it_stands_for():
    (x, branch, weight, bias), mixes, _ = problem((2, 5, 16), 2)
    norm = nn.LayerNorm(16, dtype=torch.float64)
    norm.load_state_dict(dict(weight=weight, bias=bias))
    total, mixed = shift_mix(x, branch, weight, bias, mixes)
    assert torch.equal(total, x + branch)
    for t in range(5):
        now = norm(x[:, t] + branch[:, t])
        before = norm(x[:, t - 1] + branch[:, t - 1]) if t else torch.zeros_like(now)
        for mix, got in zip(mixes, mixed, strict=True):
            torch.testing.assert_close(got[:, t], (1 - mix[0, 0]) * now + mix[0, 0] * before)
    assert shift_mix(x, None, weight, bias, mixes)[0] is x


@pytest.fixture
def operator_on_cpu():
    """heron::shift_mix for CPU tensors: the formulas of the kernels, over whole tensors."""
    library = torch.library.Library("heron", "IMPL")

    def forward(x, branch, weight, bias, mixes, eps):
        total = x if branch is None else x + branch
        variance, mean = torch.var_mean(total, dim=-1, correction=0, keepdim=True)
        stats = torch.cat((mean, (variance + eps).rsqrt()), dim=-1)
        normed = (total - stats[..., :1]) * stats[..., 1:] * weight + bias
        before = F.pad(normed, (0, 0, 1, -1))
        out = [normed + (before - normed) * mix for mix in mixes]
        return [*out, stats.view(-1, 2), *([] if branch is None else [total])]

    def backward(d_mixed, d_sum, total, stats, weight, bias, mixes):
        mean, scale = stats.view(*total.shape[:2], 2).split(1, dim=-1)
        centred = (total - mean) * scale
        normed = centred * weight + bias
        delta = F.pad(normed, (0, 0, 1, -1)) - normed
        to_before = sum(d * mix for d, mix in zip(d_mixed, mixes, strict=True))
        d_normed = sum(d_mixed) - to_before + F.pad(to_before, (0, 0, -1, 1))
        scaled = d_normed * weight
        d = (scaled - scaled.mean(-1, True) - centred * (scaled * centred).mean(-1, True)) * scale
        sums = [(d_normed * centred).sum((0, 1)), d_normed.sum((0, 1)), *((d * delta).sum((0, 1)) for d in d_mixed)]
        return [d if d_sum is None else d + d_sum, *sums]

    library.impl("shift_mix", forward, "CPU")
    library.impl("shift_mix_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("n_mixes", [1, 2, 6])
@pytest.mark.parametrize("branch", [True, False])
def test_the_operators_gradients_reach_every_leaf(operator_on_cpu, monkeypatch, n_mixes, branch):
    monkeypatch.setattr(cuda.FORM, "require", lambda *_: None)
    given = problem((2, 5, 16), n_mixes, branch=branch)
    got, want = results(*given, impl="cuda"), results(*given, impl="reference")
    if not branch:
        got, want = got[1:], want[1:]  # x itself
    assert max(distances(got, want)) < 1e-12


def test_it_is_traced_with_its_gradients(operator_on_cpu, monkeypatch):
    monkeypatch.setattr(cuda.FORM, "require", lambda *_: None)
    given = problem((2, 5, 16), 6)
    run = torch.compile(lambda *a: shift_mix(*a, impl="cuda"), backend="aot_eager", fullgraph=True, dynamic=False)
    leaves, mixes, gradients = given
    x, mixed = run(*leaves, mixes)
    got = [x, *mixed, *torch.autograd.grad((x, *mixed), (*leaves, *mixes), gradients)]
    assert max(distances(got, results(*given, impl="reference"))) < 1e-12


@pytest.mark.parametrize(
    ("shape", "n_mixes"),
    [
        pytest.param(shape, n_mixes, marks=needs_gpu)
        for shape in ((1, 1, 8), (2, 3, 64), (3, 37, 264), (1, 700, 768), (5, 1024, 768), (2, 555, 2048))
        for n_mixes in (1, 2, 6)
    ],
)
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_near_fp64(shape, n_mixes, branch, dtype):
    given = problem(shape, n_mixes, dtype, branch, device="cuda")
    got, again = results(*given, impl="cuda"), results(*given, impl="cuda")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    away = distances(got, results(*in_fp64(*given), impl="reference"))
    assert max(away) < TOLERANCE[dtype], away


@pytest.mark.parametrize("left_out", [pytest.param(None, marks=needs_gpu)])
def test_x_may_have_no_gradient_of_its_own_on_a_gpu(left_out):
    leaves, mixes, gradients = problem((2, 70, 128), 6, torch.float32, device="cuda")
    got, want = (
        torch.autograd.grad(shift_mix(*leaves, mixes, impl=impl)[1], leaves, gradients[1:])
        for impl in ("cuda", "reference")
    )
    assert max(distances(got, [part.double() for part in want])) < 1e-5


def test_a_form_that_cannot_run_here_says_what_to_type():
    leaves, mixes, _ = problem((1, 3, 8), 1)
    with pytest.raises(KernelError, match='impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'):
        shift_mix(*leaves, mixes, impl="cuda")
    with pytest.raises(KernelError, match="impl must be auto, reference, cuda; got 'fast'"):
        shift_mix(*leaves, mixes, impl="fast")
    with pytest.raises(KernelError, match="1, 2 or 6 mixes .* not 3 mixes"):
        shift_mix(*leaves, [mixes[0]] * 3, impl="cuda")
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
    part = dict(begin="constexpr int kMixes", end="Shape shape_of(", before="using std::min;")
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, "90", ["algorithm", _build.STRIPS], **part)
