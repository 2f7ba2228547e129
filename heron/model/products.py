"""Matrix products in graphs of PyTorch's compiler: heron.ops.squared_relu_product takes over those of a channel mix
together with its squared ReLU, heron.ops.large_product other large ones and sums of two, heron.ops.small_products small
ones that don't wait for one another."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from heron.ops import large_product, small_products
from heron.ops.large_product import is_large
from heron.ops.small_products import is_small
from heron.ops.squared_relu_product import squared_relu_product_choice

_PRODUCT = torch.ops.aten.mm.default
_LARGE, _SUM = torch.ops.heron.large_product.default, torch.ops.heron.sum_of_products.default
_TOGETHER = torch.ops.heron.small_products.default
_SQUARE = torch.ops.heron.squared_relu_product.default
_GRADIENT = torch.ops.heron.squared_relu_product_gradient.default
_ADD = torch.ops.aten.add.Tensor
_TURN = torch.ops.aten.permute.default
_POWER = torch.ops.aten.pow.Tensor_Scalar
_TIMES = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)
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
        products = _summed(total)
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


def _summed(total: Node) -> list[Node]:
    """The products of matrices among what a sum is of."""
    return [product for part in total.args if (product := _product_of(part)) is not None]


def _product_of(part: Any) -> Node | None:
    """The product of matrices that `part` of a sum is another shape of, if nobody else reads it."""
    while isinstance(part, Node) and len(part.users) == 1:
        if part.target in (_PRODUCT, _LARGE):
            return part
        if part.target not in _VIEWS:
            return None
        part = part.args[0]
    return None


def join_small_products(graph: Graph) -> None:
    """Have heron.ops.small_products compute small products of a graph together that do not depend on one another.

    Which these are: those that have equally many small products before them, one behind another. Two that are added up
    are left to the compiler, which rounds their sum alone.
    """
    from torch._inductor.pattern_matcher import stable_topological_sort

    sums = map(_summed, graph.find_nodes(op="call_function", target=_ADD))
    added_up = {product for products in sums if len(products) > 1 for product in products}
    depths: dict[Node, int] = {}  # small products on the longest way to a node, itself among them
    together: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        depth = max((depths[part] for part in node.all_input_nodes), default=0)
        of_product = node.target == _PRODUCT and node not in added_up
        if of_product and is_small(*(part.meta["val"] for part in _factors(node))):
            together[depth].append(node)
            depth += 1
        depths[node] = depth
    for products in together.values():
        if len(products) < 2:
            continue
        with graph.inserting_before(products[-1]):
            joined = graph.call_function(_TOGETHER, tuple(map(list, zip(*map(_factors, products), strict=True))))
            joined.meta["val"] = [product.meta["val"] for product in products]
            for i, product in enumerate(products):
                one = graph.call_function(operator.getitem, (joined, i))
                one.meta = dict(product.meta)
                product.replace_all_uses_with(one)
        for product in products:
            graph.erase_node(product)
    stable_topological_sort(graph)


def replace_squared_relus(graph: Graph) -> None:
    """Have heron.ops.squared_relu_product compute the products of channel mixes in a graph of forward and backward.

    What is replaced: a product whose squared ReLU is read by nothing but products, and the product that the gradient
    comes from. Of key and square the graph then has the square alone, so it is what the backward keeps.
    """
    for relu in graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        found = _Found.of(relu)
        if found is None:
            continue
        (x, turned), (d_out, value) = _factors(found.key), _factors(found.d_square)
        weight = turned.meta["val"].T
        if not all(map(_lies_in_rows, (x.meta["val"], weight, d_out.meta["val"], value.meta["val"]))):
            continue
        if squared_relu_product_choice(x.meta["val"], weight).impl != "cuda":
            continue
        with graph.inserting_before(found.key):
            key = _call(graph, weight, turned, _TURN, turned, [1, 0])
            square = _call(graph, found.key.meta["val"], found.key, _SQUARE, x, key)
        _take_over(found.square, square)
        with graph.inserting_before(found.d_key):
            d_key = _call(graph, found.d_square.meta["val"], found.d_key, _GRADIENT, d_out, value, square)
        _take_over(found.d_key, d_key)
    graph.eliminate_dead_code()


class _Found(NamedTuple):
    """The parts of a squared ReLU in a graph."""

    key: Node
    """The product whose ReLU is squared."""
    square: Node
    d_square: Node
    """The product that is the gradient of `square`."""
    d_key: Node

    @classmethod
    def of(cls, relu: Node) -> _Found | None:
        """Those around `relu`; None where something else reads it or what is between."""
        key = _product_of(relu.args[0])
        squares = [user for user in relu.users if user.target == _POWER and user.args[1] == 2]
        masks = [user for user in relu.users if user.target == torch.ops.aten.le.Scalar and user.args[1] == 0]
        others = [user for user in relu.users if user not in (*squares, *masks)]
        if key is None or not len(squares) == len(masks) == len(others) == 1:
            return None
        (twice,) = others
        if twice.target == _POWER and twice.args[1] == 1 and len(twice.users) == 1:
            (twice,) = twice.users
        d_relu, d_key = _only_user(twice), _only_user(masks[0])
        if twice.target not in _TIMES or twice.args[1] != 2 or d_relu is None or d_relu.target not in _TIMES:
            return None
        if d_key is None or d_key.target != torch.ops.aten.where.self or d_key.args[::2] != (masks[0], d_relu):
            return None
        if not _is_zero(d_key.args[1]) or len(d_relu.users) != 1:
            return None
        d_square = _product_of(next(part for part in d_relu.args if part is not twice))
        return None if d_square is None else cls(key, squares[0], d_square, d_key)


def _factors(product: Node) -> tuple[Node, Node]:
    return cast(tuple[Node, Node], product.args)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_zero(part: Any) -> bool:
    return isinstance(part, Node) and part.target == torch.ops.aten.full.default and bool(part.args[1] == 0)


def _lies_in_rows(x: Tensor) -> bool:
    """Whether a matrix lies row by row, each beginning at a multiple of 16 bytes."""
    step, within = x.stride()
    return within == 1 and step % (16 // x.itemsize) == 0 and step >= x.shape[1]


def _call(graph: Graph, value: Tensor, instead_of: Node, target: Callable, *arguments: Any) -> Node:
    """A call that gives tensors like `value`; what the compiler notes of `instead_of` counts for it."""
    node = graph.call_function(target, arguments)
    node.meta = {**instead_of.meta, "val": value}
    return node


def _take_over(node: Node, matrix: Node) -> None:
    """Have all that read `node` read `matrix`, in its shape."""
    with node.graph.inserting_before(node):
        shaped = _call(node.graph, node.meta["val"], node, _RESHAPE, matrix, list(node.meta["val"].shape))
    node.replace_all_uses_with(shaped)


@functools.cache
def settings() -> dict[str, Any]:
    """What the compiler is told, which keeps what it has compiled with it: the passes of this module."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Replacing(CustomGraphPass):
        def __init__(self, *passes: Callable[[Graph], None]):
            self._passes = passes

        def __call__(self, graph: Graph) -> None:
            for replace in self._passes:
                replace(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__, large_product.__file__, small_products.__file__))

    return {
        "joint_custom_post_pass": Replacing(replace_squared_relus),
        "post_grad_custom_post_pass": Replacing(replace_products, join_small_products),
    }
