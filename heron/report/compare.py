"""Several runs side by side: groups that differ in their seed alone, and the figures of each with their spread."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heron.config import ROSA_PRESETS, ModelConfig, RosaConfig, TrainConfig
from heron.errors import ConfigError, DataError
from heron.report.console import MEAN_OF
from heron.report.figures import mean, thousands
from heron.report.log import log_path, read_log

AT = ("end", "tokens", "time")
LONGEST_NAME = 80  # characters of what tells a group from the others; a table and a legend have no room for more
_MARK = "<!-- heron compare -->"  # at the head of a file of ours
_NOT_LEARNED_FROM = {  # settings that change nothing in what a run learns
    "seed", "out", "resume", "threads", "num_workers", "save_every", "keep", "eval_every", "log_every", "max_hours",
    "background_save", "dist_timeout", "sample_every", "sample_prompt", "sample_tokens", "tensorboard", "wandb",
    "finetune.show",
}  # fmt: skip


class Figure(NamedTuple):
    """A column of the table."""

    name: str
    text: Callable[[float], str]


FIGURES = (
    Figure("loss", "{:.4f}".format),
    Figure("val_loss", "{:.4f}".format),
    Figure("val_bpb", "{:.4f}".format),
    Figure("best", "{:.4f}".format),
    Figure("tokens", thousands),
    Figure("seconds", "{:.1f}".format),
    Figure("tokens/s", thousands),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes:
        settings: what shapes what a run learns, by name.
        steps: the records of its steps, at least one.
        validations: those of its validations.

    Each record has `tokens`, those trained on so far, and `seconds`, those that the steps behind the first took: what
    the first one compiles and loads is not in them, nor are validations, samples and checkpoints.
    """

    folder: Path
    settings: dict[str, Any]
    seed: int
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run in a folder.

        Raises:
            DataError: no log, or one without a step; no config.yaml, or one that this version can't read.
        """
        path = log_path(folder)
        steps, validations = read_log(path)
        if not steps:
            raise DataError(f"{path}: holds no step yet; wait for the first one")
        for record in steps:
            if missing := {"tokens", "tokens_per_s"} - record.keys():
                raise DataError(f"{path}, step {record['step']}: wanted {', '.join(sorted(missing))} in its record")
        try:
            config = TrainConfig.from_yaml(path.parent / "config.yaml")
        except ConfigError as error:
            raise DataError(f"{path.parent}: wanted the folder of a run, with its settings: {error}") from None
        numbers, tokens, speeds = (
            np.array([step[key] for step in steps]) for key in ("step", "tokens", "tokens_per_s")
        )
        seconds = np.concatenate(([0.0], np.cumsum(np.diff(tokens) / speeds[1:])))
        for record in (*steps, *validations):
            record["tokens"] = float(np.interp(record["step"], numbers, tokens))
            record["seconds"] = float(np.interp(record["step"], numbers, seconds))
        return cls(path.parent, settings_of(config), config.seed, steps, validations)

    def end(self, at: str) -> float:
        """How far it came, in tokens or seconds: its last validation, or its last step where it has none."""
        return (self.validations or self.steps)[-1][_axis(at)]

    @property
    def has_bits(self) -> bool:
        """Whether its validations are in bits per byte, too."""
        return bool(self.validations) and all("val_bpb" in record for record in self.validations)


class Group(NamedTuple):
    """Runs that differ in their seed alone, and what tells them from the other groups."""

    name: str
    runs: list[Run]


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in some folders.

    Raises:
        DataError: as :meth:`Run.read`, or a folder that is given twice.
    """
    seen: set[Path] = set()
    for folder in folders:
        if (place := log_path(folder).resolve()) in seen:
            raise DataError(f"{folder}: is given twice, which would count one run as two; drop one")
        seen.add(place)
    return [Run.read(folder) for folder in folders]


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by name: the settings in which they differ, in the order of the first run; what all share is left out.

    Where so much differs that a name would be longer than a line, all are called by their folders.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.settings.get(name) for name in differing), []).append(run)
    shown = differing or ["variant", "rosa"]
    called = [_name({name: of[0].settings.get(name) for name in shown}) for of in found.values()]
    if max(map(len, called)) > LONGEST_NAME:
        called = [", ".join(str(run.folder) for run in of) for of in found.values()]
    return [Group(name, of) for name, of in zip(called, found.values(), strict=True)]


def budget(runs: Sequence[Run], at: str) -> float:
    """The most tokens, or seconds, that every run has; infinite where each is taken at its own end.

    Raises:
        ConfigError: an `at` that is none of :data:`AT`.
    """
    if at not in AT:
        raise ConfigError(f"at: wanted one of {', '.join(AT)}, got {at!r}")
    return math.inf if at == "end" else min(run.end(at) for run in runs)


def figures(run: Run, at: str = "end", limit: float = math.inf) -> dict[str, float]:
    """The figures of a run when it was `limit` tokens or seconds old; NaN for what it has not.

    Between two validations, a figure is on the straight line from one to the other. `best` is the lowest up to there,
    in bits per byte where the run has them. `loss` is a mean, as on the console; `tokens/s` is the median of the steps
    that were logged.
    """
    axis = _axis(at)
    place = min(limit, run.end(at))
    steps = [step for step in run.steps if step[axis] <= place]

    def on_the_line(key: str, records: Sequence[dict[str, Any]]) -> float:
        if not records or place < records[0][axis]:
            return math.nan
        return float(np.interp(place, [one[axis] for one in records], [one[key] for one in records]))

    unit = "val_bpb" if run.has_bits else "val_loss"
    found = {
        "loss": mean([step["loss"] for step in steps[-MEAN_OF:]]) if steps else math.nan,
        "val_loss": on_the_line("val_loss", run.validations),
        "val_bpb": on_the_line("val_bpb", run.validations) if run.has_bits else math.nan,
        "tokens": on_the_line("tokens", run.steps),
        "seconds": on_the_line("seconds", run.steps) if at != "time" else place,
        "tokens/s": statistics.median(step["tokens_per_s"] for step in steps) if steps else math.nan,
    }
    passed = [one[unit] for one in run.validations if one[axis] <= place]
    return found | {"best": min((value for value in (*passed, found[unit]) if math.isfinite(value)), default=math.nan)}


def table(groups: Sequence[Group], at: str = "end") -> str:
    """A table in Markdown, a line a group, without the columns that are empty; below it, what the figures are.

    Raises:
        ConfigError: as :func:`budget`.
    """
    limit = budget([run for group in groups for run in group.runs], at)
    found = {group.name: [figures(run, at, limit) for run in group.runs] for group in groups}
    has = {name for each in found.values() for one in each for name in one if not math.isnan(one[name])}
    shown = [figure for figure in FIGURES if figure.name in has - ({"loss"} if "val_loss" in has else set())]
    lines = [["runs", "seeds", *(figure.name for figure in shown)], ["---", "---", *("---:" for _ in shown)]]
    for name, runs in groups:
        seeds = " ".join(map(str, sorted(run.seed for run in runs)))
        cells = [spread([one[figure.name] for one in found[name]], figure.text) for figure in shown]
        lines.append([name.replace("|", r"\|"), seeds, *cells])
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([*rows, "", _explained(at, limit, any(len(group.runs) > 1 for group in groups))])


def spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and behind ± the sample standard deviation of several values that differ."""
    middle = text(mean(values))
    return middle if len(set(values)) == 1 else f"{middle} ± {text(float(np.std(values, ddof=1)))}"


def as_file(table: str) -> str:
    """The content of a file that a later one may replace."""
    return f"{_MARK}\n\n{table}\n"


def is_ours(content: bytes) -> bool:
    """Whether the content of a file is what :func:`as_file` made."""
    return content.startswith(_MARK.encode())


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What shapes what a run learns, by name; sizes of a model that follow from its others are left out."""
    found: dict[str, Any] = {}
    if isinstance(config.model, ModelConfig):
        model, by_rule = config.model, config.model.by_rule().keys() - {"rosa"}
        names = [field.name for field in dataclasses.fields(model)]
        found |= {name: getattr(model, name) for name in names if name not in {*by_rule, "rosa", "memory"}}
        parts = [_rosa(part) for part in (model.rosa, model.memory) if part is not None]
        found["rosa"] = " and ".join(parts) or None
    else:
        found["model"] = config.model
    for field in dataclasses.fields(config):
        if field.name not in ("model", "finetune"):
            found[field.name] = getattr(config, field.name)
    if config.finetune is not None:
        of_finetuning = dataclasses.asdict(config.finetune)
        adapter = of_finetuning.pop("adapter") or {}
        of_finetuning |= {f"adapter.{name}": value for name, value in adapter.items()}
        found |= {f"finetune.{name}": value for name, value in of_finetuning.items()}
    shaping = {name: value for name, value in found.items() if name not in _NOT_LEARNED_FROM}
    return {name: str(value) if isinstance(value, (dict, list)) else value for name, value in shaping.items()}


def _axis(at: str) -> str:
    return "seconds" if at == "time" else "tokens"


def _rosa(rosa: RosaConfig) -> str:
    """The nearest preset, with what is changed in it."""
    changed: dict[str, list[str]] = {}
    for name in ROSA_PRESETS:
        preset, names = RosaConfig.preset(name), [field.name for field in dataclasses.fields(rosa)]
        changed[name] = [f"{one} {getattr(rosa, one)}" for one in names if getattr(rosa, one) != getattr(preset, one)]
    nearest = min(changed, key=lambda name: len(changed[name]))
    return f"{nearest} ({', '.join(changed[nearest])})" if changed[nearest] else nearest


def _name(settings: dict[str, Any]) -> str:
    """``variant v8, deep_embed_4x, rosa memory``; what is off or not given is said only where all is."""
    off = {name for name, value in settings.items() if value is None or value is False or value == ""}
    on = [name if value is True else f"{name} {value}" for name, value in settings.items() if name not in off]
    return ", ".join(on) or ", ".join(f"no {name}" for name in settings)


def _explained(at: str, limit: float, several: bool) -> str:
    where = {
        "end": "Each run at its end.",
        "tokens": f"Each run after {thousands(limit)} training tokens, as many as all have.",
        "time": f"Each run after {limit:.1f} s of training, as long as all have; those that went on had not yet "
        "lowered their learning rate to the end, which favours the fastest.",
    }
    what = "best: the lowest validation; seconds: of all steps but the first; tokens/s: of the median step."
    return f"{where[at]} {what}" + (" Mean ± sample standard deviation over the seeds." if several else "")
