"""AdamW for many tensors at once: the definition by torch.optim.AdamW, each form by the definition; the optimizer."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

import heron
from heron.errors import KernelError
from heron.ops import _build
from heron.ops.adamw import adamw_, cuda
from heron.optim import CopiedAdamW
from heron.train.step import Learner

EMULATOR = Path(__file__).parent / "emulator"

LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.99), 1e-18, 0.1
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = [(1,), (7,), (769,), (65537,), (3, 4), (1, 1, 8), (130, 512), (16384,), (64, 1024)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(shapes, dtype=torch.float32, device=CPU, misaligned=False):
    """weights, exp_avgs, exp_avg_sqs, steps and bf16 copies of tensors in training, every fourth of them new."""
    parts = [[numbers(*shape, seed=i) for i, shape in enumerate(shapes)]]
    parts += [[0.1 * (i % 4) * numbers(*shape, seed=100 + i) for i, shape in enumerate(shapes)]]
    parts += [[0.3 * (i % 4) * (0.1 + numbers(*shape, seed=200 + i) ** 2) for i, shape in enumerate(shapes)]]
    place = flattened if misaligned else lambda tensors: [tensor.clone() for tensor in tensors]
    weights, *moments = ([part.to(dtype) for part in tensors] for tensors in parts)
    weights, *moments = (place([part.to(device) for part in tensors]) for tensors in (weights, *moments))
    steps = [torch.tensor(3.0 * (i % 4), device=device) for i in range(len(shapes))]
    return weights, *moments, steps, place([weight.bfloat16() for weight in weights])


def flattened(tensors):
    """Equal tensors that lie in one block, one after the other, the first at an odd place."""
    block = torch.cat([tensors[0].new_zeros(1), *(tensor.flatten() for tensor in tensors)])
    return list(torch._C._nn.unflatten_dense_tensors(block[1:], tensors))


def gradients_of(shapes, step, dtype=torch.float32, device=CPU, misaligned=False):
    tensors = [(0.1 * numbers(*shape, seed=1000 * step + i)).to(device, dtype) for i, shape in enumerate(shapes)]
    return flattened(tensors) if misaligned else tensors


def stepped(parts, gradients, impl, decay=DECAY, grad_scale=None, found_inf=None):
    """One step in place; `impl` is one of adamw_, or a function that takes its other arguments."""
    weights, exp_avgs, exp_avg_sqs, steps, copies = parts
    given = (weights, gradients, exp_avgs, exp_avg_sqs, steps, copies, LR, BETAS, EPS, decay, grad_scale, found_inf)
    if callable(impl):
        impl(*given)
    else:
        adamw_(*given, impl)


def clones(parts, dtype=None, device=None):
    return [[part.to(device, dtype if part.dim() else None, copy=True) for part in tensors] for tensors in parts]


def copies_are_the_weights(parts):
    return all(torch.equal(copy, weight.bfloat16()) for weight, copy in zip(parts[0], parts[-1], strict=True))


def same(these, those):
    return all(
        torch.equal(a, b) for one, other in zip(these, those, strict=True) for a, b in zip(one, other, strict=True)
    )


def assert_near(got, exact, rtol, atol):
    """Weights, moments and steps within `rtol` and `atol` of fp64."""
    for some, others in zip(got[:4], exact[:4], strict=True):
        for a, b in zip(some, others, strict=True):
            torch.testing.assert_close(a.double().cpu(), b.double().cpu(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_it_is_torchs_adamw(dtype, tolerance, decay, impl):
    shapes = SHAPES[:3]
    parts = [[part * 0 for part in tensors] for tensors in problem(shapes, dtype)]
    theirs = [torch.nn.Parameter(numbers(*shape).to(dtype)) for shape in shapes]
    parts[0] = [weight.detach().clone() for weight in theirs]
    options = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, fused=False, foreach=False)
    optimizer = torch.optim.AdamW(theirs, **options)
    for step in range(4):
        given = gradients_of(shapes, step, dtype)
        for weight, gradient in zip(theirs, given, strict=True):
            weight.grad = gradient / 3
        stepped(parts, given, impl, decay, grad_scale=torch.tensor(3.0))
        optimizer.step()
    for weight, m, v, step, their in zip(*parts[:4], theirs, strict=True):
        state = optimizer.state[their]
        for ours, wanted in ((weight, their), (m, state["exp_avg"]), (v, state["exp_avg_sq"]), (step, state["step"])):
            torch.testing.assert_close(ours, wanted.detach(), rtol=tolerance, atol=tolerance)
    assert copies_are_the_weights(parts)


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_held_back_changes_nothing(dtype, impl):
    parts = problem(SHAPES[:3])
    before = clones(parts)
    given = gradients_of(SHAPES[:3], 0, dtype)
    given[1][0] = math.nan
    stepped(parts, given, impl, grad_scale=torch.tensor(math.nan), found_inf=torch.tensor(1.0))
    assert same(parts, before)
    stepped(parts, gradients_of(SHAPES[:3], 0, dtype), impl, found_inf=torch.tensor(0.0))
    assert not any(torch.equal(a, b) for a, b in zip(parts[0], before[0], strict=True))
    assert [float(step) for step in parts[3]] == [1, 4, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(impl="gpu"), "impl must be auto, reference, fused, cuda; got 'gpu'"),
        (dict(impl="cuda"), 'impl="cuda": it needs tensors on a CUDA device, got cpu'),
        (dict(steps=[]), "as many steps as weights, 2; got 0"),
        (dict(copies=[torch.zeros(1)]), "as many copies as weights, 2; got 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    weights, exp_avgs, exp_avg_sqs, steps, copies = problem(SHAPES[:2])
    given = dict(
        weights=weights, gradients=gradients_of(SHAPES[:2], 0), exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps,
        copies=copies, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, impl="reference",
    )  # fmt: skip
    with pytest.raises(KernelError, match=said):
        adamw_(**given | change)


# -- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("from_copies", [True, False])
def test_the_optimizer_is_torchs_whose_gradients_come_from_copies(random_model, from_copies, impl):
    ours, theirs = random_model(variant="v7"), random_model(variant="v7")
    copies = {master: torch.nn.Parameter(master.detach().bfloat16()) for master in ours.parameters()}
    optimizer = heron.build_optimizer(ours, LR, DECAY, BETAS, EPS, copies=copies)
    optimizer.impl = impl
    assert isinstance(optimizer, CopiedAdamW)
    plain = heron.build_optimizer(theirs, LR, DECAY, BETAS, EPS)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))[3:]  # some were not used
    unused = [(ours.emb.weight.detach().clone(), ours.emb.weight)]
    for step in range(3):
        for i, (mine, other) in enumerate(pairs):
            gradient = numbers(*mine.shape, seed=100 * step + i).bfloat16()
            other.grad = gradient.float() / 2
            if from_copies:
                copies[mine].grad = gradient
            else:
                mine.grad = gradient.float()
        for one in (optimizer, plain):
            one.found_inf = torch.tensor(float(step == 1))
            heron.optim.set_lr(one, LR / (1 + step))
        optimizer.grad_scale = torch.tensor(2.0)
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
        assert all(leaf.grad is None for leaf in (*copies, *copies.values()))
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
            for name, value in plain.state[other].items():
                torch.testing.assert_close(optimizer.state[mine][name], value, rtol=1e-6, atol=1e-7)
            assert torch.equal(copies[mine], mine.bfloat16())
    assert all(torch.equal(before, after) for before, after in unused)
    mine, other = optimizer.state_dict(), plain.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert {key: list(state) for key, state in mine["state"].items()} == {
        key: list(state) for key, state in other["state"].items()
    }


def learner_of(model, device=CPU, **changes):
    settings = dict(max_steps=1, dtype="bf16", weights="bf16", compile="off", grad_clip=0.05, weight_decay=DECAY)
    return Learner(model, heron.TrainConfig(**{**settings, **changes}), device)


@pytest.mark.parametrize(("variant", "tables"), [("v7", "device"), ("v8", "device"), ("v8", "host")])
def test_a_learners_step_is_clipped_adamw_on_its_masters(random_model, variant, tables):
    learner, model = learner_of(random_model(variant=variant), tables=tables), random_model(variant=variant)
    plain = heron.build_optimizer(model, 1e-3, DECAY, eps=1e-18)
    heron.optim.set_lr(plain, 1e-3)
    tokens = torch.arange(36).view(2, 18)  # the same in each step, so that AdamW by rows is dense AdamW
    for step in range(3):
        loss = learner.gradients([(tokens, (tokens + step) % 37)])
        by_rows = learner.tables is not None
        brought = dict(zip(learner.tables.weights, learner.tables.rows, strict=True)) if by_rows else {}
        for (copy, master), other in zip(learner.leaves.pairs, model.parameters(), strict=True):
            assert copy is master or master.grad is None
            other.grad = None if copy.grad is None else copy.grad.to(torch.float32, copy=True)
            if master in brought:
                other.grad = torch.zeros_like(other).index_copy_(0, learner.tables.ids, brought[master].grad)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        plain.step()
        said = learner.update(loss, 1e-3, math.inf)
        assert norm > 0.05
        assert float(said[1]) == pytest.approx(float(norm), rel=1e-6)
        for (name, master), other in zip(learner.model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(master, other, rtol=1e-5, atol=1e-6, msg=name)
        for copy, master in learner._copies:
            assert torch.equal(copy, master.bfloat16())
            assert copy.grad is None


def test_a_learners_bad_step_leaves_no_trace(random_model):
    learner = learner_of(random_model(variant="v7"))
    tokens = torch.arange(36).view(2, 18)
    learner.update(learner.gradients([(tokens, tokens + 1)]), 1e-3, math.inf)

    def all_of_it():
        state = [value for weight in learner.model.parameters() for value in learner.optimizer.state[weight].values()]
        return [part.detach().clone() for part in (*learner.model.parameters(), *learner.network.parameters(), *state)]

    before = all_of_it()
    verdict = learner.update(learner.gradients([(tokens, tokens + 1)]), 1e-3, 0.0)
    assert verdict[2] == 1
    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), before, strict=True))


# -- the kernel, as it is on a GPU, and its source on a CPU -----------------------------------------------------------


def emulated():
    """The kernels' source compiled for a CPU, as a function of what adamw_ takes."""
    flags = ("-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
    depends = [cuda.SOURCE, _build.CHUNKS, EMULATOR / "hardware.h", EMULATOR / "numbers.h"]
    library = _build.load_c_library("adamw_emulated", [EMULATOR / "adamw.cpp"], flags, depends)
    library.adamw_emulated.restype = ctypes.c_char_p

    def place(tensor):
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    def step(weights, gradients, exp_avgs, exp_avg_sqs, steps, copies, lr, betas, eps, decay, grad_scale, found_inf):
        of_each = zip(weights, exp_avgs, exp_avg_sqs, steps, gradients, copies or [None] * len(weights), strict=True)
        pointers = [place(tensor) for tensors in of_each for tensor in tensors]
        error = library.adamw_emulated(
            len(weights), (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(weights))(*(weight.numel() for weight in weights)),
            int(gradients[0].dtype == torch.bfloat16), *map(ctypes.c_double, (lr, *betas, eps, decay)),
            place(grad_scale), place(found_inf),
        )  # fmt: skip
        assert error is None, error.decode()

    return step


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def kernel(request):
    """A device and the kernel for it, as :func:`stepped` takes it."""
    if request.param == "cuda":
        return GPU, "cuda"
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return CPU, emulated()


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shapes", [SHAPES, [(36,)] * 600, [(5,), (1 << 18,), (3,)]], ids=["mixed", "many", "uneven"])
def test_the_kernel_is_as_near_to_fp64_as_fp32_can_be(kernel, shapes, dtype, misaligned):
    device, impl = kernel
    parts = problem(shapes, device=device, misaligned=misaligned)
    for step in range(3):
        exact, torchs = clones(parts, torch.float64), clones(parts)
        given = gradients_of(shapes, step, dtype, device, misaligned)
        decay, scale = DECAY * (step % 2), torch.tensor(1.7, device=device) if step > 0 else None
        stepped([*exact[:4], []], given, "reference", decay, scale)
        stepped(parts, given, impl, decay, scale)
        stepped(torchs, [gradient.clone() for gradient in given], "fused", decay, scale)
        assert_near(parts, exact, rtol=5e-7, atol=1e-7)
        ours, theirs = (
            max(float((a - b).abs().max()) for a, b in zip(some[0], exact[0], strict=True)) for some in (parts, torchs)
        )
        assert ours <= 2 * theirs
        assert copies_are_the_weights(parts)


@pytest.mark.parametrize("misaligned", [False, True])
def test_the_kernel_gives_the_same_bits_from_either_dtype_wherever_the_tensors_lie(kernel, misaligned):
    device, impl = kernel
    parts, others = problem(SHAPES, device=device, misaligned=misaligned), problem(SHAPES, device=device)
    for step in range(2):
        given = gradients_of(SHAPES, step, torch.bfloat16, device)
        stepped(parts, flattened(given) if misaligned else given, impl)
        stepped([*others[:4], []], [gradient.float() for gradient in given], impl)
    assert same(parts[:4], others[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_holds_a_bad_step_back(kernel, dtype):
    device, impl = kernel
    parts = problem(SHAPES, device=device)
    before, given = clones(parts), gradients_of(SHAPES, 0, dtype, device)
    given[2][0] = math.inf
    nan, bad, good = (torch.tensor(value, device=device) for value in (math.nan, 1.0, 0.0))
    stepped(parts, given, impl, grad_scale=nan, found_inf=bad)
    assert same(parts, before)
    stepped(parts, gradients_of(SHAPES, 0, dtype, device), impl, found_inf=good)
    assert [float(step) for step in parts[3]] == [3 * (i % 4) + 1 for i in range(len(SHAPES))]


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_the_kernel_refuses_what_it_cannot_take():
    parts = problem(SHAPES, device=GPU)
    wrong = [
        gradient.bfloat16() if i == 3 else gradient for i, gradient in enumerate(gradients_of(SHAPES, 0, device=GPU))
    ]
    with pytest.raises(RuntimeError, match="Float"):
        stepped(parts, wrong, "cuda")
    with pytest.raises(RuntimeError, match="gradients must be contiguous, of the shape"):
        stepped(parts, gradients_of(SHAPES[::-1], 0, device=GPU), "cuda")
    with pytest.raises(KernelError, match="it takes fp32, not"):
        stepped(clones(parts, torch.float64), gradients_of(SHAPES, 0, device=GPU), "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("changes", [{}, dict(variant="v8"), dict(accumulate=2), dict(compile="graph")], ids=str)
def test_a_learner_with_the_kernel_trains_as_with_torchs_and_gives_the_same_bits_twice(random_model, changes):
    model = dict(variant=changes.get("variant", "v7"), n_embd=128, head_size=64, ffn_dim=256, vocab_size=256)
    rest = {name: value for name, value in changes.items() if name != "variant"}

    def trained(impl):
        learner = learner_of(random_model(**model), GPU, adam_eps=1e-4, **rest)
        learner.optimizer.impl = impl
        lines = []
        for step in range(6):
            ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(step))
            samples = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * rest.get("accumulate", 1)
            lines.append(learner.update(learner.gradients(samples), 1e-3, math.inf))
            assert all(torch.equal(copy, master.bfloat16()) for copy, master in learner._copies)
        return torch.stack(lines), [weight.detach().clone() for weight in learner.model.parameters()]

    first, again, torchs = (trained(impl) for impl in ("cuda", "auto", "fused"))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    # Last bits differ. An epsilon near the clipped gradients' own size keeps them from becoming whole steps.
    torch.testing.assert_close(first[0], torchs[0], rtol=1e-2, atol=1e-3)
