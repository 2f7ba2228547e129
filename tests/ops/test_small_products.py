"""heron.ops.small_products: which products of a compiled graph it takes, and that they are PyTorch's to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from heron.model import products
from heron.ops.small_products import LIMIT, is_small, small_products

TOGETHER = torch.ops.heron.small_products.default
PRODUCT = torch.ops.aten.mm.default


def test_a_product_is_small_where_its_matrices_are():
    def matrix(rows, columns):
        return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")

    n = LIMIT // 2 // 1024  # rows
    assert is_small(matrix(n - 1, 1024), matrix(1024, 8))
    assert not is_small(matrix(n, 1024), matrix(1024, 8))
    assert not is_small(matrix(8, 1024), matrix(1024, n))
    assert not is_small(matrix(n, 8), matrix(8, 1024))


def chains(x, y, z, down, up):
    """Three chains, of which the last begins with what the second ends with; the large product is of none."""
    one, other = torch.tanh(x @ down) @ up, torch.sigmoid(y @ down) @ up
    return one, other, (other + z) @ down, x @ up.t() @ down.t()


def drawn(n=6, channels=8, rank=3):
    torch.manual_seed(0)
    return [*(torch.randn(n, channels) for _ in range(3)), torch.randn(channels, rank), torch.randn(rank, channels)]


def test_products_that_do_not_wait_for_one_another_are_joined():
    parts = drawn()
    traced = make_fx(chains)(*parts)
    products.join_small_products(traced.graph)
    traced.graph.lint()
    joined = traced.graph.find_nodes(op="call_function", target=TOGETHER)
    assert [len(node.args[0]) for node in joined] == [3, 3]  # of x, y and x; of what these give
    assert len(traced.graph.find_nodes(op="call_function", target=PRODUCT)) == 1  # of the sum, alone in its depth
    traced.recompile()
    for got, want in zip(traced(*parts), chains(*parts), strict=True):
        assert torch.equal(got, want)


def test_two_products_that_are_added_up_are_left_to_the_compiler():
    def added_up(x, y, z, down, up):
        return (x @ down + y @ down) @ up, z @ down, y @ down

    parts = drawn()
    traced = make_fx(added_up)(*parts)
    products.join_small_products(traced.graph)
    (joined,) = traced.graph.find_nodes(op="call_function", target=TOGETHER)
    assert len(joined.args[0]) == 3  # of the sum, of z, and of y by itself
    assert len(traced.graph.find_nodes(op="call_function", target=PRODUCT)) == 2
    traced.recompile()
    assert all(map(torch.equal, traced(*parts), added_up(*parts)))


def test_one_product_and_large_ones_are_left_alone(monkeypatch):
    parts = drawn()
    monkeypatch.setattr(products, "is_small", lambda a, b: False)
    traced = make_fx(chains)(*parts)
    products.join_small_products(traced.graph)
    assert not traced.graph.find_nodes(op="call_function", target=TOGETHER)
    monkeypatch.undo()
    alone = make_fx(lambda x, down: x @ down)(parts[0], parts[3])
    products.join_small_products(alone.graph)
    assert [node.target for node in alone.graph.nodes if node.op == "call_function"] == [PRODUCT]


def test_the_gradients_of_a_compiled_function_are_those_of_the_function():
    learned = [part.requires_grad_() for part in drawn()]
    compiled = torch.compile(chains, options=products.settings(), fullgraph=True)
    results = []
    for run in (chains, compiled):
        loss = sum(part.square().sum() for part in run(*learned))
        results.append(torch.autograd.grad(loss, learned))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recorded", [False, True])
def test_on_a_gpu_they_are_pytorchs_bits(recorded):
    device = torch.device("cuda")
    torch.manual_seed(0)
    tokens, shapes = 8191, [(768, 64), (768, 96), (64, 768), (768, 128), (32, 768)]
    x = [torch.randn(tokens, k, device=device).bfloat16() for k, _ in shapes]
    weights = [torch.randn(k, m, device=device).bfloat16() for k, m in shapes]
    a, b = (
        [*x, *(part.t() for part in x)],
        [*weights, *(torch.randn_like(one @ w) for one, w in zip(x, weights, strict=True))],
    )
    want = [torch.mm(one, other) for one, other in zip(a, b, strict=True)]
    got = small_products(a, b)
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = small_products(a, b)
            later = [part + 1 for part in got]
        graph.replay()
        assert all(torch.equal(one, other + 1) for one, other in zip(later, want, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
