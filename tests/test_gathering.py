"""heron.gathering: which memory a block's weights are gathered in, when, and who does it. Its GPUs are made up here."""

from __future__ import annotations

import datetime
import types

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.testing._internal.distributed.fake_pg import FakeStore

import heron
from heron import dist, gathering

MODEL = heron.ModelConfig(variant="v8", n_layer=4, n_embd=64, vocab_size=11)
CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3])
def ranks(request):
    """The first of so many processes; the others are made up."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield dist.Ranks(0, request.param, 0, request.param)
    distributed.destroy_process_group()


def sharded(ranks):
    network = heron.RWKV(MODEL)
    dist.prepare(network, ranks, "fsdp", CPU, grad_checkpoint=False, compiled=False)
    return network


def learn(network):
    ids = torch.arange(2 * 6).view(2, 6) % MODEL.vocab_size
    network.loss(ids, ids).backward()


class Noted(DefaultAllGather):
    """Says what it is asked for, and gathers in memory of the moment."""

    def __init__(self, group, n):
        self.n, self.notes = n, []

    def begin(self, *_):
        self.notes.append("begin")

    def has_weights(self, block, _):
        self.notes.append(("read", block))

    def allocate(self, size, **of):
        self.notes.append(("gathered", *size))
        return super().allocate(size, **of)


def test_a_block_takes_as_many_numbers_as_are_counted(ranks):
    network, noted = sharded(ranks), Noted(None, 0)
    for block in network.blocks[1:3]:
        block.set_custom_all_gather(noted)
    learn(network)
    counted = [
        gathering.numel(filter(dist.is_sharded, block.parameters()), ranks.count) for block in network.blocks[1:3]
    ]
    assert [n for _, n in noted.notes] == [*counted, *reversed(counted)]


def test_a_block_is_gathered_when_the_one_before_it_has_its_weights(ranks, monkeypatch):
    made = []
    monkeypatch.setattr(gathering, "CopiedGather", lambda *given: made.append(Noted(*given)) or made[-1])
    monkeypatch.setattr(gathering, "is_there", lambda n_gpus: n_gpus == ranks.count)
    monkeypatch.setattr(dist.Ranks, "all", lambda _, holds: holds)
    network = sharded(ranks)
    dist._gather_by_copies(network, ranks, distributed.group.WORLD)
    learn(network)
    (noted,) = made
    kinds = [note if isinstance(note, str) else note[0] for note in noted.notes]
    assert kinds == ["begin", *["gathered", "read"] * 3, *["gathered"] * 3]
    assert [block for kind, block, *_ in noted.notes[1:] if kind == "read"] == [*network.blocks[:3]]
    assert max(n for kind, n, *_ in noted.notes[1:] if kind == "gathered") <= noted.n


def test_nothing_changes_where_some_process_cannot_gather_so(ranks, monkeypatch):
    monkeypatch.setattr(gathering, "is_there", lambda _: True)
    monkeypatch.setattr(dist.Ranks, "all", lambda *_: False)
    network = sharded(ranks)
    before = [len(block._forward_pre_hooks) for block in network.blocks]
    dist._gather_by_copies(network, ranks, distributed.group.WORLD)
    assert [len(block._forward_pre_hooks) for block in network.blocks] == before


def test_a_gather_waits_for_the_last_block_of_this_pass_to_have_its_weights(monkeypatch):
    waits, events = [], iter(range(9))
    stream = types.SimpleNamespace(record_event=lambda: next(events), wait_event=waits.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(gathering.CopiedGather, "_told", lambda self, dtype, device: torch.zeros(self._n, dtype=dtype))
    gather = gathering.CopiedGather(distributed.GroupMember.NON_GROUP_MEMBER, 10)
    first = gather.allocate((10,), dtype=torch.bfloat16, device=CPU)
    assert waits == []
    gather.has_weights(), gather.has_weights()
    second = gather.allocate((7,), dtype=torch.bfloat16, device=CPU)
    assert waits == [1]
    assert (len(first), len(second)) == (10, 7)
    assert first.data_ptr() == second.data_ptr()
    gather.begin()
    gather.allocate((7,), dtype=torch.bfloat16, device=CPU)
    assert waits == [1]


@pytest.mark.parametrize(
    ("version", "reached", "there"), [((2, 28, 9), {0, 2}, True), ((2, 27, 7), {0, 2}, False), ((2, 28, 9), {0}, False)]
)
def test_it_takes_a_new_nccl_and_gpus_that_reach_each_other(monkeypatch, version, reached, there):
    monkeypatch.setattr(gathering.nccl, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: mine == 1 and other in reached)
    assert gathering.is_there(3) == there


@pytest.mark.parametrize("config", [types.SimpleNamespace(cta_policy=0), types.SimpleNamespace()])
def test_a_group_asks_for_no_multiprocessors_where_pytorch_can_say_so(monkeypatch, config):
    given = types.SimpleNamespace(config=config)
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", types.SimpleNamespace(Options=lambda: given), raising=False)
    timeout = datetime.timedelta(seconds=7)
    assert dist.nccl_options(timeout) is given
    assert given._timeout == timeout
    assert list(vars(config).values()) in ([], [2])
