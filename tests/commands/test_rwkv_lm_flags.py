"""The official trainer's command lines, as its scripts have them, and what becomes of each of its flags."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch
import yaml

import heron
from heron import cli, report
from heron.checkpoint import read_tensors
from heron.commands import rwkv_lm_flags as flags
from heron.data import binidx
from heron.data.sampling import cubic_slot
from heron.optim import lr_at
from heron.train import loop as train

# What four scripts of BlinkDL/RWKV-LM, RWKV-v7/train_temp, give to `python train.py`: its variables filled in, and
# --kernel and --head_chunk of their later versions in the last one.
PREPARE = """--wandb "" --proj_dir out/L12-D768-x070 --data_file "data/minipile" --data_type "binidx" --vocab_size 65536
 --my_testing "x070" --ctx_len 512 --train_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0
 --head_size 64 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --my_exit_tokens 1498226207 --magic_prime 2926181
 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1"""
RUN = """--load_model "0" --wandb "Test" --proj_dir out/L12-D768-x070 --my_testing "x070" --ctx_len 512 --train_stage 3
 --epoch_count 999999 --epoch_begin 0 --data_file "data/minipile" --my_exit_tokens 1498226207 --magic_prime 2926181
 --num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9
 --beta2 0.99 --adam_eps 1e-18 --data_type "binidx" --vocab_size 65536 --weight_decay 0.001 --epoch_save 10
 --head_size 64 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
 --enable_progress_bar True --ds_bucket_mb 2"""
PREPARE_PILE = """--wandb "" --proj_dir out/L12-D768-x070
 --data_file "/mnt/nvme0n1/pile/pile_20B_tokenizer_text_document" --data_type "binidx" --vocab_size 50304
 --my_testing "x070" --ctx_len 4096 --train_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0
 --head_size 64 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --my_exit_tokens 332115325534
 --magic_prime 81082817 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1"""
RUN_PILE = """--load_model "0" --wandb "RWKV-7-Pile" --proj_dir out/L12-D768-x070 --my_testing "x070" --ctx_len 4096
 --train_stage 3 --epoch_count 999999 --epoch_begin 0
 --data_file "/mnt/nvme0n1/pile/pile_20B_tokenizer_text_document" --my_exit_tokens 332115325534 --magic_prime 81082817
 --num_nodes 1 --micro_bsz 30 --n_layer 12 --n_embd 768 --kernel "@rwkv3" --lr_init 8e-4 --lr_final 3e-5
 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type "binidx" --vocab_size 50304
 --weight_decay 0.1 --epoch_save 50 --head_size 64 --head_chunk 4096 --accelerator gpu --devices 8 --precision bf16
 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True"""

CTX, SLOTS = 16, 120  # of the small data; primes that upstream takes for them: 113 alone
SMALL = {
    "--ctx_len": str(CTX), "--n_layer": "2", "--n_embd": "64", "--micro_bsz": "4",
    "--my_exit_tokens": str(14 * 4 * CTX), "--magic_prime": "113", "--accelerator": "cpu", "--devices": "1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No picture, which takes longer than such a run, and no wandb, whether it is installed or not."""
    monkeypatch.setattr(train, "plot", lambda folders, out: None)
    monkeypatch.setitem(sys.modules, "wandb", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A function: the largest id -> the prefix of a small binidx."""
    folder = tmp_path_factory.mktemp("data")

    def make(vocab_size, slots=SLOTS):
        prefix = folder / f"{vocab_size}-{slots}"
        if not prefix.with_suffix(".idx").exists():
            ids = np.random.default_rng(vocab_size).integers(1, vocab_size, slots * CTX + 5)
            binidx.write(prefix, [ids], vocab_size)
        return str(prefix)

    return make


def shrunk(line, **changes):
    """The words of a script's line, with the values of `changes` and of SMALL in the place of its own."""
    values = SMALL | {f"--{name}": str(value) for name, value in changes.items()}
    words = shlex.split(line)
    return [values.get(flag, word) for flag, word in zip(["", *words], words, strict=False)]


def heron_(capsys, *words):
    """Exit code, output with each run of spaces and line ends as one space, error output."""
    code = cli.main(["train", *words])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def upstream_lr(step, lr_init, lr_final, warmup, exit_tokens, per_step):
    """trainer.py's formula, written out again."""
    progress = min(max((step * per_step - warmup * per_step) / (exit_tokens - warmup * per_step), 0), 1)
    ratio = lr_final / lr_init
    lr = lr_init * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * progress))
    return lr * (0.01 + 0.99 * step / warmup) if step < warmup else lr


def expected_rates(lr_init, lr_final, warmup, exit_tokens, per_step):
    """The learning rate of each step by trainer.py's formula, written out again, to the step at which it stops."""
    for step in range(exit_tokens):
        progress = (step * per_step - warmup * per_step) / (exit_tokens - warmup * per_step)
        if progress >= 1:
            return
        ratio = lr_final / lr_init
        lr = lr_init * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * max(progress, 0)))
        yield lr * (0.01 + 0.99 * step / warmup) if step < warmup else lr


@pytest.mark.parametrize(
    ("line", "vocab_size", "tokenizer", "rates", "steps"),
    [
        (RUN, 65536, "world", (6e-4, 6e-5, 10, 0.001), 182_889),
        (RUN_PILE, 50304, "integers:50304", (8e-4, 3e-5, 10, 0.1), 2_702_762),
    ],
    ids=["minipile", "pile"],
)
def test_the_scripts_mean_here_what_they_mean_there(capsys, line, vocab_size, tokenizer, rates, steps):
    line = line.replace("--accelerator gpu", "--accelerator cpu").replace("--devices 8", "--devices 1")
    assert cli.main(["train", *shlex.split(line), "--dry_run"]) == 0
    config = heron.TrainConfig.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert config.model == heron.ModelConfig(variant="v7", n_layer=12, n_embd=768, vocab_size=vocab_size)
    assert config.tokenizer == tokenizer
    assert (config.lr_init, config.lr_final, config.warmup_steps, config.weight_decay) == rates
    assert (config.total_steps, config.dtype, config.grad_checkpoint) == (steps, "bf16", True)
    assert config.out == "out/L12-D768-x070"


@pytest.mark.parametrize(
    ("prepare", "run", "vocab_size", "wandb", "without_effect"),
    [
        (PREPARE, RUN, 256, "Test", {"--ds_bucket_mb 2", "--epoch_count 999999"}),
        (PREPARE_PILE, RUN_PILE, 503, "RWKV-7-Pile", {"--kernel @rwkv3", "--head_chunk 4096"}),
    ],
    ids=["minipile", "pile"],
)
def test_the_scripts_run_with_other_paths_devices_and_sizes(
    tmp_path, capsys, data, prepare, run, vocab_size, wandb, without_effect
):
    out = tmp_path / "out"
    sizes = dict(proj_dir=out, data_file=data(vocab_size), vocab_size=vocab_size)
    code, said, err = heron_(capsys, *shrunk(prepare, **sizes))
    assert (code, err) == (0, "")
    assert f"wrote {out}/rwkv-init.pth: initial values in fp32" in said
    assert [path.name for path in out.iterdir()] == ["rwkv-init.pth"]
    written = (out / "rwkv-init.pth").read_bytes()

    code, said, err = heron_(capsys, *shrunk(run, **sizes))
    assert code == 0
    assert err.count("\n") == 1
    assert f"wandb {wandb}: the package is not installed" in err
    assert all(f"{flag}: no effect; " in said for flag in without_effect), said
    assert "start from the weights in" in said
    assert "magic prime 113" in said
    assert (out / "rwkv-init.pth").read_bytes() == written
    config = heron.TrainConfig.from_yaml(out / "config.yaml")
    rates = expected_rates(config.lr_init, config.lr_final, 10, 14 * 4 * CTX, 4 * CTX)
    assert [record["lr"] for record in report.read_log(out)[0]] == pytest.approx(list(rates), rel=1e-9)
    assert heron.load(out / "rwkv-final.pth").config == heron.load(out / "rwkv-init.pth").config


# -- one flag at a time ---------------------------------------------------------------------------------------------


@pytest.fixture
def resolved(capsys):
    """A function: flags of `heron train` -> the settings that they come to, and the lines about flags."""

    def run(flags):
        assert cli.main(["train", *shlex.split(flags), "--dry_run"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        notes = [line.removeprefix("# ") for line in out.splitlines() if line.startswith("# ")]
        return heron.TrainConfig.from_dict(yaml.safe_load(out)), notes

    return run


def test_each_flag_without_effect_is_taken_with_a_line(resolved):
    names = [*flags.NO_EFFECT, *flags.LIGHTNING_NO_EFFECT]
    config, notes = resolved("--max_steps 3 " + " ".join(f"--{name} 7" for name in names))
    assert config == resolved("--max_steps 3")[0]
    assert [note.partition(";")[0] for note in notes] == [f"--{name} 7: no effect" for name in names]
    assert all(len(note.partition("; ")[2]) > 10 for note in notes)


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        ("--epoch_begin 7 --train_stage 3", {}, "--epoch_begin 7: no effect"),
        ("--enable_progress_bar False", {}, "progress is always shown"),
        ("--enable_progress_bar True --strategy deepspeed_stage_2 --epoch_begin 0", {}, None),
        ("--benchmark", {}, "--benchmark True: no effect"),
        ("--max_epochs -1", {}, "--max_epochs -1: no effect"),
        ("--data_type utf-8", {}, "the kind of the data is detected"),
        ("--random_seed -1", {}, "the seed is --seed"),
        ("--random_seed -1 --seed 4", dict(seed=4), "the seed is --seed"),
        ("--vocab_size 0", {}, "--vocab_size 0: as without the flag"),
        ("--warmup_steps -1", dict(warmup_steps=-1), None),
        ("--wandb ''", {}, None),
        ("--load_model ''", {}, None),
        ("--load_model 0 --train_stage 2", {}, None),
        ("--precision tf32", dict(dtype="fp32"), "there is no TF32 here"),
        ("--accumulate_grad_batches 4", dict(accumulate=4), None),
        ("--dim_att 128", {}, None),
        ("--dim_att 0 --dim_ffn 0 --d_decay_lora 0", {}, None),
        ("--dim_ffn 448", dict(model=heron.ModelConfig.preset("rwkv8-tiny", ffn_dim=448)), None),
        ("--d_decay_lora 40 --d_aaa_lora 41 --d_mv_lora 42 --d_gate_lora 43",
         dict(model=heron.ModelConfig.preset("rwkv8-tiny", decay_rank=40, iclr_rank=41, value_rank=42, gate_rank=43)),
         None),
        ("--load_partial 1 --out {}/none", dict(out="{}/none"), "there is no file to load"),
        ("--load_partial 1 --load_model x.pth", dict(init_from="x.pth"), None),
        ("--load_partial 0 --load_model x.pth", dict(model="x.pth"), None),
        ("--load_model x.pth --train_stage 3", dict(model="x.pth"), "the file of --load_model is loaded"),
        ("--init_dtype bf16", dict(init_dtype="bf16"), None),
    ],
)  # fmt: skip
def test_a_flag_becomes_a_setting_or_a_line(resolved, tmp_path, given, settings, words):
    config, notes = resolved("--max_steps 3 " + given.format(tmp_path))
    settings = {name: value.format(tmp_path) if name == "out" else value for name, value in settings.items()}
    plain = resolved("--max_steps 3")[0]
    assert config == dataclasses.replace(plain, **{"model": config.model, **settings})
    assert "model" in settings or config.model == plain.model
    assert len(notes) == (words is not None)
    assert all(words in note for note in notes)


def test_the_end_of_a_run_may_be_given_by_lightnings_flag(resolved, capsys):
    config, notes = resolved("--my_exit_tokens 0 --max_steps 7")
    assert (config.max_steps, config.max_tokens, notes) == (7, None, [])
    config, _ = resolved("--my_exit_tokens 5120 --max_steps -1")
    assert (config.max_steps, config.max_tokens) == (None, 5120)
    assert cli.main(["train", "--my_exit_tokens", "0", "--max_steps", "-1"]) == 1
    assert "--my_exit_tokens 0: the run has no end" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "warmup"), [("init", -1), ("0", 10), ("12", 10), ("final", -1)])
def test_no_warm_up_is_ten_steps_after_a_numbered_file_as_there(resolved, tmp_path, file, warmup):
    (tmp_path / f"rwkv-{file}.pth").touch()
    assert resolved(f"--max_steps 3 --proj_dir {tmp_path} --train_stage 3 --warmup_steps -1")[0].warmup_steps == warmup
    assert resolved(f"--max_steps 3 --proj_dir {tmp_path} --warmup_steps -1")[0].warmup_steps == -1


def test_the_schedule_without_warm_up_is_upstreams():
    config = heron.TrainConfig(max_tokens=30 * 64, ctx_len=16, micro_bsz=4, warmup_steps=-1)
    assert [lr_at(step, config) for step in range(30)] == pytest.approx(
        list(expected_rates(config.lr_init, config.lr_final, -1, 30 * 64, 64)), rel=1e-12
    )


# -- initial values, and the file that a run starts from ------------------------------------------------------------

MODEL = "--my_testing x070 --n_layer 2 --n_embd 64 --vocab_size 256"
TRAIN = f"{MODEL} --train_stage 3 --load_model 0 --max_steps 1 --sample_every 0 --data_type binidx --ctx_len {CTX}"


@pytest.fixture
def run(tmp_path, capsys, data):
    """A function: flags -> exit code, output, error output of `heron train` in tmp_path / "run"."""

    def train_with(given):
        here = ["--proj_dir", str(tmp_path / "run"), "--data_file", data(256), "--accelerator", "cpu"]
        return heron_(capsys, *here, *shlex.split(given))

    return train_with


@pytest.fixture
def base(tmp_path, random_model):
    """A function: changes of sizes -> a model whose weights lie in bf16 as the run's rwkv-init.pth."""

    def make(**sizes):
        fresh = heron.ModelConfig(variant="v7", n_layer=2, n_embd=64, vocab_size=256)
        model = random_model(**{**fresh.to_dict(), **sizes}).to(torch.bfloat16)
        heron.save(model, tmp_path / "run" / "rwkv-init.pth")
        return model

    return make


def first_loss(folder):
    return report.read_log(folder)[0][0]["loss"]


def test_stage_1_writes_what_a_run_would_start_from(run, tmp_path):
    assert run(f"{MODEL} --train_stage 1")[0] == 0
    first = (tmp_path / "run" / "rwkv-init.pth").rename(tmp_path / "first.pth").read_bytes()
    assert run(TRAIN)[0] == 0
    assert (tmp_path / "run" / "rwkv-init.pth").read_bytes() == first


def changed(line, change):
    """A command line with `change`, a flag and its value, in the place of that flag's value."""
    flag = change.split()[0]
    return re.sub(rf" {flag} \S+", "", f" {line}") + f" {change}"


def test_stage_1_keeps_a_file_that_is_there(run, tmp_path, base):
    assert run(f"{MODEL} --train_stage 1")[0] == 0
    init = tmp_path / "run" / "rwkv-init.pth"
    written = init.read_bytes()
    code, out, err = run(f"{MODEL} --train_stage 1")
    assert (code, err, init.read_bytes()) == (0, "", written)
    assert "is there already, with these very values" in out
    for change in ("--random_seed 1", "--n_layer 3", "--init_dtype bf16", "--vocab_size 257"):
        code, _, err = run(changed(f"{MODEL} --train_stage 1", change))
        assert (code, err.count("\n"), init.read_bytes()) == (1, 1, written), change
        assert "not written over" in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--magic_prime 107", "type 113"),
        ("--load_model {}/x.pth", "not combined"),
        ("--model {}/x.pth", "not combined"),
        ("--load_model {}/x.pth --load_partial 1", "not combined"),
        ("--n_embd 65", "head_size"),
    ],
)
def test_stage_1_refuses_what_it_cannot_do_and_writes_nothing(run, tmp_path, base, given, words):
    base()
    (tmp_path / "run" / "rwkv-init.pth").rename(tmp_path / "x.pth")
    code, _, err = run(changed(f"{MODEL} --train_stage 1 --ctx_len {CTX}", given.format(tmp_path)))
    assert (code, err.count("\n")) == (1, 1)
    assert words in err
    assert not (tmp_path / "run" / "rwkv-init.pth").exists()


@pytest.mark.parametrize("again", [False, True])
def test_initial_values_in_bf16_are_the_rounded_ones(run, tmp_path, again):
    torch.manual_seed(0)
    exact = heron.RWKV(heron.ModelConfig(variant="v7", n_layer=2, n_embd=64, vocab_size=256)).state_dict()
    if again:  # by stage 1, which stores bf16 as upstream does
        assert "initial values in bf16." in run(f"{MODEL} --train_stage 1 --init_dtype bf16")[1]
    else:
        assert "start initial values in bf16, seed 0" in run(f"{TRAIN} --init_dtype bf16")[1]
    stored = read_tensors(tmp_path / "run" / "rwkv-init.pth")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if again else torch.float32}
    assert all(torch.equal(tensor.float(), exact[name].bfloat16().float()) for name, tensor in stored.items())
    assert any(not torch.equal(tensor.float(), exact[name]) for name, tensor in stored.items())


def test_init_stores_the_rounded_values_too(tmp_path, capsys):
    for flag, file in (("", "a.pth"), ("--dtype bf16", "b.pth"), ("--init_dtype bf16", "c.safetensors")):
        words = f"--variant v7 --n_layer 1 --n_embd 64 --vocab_size 99 {flag} --out {tmp_path / file}"
        assert cli.main(["init", *shlex.split(words)]) == 0
    exact, *rounded = (read_tensors(tmp_path / file) for file in ("a.pth", "b.pth", "c.safetensors"))
    assert all(torch.equal(exact[name].bfloat16(), tensors[name]) for tensors in rounded for name in exact)


def test_a_base_model_in_the_folder_is_trained_and_kept(run, tmp_path, base, data):
    model = base().float()
    kept = (tmp_path / "run" / "rwkv-init.pth").read_bytes()
    code, out, err = run(TRAIN + " --micro_bsz 1 --magic_prime 113 --precision fp32")
    assert (code, err) == (0, "")
    assert "start from the weights in" in out
    assert (tmp_path / "run" / "rwkv-init.pth").read_bytes() == kept
    start = cubic_slot(1, 113) * CTX
    tokens = torch.from_numpy(binidx.open_binidx(data(256)).tokens[start : start + CTX + 1].astype(np.int64))[None]
    assert first_loss(tmp_path / "run") == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-5)


def test_wandb_has_upstreams_names(run, monkeypatch):
    begun = []

    def init(**options):
        begun.append(options)
        return types.SimpleNamespace(id="x", log=lambda values, step: None, finish=list)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for given in (TRAIN + " --wandb ''", TRAIN.replace("--max_steps 1", "--max_steps 2 --wandb Test")):
        code, _, err = run(given)
        assert (code, err) == (0, "")
    [options] = begun
    assert options["project"] == "Test"
    assert re.fullmatch(rf"256 ctx{CTX} L2 D64 \d{{4}}(-\d\d){{5}}", options["name"])


@pytest.mark.parametrize("change", ["--n_layer 1", "--n_embd 128", "--vocab_size 300", "--dim_ffn 128", "--variant v8"])
def test_a_base_model_of_other_sizes_is_refused_and_kept(run, tmp_path, base, change):
    base()
    kept = (tmp_path / "run" / "rwkv-init.pth").read_bytes()
    code, _, err = run(changed(TRAIN, change))
    assert (code, err.count("\n")) == (1, 1)
    assert "rwkv-init.pth" in err
    assert (tmp_path / "run" / "rwkv-init.pth").read_bytes() == kept


def test_two_files_to_start_from_are_refused(run, tmp_path, base, random_model):
    base()
    kept = (tmp_path / "run" / "rwkv-init.pth").read_bytes()
    other = random_model(seed=1, **heron.load(tmp_path / "run" / "rwkv-init.pth").config.to_dict())
    heron.save(other, tmp_path / "other.pth")
    for given in (f"--load_model {tmp_path}/other.pth", f"--load_model {tmp_path}/other.pth --load_partial 1"):
        code, _, err = run(f"{TRAIN.replace('--load_model 0', '')} {given}")
        assert (code, err.count("\n")) == (1, 1)
        assert "rwkv-init.pth is there" in err
        assert (tmp_path / "run" / "rwkv-init.pth").read_bytes() == kept


@pytest.mark.parametrize("where", ["rwkv-init.pth", "rwkv-3.pth", "elsewhere.pth"])
def test_what_a_file_lacks_keeps_its_initial_values(run, tmp_path, base, where):
    lacking = ("blocks.1.att.g2", "blocks.0.ffn.x_k", "ln_out.bias")
    tensors = base().state_dict()
    file = tmp_path / ("" if where == "elsewhere.pth" else "run") / where
    (tmp_path / "run" / "rwkv-init.pth").unlink()
    torch.save({name: tensor for name, tensor in tensors.items() if name not in lacking}, file)
    kept = file.read_bytes()
    given = TRAIN if file.parent.name == "run" else TRAIN.replace("--load_model 0", f"--load_model {file}")
    if where == "rwkv-init.pth":
        code, _, err = run(given)
        assert code == 1
        assert "blocks.1.att.g2" in err
    code, out, err = run(f"{given} --load_partial 1 --lr_init 0 --lr_final 0 --precision fp32")
    assert (code, err) == (0, "")
    assert "it lacks 3 tensors, which have their initial values" in out
    assert all(name in out for name in lacking)
    assert file.read_bytes() == kept
    torch.manual_seed(0)
    fresh = heron.RWKV(heron.ModelConfig(variant="v7", n_layer=2, n_embd=64, vocab_size=256)).state_dict()
    trained = read_tensors(tmp_path / "run" / "rwkv-final.pth")
    assert all(
        torch.equal(tensor, fresh[name] if name in lacking else tensors[name].float())
        for name, tensor in trained.items()
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blocks.0.att.x_r": torch.zeros(1, 1, 32)}, "must be"),
        ({"emb.weight": torch.zeros(256, 64), "blocks.2.att.x_r": torch.zeros(1, 1, 64)}, "not part of"),
        ({"emb.weight": torch.full((256, 64), math.nan)}, "NaN"),
        ({"weight": torch.zeros(2)}, "no tensor of a v7"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_though_it_need_not_be_whole(run, tmp_path, tensors, words):
    torch.save(tensors, tmp_path / "odd.pth")
    code, _, err = run(TRAIN.replace("--load_model 0", f"--load_model {tmp_path}/odd.pth --load_partial 1"))
    assert (code, err.count("\n")) == (1, 1)
    assert words in err
