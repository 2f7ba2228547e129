"""From named tensors to a model: the variant from the keys, every size from the shapes, and nothing left over."""

from __future__ import annotations

import functools
import re
import types
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heron.config import ModelConfig, RosaConfig
from heron.errors import CheckpointError, ConfigError, did_you_mean
from heron.model import RWKV, mixed_dtypes
from heron.model.memory import longest_match
from heron.model.tuned_state import TUNED

UNUSED = tuple(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))  # in upstream's files, never used by any forward
LN0 = ("blocks.0.ln0.weight", "blocks.0.ln0.bias")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ROSA = re.compile(r"blocks\.\d+\.(rosa|ln3)\.")
_FLAT = re.compile(r"\.qkv\.x_[qkv]$")  # some files store these as (1, 1, n), as they do the x_* of att and ffn

ROSA_TOY = "ROSA toy"
# The first mark that any name ends with tells the variant: a single block may have lost its own.
_MARKS = (
    (".qkv.k_emb.weight", "v7b"),
    (".ffn.s_emb.weight", "v7a"),
    (".qkv.kkup.weight", "v8-hybrid"),
    (".ffn.enn.weight", "v8"),
    (".ffn.enn4.weight", "v8"),
    (".att.w1", "v7"),
    (".rosa.q.weight", "rosa-lm"),
    ("rosa1.rosa_qkv.emb", ROSA_TOY),
    ("rosa1.emb0", ROSA_TOY),
)


def build(
    tensors: dict[str, Tensor],
    source: object,
    dtype: torch.dtype | None = None,
    has_ln0: bool | None = None,
    rosa: RosaConfig | None = None,
    memory: RosaConfig | None = None,
) -> RWKV:
    """The model that holds a file's tensors, as they are or converted to `dtype`.

    Arguments and errors are those of :func:`config_of`. What every forward ignores and the file lacks (v0, v1, v2 of
    block 0; ln0 of a v8-hybrid) is filled in. Warns of a v8-hybrid whose ln0 is not applied though it is not neutral,
    and of a tuned initial state, which is no part of a model.
    """
    config = config_of(tensors, source, has_ln0, rosa, memory)
    if any(map(TUNED.match, tensors)):
        warnings.warn(
            f"{source}: it also holds a tuned initial state (att.time_state), which the model does not start from by "
            "itself; heron.checkpoint.tuned_state(path, model.config) gives it",
            stacklevel=3,
        )
    with torch.device("meta"):
        model = RWKV(config)
    filled = {}
    for name, parameter in model.state_dict().items():
        if name in tensors:
            filled[name] = tensors[name].view(parameter.shape)
        else:
            filled[name] = torch.full(parameter.shape, float(name == LN0[0]), dtype=tensors["emb.weight"].dtype)
    if has_ln0 is None and not config.has_ln0 and not ((filled[LN0[0]] == 1).all() and (filled[LN0[1]] == 0).all()):
        warnings.warn(
            f"{source}: a v8-hybrid file cannot say whether its ln0 is applied to the embedding; it is not, as in the "
            "upstream script. Give has_ln0=True for a model that was trained with it",
            stacklevel=3,
        )
    model.load_state_dict(filled if dtype is None else converted(filled, dtype, source), assign=True)
    return model.requires_grad_(True)


def lay_over(model: RWKV, tensors: Mapping[str, Tensor], source: object) -> list[str]:
    """Copy a file's tensors into a model of given sizes; gives the names that the file lacks, whose values stay.

    What no forward uses (v0, v1, v2 of block 0) does not count as lacking.

    Raises:
        CheckpointError: a tensor that is not part of this model, or of another shape; a dtype that is not floating; a
            number that is not finite; not one tensor of this model.
    """
    own = model.state_dict()
    if not own.keys() & tensors.keys():
        raise CheckpointError(
            f"{source}: holds no tensor of a {model.config.variant} model; the first keys are "
            f"{', '.join(sorted(tensors)[:5]) or 'none'}"
        )
    _check({**own, **tensors}, model.config, source)
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name].view(own[name].shape))
    return [name for name in own if name not in tensors and name not in UNUSED]


def in_one_dtype(model: RWKV, dtype: torch.dtype | None = None, source: object = "model") -> RWKV:
    """A copy of a model whose tensors are all of `dtype`.

    None: the model itself, or where it mixes dtypes a copy in the widest of them, tables as they are. ConfigError and
    CheckpointError as in :func:`converted`, with `source` in the message.
    """
    tensors: dict[str, Tensor] = model.state_dict()
    if dtype is None:
        if not isinstance(model, RWKV) or (widest := mixed_dtypes.widest(model)) is None:
            return model
        tensors |= converted({name: tensors[name] for name, _ in mixed_dtypes.in_products(model)}, widest, source)
    else:
        tensors = converted(tensors, dtype, source)
    with torch.device("meta"):
        copy = RWKV(model.config)
    copy.load_state_dict(tensors, assign=True)
    copy.attention_window = model.attention_window
    return copy.requires_grad_(True).train(model.training)


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: object) -> dict[str, Tensor]:
    """The tensors in another floating dtype.

    Raises:
        ConfigError: `dtype` is none of those that a model can have.
        CheckpointError: a number overflows in it.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: wanted {', '.join(map(str, _DTYPES))}, got {dtype}")
    out = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    for name, tensor in out.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{source}: {name} holds numbers that {str(dtype).removeprefix('torch.')} cannot; take bf16"
            )
    return out


def config_of(
    tensors: dict[str, Tensor],
    source: object,
    has_ln0: bool | None = None,
    rosa: RosaConfig | None = None,
    memory: RosaConfig | None = None,
) -> ModelConfig:
    """Read variant and sizes from a file's tensors and check every key, shape, dtype and number.

    Args:
        tensors: named tensors, upstream names.
        source: the file's path, for messages.
        has_ln0: whether the embedding goes through ln0, which a v8-hybrid file cannot say; None: as the variant does.
        rosa: how the ROSA in it works, which no file can say; None: there must be none.
        memory: how its ROSA memory works. None: if there is one, with the matches that its tensors have room for, over
            all tokens of one document.

    Raises:
        CheckpointError: an unknown variant; a missing, extra or misshaped tensor; a dtype that is not floating; a
            number that is not finite; ROSA and no `rosa`, or the reverse.
    """
    config = sizes_of(tensors, source, has_ln0, rosa, memory)
    _check(tensors, config, source)
    return config


def leave_unsaid(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names leave open what :class:`ModelConfig` must know: if ln0 is applied (v8-hybrid), how ROSA works."""
    return any(_ROSA.match(name) or name.endswith((".qkv.kkup.weight", "memory.copy")) for name in tensors)


def sizes_of(
    tensors: Mapping[str, Tensor],
    source: object,
    has_ln0: bool | None = None,
    rosa: RosaConfig | None = None,
    memory: RosaConfig | None = None,
) -> ModelConfig:
    """Variant and sizes by the few tensors that tell them; the others are not looked at. As :func:`config_of`."""
    variant = _variant(tensors, source)

    def shape(name: str, dims: int) -> torch.Size:
        if name not in tensors:
            raise CheckpointError(f"{source}: tensor {name} is missing (variant {variant}){_elsewhere(name, tensors)}")
        if tensors[name].dim() != dims:
            raise CheckpointError(f"{source}: {name} must have {dims} dimensions, got {tuple(tensors[name].shape)}")
        return tensors[name].shape

    layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    vocab_size, n_embd = shape("emb.weight", 2)
    ffn_dim = shape("blocks.0.ffn.key.weight", 2)[0]
    time_mix: dict[str, Any] = {}
    if variant != "rosa-lm":
        value_block = 1 if len(layers) > 1 else 0
        has_value_rank = value_block or "blocks.0.att.v1" in tensors
        time_mix = dict(
            head_size=shape("blocks.0.att.r_k", 2)[1],
            decay_rank=shape("blocks.0.att.w1", 2)[1],
            iclr_rank=shape("blocks.0.att.a1", 2)[1],
            value_rank=shape(f"blocks.{value_block}.att.v1", 2)[1] if has_value_rank else None,
            gate_rank=shape("blocks.0.att.g1", 2)[1],
        )
    if rosa is not None and rosa.scope == "stream":
        memory, rosa = rosa, None
    has_rosa = any(map(_ROSA.match, tensors))
    if has_rosa and rosa is None:
        raise CheckpointError(
            f"{source}: no tensor says whether its ROSA has 1 or 4 bits and what no match gives; type --rosa qkv-1bit "
            'or --rosa qkv-4bit (in Python: heron.load(path, rosa=RosaConfig.preset("qkv-1bit")))'
        )
    if memory is not None and "memory.copy" not in tensors:
        raise CheckpointError(f"{source}: there is no ROSA memory in it (heron convert --add_rosa memory adds one)")
    if rosa is not None and not has_rosa:
        raise CheckpointError(f"{source}: there is no ROSA in it; drop rosa (heron convert --add_rosa adds a branch)")
    if "memory.copy" in tensors and memory is None:
        n_matches, n_rows = shape("memory.copy", 2)
        try:
            memory = RosaConfig.preset("memory", n_matches=n_matches, max_match=longest_match(n_rows))
        except ConfigError as error:
            told = f"{source}: no ROSA memory has a memory.copy of shape {(n_matches, n_rows)}: {error}"
            raise CheckpointError(told) from None
    try:
        return ModelConfig(
            variant=variant,
            n_layer=len(layers),
            n_embd=n_embd,
            vocab_size=vocab_size,
            ffn_dim=ffn_dim,
            **time_mix,
            deep_embed_4x=any(name.endswith(".ffn.enn4.weight") for name in tensors),
            has_ln0=has_ln0,
            rosa=rosa,
            memory=memory,
        )
    except ConfigError as error:
        raise CheckpointError(
            f"{source}: the sizes in it do not make a {variant} model: {error} (n_embd is the width of emb.weight, "
            "head_size that of blocks.0.att.r_k)"
        ) from None


@functools.lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """Name and shape of every tensor that a model of this config has."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in RWKV(config).state_dict().items()}
    return types.MappingProxyType(shapes)


def _variant(tensors: Mapping[str, Tensor], source: object) -> str:
    for mark, variant in _MARKS:
        if any(name.endswith(mark) for name in tensors):
            if variant == ROSA_TOY:
                raise CheckpointError(f"{source}: this is a {variant}; heron.checkpoint.load_toy(path) loads it")
            return variant
    if tensors and all(map(TUNED.match, tensors)):
        raise CheckpointError(
            f"{source}: a tuned initial state without weights; load the model it was tuned for, and this by "
            "heron.checkpoint.tuned_state(path, model.config)"
        )
    first = ", ".join(sorted(tensors)[:5]) or "none"
    raise CheckpointError(
        f"{source}: no RWKV-7 or RWKV-8 weights: blocks.0.att.w1 is missing; the first keys are {first}"
    )


def _elsewhere(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Behind which prefix a tensor stands that is missed, and how many have it; "" where there is none."""
    prefix = next((other.removesuffix(name) for other in tensors if other.endswith(f".{name}")), "")
    if not prefix:
        return ""
    n = sum(other.startswith(prefix) for other in tensors)
    return f"; {n} of {len(tensors)} names begin with {prefix!r}: take it off"


def _check(tensors: dict[str, Tensor], config: ModelConfig, source: object) -> None:
    expected = expected_shapes(config)
    may_be_absent = UNUSED if config.has_ln0 else UNUSED + LN0
    problems = []
    for name in expected:
        if name not in tensors and name not in may_be_absent:
            near = did_you_mean(name, tensors.keys() - expected.keys())
            problems.append(f"{name} is missing{f' ({near.strip()})' if near else ''}")
    for name, tensor in tensors.items():
        if TUNED.match(name):
            continue
        if name not in expected:
            problems.append(f"{name} is not part of a {config.variant} model")
        elif tensor.shape != expected[name] and not (_FLAT.search(name) and tensor.shape == (1, 1, *expected[name])):
            problems.append(f"{name} must be {tuple(expected[name])}, got {tuple(tensor.shape)}")
            if name.endswith("ffn.enn.weight") and tensor.shape == (config.vocab_size, config.ffn_dim):
                problems[-1] += " (a table this wide is the 4x form; rename it to ffn.enn4.weight)"
        if tensor.dtype not in _DTYPES:
            problems.append(f"{name} must be floating, got {tensor.dtype}")
        elif not is_finite(tensor):
            problems.append(f"{name} holds NaN or infinity: its training diverged, or the file is damaged")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        head_size = f", head_size {config.head_size}" if config.has_time_mix else ""
        raise CheckpointError(
            f"{source}: does not fit variant {config.variant} with n_layer {config.n_layer}, n_embd {config.n_embd}, "
            f"vocab_size {config.vocab_size}{head_size}: {'; '.join(problems[:5])}{more}"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: a sum, far faster than asking each, says so unless it overflows."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())
