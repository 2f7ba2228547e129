"""Weights in and out: `heron.load`, `heron.save`, and the checkpoints of a run."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from heron import machine
from heron.checkpoint import card, run, sharded, shares
from heron.checkpoint.adapters import base_fingerprint
from heron.checkpoint.architecture import build, leave_unsaid
from heron.checkpoint.formats import gguf, hf, pth, safetensors, wrappers
from heron.checkpoint.vocabulary import GENERATION, WORLD_SIZE, Vocabulary, generation_config
from heron.config import PRESETS, ModelConfig, RosaConfig, TrainConfig
from heron.errors import CheckpointError, ConfigError, did_you_mean
from heron.files import as_path, new_file, new_folder, sync
from heron.model import RWKV, State, mixed_dtypes
from heron.model.coded import weights_of
from heron.model.rosa_toys import QKVToy, SelfToy, toy_from
from heron.model.tuned_state import BASE, TunedState
from heron.tokenizer import Tokenizer
from heron.tokenizer import load as load_tokenizer

__all__ = [
    "FORMATS",
    "load",
    "load_toy",
    "read_tensors",
    "put_right",
    "recorded",
    "save",
    "save_tuned_state",
    "tuned_state",
    "unsaid",
    "weights_file",
    "write",
]

FORMATS = ("pth", "safetensors", "hf", "gguf")
STATE = "state.pth"  # in a fine-tuning run
_FILES = {".pth": pth, ".safetensors": safetensors, ".gguf": gguf}


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    has_ln0: bool | None = None,
    rosa: RosaConfig | None = None,
) -> RWKV:
    """A model from a file or a run, on the CPU.

    Args:
        path: a .pth, .safetensors or .gguf file, a Hugging Face folder (config.json and safetensors), a checkpoint
            folder, or a run folder (its newest whole checkpoint, else its rwkv-final.pth). Variant and every size are
            read from the tensors.
        dtype: convert the weights to this; None: as in the file. A file that mixes dtypes (llama.cpp's F16 and BF16
            keep vectors in fp32) stays as it is and computes in the widest of them, which a warning says.
        has_ln0: whether a v8-hybrid applies its ln0, which its tensors cannot say; None: as its run or its config.json
            says, else no.
        rosa: how the ROSA in it works (1 or 4 bits, the rules), which tensors cannot say either, or its ROSA memory;
            None: as its run or its config.json says.

    Raises:
        CheckpointError: missing, unreadable, damaged, or not a model of a known variant: the message names the file
            and the tensor. ROSA of which nothing says how it works.
    """
    if not str(path).strip():
        raise CheckpointError(f"wanted the path of a model, got {path!r}; is a shell variable not set?")
    source = weights_file(as_path(path))
    tensors = read_tensors(source)
    model = build(tensors, source, dtype, *unsaid(tensors, source, has_ln0, rosa))
    if (widest := mixed_dtypes.widest(model)) is not None:
        warnings.warn(
            f"{source}: its weights mix dtypes; they stay as they are and compute in {_name(widest)}, the widest "
            "(dtype= in Python, --dtype: all in one)",
            stacklevel=2,
        )
    return model


def load_toy(path: str | Path) -> SelfToy | QKVToy:
    """One of upstream's ROSA toys from its .pth, on the CPU, sizes read from the tensors.

    Raises:
        CheckpointError: missing, unreadable, damaged, or not one of these toys.
    """
    return toy_from(read_tensors(as_path(path)), path)


def save(
    model: nn.Module, path: str | Path, format: str | None = None, tokenizer: Tokenizer | str | None = None
) -> None:
    """Write a model's weights, dtypes as they are. The file or folder appears whole or not at all.

    Args:
        model: an RWKV; for a .pth or .safetensors file any module, of which `state_dict()` is written.
        path: of the file or the new folder.
        format: "pth" (loads in upstream's tools), "safetensors" (a file, or a folder with config.json where `path` has
            no suffix), "hf" (a folder as flash-linear-attention and rwkv7-hf read it) or "gguf" (llama.cpp); the last
            two hold RWKV-7 alone. None: by the suffix of `path`.
        tokenizer: that of the model, or what :func:`heron.tokenizer.load` takes: a folder and a .gguf hold it, and the
            end of a document. None: World is assumed for 65,536 ids, which a warning says, and any other model goes
            without.

    Raises:
        CheckpointError: no such format, one that can't hold the model, adapters of peft or weights of codes in it, or
            the file cannot be written.
        ConfigError, DataError: no such tokenizer, or one with more ids than the model.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"wanted a model to save, got {type(model).__name__}; heron.save(model, path)")
    if adapted := next(
        (name for name in model.state_dict() if ".base_layer." in f".{name}" or ".modules_to_save." in name), None
    ):
        raise CheckpointError(
            f"{path}: an adapter is on {adapted}, and the file would hold it apart from its weight; merge it first "
            "(peft: merge_and_unload), or save the adapter alone (peft: save_pretrained)"
        )
    if (weights := weights_of(model)) is not None:
        raise CheckpointError(f"{path}: these weights are {weights}, for running alone; save what they were made of")
    config, path = getattr(model, "config", None), as_path(path)
    known = None
    if tokenizer is not None:
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        known = Vocabulary.of(tokenizer)
        if known is None:
            warnings.warn(f"{path}: no file can hold a tokenizer of the class {type(tokenizer).__name__}", stacklevel=2)
        elif not holds_tokenizer(path, format):
            warnings.warn(f"{path}: this file has no place for a tokenizer", stacklevel=2)
    elif config is not None and holds_tokenizer(path, format):
        known = assume(config.vocab_size, path)
    write(model.state_dict(), config, path, format, known)


def holds_tokenizer(path: Path, format: str | None) -> bool:
    """Whether what :func:`write` makes of these has a place for a tokenizer: a folder or a .gguf."""
    return format in ("hf", "gguf") or path.suffix == ".gguf" or (format == "safetensors" and not path.suffix)


def assume(vocab_size: int, path: Path) -> Vocabulary | None:
    """The tokenizer to assume for weights that come with none; a warning about `path` says which."""
    if vocab_size == WORLD_SIZE:
        warnings.warn(f"{path}: nothing tells the tokenizer; World is assumed, for {WORLD_SIZE:,} ids", stacklevel=3)
        return Vocabulary.of(load_tokenizer("world"))
    warnings.warn(f"{path}: nothing tells the tokenizer, so none goes along; name it (--tokenizer)", stacklevel=3)
    return None


def check_name(path: Path, format: str | None) -> None:
    """CheckpointError for a name, or a format, under which :func:`save` writes nothing."""
    if format not in (None, *FORMATS):
        raise CheckpointError(f"{path}: format must be {', '.join(FORMATS)}, got {format!r}")
    if format is None and path.suffix not in _FILES:
        raise CheckpointError(f"{path}: wanted a file name ending in {', '.join(_FILES)}, got {path.suffix!r}")
    if not (format is None or _is_folder(path, format)) and path.suffix != f".{format}":
        raise CheckpointError(f"{path}: wanted a file name ending in .{format}, got {path.suffix!r}")


def _is_folder(path: Path, format: str | None) -> bool:
    return format == "hf" or (format == "safetensors" and not path.suffix)


def write(
    tensors: Mapping[str, Tensor],
    config: ModelConfig | None,
    path: Path,
    format: str | None = None,
    vocabulary: Vocabulary | None = None,
    papers: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """:func:`save` for named tensors, of a model of `config`. A folder also holds the files `papers`."""
    check_name(path, format)
    if vocabulary is not None and config is not None and vocabulary.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer {vocabulary.spec} has {vocabulary.vocab_size} ids, the model only "
            f"{config.vocab_size}: it is that of another model"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if _is_folder(path, format):
        with new_folder(path) as temporary:
            eod = 0 if vocabulary is None else vocabulary.eod  # upstream closes documents by 0
            config = _needed(config, path)
            (hf.write_rwkv7 if format == "hf" else hf.write)(tensors, config, temporary, eod)
            files = {GENERATION: generation_config(eod), **(vocabulary.folder() if vocabulary else {})}
            kind, n_parameters = hf.model_type(temporary), sum(map(Tensor.numel, tensors.values()))
            files |= card.papers(config, n_parameters, vocabulary, kind, path.name, dict(papers))
            for name, content in files.items():
                (temporary / name).write_bytes(content)
                sync(temporary / name)
        return
    with new_file(path) as temporary:
        if path.suffix == ".gguf":
            gguf.write(tensors, _needed(config, path), temporary, vocabulary, path)
        else:
            _FILES[path.suffix].write(tensors, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named CPU tensors of a file or a Hugging Face folder, under upstream's names, unchecked."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_perhaps(path)}")
    machine.settle_threads()
    if path.is_dir():
        return sharded.read_model(path) | shares.whole_tables(path.parent) if _is_shards(path) else hf.read(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if run.is_checkpoint(path.parent) and path.name == run.MODEL:
        return safetensors.read_plain(path) | shares.whole_tables(path.parent)
    return safetensors.read_plain(path) if path.suffix == ".safetensors" else _format(path).read(path)


def put_right(path: Path) -> list[str]:
    """What reading changes about the tensors of a readable file or folder, in words."""
    if path.is_dir():
        return [] if _is_shards(path) else hf.put_right(path)
    if path.suffix == ".safetensors":
        return wrappers.described(safetensors.names(path))
    return pth.put_right(path) if path.suffix == ".pth" else []


def tuned_state(
    path: str | Path, config: ModelConfig, dtype: torch.dtype = torch.float32, model: RWKV | None = None
) -> State:
    """The initial state that state tuning left in a file as `blocks.i.att.time_state` (H, N_value, N_key), batch of 1.

    Args:
        path: a file with such tensors, alone or beside the weights, or a fine-tuning run with a state.pth.
        config: of the model that is to start from it. Its token shifts start at zero where the file has none.
        dtype: of the model's activations.
        model: that is to start from it; None: whether the file was tuned for other weights is not looked at.

    Raises:
        CheckpointError: no such tensors, or those of another model. Of a file that records no base, and of a model in
            fp16, whose weights are rounded differently, only the sizes are compared.
    """
    path = as_path(path)
    path = path / STATE if path.is_dir() else path
    tensors = read_tensors(path)
    if model is not None and BASE in tensors and model.emb.weight.dtype != torch.float16:
        wanted, own = bytes(tensors[BASE].tolist()).hex(), base_fingerprint(model)
        if wanted != own:
            raise CheckpointError(
                f"{path}: it was tuned on a base with fingerprint {wanted}, and this model has {own}; give the weights "
                "it was tuned on"
            )
    with torch.no_grad():
        tuned = TunedState.from_tensors(config, tensors, path)
        return tuned(torch.empty(1, 1), dtype=dtype)  # pyright: ignore[reportReturnType]


def save_tuned_state(tuned: TunedState, path: str | Path, base: str | None = None) -> None:
    """Write a tuned state to a .pth or .safetensors file, as upstream's tools read it.

    Args:
        base: the fingerprint of the model that it was tuned for; None: the file does not say.

    Raises:
        CheckpointError: no such format, or the file cannot be written.
    """
    of_base = {} if base is None else {BASE: torch.frombuffer(bytearray.fromhex(base), dtype=torch.uint8)}
    write({**tuned.tensors(), **of_base}, None, as_path(path))


def _perhaps(path: Path) -> str:
    """What somebody may have meant who named weights that are not there, as the end of a sentence."""
    if str(path) in PRESETS:
        return "; it is a preset, which has sizes and no weights"
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, beside) or did_you_mean(str(path), PRESETS)
    return f".{near}" if near else ""


def weights_file(path: Path) -> Path:
    """What `path` stands for: itself, a file or a Hugging Face folder, or the file of a checkpoint or run folder.

    Warns of each checkpoint of a run that is damaged and passed over.
    """
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_folder or (path / hf.CONFIG).exists():
        return path
    if run.is_checkpoint(path):
        run.verify(path)
        return _with_weights(path)
    final = path / "rwkv-final.pth"
    try:
        newest = run.newest(path, say=lambda text: warnings.warn(text, stacklevel=5))
    except CheckpointError:
        if not final.exists():
            raise
        newest = None
        warnings.warn(f"{path}: no checkpoint is whole; taking {final.name}", stacklevel=4)
    if newest is not None:
        return _with_weights(newest)
    if final.exists():
        return final
    raise CheckpointError(
        f"{path}: no weights here; wanted a run folder (checkpoints/step-*, rwkv-final.pth), a checkpoint folder, or "
        f"{hf.CONFIG} with safetensors"
    )


def _with_weights(checkpoint: Path) -> Path:
    """The weights in a verified checkpoint; CheckpointError where it holds only what trains beside frozen ones."""
    record = run.trainer_of(checkpoint)
    if "base" in record:
        base, home = record["base"]["path"], checkpoint.parents[1]
        flag = "--state" if record["exact"]["method"] == "state" else "--adapter"
        raise CheckpointError(
            f"{checkpoint}: holds what was trained beside the weights in {base}, and not these; type {base} {flag} "
            f"{home} once the run has finished"
        )
    shards = checkpoint / sharded.FOLDER
    return shards if shards.is_dir() else checkpoint / run.MODEL


def unsaid(
    tensors: Mapping[str, Tensor], source: Path, has_ln0: bool | None = None, rosa: RosaConfig | None = None
) -> tuple[bool | None, RosaConfig | None, RosaConfig | None]:
    """What tensors cannot say: `has_ln0`, `rosa`, and how ROSA memory works.

    As given (a `rosa` of scope stream is a memory), else as the run or the config.json around them says.
    """
    memory = None
    if rosa is not None and rosa.scope == "stream":
        rosa, memory = None, rosa
    told = recorded(source) if leave_unsaid(tensors) else None
    if told is None:
        return has_ln0, rosa, memory
    return told.has_ln0 if has_ln0 is None else has_ln0, rosa or told.rosa, memory or told.memory


def recorded(source: Path) -> ModelConfig | None:
    """The config that the run or the config.json around these weights records; None: neither is there."""
    if source.is_dir() and not _is_shards(source):
        return hf.recorded(source)
    if run.is_checkpoint(source.parent):
        try:
            model = run.trainer_of(source.parent).get("model")
            return None if model is None else ModelConfig.from_dict(model)
        except (OSError, ValueError, ConfigError) as error:
            raise CheckpointError(f"{source.parent / run.TRAINER}: missing or damaged: {error}") from None
    config = source.parent / "config.yaml"
    if source.name not in ("rwkv-init.pth", "rwkv-final.pth") or not config.exists():
        return None
    try:
        model = TrainConfig.from_yaml(config).model
    except ConfigError as error:
        raise CheckpointError(f"{config}, which lies beside {source.name}: {error}") from None
    return model if isinstance(model, ModelConfig) else None


def _is_shards(folder: Path) -> bool:
    return folder.name == sharded.FOLDER and run.is_checkpoint(folder.parent)


def _needed(config: ModelConfig | None, path: Path) -> ModelConfig:
    if config is None:
        raise CheckpointError(
            f"{path}: this format holds an RWKV alone; any other module goes into .pth or .safetensors"
        )
    return config


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _format(path: Path) -> ModuleType:
    if path.suffix not in _FILES:
        raise CheckpointError(f"{path}: wanted a file name ending in {', '.join(_FILES)}, got {path.suffix!r}")
    return _FILES[path.suffix]
