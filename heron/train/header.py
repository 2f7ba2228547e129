"""What a run says of itself: the lines at its head, its status file, and what ending it now would lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from heron import files, machine
from heron.config import RosaConfig, TrainConfig
from heron.data.loader import Batches, Corpus
from heron.data.packs import Packs
from heron.errors import CheckpointError, counted
from heron.model.fp8 import described
from heron.model.plain import own_parameters
from heron.ops._choice import counting_on_builds
from heron.ops.rosa import rosa_choice
from heron.ops.rosa.soft import soft_choice
from heron.ops.wkv7 import wkv7_choice
from heron.optim import lr_at
from heron.train import run_data
from heron.train.parts import Progress
from heron.train.step import Learner


def header(
    config: TrainConfig,
    device: torch.device,
    dtype: machine.Choice,
    learner: Learner,
    corpus: Corpus,
    batches: Batches | Packs,
    resume_from: Path | None,
    beginning: str | None,
) -> list[tuple[str, str]]:
    """What a run says of itself before its first step: names and texts.

    Args:
        config: the settings, with what the machine decides decided.
        dtype: the precision, with its reason.
        resume_from: the checkpoint that it goes on from.
        beginning: what a fresh run starts from, in words.
    """
    model_config = learner.model.config
    with counting_on_builds():
        wkv7 = wkv7_choice(device, config.ctx_len)
    head_size = f"N{model_config.head_size} " if model_config.has_time_mix else ""
    n_parameters = sum(parameter.numel() for _, _, parameter in own_parameters(learner.model))
    n_parameters += 0 if learner.tables is None else learner.tables.n_elsewhere
    n_trained = sum(parameter.numel() for parameter in learner.trained.parameters() if parameter.requires_grad)
    return [
        ("model", f"{model_config.variant}  L{model_config.n_layer} C{model_config.n_embd} "
                  f"{head_size}V{model_config.vocab_size}  {n_parameters / 1e6:.2f} M parameters"),
        *([("trains", f"{n_trained:,} of {n_parameters:,} parameters: {_beside(learner)}")] if config.freezes else []),
        *([("start", beginning)] if beginning else []),
        ("data", f"{corpus.name}: {len(corpus.train):,} tokens"
                 + (f", {len(corpus.val):,} for validation" if corpus.val is not None else "")),
        ("order", batches.description),
        ("step", (f"{groups} x " if (groups := config.processes // config.context_parallel) > 1 else "")
                 + f"{config.micro_bsz} x {config.accumulate} samples of {config.ctx_len} = "
                 + f"{config.tokens_per_step:,} tokens; {counted(config.total_steps, 'steps')}"),
        *_warm_up(config),
        ("device", f"{device}, {counted(config.threads, 'threads')}"),
        *([("parallel", f"{learner.parallel.value} on {config.processes} processes: {learner.parallel.reason}"
                        + (f"; {config.context_parallel} share each sample" if config.context_parallel > 1 else ""))]
          if config.processes > 1 else []),
        ("precision", f"{config.dtype}: {dtype.reason}; weights {config.weights}"
                      + (f"; {described(learner.network)}" if config.dtype == "fp8" else "")),
        ("compile", f"{learner.compiled.value}: {learner.compiled.reason}"),
        ("wkv7", f"{wkv7.impl}: {wkv7.reason}" if model_config.has_time_mix else "not in this model"),
        *_rosa(config, device, model_config.rosa),
        *([("memory", run_data.looks_back_on(config, corpus))] if model_config.memory else []),
        ("out", f"{Path(config.out)}" + (f", going on from {resume_from.name}" if resume_from else "")),
    ]  # fmt: skip


def _warm_up(config: TrainConfig) -> list[tuple[str, str]]:
    """A word about a run that ends before its learning rate has grown to what was set."""
    n_steps = config.total_steps
    if not 0 < n_steps <= config.warmup_steps:
        return []
    more = "--max_steps" if config.finetune is None else "--epochs, or a smaller --micro_bsz"
    return [
        ("warm-up", f"{counted(config.warmup_steps, 'steps')}, which this run does not pass: its learning rate ends at "
                    f"{lr_at(n_steps - 1, config):.2g}, not {config.lr_init:g}, so it learns little. More {more}, "
                    "or fewer --warmup_steps")
    ]  # fmt: skip


def _rosa(config: TrainConfig, device: torch.device, rosa: RosaConfig | None) -> list[tuple[str, str]]:
    """How a ROSA branch finds its matches, and the gradient of their bits."""
    if rosa is None:
        return []
    match = rosa_choice(device, config.ctx_len)
    found = [("rosa", f"{match.impl}: {match.reason}")]
    if rosa.grad == "soft_suffix":
        gradient = soft_choice(device, config.ctx_len, rosa.max_match)
        found.append(("rosa grad", f"{rosa.grad} in {gradient.impl}: {gradient.reason}"))
    return found


def _beside(learner: Learner) -> str:
    """What trains beside frozen weights, in words."""
    finetune = learner.config.finetune
    if finetune is not None and (adapter := finetune.adapter) is not None:
        alpha = "" if adapter.kind == "miss" else f", alpha {adapter.alpha or adapter.rank:g}"
        beside = f", beside a base in {finetune.base}" if finetune.quantizes else ""
        of_tables = {"rows": ", and the tables' rows of tokens that occur", "low-rank": " and the tables"}
        tables = of_tables.get(adapter.tables, "")
        return f"{adapter.kind} of rank {adapter.rank}{alpha} on {adapter.targets}{tables}{beside}"
    shifts = " and the token shifts" if finetune is not None and finetune.token_shifts else ""
    return f"the state that sequences start from{shifts}"


def write_status(out: Path, status: str, progress: Progress, say: Callable[[str], None]) -> None:
    """Write a run's status, its step and its newest checkpoint into its folder; a disk that refuses is told."""
    folders = sorted((out / "checkpoints").glob("step-*"), key=lambda folder: folder.stat().st_mtime)
    content = {"status": status, "step": progress.step, "checkpoint": folders[-1].name if folders else None}
    try:
        files.write_text(out / "run_status.json", json.dumps(content))
    except CheckpointError as error:  # a full disk, of which the error that ends the run tells more
        say(f"{error} (it would say: {status})")


def at_stake(progress: Progress) -> str:
    """What ending a run at once would lose, as a clause."""
    if progress.step == (progress.kept or 0):
        return "of the run, the step that has begun is lost"
    since = "the beginning" if progress.kept is None else f"step {progress.kept}"
    return f"what was trained since {since} is lost ({progress.step - (progress.kept or 0)} steps)"
