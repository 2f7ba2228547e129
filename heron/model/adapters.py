"""Adapters: low-rank updates of linear layers and tables, trained while the weights of these stay as they are.

The library peft computes them (LoRA, rsLoRA, DoRA, PiSSA, MiSS). PiSSA starts from the largest singular vectors of a
weight W. Elsewhere their product is taken off W; here W stays as it is, and the product is subtracted by a second
adapter, which does not train. So one base serves any adapter, in any dtype, and a file holds both as one LoRA of twice
the rank.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from heron.config.finetune_adapter import AdapterConfig
from heron.errors import CheckpointError, ConfigError, did_you_mean
from heron.model import adapted_linear
from heron.model.deep_embed import DeepEmbed, tables_of
from heron.model.plain import adapted, own_parameters
from heron.model.rwkv import RWKV

PREFIX = "base_model.model."  # that peft puts before the names in its files
_TRAINED, _START = "default", "start"  # peft's names of the adapter, and of what PiSSA subtracts
_IN_FILE = re.compile(r"\.(?:lora_|miss_block)")
_LARGEST_RANK = 1 << 16  # in a file
_EXACT, _MORE = 512, 8  # singular vectors are computed exactly up to this side, else with so many to spare
_LORA_STARTS = (True, False, "gaussian", "orthogonal")  # others change the weight of the base by themselves
# Of the settings in a file, those that peft is given. Others have it import modules by name, or change the network.
_CHOOSE = ("exclude_modules", "layers_to_transform", "layers_pattern")
_READ = {
    "peft_type", "r", "target_modules", "modules_to_save", "bias", "rank_pattern", "alpha_pattern", "lora_alpha",
    "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "miss_dropout", "mini_r", "init_weights", *_CHOOSE,
}  # fmt: skip
_TELLS_NOTHING = {
    "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_PLAIN_NAME = re.compile(r"\^?[\w.]+\$?")


class Adapter:
    """An adapter on a model. Its parameters are those of the model that require a gradient.

    Attributes:
        model: with the adapter on its layers.
        kind: one of :data:`heron.config.finetune_adapter.KINDS`.
        row_ids: (n,) int64, ascending: the tokens whose rows of the model's tables are not the base's; None: all are.
        base: the fingerprint of the base, where rows are not; None: the model tells it.
    """

    row_ids: Tensor | None = None
    base: str | None = None

    def __init__(self, model: RWKV, kind: str):
        self.model, self.kind = model, kind

    def tensors(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What a file holds, by the names of peft without their prefix. PiSSA's two parts are one LoRA in it.

        `values`: of :func:`adapter_parameters`, by name; None: those that the model has.
        """
        trained = self._part(_TRAINED, values)
        if _START not in self._configs:
            return trained
        start = self._part(_START, values)
        return {name: torch.cat((part, start[name]), 0 if ".lora_A." in name else 1) for name, part in trained.items()}

    def settings(self) -> dict[str, Any]:
        """What adapter_config.json says of :meth:`tensors`."""
        settings = self._configs[_TRAINED].to_dict()
        if _START in self._configs:
            settings |= {"r": 2 * settings["r"], "lora_alpha": 2 * settings["lora_alpha"], "init_lora_weights": True}
        settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        return {**settings, "inference_mode": True}

    @torch.no_grad()
    def merge(self) -> RWKV:
        """Add the adapter to the weights, in fp64, round once to their dtypes, and take it off; gives the model.

        Raises:
            CheckpointError: a merged weight is not finite: the adapter's training diverged, or its dtype is too narrow.
        """
        for name, module in list(_layers(self.model)):
            base: Any = _weightless(module) if hasattr(module, "modules_to_save") else _merged(module, name)
            self.model.set_submodule(name, base)
        vars(self.model).pop("peft_config", None)
        self.model.requires_grad_(True)
        return self.model

    @property
    def _configs(self) -> dict[str, Any]:
        return self.model.peft_config  # pyright: ignore[reportReturnType]

    def _part(self, adapter_name: str, values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        values = None if values is None else dict(values)
        with _quiet():
            found = peft_library().get_peft_model_state_dict(
                self.model, values, adapter_name=adapter_name, save_embedding_layers=False
            )
        return {name: tensor.detach() for name, tensor in found.items()}


def add_adapter(model: RWKV, config: AdapterConfig) -> Adapter:
    """Put a fresh adapter on linear layers of `model`, under which it computes what it did, and freeze all else.

    But for DeepEmbed tables, which `config.tables` may let train ("rows") or put the adapter on, too ("low-rank").

    The adapter's parameters are fp32 (fp64 in a fp64 model) whatever the dtype of the weights, on their device. Its
    initial values are drawn from torch's global generator.

    Raises:
        ConfigError: peft is missing; a target that no layer has, that is no linear layer, or that has an adapter
            already; a rank that is too large for a layer; DoRA on a weight with a row of zeros, by whose length it
            would divide; tables that are to train, and there are none.
    """
    library = peft_library()
    layers, tables = _linear_layers(model, config), _tables(model, config)
    for name, layer in layers.items():
        _check_layer(name, layer, config)
    targets = _peft_targets(config, layers)
    if config.tables == "low-rank":
        for name, table in tables.items():
            _check_rank(name, table.num_embeddings, table.embedding_dim, min(table.weight.shape), config)
        targets = sorted({*targets, *_names_within_blocks(tables)})
    common: dict[str, Any] = dict(r=config.rank, target_modules=targets)
    alpha = config.rank if config.alpha is None else config.alpha
    if config.kind == "miss":
        settings = library.MissConfig(miss_dropout=config.dropout, **common)
    else:
        common |= dict(lora_alpha=alpha)
        settings = library.LoraConfig(
            lora_dropout=config.dropout, use_rslora=config.kind == "rslora", use_dora=config.kind == "dora", **common
        )
    _inject(model, settings, _TRAINED)
    if config.kind == "pissa":
        _inject(model, library.LoraConfig(**common), _START)
        for name in layers:
            _start_from_singular_vectors(model.get_submodule(name), math.sqrt(config.rank / alpha))
    for table in tables.values() if config.tables == "rows" else ():
        table.weight.requires_grad_(True)
    return Adapter(model, config.kind)


def put_adapter(
    model: RWKV, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str, source: object
) -> Adapter:
    """Put on `model` the adapter that `settings` (of adapter_config.json) and `tensors` describe, ready to train on.

    Args:
        tensors: by the names of peft, with its prefix or without, of a :class:`heron.RWKV` or of a model of heron.hf.
        kind: the adapter's; see :func:`kind_of`.
        source: named in errors.

    Raises:
        CheckpointError: another kind of adapter; tensors that do not fit this model.
        ConfigError: peft is missing.
    """
    library, settings = peft_library(), dict(settings)
    method, start = settings.get("peft_type"), settings.get("init_lora_weights", True)
    if method not in ("LORA", "MISS") or start not in _LORA_STARTS:
        what = f"peft_type {method!r}" if method not in ("LORA", "MISS") else f"init_lora_weights {start!r}"
        raise CheckpointError(f"{source}: {what}: heron reads LORA and MISS; merge it with peft itself")
    for name, value in settings.items():
        if value and name not in _READ and name not in _TELLS_NOTHING:
            raise CheckpointError(f"{source}: it uses {name}, which heron does not read; merge it with peft itself")
    patterns = {**(settings.get("rank_pattern") or {}), **(settings.get("alpha_pattern") or {})}
    if odd := next((name for name in patterns if not _PLAIN_NAME.fullmatch(name)), None):
        raise CheckpointError(f"{source}: rank_pattern, alpha_pattern: wanted names of modules, got {odd!r:.80}")
    for rank in (settings.get("r"), *(settings.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
            raise CheckpointError(f"{source}: r: wanted a rank from 1 to {_LARGEST_RANK}, got {rank!r:.80}")
    given = {name.removeprefix(PREFIX).removeprefix("rwkv."): tensor for name, tensor in tensors.items()}
    settings = {name: value for name, value in settings.items() if name in _READ}
    chooses = [settings.pop(name, None) for name in _CHOOSE]
    if any(chooses) or isinstance(settings.get("target_modules"), str):  # the tensors tell which modules those are
        settings["target_modules"] = sorted({_IN_FILE.split(name)[0] for name in given if _IN_FILE.search(name)})
    for name in ("target_modules", "modules_to_save"):  # of a model of heron.hf they may be whole paths
        if isinstance(paths := settings.get(name), list):
            settings[name] = [path.removeprefix("rwkv.") if isinstance(path, str) else path for path in paths]
    try:
        config = library.LoraConfig if method == "LORA" else library.MissConfig
        config = config.from_peft_type(**settings)
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            _inject(model, config, _TRAINED)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: not an adapter of this model: {_first_line(error)}") from None
    adapter = Adapter(model, kind)
    wanted = {name: tensor.shape for name, tensor in adapter.tensors().items()}
    for name in sorted(wanted.keys() | given.keys()):
        got = tuple(given[name].shape) if name in given else "nothing"
        if name not in wanted or wanted[name] != (given[name].shape if name in given else None):
            want = tuple(wanted[name]) if name in wanted else "nothing"
            raise CheckpointError(f"{source}: {name}: wanted {want} on this model, got {got}: made for another one")
    with _quiet():
        library.set_peft_model_state_dict(model, given)
    return adapter


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that belong to an adapter, by name, what PiSSA subtracts and does not train too."""
    of_model = {name for name, _, _ in own_parameters(model)}
    return {name: parameter for name, parameter in model.named_parameters() if name not in of_model}


def peft_library() -> ModuleType:
    """The library; ConfigError that says what to install where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"adapters need the package peft ({error}); install it: pip install 'heron-rwkv[finetune]'"
        ) from None
    return peft


def _linear_layers(model: RWKV, config: AdapterConfig) -> dict[str, nn.Linear]:
    """Those that the targets name."""
    if taken := next(iter(adapted(model)), None):
        raise ConfigError(f"adapter.targets: an adapter is on {taken} already; merge it or load the model again")
    all_layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for target in config.names:
        if target == "all":
            found |= {name: layer for name, layer in all_layers.items() if name != "head"}
            continue
        named = {name: part for name, part in model.named_modules() if f".{name}".endswith(f".{target}")}
        if other := next((name for name in named if name not in all_layers), None):
            kind = type(named[other]).__name__
            raise ConfigError(
                f"adapter.targets: {target!r} names {other}, of the class {kind}, and wanted are linear layers, as "
                f"{', '.join(_names_within_blocks(all_layers))}"
                + ("; tables are for --adapter.tables" if isinstance(named[other], DeepEmbed) else "")
            )
        if not named:
            known = _names_within_blocks(all_layers)
            hint = did_you_mean(target, [*known, *(name.rpartition(".")[2] for name in known)])
            raise ConfigError(
                f"adapter.targets: no linear layer of this {model.config.variant} is named {target!r}.{hint} There are "
                f"{', '.join(known)}"
            )
        found |= {name: all_layers[name] for name in named}
    return {name: layer for name, layer in all_layers.items() if name in found}


def _tables(model: RWKV, config: AdapterConfig) -> dict[str, DeepEmbed]:
    """Those that are to change; none where `config` leaves them as they are."""
    if config.tables == "frozen":
        return {}
    found = tables_of(model)
    if not found:
        raise ConfigError(
            f"adapter.tables {config.tables}: variant {model.config.variant} has no DeepEmbed tables; leave it out"
        )
    return found


def _check_layer(name: str, layer: nn.Linear, config: AdapterConfig) -> None:
    largest = layer.in_features if config.kind == "miss" else min(layer.in_features, layer.out_features)
    _check_rank(name, layer.out_features, layer.in_features, largest, config)
    if config.kind == "dora" and bool((layer.weight.detach() == 0).all(dim=1).any()):
        raise ConfigError(
            f"adapter.kind: dora divides by the length of each row of a weight, and {name} has rows of zeros, as fresh "
            "weights have; take lora, or other targets"
        )


def _check_rank(name: str, n_rows: int, n_columns: int, largest: int, config: AdapterConfig) -> None:
    if config.rank > largest:
        raise ConfigError(
            f"adapter.rank: {config.rank} is more than the {largest} that {name} ({n_rows} x {n_columns}) has room for"
        )


def _peft_targets(config: AdapterConfig, layers: Mapping[str, nn.Linear]) -> list[str]:
    """The targets as peft matches them: by the end of a name. `all` becomes the names within a block."""
    named = {name for name in config.names if name != "all"}
    if "all" in config.names:
        named |= {name for name in _names_within_blocks(layers) if name != "head"}
    return sorted(named)


def _names_within_blocks(layers: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name.split(".", 2)[2] if name.startswith("blocks.") else name for name in layers))


def _inject(model: RWKV, settings: Any, adapter_name: str) -> None:
    """Have peft put an adapter on `model`, all on its device, whose tables may be elsewhere, in at least fp32."""
    if settings.peft_type == "LORA":
        adapted_linear.use_in(model, settings)
    with _quiet():
        peft_library().inject_adapter_in_model(settings, model, adapter_name=adapter_name)
    for parameter in adapter_parameters(model).values():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        parameter.data = parameter.data.to(model.emb.weight.device, dtype)


@torch.no_grad()
def _start_from_singular_vectors(layer: Any, scale: float) -> None:
    """Let both adapters of `layer` be the largest singular vectors of its weight; the one that trains is added."""
    weight = layer.get_base_layer().weight
    rank = layer.r[_TRAINED]
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if (side := min(weight.shape)) <= _EXACT:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, min(rank + _MORE, side), niter=16)
        right = right.t()
    left, right, root = left[:, :rank], right[:rank], values[:rank].sqrt() * scale
    for adapter_name, sign in ((_TRAINED, 1), (_START, -1)):
        layer.lora_A[adapter_name].weight.copy_(root[:, None] * right)
        layer.lora_B[adapter_name].weight.copy_(sign * left * root)
    layer.set_adapter([_TRAINED, _START])
    for part in (layer.lora_A[_START], layer.lora_B[_START]):
        part.requires_grad_(False)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that peft has put around one of the model's, by the name of that."""
    for name in adapted(model):
        yield name, model.get_submodule(name)


def _weightless(wrapper: Any) -> nn.Module:
    """The module that was trained in place of another one, which peft keeps beside it."""
    return wrapper.modules_to_save[wrapper.active_adapter]


def _merged(layer: Any, name: str) -> nn.Module:
    """The module under an adapter, with the adapter in its weight."""
    dtype = layer.get_base_layer().weight.dtype
    try:
        layer.double().merge(safe_merge=True)
        merged = layer.get_base_layer().to(dtype)
        if not bool(merged.weight.isfinite().all()):
            raise ValueError
    except ValueError:
        raise CheckpointError(
            f"{name}: with the adapter its weight is not finite in {str(dtype).removeprefix('torch.')}: the adapter's "
            "training diverged, or the dtype is too narrow; take bf16 or fp32"
        ) from None
    return merged


def kind_of(settings: Mapping[str, Any]) -> str:
    """Which of our kinds peft's settings are."""
    if settings["peft_type"] == "MISS":
        return "miss"
    if settings.get("use_dora"):
        return "dora"
    return "rslora" if settings.get("use_rslora") else "lora"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What peft warns of (a second adapter, embeddings that are not saved beside) is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
