"""Hugging Face folders: `config.json` beside safetensors weights.

Two kinds. RWKV-7 goes out in the layout that flash-linear-attention and rwkv7-hf share (`model_type` rwkv7). Every
variant goes out in our own (`model_type` heron): upstream names, and a config that says what tensors cannot.
Source of the first: the model code of fla-core 0.6.0 and rwkv7-hf 0.9.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from heron import strict_json
from heron.checkpoint import vocabulary
from heron.checkpoint.architecture import UNUSED, sizes_of
from heron.checkpoint.formats import safetensors
from heron.checkpoint.formats.layout import LERP, Layout, Place, beyond_rwkv7, confirm, flat, row, same, transposed
from heron.config import ModelConfig
from heron.errors import CheckpointError, ConfigError
from heron.files import sync

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OURS, RWKV7 = "heron", "rwkv7"
HEAD_SIZE = 64
_HEADS = (
    "the group norm of this layout has eps = head_dim * 1e-5 and RWKV's has 64e-5, so that they agree for "
    "head_dim 64 alone, and this one is {}; take --format safetensors"
)
_SQUARED_RELU = ("relu2", "relu_squared", "squared_relu")
_LARGEST_CONFIG = 1 << 24  # bytes

_FUSED = ".attn.x_x"

# Where transformers finds the model's class, as the released folders tell it (trust_remote_code=True).
_CODE = "modeling_rwkv7"
_AUTO_MAP = {
    "AutoConfig": f"{_CODE}.RWKV7Config",
    "AutoModel": f"{_CODE}.RWKV7Model",
    "AutoModelForCausalLM": f"{_CODE}.RWKV7ForCausalLM",
}
_CODE_TEXT = '''"""RWKV-7 for transformers: the classes of flash-linear-attention, else those of rwkv7-hf."""

try:
    from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM, RWKV7Model
except ImportError:
    from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM, RWKV7Model

__all__ = ["RWKV7Config", "RWKV7ForCausalLM", "RWKV7Model"]
'''


def _places() -> dict[str, Place]:
    norms = (("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm"))
    places = {f"{ours}.{part}": Place(f"{theirs}.{part}") for ours, theirs in norms for part in ("weight", "bias")}
    for ours, theirs in (("receptance", "r"), ("key", "k"), ("value", "v"), ("output", "o")):
        places[f"att.{ours}.weight"] = Place(f"attn.{theirs}_proj.weight")
    for letter in "wavg":
        places[f"att.{letter}1"] = Place(f"attn.{letter}_lora.lora.0.weight", transposed, transposed)
        places[f"att.{letter}2"] = Place(f"attn.{letter}_lora.lora.2.weight", transposed, transposed)
    for letter in "wav":
        places[f"att.{letter}0"] = Place(f"attn.{letter}_lora.lora.2.bias", flat, row)
    for name in LERP:
        places[f"att.{name}"] = Place(f"attn.{name}", same, row)
    for name in ("k_k", "k_a"):
        places[f"att.{name}"] = Place(f"attn.{name}", flat, row)
    places["att.r_k"] = Place("attn.r_k")
    places["ffn.x_k"] = Place("ffn.x_k", flat, row)
    for name in ("key", "value"):
        places[f"ffn.{name}.weight"] = Place(f"ffn.{name}.weight")
    return places


LAYOUT = Layout(
    tool="flash-linear-attention and rwkv7-hf",
    layers="model.layers",
    top={
        "emb.weight": "model.embeddings.weight",
        "ln_out.weight": "model.norm.weight",
        "ln_out.bias": "model.norm.bias",
        "head.weight": "lm_head.weight",
    },
    block=_places(),
)


def read(folder: Path) -> dict[str, Tensor]:
    """Upstream-named tensors of a folder of either kind.

    Raises:
        CheckpointError: a config or an index that is damaged or of another model, a missing file, an unknown tensor.
    """
    kind, config = model_type(folder), _config(folder)
    tensors = {}
    for file in _weight_files(folder):
        for name, tensor in safetensors.read(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: {name} stands in another file of {folder} too")
            tensors[name] = tensor
    tensors = safetensors.unwrapped(tensors, folder)  # of our kind, what heron.hf writes begins with `rwkv.`
    if kind == RWKV7:
        tensors = LAYOUT.back(_unfused(_untied(tensors, config, folder), folder), folder)
        sizes = sizes_of(tensors, folder)
        told = _as_written_here(config, sizes)
        for head_size in (told["head_dim"], sizes.head_size):
            if head_size != HEAD_SIZE:
                raise CheckpointError(f"{folder / CONFIG}: {_HEADS.format(head_size)}")
        wanted = _rwkv7_facts(sizes)
        if sizes.n_layer == 1:
            del wanted["v_low_rank_dim"]  # no tensor of this layout tells it, as block 0 has no use for it
        config = told
    else:
        told = _told(folder, config)
        wanted = sizes_of(tensors, folder, told.has_ln0, told.rosa, told.memory).to_dict()
        if config.get("tie_word_embeddings"):  # transformers writes one of two that are the same
            tensors.setdefault("head.weight", tensors["emb.weight"].clone())
    confirm(config, wanted, folder / CONFIG)
    return tensors


def _as_written_here(config: dict[str, object], sizes: ModelConfig) -> dict[str, object]:
    """A config of this layout with what other writers leave out or say otherwise put as :func:`write_rwkv7` has it.

    As flash-linear-attention reads it: a number as `value_dim` is that of every layer; `head_dim` goes before
    `num_heads`, which stand for each other where one is missing; `hidden_ratio` matters where there is no
    `intermediate_size`, and then the tensors say the same; squared ReLU has three names.
    """
    told = dict(config)
    if type(told.get("value_dim")) is int:
        told["value_dim"] = [told["value_dim"]] * sizes.n_layer
    heads = told.pop("num_heads", None)
    if told.get("head_dim") is None:
        told["head_dim"] = sizes.n_embd // heads if type(heads) is int and heads > 0 else HEAD_SIZE
    if told.get("hidden_act") in _SQUARED_RELU:
        told["hidden_act"] = "sqrelu"
    told.pop("tie_word_embeddings", None)
    return told


def _untied(tensors: dict[str, Tensor], config: dict[str, object], source: object) -> dict[str, Tensor]:
    """The tensors with a head of their own, where the config ties it to the embedding."""
    emb, head = LAYOUT.top["emb.weight"], LAYOUT.top["head.weight"]
    if not config.get("tie_word_embeddings") or emb not in tensors:
        return tensors
    if head in tensors and not torch.equal(tensors[head], tensors[emb]):
        raise CheckpointError(
            f"{source}: {CONFIG} says tie_word_embeddings True, but {head} is another matrix than {emb}; RWKV-7 wants "
            "False, with a head of its own"
        )
    return {**tensors, head: tensors[emb].clone()}


def recorded(folder: Path) -> ModelConfig | None:
    """What our own config says, tensors unseen; None for a config of the other kind."""
    config = _config(folder)
    return _told(folder, config) if config.get("model_type") == OURS else None


def _told(folder: Path, config: dict[str, Any]) -> ModelConfig:
    fields = {name: value for name, value in config.items() if name in ModelConfig.__dataclass_fields__}
    try:
        return ModelConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def end_of_document(folder: Path) -> object:
    """The eos_token_id of a folder: its generation_config.json's, else its config.json's; None: neither says one."""
    for name in (vocabulary.GENERATION, CONFIG):
        if (folder / name).is_file() and (eod := _json(folder / name).get("eos_token_id")) is not None:
            return eod[0] if isinstance(eod, list) and eod else eod
    return None


def model_type(folder: Path) -> str:
    """ "heron" or "rwkv7"; CheckpointError for a folder of any other model."""
    kind = _config(folder).get("model_type")
    if kind not in (OURS, RWKV7):
        raise CheckpointError(f"{folder / CONFIG}: model_type must be {RWKV7} or {OURS}, got {str(kind)[:40]!r}")
    return kind


def write(tensors: dict[str, Tensor], config: ModelConfig, folder: Path, eod: int | None = 0) -> None:
    """Write our own kind of folder, for any variant, into the empty `folder`; OSError when the disk refuses.

    `eod` is the id that ends a document; None: no id does.
    """
    free = {
        "architectures": ["HeronForCausalLM"],
        "model_type": OURS,
        "dtype": _dtype_of(tensors),
        **vocabulary.ids(eod),
    }
    _write(tensors, free | config.to_dict(), folder)


def write_rwkv7(tensors: dict[str, Tensor], config: ModelConfig, folder: Path, eod: int | None = 0) -> None:
    """Write the layout of flash-linear-attention and rwkv7-hf into the empty `folder`; OSError when the disk refuses.

    `eod` as in :func:`write`.

    Raises:
        CheckpointError: the model is more than RWKV-7, or its heads are not of size 64.
    """
    if (what := beyond_rwkv7(config)) is not None:
        raise CheckpointError(
            f"the Hugging Face layout of RWKV-7 has no place for what a {what} adds to a v7; "
            "take --format safetensors, which heron.hf loads, or convert --variant v7 if those parts are neutral"
        )
    if config.head_size != HEAD_SIZE:
        raise CheckpointError(_HEADS.format(config.head_size))
    kept = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
    free = {
        "architectures": ["RWKV7ForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": RWKV7,
        "dtype": _dtype_of(tensors),
        "hidden_ratio": cast(int, config.ffn_dim) / config.n_embd,
        "attn_mode": "chunk",
        "use_cache": True,
        **vocabulary.ids(eod),
    }
    (folder / f"{_CODE}.py").write_text(_CODE_TEXT, encoding="utf-8")
    sync(folder / f"{_CODE}.py")
    _write(LAYOUT.out(kept), free | _rwkv7_facts(config), folder)


def _rwkv7_facts(config: ModelConfig) -> dict[str, object]:
    """What decides the logits; each field is written, since the two packages' defaults are those of other models."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "intermediate_size": config.ffn_dim,
        "value_dim": [config.n_embd] * config.n_layer,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.iclr_rank,
        "v_low_rank_dim": config.value_rank,
        "gate_low_rank_dim": config.gate_rank,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def _dtype_of(tensors: dict[str, Tensor]) -> str:
    return str(tensors["emb.weight"].dtype).removeprefix("torch.")


def _write(tensors: dict[str, Tensor], config: dict[str, object], folder: Path) -> None:
    safetensors.write({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sync(folder / WEIGHTS)
    sync(folder / CONFIG)


def put_right(folder: Path) -> list[str]:
    """What :func:`read` changes about a readable folder beyond names and shapes of its layout, in words."""
    if not any(name.endswith(_FUSED) for file in _weight_files(folder) for name in safetensors.names(file)):
        return []
    return [f"x_r to x_g are fused (*{_FUSED}), as in early files of flash-linear-attention; read apart"]


def _unfused(tensors: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """The tensors with each `x_x` of early fla files taken apart."""
    out = {}
    for name, tensor in tensors.items():
        if not name.endswith(_FUSED):
            out[name] = tensor
            continue
        if tensor.dim() == 0 or tensor.shape[0] != len(LERP):
            raise CheckpointError(f"{source}: {name} must hold {len(LERP)} rows, got {tuple(tensor.shape)}")
        for part, values in zip(LERP, tensor, strict=True):
            out[name.removesuffix("x_x") + part] = values.clone()
    return out


def _weight_files(folder: Path) -> list[Path]:
    """The weights that a folder holds itself; links may lead to `blobs` of the Hugging Face cache it lies in."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder}: wanted {WEIGHTS} or {INDEX} beside {CONFIG}; neither is there")
        _check_place(folder, WEIGHTS)
        return [folder / WEIGHTS]
    index = _json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{folder / INDEX}: wanted weight_map, names of files by names of tensors")
    files = sorted(set(index.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: wanted .safetensors files of this folder, got {file[:80]!r}")
        _check_place(folder, file)
        if not (folder / file).exists():
            raise CheckpointError(f"{folder / file}: no such file, though {INDEX} lists it")
    return [folder / file for file in files]


def _check_place(folder: Path, file: str) -> None:
    home = (folder / file).resolve().parent
    if home not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
        raise CheckpointError(f"{folder / file}: a link that leads out of the folder; copy the file in its place")


def _config(folder: Path) -> dict[str, object]:
    return _json(folder / CONFIG)


def _json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise CheckpointError(f"{path}: wanted at most {_LARGEST_CONFIG:,} bytes, got {path.stat().st_size:,}")
        content = strict_json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: wanted an object, got {type(content).__name__}")
    return content
