"""What the flags of `heron train` leave unsaid, from where it is known: the run's folder, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heron import tokenizer
from heron.checkpoint import ownership, run
from heron.commands import streams
from heron.config import PRESETS, ModelConfig, TrainConfig, read_yaml
from heron.dist import Ranks
from heron.errors import CheckpointError, HeronError
from heron.train import base_model


def of_run(out: Path | None, resume: str) -> dict[str, Any]:
    """The settings of the run that a folder holds, so that its name alone goes on with it; none where it holds none.

    Args:
        out: the folder; None: not given.
        resume: as :class:`heron.config.TrainConfig` has it. A run or checkpoint that it names has the settings where
            `out` has none, and that run's folder is where it goes on where `out` is None.

    Raises:
        CheckpointError: `resume` names neither, or a checkpoint that is damaged.
    """
    if out is not None and not ((out / "config.yaml").is_file() and ownership.has_begun(out)):
        out = None  # nothing to go on with
    if resume == "none" or (resume == "auto" and out is None):
        return {}
    if out is not None:
        newest = run.newest(out)
        settings = read_yaml(out / "config.yaml")
    else:
        newest = Path(resume) if run.is_checkpoint(Path(resume)) else run.newest(Path(resume))
        if newest is None:
            raise CheckpointError(f"resume: {resume} is neither a checkpoint nor a run folder with one")
        run.verify(newest)
        settings = read_yaml(newest / run.CONFIG)
        if newest.absolute().parent.name == "checkpoints":
            settings["out"] = str(newest.absolute().parents[1])
    for decided in ("resume", "threads", "processes"):  # anew at each start; threads: by the checkpoint
        settings.pop(decided, None)
    if newest is not None:  # weights that it began with need not be there any more
        record = run.trainer_of(newest)
        settings["model"] = record["base"]["path"] if "base" in record else record["model"]
    return settings


def weights_in(out: Path) -> str | None:
    """The weights in a folder that a run there would start from; None: there are none, or the run goes on."""
    found = base_model.candidates(out)
    if not found or run.newest(out) is not None:
        return None
    says = Ranks.of_environment().is_first
    return str(base_model.newest_whole(found, streams.note if says else lambda _: None))


def vocabulary(spec: str, model: object) -> dict[str, int]:
    """The vocab_size that a tokenizer needs, as a change of the model; none where the named model has enough ids.

    Args:
        spec: the tokenizer; one that can't be loaded is refused elsewhere.
        model: as it was named: None, a preset, or what says the number itself.
    """
    if model is not None and model not in list(PRESETS):
        return {}
    learned = spec.removeprefix(tokenizer.LEARNED)
    if learned != spec:
        wanted = int(learned) if learned.isdecimal() else 0
    else:
        try:
            wanted = tokenizer.load(spec).vocab_size
        except HeronError:
            return {}
    held = ModelConfig.preset(str(model or TrainConfig.model)).vocab_size
    return {"vocab_size": wanted} if wanted > held or (model is None and 0 < wanted < held) else {}
