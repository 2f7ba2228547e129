"""Rows of tables: AdamW by rows in C++ and on a GPU against its definition, and copies by row."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops._choice import Choice
from heron.ops.rows import Places, copy_rows, cuda, gate_rows, look_up, row_adamw_
from heron.ops.rows.gate import gate_rows_reference

BETAS, EPS, LR = (0.9, 0.99), 1e-18, 3e-3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def table(V, width, moments=torch.float32):
    """weight, exp_avg, exp_avg_sq and row_step of a table that trains for some time."""
    torch.manual_seed(V * 1000 + width)
    parts = torch.randn(V, width), 0.1 * torch.randn(V, width), torch.rand(V, width) ** 2
    return parts[0], *(part.to(moments) for part in parts[1:]), torch.randint(0, 5, (V,), dtype=torch.int32)


def copied(parts, place=lambda part: part):
    return [place(part.clone()) for part in parts]


def close(these, those):
    """Within roundings: 1e-6 in fp32; one unit in the last place of bf16."""
    return all(
        torch.allclose(a.double(), b.double(), rtol=1e-6 if a.dtype == torch.float32 else 2**-7, atol=1e-6)
        for a, b in zip(these, those, strict=True)
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "width", "n"), [(9, 1, 4), (50, 7, 50), (33, 64, 1), (40, 12, 0), (64, 36, 31)])
def test_cpp_steps_as_the_definition_and_leaves_other_rows_alone(V, width, n, moments, threads):
    start = table(V, width, moments)
    defined, built = copied(start), copied(start)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(4):
            torch.manual_seed(step)
            ids, gradient = torch.randperm(V)[:n], torch.randn(n, width)
            gradient[:1] = 0
            for parts, impl in ((defined, "reference"), (built, "cpu")):
                row_adamw_(*parts, gradient, ids, LR, BETAS, EPS, impl)
            assert close(built, defined)
            assert torch.equal(built[3], defined[3])
            if moments == torch.bfloat16 and n == V:  # to the nearest, as PyTorch rounds
                assert all((a == b).float().mean() > 0.98 for a, b in zip(built[1:3], defined[1:3], strict=True))
            for parts in (defined, built):  # goes on from the same numbers, or roundings of bf16 would add up
                others = torch.ones(V, dtype=torch.bool).index_fill_(0, ids, False)
                assert all(torch.equal(a[others], b[others]) for a, b in zip(parts, start, strict=True))
            start = copied(defined)
            built = copied(defined)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_every_row_in_every_step_is_dense_adamw(impl):
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([dense], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    state = torch.zeros(20, 12), torch.zeros(20, 12), torch.zeros(20, dtype=torch.int32)
    for step in range(5):
        dense.grad = torch.randn(20, 12, generator=torch.Generator().manual_seed(step))
        ids = torch.randperm(20)
        row_adamw_(weight, *state, dense.grad[ids], ids, LR, BETAS, EPS, impl)
        optimizer.step()
        assert torch.allclose(weight, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(ids=torch.tensor([0, 5])), "ids must be 0 to 4, got 0 to 5"),
        (dict(ids=torch.tensor([0, -1])), "ids must be 0 to 4, got -1 to 0"),
        (dict(gradient=torch.zeros(3, 4)), r"gradient contiguous, torch.float32 \(2, 4\) on the CPU, got .* \(3, 4\)"),
        (dict(weight=torch.zeros(5, 4).double()), "weight contiguous, torch.float32"),
        (dict(exp_avg_sq=torch.zeros(5, 4).bfloat16()), "exp_avg_sq contiguous, torch.float32"),
        (dict(weight=torch.zeros(4, 5).t()), "weight contiguous"),
        (dict(impl="gpu"), "impl must be auto, reference, cpu; got 'gpu'"),
    ],
)
def test_what_cpp_cannot_take_is_refused(change, said):
    weight, exp_avg, exp_avg_sq, row_step = table(5, 4)
    given = dict(
        weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, row_step=row_step, gradient=torch.zeros(2, 4),
        ids=torch.tensor([0, 1]), lr=LR, betas=BETAS, eps=EPS, impl="cpu",
    )  # fmt: skip
    with pytest.raises(KernelError, match=said):
        row_adamw_(**given | change)


def on_gpu(part):
    return part.cuda()


def pinned(part):
    return part.pin_memory()


@pytest.fixture
def kernels():
    cuda.library(torch.cuda.get_device_capability())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("place", [on_gpu, pinned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(768,) * 12, (1,), (3, 8, 36, 1024), (2,) * 70])
def test_copies_are_the_rows(kernels, widths, dtype, place):
    V = 500
    tables = [torch.randn(V, width).to(dtype) for width in widths]
    for n in (0, 1, 37, V):
        ids, slots = torch.randperm(V)[:n], torch.randperm(V)[:n]
        wanted = [torch.zeros_like(part).index_copy_(0, slots, part[ids]) for part in tables]
        for source, target in ((place, on_gpu), (on_gpu, place)):
            there = copied(tables, source)
            got = [target(torch.zeros_like(part)) for part in tables]
            for blocks in (0, 2):
                copy_rows(there, ids.cuda(), got, slots.cuda(), blocks)
            torch.cuda.synchronize()
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
            compact = [on_gpu(torch.zeros(n, part.shape[1], dtype=dtype)) for part in tables]
            copy_rows(there, ids.cuda(), compact, None)
            assert all(torch.equal(a.cpu(), b[ids]) for a, b in zip(compact, tables, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(768,) * 3, (1, 7), (36, 1024), (4,) * 70])
def test_kernels_step_as_cpp_wherever_the_rows_lie(kernels, widths, moments):
    V, n = 300, 111
    start = [table(V, width, moments) for width in widths]
    built, device, host, compact = ([copied(parts) for parts in start] for _ in range(4))
    device = [copied(parts, on_gpu) for parts in device]
    host = [copied(parts, pinned) for parts in host]
    for parts in host:
        parts[3] = parts[3].cuda()
    compact = [[*copied(parts[:3], pinned), parts[3].cuda()] for parts in compact]
    for step in range(20):
        ids = torch.randperm(V)[:n]
        there, gradients = ids.cuda(), [torch.randn(n, width) for width in widths]
        bad = torch.tensor(float(step == 7))
        if not bad:
            for parts, gradient in zip(built, gradients, strict=True):
                row_adamw_(*parts, gradient, ids, LR, BETAS, EPS, "cpu")
        gradients, rest = [part.cuda() for part in gradients], (LR, BETAS, EPS, bad.cuda())
        for tables in (device, host):
            cuda.row_adamw_(*map(list, zip(*tables, strict=True)), gradients, there, there, there, *rest)
        weights, *state = map(list, zip(*compact, strict=True))
        near = [part.cuda() for part in (weight[ids] for weight in weights)]
        cuda.row_adamw_(near, *state, gradients, there, None, there, *rest)
        copy_rows(near, None, weights, there)
        torch.cuda.synchronize()
        for a, b, c, d in zip(device, host, compact, built, strict=True):
            assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(a, b, strict=True))
            assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(a, c, strict=True))
            assert close([one.cpu() for one in a], d)


# -- products with rows ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "tokens", "width"),
    [(1, 1, 8), (1, 700, 64), (5, 40, 264), (3000, 40, 264), (9000, 8192, 64), (37, 513, 768), (40, 100, 8192)],
)
@pytest.mark.parametrize("spread", [1, 4])  # 4: most tokens use few rows, and some rows no token
def test_products_with_rows_and_their_gradients_are_near_fp64(kernels, n, tokens, width, dtype, spread):
    generator = torch.Generator().manual_seed(n + tokens)
    row = ((torch.rand(tokens, generator=generator) ** spread) * n).long().cuda()
    x, d = (torch.randn(1, tokens, width, generator=generator).to("cuda", dtype) for _ in range(2))
    gates = torch.randn(n, width, generator=generator).cuda().requires_grad_()
    x.requires_grad_()
    places = Places.of(row)

    def results():
        out = gate_rows(x, gates, places)
        return out, *torch.autograd.grad(out, (x, gates), d)

    exact = [part.detach().double().requires_grad_() for part in (x, gates)]
    out = gate_rows_reference(*exact, row)
    want = out, *torch.autograd.grad(out, exact, d.double())
    for got, again, truth in zip(results(), results(), want, strict=True):
        assert torch.equal(got, again)
        size = 1e-6 if got.dtype == torch.float32 else 2**-8
        assert float((got.double() - truth).norm() / truth.norm().clamp_min(1e-9)) < size
    (of_frozen,) = torch.autograd.grad(gate_rows(x, gates.detach(), places), x, d)
    assert torch.equal(of_frozen, results()[1])
    in_half = gates.detach().bfloat16()  # as frozen rows are beside a base in bf16
    out = gate_rows(x, in_half, places)
    (of_frozen,) = torch.autograd.grad(out, x, d)
    for got, given in ((out, x), (of_frozen, d)):
        assert torch.equal(got, (given.float() * in_half[row].float()).to(dtype))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "tokens", "width"), [(1, 700, 64), (9000, 8192, 64), (37, 513, 768), (65536, 100, 768)])
@pytest.mark.parametrize("spread", [1, 4])
def test_gradients_of_rows_that_were_looked_up_are_near_fp64(kernels, n, tokens, width, dtype, spread):
    generator = torch.Generator().manual_seed(n + tokens)
    ids = ((torch.rand(1, tokens, generator=generator) ** spread) * n).long().cuda()
    table = torch.randn(n, width, generator=generator).to("cuda", dtype).requires_grad_()
    d = torch.randn(1, tokens, width, generator=generator).to("cuda", dtype)

    def results():
        out = look_up(ids, table)
        return out.detach(), *torch.autograd.grad(out, table, d)

    (out, gradient), again = results(), results()
    assert torch.equal(out, table[ids])
    assert torch.equal(gradient, again[1])
    exact = torch.zeros(n, width, dtype=torch.float64, device="cuda").index_add_(0, ids[0], d[0].double())
    size = 1e-6 if dtype == torch.float32 else 2**-8
    assert float((gradient.double() - exact).norm() / exact.norm()) < size


def test_rows_are_looked_up_as_pytorch_does_on_a_cpu():
    table, ids = torch.randn(7, 8, requires_grad=True), torch.tensor([[3, 0], [3, 6]])
    out = look_up(ids, table)
    assert torch.equal(out, table[ids])
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert gradient[:, 0].tolist() == [1, 0, 0, 2, 0, 0, 1]


def test_the_kernel_is_asked_for_tokens_in_the_order_of_their_rows(monkeypatch):
    from heron.ops.rows import lookup as module

    library = torch.library.Library("heron", "FRAGMENT")
    if not hasattr(torch.ops.heron, "look_up_backward"):
        library.define("look_up_backward(Tensor d, Tensor order, Tensor row_in_order, int n_rows) -> Tensor")

    def backward(d, order, row_in_order, n_rows):
        return d.new_zeros(n_rows, d.shape[1]).index_add_(0, row_in_order, d[order])

    library.impl("look_up_backward", backward, "CPU")
    monkeypatch.setattr(module, "look_up_choice", lambda device: Choice("cuda", ""))
    table, ids = torch.randn(7, 8, requires_grad=True), torch.tensor([[3, 0], [3, 6]])
    d = torch.randn(2, 2, 8)
    (mine,) = torch.autograd.grad(look_up(ids, table), table, d)
    (want,) = torch.autograd.grad(table[ids], table, d)
    torch.testing.assert_close(mine, want)
    with torch.no_grad():
        assert not look_up(ids, table).requires_grad
    library._destroy()


def test_places_hold_every_token_in_the_order_of_its_row():
    row = torch.tensor([[3, 0, 3], [1, 0, 3]])
    places = Places.of(row)
    assert places.row.tolist() == [3, 0, 3, 1, 0, 3]
    assert places.order.tolist() == [1, 4, 3, 0, 2, 5]
    assert places.row_in_order.tolist() == [0, 0, 1, 3, 3, 3]
