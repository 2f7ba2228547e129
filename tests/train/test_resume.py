"""A run that is started again: by its folder's name alone, with other settings, on another number of threads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import heron
from heron import cli, report
from heron.checkpoint import run
from heron.errors import CheckpointError, ConfigError
from heron.optim import lr_at
from heron.train import loop as train
from heron.train import threads

TEXT = "".join(f"Line {n} of a text that repeats itself, {n % 7} times {n % 5}.\n" for n in range(60))
SIZES = "--n_layer 1 --n_embd 32 --head_size 16 --ctx_len 16 --micro_bsz 1 --device cpu --dtype fp32 --threads 1"
QUIET = "--sample_every 0 --eval_every 0 --val_fraction 0 --lr_init 1e-3 --lr_final 1e-5 --warmup_steps 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder with text.txt and a finished run of 4 steps in `run`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    words = f"train {SIZES} {QUIET} --data {folder}/text.txt --max_steps 4 --out {folder}/run".split()
    assert cli.main(words) == 0
    return folder


@pytest.fixture
def home(finished, tmp_path):
    """A copy of it, so that a test may change it."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "text.txt", tmp_path / "text.txt")
    return tmp_path


@pytest.fixture
def heron_(capsys):
    def run_(*words):
        try:
            code = cli.main(" ".join(map(str, words)).split())
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run_


def asked(home, **changes):
    config = heron.TrainConfig.from_yaml(home / "run" / "config.yaml").to_dict()
    return heron.TrainConfig.from_dict({**config, "data": str(home / "text.txt"), "out": str(home / "run"), **changes})


# -- by name alone --------------------------------------------------------------------------------------------------


def test_the_folder_s_name_alone_is_enough(heron_, home):
    words = f"train --data {home}/text.txt --out {home}/run"
    code, out, err = heron_(words)
    assert (code, err) == (0, "")
    assert "finished at step 4; nothing to do" in out
    code, out, err = heron_(words, "--max_steps 6 --lr_init 2e-3")
    assert (code, err) == (0, "")
    assert "going on from step-00000004" in out
    now = heron.TrainConfig.from_yaml(home / "run" / "config.yaml")
    assert (now.lr_init, now.lr_final, now.ctx_len, now.model.n_layer) == (2e-3, 1e-5, 16, 1)
    assert "finished at step 6" in heron_(f"train --out {home}/run")[1]


@pytest.mark.parametrize("flags", ["--max_tokens 96", "--proj_dir {home}/run --my_exit_tokens 96", "--max-steps=6"])
def test_other_flags_override_what_the_run_had(heron_, home, flags):
    out = "" if "proj_dir" in flags else f"--out {home}/run"
    assert heron_(f"train {out} --data {home}/text.txt", flags.format(home=home))[0] == 0
    assert report.read_log(home / "run")[0][-1]["step"] == 6


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step-00000004"])
def test_a_checkpoint_and_a_new_folder_are_enough(heron_, home, named):
    words = f"train --data {home}/text.txt --resume {home}/{named} --out {home}/branch"
    code, out, err = heron_(words, "--max_steps 5 --lr_init 2e-3")
    assert (code, err) == (0, "")
    assert "going on from step-00000004" in out
    now = heron.TrainConfig.from_yaml(home / "branch" / "config.yaml")
    assert (now.max_steps, now.lr_init, now.lr_final, now.ctx_len, now.model.n_layer) == (5, 2e-3, 1e-5, 16, 1)
    assert report.read_log(home / "run")[0][-1]["step"] == 4
    assert heron_(words, "--max_steps 6")[0] == 0  # with what the branch has by now
    assert heron.TrainConfig.from_yaml(home / "branch" / "config.yaml").lr_init == 2e-3


def test_a_checkpoint_without_its_run_has_the_settings(heron_, home):
    shutil.copytree(home / "run" / "checkpoints", home / "alone")
    words = f"train --resume {home}/alone/step-00000004 --max_steps 5"
    code, out, err = heron_(f"{words} --out {home}/branch")
    assert (code, err) == (0, "")
    assert "going on from step-00000004" in out
    assert heron.TrainConfig.from_yaml(home / "branch" / "config.yaml").ctx_len == 16


def test_a_damaged_checkpoint_that_is_named_is_one_line(heron_, home):
    (home / "run" / "checkpoints" / "step-00000004" / "trainer.json").write_text("{")
    code, _, err = heron_(f"train --resume {home}/run/checkpoints/step-00000004 --out {home}/branch")
    assert (code, err.count("\n")) == (1, 1)
    assert "trainer.json" in err


def test_a_folder_that_holds_no_run_is_no_run_to_go_on_with(heron_, home):
    (home / "other").mkdir()
    shutil.copy(home / "run" / "config.yaml", home / "other" / "config.yaml")
    code, _, err = heron_(f"train --out {home}/other")
    assert (code, err.count("\n")) == (1, 1)
    assert "holds no run to go on with; to begin one, give --max_steps" in err
    assert [path.name for path in (home / "other").iterdir()] == ["config.yaml"]


def test_a_run_that_resume_names_gives_the_settings(heron_, home):
    code, out, err = heron_(f"train --resume {home}/run --out {home}/run2 --max_steps 6")
    assert (code, err) == (0, "")
    now = heron.TrainConfig.from_yaml(home / "run2" / "config.yaml")
    assert (now.ctx_len, now.lr_final, now.model.n_layer) == (16, 1e-5, 1)
    assert [record["step"] for record in report.read_log(home / "run2")[0]] == [5, 6]
    assert not (home / "run" / "checkpoints" / "step-00000006").exists()
    assert f"{home}/run2: finished at step 6" in heron_(f"train --resume {home}/run --out {home}/run2")[1]
    for named in ("run", "run/checkpoints/step-00000004"):
        assert f"{home}/run: finished at step 4" in heron_(f"train --resume {home}/{named}")[1]
    assert heron_(f"train --resume {home}/run --max_steps 5")[0] == 0
    assert report.read_log(home / "run")[0][-1]["step"] == 5
    for flags in (f"--out {home}/run3", "--max_steps 5"):
        code, _, err = heron_(f"train --resume {home}/nowhere {flags}")
        assert (code, err) == (1, f"heron: resume: {home}/nowhere is neither a checkpoint nor a run folder with one\n")


def test_a_learned_tokenizer_is_not_that_of_another_finished_run(heron_, home):
    code, _, err = heron_(f"train --out {home}/run --tokenizer bpe:300")
    assert (code, err.count("\n")) == (1, 1)
    assert "run: finished at step 4, with another tokenizer than bpe:300; name another --out" in err


def test_a_run_that_was_moved_goes_on_where_it_is(heron_, home):
    (home / "run").rename(home / "moved")
    code, out, _ = heron_(f"train --data {home}/text.txt --out {home}/moved --max_steps 5")
    assert code == 0
    assert (home / "moved" / "checkpoints" / "step-00000005").is_dir()
    assert not (home / "run").exists()


# -- with other settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(lr_init=2e-3), "lr_init was 0.001 and is 0.002"),
        (dict(seed=3), "seed was 0 and is 3"),
        (dict(ctx_len=8), "ctx_len was 16 and is 8"),
        (dict(weight_decay=0.0), "weight_decay was 0.1 and is 0.0"),
        (dict(data="other"), "data was"),
        (dict(data="same name"), "data was"),
        (dict(dtype="bf16"), "dtype was fp32 and is bf16"),
        (dict(max_steps=3), "max_steps was 4 and is 3"),
        (dict(model="start"), "model was initial values and is"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_finished_run_with_other_settings_names_them(home, changes, words):
    if changes.get("data") == "other":
        (home / "other.txt").write_text(TEXT[::-1])
        changes = dict(data=str(home / "other.txt"))
    if changes.get("data") == "same name":
        (home / "text.txt").write_text(TEXT[::-1])
        changes = {}
    if "model" in changes:
        heron.save(heron.load(home / "run"), home / "start.pth")
        changes = dict(model=str(home / "start.pth"))
    before = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        heron.Trainer(asked(home, **changes)).fit()
    assert words in str(caught.value)
    assert "finished at step 4, with other settings" in str(caught.value)
    assert "--out" in str(caught.value)
    assert {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("changes", [dict(eval_every=3), dict(keep=5), dict(data="gone"), dict(dtype="auto")])
def test_what_changes_no_number_of_a_finished_run_is_no_difference(home, changes):
    if changes.get("data") == "gone":
        (home / "text.txt").unlink()
        changes = {}
    said = []
    assert heron.Trainer(asked(home, **changes), say=said.append).fit() == "finished"
    assert len(said) == 1
    assert "nothing to do" in said[0]


@pytest.mark.parametrize("max_steps", [5, 40, 400])
def test_a_longer_run_says_how_the_learning_rate_jumps(home, max_steps, monkeypatch):
    monkeypatch.setattr(train.Trainer, "_loop", lambda *_: "preempted")
    before, after = asked(home), asked(home, max_steps=max_steps)
    said = []
    heron.Trainer(after, say=said.append).fit()
    [line] = [line for line in said if "jumps" in line]
    factor = lr_at(4, after) / lr_at(3, before)
    assert f"to {lr_at(4, after):.3g} in step 5" in line
    assert (f"{factor:.3g} times as high" if factor > 1 else f"a factor of {factor:.3g}") in line
    assert f"was one of 4 steps and is one of {max_steps}" in line


def test_an_equal_schedule_has_no_jump(home, monkeypatch):
    monkeypatch.setattr(train.Trainer, "_loop", lambda *_: "preempted")
    longer = asked(home, max_steps=None, max_tokens=4 * 16 + 1)  # a fifth step, the schedule is as good as the same
    flat = dict(lr_init=1e-5, lr_final=1e-5, warmup_steps=0)
    said = []
    heron.Trainer(heron.TrainConfig.from_dict({**longer.to_dict(), **flat}), say=said.append).fit()
    assert all("times as high" not in line for line in said)


def test_the_run_that_is_named_is_the_one_that_is_spoken_of(home):
    other = asked(home, resume=str(home / "run"), out=str(home / "run2"))
    said = []
    heron.Trainer(other, say=said.append).fit()
    assert len(said) == 1
    assert said[0].startswith(f"{home / 'run'}: finished at step 4")
    with pytest.raises(CheckpointError, match=r"n_layer 1 \(now 2\); drop --resume"):
        heron.Trainer(asked(home, resume=str(home / "run"), out=str(home / "run3"), max_steps=5,
                            model=asked(home).model.changed(n_layer=2))).fit()  # fmt: skip


def test_the_same_command_with_a_resume_goes_on_with_what_it_began(home):
    config = asked(home, resume=str(home / "run"), out=str(home / "run2"), max_steps=6)
    assert heron.Trainer(config).fit() == "finished"
    assert [record["step"] for record in report.read_log(home / "run2")[0]] == [5, 6]
    said = []
    assert heron.Trainer(config, say=said.append).fit() == "finished"
    assert said[0].startswith(f"{home / 'run2'}: finished at step 6")


def test_everything_is_said_to_who_listens(home, capsys):
    said = []
    heron.Trainer(asked(home, max_steps=6, sample_every=1, sample_tokens=3), say=said.append).fit()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert [word for word in ("model ", "step 5/6", "sample", "saved", "jumps") if word not in "\n".join(said)] == []
    assert all("\n" not in line for line in said)


# -- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch reports two threads at first, and later the number that was set. The run goes on with one."""
    held = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: held[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: held.__setitem__(0, number))


def busy(monkeypatch, seconds):
    """Trials of a number of threads take what the table says."""
    monkeypatch.setattr(threads, "_trial", lambda number: seconds[number])


@pytest.mark.parametrize("number", [-1, 100_000, 10**9])
def test_numbers_of_threads_that_cannot_be_are_refused(heron_, number, tmp_path):
    for verb in ("train --max_steps 2", "train --dry_run --max_steps 2", "estimate", "bench"):
        code, _, err = heron_(f"{verb} --threads {number} --out {tmp_path / 'run'}")
        assert (code, err.count("\n")) == (1, 1)
        assert "threads: wanted" in err
    with pytest.raises(ConfigError, match="threads: wanted"):
        heron.Trainer(heron.TrainConfig(max_steps=1, threads=number, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({4: 1.0, 1: 2.0}, (4, 1.0)),
        ({4: 1.5, 1: 1.0}, (4, 1.0)),
        ({4: 9.0, 2: 5.0, 1: 1.0}, (1, 9.0)),
        ({4: 9.0, 2: 0.9, 1: 1.0}, (2, 10.0)),
    ],
)
def test_fewer_threads_are_taken_where_they_are_much_faster(monkeypatch, seconds, expected):
    busy(monkeypatch, seconds)
    assert threads.fewer(4) == expected


@pytest.mark.usefixtures("two_threads")
def test_a_busy_machine_at_the_start_is_said_and_a_resume_keeps_the_number(home, monkeypatch):
    busy(monkeypatch, {2: 8.0, 1: 1.0})
    said = []
    config = asked(home, out=str(home / "fresh"), threads=0, max_steps=2)
    heron.Trainer(config, say=said.append).fit()
    assert any(line.startswith("threads: 1: the machine is busy: 8 times as fast as 2") for line in said)
    assert run.trainer_of(run.newest(home / "fresh"))["exact"]["threads"] == 1
    torch.set_num_threads(2)
    busy(monkeypatch, {2: 1.0, 1: 2.0})  # nobody disturbs any more
    said = []
    heron.Trainer(asked(home, out=str(home / "fresh"), threads=0, max_steps=3), say=said.append).fit()
    assert not any("threads was" in line or "machine is busy" in line for line in said)
    assert run.trainer_of(run.newest(home / "fresh"))["exact"]["threads"] == 1


@pytest.mark.usefixtures("two_threads")
def test_a_resume_on_a_busy_machine_stays_exact_and_says_what_is_faster(home, monkeypatch):
    heron.Trainer(asked(home, out=str(home / "fresh"), threads=2, max_steps=2)).fit()
    busy(monkeypatch, {2: 8.0, 1: 1.0})
    said = []
    heron.Trainer(asked(home, out=str(home / "fresh"), threads=0, max_steps=3), say=said.append).fit()
    assert any("on 1 thread this run would be 8 times as fast as on its 2" in line for line in said)
    assert run.trainer_of(run.newest(home / "fresh"))["exact"]["threads"] == 2
    said = []
    heron.Trainer(asked(home, out=str(home / "fresh"), threads=1, max_steps=4), say=said.append).fit()
    assert any("threads was 2 and is 1" in line for line in said)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("asked_for", [0, 2])
def test_steps_that_slow_down_tenfold_go_on_with_fewer_threads_unless_a_number_was_given(home, monkeypatch, asked_for):
    busy(monkeypatch, {2: 1.0, 1: 2.0})
    slow = iter([None, None, 12.0, None])

    def slowed(self, seconds):
        factor = next(slow)
        if factor:
            busy(monkeypatch, {2: 8.0, 1: 1.0})
        return factor

    monkeypatch.setattr(threads.Pace, "slowed", slowed)
    said = []
    heron.Trainer(asked(home, out=str(home / "fresh"), threads=asked_for), say=said.append).fit()
    [line] = [line for line in said if "machine is busy" in line]
    assert line.startswith("step 3: steps take 12 times as long as they did")
    kept = run.trainer_of(run.newest(home / "fresh"))["exact"]["threads"]
    records = [json.loads(text) for text in (Path(home) / "fresh" / "log.jsonl").read_text().splitlines()]
    changes = [record for record in records if "threads" in record]
    if asked_for:
        assert (kept, changes) == (2, [])
        assert "--threads 1 would be 8 times as fast" in line
    else:
        assert (kept, changes) == (1, [{"step": 3, "threads": 1, "threads_before": 2}])
        assert "going on with 1 thread, not 2" in line


@pytest.mark.usefixtures("two_threads")
def test_steps_that_slow_down_for_another_reason_change_nothing(home, monkeypatch):
    busy(monkeypatch, {2: 1.0, 1: 1.9})
    factors = iter([None, 15.0, None, None])
    monkeypatch.setattr(threads.Pace, "slowed", lambda self, seconds: next(factors))
    said = []
    heron.Trainer(asked(home, out=str(home / "fresh"), threads=0), say=said.append).fit()
    assert any("steps take 15 times as long as they did; fewer than 2 threads would not help" in line for line in said)
    assert run.trainer_of(run.newest(home / "fresh"))["exact"]["threads"] == 2


def test_a_pace_is_told_once_and_a_single_slow_step_is_none():
    pace = threads.Pace()
    assert [pace.slowed(1.0) for _ in range(20)] == [None] * 20
    assert [pace.slowed(s) for s in (30.0, 1.0, 1.0, 30.0, 40.0)] == [None] * 5
    assert pace.slowed(20.0) == 20.0
    assert [pace.slowed(20.0) for _ in range(20)] == [None] * 20


def test_waiting_threads_sleep_soon_unless_the_user_has_said_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    environment = {}
    monkeypatch.setattr(threads.os, "environ", environment)
    threads.wait_briefly()
    assert environment == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
    environment.clear()
    environment["OMP_WAIT_POLICY"] = "ACTIVE"
    threads.wait_briefly()
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE"}
