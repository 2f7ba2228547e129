"""The weights that a new run starts from, and that a run overwrites only its own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import heron
from heron import cli, report
from heron.checkpoint import ownership, run
from heron.errors import CheckpointError
from heron.train import base_model
from heron.train import loop as train

TEXT = "".join(f"Line {n} of a text that repeats itself, {n % 7} times {n % 5}.\n" for n in range(60))
MODEL = heron.ModelConfig(variant="v7", n_layer=1, n_embd=32, head_size=16, vocab_size=256)
SIZES = ["--variant", "v7", "--n_layer", "1", "--n_embd", "32", "--head_size", "16", "--vocab_size", "256"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of three seeds, and a text."""
    folder = tmp_path_factory.mktemp("files")
    for seed in range(3):
        torch.manual_seed(seed)
        heron.save(heron.RWKV(MODEL), folder / f"{seed}.pth")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def settings(files, tmp_path):
    def make(**changes):
        values = dict(
            model=MODEL, data=str(files / "text.txt"), out=str(tmp_path / "run"), ctx_len=16, micro_bsz=1, max_steps=2,
            threads=1, dtype="fp32", device="cpu", save_every=0, eval_every=0, val_fraction=0.0, sample_every=0,
        )  # fmt: skip
        return heron.TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def heron_(capsys, files):
    def run_(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    return run_


def put(files, out, **names):
    """Weights of a seed under a name each; returns their bytes by path."""
    out.mkdir(exist_ok=True)
    for name, seed in names.items():
        (out / f"rwkv-{name.lstrip('_')}.pth").write_bytes((files / f"{seed}.pth").read_bytes())
    return contents(out)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.exists() else {}


def first_loss(config):
    return report.read_log(config.out)[0][0]["loss"]


def loss_of(files, seed, settings, tmp_path):
    config = settings(model=str(files / f"{seed}.pth"), out=str(tmp_path / f"of-{seed}"), max_steps=1)
    heron.Trainer(config).fit()
    return first_loss(config)


@pytest.mark.parametrize(
    ("names", "seed"),
    [
        (dict(init=1), 1),
        (dict(init=0, _3=1), 1),
        (dict(_9=0, _10=2, init=1), 2),
        (dict(_0=2), 2),
    ],
    ids=["init", "numbered", "by number, not by name", "numbered alone"],
)
def test_a_run_starts_from_the_newest_weights_in_its_folder_and_keeps_them(files, settings, tmp_path, names, seed):
    before = put(files, tmp_path / "run", **names)
    config, said = settings(), []
    assert heron.Trainer(config, say=said.append).fit() == "finished"
    assert first_loss(config) == loss_of(files, seed, settings, tmp_path)
    after = contents(tmp_path / "run")
    assert {path: after[path] for path in before} == before
    newest = max(names, key=lambda name: -1 if name == "init" else int(name[1:]))
    start = tmp_path / "run" / f"rwkv-{newest.lstrip('_')}.pth"
    header = "".join(" ".join(said).split())  # a long path is broken over lines
    assert f"startfromtheweightsin{start},whichholdnomomentsandnoposition" in header

    longer, said = settings(max_steps=3), []
    assert heron.Trainer(longer, say=said.append).fit() == "finished"  # its own files it may replace
    assert any("going on from step-00000002" in line for line in said)
    assert {path: contents(tmp_path / "run")[path] for path in before} == before


def damages(path):
    """Contents that are no weights any more."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    return b"", b"no weights", whole[:3000], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


@pytest.mark.parametrize("n", range(4))
def test_damaged_weights_in_the_folder_are_passed_over_and_named(files, settings, tmp_path, n):
    before = put(files, tmp_path / "run", init=1, _8=2, _9=0)
    damaged = tmp_path / "run" / "rwkv-10.pth"
    before[damaged] = damages(files / "2.pth")[n]
    damaged.write_bytes(before[damaged])
    said = []
    assert heron.Trainer(settings(), say=said.append).fit() == "finished"
    assert first_loss(settings()) == loss_of(files, 0, settings, tmp_path)
    [line] = [line for line in said if line.startswith("passing over damaged weights: ")]
    assert "rwkv-10.pth" in line
    assert f"startfromtheweightsin{tmp_path / 'run' / 'rwkv-9.pth'}" in "".join(" ".join(said).split())
    assert {path: contents(tmp_path / "run")[path] for path in before} == before


def test_initial_values_never_take_the_place_of_damaged_weights(files, settings, tmp_path):
    put(files, tmp_path / "run", init=1, _9=0)
    damaged = tmp_path / "run" / "rwkv-9.pth"
    damaged.write_bytes(damages(files / "0.pth")[2])
    with pytest.raises(CheckpointError, match=r"rwkv-9\.pth.*newest weights in its folder: move .*--model"):
        heron.Trainer(settings()).fit()
    named = settings(model=str(tmp_path / "run" / "rwkv-init.pth"))
    assert heron.Trainer(named).fit() == "finished"
    assert first_loss(named) == loss_of(files, 1, settings, tmp_path)


@pytest.mark.parametrize("how", ["sizes", "no sizes", "partial"])
def test_the_command_line_passes_over_damaged_weights_too(files, heron_, tmp_path, how):
    put(files, tmp_path / "d", _8=1, _9=0)
    (tmp_path / "d" / "rwkv-9.pth").write_bytes(damages(files / "0.pth")[2])
    words = ["train", "--data_file", files / "text.txt", "--my_exit_tokens", "32", "--ctx_len", "16"]
    words += ["--micro_bsz", "1", "--proj_dir", tmp_path / "d", "--accelerator", "cpu", "--sample_every", "0"]
    words += {"sizes": SIZES, "no sizes": [], "partial": [*SIZES, "--load_partial", "1"]}[how]
    code, out, err = heron_(*words)
    assert code == 0, err
    assert (out + err).count("passing over damaged weights: ") == 1
    assert "".join(f"{tmp_path / 'd' / 'rwkv-8.pth'}".split()) in "".join(out.split())


@pytest.mark.parametrize(("rank", "told"), [(0, 1), (1, 0)])
def test_of_several_processes_the_first_alone_tells_of_damaged_weights(
    files, heron_, tmp_path, monkeypatch, rank, told
):
    put(files, tmp_path / "d", _8=1, _9=0)
    (tmp_path / "d" / "rwkv-9.pth").write_bytes(damages(files / "0.pth")[2])
    numbers = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, MASTER_PORT=29500)
    for name, value in dict(MASTER_ADDR="127.0.0.1", **numbers).items():
        monkeypatch.setenv(name, str(value))
    words = ["train", "--data", files / "text.txt", "--max_steps", 1, "--out", tmp_path / "d", "--device", "cpu"]
    code, out, err = heron_(*words, "--epoch_count", 1, "--dry_run")
    assert code == 0, err
    assert err.count("passing over damaged weights: ") == told
    assert out.count("# --epoch_count 1: no effect") == told


def test_weights_of_another_kind_are_whole_and_refused(files, settings, tmp_path):
    put(files, tmp_path / "run", _8=1)
    torch.save({"a": torch.zeros(3)}, tmp_path / "run" / "rwkv-9.pth")
    with pytest.raises(CheckpointError, match=r"rwkv-9\.pth"):
        heron.Trainer(settings()).fit()


def test_upstream_s_flags_start_from_the_file_and_are_compared_with_it(files, heron_, tmp_path):
    before = put(files, tmp_path / "d", init=1)
    words = ["train", "--load_model", "0", "--proj_dir", tmp_path / "d", "--data_file", files / "text.txt"]
    words += ["--my_exit_tokens", "32", "--ctx_len", "16", "--micro_bsz", "1", "--accelerator", "cpu"]
    code, _, err = heron_(*words, "--my_testing", "x070", "--n_layer", "2")
    assert (code, err.count("\n")) == (1, 1)
    assert "n_layer" in err
    assert "rwkv-init.pth" in err
    assert contents(tmp_path / "d") == before
    code, out, err = heron_(*words, "--my_testing", "x070", "--n_layer", "1", "--n_embd", "32")
    assert (code, err) == (0, "")
    assert f"fromtheweightsin{tmp_path / 'd' / 'rwkv-init.pth'}" in "".join(out.split())
    assert (tmp_path / "d" / "rwkv-init.pth").read_bytes() == (files / "1.pth").read_bytes()
    code, out, err = heron_("train", "--out", tmp_path / "d")
    assert (code, err) == (0, "")
    assert "finished at step 2; nothing to do" in out


def test_no_sizes_at_all_leave_them_to_the_file(files, heron_, tmp_path):
    put(files, tmp_path / "d", _4=1)
    words = ["--data", files / "text.txt", "--max_steps", "1", "--ctx_len", "16", "--sample_every", "0"]
    code, out, err = heron_("train", "--out", tmp_path / "d", *words)
    assert (code, err) == (0, "")
    assert "v7 L1 C32 N16 V256" in out


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (dict(init=1), dict(model=MODEL.changed(n_layer=2)), ["n_layer 1 (asked for: 2)", "--model", "rwkv-init.pth"]),
        (dict(init=1), dict(model=MODEL.changed(variant="v8")), ["variant v7 (asked for: v8)"]),
        (dict(_5=1), dict(model=MODEL.changed(vocab_size=300)), ["vocab_size 256 (asked for: 300)", "rwkv-5.pth"]),
        (dict(_5=1, _05=2), {}, ["rwkv-05.pth", "rwkv-5.pth", "--model"]),
        (dict(init=1), dict(model="{files}/2.pth"), ["rwkv-init.pth is there", "drop --model", "2.pth --out"]),
        (dict(final=1), {}, ["rwkv-final.pth", "--out", "--model"]),
        (dict(_7=0, final=1), {}, ["rwkv-final.pth", "--out"]),
        (dict(x070_base=1), {}, ["rwkv-x070_base.pth", "--model"]),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_type(files, settings, tmp_path, names, changes, words):
    before = put(files, tmp_path / "run", **names)
    if isinstance(changes.get("model"), str):
        changes = dict(model=changes["model"].format(files=files))
    for _ in range(2):  # the first refusal must not make the folder look like a run's
        with pytest.raises(CheckpointError) as caught:
            heron.Trainer(settings(**changes)).fit()
        assert [word for word in words if word not in str(caught.value)] == []
    left = {path: data for path, data in contents(tmp_path / "run").items() if path.name != "run.lock"}
    left.pop(tmp_path / "run" / "run_status.json", None)
    assert left == before


@pytest.mark.parametrize("name", ["RWKV-init.PTH", "base.Safetensors", "rwkv-7.GGUF"])
def test_weights_whose_ending_is_in_capitals_are_not_passed_over(settings, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(b"weights")
    right = Path(name).with_suffix(Path(name).suffix.lower()).name
    with pytest.raises(CheckpointError, match=f"holds {name}, .* rename it to end in .*, and type --model .*{right};"):
        heron.Trainer(settings()).fit()
    assert (tmp_path / "run" / name).read_bytes() == b"weights"


def test_a_damaged_file_is_refused_by_name_and_kept(files, settings, tmp_path):
    put(files, tmp_path / "run", init=0)
    (tmp_path / "run" / "rwkv-3.pth").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(CheckpointError, match=r"rwkv-3\.pth"):
        heron.Trainer(settings()).fit()
    assert (tmp_path / "run" / "rwkv-3.pth").read_bytes() == b"PK\x03\x04 and more"


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "log.jsonl", "train_log.txt", "tokenizer.json", "loss.png", "samples/a.txt", "run_status.json"],
)
def test_files_of_another_program_are_not_written_over(files, settings, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("of another program")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name.partition('/')[0]} is there.* name another --out"):
            heron.Trainer(settings()).fit()
    assert contents(tmp_path / "run") == {path: b"of another program"}


def test_the_folder_of_an_official_run_is_refused_with_the_command_that_goes_on_elsewhere(files, settings, tmp_path):
    put(files, tmp_path / "run", init=0, _0=1, _1=2)
    (tmp_path / "run" / "train_log.txt").write_text("0 3.141593 23.14 0.00060000 2026-01-01 00:00:00.0 0\n")
    before = contents(tmp_path / "run")
    command = f"--model {tmp_path}/run/rwkv-1.pth --out {tmp_path}/run-2"
    with pytest.raises(CheckpointError, match=command):
        heron.Trainer(settings()).fit()
    config = settings(model=str(tmp_path / "run" / "rwkv-1.pth"), out=str(tmp_path / "run-2"))
    assert heron.Trainer(config).fit() == "finished"
    assert contents(tmp_path / "run") == before


def test_an_out_that_is_a_file(settings, tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        heron.Trainer(settings()).fit()
    assert (tmp_path / "run").read_text() == "x"


def test_a_start_that_failed_may_be_made_again_with_other_sizes(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_loop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            heron.Trainer(settings()).fit()
    assert ownership.is_own(tmp_path / "run" / "rwkv-init.pth")
    assert base_model.candidates(tmp_path / "run") == []
    assert heron.Trainer(settings(model=MODEL.changed(n_layer=2))).fit() == "finished"
    assert heron.load(tmp_path / "run" / "rwkv-init.pth").config.n_layer == 2


def test_a_base_model_that_takes_the_place_of_the_run_s_own_is_started_from(files, settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_loop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            heron.Trainer(settings()).fit()
    put(files, tmp_path / "run", init=2)
    assert heron.Trainer(settings()).fit() == "finished"
    assert first_loss(settings()) == loss_of(files, 2, settings, tmp_path)
    assert (tmp_path / "run" / "rwkv-init.pth").read_bytes() == (files / "2.pth").read_bytes()


def test_a_run_of_an_older_heron_or_without_its_lock_is_a_run(settings, tmp_path):
    heron.Trainer(settings()).fit()
    for lock in ("", None):
        (tmp_path / "run" / "run.lock").write_text("") if lock == "" else (tmp_path / "run" / "run.lock").unlink()
        steps = 3 if lock == "" else 4
        assert heron.Trainer(settings(max_steps=steps)).fit() == "finished"
        assert ownership.is_own(tmp_path / "run" / "rwkv-final.pth")


def test_a_final_file_that_was_put_into_a_run_is_kept(files, settings, tmp_path):
    heron.Trainer(settings()).fit()
    put(files, tmp_path / "run", final=1)
    with pytest.raises(CheckpointError, match=r"rwkv-final\.pth is there"):
        heron.Trainer(settings(max_steps=3)).fit()
    assert (tmp_path / "run" / "rwkv-final.pth").read_bytes() == (files / "1.pth").read_bytes()


def test_weights_are_loaded_where_all_checkpoints_are_damaged_but_the_final_file_is_whole(settings, tmp_path):
    heron.Trainer(settings()).fit()
    newest = run.newest(tmp_path / "run")
    (newest / run.MODEL).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"taking rwkv-final\.pth"):
        model = heron.load(tmp_path / "run")
    final = torch.load(tmp_path / "run" / "rwkv-final.pth", weights_only=True)
    assert all(torch.equal(final[name], tensor) for name, tensor in model.state_dict().items())
    (newest / run.MANIFEST).write_text(json.dumps({}))
    with pytest.warns(UserWarning, match=r"taking rwkv-final\.pth"):
        heron.load(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*type --model .*rwkv-final\.pth and another"):
        heron.Trainer(settings()).fit()
    (tmp_path / "run" / "rwkv-final.pth").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        heron.load(tmp_path / "run")
