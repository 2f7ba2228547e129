"""What a run that is started again would do otherwise than it did: other settings, a jump of the learning rate."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import heron
from heron import machine
from heron.checkpoint import run
from heron.config import ModelConfig, TrainConfig
from heron.data.loader import Corpus
from heron.data.sampling import magic_prime
from heron.errors import ConfigError
from heron.ops.adamw import adamw_choice
from heron.ops.global_norm import global_norm_choice
from heron.ops.head_mix import head_mix_choice
from heron.ops.shift_mix import shift_mix_choice
from heron.ops.wkv7 import wkv7_choice
from heron.optim import lr_at
from heron.train import run_data
from heron.train.step import Learner

EXACT = (  # settings that the numbers of every later step depend on
    "tokenizer", "seed", "ctx_len", "micro_bsz", "accumulate", "max_steps", "max_tokens",
    "lr_init", "lr_final", "warmup_steps", "beta1", "beta2", "adam_eps", "weight_decay", "grad_clip",
    "on_nonfinite", "spike", "tables", "tables_state", "weights", "tbptt",
)  # fmt: skip
_JUMP = 1.05  # a factor of the learning rate, up or down, that is told


def differing_settings(folder: Path, config: TrainConfig, asked: TrainConfig, data: str | None) -> list[str]:
    """Each setting that is not as in the run that a checkpoint is of, as a clause.

    Args:
        folder: the checkpoint.
        config: the settings now, with what the machine decides decided.
        asked: the settings as they were given: what they leave to the machine is not compared.
        data: fingerprint of the data now; None: they are not there.
    """
    before = run.trainer_of(folder)["exact"]
    now = {name: getattr(config, name) for name in EXACT} | {"dtype": config.dtype} | _of_finetuning(config)
    if data is not None:
        now["data"] = data
    for name in ("weights", "dtype"):
        if getattr(asked, name) == "auto":
            del now[name]
    found = [
        _changed(name, before[name], value) for name, value in now.items() if name in before and before[name] != value
    ]
    earlier = _config(folder)
    if earlier is not None and isinstance(config.model, str) and config.model != earlier.model:
        was = "initial values" if isinstance(earlier.model, ModelConfig) else earlier.model
        found.insert(0, f"model was {was} and is {config.model}")
    return found


def learning_rate_jump(folder: Path, step: int, config: TrainConfig) -> str | None:
    """How the learning rate jumps where a run goes on with another schedule; None where it does not.

    Args:
        folder: the checkpoint that it goes on from.
        step: finished steps.
    """
    earlier = _config(folder)
    if earlier is None or step == 0:
        return None
    expected, now = lr_at(min(step, earlier.total_steps), earlier), lr_at(step, config)
    last = lr_at(step - 1, earlier)
    if math.isclose(expected, now, rel_tol=1e-9):
        return None
    if last == 0 or now == 0:
        return f"the learning rate jumps from {last:.3g} to {now:.3g}" if last != now else None
    factor = now / last
    if 1 / _JUMP < factor < _JUMP:
        return None
    times = f"{factor:.3g} times as high" if factor > 1 else f"a factor of {factor:.3g}"
    steps = earlier.total_steps, config.total_steps
    why = "" if steps[0] == steps[1] else f": the schedule was one of {steps[0]:,} steps and is one of {steps[1]:,}"
    return f"the learning rate jumps from {last:.3g} in step {step} to {now:.3g} in step {step + 1}, {times}{why}"


def exact(config: TrainConfig, device: torch.device, corpus: Corpus, learner: Learner) -> dict[str, Any]:
    """What decides whether a resume can be bit-exact."""
    units = sorted(machine.cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    return {
        "data": corpus.fingerprint,
        "threads": config.threads,
        "device": str(device),
        "dtype": config.dtype,
        "heron": heron.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": " ".join((platform.machine(), torch.backends.cpu.get_cpu_capability(), *units)),
        "cuda": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "MKL_CBWR": os.environ.get("MKL_CBWR"),
        "wkv7": wkv7_choice(device, config.ctx_len).impl,
        "shift_mix": shift_mix_choice(device).impl,
        "head_mix": head_mix_choice(device).impl,
        "adamw": adamw_choice(device).impl,
        "global_norm": global_norm_choice(device).impl,
        "compile": learner.compiled.value,
        "magic_prime": run_data.prime(config, corpus),
        "processes": learner.ranks.count,
        "parallel": learner.parallel.value,
        "context_parallel": config.context_parallel,
        **{name: getattr(config, name) for name in EXACT},
        **_of_finetuning(config),
    }


def not_exact(
    record: dict[str, Any], config: TrainConfig, device: torch.device, corpus: Corpus, learner: Learner
) -> list[str]:
    """Each thing that is not as it was when the checkpoint was written, as a clause."""
    largest = magic_prime(len(corpus.train), config.ctx_len) if corpus.kind == "binidx" else None
    # the only ones there were before they were written down
    before = {
        "magic_prime": largest, "processes": 1, "parallel": "none", "context_parallel": 1, "tbptt": "",
        "adapter.tables": "frozen", "global_norm": "reference", **record["exact"],
    }  # fmt: skip
    now = exact(config, device, corpus, learner)
    unknown = [f"{name} was not written down" for name in now if name not in before]
    return unknown + [
        _changed(name, before[name], value) for name, value in now.items() if name in before and before[name] != value
    ]


def _changed(name: str, before: object, now: object) -> str:
    was, is_ = ("not given" if value == "" else value for value in (before, now))
    return f"{name} was {was} and is {is_}"


def _of_finetuning(config: TrainConfig) -> dict[str, Any]:
    """The settings of fine-tuning that later steps depend on; what the data say already is in their fingerprint."""
    if (finetune := config.finetune) is None:
        return {}
    found: dict[str, Any] = {"pack": finetune.pack, "mix": finetune.mix}
    if finetune.quantizes:
        found["base"] = finetune.base
    if finetune.has_pairs:
        found |= {"objective": finetune.objective, "dpo_beta": finetune.dpo_beta}
    if finetune.freezes:
        found |= {"method": finetune.method, "token_shifts": finetune.token_shifts}
    if finetune.adapter is not None:
        found |= {f"adapter.{name}": value for name, value in dataclasses.asdict(finetune.adapter).items()}
    return found


def _config(folder: Path) -> TrainConfig | None:
    """The settings in a checkpoint; None where another version of Heron had others."""
    try:
        return TrainConfig.from_yaml(folder / run.CONFIG)
    except ConfigError:
        return None
