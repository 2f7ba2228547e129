"""What `heron eval` makes of the figures of several models: a table, a JSON file, a plot."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heron.files import new_file
from heron.report import picture

FIGURES = (
    "loss", "perplexity", "bits_per_byte", "lambada_perplexity", "lambada_accuracy", "accuracy", "accuracy_per_byte",
)  # fmt: skip


def step_of(path: str | Path) -> int | None:
    """The training step in the name of a checkpoint folder (step-00001000) or a file inside one; None elsewhere."""
    names = (Path(path).name, Path(path).parent.name)
    return next((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))), None)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures of several evaluations, one line each."""
    keys = ["model", *_shared_figures(results)]
    lines = [keys] + [[_cell(result[key]) for key in keys] for result in results]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(columns))
        for columns in (list(zip(line, widths, strict=True)) for line in lines)
    )


def is_ours(content: bytes) -> bool:
    """Whether the content of a file is what :func:`write` wrote."""
    try:
        found = json.loads(content)
    except ValueError:
        return False
    if not isinstance(found, list) or not found:
        return False
    return all(isinstance(one, dict) and {"model", "mode"} <= one.keys() for one in found)


def write(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The results as JSON, a list of objects; a number that is not finite becomes null. The file appears whole."""
    plain = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in result.items()}
        for result in results
    ]
    with new_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def plot(results: Sequence[dict[str, Any]], out: Path) -> Path:
    """Draw each figure of several evaluations over the training step (or in the given order where one has none).

    Args:
        results: as the JSON of `heron eval` holds them: "model", "step" (or None), and numbers.
        out: the picture, .png or .svg.

    Raises:
        ConfigError: another ending.
        CheckpointError: the picture can't be written.
    """
    from matplotlib.figure import Figure

    out = Path(out)
    picture.check_picture(out)
    keys = _shared_figures(results)
    has_steps = all(result["step"] is not None for result in results)
    ordered = sorted(results, key=lambda result: result["step"]) if has_steps else results
    figure = Figure(figsize=(4.4 * len(keys), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        x = [result["step"] for result in ordered] if has_steps else [Path(result["model"]).name for result in ordered]
        axes.plot(x, [result[key] for result in ordered], marker="o")
        axes.set_title(key.replace("_", " "), loc="left")
        axes.set_xlabel("step" if has_steps else "")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with new_file(out) as temporary:
        figure.savefig(temporary, dpi=150, metadata=picture.made_by_heron(out))
    return out


def _shared_figures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the figures that every result has."""
    return [key for key in FIGURES if all(result.get(key) is not None for result in results)]


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
