"""One token of n sequences through a block: the one definition that every decoder runs or is tested by.

A block is :func:`time_mix` and :func:`channel_mix`. The pieces that they are made of run as :class:`Pieces` say: in
plain PyTorch, compiled, or by kernels. A piece begins where a product does or is a kernel of its own, so that the
input of a product is computed once, not by every block of threads of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.errors import ConfigError
from heron.model import RWKV
from heron.model.channel_mix import GATE_RANK
from heron.model.coded import CodedLinear
from heron.model.compiled import varying
from heron.model.deep_embed import DeepEmbed
from heron.model.rwkv import Block
from heron.ops._choice import Choice
from heron.ops._products import ACTIVATIONS, Product
from heron.ops.codes import CodedMatrix, dense
from heron.ops.few_rows import few_rows, few_rows_choice
from heron.ops.head_step import HeadInputs, head_step, head_step_choice
from heron.ops.head_step.reference import head_step_reference
from heron.ops.matvec import matvec, matvec_choice
from heron.ops.matvec.reference import matvec_reference
from heron.ops.norm_mix import norm_mix, norm_mix_choice
from heron.ops.norm_mix.reference import norm_mix_reference
from heron.ops.token_step import LayerStates, LayerWeights, LowRank, LowRankGate, Memory, Network, Norm

Compiler = Callable[[Callable], Callable]
FEWEST = 2  # sequences of a step whose products few_rows makes; those of fewer are matvec's


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """x (..., C), normed."""
    return F.layer_norm(x, x.shape[-1:], *norm)


class Pieces(NamedTuple):
    """What computes the pieces of a block, and behind the last one the logits."""

    norm_mix: Callable[..., Tensor]
    """As :func:`heron.ops.norm_mix`."""
    project: Callable[..., Sequence[Tensor]]
    """The six inputs (6, n, C), three large matrices, of their own or in one, and `LayerWeights.low_rank` -> seven
    products (n, C): r, k, v, and of low-rank matrices value, decay, iclr and gate."""
    head_step: Callable[..., Tensor]
    """As :func:`heron.ops.head_step`."""
    multiply: Callable[[Sequence[Product]], list[Tensor]]
    """As :func:`heron.ops.few_rows`; `Product.add` may change in place."""
    low_rank_gate: Callable[..., Tensor]
    """As :func:`low_rank_gate`."""
    norm: Callable[[Tensor, Norm], Tensor] = layer_norm
    """The last residual (n, C) -> what the head multiplies, (n, C)."""
    head: Callable[[Tensor, Any], Tensor] = F.linear
    """That and the head's weight (V, C), as :func:`matrix_of` gives it -> logits (n, V)."""


def time_mix(
    run: Pieces,
    layer: LayerWeights,
    x: Tensor,
    states: LayerStates,
    v_first: Tensor | None,
    before: LayerStates | None = None,
    drawn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a time mix to residual (n, C), which may change; return the sum and layer 0's values (n, C). Writes `states`.

    Args:
        states: of n sequences, after this token.
        before: those before it, which are only read; None: `states`.
        drawn: with `states.wkv` in bf16, what its rounding draws from, see :func:`heron.ops.head_step`.
    """
    before = before or states
    mixed = run.norm_mix(x, *layer.norm1, layer.mix, before.att_shift, states.att_shift)
    large = (layer.receptance, layer.key, layer.value) if layer.joined is None else layer.joined
    r, k, v, value, w, iclr, gate = run.project(mixed, large, layer.low_rank)
    of_values = (None, None) if v_first is None else (value, v_first)
    inputs = HeadInputs(r, w, k, v, iclr, gate, *of_values)
    settled = True  # of this step only head_step writes them, and a step begins with kernels that wait for the last
    y = run.head_step(inputs, layer.head, before.wkv, states.wkv, drawn, settled)
    (x,) = run.multiply([Product(y, layer.output, add=x)])
    return x, v if v_first is None else v_first


def channel_mix(
    run: Pieces,
    layer: LayerWeights,
    x: Tensor,
    states: LayerStates,
    rows: Tensor | None,
    embedded: Tensor,
    before: LayerStates | None = None,
) -> Tensor:
    """Add a channel mix to residual (n, C), which may change; return the sum. Writes `states`.

    Args:
        states: as for :func:`time_mix`, as is `before`.
        rows: (n, width), the tokens' rows of the layer's DeepEmbed; None without.
        embedded: (n, C), the tokens as they came into the network.
    """
    before = before or states
    mixed = run.norm_mix(x, *layer.norm2, layer.channel_mix, before.ffn_shift, states.ffn_shift).squeeze(0)
    gate = None if rows is None else rows.to(x.dtype)
    if layer.low_rank_gate is not None:  # of what is not mixed with the token before: ffn_shift by now
        gate = run.low_rank_gate(layer.low_rank_gate, states.ffn_shift, rows, embedded)
    of_output, of_hidden = (gate, None) if layer.deep_embed == "output" else (None, gate)
    (hidden,) = run.multiply([Product(mixed, layer.ffn_key, "squared relu", factor=of_hidden)])
    (x,) = run.multiply([Product(hidden, layer.ffn_value, factor=of_output, add=x)])
    return x


def multiply(products: Sequence[Product]) -> list[Tensor]:
    """:func:`heron.ops.few_rows` for any n, each product a matrix product of PyTorch's."""
    return [_product(*product) for product in products]


def _product(
    x: Tensor, weight: Tensor | CodedMatrix, activation: str, factor: Tensor | None, add: Tensor | None
) -> Tensor:
    y = F.linear(x, dense(weight, x.dtype))
    if activation != "none":
        y = ACTIVATIONS[activation](y)
    if factor is not None:
        y = y * factor
    return y if add is None else add + y


def project(
    multiply: Callable[[Sequence[Product]], list[Tensor]],
    mixed: Tensor,
    large: Sequence[Tensor],
    low_rank: Sequence[LowRank],
) -> Sequence[Tensor]:
    """`Pieces.project` with four low-rank products, by `multiply`: at once what does not wait for one another."""
    inputs = mixed.unbind()
    products = [Product(x, weight) for x, weight in zip(inputs[:3], large, strict=True)]
    activations = "none", "tanh", "none", "sigmoid"
    for x, part, activation in zip(inputs[2:], low_rank, activations, strict=True):  # that of r and k is large alone
        products.append(Product(x, part.down, activation))
    r, k, v, *squeezed = multiply(products)
    return r, k, v, *multiply([Product(x, part.up) for x, part in zip(squeezed, low_rank, strict=True)])


def project_together(mixed: Tensor, large: Tensor, low_rank: Sequence[LowRank]) -> Sequence[Tensor]:
    """`Pieces.project` in three batched products: of the large matrices in one, and of low-rank ones in one."""
    r, k, v = torch.bmm(mixed[:3], large.mT)
    ((down, up),) = low_rank
    value, w, iclr, gate = torch.bmm(mixed[2:], down.mT)
    squeezed = torch.stack((value, torch.tanh(w), iclr, torch.sigmoid(gate)))
    return r, k, v, *torch.bmm(squeezed, up.mT).unbind()


def low_rank_gate(weights: LowRankGate, x: Tensor, rows: Tensor, embedded: Tensor) -> Tensor:
    """What v7a multiplies the hidden channels by, (n, F), from the channel mix's unmixed input x (n, C).

    Each token's 32 x 32 matrix is its row (n, 1024), with what is made of the embedded token (n, C).
    """
    dtype = torch.promote_types(embedded.dtype, torch.float32)
    rows = rows.to(dtype) + embedded.to(dtype) @ weights.of_embedding.to(dtype).t()
    squeezed = (x @ weights.s1).unsqueeze(1) @ rows.to(embedded.dtype).view(-1, GATE_RANK, GATE_RANK)  # (n, 1, 32)
    return torch.addmm(weights.s0, squeezed.squeeze(1), weights.s2)


# In plain PyTorch, with four low-rank products: no checks, no choices.
PLAIN = Pieces(norm_mix_reference, partial(project, multiply), head_step_reference, multiply, low_rank_gate)


class Way(NamedTuple):
    """How steps of some number of sequences are computed."""

    laid_out: Callable[[LayerWeights], LayerWeights]
    """What a layer's weights must go through before: :func:`together` or :func:`apart`."""
    pieces_for: Callable[[LayerWeights, Compiler | None], Pieces]
    """Any of the layers, laid out, and what compiles what has no kernel (None: it runs as it is) -> its pieces."""


def way_for(layer: LayerWeights, n: int) -> Way:
    """That of n sequences, for a model with such layers, which are not laid out yet."""
    if n < FEWEST:
        return Way(apart, _for_one)
    if isinstance(layer.key, CodedMatrix):
        return Way(apart, _for_many_of_codes)
    are_few = few_rows_choice(_matrices(apart(layer)), n).impl == "cuda"
    return Way(apart, _for_few) if are_few else Way(together, _for_many)


def _for_many(layer: LayerWeights, compiled: Compiler | None) -> Pieces:
    prepared = compiled or _as_it_is
    return Pieces(
        _norm_mix(layer, compiled),
        prepared(project_together),
        _head_step(layer, compiled),
        partial(_added_in_place, prepared(multiply)),
        prepared(low_rank_gate),
        _norm(layer),
    )


def _added_in_place(multiply: Callable[..., list[Tensor]], products: Sequence[Product]) -> list[Tensor]:
    """`multiply` of one product; one that is only added to the residual is added to it in place, without a copy."""
    (y,) = products
    if y.add is None or y.factor is not None or y.activation != "none":
        return multiply(products)
    return [y.add.addmm_(y.x, y.weight.t())]


def _for_one(layer: LayerWeights, compiled: Compiler | None) -> Pieces:
    multiply = _kernel(matvec, matvec_reference, matvec_choice(_matrices(layer), layer.mix.dtype), compiled)
    return _by_kernels(layer, compiled, multiply)


def _for_many_of_codes(layer: LayerWeights, compiled: Compiler | None) -> Pieces:
    """PyTorch multiplies, and each matrix is dequantized for its product."""
    return _by_kernels(layer, compiled, multiply)


def _for_few(layer: LayerWeights, compiled: Compiler | None) -> Pieces:
    pieces = _by_kernels(layer, compiled, few_rows)
    return pieces._replace(head=lambda x, weight: few_rows([Product(x, weight)])[0])


def _matrices(layer: LayerWeights) -> list[Any]:
    linears = (layer.receptance, layer.key, layer.value, layer.output, layer.ffn_key, layer.ffn_value)
    return [*linears, *(matrix for part in layer.low_rank for matrix in part)]


def _by_kernels(layer: LayerWeights, compiled: Compiler | None, multiply: Callable[..., list[Tensor]]) -> Pieces:
    return Pieces(
        _norm_mix(layer, compiled),
        partial(project, multiply),
        _head_step(layer, compiled),
        multiply,
        (compiled or _as_it_is)(low_rank_gate),
        _norm(layer),
        partial(_head, multiply),
    )


def _head(multiply: Callable[..., list[Tensor]], x: Tensor, weight: Tensor | CodedMatrix) -> Tensor:
    return multiply([Product(x, weight)])[0] if isinstance(weight, CodedMatrix) else F.linear(x, weight)


def of_any_number(pieces: Pieces) -> Pieces:
    """Compiled `pieces` that are not compiled again for another number n of sequences above 1; `norm` and `head`, which
    are not compiled, stay."""
    return Pieces(
        varying(pieces.norm_mix, lambda x, weight, bias, eps, mixes, last, new_last: (x, last, new_last)),
        varying(pieces.project, lambda mixed, large, low_rank: (mixed,), dim=1),
        varying(pieces.head_step, lambda inputs, weights, wkv, new_wkv, drawn, settled: (*inputs, wkv, new_wkv, drawn)),
        varying(pieces.multiply, lambda products: [x for y in products for x in (y.x, y.factor, y.add)]),
        varying(pieces.low_rank_gate, lambda weights, x, rows, embedded: (x, rows, embedded)),
        pieces.norm,
        pieces.head,
    )


def _norm_mix(layer: LayerWeights, compiled: Compiler | None) -> Callable[..., Tensor]:
    return _kernel(norm_mix, norm_mix_reference, _norm_mix_choice(layer), compiled)


def _norm(layer: LayerWeights) -> Callable[[Tensor, Norm], Tensor]:
    return _norm_by_kernel if _norm_mix_choice(layer).impl == "cuda" else layer_norm


def _norm_by_kernel(x: Tensor, norm: Norm) -> Tensor:
    now = torch.empty_like(x)
    norm_mix(x, *norm, x[:0], now)
    return now


def _norm_mix_choice(layer: LayerWeights) -> Choice:
    return norm_mix_choice(layer.mix.device, layer.mix.dtype, layer.mix.shape[1])


def _head_step(layer: LayerWeights, compiled: Compiler | None) -> Callable[..., Tensor]:
    choice = head_step_choice(layer.mix.device, layer.mix.dtype, layer.head.r_k.shape[1])
    return _kernel(head_step, head_step_reference, choice, compiled)


def _kernel(op: Callable, reference: Callable, choice: Choice, compiled: Compiler | None) -> Callable:
    return op if choice.impl == "cuda" or compiled is None else compiled(reference)


def _as_it_is(piece: Callable) -> Callable:
    return piece


def network_of(model: RWKV, states: Sequence[LayerStates]) -> Network:
    """`model`, which normalises its embedding, and the states of some sequences, as a step reads both."""
    memory = None
    if model.memory is not None and (rosa := model.config.memory) is not None:
        rows = model.memory.numbers(torch.arange((rosa.max_match or 1) + 1))
        memory = Memory(model.memory.scale, model.memory.length, model.memory.copy, rows)
    first_norm, layers, head = norm_of(blocks_of(model)[0].ln0), layers_of(model), matrix_of(model.head)
    return Network(model.emb.weight, first_norm, layers, states, norm_of(model.ln_out), head, memory)


def layers_of(model: RWKV) -> list[LayerWeights]:
    """The weights of `model`'s blocks as a step reads them, where they are; see heron.generation.decoder.is_fusible.

    The low-rank matrices are views that are not contiguous.
    """
    return [_layer_weights(block, model.config.deep_embed) for block in blocks_of(model)]


def blocks_of(model: RWKV) -> list[Block]:
    """The blocks of `model`, first to last."""
    return cast(list[Block], list(model.blocks))


def _layer_weights(block: Block, deep_embed: str | None) -> LayerWeights:
    att, ffn = block.att, block.ffn
    if att is None:
        raise ConfigError("a block without time mixing (rosa-lm) has no step of its own; decode through the model")
    gate = LowRankGate(ffn.s0, ffn.s1, ffn.s2, ffn.s_emb_x.weight) if deep_embed == "low-rank" else None
    return LayerWeights(
        norm1=norm_of(block.ln1),
        mix=torch.stack([getattr(att, f"x_{letter}").detach().flatten() for letter in "rkvwag"]),
        receptance=matrix_of(att.receptance),
        key=matrix_of(att.key),
        value=matrix_of(att.value),
        output=matrix_of(att.output),
        low_rank=[LowRank(*(getattr(att, f"{letter}{i}").detach().t() for i in (1, 2))) for letter in "vwag"],
        head=att.head_weights(mixes_v_first=att.layer > 0),
        norm2=norm_of(block.ln2),
        channel_mix=ffn.x_k.detach().view(1, -1),
        ffn_key=matrix_of(ffn.key),
        ffn_value=matrix_of(ffn.value),
        deep_embed=deep_embed,
        low_rank_gate=gate,
    )


def matrix_of(layer: nn.Module) -> Any:
    """The weights of a linear layer: a tensor, or where it is of codes a CodedMatrix."""
    return layer.matrix if isinstance(layer, CodedLinear) else layer.weight


def norm_of(norm: nn.LayerNorm) -> Norm:
    """A layer norm's weights and eps."""
    return Norm(norm.weight, norm.bias, norm.eps)


def together(layer: LayerWeights) -> LayerWeights:
    """`layer` with its low-rank matrices in one, (4, rank, C) and (4, C, rank), zeros up to the largest rank.

    r's, k's and v's matrices are there once more in one, `joined` (3, C, C).
    """
    rank = max(len(part.down) for part in layer.low_rank)
    parts = [_filled_up(part, rank) for part in layer.low_rank]
    down, up = torch.stack([part.down for part in parts]), torch.stack([part.up for part in parts])
    joined = torch.stack((layer.receptance, layer.key, layer.value))
    return layer._replace(low_rank=[LowRank(down, up)], joined=joined)


def apart(layer: LayerWeights) -> LayerWeights:
    """`layer` with each low-rank matrix contiguous, with zeros up to a rank that the kernel of matvec takes."""
    parts = [_filled_up(part, -(-len(part.down) // 8) * 8) for part in layer.low_rank]
    return layer._replace(low_rank=[LowRank(part.down.contiguous(), part.up.contiguous()) for part in parts])


def _filled_up(part: LowRank, rank: int) -> LowRank:
    missing = rank - len(part.down)
    return LowRank(F.pad(part.down, (0, 0, 0, missing)), F.pad(part.up, (0, missing)))


def lookup(model: RWKV) -> Callable[[Tensor], Sequence[Tensor | None]]:
    """A function: token ids (n,) -> the rows (n, width) of each layer's DeepEmbed, None without."""
    tables = [next((m for m in block.modules() if isinstance(m, DeepEmbed)), None) for block in model.blocks]
    return lambda ids: [None if table is None else table(ids) for table in tables]
