"""What a run that has not begun starts from: fresh initial values, the weights that were named, or those in its folder.

The official trainer starts from the newest `rwkv-*.pth` of the output folder, `rwkv-init.pth` before `rwkv-0.pth`, and
its scripts tell people to put a base model there under that name. So does this one, and it leaves the file as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heron.checkpoint import ownership, read_tensors
from heron.checkpoint.adapters import base_fingerprint
from heron.config import ModelConfig, TrainConfig
from heron.errors import CheckpointError, ConfigError
from heron.model import RWKV
from heron.model.quantized import check_device

_NUMBERED = re.compile(r"rwkv-([0-9]+)\.pth")
_WEIGHTS = (".pth", ".safetensors", ".gguf")


class Base(NamedTuple):
    """The frozen weights that something is trained beside. A run's record holds the two fields."""

    path: str
    fingerprint: str  # see heron.checkpoint.adapters.base_fingerprint


def frozen(config: TrainConfig, start: Path | None, model: RWKV | None, record: dict[str, Any] | None) -> Base | None:
    """The base of a run that freezes it; None: all weights train.

    Args:
        start, model: the weights, and where they were read.
        record: of the checkpoint that the run goes on from; None: it begins.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: the run began beside others.
    """
    if not config.freezes or config.finetune is None:
        return None
    if start is None or model is None:
        raise ConfigError(
            f"finetune, method {config.finetune.method}: trains beside weights, and the model names none; name a file"
        )
    base = Base(str(start), base_fingerprint(model))
    if record is not None and record["base"]["fingerprint"] != base.fingerprint:
        raise CheckpointError(
            f"{start}: has the fingerprint {base.fingerprint}, and this run began beside {record['base']['path']} with "
            f"{record['base']['fingerprint']}; give these weights as they were, or name another --out"
        )
    return base


def check_form(config: TrainConfig, device: torch.device, dtype: str) -> None:
    """ConfigError where a run asks for frozen weights in 8 or 4 bits, and `dtype` was chosen for a CPU.

    With --dtype bf16 such a run may be planned here, for another machine: it is refused when it begins.
    """
    if config.finetune is not None and config.finetune.quantizes and dtype == "fp32":
        check_device(config.finetune.base, device)


def candidates(out: Path) -> list[Path]:
    """Weights in an output folder that a run may start from and that no run of Heron's wrote, newest first.

    Raises:
        CheckpointError: two files of one number.
    """
    numbers: dict[int, Path] = {}
    for path in sorted(out.glob("rwkv-*.pth")) if out.is_dir() else []:
        match = _NUMBERED.fullmatch(path.name)
        if match is None and path.name != ownership.INIT:
            continue
        number = -1 if match is None else int(match[1])
        if number in numbers:
            raise CheckpointError(
                f"{out}: {numbers[number].name} and {path.name} are of one number; type which one to start from: "
                f"--model {path} --out {_another(out)}"
            )
        if not ownership.is_own(path):
            numbers[number] = path
    return [numbers[number] for number in sorted(numbers, reverse=True)]


def newest_whole(found: Sequence[Path], say: Callable[[str], None]) -> Path | None:
    """The newest of `found` that can be read; None where there are none.

    Initial values never take the place of weights that were trained: where no trained ones can be read, the newest file
    is given, so that its reader says what is wrong with it. One file alone is not read here.

    Args:
        found: what a run may start from, newest first.
        say: is told of each file that is passed over, and why.
    """
    damaged = []
    for path in found if len(found) > 1 else ():
        if path.name == ownership.INIT:
            break
        try:
            read_tensors(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for why in damaged:
            say(f"passing over damaged weights: {why}")
        return path
    return found[0] if found else None


def find(out: Path, model: ModelConfig | str, say: Callable[[str], None]) -> Path | None:
    """The weights that a run in `out` which has not begun starts from; None: fresh initial values.

    Args:
        out: the run folder, which may not exist yet.
        model: sizes, or the path of weights.
        say: is told of damaged weights that are passed over.

    Raises:
        CheckpointError: as :func:`named`; weights in `out` of which the name does not say that they are to start from.
    """
    if not isinstance(model, ModelConfig):
        return named(out, model, "--model")
    found = candidates(out)
    if not found:
        _refuse_unnamed(out)
    return newest_whole(found, say)


def named(out: Path, weights: str, flag: str) -> Path:
    """The path of the weights that `flag` names; CheckpointError where they are elsewhere and `out` has some too."""
    found, path = candidates(out), Path(weights)
    if found and path.resolve() not in [other.resolve() for other in found]:
        raise CheckpointError(
            f"{out}: {found[0].name} is there, and {flag} names {path}: drop {flag} to start from {found[0]}, or "
            f"type {flag} {path} --out {_another(out)}"
        )
    return path


def check_sizes(path: Path, held: ModelConfig, wanted: ModelConfig) -> None:
    """CheckpointError unless weights that were found have the sizes that were asked for; widths by rule may differ."""
    asked = {**wanted.to_dict(), **wanted.by_rule()}
    differing = [
        f"{name} {value} (asked for: {asked[name]})"
        for name, value in held.to_dict().items()
        if asked[name] != value and asked[name] is not None
    ]
    if differing:
        raise CheckpointError(
            f"{path}: a run starts from the weights in its folder, and these have {', '.join(differing)}; type "
            f"--model {path} without sizes to start from them, or name another --out"
        )


def what_it_lacks(path: Path) -> str:
    """For the header: where a run starts that begins with a file of weights."""
    return f"from the weights in {path}, which hold no moments and no position: AdamW and the schedule begin at step 1"


def _refuse_unnamed(out: Path) -> None:
    """CheckpointError where a folder holds weights under another name: the run would begin from random values."""
    found = [path for path in sorted(out.glob("*")) if path.suffix.lower() in _WEIGHTS] if out.is_dir() else []
    found = [path for path in found if path.name not in (ownership.INIT, ownership.FINAL)]
    if found:
        ending, lower = found[0].suffix, found[0].suffix.lower()
        rename = "" if ending == lower else f"rename it to end in {lower}, and "
        raise CheckpointError(
            f"{out}: holds {found[0].name}, under a name that no run starts from. To start from it, {rename}type "
            f"--model {found[0].with_suffix(lower)}; for fresh initial values name another --out"
        )


def _another(out: Path) -> str:
    return os.fspath(out.with_name(f"{out.name}-2"))
