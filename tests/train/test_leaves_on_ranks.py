"""Adapters, tuned states and ROSA memory on two processes: the run that one process makes, and the same after a stop.

`python -m tests.train.test_leaves_on_ranks FOLDER` imports all once and becomes the two, all runs one after another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import heron
from heron import report
from heron.model import quantized
from heron.train import loop
from tests import warm
from tests.ranks import SIZES, become, fit, settings
from tests.train.faults import StopAt

pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")

STOP = 2


def runs(folder: Path) -> dict[str, dict]:
    """What is asked of each run beyond :func:`tests.ranks.settings`, by its name."""
    beside = dict(
        model=str(folder / "base.pth"), data=str(folder / "chat.jsonl"), ctx_len=96, max_steps=5, warmup_steps=1,
        lr_init=1e-2, lr_final=1e-3, eval_every=0, parallel="ddp",
    )  # fmt: skip
    memory = heron.ModelConfig(variant="v8", rosa="memory", **SIZES)
    adapter = dict(method="lora", adapter=dict(rank=4))
    on_tables = dict(method="lora", adapter=dict(rank=4, tables="low-rank"))
    quantizing = beside | dict(model=str(folder / "wide.pth"), dtype="bf16")  # nf4 has a scale for 64 weights
    preferring = heron.FinetuneConfig.from_dict(adapter | dict(objective="dpo"))
    dropping = dict(method="lora", adapter=dict(rank=4, dropout=0.3))
    return {
        "memory": dict(model=memory, max_steps=6, eval_every=3, parallel="ddp"),
        "adapter": beside | dict(finetune=heron.FinetuneConfig.from_dict(on_tables)),
        "state": beside | dict(finetune=heron.FinetuneConfig(method="state", token_shifts=True)),
        "chunks": dict(ctx_len=64, tbptt="16", max_steps=6, eval_every=3, parallel="ddp"),
        "exact": dict(ctx_len=64, tbptt="exact:16", max_steps=6, eval_every=3, parallel="ddp"),
        "pairs": beside | dict(data=str(folder / "pairs.jsonl"), eval_every=3, finetune=preferring),
        **{
            base: quantizing | dict(finetune=heron.FinetuneConfig.from_dict(adapter | dict(base=base)))
            for base in QUANTIZED
        },
        "dropping": beside | dict(finetune=heron.FinetuneConfig.from_dict(dropping)),
        "stopped": beside | dict(finetune=heron.FinetuneConfig.from_dict(dropping)),
    }


QUANTIZED = ("int8", "nf4") if importlib.util.find_spec("bitsandbytes") else ()
# Runs whose losses do not depend on the number of processes.
ALIKE = ("memory", "adapter", "state", "chunks", "exact", "pairs", *QUANTIZED)
CLOSE = dict.fromkeys(QUANTIZED, 2e-2)  # where the network computes in bf16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of one process with four samples a step, in one/, and those of two with two each, in two/."""
    folder = tmp_path_factory.mktemp("leaves")
    talks = [(f"What is {n} and {n % 3}?", f"It is {n + n % 3}." + " Or not." * (n % 4)) for n in range(30)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"prompt": a, "completion": b}) for a, b in talks))
    pairs = [{"prompt": a, "chosen": b, "rejected": "I can't say." * (1 + len(b) % 3)} for a, b in talks]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "text.txt").write_text("".join(f"Number {n} is {n * n % 97}.\n" for n in range(150)))
    torch.manual_seed(0)
    heron.save(heron.RWKV(heron.ModelConfig(variant="v8", **SIZES)), folder / "base.pth")
    heron.save(heron.RWKV(heron.ModelConfig(variant="v7", **SIZES | dict(n_embd=64))), folder / "wide.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "DEVICES", ("cpu",))
        for name in ALIKE:
            config = settings(folder / "one", folder / "text.txt", name, **runs(folder)[name] | dict(micro_bsz=4))
            assert heron.Trainer(config, say=lambda line: None).fit() == "finished"
    warm.run(["-m", "tests.train.test_leaves_on_ranks", folder])
    return folder


def two(folder: Path) -> None:
    """The runs of one of two processes, which draws initial values of its own."""
    quantized.DEVICES = ("cpu",)
    seed_all = torch.manual_seed
    torch.manual_seed = lambda seed: seed_all(seed + int(os.environ["RANK"]))

    def made(name: str, trainer: Callable[..., heron.Trainer] = heron.Trainer) -> str:
        return fit(folder / "two", folder / "text.txt", name, trainer, **runs(folder)[name])

    for name in (*ALIKE, "dropping"):
        assert made(name) == "finished"
    assert made("stopped", partial(StopAt, step=STOP + 1, number=signal.SIGUSR1)) == "preempted"
    assert made("stopped") == "finished"


def load_adapter(run_folder):
    return load_file(run_folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ALIKE)
def test_losses_of_two_processes_are_those_of_one(folder, name):
    one, two = (report.read_log(folder / count / name) for count in ("one", "two"))
    for records, key in ((0, "loss"), (1, "val_loss")):
        ours, theirs = ([record[key] for record in of[records]] for of in (two, one))
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < CLOSE.get(name, 1e-6)
        assert len(ours) == len(theirs) > 0


def test_a_run_with_dropout_that_was_stopped_goes_on_bit_for_bit(folder):
    whole, stopped = (report.read_log(folder / "two" / name)[0] for name in ("dropping", "stopped"))
    assert (folder / "two" / "stopped" / "checkpoints" / f"step-{STOP + 1:08d}").is_dir()
    assert [record["loss"] for record in whole] == [record["loss"] for record in stopped]
    one, other = (load_adapter(folder / "two" / name) for name in ("dropping", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    loop.plot = lambda folders, out: None
    become(2, partial(two, Path(sys.argv[1])))
