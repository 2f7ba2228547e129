"""GGUF, as llama.cpp reads RWKV-7 (architecture `rwkv7`), through the `gguf` package.

llama.cpp wants vectors, norms and small factors in fp32, so these are widened, and `heron.dtypes` in the metadata
remembers what they were: the way back gives the same bits. DeepEmbed, attention and ROSA have no tensor in this format.
Source of names, shapes and metadata: ggml-org/llama.cpp, pull request 12412, and gguf 0.19.
"""

from __future__ import annotations

import json
import re
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heron import strict_json
from heron.checkpoint.architecture import UNUSED, sizes_of
from heron.checkpoint.formats import gguf_header, gguf_vocabulary
from heron.checkpoint.formats.layout import LERP, Layout, Place, beyond_rwkv7, confirm, flat, row, same, transposed
from heron.checkpoint.vocabulary import Vocabulary
from heron.config import ModelConfig
from heron.errors import CheckpointError

ARCHITECTURE = "rwkv7"
_CONTEXT_LENGTH = 1048576  # what llama.cpp's own converter writes; the state has no length
_DTYPES_KEY = "heron.dtypes"
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type, by the dtype of matrices
_FUSED = "time_mix_lerp_fused.weight"
_MATRIX = re.compile(r"(emb|head|att\.(receptance|key|value|output)|ffn\.(key|value))\.weight$")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_VALUE_RANK_KEY = "rwkv7.attention.value_residual_mix_lora_rank"
_EPSILON_KEY, _EPSILON = "rwkv7.attention.layer_norm_epsilon", 1e-5


def _places() -> dict[str, Place]:
    norms = (("ln1", "attn_norm"), ("ln2", "attn_norm_2"), ("att.ln_x", "time_mix_ln"))
    places = {f"{ours}.{part}": Place(f"{theirs}.{part}") for ours, theirs in norms for part in ("weight", "bias")}
    for name in ("receptance", "key", "value", "output"):
        places[f"att.{name}.weight"] = Place(f"time_mix_{name}.weight")
    for letter in "wavg":
        for i in "12":
            places[f"att.{letter}{i}"] = Place(f"time_mix_{letter}{i}.weight", transposed, transposed)
    for name in ("w0", "a0", "v0", "k_k", "k_a"):
        places[f"att.{name}"] = Place(f"time_mix_{name}.weight", flat, row)
    places["att.r_k"] = Place("time_mix_r_k.weight", flat, same)
    places["ffn.x_k"] = Place("channel_mix_lerp_k.weight", same, row)
    for name in ("key", "value"):
        places[f"ffn.{name}.weight"] = Place(f"channel_mix_{name}.weight")
    return places


LAYOUT = Layout(
    tool="llama.cpp",
    layers="blk",
    top={
        "emb.weight": "token_embd.weight",
        "blocks.0.ln0.weight": "token_embd_norm.weight",
        "blocks.0.ln0.bias": "token_embd_norm.bias",
        "ln_out.weight": "output_norm.weight",
        "ln_out.bias": "output_norm.bias",
        "head.weight": "output.weight",
    },
    block=_places(),
)


def write(
    tensors: dict[str, Tensor],
    config: ModelConfig,
    path: Path,
    vocabulary: Vocabulary | None = None,
    target: Path | None = None,
) -> None:
    """Write an RWKV-7 with upstream-named `tensors`; OSError when the disk refuses.

    `vocabulary` is that of the model, None: unknown, and the file holds none. `target` is the name that the file will
    have, which is the model's name in it; None: `path`.
    `v0 v1 v2` of block 0, which nothing uses, become copies of `a0 a1 a2`, as llama.cpp wants it.

    Raises:
        CheckpointError: the model is more than RWKV-7, or the `gguf` package is not installed.
    """
    if (what := beyond_rwkv7(config)) is not None:
        raise CheckpointError(
            f"GGUF has no tensors for what a {what} adds to a v7; convert --variant v7 if those parts are "
            "neutral, or keep .pth or .safetensors"
        )
    gguf = _package()
    target = target or path
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(target.stem)
    if (file_type := _FILE_TYPES.get(tensors["emb.weight"].dtype)) is not None:
        writer.add_file_type(file_type)
    writer.add_context_length(_CONTEXT_LENGTH)
    for key, value in _facts(config).items():
        writer.add_uint32(key, value)
    writer.add_float32(_EPSILON_KEY, _EPSILON)
    layout, dtypes = _to_layout(tensors, config.n_layer)
    writer.add_string(_DTYPES_KEY, json.dumps(dtypes))
    gguf_vocabulary.write(gguf, writer, vocabulary, config.vocab_size, target)
    for name, tensor in layout.items():
        _add(gguf, writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> dict[str, Tensor]:
    """Upstream-named tensors of an RWKV-7, without the unused `v0 v1 v2` of block 0, in memory of their own.

    Raises:
        CheckpointError: damaged, another architecture, a quantised or unknown tensor, or no `gguf` package.
    """
    gguf = _package()
    try:
        gguf_header.read(path)
        reader = gguf.GGUFReader(path)
        told = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        dtypes = strict_json.loads(str(told.get(_DTYPES_KEY, "{}")).encode())
        stored = {item.name: _tensor(gguf, item) for item in reader.tensors}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a foreign file can fail anywhere in the package; every failure means the same
        raise CheckpointError(f"{path}: not a readable .gguf: {error or type(error).__name__}") from error
    if (architecture := told.get("general.architecture")) != ARCHITECTURE:
        raise CheckpointError(f"{path}: wanted architecture {ARCHITECTURE}, got {str(architecture)[:40]!r}")
    tensors = _from_layout(stored, told.get("rwkv7.wkv.head_size"), path)
    sizes = sizes_of(tensors, path)
    wanted = _facts(sizes)
    if sizes.n_layer == 1:
        del wanted[_VALUE_RANK_KEY]  # the v1 of block 0 is another one here
    confirm(told, wanted, path)
    epsilon = told.get(_EPSILON_KEY, _EPSILON)
    if not isinstance(epsilon, float) or abs(epsilon - _EPSILON) > 1e-9:
        raise CheckpointError(f"{path}: {_EPSILON_KEY} is {str(epsilon)[:40]}, but RWKV-7 has {_EPSILON:g}")
    return _narrowed(tensors, dtypes, path)


def _facts(config: ModelConfig) -> dict[str, Any]:
    """The metadata, uint32 each, that tensors confirm."""
    return {
        "rwkv7.embedding_length": config.n_embd,
        "rwkv7.block_count": config.n_layer,
        "rwkv7.feed_forward_length": config.ffn_dim,
        "rwkv7.attention.head_count": 0,
        "rwkv7.wkv.head_size": config.head_size,
        "rwkv7.attention.decay_lora_rank": config.decay_rank,
        "rwkv7.attention.iclr_lora_rank": config.iclr_rank,
        _VALUE_RANK_KEY: config.value_rank,
        "rwkv7.attention.gate_lora_rank": config.gate_rank,
    }


def _narrowed(tensors: dict[str, Tensor], dtypes: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in the dtypes that they had before they were written."""
    if not isinstance(dtypes, dict):
        raise CheckpointError(f"{path}: {_DTYPES_KEY}: wanted dtypes by name, got {type(dtypes).__name__}")
    out = dict(tensors)
    for name, dtype in dtypes.items():
        if name not in tensors or not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {_DTYPES_KEY}: no tensor {name[:80]!r}, or no dtype {str(dtype)[:40]!r}")
        out[name] = tensors[name].to(_DTYPES[dtype])
        if not torch.equal(out[name].to(tensors[name].dtype).nan_to_num(), tensors[name].nan_to_num()):
            raise CheckpointError(
                f"{path}: {name} cannot have been {dtype}, as {_DTYPES_KEY} says: it has numbers that are none"
            )
    return out


def _to_layout(tensors: dict[str, Tensor], n_layer: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under GGUF's names, and the dtypes of those of upstream's that are stored in a wider one."""
    wide = {
        name: tensor if _MATRIX.search(name) else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in tensors.items()
        if name not in UNUSED
    }
    stored = {name: tensor.dtype for name, tensor in wide.items()}
    fused = {}
    for layer in range(n_layer):
        names = [f"blocks.{layer}.att.{name}" for name in LERP]
        widest = torch.float64 if any(stored[name] == torch.float64 for name in names) else torch.float32
        fused[f"{LAYOUT.layers}.{layer}.{_FUSED}"] = torch.stack([wide.pop(name).to(widest) for name in names])
        stored.update(dict.fromkeys(names, widest))
    dtypes = {name: _NAMES[tensors[name].dtype] for name in stored if tensors[name].dtype != stored[name]}
    for ours, its in zip(UNUSED, "012", strict=True):
        wide[ours] = wide[f"blocks.0.att.a{its}"]
    return {**LAYOUT.out(wide), **fused}, dtypes


def _from_layout(stored: dict[str, Tensor], head_size: Any, path: Path) -> dict[str, Tensor]:
    """Upstream's names and shapes, dtypes as stored."""
    whole = {name: tensor for name, tensor in stored.items() if not name.endswith(_FUSED)}
    tensors = LAYOUT.back(whole, path)
    for name in stored.keys() - whole.keys():
        layer = re.fullmatch(rf"{LAYOUT.layers}\.(\d{{1,5}})\.{re.escape(_FUSED)}", name)
        if layer is None or stored[name].dim() != 4 or stored[name].shape[:3] != (len(LERP), 1, 1):
            raise CheckpointError(f"{path}: {name[:80]!r} must be (6, 1, 1, C), got {tuple(stored[name].shape)}")
        for part, values in zip(LERP, stored[name], strict=True):
            tensors[f"blocks.{layer[1]}.att.{part}"] = values.clone()
    for name in [name for name in tensors if name.endswith(".att.r_k")]:
        if not isinstance(head_size, int) or head_size < 1 or tensors[name].numel() % head_size:
            raise CheckpointError(f"{path}: {name}: {tensors[name].numel()} values do not make heads of {head_size}")
        tensors[name] = tensors[name].reshape(-1, head_size)
    return {name: tensor for name, tensor in tensors.items() if name not in UNUSED}


def _add(gguf: ModuleType, writer: Any, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type: its bytes, under GGUF's name for it
        content = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, content, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _tensor(gguf: ModuleType, item: Any) -> Tensor:
    kinds = gguf.GGMLQuantizationType
    dtypes = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16, kinds.F64: torch.float64}
    if item.tensor_type not in dtypes:
        raise CheckpointError(
            f"{item.name} is quantised ({item.tensor_type.name}); only F32, F16, BF16 and F64 files can be loaded"
        )
    shape = [int(size) for size in reversed(item.shape)]
    content = torch.from_numpy(np.array(item.data).view(np.uint8).reshape(-1))
    return content.view(dtypes[item.tensor_type]).reshape(shape)


def _package() -> ModuleType:
    if util.find_spec("gguf") is None:
        raise CheckpointError("reading and writing GGUF needs a package; type: pip install 'heron-rwkv[gguf]'")
    import gguf

    return gguf
