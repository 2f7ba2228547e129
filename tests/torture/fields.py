"""Each field of the saved state left out in turn: a resume refuses the checkpoint by the field's name, or says it.

The fields are every tensor of the weights, of the optimizer and of the random generators, and every entry of the
trainer's record. A field is taken out and the manifest made anew, as if the code that saves had forgotten it. The
control takes the comparison of names away: the same checkpoints are then taken up without a word.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import heron
from heron.checkpoint import run as checkpoints
from heron.data.loader import load_corpus
from heron.errors import CheckpointError
from heron.tokenizer import load as load_tokenizer
from heron.train import Trainer, differences, resume
from heron.train.guard import Guard
from heron.train.parts import Progress
from heron.train.step import Learner
from tests.torture import minute
from tests.torture.result import Result


def run(trials: int, seed: int) -> Result:
    """Leave out up to `trials` fields; all of them if there are no more."""
    failures = []
    with tempfile.TemporaryDirectory(prefix="heron-fields-") as name:
        folder = Path(name)
        settings = minute.reference(folder, max_steps=3, save_every=0)
        checkpoint = checkpoints.newest(Path(settings.out))
        fields = list(_fields(checkpoint))
        random.Random(seed).shuffle(fields)
        chosen = fields[:trials]
        for field in chosen:
            said = _taken_up(settings, _without(checkpoint, field, folder / "cut"))
            if field[-1].removeprefix("unused.") not in said:
                failures.append(f"{'.'.join(field)}: {said or 'taken up without a word'}")
        optional = [field for field in fields if field[0] == checkpoints.OPTIMIZER][: max(2, len(chosen) // 20)]
        with minute.replaced(checkpoints, "check_names", lambda *_: None):
            caught = sum(not _taken_up(settings, _without(checkpoint, f, folder / "cut")) for f in optional)
    return Result(
        "each field of the saved state left out: the resume says which",
        len(chosen),
        len(fields),
        failures,
        "no names compared: a lost moment is not noticed",
        caught,
        len(optional),
        f"{len(fields)} fields",
    )


def _fields(checkpoint: Path) -> Iterator[tuple[str, ...]]:
    for file in (checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.RNG):
        yield from ((file, name) for name in load_file(checkpoint / file))
    record = checkpoints.trainer_of(checkpoint)
    yield from ((checkpoints.TRAINER, name) for name in record)
    yield from ((checkpoints.TRAINER, "guard", name) for name in record["guard"])
    yield from ((checkpoints.TRAINER, "exact", name) for name in record["exact"])
    yield from ((name,) for name in checkpoints._manifest(checkpoint)["files"])


def _without(checkpoint: Path, field: tuple[str, ...], copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    file = copy / field[0]
    manifest = checkpoints._manifest(copy)
    if len(field) == 1:
        file.unlink()
        del manifest["files"][field[0]]
    elif file.suffix == ".json":
        record = json.loads(file.read_text())
        holder = record if len(field) == 2 else record[field[1]]
        del holder[field[-1]]
        file.write_text(json.dumps(record))
    else:
        tensors = load_file(file)
        del tensors[field[1]]
        save_file(tensors, file)
    if file.exists():
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoints.files.sha256(file)}
    del manifest["sha256"]
    (copy / checkpoints.MANIFEST).write_bytes(checkpoints._sealed(manifest))
    return copy


def _taken_up(settings: heron.TrainConfig, checkpoint: Path) -> str:
    """What a resume from a checkpoint says; an empty text if nothing."""
    trainer = Trainer(settings)
    torch.manual_seed(1)
    model = heron.RWKV(minute.MODEL)
    learner = Learner(model, trainer.config, torch.device("cpu"))
    model.loss(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    learner.optimizer.step()
    corpus = load_corpus(settings.data, load_tokenizer("bytes"), None, None, 256)
    try:
        checkpoints.verify(checkpoint)
        guard = Guard(settings.on_nonfinite, settings.spike)
        record = resume.restore(checkpoint, learner, guard, Progress())
    except CheckpointError as error:
        return str(error)
    return "; ".join(differences.not_exact(record, trainer.config, trainer.device, corpus, learner))
