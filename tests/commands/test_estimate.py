"""`heron estimate` against what PyTorch's allocator counts in a real step, and against the sizes of real tensors."""

from __future__ import annotations

import functools
import itertools
import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import heron
from heron import cli, machine
from heron.commands import estimate
from heron.errors import ConfigError
from heron.train import memory
from heron.train.step import Learner

MODEL = heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, head_size=32, vocab_size=600)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _counted_once():
    """Steps that several tests ask for are run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "_counted", functools.cache(estimate._counted))
        yield


def training(**changes):
    return heron.TrainConfig(**{**dict(max_steps=1, dtype="fp32", micro_bsz=2, ctx_len=16), **changes})


def step(learner):
    config, V = learner.config, learner.model.config.vocab_size
    tokens = torch.arange(config.micro_bsz * config.ctx_len).view(config.micro_bsz, -1) % V
    recalled, _ = learner.model.recall(tokens, None)
    sample = (tokens, tokens.roll(1), *([] if recalled is None else [recalled]))
    learner.update(learner.gradients([sample] * config.accumulate), 0.0, math.inf)


def allocated_in_a_step(learner, tmp_path):
    """Bytes that the CPU allocator gave out at most beyond what it had given before."""
    step(learner)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(learner)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    pieces = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(n_bytes for _, n_bytes in pieces))


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (dict(accumulate=2), 0.01),
        (dict(grad_checkpoint=True), 0.01),
        (dict(tables="host"), 0.02),
        # a CPU repacks bf16 matrices inside its products
        (dict(dtype="bf16", weights="bf16"), 0.15),
    ],
    ids=str,
)
def test_the_most_at_once_is_what_the_allocator_gives(tmp_path, changes, tolerance):
    config = training(**changes)
    learner = Learner(heron.RWKV(MODEL), config, CPU)
    if config.weights == "bf16":
        learner.optimizer.impl = "reference"
    measured = allocated_in_a_step(learner, tmp_path)
    found = estimate.estimate(config, MODEL)
    assert found.peak - found.parameters - found.optimizer == pytest.approx(measured, rel=tolerance)

    on_host = [] if learner.tables is None else learner.tables.weights
    state = learner.optimizer.state
    moments = {weight: sum(part.nbytes for part in state[weight].values()) for weight in state}
    networks = {*learner.model.parameters(), *learner.network.parameters()} - {*on_host}
    assert found.parameters == sum(parameter.nbytes for parameter in networks)
    assert found.tables == sum(weight.nbytes + moments[weight] for weight in on_host)
    assert found.optimizer == sum(n for weight, n in moments.items() if not any(weight is other for other in on_host))


def test_of_many_logits_a_part_is_there_at_once():
    """As in a step: what `allocated_in_a_step` would tell of this one takes seconds, and gigabytes."""
    model = heron.ModelConfig(variant="v7", n_layer=1, n_embd=64, vocab_size=65536)
    config = training(micro_bsz=4, ctx_len=512)
    all_logits = 4 * 512 * 65536 * 4
    found = estimate.estimate(config, model)
    assert found.peak - found.parameters - found.optimizer < all_logits / 2


def test_a_memory_counts_with_what_it_adds_to_a_step(tmp_path):
    config, model = training(), MODEL.changed(memory="memory")
    measured = allocated_in_a_step(Learner(heron.RWKV(model), config, CPU), tmp_path)
    found, without = estimate.estimate(config, model), estimate.estimate(config, MODEL)
    assert found.peak - found.parameters - found.optimizer == pytest.approx(measured, rel=0.01)
    assert found.parameters - without.parameters == 4 * (2 * 64 + 2 * 18 * 64 + 2 * 18)


def counted(config, model):
    """What :func:`estimate.estimate` would give if it ran all layers over all tokens."""
    distinct = min(config.tokens_per_step // max(1, config.processes), model.vocab_size)
    return estimate._counted(config, model, distinct)


def test_layers_that_are_not_run_are_extrapolated():
    config, model = training(ctx_len=2), MODEL.changed(n_layer=5)
    assert tuple(estimate.estimate(config, model)) == pytest.approx(tuple(counted(config, model)), rel=1e-3)


@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_long_samples_are_extrapolated(variant, monkeypatch):
    monkeypatch.setattr(estimate, "_LENGTHS", (64, 128))
    model = heron.ModelConfig(variant=variant, n_layer=1, n_embd=64, head_size=32, vocab_size=100)
    config = training(micro_bsz=3, ctx_len=300)
    assert tuple(estimate.estimate(config, model)) == pytest.approx(tuple(counted(config, model)), rel=1e-2)
    of_any_length = estimate.estimate(training(micro_bsz=1, ctx_len=10**9), model)  # at once
    assert of_any_length.activations > 10**12


@pytest.mark.long
def test_a_deep_network_takes_most_at_another_moment_than_those_that_are_run():
    config = training(grad_checkpoint=True, micro_bsz=8, ctx_len=32)
    shallow, deep = (heron.ModelConfig(variant="v7", n_layer=n, n_embd=64, vocab_size=4400) for n in (4, 6))
    of_shallow, found = (estimate.estimate(config, model) for model in (shallow, deep))
    assert of_shallow.peak == of_shallow.in_forward
    assert found.peak == found.in_backward
    assert tuple(found) == pytest.approx(tuple(counted(config, deep)), rel=1e-3)


@pytest.mark.long
def test_blocks_that_a_sharded_pass_has_gathered_are_not_counted_for_every_layer():
    model = heron.ModelConfig(variant="v7", n_layer=5, n_embd=256, head_size=64, vocab_size=64)
    config = estimate.on_gpus(training(parallel="fsdp", micro_bsz=1), model, 8)
    found = estimate.estimate(config, model)
    assert found.peak == found.in_backward
    assert found.peak == pytest.approx(counted(config, model).peak, rel=1e-2)


def test_host_tables_take_their_rows_alone_from_the_device():
    plain, host = (
        estimate.estimate(training(ctx_len=2, **changes), MODEL)
        for changes in (dict(), dict(tables="host", tables_state="bf16"))
    )
    table = 2 * 600 * 64
    assert plain.parameters - host.parameters == 4 * table
    assert plain.optimizer - host.optimizer == 8 * table + 2 * 4  # and a step count a table
    assert host.tables == (4 + 2 * 2) * table + 2 * 4 * 600
    assert plain.gradients - host.gradients == 4 * 2 * (600 - 4) * 64


def test_rows_of_frozen_tables_on_the_host_take_their_place_twice(monkeypatch):
    config = training(tables="host", dtype="bf16", weights="bf16", finetune=heron.FinetuneConfig(method="state"))
    found = counted(config, MODEL)
    assert found.tables == 2 * 2 * 600 * 64
    monkeypatch.setattr(estimate, "tables_train", lambda _: True)
    once = estimate._counted.__wrapped__(config, MODEL, 32)
    for phase in ("in_forward", "in_backward", "in_update"):
        assert getattr(found, phase) - getattr(once, phase) == 2 * 2 * 32 * 64  # of the 32 tokens of a step


def test_each_of_many_gpus_has_its_share_of_weights_and_of_rows_of_tables():
    shallow = MODEL.changed(n_layer=1)

    def found(gpus, model=shallow, **changes):
        config = estimate.on_gpus(training(ctx_len=2, **changes), model, gpus)
        return estimate.estimate(config, model)

    alone, copies, shards = found(1), found(2, parallel="ddp"), found(2, parallel="fsdp")
    rows = 600 * 64  # of tables
    assert copies.parameters == alone.parameters - 4 * rows // 2
    assert shards.parameters == pytest.approx(alone.parameters / 2, rel=0.01)
    assert shards.optimizer == pytest.approx(alone.optimizer / 2, rel=0.01)
    plain = shallow.changed(variant="v7")
    assert found(2, plain, parallel="fsdp").peak < 0.75 * found(2, plain, parallel="ddp").peak
    assert found(2, parallel="fsdp", tables="host").tables == found(1, tables="host").tables / 2
    assert found(16, parallel="hsdp").peak == pytest.approx(found(8, parallel="fsdp").peak, rel=0.05)


def test_many_gpus_share_weights_where_one_has_no_room(capsys):
    config = training()
    assert estimate.on_gpus(config, MODEL, 1) is config
    assert estimate.on_gpus(config, MODEL, 4, 1 << 40).parallel == "ddp"
    assert estimate.on_gpus(config, MODEL, 4, 1 << 20).parallel == "fsdp"
    assert cli.main(["estimate", "--gpus", "0"]) == 1
    assert "gpus: wanted at least 1, got 0" in capsys.readouterr().err


def test_a_memory_without_its_unit_is_refused(capsys):
    assert cli.main(["estimate", "--memory", "24"]) == 1
    assert capsys.readouterr().err == "heron: memory: 24 is 24 B; wanted a size such as 24GiB\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "on this CPU; a run on a GPU has --dtype bf16 --weights bf16 by itself"),
        (["--dtype", "bf16"], "on this CPU; a run on a GPU has --weights bf16 by itself"),
        (["--dtype", "bf16", "--weights", "bf16"], ""),
        (["--dtype", "fp32"], ""),
        (["--device", "cpu"], ""),
    ],
)
def test_what_a_gpu_would_choose_is_told_where_there_is_none(flags, told, peaks, capsys, monkeypatch):
    peaks({})
    monkeypatch.setattr(machine, "choose_device", lambda wanted: machine.Choice("cpu", "no CUDA device found"))
    monkeypatch.setattr(machine, "cpu_flags", frozenset)
    assert cli.main(["estimate", *flags]) == 0
    assert capsys.readouterr().out.partition("host\n")[2].strip() == told


@pytest.fixture
def peaks(monkeypatch):
    """A function: {(setting, value): share of memory that it leaves} -> what estimates then say, from 1000 MiB on."""

    def pretend(shares):
        def estimated(config, _):
            left = math.prod(share for (name, value), share in shares.items() if getattr(config, name) == value)
            return estimate.Memory(0, 0, 0, 0, round(1000 * left) << 20, 0, 0, 0)

        monkeypatch.setattr(estimate, "estimate", estimated)

    return pretend


def test_what_fits_is_said_and_what_does_not_names_the_settings(peaks):
    peaks({("grad_checkpoint", True): 0.5, ("tables", "host"): 0.8, ("dtype", "bf16"): 1.1})
    config = training(micro_bsz=3)
    assert "fit" not in estimate.describe(config, MODEL, None)
    assert estimate.describe(config, MODEL, 1000 << 20).endswith("\nfits in 1,000.00 MiB")
    once = estimate.describe(config, MODEL, 600 << 20).splitlines()
    assert [line.split() for line in once[-3:]] == [
        ["does", "not", "fit", "in", "600.00", "MiB;", "most", "at", "once", "with"],
        ["--grad_checkpoint", "500.00", "MiB", "fits"],
        ["--tables", "host", "800.00", "MiB"],
    ]
    twice = estimate.describe(config, MODEL, 450 << 20).splitlines()
    assert twice[-2:] == ["and on top of --grad_checkpoint", f"  {'--tables host':<40}{'400.00 MiB':>12}  fits"]
    never = estimate.describe(config, MODEL, 100 << 20)
    assert never.endswith("nothing more helps; a smaller model, or another device")
    assert max(map(len, never.splitlines())) <= 80


def test_a_setting_that_saves_next_to_nothing_is_not_followed_to_the_end(peaks):
    peaks({("ctx_len", 8): 0.995, ("grad_checkpoint", True): 0.5})
    told = estimate.describe(training(micro_bsz=3), MODEL, 100 << 20)
    assert "ctx_len 8" not in told
    assert told.endswith("nothing more helps; a smaller model, or another device")
    just = estimate.describe(training(micro_bsz=3, grad_checkpoint=True), MODEL, 499 << 20)
    assert just.splitlines()[-1].split() == ["--ctx_len", "8", "498.00", "MiB", "fits"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GiB", 24 << 30), ("24G", 24 << 30), ("80 gb", 80 * 10**9), ("1.5MiB", 3 << 19), ("4096", 4096), ("7B", 7)],
)
def test_sizes(text, n_bytes):
    assert memory.size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "0", "24 gigs", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="wanted a size such as 24GiB"):
        memory.size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (3 << 19, "1.50 MiB"), (5 << 40, "5,120.00 GiB")],
)
def test_sizes_in_words(n_bytes, text):
    assert memory.in_words(n_bytes) == text
