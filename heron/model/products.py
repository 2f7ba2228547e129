"""Matrix products in graphs of PyTorch's compiler: heron.ops.large_product takes over large ones and sums of two."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from heron.ops.large_product import is_large

_PRODUCT = torch.ops.aten.mm.default
_LARGE, _SUM = torch.ops.heron.large_product.default, torch.ops.heron.sum_of_products.default
_ADD = torch.ops.aten.add.Tensor
_RESHAPE = torch.ops.aten.reshape.default
_VIEWS = (_RESHAPE, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def replace_products(graph: Graph) -> None:
    """Have heron.ops.large_product compute the large products of matrices of a graph, forward or backward.

    A gradient that comes from two products, as that of what a large matrix and a low-rank one read, is their sum: the
    second product is added to the first where that lies.
    """
    for product in graph.find_nodes(op="call_function", target=_PRODUCT):
        a, b = product.args
        if is_large(a.meta["val"], b.meta["val"]):  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            product.target = _LARGE
    for total in graph.find_nodes(op="call_function", target=_ADD):
        products = [product for part in total.args if (product := _product_of(part)) is not None]
        products.sort(key=lambda product: product.target != _LARGE)
        if len(products) < 2 or products[0].target != _LARGE or total.kwargs:
            continue
        first, second = products
        with graph.inserting_before(total):
            together = graph.call_function(_SUM, (*first.args, *second.args))
            together.meta["val"] = first.meta["val"]
            shaped = graph.call_function(_RESHAPE, (together, list(total.meta["val"].shape)))
            shaped.meta["val"] = total.meta["val"]
        total.replace_all_uses_with(shaped)
        graph.erase_node(total)
    graph.eliminate_dead_code()


def _product_of(part: Any) -> Node | None:
    """The product of matrices that `part` of a sum is another shape of, if nobody else reads it."""
    while isinstance(part, Node) and len(part.users) == 1:
        if part.target in (_PRODUCT, _LARGE):
            return part
        if part.target not in _VIEWS:
            return None
        part = part.args[0]
    return None


@functools.cache
def replacing_products() -> Any:
    """:func:`replace_products` as PyTorch's compiler takes it, which keeps what it has compiled with it."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class ReplacingProducts(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            replace_products(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return ReplacingProducts()
