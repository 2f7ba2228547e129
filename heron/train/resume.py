"""How a run goes on: from which checkpoint, with which of its settings, and whether there is anything left to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from heron import tokenizer
from heron.checkpoint import run
from heron.config import ModelConfig, TrainConfig
from heron.errors import CheckpointError, DataError
from heron.train import differences, run_data
from heron.train.base_model import Base
from heron.train.guard import Guard
from heron.train.parts import Progress
from heron.train.step import Learner
from heron.train.stop import Preemption

# Of a checkpoint's trainer.json. "base" is where what else the checkpoint holds was trained beside frozen weights.
_STATE = ("step", "tokens", "cursor", "seconds", "owed", "guard", "model", "exact")


def point(config: TrainConfig, say: Callable[[str], None]) -> Path | None:
    """The verified checkpoint to go on from, or None for a fresh start."""
    out = Path(config.out)
    if config.resume == "auto":
        return run.newest(out, say)
    used = (out / "config.yaml").exists()
    if config.resume == "none":
        if used:
            raise CheckpointError(f"{out}: holds a run already and resume is none; name another --out")
        return None
    if used and TrainConfig.from_yaml(out / "config.yaml").resume == config.resume:
        return run.newest(out, say) or _named(Path(config.resume), say)  # the same command again
    folder = _named(Path(config.resume), say)
    if used and folder.resolve() != (run.newest(out) or out).resolve():
        raise CheckpointError(f"{out}: holds another run, or newer steps than {folder}; name another --out")
    return folder


def frozen_weights(config: TrainConfig, resume_from: Path) -> Path | None:
    """The weights that a run freezes, which its checkpoints lack; None where these hold all.

    Raises:
        CheckpointError: the run trains by another method, or an adapter of another shape.
    """
    record = run.trainer_of(resume_from)
    before = {"method": "full", "adapter.tables": "frozen", **record.get("exact", {})}
    now = {"method": "full" if config.finetune is None else config.finetune.method}
    if config.finetune is not None and (adapter := config.finetune.adapter) is not None:
        now |= {f"adapter.{name}": getattr(adapter, name) for name in ("kind", "rank", "targets", "tables")}
    for name, value in now.items():
        if (earlier := before.get(name)) != value:
            raise CheckpointError(
                f"{resume_from}: this run trains by {name} {earlier}, not {value}; name another --out"
            )
    if "base" not in record:
        return None
    return Path(record["base"]["path"] if isinstance(config.model, ModelConfig) else config.model)


def model_sizes(config: TrainConfig, resume_from: Path | None) -> ModelConfig:
    """The model's sizes: from the config, or from the run that goes on."""
    wanted = config.model
    if resume_from is None:
        return cast(ModelConfig, wanted)  # weights that a path names have been loaded
    saved = ModelConfig.from_dict(run.trainer_of(resume_from)["model"])
    if isinstance(wanted, ModelConfig) and wanted != saved:
        differing = [
            f"{name} {value} (now {getattr(wanted, name)})"
            for name, value in saved.to_dict().items()
            if getattr(wanted, name) != value
        ]
        remedy = "name another --out" if resume_from.is_relative_to(Path(config.out)) else "drop --resume"
        raise CheckpointError(f"{resume_from}: this run has another model: {', '.join(differing)}; {remedy}")
    return saved


def check_tables(folder: Path, before: dict[str, Any], config: TrainConfig) -> None:
    """CheckpointError where a run goes on with tables elsewhere: what the optimizer knows of them is not the same."""
    earlier = {name: before.get(name, getattr(TrainConfig, name)) for name in ("tables", "tables_state")}
    if earlier != {name: getattr(config, name) for name in earlier}:
        flags = " ".join(f"--{name} {value}" for name, value in earlier.items())
        raise CheckpointError(f"{folder}: this run trains with {flags}; give these, or start another from its weights")
    counts = before.get("processes", 1), max(1, config.processes)
    if config.device != "cpu" or config.tables != "device" or config.freezes or (counts[0] > 1) == (counts[1] > 1):
        return
    if ModelConfig.from_dict(run.trainer_of(folder)["model"]).deep_embed is not None:
        raise CheckpointError(
            f"{folder}: this run trains on {counts[0]} CPU processes, now {counts[1]}: with --tables device one steps "
            "tables densely, several step them by rows; give it its number, or start another from its weights, with "
            "--tables host"
        )


def nothing_to_do(
    folder: Path, step: int, config: TrainConfig, asked: TrainConfig, stop: Preemption, say: Callable[[str], None]
) -> str:
    """Say that a run is finished; CheckpointError, by their names, where settings differ from those it had."""
    home = folder.parents[1]
    if (kept := home / "tokenizer.json").exists() and config.tokenizer.startswith(tokenizer.LEARNED):
        text_tokenizer = tokenizer.load(str(kept))
    elif config.tokenizer.startswith(tokenizer.LEARNED):
        raise CheckpointError(
            f"{home}: finished at step {step}, with another tokenizer than {config.tokenizer}; name another --out"
        )
    else:
        text_tokenizer = tokenizer.load(config.tokenizer, config.eod)
    try:
        data = stop.interruptible(lambda: run_data.corpus(config, text_tokenizer, say)).fingerprint
    except DataError:  # gone, as it may be when all is done
        data = None
    if found := differences.differing_settings(folder, config, asked, data):
        raise CheckpointError(
            f"{home}: finished at step {step}, with other settings: {'; '.join(found)}. Name another --out to "
            "train with these, or raise --max_steps or --max_tokens to go on with them"
        )
    say(f"{home}: finished at step {step}; nothing to do. Raise --max_steps to train longer, or name another --out.")
    return "finished"


def state(
    progress: Progress, guard: Guard, model: ModelConfig, exact: dict[str, Any], base: Base | None
) -> dict[str, Any]:
    """What a checkpoint says of a run besides weights and moments; :func:`restore` takes it up."""
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "cursor": progress.cursor,
        "seconds": progress.seconds,
        "owed": progress.owed,
        "guard": guard.state(),
        "model": model.to_dict(),
        "exact": exact,
        **({} if base is None else {"base": base._asdict()}),
    }


def restore(folder: Path, learner: Learner, guard: Guard, progress: Progress) -> dict[str, Any]:
    """Take up the state in a verified checkpoint; gives the trainer's record."""
    record = run.restore(folder, learner.trained, learner.optimizer)
    learner.refresh()
    run.check_names(folder / run.TRAINER, record, (*_STATE, *(("base",) if learner.leaves.freezes else ())))
    run.check_names(folder / run.TRAINER, record["guard"], guard.state())
    guard.restore(record["guard"])
    for name in ("step", "tokens", "cursor", "seconds", "owed"):
        setattr(progress, name, record[name])
    progress.saved, progress.kept = True, progress.step
    return record


def _named(path: Path, say: Callable[[str], None]) -> Path:
    """The verified checkpoint that `resume` names, or the newest of the run that it names."""
    folder = path if run.is_checkpoint(path) else run.newest(path, say)
    if folder is None:
        raise CheckpointError(f"resume: {path} is neither a checkpoint nor a run folder with one")
    run.verify(folder)
    return folder
