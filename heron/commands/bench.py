"""`heron bench`: what a training step takes here, in time and memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows does not tell how large a process became
    resource = None

from heron import dist, machine
from heron.commands.settings import step_of
from heron.commands.telling import telling
from heron.config import ModelConfig, TrainConfig
from heron.errors import ConfigError, counted
from heron.files import new_file, refuse_foreign
from heron.model import RWKV
from heron.progress import progress
from heron.train import memory
from heron.train.step import Learner

_BYTES_PER_WEIGHT = 16  # of fp32 weights, gradients and two moments; activations come on top
_WARM_UP = 3  # steps that are not counted: they make the moments, and what PyTorch makes or compiles once


def run(options: argparse.Namespace) -> None:
    with telling():
        config, model = step_of(options)
    ranks = dist.Ranks.of_environment()
    with ranks.joined(torch.device(config.device), config.dist_timeout):
        if options.json:
            ranks.first(lambda: refuse_foreign(Path(options.json), _is_ours))
        with progress(f"making {options.steps} steps") if ranks.is_first else contextlib.nullcontext():
            result = bench(config, model, options.steps, ranks)
    if not ranks.is_first:
        return
    print(describe(config, model, result))
    if options.json:
        with new_file(Path(options.json)) as temporary:
            temporary.write_text(json.dumps(record(config, model, result), indent=1), encoding="utf-8")
        print(f"wrote {options.json}")


class Result(NamedTuple):
    """Medians over the steps, and the memory at its largest."""

    steps: int
    seconds: float  # of a step
    gradients_seconds: float  # of it: forward and backward passes, and rows of tables that are on the host
    update_seconds: float  # of it: clipping and the optimizer
    tokens_per_s: float  # of all processes
    peak_bytes: int | None  # of the first; CUDA: allocated by PyTorch; CPU: resident, all its libraries too
    compile: str  # whether the steps were compiled, and why
    parallel: str  # how the network lay over the processes, and why


def bench(config: TrainConfig, model: ModelConfig, steps: int = 10, ranks: dist.Ranks = dist.ALONE) -> Result:
    """Train a fresh model on random tokens, a few steps to warm up and then `steps`, and say what one takes.

    As in a training run, a GPU is not waited for between them.

    Args:
        config: with the device and the dtype decided, as `Trainer(config).config` has them.
        ranks: the processes that share the steps, joined; each has random tokens of its own, under
            `context_parallel` each group.

    Raises:
        ConfigError: steps below 1, or a dtype that the device does not have.
    """
    if steps < 1:
        raise ConfigError(f"steps: wanted at least 1, got {steps}")
    machine.check_dtype(config.dtype, torch.device(config.device))
    machine.settle_threads()
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    learner = fresh_learner(config, model, ranks)
    torch.manual_seed(config.seed + ranks.group(config.context_parallel)[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = [random_batch(config, model) for _ in range(_WARM_UP + steps)]
    times = []
    for number, samples in enumerate(batches):
        if number == _WARM_UP:
            _wait(device)
        begun = _now(device)
        loss = learner.gradients(samples)
        between = _now(device)
        learner.update(loss, config.lr_init, math.inf)
        times.append((begun, between, _now(device)))
    _wait(device)
    times = times[_WARM_UP:]
    seconds, of_gradients, of_update = (
        statistics.median(_seconds(marks[i], marks[j]) for marks in times) for i, j in ((0, 2), (0, 1), (1, 2))
    )
    speed = config.tokens_per_step / seconds
    compiled = f"{learner.compiled.value}: {learner.compiled.reason}"
    parallel = f"{learner.parallel.value}: {learner.parallel.reason}"
    return Result(steps, seconds, of_gradients, of_update, speed, _peak(device), compiled, parallel)


def fresh_learner(config: TrainConfig, model: ModelConfig, ranks: dist.Ranks = dist.ALONE) -> Learner:
    """A learner of initial values, which are computed where they are used: orthogonal ones take a CPU minutes."""
    device = torch.device(config.device)
    if device.type == "cpu":
        memory.check_host(_BYTES_PER_WEIGHT * memory.parameters(model), "a step on the CPU")
    with device:
        network = RWKV(model)
    return Learner(network, config, device, ranks=ranks)


def random_batch(config: TrainConfig, model: ModelConfig) -> list[tuple[Tensor, ...]]:
    """The samples of a step, of random tokens: tokens and targets (B, T) int64 of each micro-batch, and what a memory
    might recall."""
    tokens = torch.randint(0, model.vocab_size, (config.accumulate, config.micro_bsz, config.ctx_len + 1))
    samples = [(sample[:, :-1].contiguous(), sample[:, 1:].contiguous()) for sample in tokens]
    if (memory := model.memory) is None:
        return [*samples]
    shape = (config.accumulate, config.micro_bsz, config.ctx_len, memory.n_matches)
    recalled = torch.stack(
        (torch.randint(0, model.vocab_size, shape), torch.randint(0, 1 + (memory.max_match or 0), shape)), dim=-1
    )
    return [(*sample, found) for sample, found in zip(samples, recalled, strict=True)]


def describe(config: TrainConfig, model: ModelConfig, result: Result) -> str:
    """What ``heron bench`` prints, in lines of at most 80 columns."""
    peak = "not known on this system" if result.peak_bytes is None else memory.in_words(result.peak_bytes)
    what = "allocated on the device" if config.device.startswith("cuda") else "the whole process"
    each, of_each = "", ""
    if config.processes > 1:
        each, of_each = ", each process", f", {result.tokens_per_s / config.processes:,.0f} each process"
    lines = [
        ("model", f"{model.variant} L{model.n_layer} C{model.n_embd} V{model.vocab_size}"),
        ("step", f"{config.micro_bsz} x {config.accumulate} samples of {config.ctx_len} random tokens{each}"),
        ("precision", f"{config.dtype}, weights {config.weights}, tables {config.tables}"),
        ("compile", result.compile),
        *([("parallel", f"{config.processes} processes, {result.parallel}")] if config.processes > 1 else []),
        ("device", f"{config.device}, {counted(torch.get_num_threads(), 'threads')}, torch {torch.__version__}"),
        ("a step", f"{1e3 * result.seconds:,.1f} ms, the median of {result.steps}"),
        ("  forward, backward", f"{1e3 * result.gradients_seconds:,.1f} ms"),
        ("  clip, optimizer", f"{1e3 * result.update_seconds:,.1f} ms"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s{of_each}"),
        ("memory", f"{peak} at its largest, {what}"),
    ]
    return "\n".join(f"{name:<21}{text}" for name, text in lines)


def record(config: TrainConfig, model: ModelConfig, result: Result) -> dict[str, object]:
    """The figures and all that they are of, as JSON values."""
    settings = {**config.to_dict(), "model": model.to_dict(), "threads": torch.get_num_threads()}
    name = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else None
    return {**result._asdict(), "gpu": name, "torch": torch.__version__, "config": settings}


def _is_ours(content: bytes) -> bool:
    """Whether the content of a file is what `heron bench --json` wrote."""
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and {*Result._fields, "config"} <= found.keys()


def _now(device: torch.device) -> Any:
    """A mark for :func:`_seconds`: a reading of the clock, or an event of the GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
