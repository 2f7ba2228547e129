"""One run: Heron's own training step on samples made as they are needed, and what the trained model then knows."""

from __future__ import annotations

import json
import shutil
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.proofs.batch import IGNORED
from benchmarks.proofs.catalogue import TASKS, Case, Maker
from benchmarks.proofs.curriculum import Curriculum
from benchmarks.proofs.models import CarryingRWKV, build
from heron import RWKV
from heron.files import write_text
from heron.optim import lr_at
from heron.report import Reporter
from heron.train.step import Learner

RESULT = "result.json"
_LOGS, _VALIDATIONS = 100, 20  # records of a run
_TOKENS_AT_ONCE = 2**17  # of a test


def learn(case: Case, results: Path, device: torch.device, steps: int | None = None) -> Path:
    """Train a case and test it; its folder under `results`, which is there once all of it is written."""
    task, config = TASKS[case.task], case.settings(steps)
    folder = results / case.name
    part = folder.with_name(f".tmp-{case.seed}")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    longest = max(maker(rng, 1)[0].shape[1] for maker in (task.batch, *task.tests.values()))
    model = build(case.model, config.model, longest, task.pieces > 1)
    learner = Learner(model, config, device)
    total, begun, logged = config.total_steps, time.perf_counter(), 0.0
    log_every, validate_every = max(1, total // _LOGS), max(1, total // _VALIDATIONS)
    curriculum = Curriculum(task, total)
    with Reporter(part, total, quiet=True) as reporter:
        write_text(part / "config.yaml", config.to_yaml())
        for step, (begins, (tokens, targets)) in enumerate(islice(curriculum.pieces(rng, config.micro_bsz), total)):
            if begins and isinstance(model, CarryingRWKV):
                model.forget(config.micro_bsz)
            lr = lr_at(step, config)
            loss = learner.gradients([(torch.from_numpy(tokens), torch.from_numpy(targets))])
            numbers = learner.update(loss, lr, float("inf"))
            done = step + 1
            curriculum.after(done, numbers[0])
            if done == 1 or done % log_every == 0 or done == total:
                loss, grad_norm, *_ = numbers.tolist()
                now = time.perf_counter() - begun
                speed = (1 if done == 1 else log_every) * config.tokens_per_step / (now - logged)
                logged = now
                reporter.step(
                    dict(
                        step=done, tokens=done * config.tokens_per_step, loss=loss, lr=lr, grad_norm=grad_norm,
                        tokens_per_s=speed, time=now,
                    )
                )  # fmt: skip
            if done % validate_every == 0 or done == total:
                found = test(learner.model, next(iter(task.tests.values())), task.n_test // 4, device)
                found.pop("by_position")
                reporter.validation(dict(step=done, time=time.perf_counter() - begun, **found))
    tests = {name: test(learner.model, maker, task.n_test, device) for name, maker in task.tests.items()}
    record = dict(
        case._asdict(), steps=total, whole_from=curriculum.whole_from, seconds=round(time.perf_counter() - begun, 1),
        machine=_machine(device), torch=torch.__version__,
        parameters=sum(p.numel() for p in learner.model.parameters()), tests=tests,
    )  # fmt: skip
    write_text(part / RESULT, json.dumps(record) + "\n")
    part.rename(folder)
    return folder


@torch.no_grad()
def test(model: RWKV, maker: Maker, n: int, device: torch.device) -> dict:
    """How well a model does on `n` samples that it was not trained on.

    Returns:
        val_loss: mean cross entropy of what is asked, nats. accuracy: share of it that is right. whole: share of
        samples in which all is right. last: share in which the last thing asked is. by_position: accuracy at each
        token's place, None where nothing is asked.
    """
    tokens, targets = maker(np.random.default_rng(2**32), n)  # a seed that no run has
    losses, right = [], []
    at_once = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
    for begin in range(0, n, at_once):
        some, asked = (torch.from_numpy(part[begin : begin + at_once]).to(device) for part in (tokens, targets))
        is_asked = asked != IGNORED
        hidden, _ = model.hidden_states(some, keep_state=False)
        logits = model.logits(hidden[is_asked]).float()
        losses.append(F.cross_entropy(logits, asked[is_asked], reduction="sum").item())
        hits = torch.zeros_like(is_asked)
        hits[is_asked] = logits.argmax(dim=-1) == asked[is_asked]
        right.append(hits.cpu())
    return dict(val_loss=sum(losses) / int((targets != IGNORED).sum()), **scores(torch.cat(right).numpy(), targets))


def scores(right: np.ndarray, targets: np.ndarray) -> dict:
    """What :func:`test` says of answers: `right` (n, T) bool, of targets (n, T) where something is asked."""
    asked = targets != IGNORED
    last = asked.shape[1] - 1 - np.argmax(asked[:, ::-1], axis=1)
    counts, hits = asked.sum(axis=0), (right & asked).sum(axis=0)
    return dict(
        accuracy=float(hits.sum() / counts.sum()),
        whole=float((right | ~asked).all(axis=1).mean()),
        last=float(np.take_along_axis(right, last[:, None], axis=1).mean()),
        by_position=[float(hit / count) if count else None for hit, count in zip(hits, counts, strict=True)],
    )


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
