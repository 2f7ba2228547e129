"""What `heron info` prints: the variant, the sizes, and for each parameter how it starts and how it is trained."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron.checkpoint import STATE as STATE_FILE
from heron.checkpoint import adapters, put_right, read_tensors, table_rows, unsaid, weights_file
from heron.checkpoint.architecture import LN0, UNUSED, config_of
from heron.config import PRESETS, ModelConfig, RosaConfig, TrainConfig
from heron.config.finetune import DEFAULTS
from heron.data import binidx, recalled
from heron.errors import CheckpointError
from heron.model import RWKV, State
from heron.model.init import rule
from heron.model.memory import MEMORY_BYTES
from heron.model.state import ROSA_BYTES
from heron.model.tuned_state import BASE, TUNED
from heron.optim import ADAPTER, STATE, TABLE, group_of

_PARTS = {
    "v7": "RWKV-7",
    "v7a": "RWKV-7 with a hidden-gated DeepEmbed",
    "v7b": "RWKV-7 with a hidden-gated DeepEmbed and DeepEmbedAttention",
    "v8": "RWKV-8: RWKV-7 with DeepEmbed",
    "v8-hybrid": "RWKV-8 with DeepEmbedAttention",
    "rosa-lm": "ROSA and channel mixing, no WKV",
}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def run(options: argparse.Namespace) -> None:
    if options.presets or options.model is None:
        print(presets())
    if options.model is not None and adapters.is_adapter(options.model):
        print(describe_adapter(options.model))
    elif options.model is not None:
        is_data = binidx.is_binidx(options.model)
        print(binidx.describe(options.model) if is_data else describe(options.model, options.params, options.rosa))
        if is_data and recalled.path_of(options.model).exists():
            print(f"recalled    {recalled.describe(options.model, verify=True)}; its hash is right")


def presets() -> str:
    """One line per preset."""
    rows: list[Sequence[object]] = [("preset", "variant", "layers", "width", "vocab", "parameters")]
    for name in PRESETS:
        config = ModelConfig.preset(name)
        total = sum(p.numel() for p in _skeleton(config).parameters())
        rows.append((name, config.variant, config.n_layer, config.n_embd, config.vocab_size, f"{total:,}"))
    return _table(rows)


def describe(model: str, params: bool, rosa: RosaConfig | None = None) -> str:
    """A weights file, a checkpoint, a run folder or a preset, in words; with `params`, a row per parameter too.

    `rosa`: as in :func:`heron.load`.
    """
    if model in PRESETS:
        config, odd = ModelConfig.preset(model), []
        tensors: Mapping[str, Tensor] = _skeleton(config).state_dict()
    else:
        if not Path(model).exists():
            raise CheckpointError(f"{model}: no such file, folder or preset; presets: {', '.join(PRESETS)}")
        tuned = Path(model) / STATE_FILE
        source = tuned if tuned.is_file() else weights_file(Path(model))
        tensors = read_tensors(source)
        if tensors and all(map(TUNED.match, tensors)):
            return _describe_state(source, tensors)
        config = config_of(tensors, source, *unsaid(tensors, source, rosa=rosa))
        odd = [*put_right(source), *oddities(tensors, config)]
        model = str(source)
    skeleton = _skeleton(config)
    total = sum(p.numel() for p in skeleton.parameters())
    tables = [tensor for name, tensor in tensors.items() if group_of(name, tensor) is TABLE]
    n_rows = sum(table.numel() for table in tables)
    head_size = f", head_size {config.head_size}" if config.has_time_mix else ""
    facts = [
        ("what", model),
        ("variant", config.variant),
        ("", _PARTS[config.variant] + (", in the 4x form" if config.deep_embed_4x else "")),
        ("rosa", _rosa(config.rosa) if config.rosa else ""),
        ("memory", _memory(config.memory) if config.memory else ""),
        ("sizes", f"n_layer {config.n_layer}, n_embd {config.n_embd}" + head_size),
        ("", f"ffn_dim {config.ffn_dim}, vocab_size {config.vocab_size}"),
        ("ranks", _ranks(config) if config.has_time_mix else ""),
        ("parameters", f"{total:,}" + (f", {n_rows:,} of them in tables" if n_rows else "")),
        ("dtype", "" if model in PRESETS else _dtypes(tensors)),
        ("tables", _table_bytes(tables, config) if tables else ""),
        ("state", _state_bytes(config)),
        *(("odd" if i == 0 else "", text) for i, text in enumerate(odd)),
    ]
    lines = [f"{name:<12}{value}" for name, value in facts if value]
    if params:
        lines += ["", *_parameter_table(skeleton, config)]
    return "\n".join(lines)


def describe_adapter(path: str) -> str:
    """An adapter's folder, or a fine-tuning run's, in words."""
    file = adapters.read_adapter(path)
    settings = file.settings
    rank, alpha = settings.get("r", 0), settings.get("lora_alpha")
    kept = ""
    if file.kind == "pissa" and settings.get("init_lora_weights") is True:
        rank, alpha, kept = rank // 2, (alpha or 0) / 2, ", kept as LoRA of twice the rank beside the unchanged base"
    targets = settings.get("target_modules") or ()
    tables = {} if file.rows is None else file.rows.tables
    groups = dict.fromkeys(group_of(name, tensor) for name, tensor in (*file.tensors.items(), *tables.items()))
    facts = [
        ("what", f"adapter {file.folder}"),
        ("kind", f"{file.kind}{kept}"),
        ("rank", f"{rank}" + (f", alpha {alpha:g}" if alpha else "")),
        ("targets", targets if isinstance(targets, str) else ", ".join(sorted(targets))),
        *(
            [("tables", f"{len(file.rows.ids):,} rows of each of {len(tables)}, in {table_rows.FILE}")]
            if file.rows
            else []
        ),
        ("base", file.base or "not recorded"),
        ("parameters", f"{sum(map(Tensor.numel, (*file.tensors.values(), *tables.values()))):,}"),
        ("dtype", _dtypes({**file.tensors, **tables})),
        *(
            ("group", f"{group.name}: lr {DEFAULTS['lora']['lr_init']:g} unless set, no decay: {group.reason}")
            for group in groups
        ),
    ]
    return "\n".join(f"{name:<12}{value}" for name, value in facts)


def _describe_state(source: Path, tensors: Mapping[str, Tensor]) -> str:
    base = bytes(tensors[BASE].tolist()).hex() if BASE in tensors else "not recorded"
    tensors = {name: tensor for name, tensor in tensors.items() if name != BASE}
    states = [tensor for name, tensor in tensors.items() if name.endswith(".time_state")]
    shape = "x".join(map(str, states[0].shape)) if states else "none"
    shifts = ", and token shifts" if len(states) < len(tensors) else ""
    facts = [
        ("what", f"tuned initial state {source}"),
        ("sizes", f"n_layer {len(states)}, {shape} of each layer (heads, values, keys){shifts}"),
        ("base", base),
        ("parameters", f"{sum(map(Tensor.numel, tensors.values())):,}"),
        ("dtype", _dtypes(tensors)),
        ("group", f"{STATE.name}: lr {DEFAULTS['state']['lr_init']:g} unless set, no decay: {STATE.reason}"),
    ]
    return "\n".join(f"{name:<12}{value}" for name, value in facts)


def oddities(tensors: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    """Everything about a file's tensors that a reader would not expect, a line each."""

    def all_are(tail: str, value: float) -> bool:
        found = [tensor for name, tensor in tensors.items() if name.endswith(tail)]
        return bool(found) and all(bool((tensor == value).all()) for tensor in found)

    odd = []
    if config.has_time_mix and (missing := [name for name in UNUSED if name not in tensors]):
        odd.append(f"{', '.join(missing)} absent (never used)")
    if not config.has_ln0:
        held = "held but not applied" if LN0[0] in tensors else "absent"
        odd.append(f"ln0 {held}, as in the upstream script")
    if any(map(TUNED.match, tensors)):
        odd.append("a tuned initial state lies beside the weights (att.time_state)")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        odd.append("dtypes are mixed")
    if config.has_time_mix and config.head_size != 64:
        odd.append(f"head_size is {config.head_size}; all released models have 64")
    if config.ffn_dim != 4 * config.n_embd:
        odd.append(f"ffn_dim is {config.ffn_dim}, not 4 * n_embd")
    if flat := [name for name, tensor in tensors.items() if ".qkv.x_" in name and tensor.dim() == 3]:
        odd.append(f"{', '.join(flat)} stored as (1, 1, n)")
    if all_are("att.output.weight", 0) and all_are("ffn.value.weight", 0):
        odd.append("no block writes anything: these are initial values")
    if all_are("ffn.enn.weight", 1) or all_are("ffn.enn4.weight", 1) or (all_are("ffn.s2", 0) and all_are("ffn.s0", 1)):
        odd.append("every DeepEmbed gate is 1: fresh or up-cycled, not trained")
    if all_are("qkv.lnv.weight", 0) and all_are("qkv.lnv.bias", 0):
        odd.append("the attention writes nothing: fresh or up-cycled, not trained")
    if all_are("rosa.o.weight", 0) and all_are("rosa.o.bias", 0):
        odd.append("the ROSA branch writes nothing: fresh or up-cycled, not trained")
    if all_are("memory.copy", 0) and all_are("memory.scale", 0):
        odd.append("the ROSA memory adds nothing: fresh or up-cycled, not trained")
    if all_are("ffn.s_emb_x.weight", 0) and not all_are("ffn.s2", 0):
        odd.append("ffn.s_emb_x is 0: it has been merged into ffn.s_emb")
    half = torch.finfo(torch.float16).max
    if large := [name for name, tensor in tensors.items() if tensor.abs().max() > half]:
        odd.append(f"{', '.join(large)} beyond {half:g}, the largest number of fp16")
    return odd


def sizes(config: ModelConfig) -> str:
    head_size = f" N{config.head_size}" if config.has_time_mix else ""
    rosa = f", ROSA of {config.rosa.bits} bits" if config.rosa else ""
    rosa += ", ROSA memory" if config.memory else ""
    return f"{config.variant} L{config.n_layer} C{config.n_embd}{head_size} V{config.vocab_size}{rosa}"


def _ranks(config: ModelConfig) -> str:
    return ", ".join(f"{name} {getattr(config, f'{name}_rank')}" for name in ("decay", "iclr", "value", "gate"))


def _memory(memory: RosaConfig) -> str:
    window = "all tokens" if memory.window is None else f"the last {memory.window:,} tokens"
    end = "" if memory.end is None else f", within documents that end with id {memory.end}"
    return f"{memory.n_matches} matches of at most {memory.max_match} tokens over {window}{end}"


def _rosa(rosa: RosaConfig) -> str:
    reach = "" if rosa.max_match is None else f", matches of at most {rosa.max_match} symbols"
    return f"{rosa.source}, {rosa.bits}-bit symbols, no match gives {rosa.no_match}{reach}; gradient {rosa.grad}"


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return ", ".join(name if len(counts) == 1 else f"{name} ({n} tensors)" for name, n in sorted(counts.items()))


def _table_bytes(tables: list[Tensor], config: ModelConfig) -> str:
    size = sum(table.nbytes for table in tables)
    return f"{len(tables)} of {_bytes(size)} ({tables[0].dtype}); a token reads {_bytes(size / config.vocab_size)}"


def _state_bytes(config: ModelConfig) -> str:
    state = State.zeros(config, 1, torch.device("meta"), torch.float32)
    a_token = config.n_layer * 64 * 4 + 8 if config.has_attention else 0
    if config.rosa is not None:
        a_token += config.n_layer * config.n_embd // config.rosa.bits * ROSA_BYTES
    if config.memory is not None and config.memory.window is None:
        a_token += MEMORY_BYTES
    growth = f", and {_bytes(a_token)} more with each token" if a_token else ""
    return f"{_bytes(state.nbytes)} a sequence in fp32{growth}"


def _bytes(size: float) -> str:
    power = 0
    while size >= 1024 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.3g} {_UNITS[power]}" if size < 1000 else f"{size:.0f} {_UNITS[power]}"


def _parameter_table(skeleton: RWKV, config: ModelConfig) -> list[str]:
    rows: list[Sequence[object]] = [("name", "shape", "group", "lr", "decay", "initial value", "source")]
    groups = {}
    for name, parameter in skeleton.named_parameters():
        group, start = group_of(name, parameter), rule(name, config)
        groups[group.name] = group.reason
        shape = "x".join(map(str, parameter.shape))
        decay = f"{TrainConfig.weight_decay:g}" if group.decays else "0"
        source = "ours" if start.ours else "RWKV-LM"
        rows.append((name, shape, group.name, f"{group.lr_scale:g}x", decay, start.text, source))
    legend = [f"{name:<12}{reason}" for name, reason in groups.items()]
    for method, group in (("full", None), ("lora", ADAPTER), ("state", STATE)):
        lrs = f"lr {DEFAULTS[method]['lr_init']:g} to {DEFAULTS[method]['lr_final']:g}, no decay"
        beside = "as above" if group is None else f"weights are frozen; group {group.reason}"
        legend.append(f"{'finetune':<12}--method {method}: {lrs}; {beside}")
    if TABLE.name in groups:
        legend.append(
            f"{'finetune':<12}--adapter.tables rows: tables train, in group table; low-rank: factors beside them, "
            "in group adapter"
        )
    if any(row[-1] == "ours" for row in rows):
        legend.append(f"{'ours':<12}our own choice: nothing is public about how this starts and how it is trained")
    return [_table(rows), "", *legend]


def _skeleton(config: ModelConfig) -> RWKV:
    with torch.device("meta"):
        return RWKV(config)


def _table(rows: Sequence[Sequence[object]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
