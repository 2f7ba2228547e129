"""One model made into another: a variant with more parts (or fewer), and a vocabulary of another size.

What is added starts neutral (:mod:`heron.model.init`), so that the new model computes what the old one did.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heron.checkpoint.architecture import LN0, build, expected_shapes
from heron.config import ModelConfig, RosaConfig
from heron.errors import CheckpointError, ConfigError
from heron.model import RWKV
from heron.model.init import initial_value

VOCABULARY_RULES = ("mean", "initial")

# A part may be dropped where these of its tensors have this value in every block: then it does nothing.
_NEUTRAL = {
    "ffn.enn.weight": 1.0,
    "ffn.enn4.weight": 1.0,
    "ffn.s2": 0.0,
    "ffn.s0": 1.0,
    "qkv.lnv.weight": 0.0,
    "qkv.lnv.bias": 0.0,
    "att.output.weight": 0.0,
}


def upcycle(
    model: RWKV | Mapping[str, Tensor], variant: str, deep_embed_4x: bool = False, rosa: RosaConfig | None = None
) -> RWKV:
    """The model as another variant: every tensor that both have is copied, what is new is neutral.

    The logits are those of `model`, bit for bit. New matrices whose effect is still multiplied by 0 are random, from
    torch's global generator; all new tensors have the dtype of `emb.weight`. A v8-hybrid without ln0 gets an embedding
    to which the old ln0 has been applied. A variant that lacks a part of the model is possible where that part is
    neutral, as in a v8 that was up-cycled and never trained.

    Args:
        model: an RWKV, which is left alone, or its named tensors.
        variant: of the new model.
        deep_embed_4x: give a v8 or v8-hybrid the 4x form.
        rosa: add such a ROSA branch, or such a ROSA memory (scope stream); None: add none. What the model has stays.

    Raises:
        CheckpointError: the variant has no place for something that the model has learned; it names the tensor.
        ConfigError: no such variant, or one without the 4x form; a second ROSA branch or memory.
    """
    if not isinstance(model, RWKV):
        model = build(dict(model), "tensors")
    old = model.config
    memory = old.memory
    if rosa is not None and rosa.scope == "stream":
        if memory is not None:
            raise ConfigError("rosa: the model has a ROSA memory already; drop rosa")
        rosa, memory = None, rosa
    if rosa is not None and old.rosa is not None:
        raise ConfigError("rosa: the model has a ROSA branch already, and a block has room for one; drop rosa")
    if variant == "rosa-lm" and old.rosa is None:
        raise CheckpointError(f"{_name(old)} has no ROSA, of which alone a rosa-lm consists")
    new = old.changed(variant=variant, deep_embed_4x=deep_embed_4x, rosa=rosa or old.rosa, memory=memory)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if new.has_ln0 and not old.has_ln0:
        raise CheckpointError(
            f"{_name(old)} that does not normalise its embedding cannot become {_name(new)}, which always does"
        )
    if old.has_ln0 and not new.has_ln0:
        for name in ("memory.scale", "memory.length"):
            if name in tensors and tensors[name].any():
                raise CheckpointError(
                    f"{_name(old)} cannot become {_name(new)}: what {name} adds to the embedding goes through ln0, "
                    "which a v8-hybrid does not apply"
                )
        with torch.no_grad():
            tensors["emb.weight"] = model.get_submodule("blocks.0.ln0")(model.emb.weight)
        for name, neutral in zip(LN0, (1.0, 0.0), strict=True):
            tensors[name].fill_(neutral)
    return _model(new, tensors, old)


def resize_vocabulary(model: RWKV, vocab_size: int, new_rows: str = "mean") -> RWKV:
    """The model with another number of token ids. Ids that stay keep their rows in `emb`, `head` and every table.

    Fewer ids: the last ones go. More: the new rows of each of these tensors are, by `new_rows`,

    * "mean": the mean of the old rows, in fp32, so that a new token is an average one for the network;
    * "initial": what these rows would be in a fresh model of the new size (`emb` uniform, `head` orthogonal, gates 1).

    Args:
        model: left alone. dtypes are kept.
        vocab_size: the new number of ids, at least 1.

    Raises:
        ConfigError: an unknown rule for new rows, or a vocab_size below 1.
    """
    if new_rows not in VOCABULARY_RULES:
        raise ConfigError(f"new_rows: wanted {' or '.join(VOCABULARY_RULES)}, got {new_rows!r}")
    old, new = model.config.vocab_size, model.config.changed(vocab_size=vocab_size)
    shapes = expected_shapes(new)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if tensor.shape == shapes[name]:
            tensors[name] = tensor.clone()
            continue
        kept = tensor[:vocab_size]
        if new_rows == "mean":
            mean = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).mean(dim=0)
            added = mean.expand(max(vocab_size - old, 0), -1)
        else:
            added = initial_value(name, shapes[name], new)[old:]
        tensors[name] = torch.cat((kept, added.to(tensor)))
    return _model(new, tensors, model.config)


def _model(config: ModelConfig, tensors: dict[str, Tensor], old: ModelConfig) -> RWKV:
    """An RWKV of `config` from `tensors`: missing ones get their initial value, those it lacks must be neutral."""
    with torch.device("meta"):
        model = RWKV(config)
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    # v7b and v8-hybrid have different attentions in which some names are the same.
    foreign = ".qkv." if old.has_attention and old.variant != config.variant else None
    content = {name: tensor for name, tensor in tensors.items() if name in shapes and not (foreign and foreign in name)}
    for name, tensor in tensors.items():
        neutral = _NEUTRAL.get(name.split(".", 2)[-1])
        if name not in content and neutral is not None and not (tensor == neutral).all():
            raise CheckpointError(
                f"{_name(old)} cannot become {_name(config)}, which has no place for {name}: it is not {neutral:g} "
                "everywhere, so it has learned something"
            )
    for name, shape in shapes.items():
        if name not in content:
            content[name] = initial_value(name, shape, config).to(tensors["emb.weight"])
    model.load_state_dict(content, assign=True)
    return model.requires_grad_(True)


def _name(config: ModelConfig) -> str:
    return f"a {config.variant}" + (" of the 4x form" if config.deep_embed_4x else "")
