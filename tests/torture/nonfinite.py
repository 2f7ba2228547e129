"""A number that is not finite, once: caught in the same step, its batch skipped, and no later value touched.

Sixteen kinds of wrong number at the first, a middle and the last step. The run must be bit-equal to one whose data
lack that batch, and the batch must be on the disk for replay. A weight that stays bad is counted apart: no batch can
help there, so the run goes back to its checkpoint. The control lets every step through.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import heron
from heron.data.loader import Batches
from heron.ops.global_norm import verdict
from heron.train import guard as guards
from heron.train import loop as train
from heron.train import step as learner
from tests.torture import minute
from tests.torture.result import Result
from tests.train.faults import Fault, faulty

STEPS = 5
KINDS = [
    *((value, "loss", 0) for value in ("nan", "inf", "-inf")),
    *((value, "gradient", 0) for value in ("nan", "inf", "-inf", "1e38")),
    *((value, "weight", 0) for value in ("nan", "inf", "-inf")),
    *((value, "input", 0) for value in ("nan", "inf", "-inf")),
    ("nan", "loss", 1),  # in the second of two forward passes
    ("inf", "gradient", 1),
    ("nan", "input", 1),
]  # fmt: skip
LASTING = [(value, "weight", 0) for value in ("nan", "inf", "-inf")]


def run(trials: int, seed: int) -> Result:
    """Inject `trials` wrong numbers."""
    cases = [(kind, step) for kind in KINDS for step in (1, 3, STEPS)]
    random.Random(seed).shuffle(cases)
    chosen = cases[:trials]
    failures, references = [], {}
    with tempfile.TemporaryDirectory(prefix="heron-nonfinite-") as name:
        folder = Path(name)

        def reference(step: int, accumulate: int) -> heron.TrainConfig:
            """A run whose data lack the batch of one step."""
            if (step, accumulate) not in references:
                settings = _settings(folder, f"reference-{step}-{accumulate}", accumulate)
                with _batch_left_out(step, 2 * accumulate):
                    _fit(settings)
                references[step, accumulate] = settings
            return references[step, accumulate]

        for number, ((value, place, micro), step) in enumerate(chosen):
            settings = _settings(folder, f"run-{number}", 1 + micro)
            _fit(settings, Fault(float(value), place, (step - 1) * (1 + micro) + 1 + micro))
            problem = _problem(settings, reference(step, 1 + micro), step)
            if problem:
                failures.append(f"{value} in the {place} at step {step}: {problem}")
        lasting = [(kind, step) for kind in LASTING for step in (1, 3, STEPS)][: max(1, trials // 5)]
        for number, ((value, place, _), step) in enumerate(lasting):
            settings = _settings(folder, f"lasting-{number}", 1, save_every=1)
            settings = settings if step > 1 else heron.TrainConfig(**{**vars(settings), "on_nonfinite": "rewind"})
            _fit(settings, Fault(float(value), place, step, lasting=True))
            healed = all(weight.isfinite().all() for weight in minute.final_weights(settings).values())
            if not healed or [record["action"] for record in _refused(settings)] != ["went back"]:
                failures.append(f"{value} stays in a weight from step {step} on: it was not taken back")
        controls = max(2, len(chosen) // 6)
        caught = 0

        def passing(loss: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros_like(loss), verdict(loss, *rest)[1]

        everything_passes = minute.replaced(learner, "verdict", passing)
        with everything_passes, minute.replaced(guards.Guard, "accept", lambda *_: None):
            for number, ((value, place, micro), step) in enumerate(chosen[:controls]):
                settings = _settings(folder, f"control-{number}", 1 + micro)
                _fit(settings, Fault(float(value), place, (step - 1) * (1 + micro) + 1 + micro))
                caught += _problem(settings, reference(step, 1 + micro), step) is not None
    return Result(
        "a number that is not finite: caught at once, one batch skipped, no later value touched",
        len(chosen),
        48,
        failures,
        "every step let through: the curve is another, or poisoned",
        caught,
        min(controls, len(chosen)),
        f"{len(lasting)} weights that stayed bad: went back",
    )


def _settings(folder: Path, name: str, accumulate: int, **changes: object) -> heron.TrainConfig:
    values = dict(max_steps=STEPS, on_nonfinite="skip", save_every=0, eval_every=0, sample_every=0, spike=0.0)
    return minute.config(folder, out=str(folder / name), accumulate=accumulate, **{**values, **changes})


def _fit(settings: heron.TrainConfig, fault: Fault | None = None) -> None:
    torch.set_num_threads(1)
    output = Path(settings.out).with_suffix(".txt").open("w")
    with output, contextlib.redirect_stdout(output), minute.replaced(train, "plot", lambda *_: None):
        trainer = train.Trainer(settings)
        (trainer if fault is None else faulty(trainer, fault)).fit()


def _refused(settings: heron.TrainConfig) -> list[dict]:
    lines = Path(settings.out, "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "refused" in record]


def _problem(settings: heron.TrainConfig, reference: heron.TrainConfig, step: int) -> str | None:
    refused = _refused(settings)
    if [(record["refused"], record["action"]) for record in refused] != [(step, "skipped")]:
        return f"refused: {refused}"
    if not minute.same(settings, reference):
        return "a later value differs from a run without that batch"
    [dumped] = Path(settings.out, "bad").iterdir()
    first, count = refused[0]["samples"]
    data = torch.tensor(list(Path(settings.data).read_bytes()))
    tokens = load_file(dumped)["tokens"]
    windows = data.unfold(0, tokens.shape[1], 1)
    found = all((windows == row).all(1).any() for row in tokens)
    return None if len(tokens) == count and found else "the dumped samples are not those of the data"


@contextlib.contextmanager
def _batch_left_out(step: int, samples: int):
    batch = Batches.batch

    def without(self, first: int, *which: int):
        return batch(self, first + samples * (first >= samples * (step - 1)), *which)

    with minute.replaced(Batches, "batch", without):
        yield
