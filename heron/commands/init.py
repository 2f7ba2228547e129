"""`heron init`: fresh weights with the reference initial values, in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from heron.checkpoint import check_name, save
from heron.commands.info import sizes
from heron.commands.settings import given
from heron.config import ModelConfig
from heron.errors import ConfigError
from heron.machine import DTYPES
from heron.model import RWKV
from heron.progress import progress
from heron.train import memory


def run(options: argparse.Namespace) -> None:
    changes = given(options, ModelConfig, "model.")
    config = ModelConfig.preset(options.model, **changes) if options.model else ModelConfig.from_dict(changes)
    if Path(options.out).exists():
        raise ConfigError(f"{options.out} exists already; name another --out")
    check_name(Path(options.out), None)
    n_parameters = memory.parameters(config)
    memory.check_host(4 * n_parameters, f"a model of {n_parameters:,} parameters in fp32")
    torch.manual_seed(options.seed)
    with progress(f"making {n_parameters:,} initial values"):
        model = RWKV(config).to(DTYPES[options.dtype])
    with progress(f"writing {options.out}"):
        save(model, options.out)
    print(f"wrote {options.out}: {sizes(config)}, {sum(p.numel() for p in model.parameters()):,} parameters")
