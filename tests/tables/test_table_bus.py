"""Tables that train by rows: every road gives the numbers of the plain one on the host."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import heron
from heron import dist, machine
from heron.dist import Ranks
from heron.model import compiled as compilation
from heron.ops import rows
from heron.tables import bus as table_bus
from heron.tables import rows as row_tables
from heron.tables.owners import Owners
from heron.tables.rows import RowTables
from heron.train.step import Learner

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Oneself(Ranks):
    """One process that exchanges rows with itself, as many do with each other."""

    def exchange(self, given, filled, sent, received):
        for tensor, other in zip(given, filled, strict=True):
            other.copy_(tensor)


class Stream:
    """A stream that has done what it is told when it is told."""

    def __init__(self, device):
        self.waited = 0

    def record_event(self):
        return self

    def wait_event(self, event):
        assert event is not None

    def synchronize(self):
        self.waited += 1


def copy_in_pytorch(sources, from_rows, targets, to_rows, blocks=0):
    for source, target in zip(sources, targets, strict=True):
        n = range(len(source if from_rows is None else from_rows))
        target[list(n) if to_rows is None else to_rows] = source[list(n) if from_rows is None else from_rows]


def step_in_pytorch(
    weights, exp_avgs, exp_avg_sqs, row_steps, gradients, ids, at, moments_at, lr, betas, eps, found_inf
):
    if found_inf is not None and found_inf.item():
        return
    for p, m, v, t, g in zip(weights, exp_avgs, exp_avg_sqs, row_steps, gradients, strict=True):
        stepped = p if at is None else p[at]
        compact = (m, v) if moments_at is None else (m[moments_at], v[moments_at])
        count = t[ids]
        rows.row_adamw_(stepped, *compact, count, g, torch.arange(len(ids)), lr, betas, eps, "reference")
        t[ids] = count
        if at is not None:
            p.detach()[at] = stepped
        if moments_at is not None:
            m[moments_at], v[moments_at] = compact


@pytest.fixture
def bus(monkeypatch):
    """Gives a model's tables the road of a GPU, each stream of which works at once."""
    stream = Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for module in (row_tables, table_bus):
        monkeypatch.setattr(module, "pinned", lambda tensor, wanted=True: tensor)
    monkeypatch.setattr(rows, "copy_rows", copy_in_pytorch)
    monkeypatch.setattr(rows.cuda, "row_adamw_", step_in_pytorch)

    def equip(tables):
        tables._bus = table_bus.Bus(tables.weights, torch.device("cpu"))
        return tables

    return equip


@pytest.mark.parametrize(
    ("variant", "prefetched", "owned", "recorded"),
    [
        ("v8", 0, False, False),
        ("v8", 1 << 30, False, False),
        ("v8", 1 << 30, True, False),
        ("v8-hybrid", 0, True, False),
        ("v8-hybrid", 1 << 30, False, False),
        ("v8", 0, True, True),
        ("v8", 1 << 30, False, True),
    ],
)
def test_rows_that_stay_on_the_device_are_those_of_the_host(
    random_model, bus, monkeypatch, variant, prefetched, owned, recorded
):
    monkeypatch.setattr(table_bus, "_PREFETCHED_BYTES", prefetched)
    models = [random_model(variant=variant).float() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, by_bus = (RowTables(model, torch.device("cpu")) for model in models)
    plain.impl = "reference"
    bus(by_bus)
    if owned:
        by_bus.owners = Owners(Oneself(), len(by_bus.weights[0]))
    roads = [
        (model, tables, heron.build_optimizer(model, 1e-2, tables=tables))
        for model, tables in zip(models, (plain, by_bus), strict=True)
    ]
    V = models[0].config.vocab_size
    for step in range(14):
        torch.manual_seed(step)
        n = (3, 6, 5, 18)[step % 4]  # more in the fourth step than there is room for
        tokens = torch.randint(0, V // 2, (2, n))
        losses = []
        for model, tables, optimizer in roads:
            tables.bring(tokens, recorded=recorded and tables is by_bus)
            loss = model.loss(tokens, tokens.flip(0))
            loss.backward()
            tables.collect()
            optimizer.found_inf = torch.tensor(float(step == 5))
            if step != 8:  # brought in vain
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step == 10:  # a run that goes back
                with torch.no_grad():
                    for weight in tables.weights:
                        weight.mul_(1.5)
                for weight in tables.weights:
                    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].clone() / 2
        assert losses[0] == losses[1], step
        for a, b in zip(plain.weights, by_bus.weights, strict=True):
            assert torch.equal(a, b), step
            for name in heron.optim.RowAdamW.STATE:
                assert torch.equal(roads[0][2].state[a][name], roads[1][2].state[b][name]), (step, name)


def test_rows_of_a_recorded_pass_stay_where_they_are_until_they_lack_room(random_model, monkeypatch):
    monkeypatch.setattr(rows, "copy_rows", copy_in_pytorch)
    tables = RowTables(random_model(vocab_size=200), torch.device("cpu"))
    tables._by_kernel = True
    assert tables.recordable
    moved, places, position = [], [], []
    tables.before_moving = lambda: moved.append(len(places))
    for ids in ([3, 5, 5], [7, 1], list(range(90)), [2]):
        tables.bring(torch.tensor([ids]), recorded=True)
        n = len(set(ids))
        for part, weight in zip(tables.rows, tables.weights, strict=True):
            assert torch.equal(part[:n], weight[sorted(set(ids))])
            assert part.grad is None
            part.grad = torch.ones_like(part)
        assert [len(gradient) for gradient in tables.gradients()] == [n] * len(tables.weights)
        assert (tables._position >= 0).nonzero().flatten().tolist() == sorted(set(ids))
        places.append(tables.rows)
        position.append(tables._position.data_ptr())
        tables.release()
    assert moved == [0, 2]  # before the first and before the third
    for one, other, same in ((0, 1, True), (1, 2, False), (2, 3, True)):
        assert all((a is b) == same for a, b in zip(places[one], places[other], strict=True))
    assert len(set(position)) == 1


class Replayed:
    """As PassGraph, but it makes the pass anew, of tensors that must be where they were."""

    def __init__(self, run, leaves, sample):
        assert all(leaf.grad is None for leaf in leaves)
        self.run, self.leaves, self.inputs = run, leaves, [part.clone() for part in sample]

    def replay(self, sample):
        for mine, new in zip(self.inputs, sample, strict=True):
            mine.copy_(new)
        for leaf in self.leaves:
            leaf.grad = None
        return self.run(*self.inputs)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(("checkpointed", "owned"), [(False, False), (True, False), (False, True)])
def test_recorded_steps_are_the_others_while_rows_move_to_more_room(
    random_model, bus, monkeypatch, checkpointed, owned, on_host
):
    monkeypatch.setattr(rows, "LARGEST_WIDTH", 0)  # no kernel multiplies with them
    monkeypatch.setattr(dist, "compile_blocks", lambda network: None)
    monkeypatch.setattr(compilation, "PassGraph", Replayed)

    def tables_of_a_gpu(model, device, *_, **__):
        tables = RowTables(model, device)
        tables._by_kernel = True
        if owned:
            tables.owners = Owners(Oneself(), len(tables.weights[0]))
        return bus(tables) if on_host else tables

    monkeypatch.setattr("heron.train.step.row_tables", tables_of_a_gpu)
    results = []
    for compiled in ("on", "graph"):
        monkeypatch.setattr(compilation, "choose", lambda *_, value=compiled: machine.Choice(value, ""))
        config = heron.TrainConfig(max_steps=1, dtype="fp32", grad_checkpoint=checkpointed)
        learner = Learner(random_model(vocab_size=300), config, torch.device("cpu"))
        numbers, room = [], []
        for step in range(9):
            ids = torch.randint(0, 10 if step < 6 else 300, (4, 33), generator=torch.Generator().manual_seed(step))
            loss = learner.gradients([(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())])
            for graph in learner._passes.graphs.values():
                assert all(any(part is leaf for leaf in graph.leaves) for part in learner.tables.rows)
            room.append(len(learner.tables.rows[0]))
            numbers.append(learner.update(loss, 1e-3, -1.0 if step == 5 else math.inf))
        assert len(learner._passes.graphs) == (compiled == "graph")
        results.append((torch.stack(numbers), dict(learner.model.state_dict())))
    assert room[0] == room[5] < 100 < room[6]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][name], value) for name, value in results[0][1].items())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "settings", [dict(), dict(tables_state="bf16"), dict(accumulate=2), dict(compile="graph")], ids=str
)
def test_the_host_and_the_device_train_the_same_tables(settings):
    """20 steps with nothing but the steps themselves to wait for, once more read in between."""
    ended = []
    on_device = ("device",) if "tables_state" not in settings else ()  # bf16 moments are for the host's memory
    for storage in (*on_device, "host", "host, read", "host, no prefetch"):
        with pytest.MonkeyPatch.context() as patch:
            if storage == "host, no prefetch":
                patch.setattr(table_bus, "_PREFETCHED_BYTES", 0)
            torch.manual_seed(0)
            model = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=3, n_embd=128, vocab_size=4096))
            values = dict(max_steps=1, tables=storage.split(",")[0], compile="off", dtype="bf16") | settings
            config = heron.TrainConfig(**values)
            learner = Learner(model, config, torch.device("cuda"))
            batches = [torch.randint(0, 3000, (4, 65)) ** 2 // 3000 for _ in range(20 * config.accumulate)]
            for step in range(20):
                parts = batches[step * config.accumulate : (step + 1) * config.accumulate]
                loss = learner.gradients([(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts])
                learner.update(loss, 1e-3, -1.0 if step == 11 else math.inf)
                if storage == "host, read" and step % 3 == 0:
                    model.state_dict()
                    learner.model(batches[0][:, :8].cuda())
            assert bool(learner._passes.graphs) == (config.compile == "graph")
            numbers = {name: value.cpu().clone() for name, value in model.state_dict().items() if ".ffn.enn" in name}
            for i, weight in enumerate(learner.tables.weights):
                numbers |= {
                    f"{i} {name}": value.cpu().clone() for name, value in learner.optimizer.state[weight].items()
                }
            ended.append(numbers)
    assert ended[0].keys() == ended[1].keys()
    for other in ended[1:]:
        for name, value in ended[0].items():
            assert torch.equal(value, other[name]), name
