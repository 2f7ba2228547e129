"""Which gradients travel together, and that each is what all processes have, wherever it then lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heron import reduction
from heron.reduction import Reduction

SIZES = (40, 3, 4, 5, 60, 2)  # values of fp32; a bucket is full at 32 bytes


@pytest.fixture
def sent(monkeypatch):
    """What is sent, in order, in the place of sums over two processes that have the same."""
    sent = []

    class Work:
        def wait(self):
            pass

    def all_reduce(flat, async_op):
        assert async_op
        sent.append(flat)
        flat.mul_(2)
        return Work()

    monkeypatch.setattr(reduction, "_BUCKET", 32)
    monkeypatch.setattr(reduction.distributed, "all_reduce", all_reduce)
    return sent


def leaves_of(sizes):
    return [nn.Parameter(torch.arange(size, dtype=torch.float32)) for size in sizes]


def loss_of(leaves):
    return sum(((n + 1) * leaf).sum() for n, leaf in enumerate(leaves))


def test_large_gradients_travel_alone_and_uncopied_the_others_together_the_first_leaf_last(sent):
    leaves = leaves_of(SIZES)
    reduction_ = Reduction(leaves, overlapped=False)
    loss_of(leaves).backward()
    before = [leaf.grad.data_ptr() for leaf in leaves]
    reduction_.finish()
    assert [flat.numel() for flat in sent] == [2 + 5 + 4, 60, 3, 40]
    assert [flat.data_ptr() for flat in sent][1::2] == [before[4], before[0]]
    for n, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0 * (n + 1)))


def test_a_bucket_leaves_during_the_pass_once_all_of_it_is_there(sent):
    leaves = leaves_of(SIZES)
    reduction_ = Reduction(leaves, overlapped=True)
    for times in (1, 2):
        loss_of(leaves).backward()
        assert len(sent) == 4 * times
        reduction_.finish()
        assert len(sent) == 4 * times
        for n, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0 * (n + 1)))
            leaf.grad = None


def test_what_is_held_leaves_at_the_end_and_what_has_no_gradient_not_at_all(sent):
    leaves = leaves_of(SIZES)
    reduction_ = Reduction(leaves, overlapped=True)
    reduction_.held = True
    leaves[0].sum().backward()
    assert sent == []
    reduction_.held = False
    reduction_.finish()
    assert [flat.numel() for flat in sent] == [40]
    assert all(leaf.grad is None for leaf in leaves[1:])


def test_gradients_that_lie_otherwise_are_sums_too(sent):
    leaf = nn.Parameter(torch.zeros(4, 8))
    reduction_ = Reduction([leaf], overlapped=False)
    leaf.grad = torch.arange(32.0).view(8, 4).t()
    wanted = 2 * leaf.grad
    reduction_.finish()
    assert torch.equal(leaf.grad, wanted)
