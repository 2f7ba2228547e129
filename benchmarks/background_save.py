"""How much training steps lose while a save is in flight. ``python benchmarks/background_save.py [--n_layer 24 ...]``

On many GPUs ``torchrun --nproc-per-node N benchmarks/background_save.py --parallel fsdp``. The steps of ``heron train``
on random tokens, read one behind as there, alone and beside saves in turns, since a GPU that has become warm is slower.
`alone` is the median of the steps before and behind a save. `lost` is by how much the steps that were made meanwhile
took longer than as many of these, as a share of the save's time; `copy` of that is the time in which training waits for
the copy in the host's memory. The first save makes room for it: its pages, and on a GPU their pinning.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator

from heron import ModelConfig, TrainConfig, Trainer
from heron.checkpoint import run
from heron.checkpoint.background import Saver
from heron.commands.bench import fresh_learner, random_batch
from heron.dist import Ranks

ALONE, WARM_UP = 16, 6  # steps; alone, before each save and behind the last


def steps(trainer: Trainer, config: TrainConfig, model: ModelConfig, ranks: Ranks) -> Iterator[object]:
    """Make steps: the learner after each. The numbers of the one before have been read."""
    learner = fresh_learner(config, model, ranks)
    batches = itertools.cycle([random_batch(config, model) for _ in range(4)])
    before = None
    for samples in batches:
        numbers = learner.update(learner.gradients(samples), config.lr_init, math.inf)
        if before is not None:
            before.tolist()
        before = numbers
        yield learner


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(n_layer=24, n_embd=2048, vocab_size=65536, micro_bsz=8, ctx_len=2048, saves=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--folder", help="on the disk to be measured; default: the temporary folder")
    options = parser.parse_args()
    model = ModelConfig(variant="v7", n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size)
    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        trainer = Trainer(
            TrainConfig(
                model=model, out=out, micro_bsz=options.micro_bsz, ctx_len=options.ctx_len, dtype=options.dtype,
                parallel=options.parallel, max_steps=1, background_save="on", keep=1,
            )
        )  # fmt: skip
        with trainer.ranks.joined(trainer.device, trainer.config.dist_timeout):
            measure(trainer, model, options.saves)


def measure(trainer: Trainer, model: ModelConfig, saves: int) -> None:
    """Steps alone and beside saves, in turns."""
    ranks = trainer.ranks
    config = dataclasses.replace(trainer.config, out=ranks.first(lambda: trainer.config.out))
    made = steps(trainer, config, model, ranks)
    for _ in range(WARM_UP):
        learner = next(made)
    trainer.say(f"{'save':<6}{'seconds':>9}{'steps':>7}{'ms a step':>11}{'alone':>8}{'lost':>8}{'copy':>8}")
    before = alone(made)
    with Saver(config, ranks) as saver:
        for save in range(1, saves + 1):
            begun = time.perf_counter()
            saver.begin(run.contents(save, learner.trained, learner.optimizer, {"step": save}, config.to_yaml()))
            copied, n, is_whole = time.perf_counter() - begun, 0, False
            while not ranks.all(is_whole):
                next(made)
                n += 1
                is_whole = is_whole or (saver.wait() if saver.failed else saver.done()) is not None
            seconds = time.perf_counter() - begun
            behind = alone(made)
            each = statistics.median([*before, *behind])
            lost, before = seconds - n * each, behind
            trainer.say(
                f"{save:<6}{seconds:>9.2f}{n:>7}{1e3 * (seconds - copied) / max(n, 1):>11.1f}{1e3 * each:>8.1f}"
                f"{lost / seconds:>8.1%}{copied / seconds:>8.1%}"
            )
        saver.wait()


def alone(made: Iterator[object]) -> list[float]:
    """The seconds of steps beside which nothing is saved."""
    taken = []
    for _ in range(ALONE):
        begun = time.perf_counter()
        next(made)
        taken.append(time.perf_counter() - begun)
    return taken


if __name__ == "__main__":
    main()
