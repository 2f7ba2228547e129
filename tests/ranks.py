"""Runs on several processes for tests/test_dist.py, which starts `python -m tests.ranks FOLDER TEXT`.

That becomes several processes. What they leave in FOLDER is compared there.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint import state_dict_saver

import heron
from heron import cli, machine
from heron.checkpoint import run, sharded
from heron.dist import Ranks
from heron.errors import CheckpointError, HeronError
from heron.tables.owners import Owners
from heron.train import loop
from heron.train.step import Learner
from tests.train.faults import StopAt

SIZES = dict(n_layer=2, n_embd=32, head_size=16, vocab_size=256)
MODELS = {variant: heron.ModelConfig(variant=variant, **SIZES) for variant in ("v7", "v8")}
GATED = "gated.pth"  # a v8 whose gates have gradients from the first step on, that count in the norm
STEPS, STOP = 4, 2
TABLE = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
WANTED = [torch.tensor(ids) for ids in ([0, 1, 2, 4, 9, 36], [3, 4, 36], [5], [0, 4, 8, 11, 36])]  # by each process
_MOST_RUNS = 50


def settings(folder: Path, text: Path, name: str, **changes) -> heron.TrainConfig:
    """A run of `STEPS` steps in FOLDER/name, of two samples a process."""
    values = dict(
        model=MODELS["v7"], data=str(text), out=str(folder / name), ctx_len=32, micro_bsz=2, max_steps=STEPS,
        lr_init=3e-4, lr_final=1e-4, warmup_steps=2, threads=1, dtype="fp32", device="cpu", save_every=0,
        eval_every=STEPS // 2, sample_every=0, sample_tokens=4, dist_timeout=60,
    )  # fmt: skip
    return heron.TrainConfig(**{**values, **changes})


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens at, below those that it gives to connections.

    A rank that meets a stranger at the port of its run waits for an answer without end.
    """
    with contextlib.ExitStack() as stack:
        ports = []
        for port in random.SystemRandom().sample(range(15000, 32768), 1000):
            with contextlib.suppress(OSError):  # it is taken
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == n:
                return ports
    raise RuntimeError(f"wanted {n} free ports, got {len(ports)} among 1000")


def launch(arguments: list[str], processes: int) -> list[subprocess.Popen]:
    """Start so many processes, as torchrun does."""
    port = free_ports(1)[0]
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env={**os.environ, **_environment(rank, processes, port)},
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    numbers = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
    return dict(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1") | {name: str(n) for name, n in numbers.items()}


def become(processes: int, work: Callable[[], None]) -> None:
    """Do `work` in that many processes, copies of this one; SystemExit where one fails."""
    await_ends(begin(processes, work, free_ports(_MOST_RUNS)))  # a run must not meet the store of the one before


def begin(processes: int, work: Callable[[], None], ports: list[int]) -> list[int]:
    """Start copies of this process that do `work`, one run after another at these ports; their process ids."""
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            try:
                gc.freeze()  # to look for cycles in what was imported would copy it
                os.environ.update(_environment(rank, processes, ports[0]))
                os.environ["HERON_TEST_PORTS"] = ",".join(map(str, ports))
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def await_ends(children: list[int]) -> None:
    """SystemExit where one of these processes fails."""
    ends = [os.waitpid(child, 0)[1] for child in children]
    if any(ends):
        sys.exit(1)


def _next_port() -> None:
    port, *others = os.environ["HERON_TEST_PORTS"].split(",")
    os.environ.update(MASTER_PORT=port, HERON_TEST_PORTS=",".join(others))


def fit(folder: Path, text: Path, name: str, trainer: Callable[..., heron.Trainer] = heron.Trainer, **changes) -> str:
    """Make a run of :func:`settings`."""
    _next_port()
    return trainer(settings(folder, text, name, **changes), say=lambda line: None).fit()


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
    raise CheckpointError(f"checkpoints/step-{STEPS:08d}: cannot be written: No space left on device")


def of_packs(folder: Path) -> dict:
    """Settings of a run that learns from conversations, several of them in a sample."""
    data = str(folder / "chat.jsonl")
    return dict(data=data, ctx_len=161, finetune=heron.FinetuneConfig(), eval_every=0)


def write_preferences(folder: Path) -> None:
    """The data of :func:`of_preferences`, and a v8 whose gates have gradients from the first step on."""
    rows = [dict(prompt=f"What is {n}?", chosen=f"It is {n % 5}.", rejected=f"No {n % 3}") for n in range(30)]
    (folder / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    gated = heron.RWKV(MODELS["v8"])
    torch.nn.init.normal_(gated.emb.weight, 0, 0.1)  # as small as it begins, its gradient would be all of the norm
    for block in gated.blocks:
        torch.nn.init.normal_(block.ffn.value.weight, 0, 0.03)
        torch.nn.init.normal_(block.ffn.enn.weight, 1, 0.3)
    heron.save(gated, folder / GATED)


def of_preferences(folder: Path) -> dict:
    """Settings of a run in which answers are preferred to others; the rows of its tables are with several processes."""
    dpo = heron.FinetuneConfig(objective="dpo", dpo_beta=1.0)
    data = dict(data=str(folder / "preferences.jsonl"), ctx_len=161, finetune=dpo, val_fraction=0.2)
    return dict(model=str(folder / GATED), **data)


def bench(folder: Path) -> None:
    """`heron bench`, and what it prints in each process."""
    _next_port()
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    settings = ["--ctx_len=16", "--micro_bsz=2", "--accumulate=2", "--steps=2", "--threads=1", "--device=cpu"]
    with open(folder / f"bench-{os.environ['RANK']}.txt", "w") as file, contextlib.redirect_stdout(file):
        asked = ["bench", "--variant=v7", "--parallel=fsdp", f"--json={folder / 'bench.json'}"]
        assert cli.main([*asked, *sizes, *settings]) == 0


def again(folder: Path, text: Path, saved: str, name: str, parallel: str, variant: str = "v7") -> None:
    """Load the last checkpoint of a run, and save what came of it in another. Of tables leave the bytes they take."""
    _next_port()
    count, tables = int(os.environ["WORLD_SIZE"]), "host" if variant == "v8" else "device"
    config = settings(folder, text, name, parallel=parallel, processes=count, tables=tables)
    trainer = heron.Trainer(config)
    with trainer.ranks.joined(trainer.device, 60):
        learner = Learner(heron.RWKV(MODELS[variant]), trainer.config, trainer.device, ranks=trainer.ranks)
        _check_recorded(learner)
        record = run.restore(folder / saved / "checkpoints" / f"step-{STEPS:08d}", learner.model, learner.optimizer)
        Path(config.out).mkdir(exist_ok=True)
        run.save(Path(config.out), STEPS, learner.model, learner.optimizer, record, "seed: 0\n", 1, trainer.ranks)
        weights = [] if learner.tables is None else learner.tables.weights
        held = [tensor for weight in weights for tensor in (weight, *learner.optimizer.state[weight].values())]
        n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in held)
        Path(config.out, f"bytes-{trainer.ranks.rank}.txt").write_text(str(n_bytes))


def _check_recorded(learner: Learner) -> None:
    """Hooks that sharding has set do not keep a pass from being replayed; those of users do."""
    compiled, learner.compiled = learner.compiled, machine.Choice("graph", "for a test")
    replayed = learner._recorded(1)
    assert replayed == (learner.tables is None)
    hook = learner.network.blocks[0].register_forward_hook(lambda *_: None)
    assert not learner._recorded(1)
    hook.remove()
    assert learner._recorded(1) == replayed
    learner.compiled = compiled


def lend(folder: Path) -> None:
    """Bring rows from their owners, and their gradients back; leave what came."""
    _next_port()
    ranks = Ranks.of_environment()
    with ranks.joined(torch.device("cpu"), 60):
        owners, ids = Owners(ranks, len(TABLE)), WANTED[ranks.rank]
        request, share = owners.request(ids), owners.share(TABLE)
        rows, others = TABLE.new_empty(len(ids), TABLE.shape[1]), TABLE.new_empty(len(ids), 1)
        request.fetch([share[request.owned], -2 * share[request.owned, :1]], [rows, others])
        sums, of_others = request.give_back([(ranks.rank + 1) * rows, others])
        (whole,) = owners.whole({"table": share}, folder).values()
        came = dict(ids=request.ids, most=request.most, rows=rows, owned=request.owned, sums=sums, whole=whole)
        came |= dict(others=others, of_others=of_others)  # of a second table
        torch.save(came, folder / f"lent-{ranks.rank}-of-{ranks.count}.pt")


def two(folder: Path, text: Path) -> None:
    """The runs of two processes, one after another."""
    made = partial(fit, folder, text)
    lend(folder)
    count = int(os.environ["WORLD_SIZE"])
    for parallel in ("ddp", "fsdp"):
        assert made(parallel, parallel=parallel) == "finished"
    assert made("fsdp-nan", FaultyRank, parallel="fsdp", on_nonfinite="skip", max_steps=5) == "finished"
    for parallel, tables in itertools.product(("ddp", "fsdp"), ("host", "device")):
        v8 = dict(model=str(folder / GATED), parallel=parallel, tables=tables, sample_every=STEPS)
        v8 |= dict(micro_bsz=1, accumulate=2) if (parallel, tables) == ("fsdp", "device") else {}
        assert made(f"v8-{parallel}-{tables}", **v8) == "finished"
    v8 = dict(model=str(folder / GATED), tables="host")
    half = dict(dtype="bf16", weights="bf16")
    for parallel in ("ddp", "fsdp"):
        assert made(f"half-{parallel}", parallel=parallel, **half) == "finished"
    assert made("half-accumulated", parallel="fsdp", **half, micro_bsz=1, accumulate=2) == "finished"
    stopped = {
        "fsdp-stopped": dict(parallel="fsdp"),
        "half-fsdp-stopped": dict(parallel="fsdp", **half),
        "v8-ddp-stopped": dict(parallel="ddp", **v8),
    }
    sharded._parts.clear()
    asked = calls(state_dict_saver, "save")
    for name, beside in stopped.items():
        beside |= dict(background_save="on", save_every=2, keep=9)
        assert made(name, partial(StopAt, step=STOP + 1, number=signal.SIGUSR1, rank=1), **beside) == "preempted"
        assert name != "fsdp-stopped" or len(asked) == 1  # though it has saved twice
        assert made(name, **beside) == "finished"
    assert made("v8-nan", FaultyRank, on_nonfinite="skip", max_steps=5, parallel="ddp", **v8) == "finished"
    accumulated = dict(micro_bsz=1, accumulate=2)
    assert made("accumulated-fsdp", grad_checkpoint=True, parallel="fsdp", **accumulated) == "finished"
    assert made("accumulated-ddp", parallel="ddp", **accumulated) == "finished"
    for parallel in ("ddp", "fsdp"):
        spans = dict(context_parallel=2, parallel=parallel, micro_bsz=4)
        assert made(f"spans-{parallel}", **spans) == "finished"
    spans = dict(context_parallel=2, parallel="ddp", micro_bsz=4)
    assert made("spans-accumulated", **spans | dict(micro_bsz=2, accumulate=2)) == "finished"
    assert made("spans-packs", **spans | of_packs(folder)) == "finished"
    assert made("spans-v8", **spans, **v8) == "finished"
    assert made("dpo", parallel="ddp", **of_preferences(folder)) == "finished"
    assert made("spans-nan", FaultyRank, on_nonfinite="skip", max_steps=5, **spans) == "finished"
    bench(folder)
    os.environ["LOCAL_WORLD_SIZE"] = str(count // 2)  # as on two machines
    assert made("hsdp", parallel="hsdp") == "finished"
    for parallel in ("ddp", "fsdp", "hsdp"):
        again(folder, text, "one", f"again-{parallel}", parallel)
        again(folder, text, "one-v8", f"again-v8-{parallel}", parallel, "v8")
    run._write = full_disk
    if os.environ["RANK"] == "1":
        run.Writer.files = full_disk
    full = dict(full=dict(parallel="ddp"), full_fsdp=dict(parallel="fsdp", save_every=2, max_steps=STEPS + 2))
    for name, changes in full.items():
        try:
            made(name, background_save="on", **changes)
        except HeronError as error:
            (folder / f"{name}-{os.environ['RANK']}.txt").write_text(str(error))
            distributed.destroy_process_group()


def calls(module: Any, name: str) -> list[str]:
    """A list that grows by one at each call of a function of a module."""
    called, function = [], getattr(module, name)

    def calling(*arguments: Any, **named: Any) -> Any:
        called.append(name)
        return function(*arguments, **named)

    setattr(module, name, calling)
    return called


def four(folder: Path, text: Path) -> None:
    """The runs of four processes: in pairs that share samples."""
    lend(folder)
    for parallel in ("ddp", "fsdp"):
        name = f"pairs-{parallel}"
        assert fit(folder, text, name, parallel=parallel, context_parallel=2) == "finished"
        again(folder, text, "fsdp", f"four-{parallel}", parallel)
        again(folder, text, f"v8-{parallel}-host", f"four-v8-{parallel}", parallel, "v8")


if __name__ == "__main__":
    loop.plot = lambda folders, out: None  # seconds, and tested elsewhere
    for n, work in ((2, two), (4, four)):
        become(n, partial(work, Path(sys.argv[1]), Path(sys.argv[2])))
