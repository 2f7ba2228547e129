"""Samples that are read chunk by chunk: exact gradients are those of the whole text, and memory stays as it is."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import heron
from heron import ModelConfig, TrainConfig
from heron.commands import estimate
from heron.config import AdapterConfig
from heron.config.tbptt import EXACT_CHUNK, Tbptt
from heron.errors import ConfigError
from heron.model.tuned_state import TunedState
from heron.train import chunks, memory
from heron.train.chunks import Chunks
from heron.train.passes import Means
from heron.train.step import Learner

CPU = torch.device("cpu")
T = 53
PACKED = torch.tensor([0, 5, 30, 31, T, T, T])


def learn(model, sample, length, exact, parts, start=None):
    """The loss of a sample that is read in chunks, whose gradients are in `model` then."""
    means = Means(model, start or (lambda tokens, cu_seqlens: None), nullcontext, CPU, lambda: None)
    return Chunks(means, Tbptt(length, exact)).learn(sample, parts)


def batch(model, packed, seed=0):
    """Tokens and targets, of which a third is not learned, and all of a stretch that is longer than a chunk."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1 if packed else 2, T)
    tokens, targets = (torch.randint(model.config.vocab_size, shape, generator=generator) for _ in range(2))
    targets[torch.rand(shape, generator=generator) < 0.3] = -100
    targets[:, 7:21] = -100
    recalled = model.recall(tokens, None, PACKED if packed else None)[0]
    return tokens, targets, recalled, PACKED if packed else None


def gradients_of(model, loss):
    if loss.requires_grad:
        loss.backward()
    return {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}


MODELS = [
    dict(variant="v7"),
    {},
    dict(variant="v7a"),
    dict(variant="v8-hybrid"),
    dict(variant="v7b"),
    dict(memory="memory"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance"),
    [
        *((changes, torch.float64, 1e-12) for changes in MODELS),
        *((changes, torch.float32, 1e-6) for changes in ({}, dict(variant="v7b"))),
    ],
    ids=str,
)
def test_exact_gradients_are_those_of_the_whole_text(random_model, changes, packed, dtype, tolerance):
    whole = random_model(n_layer=2, **changes).to(dtype)
    by_chunks = copy.deepcopy(whole)
    tokens, targets, recalled, cu_seqlens = batch(whole, packed)
    expected = whole.loss(tokens, targets, cu_seqlens, recalled) / 3
    wanted = gradients_of(whole, expected)
    for length in (7, 16):
        by_chunks.zero_grad()
        found = learn(by_chunks, (tokens, targets, recalled, cu_seqlens), length, True, 3)
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-6)
        got = gradients_of(by_chunks, found)
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (got[name] - gradient).abs().max() <= tolerance * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("changes", [{}, dict(variant="v7b")], ids=str)
def test_exact_gradients_reach_the_state_that_texts_begin_from(random_model, changes, packed):
    model = random_model(n_layer=2, **changes).double()
    tuned = TunedState(model.config, token_shifts=True)
    with torch.no_grad():
        for part in tuned.parameters():
            part.normal_(std=0.3)

    def start(tokens, cu_seqlens):
        return tuned(tokens, cu_seqlens, torch.float64)

    tokens, targets, _, cu_seqlens = batch(model, packed)
    wanted = gradients_of(tuned, model.loss(tokens, targets, cu_seqlens, state=start(tokens, cu_seqlens)))
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    tuned.zero_grad()
    got = gradients_of(tuned, learn(model, (tokens, targets, None, cu_seqlens), 9, True, 1, start))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-9)  # the leaves are fp32


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("changes", [{}, dict(variant="v8-hybrid"), dict(rosa="qkv-1bit")], ids=str)
def test_truncated_gradients_stop_at_a_chunk_and_its_state_does_not(random_model, changes, packed):
    model = random_model(n_layer=2, **changes).double()
    by_hand = copy.deepcopy(model)
    tokens, targets, recalled, cu_seqlens = batch(model, packed)
    n_learned = int((targets != -100).sum())
    found = learn(model, (tokens, targets, recalled, cu_seqlens), 16, False, 1)
    with torch.no_grad():
        assert float(found) == pytest.approx(float(by_hand.loss(tokens, targets, cu_seqlens)), rel=1e-6)
    offsets = [0, T] if cu_seqlens is None else sorted(set(cu_seqlens.tolist()))
    for begin, end in zip(offsets, offsets[1:], strict=False):  # each text alone, cut where the sample is
        state, at = None, begin
        while at < end:
            stop = min(end, (at // 16 + 1) * 16)
            hidden, state = by_hand.hidden_states(tokens[:, at:stop], state)
            n = int((targets[:, at:stop] != -100).sum())
            (by_hand.head_loss(hidden, targets[:, at:stop]) * (n / n_learned)).backward()
            state, at = state.detach(), stop
    wanted = {name: leaf.grad for name, leaf in by_hand.named_parameters()}
    for name, leaf in model.named_parameters():
        torch.testing.assert_close(leaf.grad, wanted[name], rtol=1e-9, atol=1e-12)


class Held(TorchDispatchMode):
    """The most bytes that graphs and states hold, by the storages that operators give and that are alive."""

    def __init__(self):
        super().__init__()
        self.ledger = estimate._Ledger()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.ledger._enter(tensor.untyped_storage())
        return out


@pytest.mark.parametrize("tbptt", ["exact:128", "128"])
def test_memory_does_not_grow_with_the_text(random_model, tbptt):
    model = random_model(variant="v7", n_layer=1)
    of = Tbptt.of(tbptt)
    peaks = []
    for n in (512, 3072):
        tokens = torch.zeros(1, n, dtype=torch.int64)
        with Held() as held:
            learn(model, (tokens, tokens), of.chunk, of.exact, 1)
        states = 4 * 32 * (16 + 2) * (n // of.chunk - 1) if of.exact else 0  # H * N * N values and two shifts of C
        peaks.append(max(held.ledger.peaks.values()) - states)
        model.zero_grad()
    assert peaks[1] - peaks[0] < 40 * 2560  # ids, and a flag for each; a graph has ten times as much


# -- in a step ------------------------------------------------------------------------------------------------------


def config_of(**changes):
    values = dict(max_steps=1, micro_bsz=2, ctx_len=T, dtype="fp32", device="cpu", grad_clip=0.0)
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tables="host"),
        dict(grad_checkpoint=True),
        dict(accumulate=2),
        dict(dtype="bf16", weights="bf16"),
    ],
    ids=str,
)
def test_a_step_in_chunks_is_the_step(random_model, changes):
    model = random_model(n_layer=2, vocab_size=256)
    samples = [batch(model, False, seed)[:2] for seed in range(changes.get("accumulate", 1))]
    found = []
    for tbptt in ("", "exact:16"):
        learner = Learner(copy.deepcopy(model), config_of(tbptt=tbptt, **changes), CPU)
        loss = learner.gradients(samples)
        trained = learner.trained.named_parameters()
        gradients = {name: leaf.grad for name, leaf in trained if leaf.grad is not None}
        if not gradients:  # those of one pass are the network's
            gradients = {name: leaf.grad for name, leaf in learner.network.named_parameters() if leaf.grad is not None}
        rows = [] if learner.tables is None else [rows.clone() for rows in learner.tables.gradients()]
        found.append((float(loss), gradients, rows))
        assert float(learner.update(loss, 1e-3, math.inf)[2]) == 0.0
    (loss, wanted, of_rows), (got_loss, got, got_rows) = found
    tolerance = 3e-2 if "weights" in changes else 1e-5
    assert got_loss == pytest.approx(loss, rel=tolerance)
    for name in wanted:
        a, b = wanted[name].float(), got[name].float()
        assert (a - b).norm() <= tolerance * max(1e-3, float(a.norm())), name
    for a, b in zip(of_rows, got_rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_an_adapter_drops_the_same_activations_again(random_model):
    pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    finetune = heron.FinetuneConfig(method="lora", adapter=AdapterConfig(rank=4, dropout=0.5))
    learner = Learner(random_model(n_layer=2).double(), config_of(tbptt="exact:7", finetune=finetune), CPU)
    leaves = {name: leaf for name, leaf in learner.trained.named_parameters() if leaf.requires_grad}
    generator = torch.Generator().manual_seed(0)
    directions = {}
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.normal_(std=0.1, generator=generator)
            directions[name] = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)

    def loss_at(step):
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf += step * directions[name]
        torch.manual_seed(5)
        loss = learner.gradients([batch(learner.model, False)[:2]])
        after = torch.rand(1)
        slope = sum(float((leaf.grad * directions[name]).sum()) for name, leaf in leaves.items())
        learner.optimizer.zero_grad()
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf -= step * directions[name]
        return float(loss), slope, float(after)

    h = 1e-3
    _, slope, after = loss_at(0.0)
    (up, _, again), (down, *_) = loss_at(h), loss_at(-h)
    assert after == again
    assert slope == pytest.approx((up - down) / (2 * h), rel=2e-2)


def test_a_run_in_chunks_learns_and_goes_on_bit_for_bit(tmp_path, random_model):
    heron.save(random_model(n_layer=2, vocab_size=256), tmp_path / "base.pth")
    rows = [{"prompt": f"What is {n}?", "completion": f" It is {n + 1}, of course it is."} for n in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ends = []
    for name, steps in (("whole", (6,)), ("halves", (3, 6))):
        for max_steps in steps:
            config = TrainConfig(
                model=str(tmp_path / "base.pth"), data=str(tmp_path / "chat.jsonl"), out=str(tmp_path / name),
                ctx_len=96, micro_bsz=2, max_steps=max_steps, lr_init=1e-2, lr_final=1e-2, threads=1, device="cpu",
                dtype="fp32", sample_every=0, tbptt="exact:32", finetune=heron.FinetuneConfig(),
            )  # fmt: skip
            assert heron.Trainer(config, say=lambda line: None).fit() == "finished"
        ends.append(heron.load(tmp_path / name).state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    losses = [record["loss"] for record in heron.report.read_log(tmp_path / "whole")[0]]
    assert losses[-1] < losses[0]


def test_an_estimate_knows_of_chunks():
    model = ModelConfig(variant="v7", n_layer=1, n_embd=32, vocab_size=256, head_size=16)
    whole, *in_chunks = (
        estimate.estimate(config_of(micro_bsz=1, ctx_len=320, tbptt=tbptt), model) for tbptt in ("", "64", "exact:64")
    )
    assert all(found.activations < whole.activations / 4 for found in in_chunks)
    assert all(found.peak < whole.peak / 2 for found in in_chunks)


# -- what can not be ------------------------------------------------------------------------------------------------


def test_settings_say_a_chunk_or_exact():
    assert Tbptt.of("") is None
    assert Tbptt.of("512") == (512, False)
    assert Tbptt.of("exact") == (EXACT_CHUNK, True)
    assert Tbptt.of("exact:512") == (512, True)
    assert config_of(tbptt=512).tbptt == "512"
    for text in ("0", "-1", "exakt", "exact:", "exact:0", "1.5", "512:exact"):
        with pytest.raises(ConfigError, match=f"tbptt: wanted tokens of a chunk.*got '{text}'"):
            config_of(tbptt=text)


def test_exact_gradients_through_rosa_are_refused(random_model):
    with pytest.raises(ConfigError, match="tbptt exact: of ROSA.*use --tbptt 16"):
        chunks.check(Tbptt(16, True), random_model(rosa="qkv-1bit").config)
    chunks.check(Tbptt(16, False), random_model(rosa="qkv-1bit").config)


def test_where_memory_runs_out_chunks_and_smaller_bases_are_named():
    model = ModelConfig(variant="v7", n_layer=2, n_embd=32, vocab_size=256, head_size=16)
    finetune = heron.FinetuneConfig(method="lora")
    config = config_of(device="cuda", dtype="bf16", ctx_len=4096, finetune=finetune)
    advice = memory.remedy(config, model)
    assert all(flags in advice for flags in ("--grad_checkpoint", "--tbptt exact", "--base int8"))
    ((_, changed),) = [found for found in memory.knobs(config, model) if found[0] == "--base int8"]
    assert changed.finetune.base == "int8"
    assert "--base nf4" in memory.remedy(changed, model)
    assert "--base" not in memory.remedy(config_of(ctx_len=4096, finetune=finetune), model)
    assert "--tbptt" not in memory.remedy(config_of(ctx_len=1024), model)
