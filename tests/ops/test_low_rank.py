"""A linear layer with an update of low rank: both forms against fp64, their gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops import low_rank_linear

SIZES = (7, 33, 21, 3)  # tokens, in, out, rank


def inputs(dtype=torch.float64, device="cpu", sizes=SIZES, seed=0):
    """x, weight, down, up and a gradient of y."""
    tokens, n_in, n_out, rank = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, tokens, n_in), (n_out, n_in), (rank, n_in), (n_out, rank), (1, tokens, n_out)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    return [tensor.to(device, dtype) for tensor in made]


def results(impl, given, scale, compiled=False):
    """y and the gradients of x, down and up."""
    x, weight, down, up, d_y = given
    leaves = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
    function = torch.compile(low_rank_linear, backend="aot_eager", fullgraph=True) if compiled else low_rank_linear
    y = function(leaves[0], weight, *leaves[1:], scale, impl)
    y.backward(d_y)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_forms_agree(scale, compiled):
    given = inputs()
    for got, wanted in zip(
        results("in_place", given, scale, compiled), results("reference", given, scale), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences():
    x, weight, down, up, _ = inputs(sizes=(3, 5, 4, 2))
    leaves = [tensor.requires_grad_() for tensor in (x, down, up)]
    assert torch.autograd.gradcheck(lambda x, d, u: low_rank_linear(x, weight, d, u, 0.5, "in_place"), leaves)


def test_an_input_that_wants_no_gradient_gets_none():
    x, weight, down, up, d_y = inputs()
    wanted = results("reference", [x, weight, down, up, d_y], 1.0)
    down, up = down.requires_grad_(), up.requires_grad_()
    low_rank_linear(x, weight, down, up, impl="in_place").backward(d_y)
    assert x.grad is None
    torch.testing.assert_close([down.grad, up.grad], wanted[2:], rtol=1e-12, atol=1e-12)


def error(got, truth):
    return (got.double().cpu() - truth).abs().max() / truth.abs().max()


def check_errors(device, sizes):
    """Each error of the form in bf16 is at most that of plain PyTorch in bf16, twice, against fp64."""
    given = inputs(torch.bfloat16, device, sizes)
    truth = results("reference", [tensor.double().cpu() for tensor in given], 0.5)
    fast, plain = (results(impl, given, 0.5) for impl in ("in_place", "reference"))
    for got, eager, true in zip(fast, plain, truth, strict=True):
        assert error(got, true) <= 2 * error(eager, true)


def test_errors_in_bf16():
    check_errors("cpu", (129, 96, 160, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [(2048, 768, 3072, 32), (1023, 136, 72, 5)])
def test_errors_in_bf16_on_a_gpu(sizes):
    check_errors("cuda", sizes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda given: given.__setitem__(2, given[2][:, :-1]), r"wanted x \(..., 33\), down \(rank, 33\)"),
        (lambda given: given.__setitem__(3, given[3].float()), "must have one dtype and device"),
        (lambda given: given[1].requires_grad_(), "the weight is frozen here"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = inputs()
    change(given)
    with pytest.raises(KernelError, match=told):
        low_rank_linear(*given[:4])


def test_an_unknown_form_is_refused():
    with pytest.raises(KernelError, match="impl must be auto, reference, in_place; got 'fast'"):
        low_rank_linear(*inputs()[:4], impl="fast")
