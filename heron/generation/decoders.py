"""Which decoder an engine takes for a model."""

from __future__ import annotations

from torch import nn

from heron.generation.decoder import CppDecoder, Decoder, ModelDecoder, TorchDecoder, is_fusible
from heron.generation.graphed import GraphedDecoder
from heron.model.memory import Documents
from heron.ops.token_step import token_step_choice
from heron.tables.store import Tables


def decoder_of(
    model: nn.Module,
    n: int,
    tables: Tables | None = None,
    documents: Documents | None = None,
    fit_steps: bool = False,
) -> Decoder:
    """The fastest decoder that `model` can have where it is, with room for `n` sequences.

    Args:
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each sequence.
        fit_steps: on a GPU, see :class:`heron.generation.graphed.GraphedDecoder`.
    """
    if not is_fusible(model):
        return ModelDecoder(model, n, documents)
    weight, config = model.emb.weight, model.config
    if weight.device.type != "cpu":
        return GraphedDecoder(model, n, tables, documents, fit_steps)
    in_cpp = token_step_choice(weight.device, weight.dtype, config.head_size).impl == "cpu"
    return (CppDecoder if in_cpp and config.deep_embed != "low-rank" else TorchDecoder)(model, n, tables, documents)
