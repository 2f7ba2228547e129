"""The picture of one or more runs, drawn from their logs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heron.errors import ConfigError, DataError
from heron.files import new_file
from heron.report.figures import thousands
from heron.report.log import log_path, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAKER = "Heron for RWKV-8"  # in the metadata of a picture


def check_picture(out: Path) -> None:
    """ConfigError unless the file is named .png or .svg."""
    if out.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"plot: wanted a picture named .png or .svg, got {out}")


def made_by_heron(out: Path) -> dict[str, str]:
    """What a picture says of itself, as matplotlib's savefig takes it, so that a later one may replace it."""
    return {"Creator" if out.suffix.lower() == ".svg" else "Software": _MAKER}


def is_ours(content: bytes) -> bool:
    """Whether the content of a file is a picture that Heron drew."""
    return _MAKER.encode() in content[:4096]


def plot(runs: Sequence[Path], out: Path, names: Sequence[str] | None = None) -> Path:
    """Draw loss, validation, learning rate, gradient norm and throughput of one or more runs over their steps.

    The validation panel is in bits per byte, which compare across tokenizers, if every run has them, else in nats
    per token.

    Args:
        runs: run folders (or log.jsonl files).
        out: the picture, .png or .svg. Its folder is created if missing.
        names: what each run is called; runs of one name share a colour. None: as their folders.

    Raises:
        ConfigError: no run, or another ending.
        DataError: as :func:`read_log`, or a run without a single logged step.
        CheckpointError: the picture can't be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    runs, out = [Path(run) for run in runs], Path(out)
    if not runs:
        raise ConfigError("plot: wanted at least one run folder, got none; heron plot runs/first")
    check_picture(out)
    logs = [read_log(run) for run in runs]
    for run, (steps, _) in zip(runs, logs, strict=True):
        if not steps:
            raise DataError(f"{log_path(run)}: holds no step yet; wait for the first one")

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "loss", "validation"], ["lr", "grad_norm", "tokens_per_s"]], height_ratios=(1.35, 1)
    )
    has_bits = all(validations and all("val_bpb" in v for v in validations) for _, validations in logs)
    val_key, val_unit = ("val_bpb", "bits per byte") if has_bits else ("val_loss", "nats per token")
    _dress(panels["loss"], "Training loss", "nats per token")
    _dress(panels["validation"], "Validation", val_unit)
    _dress(panels["lr"], "Learning rate", "")
    _dress(panels["grad_norm"], "Gradient norm before clipping", "")
    _dress(panels["tokens_per_s"], "Throughput", "tokens per second")

    names = [_drawable(name) for name in names or _names(runs)]
    for number, (name, (steps, validations)) in enumerate(zip(names, logs, strict=True)):
        i = list(dict.fromkeys(names)).index(name)
        style: dict[str, Any] = dict(color=f"C{i % 10}", linestyle=("-", "--", ":", "-.")[i // 10 % 4])
        style["marker"] = "o" if len(steps) == 1 else ""
        x = _column(steps, "step")
        panels["lr"].plot(x, _column(steps, "lr"), **style)
        for key in ("loss", "grad_norm", "tokens_per_s"):
            y = _column(steps, key)
            width = _smoothing(len(y))
            panels[key].plot(x, y, color=style["color"], alpha=0.25, linewidth=0.8)
            label = name if width == 1 else f"{name} (mean of {width} records)"
            label = label if names.index(name) == number else ""  # one line of the legend for all of a name
            panels[key].plot(x, _smoothed(y, width), **style, label=label)
        x = _column(validations, "step")
        if len(runs) == 1 and validations:
            dots: dict[str, Any] = dict(color="black", marker="o", markersize=4, linestyle="none")
            panels["loss"].plot(x, _column(validations, "val_loss"), **dots, label="validation")
        panels["validation"].plot(x, _column(validations, val_key), **{**style, "marker": "o"}, markersize=4)

    _cut_spikes(panels["loss"], [_column(steps, "loss") for steps, _ in logs])
    if any((_column(steps, "grad_norm") > 0).any() for steps, _ in logs):
        panels["grad_norm"].set_yscale("log")  # it falls by orders of magnitude in the first steps
    panels["lr"].yaxis.set_major_formatter(StrMethodFormatter("{x:.1e}"))
    panels["tokens_per_s"].yaxis.set_major_formatter(EngFormatter(sep=""))
    panels["tokens_per_s"].set_ylim(bottom=0)
    if not any(validations for _, validations in logs):
        panels["validation"].text(0.5, 0.5, "none yet", transform=panels["validation"].transAxes, ha="center")
    panels["loss"].legend(frameon=False, fontsize=9)
    if len(runs) == 1:
        figure.suptitle(_summary(names[0], *logs[0]), fontsize=11)

    with new_file(out) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name in another script: a box is drawn
        figure.savefig(temporary, dpi=120, metadata=made_by_heron(out))
    return out


def _column(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([record.get(key, math.nan) for record in records], dtype=np.float64)


def _smoothing(n: int) -> int:
    """Odd number of records to average over: about a fiftieth of them."""
    return 2 * (n // 100) + 1


def _smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` (odd) values; fewer at the ends. Values that are not finite are left out."""
    finite = np.isfinite(y)
    reach = width // 2
    ends = np.arange(len(y))
    low, high = np.maximum(ends - reach, 0), np.minimum(ends + reach + 1, len(y))
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    n = count[high] - count[low]
    return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    folders = [log_path(run).resolve().parent for run in runs]
    names: list[str] = []
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def _drawable(name: str) -> str:
    """A folder's name as matplotlib draws it to the letter: it would read formulas between dollars."""
    name = name.encode(errors="replace").decode().replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # else legends leave it out


def _summary(name: str, steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> str:
    last = steps[-1]
    parts = [name, f"{last['step']:,} steps"]
    if "tokens" in last:
        parts.append(f"{thousands(last['tokens'])} tokens")
    if validations:
        parts.append(f"validation {validations[-1]['val_loss']:.4f} nats per token")
        if "val_bpb" in validations[-1]:
            parts[-1] += f" = {validations[-1]['val_bpb']:.4f} bits per byte"
    return "  |  ".join(parts)


def _dress(axes: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)


def _cut_spikes(axes: Axes, runs: Sequence[np.ndarray]) -> None:
    """Let the frame end at the first value or the 99.5th percentile; a spike above would flatten all the rest."""
    runs = [values[np.isfinite(values)] for values in runs]
    runs = [values for values in runs if len(values)]
    if not runs:
        return
    top = max(max(values[0], np.quantile(values, 0.995)) for values in runs)
    low, high = min(values.min() for values in runs), max(values.max() for values in runs)
    if top < high and low < top:
        axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
