"""Runs on several processes for tests/test_dist.py: each process is `python -m tests.ranks FOLDER TEXT`.

One launch makes them all, since it takes seconds. What they leave in FOLDER is compared there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import heron
from heron.checkpoint import run
from heron.errors import CheckpointError, HeronError
from heron.train import loop
from heron.train.step import Learner

SIZES = dict(n_layer=2, n_embd=32, head_size=16, vocab_size=256)
MODELS = {variant: heron.ModelConfig(variant=variant, **SIZES) for variant in ("v7", "v8")}
STEPS, STOP = 20, 8
_MOST_RUNS = 20


def settings(folder: Path, text: Path, name: str, **changes) -> heron.TrainConfig:
    """A run of `STEPS` steps in FOLDER/name, of two samples a process."""
    values = dict(
        model=MODELS["v7"], data=str(text), out=str(folder / name), ctx_len=32, micro_bsz=2, max_steps=STEPS,
        lr_init=3e-4, lr_final=1e-4, warmup_steps=2, threads=1, dtype="fp32", device="cpu", save_every=0,
        eval_every=10, sample_every=0, sample_tokens=4, dist_timeout=60,
    )  # fmt: skip
    return heron.TrainConfig(**{**values, **changes})


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def launch(arguments: list[str], processes: int) -> list[subprocess.Popen]:
    """Start so many processes, as torchrun does."""
    ports = free_ports(_MOST_RUNS)
    common = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
    common |= dict(OMP_NUM_THREADS="1", MASTER_PORT=str(ports[0]), HERON_TEST_PORTS=",".join(map(str, ports)))
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


class StopAt(heron.Trainer):
    """A trainer of which the last process is asked to stop during the step behind STOP others."""

    def _gradients(self, parts, first):
        last = self.ranks.rank == self.ranks.count - 1
        if last and first == STOP * self.config.samples_per_step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super()._gradients(parts, first)


class FaultyRank(heron.Trainer):
    """A trainer of which the last process meets a NaN in its fourth forward pass."""

    def _loop(self, parts, progress):
        network, passes = parts.learner.network, itertools.count(1)
        healthy = network.loss
        if self.ranks.rank == self.ranks.count - 1:
            network.loss = lambda *batch, **given: healthy(*batch, **given) * (math.nan if next(passes) == 4 else 1)
        return super()._loop(parts, progress)


def full_disk(*_: object) -> Path:
    """In the place of what writes a checkpoint."""
    raise CheckpointError("checkpoints/step-00000020: cannot be written: No space left on device")


def main(folder: Path, text: Path) -> None:
    """All runs, one after another."""
    loop.plot = lambda folders, out: None  # seconds, and tested elsewhere

    ports = iter(os.environ["HERON_TEST_PORTS"].split(","))  # a run must not meet the store of the one before

    def fit(name: str, trainer: type[heron.Trainer] = heron.Trainer, **changes) -> str:
        os.environ["MASTER_PORT"] = next(ports)
        return trainer(settings(folder, text, name, **changes), say=lambda line: None).fit()

    count = int(os.environ["WORLD_SIZE"])
    for parallel in ("ddp", "fsdp"):
        assert fit(parallel, parallel=parallel) == "finished"
        assert fit(f"{parallel}-stopped", StopAt, parallel=parallel) == "preempted"
        assert fit(f"{parallel}-stopped", parallel=parallel) == "finished"
        nan = dict(parallel=parallel, on_nonfinite="skip", max_steps=5)
        assert fit(f"{parallel}-nan", FaultyRank, **nan) == "finished"
    assert fit("v8", model=MODELS["v8"], tables="host", max_steps=8, parallel="ddp") == "finished"
    accumulated = dict(micro_bsz=1, accumulate=2, max_steps=8)
    assert fit("accumulated-fsdp", grad_checkpoint=True, parallel="fsdp", **accumulated) == "finished"
    assert fit("accumulated-ddp", parallel="ddp", **accumulated) == "finished"
    os.environ["LOCAL_WORLD_SIZE"] = str(count // 2)  # as on two machines
    assert fit("hsdp", parallel="hsdp") == "finished"
    for parallel in ("ddp", "fsdp", "hsdp"):  # what one process saved is loaded, and saved again
        os.environ["MASTER_PORT"] = next(ports)
        config = settings(folder, text, f"again-{parallel}", parallel=parallel, processes=count)
        trainer = heron.Trainer(config)
        with trainer.ranks.joined(trainer.device, 60):
            learner = Learner(heron.RWKV(MODELS["v7"]), trainer.config, trainer.device, ranks=trainer.ranks)
            record = run.restore(folder / "one" / "checkpoints" / f"step-{STEPS:08d}", learner.model, learner.optimizer)
            Path(config.out).mkdir(exist_ok=True)
            run.save(Path(config.out), STEPS, learner.model, learner.optimizer, record, "seed: 0\n", 1, trainer.ranks)
    os.environ["MASTER_PORT"] = next(ports)
    run._write = full_disk
    try:
        heron.Trainer(settings(folder, text, "full", parallel="ddp"), say=lambda line: None).fit()
    except HeronError as error:
        (folder / f"full-{os.environ['RANK']}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
