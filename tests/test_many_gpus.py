"""benchmarks/many_gpus: its table on two processes, its time limit, rows that fail, and what going on is judged by."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import heron
from heron.errors import HeronError

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.many_gpus import __main__ as many_gpus
from benchmarks.many_gpus import going_on, launch, rows, witness
from benchmarks.many_gpus.results import Results
from heron.train.step import Learner
from tests import warm

OF = dict(commit="abc", device="none", torch="2")


# -- the whole of it ------------------------------------------------------------------------------------------------


def test_the_table_of_two_processes(tmp_path):
    asked = ["--gpus", "2", "--tiny", "--out", str(tmp_path), "--rows", "going-on", "loss-fp32", "1m", "v8"]
    with warm.start(["-m", "tests.forked", *asked], stderr=subprocess.STDOUT, cwd=warm.REPOSITORY) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    _, head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith(("|", "2 x"))
    ]
    assert head[:4] == ["what", "one GPU", "2 GPUs", "times one GPU"]
    assert len(lines) == 4
    on, losses, longest, on_text = lines
    assert (longest[1], longest[3], longest[4]) == ("–", "–", "–")
    assert re.fullmatch(r"\d+\.\dk", longest[2])
    assert re.fullmatch(r"\d+\.\d%", longest[6])
    assert on[2].startswith("on 2, 1: each sample once: yes; weights and moments bit-equal after the load: yes; ")
    assert "on 2 bit-equal to the end: yes" in on[2]
    assert re.fullmatch(r"\d\.\d{4}; in 2 passes \d\.\d{4}", losses[1])
    assert losses[2].endswith(", 0.00000 apart")
    one, two = (float(cell.removesuffix("k")) for cell in on_text[1:3])
    assert float(on_text[3]) == pytest.approx(two / one, abs=0.02)
    assert float(on_text[4]) == pytest.approx(float(on_text[3]) / 2, abs=0.01)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert all(record["torch"] == torch.__version__ and record["figures"] for record in records)
    (of_losses,) = (record["figures"] for record in records if ", loss, " in record["part"])
    assert of_losses["many"] == pytest.approx(of_losses["one"], abs=1e-6)
    assert of_losses["accumulated"] == pytest.approx(of_losses["one"], abs=1e-6)


# -- time, failures, what is known ----------------------------------------------------------------------------------


def row(name, seconds=1.0, gives=None):
    def measure(launcher, folder):
        if gives is None:
            raise HeronError("no | luck")
        return gives

    return rows.Row(name, [rows.Part(name, seconds, measure)], lambda found: rows.Cells(many=str(*found)))


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """A function: rows by name, options -> exit code and the lines behind the head."""

    def run(made, *options):
        monkeypatch.setattr(many_gpus, "rows", lambda *_: made)
        code = many_gpus.main(["--tiny", "--gpus", "2", "--out", str(tmp_path), "--rows", *made, *options])
        return code, [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]

    return run


def test_a_row_that_fails_says_why_and_the_next_is_measured(table, tmp_path):
    code, lines = table({"wide": row("bad"), "large": row("good", gives={"a": 1})})
    assert code == 1
    assert lines[0] == "| bad | – | failed: no / luck | – | – | – | – |"
    assert lines[1].startswith("| good | – | {'a': 1} |")
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["part"], r.get("failed"), r.get("figures")) for r in told] == [
        ("bad", "failed: no | luck", None), ("good", None, {"a": 1}),
    ]  # fmt: skip


def test_what_would_not_end_in_time_is_not_begun(table):
    code, lines = table({"wide": row("long", 61.0, {}), "large": row("short", 1.0, {})}, "--minutes", "1")
    assert code == 75
    assert re.search(r"long \| – \| no time: takes 61 s, (60|59) s were left", lines[0])
    assert "short | – | {} |" in lines[1]


def test_figures_of_the_same_commit_and_device_are_known_and_others_are_not(tmp_path):
    path, launcher = tmp_path / "results.jsonl", launch.Launcher(time.monotonic() + 60)

    def measured(gives, of=OF, trusted=True):
        return Results(path, of, trusted).measured(row("x", gives=gives).parts[0], launcher)

    assert measured({"n": 1}) == {"n": 1}
    assert measured({"n": 2}) == {"n": 1}
    assert measured({"n": 3}, {**OF, "device": "other"}) == {"n": 3}
    assert measured({"n": 4}, trusted=False) == {"n": 4}


def test_a_part_that_failed_is_measured_again(tmp_path):
    launcher = launch.Launcher(time.monotonic() + 60)
    for gives, found in ((None, "failed: no | luck"), ({"n": 1}, {"n": 1})):
        assert Results(tmp_path / "r", OF, True).measured(row("x", gives=gives).parts[0], launcher) == found


def test_a_row_without_the_figure_of_one_gpu_has_that_of_many():
    speed = rows.rows(8, rows.full(), [0], 1e15)["wide"]
    assert [part.name.rpartition(", ")[2] for part in speed.parts] == ["on 1", "on 8"]
    many = dict(tokens_per_s=800e3, peak_bytes=2**30, multiplied=10**9)
    assert speed.cells(["failed: x", many]) == ("failed: x", "800.0k", "–", "–", "1.0", "60.0%")
    assert speed.cells([dict(many, tokens_per_s=105e3), many])[2:4] == ("7.62", "0.952")
    assert speed.cells([many, "no time"]) == ("800.0k", "no time", "–", "–", "–", "–")


def test_losses_are_means_over_the_seeds_that_there_are():
    losses = rows.rows(4, rows.full(), [0, 1, 2], 1.0)["loss-bf16"]
    assert len({part.name for part in losses.parts}) == 3
    found = [dict(one=1.0, accumulated=1.5, many=1.25), dict(one=2.0, accumulated=2.5, many=2.0), "no time"]
    assert losses.cells(found)[:2] == ("1.5000; in 4 passes 2.0000", "1.6250, 0.12500 apart; no time")
    assert losses.cells(["no time"] * 3)[:2] == ("–", "no time")


def test_weights_that_are_looked_up_are_not_multiplied():
    sizes = dict(n_layer=2, n_embd=32, head_size=16, vocab_size=256)
    v7, v8 = (heron.ModelConfig(variant=variant, **sizes) for variant in ("v7", "v8"))
    whole = sum(parameter.numel() for parameter in heron.RWKV(v7).parameters())
    assert rows.n_multiplied(v7) == whole - 256 * 32
    assert abs(rows.n_multiplied(v8) - rows.n_multiplied(v7)) < 2 * 256 * 32  # not the tables


@pytest.mark.parametrize(
    ("line", "words"),
    [("--tiny --gpus 3", "wanted a number that divides 4 samples, got 3"), ("--gpus 1", "wanted at least 2"),
     ("--gpus 4", "wanted 4, and there are 0; --tiny")],
)  # fmt: skip
def test_what_can_not_be_is_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert many_gpus.main([*line.split(), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


# -- programs -------------------------------------------------------------------------------------------------------


def launcher(seconds=60.0):
    return launch.Launcher(time.monotonic() + seconds)


def test_torchrun_starts_as_many_processes_and_the_cause_of_a_failure_is_one_line():
    with pytest.raises(HeronError, match="^heron bench: unknown argument --nope") as raised:
        launcher().run(["-m", "heron", "bench", "--nope"], gpus=2)
    assert "\n" not in str(raised.value)


GONE = "heron: rank 0: another process of the run failed"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (["heron: reading x ...", "heron: rank 0: ends as rank 1 failed: y", "heron: rank 1: y", "ChildFailedError: z"],
         "heron: rank 1: y"),
        (["[rank3]: Traceback", "[rank3]: torch.OutOfMemoryError: CUDA out of memory.", GONE],
         "torch.OutOfMemoryError: CUDA out of memory."),
        ([GONE], GONE),
        (["Killed"], "Killed"),
        ([], "ended with -9 and said nothing"),
    ],
)  # fmt: skip
def test_the_cause_is_told_by_the_process_that_failed_first(said, cause):
    assert launch.cause("\n".join(said), -9) == cause


def test_what_has_not_ended_in_time_is_ended_with_all_that_it_started(tmp_path):
    sleeps = "import pathlib, os, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    begins = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
    with pytest.raises(HeronError, match="ended, as the time was over"):
        launcher(2).run(["-c", begins, sleeps, str(tmp_path / "pid")])
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_programs_side_by_side_have_gpus_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    begun = []

    def begin(program, processes, restarts, environment, output):
        begun.append((processes, environment["CUDA_VISIBLE_DEVICES"]))
        return subprocess.Popen([sys.executable, *program], stdout=output)

    monkeypatch.setattr(launch, "begin", begin)
    launcher().side_by_side([(["-c", ""], 2), (["-c", ""], 1)])
    launcher().run(["-c", ""], 3)
    assert begun == [(2, "3,5"), (1, "7"), (3, "3,5,7")]


# -- going on -------------------------------------------------------------------------------------------------------

CONFIG = heron.TrainConfig(ctx_len=16, micro_bsz=4, max_steps=4, save_every=2)


class Simulated:
    """In the place of a launcher: writes what witnesses and logs would say, but for one fault."""

    def __init__(self, fault=None):
        self._fault = fault

    def run(self, program, gpus=1, restarts=0):
        config, notes = heron.TrainConfig.from_yaml(program[2]), Path(program[3])
        name = notes.parent.name
        notes.mkdir(parents=True)
        begin = 2 if config.resume != "auto" else 0
        self._write(notes, 0, gpus, begin, 4 if not restarts else 3, None if name == "whole" else self._fault)
        if restarts:
            self._write(notes, 1, gpus, 2, 4, self._fault)
        apart = 0.5 if name == "killed" and self._fault == "curve" else 0.0
        steps = range(1 if restarts else begin + 1, 5)
        curve = [dict(step=n, tokens=64 * n, loss=1 / n + apart * (n > 2), grad_norm=1.0, lr=1.0) for n in steps]
        (notes.parent / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))

    def side_by_side(self, programs):
        for program, gpus in programs:
            self.run(program, gpus)

    @staticmethod
    def _write(notes, restart, gpus, begin, end, fault):
        for rank in range(gpus):
            holds = "other" if (fault, begin, rank) == ("moments", 2, gpus - 1) else "same"
            lines = [dict(step=begin, holds=f"{begin} {holds}")]
            for step in range(begin, end):
                samples = [f"sample {4 * step + n}" for n in range(4) if n % gpus == rank]
                lines.append(dict(first=4 * step, read=samples[:1] * len(samples) if fault == "samples" else samples))
            lines += [dict(step=end, holds=f"{end} {'other' if fault == 'end' else 'same'}")] * (end == 4)
            (notes / f"{restart}-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("fault", [None, "moments", "samples", "curve", "end"])
def test_each_thing_that_may_be_wrong_with_going_on_is_seen(tmp_path, fault):
    found = going_on.measure(Simulated(fault), tmp_path, CONFIG, 4)
    wrong = dict(moments="loaded", samples="once", curve="curve", end="curve").get(fault)
    assert {name for name in ("loaded", "once", "curve") if not found[name]} == {wrong} - {None}
    assert found["counts"] == [4, 2, 1]
    assert found["apart"] == 0


def test_a_digest_tells_apart_any_weight_and_any_moment():
    torch.manual_seed(0)
    model = heron.ModelConfig(variant="v7", n_layer=1, n_embd=32, head_size=16, vocab_size=64)
    config = heron.TrainConfig(model=model, max_steps=1, threads=1, dtype="fp32", device="cpu")
    learner = Learner(heron.RWKV(model), heron.Trainer(config).config, torch.device("cpu"))
    tokens = torch.randint(0, 64, (1, 9))
    learner.update(learner.gradients([(tokens[:, :-1], tokens[:, 1:])]), 1e-3, 1.0)
    seen = {witness.digest(learner)}
    assert {witness.digest(learner)} == seen
    leaf = learner.model.blocks[0].att.key.weight
    for tensor in (leaf.data, learner.optimizer.state[leaf]["exp_avg_sq"]):
        tensor[0, 0] += 1e-3
        seen.add(witness.digest(learner))
    assert len(seen) == 3
