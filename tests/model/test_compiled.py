"""Compiled steps against the same steps as they are written. On a CPU the kernels of WKV7 are emulated, and the graphs,
forward and backward, are run as PyTorch captured them; on a GPU it is the whole compiler."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo

import heron
from heron import context
from heron.errors import ConfigError, HeronError
from heron.model import compiled as compilation
from heron.ops import _build, _choice
from heron.ops.wkv7 import cuda
from heron.train.step import Learner
from tests.ops import emulator
from tests.ops.spans_on_threads import on_threads

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
T = 12  # more than the kernel for single steps takes


@pytest.fixture
def compiles(monkeypatch):
    """The CPU has the kernels of WKV7 and compiles as a GPU does, up to the code that comes out."""
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler on the path")
    emulator.load()
    monkeypatch.setitem(sys.modules["heron.ops.wkv7"]._FORMS, "cuda", cuda.wkv7_kernels)
    monkeypatch.setattr(cuda.FORM, "choice", lambda *_: _choice.Choice("cuda", "emulated"))
    monkeypatch.setattr(compilation, "why_not", lambda *_: None)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def learner_of(model, device=CPU, **changes):
    settings = dict(max_steps=1, dtype="fp32", compile="on")
    return Learner(copy.deepcopy(model), heron.TrainConfig(**{**settings, **changes}), device)


def batch(vocab_size=37, rows=2, tokens=T, seed=0, n_matches=0):
    """Tokens and targets, and where matches are wanted what might be recalled, nothing in a third of the places."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (rows, tokens + 1), generator=draw)
    both = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if not n_matches:
        return both
    lengths = torch.randint(-32, 65, (rows, tokens, n_matches), generator=draw).clamp(min=0)
    predicted = torch.randint(0, vocab_size, lengths.shape, generator=draw) * (lengths > 0)
    return *both, torch.stack((predicted, lengths), dim=-1)


def trained(learner, n_steps, accumulate=1, batch_of=lambda n: batch(seed=n)):
    """The losses and gradient norms of some steps, and the weights after them."""
    numbers = []
    for step in range(n_steps):
        samples = [batch_of(step * accumulate + i) for i in range(accumulate)]
        numbers.append(learner.update(learner.gradients(samples), 1e-3, math.inf)[:2])
    return torch.stack(numbers), dict(learner.model.state_dict())


def distance(got, want):
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (dict(variant="v8"), dict(grad_checkpoint=True, accumulate=2, tables="host")),
        (dict(variant="v7a"), dict(dtype="bf16", weights="bf16")),
        (dict(variant="v8", memory="memory"), {}),
    ],
    ids=str,
)
def test_compiled_steps_are_the_written_ones_in_two_graphs(compiles, random_model, model, changes):
    model, accumulate = random_model(n_layer=4, **model), changes.get("accumulate", 1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    numbers, weights = trained(learner_of(model, **changes), 3, accumulate)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    plain_numbers, plain_weights = trained(learner_of(model, **changes, compile="off"), 3, accumulate)
    assert graphs == (4 if model.memory else 2)  # layer 0, and all others; where memory enters, and where it leaves
    tolerance = 1e-6 if changes.get("dtype") is None else 2e-2
    assert distance(numbers, plain_numbers) < tolerance
    for name, weight in plain_weights.items():
        assert distance(weights[name], weight) < tolerance, name


@pytest.mark.parametrize("rows", [2, 1])
def test_compiled_blocks_read_a_span_as_the_written_ones(compiles, monkeypatch, random_model, rows):
    monkeypatch.setattr(cuda.FORM, "require", lambda *_: None)
    model = random_model(n_layer=3, variant="v8")
    tokens, targets = batch(rows=rows)
    offsets = torch.tensor([0, 5, 9, T]) if rows == 1 else None

    def gradients_in_a_span(_, name):
        part = context.part_of(name, tokens, targets, offsets)
        model.loss(part.tokens, part.targets, part.cu_seqlens, span=part.span).backward()
        gradients = {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}
        model.zero_grad()
        return gradients

    want = on_threads(1, gradients_in_a_span)[0]
    compilation.compile_blocks(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got = on_threads(1, gradients_in_a_span)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert distance(got[name], gradient) < 1e-6, name


def packed_batch(seed, T=48):
    """Conversations of changing number and length in one row, some of their tokens learned, as Packs gives them."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randperm(T - 1, generator=draw)[: 2 + seed % 3].sort().values + 1
    tokens, targets = torch.randint(0, 37, (2, 1, T), generator=draw)
    targets[torch.rand(1, T, generator=draw) < 0.6] = -100
    return tokens, targets, None, torch.tensor([0, *starts.tolist(), *[T] * (6 - len(starts))])


@pytest.mark.parametrize("variant", [pytest.param("v7", marks=needs_gpu), pytest.param("v8", marks=needs_gpu)])
def test_compiled_steps_over_packs_are_the_written_ones(random_model, variant):
    """On a CPU packs stand beside frozen weights, below, and the gradients of all weights over documents above."""
    model = random_model(n_layer=3, n_embd=64, head_size=64, variant=variant)
    changes = dict(accumulate=2, finetune=heron.FinetuneConfig())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    learner = learner_of(model, GPU, **changes)
    numbers, weights = trained(learner, 3, 2, packed_batch)
    assert learner.compiled.value == "on"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    plain_numbers, plain_weights = trained(learner_of(model, GPU, **changes, compile="off"), 3, 2, packed_batch)
    assert distance(numbers, plain_numbers) < 1e-5
    for name, weight in plain_weights.items():
        assert distance(weights[name], weight) < 1e-5, name


BESIDE = {
    **{kind: dict(method="lora", adapter=dict(kind=kind, rank=4)) for kind in ("lora", "pissa", "miss")},
    "state": dict(method="state", token_shifts=True),
}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *((name, CPU) for name in ("lora", "miss", "state")),
        *(pytest.param(name, GPU, marks=needs_gpu) for name in BESIDE),
    ],
)
def test_compiled_steps_beside_frozen_weights_are_the_written_ones(request, random_model, device, name):
    if device is CPU:
        request.getfixturevalue("compiles")
    if name != "state":
        pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    model = random_model(n_layer=3, n_embd=64, head_size=64)
    half = dict(dtype="bf16", weights="bf16") if device is CPU and name == "lora" else {}
    changes = dict(**half, accumulate=2, grad_checkpoint=name == "lora", finetune=heron.FinetuneConfig(**BESIDE[name]))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    results = []
    for how in ("on", "off"):
        torch.manual_seed(0)
        learner = learner_of(model, device, **changes, compile=how)
        numbers, _ = trained(learner, 3, 2, packed_batch)
        results.append((numbers, learner.trained.state_dict()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    (numbers, leaves), (plain_numbers, plain_leaves) = results
    assert distance(numbers, plain_numbers) < (2e-2 if half else 1e-5)
    for leaf, plain in plain_leaves.items():
        assert distance(leaves[leaf], plain) < (5e-2 if half else 1e-4), leaf


def test_dora_is_not_compiled_and_says_why(compiles, random_model):
    pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    dora = heron.FinetuneConfig(method="lora", adapter=dict(kind="dora", rank=4))
    learner = learner_of(random_model(), compile="auto", finetune=dora)
    assert learner.compiled.value == "off"
    assert "dora divides" in learner.compiled.reason
    with pytest.raises(ConfigError, match="compile on: .*dora divides.*--compile auto"):
        learner_of(random_model(), finetune=dora)


@pytest.mark.parametrize("changes", [dict(tbptt="4"), dict(finetune=heron.FinetuneConfig(objective="dpo"))], ids=str)
def test_chunks_and_pairs_are_never_replayed_and_packs_are(random_model, monkeypatch, changes):
    monkeypatch.setattr(compilation, "why_not", lambda *_: None)
    with pytest.raises(ConfigError, match="chunk by chunk, or in pairs"):
        learner_of(random_model(), compile="graph", **changes)
    assert learner_of(random_model(), compile="auto", finetune=heron.FinetuneConfig()).compiled.value == "graph"


def test_validation_runs_as_written_and_leaves_the_graphs_alone(compiles, random_model):
    model = random_model(n_layer=1)
    learner = learner_of(model)
    learner.gradients([batch()])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    want = model.loss(*batch(rows=1, tokens=20))
    with torch.no_grad():
        assert torch.equal(learner.model.loss(*batch(rows=1, tokens=20)), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_where_the_compiler_fails_auto_says_so_once_and_goes_on(compiles, random_model, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no assembler\nwhatever")

    monkeypatch.setattr(compilation, "BACKEND", fails)
    learner = learner_of(random_model(), compile="auto", accumulate=2)
    numbers, weights = trained(learner, 2, 2)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "no assembler" in told[0]
    assert learner.compiled.value == "off"
    plain_numbers, plain_weights = trained(learner_of(random_model(), compile="off"), 2, 2)
    assert torch.equal(numbers, plain_numbers)
    assert all(torch.equal(weights[name], weight) for name, weight in plain_weights.items())
    with pytest.raises(HeronError, match="compile on: .*no assembler.*--compile auto"):
        learner_of(random_model()).gradients([batch(37)])


@pytest.mark.parametrize(
    ("device", "how"), [(CPU, "on"), *(pytest.param(GPU, how, marks=needs_gpu) for how in ("on", "graph"))]
)
def test_hooks_of_users_fire_in_every_compiled_step(request, random_model, device, how):
    if device is CPU:
        request.getfixturevalue("compiles")
    model = random_model(variant="v7", n_layer=3, n_embd=64, head_size=64, ffn_dim=128)
    learner = learner_of(model, device, compile=how)
    plain, fired = learner_of(model, device, compile="off"), []
    for step in range(9):
        if step == 5:  # when all is compiled, and recorded
            for i, block in enumerate(learner.network.blocks):
                block.register_forward_hook(lambda *_, i=i: fired.append(i))
        if step == 7:
            learner.network.blocks[1].ffn.key.register_forward_hook(lambda *_: fired.append("key"))
        losses = [one.gradients([batch(seed=step)]) for one in (learner, plain)]
        for one, loss in zip((learner, plain), losses, strict=True):
            one.update(loss, 1e-3, math.inf)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for name, weight in plain.model.state_dict().items():
        assert distance(learner.model.state_dict()[name], weight) < 1e-4, name
    assert fired == [0, 1, 2] * 2 + [0, "key", 1, 2] * 2


def test_an_error_of_the_model_is_not_the_compilers(compiles, random_model):
    learner = learner_of(random_model(), compile="auto")
    with pytest.raises(heron.errors.DataError, match="ids must be 0 to 36"):
        learner.gradients([batch(400)])
    assert learner.compiled.value != "off"


def test_a_cpu_is_left_as_it_is(random_model):
    choice = compilation.choose("auto", CPU, random_model().config)
    assert choice.value == "off"
    assert "CPU" in choice.reason
    with pytest.raises(ConfigError, match="compile on: .*CPU.*--compile auto"):
        compilation.choose("on", CPU, random_model().config)


@pytest.mark.parametrize(
    ("variant", "kernels", "triton", "reason"),
    [
        ("v7", "cuda", True, None),
        ("v8", "cuda", True, None),
        ("v8-hybrid", "cuda", True, "context"),
        ("v8", "chunked", True, "WKV7"),
        ("v8", "cuda", False, "triton"),
    ],
)
def test_what_a_gpu_compiles(monkeypatch, capsys, variant, kernels, triton, reason):
    monkeypatch.setattr(cuda.FORM, "choice", lambda *_: _choice.Choice(kernels, ""))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    compilation._why_no_triton.cache_clear()
    for _ in range(2):
        choice = compilation.choose("auto", GPU, heron.ModelConfig(variant=variant))
    compilation._why_no_triton.cache_clear()
    assert choice.value == ("graph" if reason is None else "off")
    assert reason is None or reason in choice.reason
    assert capsys.readouterr().err.count("pip install triton") == (not triton)
    assert compilation.choose("off", GPU, heron.ModelConfig(variant=variant)).value == "off"


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (dict(variant="v7"), {}, None),
        (dict(variant="v8"), {}, None),
        (dict(variant="v7"), dict(adds_up=True), "added up"),
        (dict(variant="v7"), dict(cut_packs=True), "cut a pack"),
        (dict(variant="v8", deep_embed_4x=True), {}, "looked up"),
        (dict(variant="v7a"), {}, "looked up"),
        (dict(variant="v7a"), dict(tables_train=False), None),
    ],
    ids=str,
)
def test_what_is_recorded(monkeypatch, model, settings, reason):
    monkeypatch.setattr(compilation, "why_not", lambda *_: None)
    choose = partial(compilation.choose, device=GPU, model=heron.ModelConfig(**model), **settings)
    choice = choose("auto")
    assert choice.value == ("graph" if reason is None else "on")
    assert reason is None or reason in choice.reason
    if reason is not None:
        with pytest.raises(ConfigError, match=f"compile graph: .*{reason}.*--compile auto"):
            choose("graph")
    assert choose("on").value == "on"


def test_passes_may_be_recorded_if_asked_for_alone(monkeypatch):
    monkeypatch.setattr(compilation, "why_not", lambda *_: None)
    choose = partial(compilation.choose, device=GPU, model=heron.ModelConfig(variant="v7"), not_by_itself="no room")
    assert (choose("auto").value, choose("graph").value) == ("on", "graph")
    assert "--compile graph alone: no room" in choose("auto").reason


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        (dict(accumulate=2), "on"),
        (dict(accumulate=2, dtype="bf16", weights="bf16"), "graph"),
        (dict(accumulate=1), "graph"),
    ],
    ids=str,
)
def test_gradients_that_are_added_up_in_place_are_not_recorded(compiles, random_model, changes, chosen):
    learner = learner_of(random_model(variant="v7"), compile="auto", **changes)
    assert learner.compiled.value == chosen


# -- on a GPU --------------------------------------------------------------------------------------------------------


def model_of(variant, n_layer, n_embd, vocab_size=256, memory=None):
    torch.manual_seed(1)
    sizes = dict(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size)
    return heron.RWKV(heron.ModelConfig(variant=variant, memory=memory, **sizes))


def text_of_this_repository():
    files = sorted((Path(__file__).parents[2] / "heron").rglob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8).astype(np.int64)


def losses_on_text(learner, n_steps, rows=16, tokens=256):
    text, order, losses = text_of_this_repository(), np.random.default_rng(7), []
    for step in range(n_steps):
        starts = order.integers(0, len(text) - tokens - 1, rows)
        ids = torch.from_numpy(np.stack([text[start : start + tokens + 1] for start in starts]))
        loss = learner.gradients([(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())])
        losses.append(learner.update(loss, 6e-4 * min(1, (step + 1) / 10), math.inf)[0])
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("variant", [pytest.param("v7", marks=needs_gpu), pytest.param("v8", marks=needs_gpu)])
def test_300_steps_on_a_gpu_end_where_plain_fp32_ends(variant):
    model = model_of(variant, 4, 256)
    fast = learner_of(model, GPU, dtype="bf16", weights="auto")
    assert next(fast.network.blocks.parameters()).dtype == torch.bfloat16
    plain = learner_of(model, GPU, compile="off", weights="fp32")
    ends = [losses_on_text(learner, 300)[-50:].mean().item() for learner in (fast, plain)]
    assert abs(ends[0] - ends[1]) < 0.01, ends


@pytest.mark.parametrize("memory", [None, "memory"])
@pytest.mark.parametrize("variant", [pytest.param("v7", marks=needs_gpu), pytest.param("v8", marks=needs_gpu)])
def test_gradients_on_a_gpu_are_near_fp32_and_no_further_than_as_written(variant, memory):
    """On an average over batches: of one, rounding may hit the compiled form twice as hard, or the other."""
    model = model_of(variant, 3, 128, memory=memory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    runs = dict(exact=dict(compile="off"), written=dict(compile="off", dtype="bf16"), compiled=dict(dtype="bf16"))
    learners = {name: learner_of(model, GPU, weights="auto", **changes) for name, changes in runs.items()}
    errors = {"written": Counter(), "compiled": Counter()}
    n_batches = 4
    for seed in range(n_batches):
        gradients = {}
        for name, learner in learners.items():
            learner.optimizer.zero_grad()
            learner.gradients([batch(256, rows=4, tokens=96, seed=seed, n_matches=2 if memory else 0)])
            named = learner.network.named_parameters()
            gradients[name] = {leaf: p.grad.clone() for leaf, p in named if p.grad is not None}
        for name, of_leaf in errors.items():
            for leaf, want in gradients["exact"].items():
                of_leaf[leaf] += distance(gradients[name][leaf], want) / n_batches
    for leaf, error in errors["compiled"].items():
        assert error < max(2 * errors["written"][leaf], 0.03), leaf


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        pytest.param("v7", dict(accumulate=2), marks=needs_gpu),
        pytest.param("v7", dict(grad_checkpoint=True), marks=needs_gpu),
        pytest.param("v7", dict(weights="fp32", dtype="fp32"), marks=needs_gpu),
        pytest.param("v8", {}, marks=needs_gpu),
        pytest.param("v8", dict(grad_checkpoint=True), marks=needs_gpu),
        pytest.param("v8 memory", {}, marks=needs_gpu),
    ],
)
def test_a_replayed_pass_on_a_gpu_gives_the_same_bits(variant, changes):
    variant, _, memory = variant.partition(" ")

    def few_ids_then_many(n):  # rows of tables get more room
        return batch(8 if n < 6 else 256, rows=4, tokens=96, seed=n, n_matches=2 if memory else 0)

    model, changes = model_of(variant, 2, 128, memory=memory or None), dict(dtype="bf16") | changes
    results = []
    for compiled in ("on", "graph"):
        learner = learner_of(model, GPU, compile=compiled, **changes)
        results.append(trained(learner, 10, changes.get("accumulate", 1), few_ids_then_many))
        assert len(learner._passes.graphs) == (compiled == "graph")
    (numbers, weights), (replayed, replayed_weights) = results
    assert torch.equal(numbers, replayed)
    assert all(torch.equal(weights[name], weight) for name, weight in replayed_weights.items())


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in ("full", "lora", "state")])
def test_replayed_packs_on_a_gpu_give_the_same_bits(name):
    if name == "lora":
        pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    model = model_of("v7", 2, 128)
    changes = dict(dtype="bf16", weights="bf16", finetune=heron.FinetuneConfig(**BESIDE.get(name, {})))
    results = []
    for compiled in ("on", "graph"):
        torch.manual_seed(0)
        learner = learner_of(model, GPU, compile=compiled, **changes)
        numbers, _ = trained(learner, 10, 1, lambda n: packed_batch(n, 96))
        results.append((numbers, learner.trained.state_dict()))
        assert len(learner._passes.graphs) == (compiled == "graph")
    (numbers, leaves), (replayed, replayed_leaves) = results
    assert torch.equal(numbers, replayed)
    assert all(torch.equal(leaves[name], leaf) for name, leaf in replayed_leaves.items())


@pytest.mark.parametrize("variant", [pytest.param("v7", marks=needs_gpu), pytest.param("v8", marks=needs_gpu)])
def test_two_runs_on_a_gpu_are_bit_equal(variant):
    first, second = (
        losses_on_text(learner_of(model_of(variant, 2, 128), GPU, dtype="bf16", weights="auto"), 12) for _ in range(2)
    )
    assert torch.equal(first, second)
