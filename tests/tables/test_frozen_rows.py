"""Rows of frozen tables come from the host ahead of their step, and its numbers are those of tables on the device."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch

import heron
from heron import machine
from heron.model import compiled as compilation
from heron.tables.frozen import FrozenRows
from heron.tables.rows import RowTables
from heron.train.step import Learner

CPU = torch.device("cpu")
STATE = heron.FinetuneConfig(method="state")


class Event:
    """What a stream had been told when it was recorded."""

    def __init__(self, told, name):
        self.told, self.name = told, name

    def synchronize(self):
        self.told.append(f"the host waits for {self.name}")


class Stream:
    """A stream that has done what it is told when it is told, and notes it."""

    def __init__(self, told, name):
        self.told, self.name, self.events = told, name, 0

    def record_event(self):
        self.events += 1
        return Event(self.told, f"{self.name} {self.events}")

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event.name}")


@pytest.fixture
def told(monkeypatch):
    """What two streams and the host were told, from which copies on a CPU are seen to be in order."""
    told = []
    main, beside = Stream(told, "main"), Stream(told, "beside")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return told


def test_rows_arrive_in_the_half_that_no_step_reads(told):
    tables, moved = [torch.arange(60.0 * width).view(60, width) for width in (4, 8)], []
    rows = FrozenRows(tables, CPU, lambda: moved.append(len(told)))
    steps = [[3, 5], [5], list(range(0, 50, 2)), list(range(30)), [59], list(range(60))]
    halves, before = [], None
    for number, ids in enumerate(steps):
        del told[:]
        ids, known = torch.tensor(ids), before and [part.clone() for part in before[0]]
        rooms, first = rows.bring(ids, most=25 if number < 3 else 60)
        for room, table in zip(rooms, tables, strict=True):
            assert torch.equal(room[first : first + len(ids)], table[ids])
        half = len(rooms[0]) // 2
        assert first in (0, half)
        if before is not None and before[0] is rooms:  # what the step before reads is as it was
            mine = slice(before[1], before[1] + len(steps[number - 1]))
            assert first != before[1]
            assert all(torch.equal(room[mine], old[mine]) for room, old in zip(rooms, known, strict=True))
        # A half is filled once the step before the last is done, a new room once all is that came before.
        waits = [f"the host waits for main {number}"] if number else []
        grows = [f"beside waits for main {number + 1}"] if before is None or before[0] is not rooms else []
        assert told == [*waits, *grows, f"main waits for beside {number + 1}"]
        halves.append(half)
        before = rooms, first
    assert halves == [25, 25, 25, 60, 60, 60]
    assert len(moved) == 2


class Replayed:
    """As PassGraph, but it makes the pass anew, of tensors that must be where they were."""

    def __init__(self, run, leaves, sample):
        self.run, self.leaves, self.inputs = run, leaves, [None if part is None else part.clone() for part in sample]

    def replay(self, sample):
        for mine, new in zip(self.inputs, sample, strict=True):
            if mine is not None:
                mine.copy_(new)
        for leaf in self.leaves:
            leaf.grad = None
        return self.run(*self.inputs)


@pytest.mark.parametrize(
    ("variant", "compiled"), [("v8", "on"), ("v8", "graph"), ("v7a", "graph"), ("v8-hybrid", "on")]
)
def test_steps_beside_frozen_tables_on_the_host_are_those_of_tables_on_the_device(
    told, random_model, monkeypatch, variant, compiled
):
    def tables_of_a_gpu(model, device, storage, trains, *_, **__):
        if storage == "device":
            return None
        tables = RowTables(model, device, storage, trains)
        tables._frozen = FrozenRows(tables.weights, device, tables._move)
        assert tables.recordable
        return tables

    monkeypatch.setattr("heron.train.step.row_tables", tables_of_a_gpu)
    monkeypatch.setattr("heron.dist.compile_blocks", lambda network: None)
    monkeypatch.setattr(compilation, "PassGraph", Replayed)
    monkeypatch.setattr(compilation, "choose", lambda *_: machine.Choice(compiled, ""))
    model, ended = random_model(n_layer=2, vocab_size=300, variant=variant), []
    for tables in ("device", "host"):
        config = heron.TrainConfig(
            max_steps=1, dtype="bf16", weights="bf16", tables=tables, finetune=STATE, grad_checkpoint=True
        )
        learner, numbers = Learner(copy.deepcopy(model), config, CPU), []
        frozen = [name for name in learner.model.state_dict() if "enn" in name or "s_emb.weight" in name]
        assert {learner.model.get_parameter(name).dtype for name in frozen} == {torch.bfloat16}
        for step in range(8):
            draw = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 20 if step < 6 else 300, (4, 65), generator=draw)  # more room for the last
            loss = learner.gradients([(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())])
            numbers.append(learner.update(loss, 1e-2, math.inf))
        assert len(learner._passes.graphs) == (compiled == "graph")
        ended.append((torch.stack(numbers), learner.trained.state_dict()))
    assert torch.equal(ended[0][0], ended[1][0])
    assert all(torch.equal(ended[1][1][name], value) for name, value in ended[0][1].items())


FORMS = {"v8": {}, "4x": dict(deep_embed_4x=True), "v7a": dict(variant="v7a")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("v8", {}),
        ("v8", dict(grad_checkpoint=True, accumulate=2)),
        ("4x", {}),
        ("v7a", {}),
    ],
    ids=str,
)
def test_on_a_gpu_they_are_the_same_bits_recorded_or_not(form, changes):
    """Steps follow each other as fast as the host can start them, and need more room from the eighth on."""
    pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=128, vocab_size=4096)
    model = heron.RWKV(heron.ModelConfig(**{"variant": "v8", **sizes, **FORMS[form]}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    lora = heron.FinetuneConfig(method="lora", adapter=dict(rank=4))
    n_passes = changes.get("accumulate", 1)
    ids = [torch.randint(0, 4000 if n >= 8 * n_passes else 300, (8, 257)) for n in range(16 * n_passes)]
    samples = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]
    ended = {}
    for compiled in ("off", "on", "graph"):
        for tables in ("device", "host"):
            config = heron.TrainConfig(
                max_steps=1, dtype="bf16", weights="bf16", tables=tables, compile=compiled, finetune=lora, **changes
            )
            torch.manual_seed(1)
            learner = Learner(copy.deepcopy(model), config, torch.device("cuda"))
            numbers = [
                learner.update(learner.gradients(samples[n : n + n_passes]), 1e-2, math.inf)
                for n in range(0, len(samples), n_passes)
            ]
            ended[compiled, tables] = torch.stack(numbers), dict(learner.trained.state_dict())
            assert len(learner._passes.graphs) == (compiled == "graph")
            assert tables == "device" or learner.tables._by_kernel
    for one, other in (
        (("off", "device"), ("off", "host")),
        (("on", "device"), ("on", "host")),
        (("on", "host"), ("graph", "host")),
        (("graph", "device"), ("graph", "host")),
    ):
        assert torch.equal(ended[one][0], ended[other][0]), (one, other)
        for name, value in ended[one][1].items():
            assert torch.equal(value, ended[other][1][name]), (one, other, name)
