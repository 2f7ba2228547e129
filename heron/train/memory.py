"""Memory in words: sizes, what an error says there was too little of, and the settings by which a run needs less."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from heron.config import ModelConfig, TrainConfig
from heron.config.finetune import QUANTIZED, tables_train
from heron.config.tbptt import EXACT_CHUNK
from heron.dist import SHARDED
from heron.errors import ConfigError
from heron.model import RWKV

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def size(text: str) -> int:
    """Bytes of "24GiB", "24G" (the same), "80GB" (decimal) or "1000000"; ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"memory: wanted a size such as 24GiB, 80GB or 16000000000, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def in_words(n_bytes: float) -> str:
    """A number of bytes in binary units."""
    power = 0
    while n_bytes >= 1024 and power < 3:
        n_bytes, power = n_bytes / 1024, power + 1
    return f"{n_bytes:,.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def parameters(model: ModelConfig) -> int:
    """The number of parameters of such a model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in RWKV(model).parameters())


def available() -> int | None:
    """Bytes of the host's memory that a process can still have, by Linux or its container; None: not known."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            found.append(max(0, int(limit.read()) - int(used.read())))
    except (OSError, ValueError):  # another system, no container, or one without a limit ("max")
        pass
    return min(found, default=None)


def check_host(n_bytes: int, what: str) -> None:
    """ConfigError where `what` needs more memory of the host than it has: the system would end the process for it."""
    there = available()
    if there is not None and n_bytes > there:
        raise ConfigError(
            f"{what} takes {in_words(n_bytes)}, and this machine has {in_words(there)} left; choose a smaller model, "
            "or a machine with more memory (heron estimate says how much training takes)"
        )


def shortage(error: BaseException) -> str | None:
    """What an error says was asked for when memory ran out, as a clause; None: it is about something else."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"a GPU had no {asked[1]} left" if asked else "a GPU had no memory left"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text:
        asked = re.search(r"allocate (\d+) bytes", text)
        return (
            f"the host had no {in_words(int(asked[1]))} ({asked[1]} bytes) left" if asked else "the host had none left"
        )
    if isinstance(error, (RuntimeError, TypeError, OverflowError)) and re.search("overflow|too large", text):
        return "sizes whose product no memory holds"
    if isinstance(error, MemoryError):
        asked = re.search(r"allocate ([\d.]+ \w+)", text)  # as NumPy puts it
        return f"the host had no {asked[1]} left" if asked else "the host had no memory left"
    return None


def knobs(config: TrainConfig, model: ModelConfig) -> list[tuple[str, TrainConfig]]:
    """Settings by which a run of `config` needs less memory, as flags, with the config that they make of it.

    The first keep the tokens of a step; the last cuts its samples. Which of them help, and how much, is for
    :mod:`heron.commands.estimate` to say.
    """
    found: list[dict[str, Any]] = []
    if not config.grad_checkpoint:
        found.append(dict(grad_checkpoint=True))
    has_pairs = config.finetune is not None and config.finetune.has_pairs
    whole = config.parallel not in SHARDED and config.context_parallel == 1  # what chunks need, for now
    if not config.tbptt and config.ctx_len > EXACT_CHUNK and whole and not has_pairs:
        found.append(dict(tbptt="exact" if model.rosa is None else str(EXACT_CHUNK)))
    if config.micro_bsz % 2 == 0:
        found.append(dict(micro_bsz=config.micro_bsz // 2, accumulate=config.accumulate * 2))
    if model.deep_embed is not None and config.tables == "device":
        found.append(dict(tables="host"))
    if config.tables == "host" and config.tables_state == "fp32" and tables_train(config.finetune):
        found.append(dict(tables_state="bf16"))
    if config.processes > 1 and config.parallel == "ddp" and not (config.freezes or config.tbptt or has_pairs):
        found.append(dict(parallel="fsdp"))
    if config.dtype == "fp32":
        found.append(dict(dtype="bf16"))
    elif config.weights != "bf16" and not (config.finetune is not None and config.finetune.base == "fp32"):
        found.append(dict(weights="bf16"))
    if (base := _smaller_base(config)) is not None:
        found.append(dict(base=base))
    if config.ctx_len > 1:
        found.append(dict(ctx_len=config.ctx_len // 2))
    return [
        (
            " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items()),
            _changed(config, **changes),
        )
        for changes in found
    ]


def _smaller_base(config: TrainConfig) -> str | None:
    """The next smaller form of frozen weights that this run can have; None: there is none."""
    finetune = config.finetune
    if finetune is None or not finetune.freezes or config.device == "cpu" or config.dtype == "fp32":
        return None
    if finetune.base == QUANTIZED[-1] or (finetune.adapter is not None and finetune.adapter.kind in ("pissa", "miss")):
        return None
    return QUANTIZED[finetune.base in QUANTIZED]


def _changed(config: TrainConfig, base: str | None = None, **changes: Any) -> TrainConfig:
    """The settings with `changes`, and on another `base`."""
    if base is not None and config.finetune is not None:
        changes["finetune"] = dataclasses.replace(config.finetune, base=base)
    return dataclasses.replace(config, **changes)


def remedy(config: TrainConfig, model: ModelConfig | None) -> str:
    """Which settings to try where memory runs out, in words; None: before the sizes of the model were known."""
    if model is None:
        return "That was while the weights were read"
    flags = [flags for flags, _ in knobs(config, model)]
    return f"Try {', or '.join(flags)}; heron estimate says what each is worth. Checkpoints are whole"
