"""Adapters in files: peft's folder, with the fingerprint of the base that it was trained on.

Rows of tables that were trained beside an adapter lie there too, in a file of their own: peft has no form for them, and
whole tables would be most of a model (:mod:`heron.checkpoint.table_rows`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heron import strict_json
from heron.checkpoint import table_rows
from heron.checkpoint.architecture import LN0, UNUSED, in_one_dtype, is_finite
from heron.checkpoint.formats import safetensors
from heron.checkpoint.table_rows import TableRows
from heron.errors import CheckpointError
from heron.files import as_path, new_folder, sha256, sync
from heron.model import RWKV
from heron.model.adapters import PREFIX, Adapter, kind_of, put_adapter
from heron.model.plain import own_parameters

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
_BASE, _KIND, _ROWS = "heron_base", "heron_kind", "heron_table_rows"  # in the metadata of WEIGHTS
_PROBES = 1 << 16  # numbers of each tensor that enter a fingerprint


class AdapterFile(NamedTuple):
    """What an adapter's folder holds."""

    folder: Path
    settings: dict[str, Any]  # of peft
    tensors: dict[str, Tensor]  # by peft's names
    base: str | None  # the fingerprint of its base; None: peft wrote the folder, which records none
    kind: str
    rows: TableRows | None  # of tables, trained beside it


def base_fingerprint(model: RWKV) -> str:
    """16 hex digits of a model's weights, whatever file and format they came from; adapters on it don't count.

    Up to 65,536 evenly spaced numbers of each tensor enter it, rounded to bf16: a base that was rounded to bf16 is the
    same base. Weights that were trained on or merged are another one. Of a base whose weights are quantized, take it
    before.
    """
    digest = hashlib.sha256()
    unused = UNUSED if model.config.has_ln0 else UNUSED + LN0
    for name, tensor in sorted((name, tensor) for _, name, tensor in own_parameters(model) if name not in unused):
        flat = tensor.detach().reshape(-1)
        probes = flat[:: max(1, flat.numel() // _PROBES)].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(probes.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    base: str | None = None,
    values: Mapping[str, Tensor] | None = None,
    row_ids: Tensor | None = None,
) -> None:
    """Write an adapter as peft's folder, which appears whole or not at all.

    Args:
        folder: that does not exist yet.
        base: what :func:`base_fingerprint` gave for the base; None: the adapter's, or it is taken of the model now.
        values: of the adapter's parameters by name, where the model computes with copies of them; None: its own.
        row_ids: (n,) int64, ascending: the tokens whose rows of tables were trained too; None: the adapter's.

    Raises:
        CheckpointError: the folder exists or cannot be written; a number that is not finite; rows were trained, and
            nothing says what the base was before.
    """
    folder = as_path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; name another folder")
    row_ids, base = adapter.row_ids if row_ids is None else row_ids, base or adapter.base
    if row_ids is not None and base is None:
        raise CheckpointError(f"{folder}: rows of tables were trained, so the model is no more its base; give `base`")
    tensors = {f"{PREFIX}{name}": part.cpu().contiguous() for name, part in adapter.tensors(values).items()}
    rows = None if row_ids is None else table_rows.rows_of(adapter.model, row_ids)
    for part in (tensors, {} if rows is None else rows.tables):
        _refuse_nonfinite(part, folder)
    about = {_BASE: base or base_fingerprint(adapter.model), _KIND: adapter.kind}
    with new_folder(folder) as temporary:
        if rows is not None:
            about |= {_ROWS: table_rows.write(rows, temporary / table_rows.FILE, about)}
        safetensors.write(tensors, temporary / WEIGHTS, about)
        settings = json.dumps(adapter.settings(), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(settings, encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is an adapter's folder, or a fine-tuning run that has one."""
    return any((folder / CONFIG).is_file() for folder in _places(as_path(path)))


def read_adapter(path: str | Path) -> AdapterFile:
    """The adapter in a folder, or in a fine-tuning run's.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = as_path(path)
    folder = next((folder for folder in _places(path) if (folder / CONFIG).is_file()), None)
    if folder is None:
        raise CheckpointError(f"{path}: no adapter here; wanted a folder with {CONFIG}, or a run with {FOLDER}/")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such file; only adapters in safetensors are read")
    try:
        settings = strict_json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: damaged: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise CheckpointError(f"{folder / CONFIG}: wanted peft's settings with a peft_type")
    tensors, about = safetensors.read(weights), safetensors.metadata(weights)
    _refuse_nonfinite(tensors, weights)
    rows = _rows_beside(folder, about)
    return AdapterFile(folder, settings, tensors, about.get(_BASE), about.get(_KIND) or kind_of(settings), rows)


def load_adapter(model: RWKV, path: str | Path) -> Adapter:
    """Put the adapter in a folder, or in a fine-tuning run's, on `model`: ready to run, to train on, to merge.

    Raises:
        CheckpointError: no adapter, a damaged one, one of another kind, or one of another base; see
            :func:`base_fingerprint`. Of an adapter that records no base only the shapes are compared, which a warning
            says.
        ConfigError: peft is missing.
    """
    file = read_adapter(path)
    if file.base is None:
        warnings.warn(f"{file.folder}: it does not say which base it is for; only shapes are compared", stacklevel=2)
    elif (own := base_fingerprint(model)) != file.base:
        raise CheckpointError(
            f"{file.folder}: it was trained on a base with fingerprint {file.base}, and this model has {own}; give the "
            "weights it was trained on. Weights that it was merged into already are others"
        )
    adapter = put_adapter(model, file.settings, file.tensors, file.kind, file.folder)
    if file.rows is not None:
        table_rows.put_rows(model, file.rows, file.folder / table_rows.FILE)
        adapter.row_ids, adapter.base = file.rows.ids, file.base
    return adapter


def merged(model: RWKV, path: str | Path, dtype: torch.dtype | None = None) -> RWKV:
    """A model with the adapter in a folder, or in a fine-tuning run's, in its weights; `model` is used up.

    The sums are rounded once: to `dtype`, or to the dtypes of the weights. Errors as in :func:`load_adapter`, and as
    :meth:`heron.model.adapters.Adapter.merge` and :func:`heron.checkpoint.architecture.in_one_dtype` say.
    """
    if dtype is not None:  # widened first, so that what is merged is not rounded to the old dtype on its way
        model = in_one_dtype(model, torch.promote_types(dtype, torch.float32), path)
    model = load_adapter(model, path).merge()
    return model if dtype is None else in_one_dtype(model, dtype, path)


def _rows_beside(folder: Path, about: Mapping[str, str]) -> TableRows | None:
    """The rows of tables that belong to an adapter of which the file says `about` of itself; None: there are none."""
    path = folder / table_rows.FILE
    if (wanted := about.get(_ROWS)) is None:
        if path.exists():
            raise CheckpointError(
                f"{path}: lies beside an adapter that says nothing of it, as one that peft has written again; put the "
                "run's own adapter_model.safetensors here, or move the rows away to do without them"
            )
        return None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, and the adapter was trained with it; copy the whole folder")
    if (found := sha256(path)) != wanted:
        raise CheckpointError(f"{path}: damaged, or of another adapter: wanted the sha256 {wanted}, got {found}")
    rows = table_rows.read(path)
    _refuse_nonfinite(rows.tables, path)
    return rows


def _places(path: Path) -> tuple[Path, Path]:
    return path, path / FOLDER


def _refuse_nonfinite(tensors: Mapping[str, Tensor], source: Path) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{source}: {name} holds NaN or infinity: its training diverged, or it is damaged")
