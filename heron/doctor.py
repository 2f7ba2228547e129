"""What `heron doctor` prints: what this machine has, what each op would run on and why, what to install."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import textwrap

import torch

from heron import __version__, compilation, machine
from heron.config import ModelConfig
from heron.ops import _select

COLUMNS = 80
_EXTRAS = ("tensorboard", "wandb", "transformers", "gguf", "lm-eval")
_NEEDED = ("numpy", "safetensors", "PyYAML", "rich", "pyrwkv-tokenizer", "tokenizers", "matplotlib")


def report() -> str:
    """The whole report, in lines of at most 80 columns (a longer path is left whole)."""
    device = machine.choose_device("auto")
    there = torch.device(device.value)
    dtype = machine.choose_dtype("auto", there)
    weights = machine.choose_weights("auto", dtype.value, there)
    compiled = compilation.choose("auto", there, ModelConfig())
    operators = {
        "wkv7": _select.wkv7(there, 512),
        "wkv7, T=1": _select.wkv7(there, 1),
        "shift and mix": _select.shift_mix(there),
        "time-mix heads": _select.head_mix(there),
        "head and loss": _select.linear_cross_entropy(there),
        "optimizer": _select.adamw(there),
        "rows of tables": _select.row_adamw(there),
        "rosa": _select.rosa(there),
        "rosa gradients": _select.rosa_gradients(there),
    }
    if there.type == "cpu":
        decoding = {"a step": _select.token_step(there)}
    else:
        decoding = {
            "norm and mix": _select.norm_mix(there),
            "time-mix heads": _select.head_step(there),
            "drawing": _select.sample_rows(there),
            "rows of tables": _select.copy_rows(there),
        }
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in machine.cpu_flags()]
    sections = {
        "machine": [
            ("heron", __version__),
            ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
            ("cpu kernels", torch.backends.cpu.get_cpu_capability()),
            ("cpu flags", ", ".join(units) or "not known"),
            ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that PyTorch can use"),
            ("nvcc", shutil.which("nvcc") or "not on the path (on a GPU the kernels are built with it)"),
        ],
        "a training run here would use": [
            ("device", f"{device.value}: {device.reason}"),
            ("precision", f"{dtype.value}: {dtype.reason}"),
            ("weights", f"{weights.value}: {weights.reason}"),
            ("compile", f"{compiled.value}: {compiled.reason}"),
            *((name, f"{choice.impl}: {choice.reason}") for name, choice in operators.items()),
        ],
        "decoding here would use": [(name, f"{choice.impl}: {choice.reason}") for name, choice in decoding.items()],
        "packages": [(name, _version(name) or f"MISSING: {_install(name)}") for name in _NEEDED],
        "extras": [(name, _version(name) or f"not installed: {_install(name)}") for name in _EXTRAS],
    }
    lines = []
    for title, facts in sections.items():
        lines += [title, *(_wrapped(name, value) for name, value in facts), ""]
    return "\n".join(lines).rstrip()


def _wrapped(name: str, value: str) -> str:
    return textwrap.fill(
        value, COLUMNS, initial_indent=f"  {name:<18}", subsequent_indent=" " * 20, break_long_words=False
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(package: str) -> str:
    return f"{sys.executable.rsplit('/', 1)[-1]} -m pip install '{package}'"
