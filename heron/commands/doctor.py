"""What `heron doctor` prints: what this machine has, what each op would run on and why, what to install.

With `--build` it builds every kernel instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys
import textwrap
import time

import torch

from heron import __version__, machine
from heron.config import ModelConfig
from heron.errors import KernelError, counted
from heron.model import compiled as compilation
from heron.ops import ahead
from heron.ops.adamw import adamw_choice
from heron.ops.global_norm import global_norm_choice
from heron.ops.head_mix import head_mix_choice
from heron.ops.head_step import head_step_choice
from heron.ops.linear_cross_entropy import linear_cross_entropy_choice
from heron.ops.norm_mix import norm_mix_choice
from heron.ops.rosa import rosa_choice
from heron.ops.rosa.soft import soft_choice
from heron.ops.rows import copy_rows_choice, row_adamw_choice
from heron.ops.sample_rows import sample_rows_choice
from heron.ops.shift_mix import shift_mix_choice
from heron.ops.token_step import one_launch_choice, token_step_choice
from heron.ops.wkv7 import wkv7_choice

COLUMNS = 80
_EXTRAS = (
    "tensorboard", "wandb", "transformers", "accelerate", "gguf", "lm-eval", "pyarrow", "peft", "bitsandbytes",
    "fastapi", "uvicorn", "pydantic", "prometheus-client", "llguidance", "httptools", "uvloop", "miditok", "symusic",
    "music21",
)  # fmt: skip
_NEEDED = ("numpy", "safetensors", "PyYAML", "rich", "pyrwkv-tokenizer", "tokenizers", "matplotlib", "Jinja2")


def run(options: argparse.Namespace) -> None:
    if options.build:
        build(torch.device(machine.choose_device("auto").value))
    else:
        print(report())


def build(device: torch.device) -> None:
    """Build every kernel for a GPU; KernelError where one can't be built."""
    if device.type != "cuda":
        raise KernelError("doctor --build: wanted a CUDA GPU to build kernels for; a CPU's code is built at first use")
    begun = time.perf_counter()
    if failed := ahead.build_all(device):
        raise KernelError(f"doctor --build: {len(failed)} of {len(ahead.ALL)} kernels could not be built")
    print(f"all {len(ahead.ALL)} kernels are built, after {time.perf_counter() - begun:.0f} s")


def report() -> str:
    """The whole report, in lines of at most 80 columns (a longer path is left whole)."""
    device = machine.choose_device("auto")
    there = torch.device(device.value)
    ahead.build_for_training(there)
    ahead.build_for_decoding(there)
    dtype = machine.choose_dtype("auto", there)
    weights = machine.choose_weights("auto", dtype.value, there)
    compiled = compilation.choose("auto", there, ModelConfig())
    operators = {
        "wkv7": wkv7_choice(there, 512),
        "wkv7, T=1": wkv7_choice(there, 1),
        "shift and mix": shift_mix_choice(there),
        "time-mix heads": head_mix_choice(there),
        "head and loss": linear_cross_entropy_choice(there),
        "norm of gradients": global_norm_choice(there),
        "optimizer": adamw_choice(there),
        "rows of tables": row_adamw_choice(there),
        "rosa": rosa_choice(there),
        "rosa gradients": soft_choice(there),
    }
    if there.type == "cpu":
        decoding = {"a step": token_step_choice(there)}
    else:
        decoding = {
            "a step of one text": one_launch_choice(there),
            "norm and mix": norm_mix_choice(there),
            "time-mix heads": head_step_choice(there),
            "drawing": sample_rows_choice(there),
            "rows of tables": copy_rows_choice(there),
        }
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in machine.cpu_flags()]
    sections = {
        "machine": [
            ("heron", __version__),
            ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            ("torch", f"{torch.__version__}, {counted(torch.get_num_threads(), 'threads')}"),
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
