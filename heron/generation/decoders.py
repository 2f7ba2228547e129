"""Which decoder an engine takes for a model."""

from __future__ import annotations

from torch import nn

from heron.errors import ConfigError
from heron.generation.decoder import CppDecoder, Decoder, ModelDecoder, TorchDecoder, is_fusible
from heron.generation.graphed import GraphedDecoder
from heron.model.coded import weights_of
from heron.model.memory import Documents
from heron.ops.token_step import token_step_choice
from heron.tables.store import Tables


def decoder_of(
    model: nn.Module,
    n: int,
    tables: Tables | None = None,
    documents: Documents | None = None,
    fit_steps: bool = False,
    in_bf16: bool = False,
) -> Decoder:
    """The fastest decoder that `model` can have where it is, with room for `n` sequences.

    Args:
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each sequence.
        fit_steps: on a GPU, see :class:`heron.generation.graphed.GraphedDecoder`.
        in_bf16: whether the states are, see :class:`heron.generation.decoder.SequenceStates`.

    Raises:
        ConfigError: weights in 8 or 4 bits, and no decoder for them; on a CPU that is the one in C++. States in bf16
            where the decoder has none.
    """
    if in_bf16 and not (is_fusible(model) and next(model.parameters()).device.type == "cuda"):
        raise ConfigError("states: in bf16 only those of a v7, v7a or v8 on a GPU, in one dtype, without ROSA layers")
    if (weights := weights_of(model)) is not None:
        return _of_codes(weights, model, n, tables, documents, fit_steps, in_bf16)
    if not is_fusible(model):
        return ModelDecoder(model, n, documents)
    weight, config = model.emb.weight, model.config
    if weight.device.type != "cpu":
        return GraphedDecoder(model, n, tables, documents, fit_steps, in_bf16)
    in_cpp = token_step_choice(weight.device, weight.dtype, config.head_size).impl == "cpu"
    return (CppDecoder if in_cpp and config.deep_embed != "low-rank" else TorchDecoder)(model, n, tables, documents)


def _of_codes(
    weights: str,
    model: nn.Module,
    n: int,
    tables: Tables | None,
    documents: Documents | None,
    fit_steps: bool,
    in_bf16: bool,
) -> Decoder:
    """Weights in 8 or 4 bits have one decoder on a CPU and one on a GPU; ConfigError where it does not run."""
    if not is_fusible(model):
        raise ConfigError(
            f"weights {weights}: this model has hooks, adapters or several dtypes; take the weights as they are"
        )
    weight = model.emb.weight
    if weight.device.type == "cuda":
        return GraphedDecoder(model, n, tables, documents, fit_steps, in_bf16)
    choice = token_step_choice(weight.device, weight.dtype, model.config.head_size)
    if choice.impl != "cpu":
        raise ConfigError(f"weights {weights}: needs the decoder in C++, and there is none here: {choice.reason}")
    return CppDecoder(model, n, tables, documents)
