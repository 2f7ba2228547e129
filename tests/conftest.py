"""What several tests share: one thread, `core` on the path, and models in which no weight is at a neutral value."""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heron
from heron import progress

sys.path.insert(0, str(Path(__file__).parents[1]))  # `core/` is not part of the installed package


def pytest_configure():
    """Look for cycles of objects seldom: among all that is imported a look takes a second."""
    gc.set_threshold(20_000, 20, 10)


def pytest_collection_finish():
    gc.freeze()  # what is there now stays to the end


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors are faster on one thread, and bit-exact comparisons need one number of threads throughout."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _silent_progress():
    """What is said of work that lasts depends on the machine; tests/test_progress.py sets how long that is."""
    before, progress.PATIENCE_S = progress.PATIENCE_S, 1e6
    yield
    progress.PATIENCE_S = before


@pytest.fixture(scope="session", autouse=True)
def _disk_is_not_awaited():
    """A kill loses nothing that only a power cut would, and no test cuts the power; runs wait for the disk often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """A function that gives every parameter of a model a random value under which its whole equation matters."""
    return _randomize


@pytest.fixture(scope="session")
def random_model() -> Callable[..., heron.RWKV]:
    """A function: ModelConfig fields (and `seed`) -> a small fp32 RWKV with random weights and odd sizes."""

    def make(seed: int = 0, **changes) -> heron.RWKV:
        sizes = dict(n_layer=3, n_embd=32, vocab_size=37, head_size=16, ffn_dim=50)
        ranks = dict(decay_rank=5, iclr_rank=6, value_rank=7, gate_rank=9)
        config = heron.ModelConfig(**{"variant": "v8", **sizes, **ranks, **changes})
        return copy.deepcopy(_random_model(config, seed))

    return make


@functools.lru_cache(maxsize=100)  # a copy takes a third of the time
def _random_model(config: heron.ModelConfig, seed: int) -> heron.RWKV:
    with torch.device("meta"):  # the reference initial values would only be overwritten
        model = heron.RWKV(config)
    _randomize(model.to_empty(device="cpu"), seed)
    if not config.has_ln0:
        model.blocks[0].ln0.reset_parameters()  # no forward reads it; a file in which it is neutral loads silently
    return model


_PACKAGE_SCRIPT = """
import sys

import torch

torch.set_num_threads(1)
from rwkv.model import RWKV

answers = []
for path, tokens, pieces, *state in torch.load(sys.argv[1]):
    model, state, logits = RWKV(path, "cpu fp32"), state[0] if state else None, []
    for piece in torch.tensor(tokens).split(pieces):
        out, state = model.forward(piece.tolist(), state, full_output=True)
        logits.append(out.reshape(len(piece), -1))
    answers.append((torch.cat(logits), state))
torch.save(answers, sys.argv[2])
"""


@pytest.fixture
def rwkv_package(tmp_path) -> Callable[..., list[tuple[Tensor, list[Tensor]]]]:
    """A function that runs jobs in the `rwkv` package.

    A job is a path without .pth, token ids, the lengths of the pieces, and perhaps the state list to start from.

    It gives (logits (T, V), state list) of each. In a process of its own, since the package reads its environment once.
    """

    def run(
        jobs: list[tuple[Any, ...]], jit: bool = False, deep_embed: bool = False
    ) -> list[tuple[Tensor, list[Tensor]]]:
        from tests import warm

        asked, answered = tmp_path / "jobs.pt", tmp_path / "answers.pt"
        torch.save([(str(path), *rest) for path, *rest in jobs], asked)
        environment = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": str(int(jit)), "RWKV_CUDA_ON": "0"}
        if deep_embed:
            environment["RWKV_DE_VERSION"] = "1"
        warm.run(["-c", _PACKAGE_SCRIPT, asked, answered], env=environment)
        return torch.load(answered)

    return run


_GATES = tuple(f".{table}.weight" for table in ("enn", "enn4", "ennk", "emm", "k_emb", "v_emb"))


def _randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_random_value(name, normal, torch.rand(parameter.shape, generator=generator)))
    return model


def _random_value(name: str, normal: Tensor, uniform: Tensor) -> Tensor:
    leaf = name.split(".")[-1]
    if name == "emb.weight":
        return normal
    if leaf == "bias":
        return 0.2 * normal
    if normal.dim() == 1 or name.endswith(_GATES):
        return 1 + 0.3 * normal
    if name.endswith("s_emb.weight"):
        return 0.2 * normal
    if leaf == "w0":
        return 8 * uniform - 6  # decays from 0.586 to 0.9985
    if leaf == "r_k":
        return 0.3 * normal
    if normal.dim() == 3:
        return 0.5 + 0.3 * normal
    fan_in = normal.shape[1] if leaf == "weight" else normal.shape[0]
    return normal / fan_in**0.5
