"""What the flags of `heron train` leave unsaid, from where it is known: the run's folder, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heron import base_model, tokenizer
from heron.checkpoint import ownership, run
from heron.config import PRESETS, ModelConfig, TrainConfig, read_yaml
from heron.errors import HeronError


def of_run(out: Path | None, resume: str) -> dict[str, Any]:
    """The settings of the run that goes on, so that its name alone does it; none where there is none.

    That is the one in the folder `out`, or, where it holds none, the one that `resume` names or whose checkpoint it is.
    """
    if out is None or resume == "none":
        return {}
    home, named = out, None
    if resume != "auto" and not (out / "config.yaml").is_file():
        named = Path(resume) if run.is_checkpoint(Path(resume)) else None
        home = Path(resume) if named is None else named.absolute().parents[1]
        if named is not None:
            run.verify(named)
    if not (home / "config.yaml").is_file() or not ownership.has_begun(home):
        return {}
    settings = read_yaml(home / "config.yaml")
    for decided in ("out", "resume", "threads"):  # anew at each start; threads: by the checkpoint
        settings.pop(decided, None)
    newest = named or run.newest(home)
    if newest is not None:  # weights that it began with need not be there any more
        settings["model"] = run.trainer_of(newest)["model"]
    return settings


def weights_in(out: Path) -> str | None:
    """The weights in a folder that a run there would start from; None: there are none, or the run goes on."""
    found = base_model.candidates(out)
    return str(found[0]) if found and run.newest(out) is None else None


def vocabulary(spec: str, model: object) -> dict[str, int]:
    """{"vocab_size": that of a tokenizer} where none was given: of the usual model, or if a named one has fewer ids.

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
    held = ModelConfig.preset(model or TrainConfig.model).vocab_size
    return {"vocab_size": wanted} if wanted > held or (model is None and 0 < wanted < held) else {}
