"""Many processes make the run that one makes: losses, stops, bad numbers, checkpoints, and what a dying one leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import heron
from heron import dist, report
from heron.checkpoint import run, sharded, shares
from heron.data.loader import Batches
from heron.errors import CheckpointError, ConfigError, HeronError
from heron.train.step import Learner
from heron.train.stop import Preemption
from tests import warm
from tests.ranks import (
    GATED,
    MODELS,
    SIZES,
    STEPS,
    STOP,
    TABLE,
    WANTED,
    free_ports,
    of_packs,
    of_preferences,
    settings,
    write_preferences,
)

TEXT = "".join(f"Number {n} is {n * n % 97}; its square root is near {math.isqrt(n)}.\n" for n in range(150))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def folder(text):
    """Runs of one process with four samples a step, and those of two and four processes (tests/ranks.py)."""
    folder = text.parent
    talks = [[("user", f"What is {n}?"), ("assistant", f"It is {n + n % 3}.")] for n in range(40)]
    rows = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in talks]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_preferences(folder)
    for name, changes in {
        "one": {},
        "one-v8": dict(model=str(folder / GATED), tables="host"),
        "one-accumulated": dict(micro_bsz=2, accumulate=2),
        "one-packs": of_packs(folder),
        "one-dpo": of_preferences(folder),
    }.items():
        config = settings(folder, text, name, **{"micro_bsz": 4, **changes})
        assert heron.Trainer(config, say=lambda line: None).fit() == "finished"
    warm.run(["-m", "tests.ranks", folder, text], timeout=400)
    return folder


def losses(run_folder, name="loss"):
    return [record[name] for record in report.read_log(run_folder)[0]]


def steps(run_folder):
    return [(r["step"], r["tokens"], r["loss"], r["grad_norm"], r["lr"]) for r in report.read_log(run_folder)[0]]


@pytest.mark.parametrize(
    ("many", "one"),
    [("ddp", "one"), ("fsdp", "one"), ("hsdp", "one"), ("accumulated-fsdp", "one-accumulated"),
     ("accumulated-ddp", "one-accumulated"), ("v8-ddp-host", "one-v8"), ("v8-ddp-device", "one-v8"),
     ("v8-fsdp-host", "one-v8"), ("v8-fsdp-device", "one-v8"),
     ("spans-ddp", "one"), ("spans-fsdp", "one"), ("spans-accumulated", "one-accumulated"),
     ("spans-packs", "one-packs"), ("spans-v8", "one-v8"), ("pairs-ddp", "one-accumulated"),
     ("pairs-fsdp", "one-accumulated"), ("dpo", "one-dpo")],
)  # fmt: skip
def test_losses_are_those_of_one_process_on_the_same_samples(folder, many, one):
    ours, theirs = losses(folder / many), losses(folder / one)
    assert len(ours) == len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    assert losses(folder / many, "grad_norm") == pytest.approx(losses(folder / one, "grad_norm"), rel=1e-5)
    if many in ("ddp", "fsdp", "hsdp", "v8-ddp-host", "v8-fsdp-host"):
        ours, theirs = (report.read_log(folder / name)[1] for name in (many, one))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [STEPS // 2, STEPS]
        for name in ("val_loss", "val_bpb"):
            assert [r[name] for r in ours] == pytest.approx([r[name] for r in theirs], abs=1e-6)


def test_shards_of_bf16_copies_learn_as_whole_ones(folder):
    whole, sharded, accumulated = (losses(folder / f"half-{name}") for name in ("ddp", "fsdp", "accumulated"))
    assert sharded == whole
    assert accumulated == pytest.approx(whole, abs=3e-3)
    in_fp32 = losses(folder / "ddp")
    assert sharded != in_fp32
    assert sharded == pytest.approx(in_fp32, abs=2e-2)


def test_what_pairs_are_measured_against_does_not_depend_on_the_processes(folder):
    ours, theirs = (json.loads((folder / name / "reference.json").read_text()) for name in ("dpo", "one-dpo"))
    assert ours.pop("train") == pytest.approx(theirs.pop("train"), abs=1e-4)
    assert ours.pop("val") == pytest.approx(theirs.pop("val"), abs=1e-4)
    assert ours == theirs  # the fingerprint of the base, too
    val, wanted = (report.read_log(folder / name)[1][-1]["val_loss"] for name in ("dpo", "one-dpo"))
    assert val == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "stopped"),
    [("fsdp", "fsdp-stopped"), ("half-fsdp", "half-fsdp-stopped"), ("v8-ddp-host", "v8-ddp-stopped")],
)
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bit_for_bit(folder, name, stopped):
    assert steps(folder / stopped) == steps(folder / name)
    assert f"step-{STOP + 1:08d}" in [path.name for path in (folder / stopped / "checkpoints").iterdir()]
    one, other = (torch.load(folder / run_folder / "rwkv-final.pth") for run_folder in (name, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["fsdp-nan", "spans-nan", "v8-nan"])
def test_a_nan_in_one_process_makes_all_skip_the_same_step(folder, name):
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    (refused,) = [line for line in lines if "refused" in line]
    assert (refused["refused"], refused["action"], refused["samples"]) == (4, "skipped", [12, 4])
    assert len([line for line in lines if "loss" in line]) == 5
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    kept = load_file(folder / name / "bad" / "step-00000004-sample-12.safetensors")
    assert kept["tokens"].shape == kept["targets"].shape == (4, 32)


def test_a_full_disk_of_any_process_ends_all_and_each_names_its_rank(folder):
    why = f"checkpoints/step-{STEPS:08d}: cannot be written: No space left on device"
    assert (folder / "full-0.txt").read_text() == f"rank 0: {why}"
    assert (folder / "full-1.txt").read_text() == f"rank 1: ends as rank 0 failed: {why}"
    assert (folder / "full_fsdp-1.txt").read_text() == f"rank 1: {why}"
    assert (folder / "full_fsdp-0.txt").read_text() == f"rank 0: ends as rank 1 failed: {why}"
    for name in ("full", "full_fsdp"):
        assert json.loads((folder / name / "run_status.json").read_text())["status"] == "failed"
        assert not list((folder / name).glob("checkpoints/*"))
    assert len(steps(folder / "full_fsdp")) < STEPS + 2


def test_bench_counts_the_tokens_of_all_processes_and_the_first_tells_it(folder):
    assert (folder / "bench-1.txt").read_text() == ""
    told, found = (folder / "bench-0.txt").read_text(), json.loads((folder / "bench.json").read_text())
    assert found["tokens_per_s"] * found["seconds"] == pytest.approx(2 * 2 * 2 * 16)
    assert "2 x 2 samples of 16 random tokens, each process" in told
    assert "2 processes, fsdp: as asked" in told
    assert f"{found['tokens_per_s']:,.0f} tokens/s, {found['tokens_per_s'] / 2:,.0f} each process" in told


def saved_in(checkpoint):
    """The whole tensors of a checkpoint by name."""
    run.verify(checkpoint)
    if not (checkpoint / sharded.FOLDER).exists():
        parts = [load_file(checkpoint / run.MODEL), load_file(checkpoint / run.OPTIMIZER)]
    else:
        parts = [
            {name: torch.empty_like(tensor, device="cpu") for name, tensor in part.items()}
            for part in sharded.described(checkpoint / sharded.FOLDER)
        ]
        sharded.read(checkpoint / sharded.FOLDER, *parts)
    for name, of_processes in shares.read(checkpoint).items():
        kind, key = name.split(".", 1)
        whole = torch.empty(sum(map(len, of_processes)), *of_processes[0].shape[1:], dtype=of_processes[0].dtype)
        for rank, share in enumerate(of_processes):
            whole[rank :: len(of_processes)] = share
        parts[kind == "optimizer"][key] = whole
    return parts


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("one", "again-ddp"), ("one", "again-fsdp"), ("one", "again-hsdp"), ("fsdp", "four-ddp"), ("fsdp", "four-fsdp"),
     ("one-v8", "again-v8-ddp"), ("one-v8", "again-v8-fsdp"), ("one-v8", "again-v8-hsdp"),
     ("v8-ddp-host", "four-v8-ddp"), ("v8-fsdp-host", "four-v8-fsdp")],
)  # fmt: skip
def test_weights_and_moments_are_the_same_bits_on_another_number_of_processes(folder, saved, loaded):
    one, many = (saved_in(folder / name / "checkpoints" / f"step-{STEPS:08d}") for name in (saved, loaded))
    for ours, theirs in zip(one, many, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_shards_is_a_model_and_is_refused_where_a_file_is_damaged(folder, tmp_path):
    there = tmp_path / f"step-{STEPS:08d}"
    shutil.copytree(folder / "fsdp" / "checkpoints" / there.name, there)
    shards = sorted((there / sharded.FOLDER).iterdir())
    assert len(shards) == 2
    final = torch.load(folder / "fsdp" / "rwkv-final.pth")
    assert all(torch.equal(tensor, final[name]) for name, tensor in heron.load(there).state_dict().items())
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shards[1].name}: its sha256"):
        heron.load(there)
    shutil.copy(shards[0], shards[0].with_name("shard-00003-model-00001-of-00001.safetensors"))
    content[-1] ^= 1
    shards[1].write_bytes(content)
    with pytest.raises(CheckpointError, match="shard-00003-.*: the manifest does not list it"):
        heron.load(there)


def test_rows_come_from_their_owners_and_their_gradients_are_added_up_there(folder):
    for count in (2, 4):
        for rank in range(count):
            came = torch.load(folder / f"lent-{rank}-of-{count}.pt")
            assert sorted(came["ids"].tolist()) == WANTED[rank].tolist()
            assert (came["ids"] % count).tolist() == sorted((WANTED[rank] % count).tolist())
            assert torch.equal(came["rows"], TABLE[came["ids"]])
            assert torch.equal(came["others"], -2 * TABLE[came["ids"], :1])
            assert came["most"] == max(map(len, WANTED[:count]))
            mine = [i for i in range(37) if i % count == rank and any(i in ids for ids in WANTED[:count])]
            assert (came["owned"] * count + rank).tolist() == mine
            times = torch.tensor([[sum(r + 1.0 for r in range(count) if i in WANTED[r])] for i in mine])
            assert torch.allclose(came["sums"], times * TABLE[mine])
            users = torch.tensor([[float(sum(i in ids for ids in WANTED[:count]))] for i in mine])
            assert torch.allclose(came["of_others"], -2 * users * TABLE[mine, :1])
            assert torch.equal(came["whole"], TABLE)
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize(("name", "count"), [("again-v8-ddp", 2), ("again-v8-fsdp", 2), ("four-v8-ddp", 4)])
def test_each_process_holds_its_part_of_the_tables_and_of_their_moments_alone(folder, name, count):
    whole = MODELS["v8"].n_layer * 256 * (3 * MODELS["v8"].n_embd + 1) * 4
    for rank in range(count):
        assert int((folder / name / f"bytes-{rank}.txt").read_text()) == whole // count


def test_a_checkpoint_of_shares_is_a_model_and_is_refused_where_one_is_missing(folder, tmp_path):
    there = tmp_path / f"step-{STEPS:08d}"
    shutil.copytree(folder / "v8-ddp-host" / "checkpoints" / there.name, there)
    final = torch.load(folder / "v8-ddp-host" / "rwkv-final.pth")
    assert {tuple(tensor.shape) for name, tensor in final.items() if ".enn." in name} == {(256, 32)}
    loaded = heron.load(there).state_dict()
    assert loaded.keys() == final.keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in loaded.items())
    (there / shares.FOLDER / "rows-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rows-00002-of-00002.safetensors: missing"):
        heron.load(there)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "v8-ddp-host", "v8-fsdp-host"])
def test_one_process_goes_on_with_a_run_of_many(folder, text, tmp_path, name):
    said = []
    source = folder / name / "checkpoints" / f"step-{STEPS:08d}"
    v8 = dict(model=str(folder / GATED), tables="host") if "v8" in name else {}
    config = settings(tmp_path, text, "on", micro_bsz=4, max_steps=STEPS + 2, resume=str(source), **v8)
    assert heron.Trainer(config, say=said.append).fit() == "finished"
    assert [record["step"] for record in report.read_log(tmp_path / "on")[0]] == [STEPS + 1, STEPS + 2]
    assert any("not bit-exact because processes was 2 and is 1" in line for line in said)


def test_one_process_refuses_a_run_of_many_whose_tables_it_would_step_densely(folder, text, tmp_path):
    source = folder / "v8-ddp-device" / "checkpoints" / f"step-{STEPS:08d}"
    config = settings(tmp_path, text, "on", max_steps=STEPS + 2, resume=str(source), model=str(folder / GATED))
    with pytest.raises(CheckpointError, match="on 2 CPU processes, now 1: .* by rows; .* with --tables host"):
        heron.Trainer(config, say=lambda line: None).fit()


@pytest.mark.parametrize("processes", [2, 3])
def test_samples_are_dealt_to_processes_each_once(processes):
    batches = Batches(np.arange(500) % 256, 16, 0, "text")
    every = batches.batch(6, 4 * processes)[0]
    dealt = [batches.batch(6 + rank, 4, processes)[0] for rank in range(processes)]
    assert torch.equal(torch.stack(dealt, dim=1).flatten(0, 1), every)


_KILLED = """
import os, sys
from pathlib import Path

from heron import cli
from tests.torchrun import torchrun

def work():
    Path(sys.argv[1], f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    return cli.main(["train", "--config", sys.argv[2]])

sys.exit(torchrun(work, 2))
"""


def test_a_killed_process_ends_the_run_with_exit_code_1_and_a_whole_checkpoint(tmp_path, text):
    config = settings(tmp_path, text, "killed", max_steps=100_000, save_every=5, eval_every=0, dist_timeout=20)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with (tmp_path / "said.txt").open("w+") as output:
        started = warm.start(["-c", _KILLED, tmp_path, tmp_path / "config.yaml"], output, subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "killed" / "checkpoints").glob("step-*")):
                assert started.poll() is None, (tmp_path / "said.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
            begun = time.monotonic()
            code = started.wait(timeout=90)
        finally:
            started.kill()
    assert code == 1
    assert time.monotonic() - begun < 20 + 35
    run.verify(run.newest(tmp_path / "killed"))
    said = (tmp_path / "said.txt").read_text()
    assert "heron: rank 0: another process of the run failed" in said
    assert str(Path(heron.__file__).parent) not in said  # no traceback of ours


def test_a_process_alone_needs_no_group():
    ranks = dist.ALONE
    assert ranks.first(lambda: 3) == 3
    assert ranks.in_turn(lambda: 4) == 4
    assert ranks.sum([1.0, 2.0]) == [1.0, 2.0]
    assert ranks.all(True)
    assert not ranks.all(False)
    assert dist.choose("fsdp", ranks, 10, torch.device("cpu")).value == "none"


@pytest.mark.parametrize(
    ("parallel", "n_parameters", "sharing", "accumulate", "why"),
    [("fsdp", 10**9, 1, 1, None), ("hsdp", 4 * 10**9, 1, 1, "no room"), ("fsdp", 10**9, 1, 2, "several"),
     ("ddp", 10**10, 1, 2, None), ("ddp", 10**10, 2, 1, None), ("ddp", 10**8, 2, 2, "several")],
)  # fmt: skip
def test_why_passes_of_several_gpus_are_not_recorded(monkeypatch, parallel, n_parameters, sharing, accumulate, why):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    told = dist.why_not_recorded(parallel, n_parameters, sharing, accumulate, torch.device("cuda"))
    assert told is None if why is None else why in str(told)


def test_the_environment_of_torchrun_is_read_and_half_of_it_is_refused(monkeypatch):
    numbers = dict(RANK=3, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_PORT=29500)
    for name, value in dict(MASTER_ADDR="a", **numbers).items():
        monkeypatch.setenv(name, str(value))
    assert dist.Ranks.of_environment() == dist.Ranks(3, 8, 1, 2)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="LOCAL_RANK.*start with torchrun"):
        dist.Ranks.of_environment()


def test_settings_that_do_not_fit_the_processes_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        heron.Trainer(settings(tmp_path, text, "run", processes=2))
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 .* or leave --context_parallel out"):
        heron.Trainer(settings(tmp_path, text, "run", context_parallel=2))
    config = settings(tmp_path, text, "run", context_parallel=2, processes=2)
    with pytest.raises(ConfigError, match="context_parallel 2: the attention of v7b looks back .* leave --context"):
        Learner(heron.RWKV(heron.ModelConfig(variant="v7b", **SIZES)), config, torch.device("cpu"))
    with pytest.raises(ConfigError, match="leave --device out"):
        dist.Ranks(0, 2, 0, 2).device("cuda:1")
    with pytest.raises(ConfigError, match="parallel: wanted one of auto, ddp, fsdp, hsdp"):
        settings(tmp_path, text, "run", parallel="fspd")


def test_one_of_many_processes_stops_when_all_have_agreed_whatever_comes_twice():
    with Preemption(say=lambda line: None, alone=False) as stop:
        stop.begin()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert (stop.asked, stop.reason) == ("SIGTERM", None)
        stop.agree(0)
        assert stop.reason is None
        stop.agree(1)
        assert stop.reason == "SIGTERM"
    other = Preemption(alone=False)
    other.agree(1)
    assert other.reason == "a signal to another process"


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    told = r"rank 0: rank 1, 2 of 3 did not come within 0.2 s \(--dist_timeout\)"
    with pytest.raises(HeronError, match=told), dist.Ranks(0, 3, 0, 3).joined(torch.device("cpu"), 0.2):
        raise AssertionError


def test_an_error_of_connection_is_told_with_the_rank(monkeypatch):
    ranks = dist.Ranks(1, 2, 1, 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist.Ranks, "_met", lambda self, timeout: None)
    told = r"rank 1: another process .* 5 s \(--dist_timeout\): \[gloo\] Timed out"
    with pytest.raises(HeronError, match=told), ranks.joined(torch.device("cpu"), 5):
        raise RuntimeError("[gloo] Timed out waiting for 5000ms")
    with pytest.raises(HeronError, match="rank 1: data"), ranks.joined(torch.device("cpu"), 5):
        raise ConfigError("data")
    with pytest.raises(RuntimeError, match="shapes"), ranks.joined(torch.device("cpu"), 5):
        raise RuntimeError("shapes")
