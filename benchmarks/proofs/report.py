"""What the proofs found: results.jsonl, a page of tables, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.proofs.catalogue import TASKS
from benchmarks.proofs.models import MODELS
from benchmarks.proofs.training import RESULT
from heron.errors import DataError
from heron.files import new_file, write_text
from heron.report.picture import made_by_heron

RESULTS, TABLE, PICTURE = "results.jsonl", "results.md", "results.png"
SOLVED = 0.95
_COLUMNS = ("accuracy", "whole", "last")
_EXPLAINED = (
    "Each figure is of fresh samples, one for each seed, in percent. *accuracy*: share of all that is asked that is "
    "right; *whole*: share of samples in which everything is; *last*: share in which the last answer is. *solved to*: "
    f"the last token of a sample up to which at least {SOLVED:.0%} of the answers are right at every place."
)

Record = dict[str, Any]


def write(results: Sequence[Path], out: Path) -> str:
    """Gather the runs in some folders, write what they say into `out`, and return the table in Markdown.

    Raises:
        DataError: no run there, or one that two folders have.
    """
    found = gather(results)
    page = table(found)
    write_text(out / RESULTS, "".join(json.dumps(record) + "\n" for record in found))
    write_text(out / TABLE, page + "\n")
    draw(found, out / PICTURE)
    return page


def gather(results: Sequence[Path]) -> list[Record]:
    """The records of all runs in some folders, in the order of the catalogue."""
    places: dict[tuple[str, str, int], Path] = {}
    found = []
    for path in (path for folder in results for path in sorted(folder.glob(f"*/*/*/{RESULT}"))):
        record = json.loads(path.read_text(encoding="utf-8"))
        key = record["task"], record["model"], record["seed"]
        if key in places:
            raise DataError(f"{path.parent} and {places[key]} are the same run; leave one out")
        places[key] = path.parent
        found.append(record)
    if not found:
        raise DataError(f"{', '.join(map(str, results))}: wanted results of the proofs, found none")
    tasks = list(TASKS)
    return sorted(found, key=lambda one: (tasks.index(one["task"]), MODELS.index(one["model"]), one["seed"]))


def table(found: Sequence[Record]) -> str:
    """A table in Markdown, a line for each test of a model on a task; a figure for each seed."""
    lines = [
        "| task | model | layers x width | parameters | test | seeds | "
        + " | ".join(_COLUMNS)
        + " | solved to | s a run |",
        "|---|---|---:|---:|---|---|" + "---:|" * (len(_COLUMNS) + 2),
    ]
    for task, model, runs in _groups(found):
        shape = TASKS[task].shape
        for name in runs[0]["tests"]:
            tests = [run["tests"][name] for run in runs]
            cells = [
                task, model, f"{shape['n_layer']} x {shape['n_embd']}", f"{runs[0]['parameters']:,}", name,
                " ".join(str(run["seed"]) for run in runs),
                *(" ".join(f"{100 * one[column]:.1f}" for one in tests) for column in _COLUMNS),
                " ".join(str(solved_to(one["by_position"])) for one in tests),
                f"{max(run['seconds'] for run in runs):.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    machines = ", ".join(sorted({f"{one['machine']}, torch {one['torch']}" for one in found}))
    return "\n".join([*lines, "", f"{_EXPLAINED} Trained on {machines}."])


def solved_to(by_position: Sequence[float | None]) -> int:
    """The last place before which, and at which, accuracy is at least SOLVED wherever something is asked; 0: none."""
    place = 0
    for number, share in enumerate(by_position, start=1):
        if share is not None and share < SOLVED:
            break
        place = number if share is not None else place
    return place


def draw(found: Sequence[Record], out: Path) -> None:
    """Accuracy along the sample, by task: every seed a line, a colour for each model and number of layers."""
    from matplotlib.figure import Figure

    panels = {}
    for task, model, runs in _groups(found):
        panels.setdefault(task.partition("-l")[0].partition("-c")[0], []).append((task, model, runs))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    for axes, (title, groups) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for number, (task, model, runs) in enumerate(groups):
            name = " ".join([model, *([task.rpartition("-")[2]] if task != title else [])])
            for seed, run in enumerate(runs):
                for curve in [test["by_position"] for test in run["tests"].values()][-1:]:
                    points = [(place, share) for place, share in enumerate(curve, start=1) if share is not None]
                    label = name if seed == 0 else None
                    axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", linewidth=1, label=label)
        axes.set(title=title, xlabel="token", ylabel="share right", ylim=(-0.03, 1.03))
        axes.legend(fontsize=7, frameon=False)
    with new_file(out) as temporary:
        figure.savefig(temporary, dpi=120, metadata=made_by_heron(out))


def _groups(found: Sequence[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Runs that differ in their seed alone."""
    for task, model in dict.fromkeys((one["task"], one["model"]) for one in found):
        yield task, model, [one for one in found if (one["task"], one["model"]) == (task, model)]
