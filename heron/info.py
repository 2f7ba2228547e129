"""What `heron info` prints: the variant, the sizes, and for each parameter how it starts and how it is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from heron.checkpoint import read_tensors, weights_file
from heron.checkpoint.architecture import UNUSED, config_of
from heron.config import PRESETS, ModelConfig, TrainConfig
from heron.errors import CheckpointError
from heron.model import RWKV
from heron.model.init import rule
from heron.optim import group_of


def presets() -> str:
    """One line per preset."""
    rows = [("preset", "variant", "layers", "width", "vocab", "parameters")]
    for name in PRESETS:
        config = ModelConfig.preset(name)
        total = sum(p.numel() for p in _skeleton(config).parameters())
        rows.append((name, config.variant, config.n_layer, config.n_embd, config.vocab_size, f"{total:,}"))
    return _table(rows)


def describe(model: str, params: bool) -> str:
    """A weights file, a checkpoint, a run folder or a preset, in words; with `params`, a row per parameter too."""
    if model in PRESETS:
        config, dtypes, odd = ModelConfig.preset(model), "", ""
    else:
        if not Path(model).exists():
            raise CheckpointError(f"{model}: no such file, folder or preset; presets: {', '.join(PRESETS)}")
        source = weights_file(Path(model))
        tensors = read_tensors(source)
        config = config_of(tensors, source)
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
        missing = [name for name in UNUSED if name not in tensors]
        odd = f"{', '.join(missing)} absent (never used)" if missing else ""
        model = str(source)
    skeleton = _skeleton(config)
    parameters = dict(skeleton.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    tables = sum(p.numel() for name, p in parameters.items() if name.endswith("enn.weight"))
    facts = [
        ("what", model),
        ("variant", config.variant),
        ("sizes", f"n_layer {config.n_layer}, n_embd {config.n_embd}, head_size {config.head_size}"),
        ("", f"ffn_dim {config.ffn_dim}, vocab_size {config.vocab_size}"),
        ("ranks", _ranks(config)),
        ("parameters", f"{total:,}" + (f", {tables:,} of them DeepEmbed tables" if tables else "")),
        ("dtype", dtypes),
        ("odd", odd),
    ]
    lines = [f"{name:<12}{value}" for name, value in facts if value]
    if params:
        lines += ["", _parameter_table(skeleton, config)]
    return "\n".join(lines)


def _ranks(config: ModelConfig) -> str:
    return ", ".join(f"{name} {getattr(config, f'{name}_rank')}" for name in ("decay", "iclr", "value", "gate"))


def _parameter_table(skeleton: RWKV, config: ModelConfig) -> str:
    rows = [("name", "shape", "group", "lr", "decay", "initial value")]
    for name, parameter in skeleton.named_parameters():
        group = group_of(name, parameter)
        shape = "x".join(map(str, parameter.shape))
        decay = f"{TrainConfig.weight_decay:g}" if group.decays else "0"
        rows.append((name, shape, group.name, f"{group.lr_scale:g}x", decay, rule(name, config).text))
    return _table(rows)


def _skeleton(config: ModelConfig) -> RWKV:
    with torch.device("meta"):
        return RWKV(config)


def _table(rows: list[tuple[object, ...]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
