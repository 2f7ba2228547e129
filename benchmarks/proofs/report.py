"""What the proofs found: results.jsonl, a page of tables, and a picture."""

from __future__ import annotations

import json
import re
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
_SIZE = re.compile(r"-[lc]\d+")  # layers or width, in a task's name
_EXPLAINED = (
    "Each figure is of fresh samples, one for each seed, in percent. *accuracy*: share of all that is asked that is "
    "right; *whole*: share of samples in which everything is; *last*: share in which the last answer is. *solved to*: "
    f"the last token of a sample up to which at least {SOLVED:.0%} of the answers are right at every place."
)

Record = dict[str, Any]
Group = tuple[str, str, list[Record]]


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


def n_solved(by_position: Sequence[float | None]) -> int:
    """How many answers there are up to :func:`solved_to`."""
    return sum(share is not None for share in by_position[: solved_to(by_position)])


def draw(found: Sequence[Record], out: Path) -> None:
    """Accuracy along the sample, by task, and how far it goes with each number of layers, where these differ."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Group]] = {}
    for group in _groups(found):
        panels.setdefault(_title(group[0]), []).append(group)
    deep = {title: groups for title, groups in panels.items() if len({_n_layer(task) for task, *_ in groups}) > 1}
    n_panels = len(panels) + len(deep)
    columns = min(3, n_panels)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    places = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for title, groups in deep.items():
        _draw_layers(next(places), title, groups)
    for title, groups in panels.items():
        _draw_places(next(places), title, groups)
    for empty in places:
        empty.set_axis_off()
    with new_file(out) as temporary:
        figure.savefig(temporary, dpi=120, metadata=made_by_heron(out))


def _draw_places(axes: Any, title: str, groups: Sequence[Group]) -> None:
    """Accuracy at each place of the longest samples, every seed a line."""
    for number, (task, model, runs) in enumerate(groups):
        name = " ".join([model, *_SIZE.findall(task)])
        for seed, run in enumerate(runs):
            points = [(place, share) for place, share in enumerate(_longest(run), start=1) if share is not None]
            label = name if seed == 0 else None
            axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", linewidth=1, label=label)
    axes.set(title=title, xlabel="token", ylabel="share right", ylim=(-0.03, 1.03))
    axes.legend(fontsize=7, frameon=False)


def _draw_layers(axes: Any, title: str, groups: Sequence[Group]) -> None:
    """How many answers are solved, by the number of layers: every seed a point, a line through their means."""
    for number, model in enumerate(dict.fromkeys(model for _, model, _ in groups)):
        points = sorted(
            (_n_layer(task), [n_solved(_longest(run)) for run in runs]) for task, name, runs in groups if name == model
        )
        color = f"C{number}"
        axes.plot([n for n, _ in points], [sum(solved) / len(solved) for _, solved in points], color=color, label=model)
        for n_layer, solved in points:
            axes.plot([n_layer] * len(solved), solved, "o", color=color, markersize=3)
    axes.set(title=f"{title}: answers solved", xlabel="layers", ylabel="answers")
    axes.set_xticks(sorted({_n_layer(task) for task, *_ in groups}))
    axes.legend(fontsize=7, frameon=False)


def _title(task: str) -> str:
    """What tasks share that differ in layers or width alone."""
    return _SIZE.sub("", task)


def _n_layer(task: str) -> int:
    return TASKS[task].shape["n_layer"]


def _longest(run: Record) -> list[float | None]:
    """Accuracy at each place of the last test, which has the longest samples."""
    return list(run["tests"].values())[-1]["by_position"]


def _groups(found: Sequence[Record]) -> Iterator[Group]:
    """Each task and model, with its runs: one for each seed."""
    for task, model in dict.fromkeys((one["task"], one["model"]) for one in found):
        yield task, model, [one for one in found if (one["task"], one["model"]) == (task, model)]
