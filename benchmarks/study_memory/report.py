"""What the study found: results.jsonl, a page of tables, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_memory.runs import MODELS, WITH_MEMORY, Case
from benchmarks.study_memory.texts import DESCRIBED
from heron.errors import DataError
from heron.files import new_file, write_text
from heron.report import compare
from heron.report.picture import made_by_heron

RESULTS, TABLES, PICTURE = "results.jsonl", "results.md", "results.png"
AT = ("tokens", "time")
_PAIRS = [(name.removesuffix(WITH_MEMORY), name) for name in MODELS if name.endswith(WITH_MEMORY)]


def write(folders: Sequence[Path], out: Path) -> str:
    """Gather the runs in some folders of results, write what they say into `out`, and return the page of tables.

    Raises:
        DataError: no run there, a run that two folders have, or one that is damaged.
    """
    found = gather(folders)
    texts = list(dict.fromkeys(case.text for case in found))
    parts = [path.read_text(encoding="utf-8").strip() for path in _described(folders)]
    parts += [_section(text, {case: run for case, run in found.items() if case.text == text}) for text in texts]
    page = "\n\n".join(parts)
    rows = [
        {**case._asdict(), **_job(run), **compare.figures(run), "steps": run.steps[-1]["step"]}
        for case, run in found.items()
    ]
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    write_text(out / RESULTS, "".join(json.dumps(row) + "\n" for row in plain))
    write_text(out / TABLES, page + "\n")
    draw(found, out / PICTURE)
    return page


def gather(folders: Sequence[Path]) -> dict[Case, compare.Run]:
    """The runs in some folders of results: by text, then model as the study orders them, then seed."""
    found: dict[Case, compare.Run] = {}
    for folder in folders:
        for log in folder.glob("*/*/*/log.jsonl"):
            text, model, seed = log.parts[-4:-1]
            case = Case(text, model, int(seed))
            if case in found:
                raise DataError(f"{log.parent} and {found[case].folder} are the same run; leave one out")
            found[case] = compare.Run.read(log.parent)
    if not found:
        raise DataError(f"{', '.join(map(str, folders))}: wanted results of the study, found none")
    order = list(MODELS)
    return dict(sorted(found.items(), key=lambda pair: (pair[0].text, order.index(pair[0].model), pair[0].seed)))


def gain(without: Sequence[compare.Run], with_memory: Sequence[compare.Run], at: str) -> list[float]:
    """By how much memory changes the bits per byte, for each seed that both have: -0.1 is a tenth fewer.

    Twins are compared after as many tokens, or as much time, as both have; other seeds may have run faster.
    """
    twins = {run.seed: run for run in without}
    changes = []
    for pair in ((twins[run.seed], run) for run in with_memory if run.seed in twins):
        limit = compare.budget(pair, at)
        before, after = (compare.figures(run, at, limit)["val_bpb"] for run in pair)
        changes.append(after / before - 1)
    return changes


def draw(found: dict[Case, compare.Run], out: Path) -> None:
    """Bits per byte at the end of each run: a panel for each text, a line for each model, a dot for each seed."""
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(case.text for case in found))
    figure = Figure(figsize=(3.6 * len(texts) + 1, 3.2), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        rows = list(dict.fromkeys(case.model.removesuffix(WITH_MEMORY) for case in found if case.text == text))
        for filled in (False, True):
            cases = [case for case in found if case.text == text and case.model.endswith(WITH_MEMORY) == filled]
            axes.plot(
                [compare.figures(found[case])["val_bpb"] for case in cases],
                [rows.index(case.model.removesuffix(WITH_MEMORY)) for case in cases],
                "o", color="C0" if filled else "black", fillstyle="full" if filled else "none",
                label="with ROSA memory" if filled else "without",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_title(text, loc="left")
        axes.set_xlabel("bits per byte")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    with new_file(out) as temporary:
        figure.savefig(temporary, dpi=130, metadata=made_by_heron(out))


def _section(text: str, found: dict[Case, compare.Run]) -> str:
    """A text's tables: every model at equal tokens and at equal time, and what memory changes in each."""
    groups = compare.groups(list(found.values()))
    parts = [f"### {text}"]
    for at in AT:
        parts.append(f"At equal {at}:\n\n{compare.table(groups, at)}")
    of_model = {name: [run for case, run in found.items() if case.model == name] for name in MODELS}
    rows = []
    for plain, memory in _PAIRS:
        changes = [gain(of_model[plain], of_model[memory], at) for at in AT]
        if all(changes):
            rows.append(f"| {plain} | {' | '.join(compare.spread(each, '{:.2%}'.format) for each in changes)} |")
    if rows:
        head = "| model | equal tokens | equal time |\n|---|---:|---:|"
        parts.append("\n".join(["What memory changes in the bits per byte, seed by seed:", "", head, *rows]))
    return "\n\n".join(parts)


def _described(folders: Sequence[Path]) -> list[Path]:
    """The first description of the texts; they were the same everywhere, but for the collected one."""
    return [folder / DESCRIBED for folder in folders if (folder / DESCRIBED).exists()][:1]


def _job(run: compare.Run) -> dict[str, Any]:
    """How long the process took, and on what."""
    return json.loads((run.folder / "job.json").read_text(encoding="utf-8"))
