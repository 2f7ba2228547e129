"""Packs of conversations: every one once an epoch, in a seeded order that depends on the sample's number alone."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

import heron
from heron.data.conversations import Sample, Samples
from heron.data.loader import Batches
from heron.data.packs import Packs
from heron.data.recalled import Recalled, Rules, answers

LENGTHS = [9, 3, 12, 2, 5, 13, 7, 2, 4, 6, 11]  # ids; the largest fills a sample of 12
CTX_LEN = 12


def made(lengths=LENGTHS, seed=0, vocab_size=37):
    draw = np.random.default_rng(seed)
    found = []
    for number, n in enumerate(lengths):
        learned = draw.random(n) < 0.5
        learned[-1] = True
        found.append(Sample(draw.integers(1, vocab_size, n), learned, f"chat.jsonl, line {number + 1}"))
    return Samples(found)


def conversations_of(batch):
    """What each sequence of a packed batch holds: its tokens and targets up to the last that is learned."""
    tokens, targets, _, offsets = batch
    found = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        x, y = tokens[0, begin:end], targets[0, begin:end]
        if len(x):
            n = int((y != -100).nonzero().max()) + 1
            found.append((tuple(x[:n].tolist()), tuple(y[:n].tolist())))
    return found


def wanted(samples):
    found = []
    for number in range(len(samples)):
        ids, learned, _ = samples[number]
        y = np.where(learned[1:], ids[1:], -100)
        found.append((tuple(ids[:-1].tolist()), tuple(y.tolist())))
    return sorted(found)


def test_an_epoch_holds_every_conversation_once_and_targets_only_what_is_learned():
    samples = made()
    packs = Packs(samples, CTX_LEN, seed=3)
    n = packs.samples_per_epoch
    assert n < len(samples)
    epochs = [packs.batch(first, n) for first in (0, n)]
    for tokens, targets, recalled, _ in epochs:
        assert tokens.shape == targets.shape == (1, n * CTX_LEN)
        assert recalled is None
    assert [sorted(conversations_of(epoch)) for epoch in epochs] == [wanted(samples)] * 2
    assert not torch.equal(epochs[0][0], epochs[1][0])
    once = [pair for batch in packs.each_once(2) for pair in conversations_of(batch)]
    assert sorted(once) == wanted(samples)


def test_a_sample_depends_on_its_number_alone():
    packs, again = (Packs(made(), CTX_LEN, seed=3) for _ in range(2))
    whole = packs.batch(0, 24)[0].view(24, CTX_LEN)
    for first, count in ((0, 2), (3, 5), (19, 1)):
        assert torch.equal(again.batch(first, count)[0].view(count, CTX_LEN), whole[first : first + count])
    assert not torch.equal(Packs(made(), CTX_LEN, seed=4).batch(0, 24)[0].view(24, CTX_LEN), whole)


def test_shapes_depend_on_the_count_alone():
    packs = Packs(made(), CTX_LEN, seed=3)
    shapes = {tuple(None if part is None else part.shape for part in packs.batch(first, 3)) for first in range(9)}
    assert len(shapes) == 1


def test_not_packed_each_conversation_has_a_row():
    samples = made()
    tokens, targets, recalled, offsets = Packs(samples, CTX_LEN, seed=3, packed=False).batch(0, len(samples))
    assert (recalled, offsets) == (None, None)
    assert tokens.shape == (len(samples), CTX_LEN)
    found = [(tuple(x[: y.nonzero().max() + 1].tolist()), y) for x, y in zip(tokens, targets + 100, strict=True)]
    assert sorted(x for x, _ in found) == sorted(x for x, _ in wanted(samples))


def test_samples_are_full():
    lengths = np.random.default_rng(0).integers(2, 66, 2000)
    packs = Packs(made(lengths.tolist()), 128, seed=0)
    assert (lengths - 1).sum() / (packs.samples_per_epoch * 128) > 0.97


@pytest.mark.parametrize("share", [Fraction(1, 10), Fraction("0.3"), Fraction(3, 4)])
def test_the_second_corpus_has_its_share_in_its_own_order(share):
    other = Batches(np.arange(1000, 1400), CTX_LEN, 5, "text")
    packs = Packs(made(), CTX_LEN, seed=3, mix=other, share=share)
    tokens, targets, *_ = packs.batch(0, 120)
    rows, learned = tokens.view(120, CTX_LEN), targets.view(120, CTX_LEN)
    theirs = [i for i in range(120) if rows[i, 0] >= 1000]
    assert len(theirs) == 120 * share
    x, y = other.batch(0, len(theirs))
    assert torch.equal(rows[theirs], x)
    assert torch.equal(learned[theirs], y)
    alone = Packs(made(), CTX_LEN, seed=3).batch(0, 120 - len(theirs))[0].view(-1, CTX_LEN)
    assert torch.equal(rows[[i for i in range(120) if i not in theirs]], alone)
    assert packs.samples_per_epoch == -(-Packs(made(), CTX_LEN, seed=3).samples_per_epoch // (1 - share))


# -- packed is alone ------------------------------------------------------------------------------------------------

VARIANTS = {
    "v7": dict(variant="v7"),
    "v8": dict(variant="v8"),
    "v7b": dict(variant="v7b"),
    "rosa-lm": dict(variant="rosa-lm"),
    "memory": dict(variant="v7", memory="memory"),
}


def recalled_of(model, samples):
    rosa = model.config.memory
    if rosa is None:
        return None
    rules = Rules(rosa.max_match, rosa.n_matches, rosa.window, rosa.end)
    return Recalled(np.concatenate([answers(samples[i].ids, rules).records for i in range(len(samples))]))


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: leaf.grad.clone() for name, leaf in model.named_parameters() if leaf.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_conversations_are_as_each_alone(random_model, variant):
    model, samples = random_model(n_layer=2, **VARIANTS[variant]), made(vocab_size=7)
    packs = Packs(samples, CTX_LEN, seed=3, recalled=recalled_of(model, samples))
    n = packs.samples_per_epoch
    tokens, targets, recalled, offsets = packs.batch(0, n)
    packed = model.loss(tokens, targets, offsets, recalled)
    got = gradients(model, [packed])

    total, losses = int(samples.learned.sum() - samples.learned[samples.offsets[:-1]].sum()), []
    for number in range(len(samples)):
        ids, learned, _ = samples[number]
        y = torch.from_numpy(np.where(learned[1:], ids[1:], -100)).unsqueeze(0)
        losses.append(model.loss(torch.from_numpy(ids[:-1]).unsqueeze(0), y) * (int((y != -100).sum()) / total))
    assert float(packed) == pytest.approx(float(sum(losses)), abs=1e-6)
    want = gradients(model, losses)
    assert got.keys() == want.keys()
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-6, atol=1e-6 * max(1.0, largest), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_with_masked_tokens_is_that_of_the_learned_ones(random_model, variant):
    model, samples = random_model(n_layer=2, **VARIANTS[variant]).double(), made(vocab_size=7)
    tokens, targets, recalled, offsets = Packs(samples, CTX_LEN, 3, recalled=recalled_of(model, samples)).batch(0, 2)
    got = gradients(model, [model.loss(tokens, targets, offsets, recalled)])
    logits = _logits(model, tokens, offsets, recalled)[0]
    learned = targets[0] != -100
    picked = logits[learned].log_softmax(-1).gather(1, targets[0][learned].unsqueeze(1))
    pull = 1e-4 / 2 * (logits[learned].max(dim=-1).values ** 2).sum()  # L2Wrap, of which the loss has no share
    want = gradients(model, [(-picked.sum() + pull) / learned.sum()])
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def _logits(model: heron.RWKV, tokens, offsets, recalled):
    return model(tokens, None, offsets, recalled)[0]
