"""heron.ops.linear_cross_entropy: the definition by finite differences, the chunked form by the definition."""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heron.errors import KernelError
from heron.ops import cross_entropy, linear_cross_entropy
from heron.ops.linear_cross_entropy import cuda, linear_cross_entropy_choice
from heron.ops.linear_cross_entropy.chunked import linear_cross_entropy_chunked
from heron.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.ops.kernels import (
    ARCHITECTURES,
    BFLOAT16,
    HALF,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)

IMPLS = ("reference", "chunked")


def problem(ignored=(3, 8), shape=(2, 7), vocab=11, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, shape, generator=generator)
    targets.view(-1)[list(ignored)] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def bonus_of(targets, n_ids, dtype=torch.float64, vocab=11):
    """Ids, of which some are the target's and some repeat in their row, and values."""
    generator = torch.Generator().manual_seed(n_ids)
    ids = torch.randint(vocab, (*targets.shape, n_ids), generator=generator)
    if n_ids:
        flat = ids.view(-1, n_ids)
        flat[::2, 0] = targets.flatten()[::2].clamp(min=0)
        flat[::4, -1] = flat[::4, 0]
    values = 2 * torch.randn(ids.shape, generator=generator, dtype=torch.float64)
    return ids, values.to(dtype).requires_grad_()


def dense_objective(hidden, weight, targets, l2wrap, ids=None, values=None):
    """What is differentiated, from matrices alone: every logit's bonus is written out, (rows, V)."""
    kept = targets.flatten() != -100
    logits = hidden @ weight.T
    if values is not None:
        logits = logits + (F.one_hot(ids, weight.shape[0]) * values.unsqueeze(-1)).sum(dim=-2)
    logits = logits.flatten(0, -2)[kept]
    c = l2wrap / len(logits)
    return F.cross_entropy(logits, targets.flatten()[kept]) + c / 2 * logits.amax(dim=-1).square().sum()


def check_by_finite_differences(objective, tensors, grads):
    """Of `objective`, a function of nothing that reads `tensors`."""
    step = 1e-6
    for tensor, grad in zip(tensors, grads, strict=True):
        numeric = torch.empty_like(grad)
        with torch.no_grad():
            for i in range(tensor.numel()):
                values = []
                for sign in (1, -1):
                    tensor.view(-1)[i] += sign * step
                    values.append(objective())
                    tensor.view(-1)[i] -= sign * step
                numeric.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_value_is_plain_cross_entropy(impl):
    hidden, weight, targets = problem()
    want = F.cross_entropy((hidden @ weight.T).view(-1, 11), targets.view(-1), ignore_index=-100)
    for l2wrap in (0.0, 1e-4, 10.0):
        got = linear_cross_entropy(hidden, weight, targets, l2wrap, impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("l2wrap", [0.0, 1e-4, 0.7])
def test_gradient_by_finite_differences(impl, l2wrap):
    hidden, weight, targets = problem()
    grads = gradients(linear_cross_entropy(hidden, weight, targets, l2wrap, impl=impl), hidden, weight)
    check_by_finite_differences(lambda: dense_objective(hidden, weight, targets, l2wrap), (hidden, weight), grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_both_parts_scale_with_the_loss(impl):
    hidden, weight, targets = problem()
    once = gradients(linear_cross_entropy(hidden, weight, targets, 0.7, impl=impl), hidden, weight)
    twice = gradients(linear_cross_entropy(hidden, weight, targets, 0.7, impl=impl) * 2, hidden, weight)
    torch.testing.assert_close(twice, tuple(2 * grad for grad in once), rtol=1e-14, atol=0)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 13, 14, 100])
@pytest.mark.parametrize("l2wrap", [0.0, 0.7])
def test_chunked_equals_reference_for_any_chunk(chunk_rows, l2wrap):
    hidden, weight, targets = problem()
    want = linear_cross_entropy(hidden, weight, targets, l2wrap, impl="reference")
    got = linear_cross_entropy_chunked(hidden.view(-1, 5), weight, targets.view(-1), l2wrap, chunk_rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(gradients(got, hidden, weight), gradients(want, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_frozen_side_costs_no_product(frozen):
    hidden, weight, targets = problem()
    want = gradients(linear_cross_entropy(hidden, weight, targets, impl="reference"), hidden, weight)[1 - frozen]
    sides = [hidden, weight]
    sides[frozen] = sides[frozen].detach()
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        (got,) = gradients(linear_cross_entropy(*sides, targets), sides[1 - frozen])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert len(products) == 2, products  # the logits, and one gradient


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_get_no_gradient_and_do_not_count(impl):
    hidden, weight, targets = problem(ignored=(0, 5, 6, 13))
    loss = linear_cross_entropy(hidden, weight, targets, 0.7, impl=impl)
    d_hidden, d_weight = gradients(loss, hidden, weight)
    kept = targets != -100
    assert torch.equal(d_hidden[~kept], torch.zeros_like(d_hidden[~kept]))
    alone = linear_cross_entropy(hidden[kept], weight, targets[kept], 0.7, impl=impl)
    torch.testing.assert_close(loss, alone, rtol=1e-13, atol=0)
    torch.testing.assert_close(d_weight, gradients(alone, weight)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_counted_is_zero(impl):
    hidden, weight, targets = problem(ignored=range(14))
    loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(loss, hidden, weight))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    hidden, weight, targets = problem(dtype=torch.float32)
    exact = linear_cross_entropy(hidden.double() * 1e4, weight.double(), targets, impl="reference")
    loss = linear_cross_entropy(hidden * 1e4, weight, targets, impl=impl)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(loss, hidden, weight))


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes(impl):
    hidden, weight, targets = problem(shape=(4, 50), vocab=40, width=32)
    want = linear_cross_entropy(hidden, weight, targets, impl="reference")
    exact = gradients(want, hidden, weight)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        x, y = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        loss = linear_cross_entropy(x, y, targets, impl=impl)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=limit, atol=0)
        for grad, true in zip(gradients(loss, x, y), exact, strict=True):
            assert grad.dtype == dtype
            assert (grad - true).norm() / true.norm() < limit


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_multiplies_in_its_dtype_and_sums_in_fp32(impl):
    hidden, weight, targets = problem(shape=(4, 50), vocab=40, width=32, dtype=torch.float32)
    exact = linear_cross_entropy(hidden.double(), weight.double(), targets, impl="reference")
    true = gradients(exact, hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, targets, impl=impl)
    assert loss.dtype == torch.float32
    rounded = F.cross_entropy(
        (hidden.bfloat16() @ weight.bfloat16().T).float().view(-1, 40), targets.view(-1), ignore_index=-100
    )
    torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=0)
    for grad, want in zip(gradients(loss, hidden, weight), true, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - want).norm() / want.norm() < 2e-2


def test_chunks_keep_the_logits_bounded(monkeypatch):
    module = importlib.import_module("heron.ops.linear_cross_entropy.chunked")  # the function hides the package
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 33)
    hidden, weight, targets = problem(width=2)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 11:
                largest.append(out.shape[0])
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets).backward()
    assert max(largest) == 3


def test_a_chunk_of_logits_and_its_gradient_are_gone_when_the_next_one_is_there(monkeypatch):
    module = importlib.import_module("heron.ops.linear_cross_entropy.chunked")
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 33)
    compute, before, left = module.loss_rows, [], []

    def watched(logits, *arguments):
        left.append(sum(tensor() is not None for tensor in before))
        losses, d_logits = compute(logits, *arguments)
        before.extend(map(weakref.ref, (logits, d_logits)))
        return losses, d_logits

    monkeypatch.setattr(module, "loss_rows", watched)
    linear_cross_entropy(*problem(width=2)).backward()
    assert left == [0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 7, 5, dtype=torch.int64)}, "hidden must be.*floating.*torch.int64"),
        ({"weight": torch.zeros(11, 6)}, r"weight must be \(V, C\) with C = 5.*\(11, 6\)"),
        ({"weight": torch.zeros(11, 5, dtype=torch.bfloat16)}, "dtype of hidden, torch.float32.*torch.bfloat16"),
        ({"targets": torch.zeros(2, 6, dtype=torch.int64)}, r"targets must be \(2, 7\) int64.*\(2, 6\)"),
        ({"targets": torch.zeros(2, 7, dtype=torch.int32)}, "int64.*torch.int32"),
        ({"targets": torch.full((2, 7), 11)}, r"in \[0, 11\).*got 11 at position \[0, 0\]"),
        ({"targets": torch.arange(14).view(2, 7) - 12}, r"got -12 at position \[0, 0\]"),
        ({"weight": torch.zeros(11, 5, device="meta")}, "on cpu; weight is on meta"),
        ({"impl": "fast"}, "impl must be auto, reference, chunked, cuda; got 'fast'"),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    arguments = {
        "hidden": torch.zeros(2, 7, 5),
        "weight": torch.zeros(11, 5),
        "targets": torch.zeros(2, 7, dtype=torch.int64),
    }
    with pytest.raises(KernelError, match=message):
        linear_cross_entropy(**(arguments | change))


# The bonus


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_ids", [1, 2, 3])
@pytest.mark.parametrize("l2wrap", [0.0, 0.7])
def test_bonus_by_finite_differences(impl, n_ids, l2wrap):
    hidden, weight, targets = problem()
    ids, values = bonus_of(targets, n_ids)
    leaves = hidden, weight, values
    loss = linear_cross_entropy(hidden, weight, targets, l2wrap, impl=impl, bonus=(ids, values))
    torch.testing.assert_close(loss, dense_objective(hidden, weight, targets, 0.0, ids, values), rtol=1e-13, atol=0)
    grads = gradients(3 * loss, *leaves)
    check_by_finite_differences(
        lambda: 3 * dense_objective(hidden, weight, targets, l2wrap, ids, values), leaves, grads
    )
    want = gradients(3 * dense_objective(hidden, weight, targets, l2wrap, ids, values), *leaves)
    torch.testing.assert_close(grads, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 13, 14, 100])
@pytest.mark.parametrize("n_ids", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunked_equals_reference_with_a_bonus_for_any_chunk(chunk_rows, n_ids, dtype):
    hidden, weight, targets = problem()
    ids, values = bonus_of(targets, n_ids, dtype)
    leaves = hidden, weight, values
    want = linear_cross_entropy(hidden, weight, targets, 0.7, impl="reference", bonus=(ids, values))
    rows = ids.view(14, n_ids), values.view(14, n_ids)
    got = linear_cross_entropy_chunked(hidden.view(-1, 5), weight, targets.view(-1), 0.7, chunk_rows, rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    for one, other in zip(gradients(got, *leaves), gradients(want, *leaves), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=limit, atol=1e-14)


@pytest.mark.parametrize("n_ids", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_bonus_in_bf16_errs_at_most_twice_as_much_as_eager(n_ids, dtype, chunk_rows):
    hidden, weight, targets = problem(shape=(4, 50), vocab=40, width=32)
    ids, values = bonus_of(targets, n_ids, vocab=40)
    half = [x.detach().bfloat16() for x in (hidden, weight, values)]
    mine = [half[0].requires_grad_(), half[1].requires_grad_(), half[2].to(dtype).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in half]

    def run(form, leaves, *more):
        x, y, bonus = leaves
        loss = form(
            x.view(-1, 32), y, targets.view(-1), 1e-4, *more, bonus=(ids.view(-1, n_ids), bonus.view(-1, n_ids))
        )
        return loss, gradients(loss, *leaves)

    want, true = run(linear_cross_entropy_reference, exact)
    eager_loss, eager = run(linear_cross_entropy_reference, mine)
    loss, grads = run(linear_cross_entropy_chunked, mine, chunk_rows)
    assert loss.dtype == torch.float32
    assert abs(loss - want) <= 2 * abs(eager_loss - want) + 1e-6
    for grad, by_eager, wanted, leaf in zip(grads, eager, true, mine, strict=True):
        assert grad.dtype == leaf.dtype
        assert (grad - wanted).norm() <= 2 * (by_eager - wanted).norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bonus_of_zero_is_none_to_the_bit(impl):
    hidden, weight, targets = problem(shape=(3, 51), vocab=40, width=32, dtype=torch.float32)
    ids, _ = bonus_of(targets, 2, vocab=40)
    results = []
    for bonus in (None, (ids, torch.zeros(ids.shape))):
        loss = linear_cross_entropy(hidden, weight, targets, impl=impl, bonus=bonus)
        results.append((loss, *gradients(loss, hidden, weight)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_ignored_values_is_zero(impl):
    hidden, weight, targets = problem(ignored=(0, 5, 6, 13))
    bonus = bonus_of(targets, 2)
    (grad,) = gradients(linear_cross_entropy(hidden, weight, targets, 0.7, impl=impl, bonus=bonus), bonus[1])
    assert torch.equal(grad.abs().sum(dim=-1) == 0, targets == -100)
    targets = torch.full_like(targets, -100)
    loss = linear_cross_entropy(hidden, weight, targets, 0.7, impl=impl, bonus=bonus)
    assert loss.item() == 0
    assert not gradients(loss, bonus[1])[0].any()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_one_of_hidden_weight_and_values_has_a_gradient(wanted):
    hidden, weight, targets = problem()
    ids, values = bonus_of(targets, 2)
    leaves = [hidden, weight, values]
    want = gradients(linear_cross_entropy(hidden, weight, targets, impl="reference", bonus=(ids, values)), *leaves)
    kept = [leaf if i == wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    loss = linear_cross_entropy(kept[0], kept[1], targets, bonus=(ids, kept[2]))
    torch.testing.assert_close(gradients(loss, leaves[wanted])[0], want[wanted], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bonus_in_fp32_under_autocast(impl):
    hidden, weight, targets = problem(shape=(4, 50), vocab=40, width=32, dtype=torch.float32)
    ids, values = bonus_of(targets, 2, torch.float32, vocab=40)
    leaves = hidden, weight, values
    exact = linear_cross_entropy(hidden.double(), weight.double(), targets, impl="reference", bonus=(ids, values))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, targets, impl=impl, bonus=(ids, values))
    for grad, want in zip(gradients(loss, *leaves), gradients(exact, *leaves), strict=True):
        assert grad.dtype == torch.float32
        assert (grad - want).norm() / want.norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_takes_the_same_bonus(dtype):
    hidden, weight, targets = problem(dtype=dtype)
    ids, values = bonus_of(targets, 3, torch.float32)
    logits = F.linear(hidden, weight)
    before = logits.detach().clone()
    results = []
    for loss in (
        cross_entropy(logits, targets, 0.7, bonus=(ids, values)),
        linear_cross_entropy(hidden, weight, targets, 0.7, impl="reference", bonus=(ids, values)),
    ):
        results.append((loss, *gradients(loss, hidden, weight, values)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert torch.equal(logits, before)
    with pytest.raises(KernelError, match=r"^cross_entropy: the values of bonus must be \(2, 7, 3\) .*got \(2, 7, 2\)"):
        cross_entropy(logits, targets, bonus=(ids, values[..., :2]))


def test_the_bonus_makes_no_tensor_as_wide_as_the_logits():
    hidden, weight, targets = problem(width=2)
    made = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            taken = {x.data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (11,) and out.data_ptr() not in taken:
                made[n_ids].append(str(func))
            return out

    for n_ids in (0, 3):
        made[n_ids] = []
        with Watch():
            bonus = bonus_of(targets, n_ids) if n_ids else None
            linear_cross_entropy(hidden, weight, targets, bonus=bonus).backward()
    assert made[3] == made[0] != []


def compiled_and_plain(run, leaves):
    """Loss and gradients of `run`, from one graph and from a call as it is."""
    torch._dynamo.reset()
    for call in (torch.compile(run, backend="aot_eager", fullgraph=True), run):
        loss = call(*leaves)
        yield loss.detach(), *gradients(loss, *leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_takes_a_bonus_with_the_same_numbers_and_gradients(dtype):
    hidden, weight, targets = problem(dtype=dtype)
    ids, values = bonus_of(targets, 2, torch.float32)
    leaves = hidden, weight, values

    def run(hidden, weight, values):
        return linear_cross_entropy(hidden, weight, targets, 0.7, bonus=(ids, values * 2))

    compiled, plain = compiled_and_plain(run, leaves)
    assert all(torch.equal(one, other) for one, other in zip(compiled, plain, strict=True))
    by_transform = torch.func.grad(run, argnums=(0, 1, 2))(*leaves)
    assert all(torch.equal(one, other) for one, other in zip(by_transform, plain[1:], strict=True))
    each = torch.func.vmap(lambda values: run(hidden, weight, values))(torch.stack((values, -values)))
    assert torch.equal(each, torch.stack((run(*leaves), run(hidden, weight, -values))))


def test_one_graph_refuses_an_id_of_a_bonus_that_is_not_in_the_vocabulary():
    hidden, weight, targets = problem()
    ids, values = bonus_of(targets, 2)
    torch._dynamo.reset()
    run = torch.compile(
        lambda ids: linear_cross_entropy(hidden, weight, targets, bonus=(ids, values)),
        backend="aot_eager",
        fullgraph=True,
    )
    run(ids)
    with pytest.raises(KernelError, match=r"ids of bonus must be in \[0, 11\); got 11 at position \[0, 0\]"):
        run(torch.full_like(ids, 11))


class Loss(torch.nn.Module):
    def forward(self, hidden, weight, targets, ids, values):
        return linear_cross_entropy(hidden, weight, targets, bonus=(ids, values))


def test_an_exported_loss_takes_a_bonus_of_any_length():
    time = {1: torch.export.Dim("T", min=2)}
    hidden, weight, targets = problem()
    exported = torch.export.export(
        Loss(), (hidden, weight, targets, *bonus_of(targets, 2)), dynamic_shapes=(time, None, time, time, time)
    )
    hidden, weight, targets = problem(shape=(2, 13))
    arguments = hidden, weight, targets, *bonus_of(targets, 2)
    assert torch.equal(exported.module()(*arguments), Loss()(*arguments))


@pytest.mark.parametrize("n_ids", [0, 2])
def test_the_operator_is_what_it_says_to_pytorch(n_ids):
    """Without a bonus it is called with as many arguments as before there was one."""
    hidden, weight, targets = problem()
    ids, values = bonus_of(targets, n_ids)
    bonus = (ids.view(14, 2), values.detach().view(14, 2).requires_grad_()) if n_ids else ()
    arguments = (
        hidden.detach().view(14, 5).requires_grad_(),
        weight,
        targets.view(14),
        0.7,
        3,
        False,
        torch.float64,
        True,
    )
    torch.library.opcheck(torch.ops.heron.linear_cross_entropy, (*arguments, *bonus))


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        ((2, 7), {}, r"ids of bonus must be \(2, 7, K\) int64, got \(2, 7\) torch.int64"),
        ((2, 6, 3), {}, r"ids of bonus must be \(2, 7, K\) int64, got \(2, 6, 3\) torch.int64"),
        (torch.zeros(2, 7, 3, dtype=torch.int32), {}, r"\(2, 7, K\) int64, got \(2, 7, 3\) torch.int32"),
        ((2, 7, 3), {"size": (2, 7, 2)}, r"values of bonus must be \(2, 7, 3\) like its ids.* got \(2, 7, 2\)"),
        ((2, 7, 3), {"size": (2, 7)}, r"values of bonus must be \(2, 7, 3\) like its ids.* got \(2, 7\)"),
        ((2, 7, 3), {"dtype": torch.float16}, "in torch.bfloat16 or torch.float32; got .* torch.float16"),
        ((2, 7, 3), {"dtype": torch.int64}, "in torch.bfloat16 or torch.float32; got .* torch.int64"),
        ((2, 7, 3), {"device": "meta"}, "all tensors must be on cpu; the ids of bonus are on cpu, its values on meta"),
        (torch.full((2, 7, 3), 11), {}, r"ids of bonus must be in \[0, 11\); got 11 at position \[0, 0, 0\]"),
        (torch.arange(42).view(2, 7, 3) % 11 - 2, {}, r"in \[0, 11\); got -2 at position \[0, 0, 0\]"),
        (torch.full((2, 7, 3), -100), {}, r"in \[0, 11\); got -100 at position"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_unfit_bonus_is_refused_in_words(ids, values, message, impl):
    ids = ids if isinstance(ids, torch.Tensor) else torch.zeros(ids, dtype=torch.int64)
    values = torch.zeros(**({"size": (2, 7, 3), "dtype": torch.bfloat16} | values))
    hidden, weight, targets = problem(dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=f"^linear_cross_entropy: .*{message}"):
        linear_cross_entropy(hidden, weight, targets, impl=impl, bonus=(ids, values))


# On a GPU


@pytest.fixture
def gpu_problem():
    """A function: shape, vocab -> hidden, weight and targets on the device, in bf16's values, as fp64."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def make(rows, vocab, width=64):
        generator = torch.Generator().manual_seed(rows + vocab)
        hidden = torch.randn(rows, width, generator=generator)
        weight = 0.3 * torch.randn(vocab, width, generator=generator)
        targets = torch.randint(vocab, (rows,), generator=generator)
        targets[::7] = -100
        return [x.bfloat16().double().cuda().requires_grad_() for x in (hidden, weight)], targets.cuda()

    return make


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (2, 7), (5, 1000), (300, 65536), (9000, 65536), (37, 50277)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_the_definition(gpu_problem, rows, vocab, dtype):
    sides, targets = gpu_problem(rows, vocab)
    if rows == 1:
        targets[:] = 0
    mine = [x.detach().to(dtype).requires_grad_() for x in sides]
    # A strong L2Wrap would show which of two equal logits was taken for the largest, nothing else.
    loss = linear_cross_entropy(*mine, targets, 1e-4, impl="cuda")
    grads = gradients(loss, *mine)
    if rows == 9000:  # all logits at once in fp64 would not fit: chunks of them
        want = linear_cross_entropy(*sides, targets, 1e-4, impl="chunked")
    else:
        want = linear_cross_entropy(*sides, targets, 1e-4, impl="reference")
    limit = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(loss.double(), want.detach(), rtol=limit, atol=1e-6)
    for grad, true in zip(grads, gradients(want, *sides), strict=True):
        assert grad.dtype == dtype
        assert (grad - true).norm() <= limit * true.norm() + 1e-6
    again = [x.detach().clone().requires_grad_() for x in mine]
    for one, other in zip(
        grads, gradients(linear_cross_entropy(*again, targets, 1e-4, impl="cuda"), *again), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "vocab"), [(2, 7), (5, 1000), (300, 65536), (9000, 65536), (37, 50277)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values_dtype", ["of hidden", "fp32"])
@pytest.mark.parametrize("n_ids", [1, 3])
def test_kernel_with_a_bonus_equals_the_definition(gpu_problem, rows, vocab, dtype, values_dtype, n_ids):
    sides, targets = gpu_problem(rows, vocab)
    ids, values = (x.detach().cuda() for x in bonus_of(targets.cpu(), n_ids, torch.bfloat16, vocab))
    exact = [*sides, values.double().requires_grad_()]
    mine = [x.detach().to(dtype).requires_grad_() for x in exact]
    if values_dtype == "fp32":
        mine[2] = mine[2].detach().float().requires_grad_()

    def run(leaves, impl):
        loss = linear_cross_entropy(*leaves[:2], targets, 1e-4, impl=impl, bonus=(ids, leaves[2]))
        return loss.detach(), gradients(loss, *leaves)

    loss, grads = run(mine, "cuda")
    want, true = run(exact, "chunked" if rows == 9000 else "reference")
    limit = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(loss.double(), want, rtol=limit, atol=1e-6)
    for grad, wanted, leaf in zip(grads, true, mine, strict=True):
        assert grad.dtype == leaf.dtype
        assert (grad - wanted).norm() <= limit * wanted.norm() + 1e-6
    again = run(mine, "cuda")
    assert torch.equal(loss, again[0])
    assert all(torch.equal(one, other) for one, other in zip(grads, again[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_with_a_bonus_of_zero_is_none_to_the_bit(gpu_problem, dtype):
    sides, targets = gpu_problem(300, 4096)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in sides)
    ids = bonus_of(targets.cpu(), 2, vocab=4096)[0].cuda()
    results = []
    for bonus in (None, (ids, torch.zeros(ids.shape, device="cuda"))):
        loss = linear_cross_entropy(hidden, weight, targets, impl="cuda", bonus=bonus)
        results.append((loss, *gradients(loss, hidden, weight)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
def test_a_bonus_takes_no_second_copy_of_the_logits_on_a_gpu(gpu_problem):
    sides, targets = gpu_problem(2000, 65536)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in sides)
    ids, values = (x.detach().cuda() for x in bonus_of(targets.cpu(), 2, torch.float32, 65536))
    peaks = []
    for bonus in (None, None, (ids, values.requires_grad_())):  # the first call also makes what PyTorch keeps
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, targets, impl="cuda", bonus=bonus).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        hidden.grad = weight.grad = None
    assert peaks[2] - peaks[1] < 1 << 20


@pytest.mark.gpu
def test_one_graph_takes_a_bonus_on_a_gpu(gpu_problem):
    sides, targets = gpu_problem(37, 1000)
    ids, values = (x.detach().cuda() for x in bonus_of(targets.cpu(), 2, torch.float32, 1000))
    leaves = [x.detach().bfloat16().requires_grad_() for x in sides] + [values.requires_grad_()]

    def run(hidden, weight, values):
        return linear_cross_entropy(hidden, weight, targets, impl="cuda", bonus=(ids, values))

    compiled, plain = compiled_and_plain(run, leaves)
    assert all(torch.equal(one, other) for one, other in zip(compiled, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1003, 4096])
def test_kernel_rows_equal_those_of_pytorch(gpu_problem, vocab):
    """Ties go to the lowest index, rows that do not count give nothing, infinite and undefined logits as in PyTorch."""
    module = importlib.import_module("heron.ops.linear_cross_entropy.chunked")
    (_, _), _ = gpu_problem(1, 1)
    cuda.FORM.require(torch.device("cuda"), torch.float32)
    logits = torch.randn(12, vocab, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    logits[1] = 2.0
    logits[2, [5, 700]] = 50.0
    logits[3, 10:] = -torch.inf
    logits[4, 17] = torch.inf
    logits[5, 17] = torch.nan
    targets = torch.arange(12, device="cuda")
    targets[6] = -100
    want = module.loss_rows(logits.clone(), targets, 0.25, True)
    got = cuda.loss_rows_cuda(logits.clone(), targets, 0.25, True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7, equal_nan=True)
    without = logits.clone()
    losses, _ = cuda.loss_rows_cuda(without, targets, 0.25, False)
    assert torch.equal(losses.nan_to_num(), got[0].nan_to_num())
    assert torch.equal(without.nan_to_num(), logits.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("to", cuda.DTYPES)
def test_kernel_scales_in_one_pass(gpu_problem, dtype, to):
    (_, _), _ = gpu_problem(1, 1)
    cuda.FORM.require(torch.device("cuda"), torch.float32)
    scale = torch.tensor(0.3, device="cuda")
    for shape in ((40, 768), (5, 3), (0, 8)):
        x = torch.randn(shape, device="cuda").to(dtype)
        assert torch.equal(cuda.scaled_cuda(x, scale, to), (x.float() * scale).to(to))


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_gpu(gpu_problem):
    sides, targets = gpu_problem(5, 40)
    assert linear_cross_entropy_choice(torch.device("cuda")).impl == "cuda"
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(*(x.float() for x in sides), targets)
    assert loss.dtype == torch.float32
    assert linear_cross_entropy_choice(torch.device("cuda"), torch.float64).impl == "chunked"
    with pytest.raises(KernelError, match="takes fp32, bf16 and fp16, not torch.float64"):
        linear_cross_entropy(*sides, targets, impl="cuda")


def test_without_a_device_it_says_what_to_type():
    hidden, weight, targets = problem()
    with pytest.raises(KernelError, match='impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'):
        linear_cross_entropy(hidden, weight, targets, impl="cuda")


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = cuda.FORM, lambda: linear_cross_entropy_choice(torch.device("cuda")), "chunked", "loss_rows"
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_compiles_without_spilling(tmp_path, arch):
    types = {"float": (4, 1), BFLOAT16: (8, 1), HALF: (8, 1)}
    forms = [
        f"loss_rows<{t}, {w}>({t}*, const int64_t*, int, float, bool, float*)" for t, ws in types.items() for w in ws
    ]
    part = dict(begin="constexpr int kThreads", end="// logits: (rows, V) fp32, bf16 or fp16")
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, arch, before="#define CUDA_KERNEL_ASSERT(x)", **part)
