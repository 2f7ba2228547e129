"""The command line: every verb on tiny data, every flag of the RWKV-LM scripts, and one line for every bad input."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import heron
from heron import cli, report, tokenizer
from heron.commands import flags, info
from heron.config import MINI_EPOCH, ModelConfig, TrainConfig, groups
from heron.data import binidx
from tests import warm

TEXT = "".join(f"Line {n} of a text that repeats itself, {n % 7} times {n % 5}.\n" for n in range(60))
SIZES = "--n_layer 2 --n_embd 32 --head_size 16 --vocab_size 256"
SMALL = f"{SIZES} --ctx_len 16 --micro_bsz 2 --threads 1 --device cpu --dtype fp32 --sample_tokens 8"
VERBS = (
    "demo",
    "prepare",
    "init",
    "train",
    "finetune",
    "generate",
    "chat",
    "eval",
    "convert",
    "merge",
    "memory",
    "info",
    "doctor",
    "plot",
    "compare",
    "estimate",
    "bench",
)


@pytest.fixture
def heron_(capsys):
    """A function: the words after `heron` -> exit code, standard output, standard error; all in this process."""

    def run(*words):
        try:
            code = cli.main(shlex.split(" ".join(words)))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    words = f"train {SMALL} --data {folder}/text.txt --out {folder}/run --max_steps 4 --save_every 2".split()
    assert cli.main(words) == 0
    return folder / "run"


@pytest.fixture
def resolved(heron_):
    """A function: flags of `heron train` -> the settings that they come to."""

    def run(*words):
        code, out, err = heron_("train", *words, "--dry_run")
        assert (code, err) == (0, "")
        return TrainConfig.from_dict(yaml.safe_load(out))

    return run


def assert_one_line(code, err, expected_code, *words):
    assert code == expected_code
    assert err.count("\n") == 1, err
    assert err.startswith("heron")
    assert "Traceback" not in err
    assert [word for word in words if word not in err] == [], err


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.lock"}


# -- settings -------------------------------------------------------------------------------------------------------


def test_every_setting_is_a_flag_in_both_spellings(resolved):
    assert resolved("--max_steps 3 --model.n_layer 2 --n_embd 64").model == heron.ModelConfig(
        n_layer=2, n_embd=64, vocab_size=256
    )
    config = resolved("--max_steps 3 --model rwkv7-0.1b --vocab_size 100 --lr_init 1e-3 --grad_checkpoint --seed 9")
    assert config.model == heron.ModelConfig.preset("rwkv7-0.1b", vocab_size=100)
    assert (config.lr_init, config.grad_checkpoint, config.seed, config.max_steps) == (1e-3, True, 9, 3)


def test_flags_override_the_file(resolved, tmp_path, trained):
    (tmp_path / "run.yaml").write_text(
        "max_steps: 7\nlr_init: 1e-3\ngrad_checkpoint: true\nval_fraction: 0.2\nmodel: {n_layer: 3, n_embd: 64}\n"
    )
    file = f"--config {tmp_path}/run.yaml"
    config = resolved(file)
    assert (config.max_steps, config.lr_init, config.model) == (7, 1e-3, heron.ModelConfig(n_layer=3, n_embd=64))
    config = resolved(file, "--lr_init 2e-3 --n_layer 5 --no-grad_checkpoint --proj_dir here --precision bf16")
    assert (config.lr_init, config.grad_checkpoint, config.out, config.dtype) == (2e-3, False, "here", "bf16")
    assert config.model == heron.ModelConfig(n_layer=5, n_embd=64)
    config = resolved(file, "--max_tokens 1000 --val_data x.txt")
    assert (config.max_steps, config.max_tokens, config.val_fraction, config.val_data) == (None, 1000, None, "x.txt")
    again = resolved(f"--config {trained}/config.yaml", "--out elsewhere")
    assert again == TrainConfig.from_dict(
        {**TrainConfig.from_yaml(trained / "config.yaml").to_dict(), "out": "elsewhere"}
    )
    wider = resolved(f"--config {trained}/config.yaml", "--n_embd 64")
    assert wider.model == heron.ModelConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=256)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--load_model x.pth", dict(model="x.pth")),
        ("--load_model 0 --model rwkv7-0.1b", dict(model=heron.ModelConfig.preset("rwkv7-0.1b"))),
        ("--proj_dir runs/x", dict(out="runs/x")),
        ("--data_file data/minipile --data_type binidx", dict(data="data/minipile")),
        ("--ctx_len 64 --micro_bsz 3", dict(ctx_len=64, micro_bsz=3)),
        ("--lr_init 6e-4 --lr_final 2e-5 --warmup_steps 7", dict(lr_init=6e-4, lr_final=2e-5, warmup_steps=7)),
        ("--beta1 0.8 --beta2 0.95 --adam_eps 1e-8", dict(beta1=0.8, beta2=0.95, adam_eps=1e-8)),
        ("--weight_decay 0.001 --grad_clip 0.5", dict(weight_decay=0.001, grad_clip=0.5)),
        ("--grad_cp 1", dict(grad_checkpoint=True)),
        ("--grad_cp 0", dict(grad_checkpoint=False)),
        ("--magic_prime 2926181", dict(magic_prime=2926181)),
        ("--micro_bsz 16 --epoch_save 2", dict(save_every=2 * MINI_EPOCH // 16)),
        ("--epoch_save 1 --micro_bsz 8 --accumulate 4", dict(save_every=1260)),
        ("--precision bf16", dict(dtype="bf16")),
        ("--precision fp32", dict(dtype="fp32")),
        ("--strategy deepspeed_stage_1 --devices 1 --num_nodes 1", {}),
        ("--strategy deepspeed_stage_2 --ds_bucket_mb 2 --enable_progress_bar True", {}),
        ("--train_stage 3 --epoch_count 999999 --epoch_begin 0", {}),
        ("--accelerator cpu", dict(device="cpu")),
        ("--random_seed 5", dict(seed=5)),
        ("--head_chunk 4096", {}),
        ("--wandb project", dict(wandb="project")),
        ("--my_testing x070 --n_layer 12 --n_embd 768 --head_size 64 --vocab_size 65536",
         dict(model=heron.ModelConfig(variant="v7"))),
        ("--my_testing x070 --variant v8 --n_layer 3", dict(model=heron.ModelConfig.preset("rwkv8-tiny", n_layer=3))),
        ("--my_testing x070 --model rwkv8-0.1b", dict(model=heron.ModelConfig.preset("rwkv8-0.1b"))),
    ],
)  # fmt: skip
def test_rwkv_lm_flags_mean_what_they_mean_there(resolved, flags, settings):
    config = resolved("--max_steps 3", flags)
    assert {name: getattr(config, name) for name in settings} == settings
    plain = resolved("--max_steps 3").to_dict()
    assert {name for name, value in config.to_dict().items() if value != plain[name]} <= {
        *settings, "accumulate", "micro_bsz", "model" if "my_testing" in flags else "",
    }  # fmt: skip


def test_rwkv_lm_counts_tokens(resolved):
    config = resolved("--my_exit_tokens 1498226207 --ctx_len 512 --micro_bsz 16")
    assert (config.max_tokens, config.max_steps) == (1498226207, None)
    assert config.total_steps == -(-1498226207 // 8192)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--my_testing x060", ["--my_testing x060", "x070"]),
        ("--devices 8", ["--devices 8", "torchrun --nproc-per-node"]),
        ("--num_nodes 2", ["--num_nodes 2", "torchrun --nnodes"]),
        ("--strategy deepspeed_stage_3", ["--strategy", "--parallel fsdp"]),
        ("--data_type numpy", ["--data_type numpy", "binidx"]),
        ("--precision fp16", ["--precision fp16", "fp32 or bf16"]),
        ("--accelerator tpu", ["--accelerator tpu", "gpu or cpu"]),
        ("--train_stage 4", ["--train_stage", "0 to 3"]),
        ("--dim_att 32", ["--dim_att 32", "128"]),
        ("--max_time 00:01:00:00", ["--max_time", "--max_hours"]),
        ("--fast_dev_run", ["--fast_dev_run", "--max_steps 1"]),
        ("--kernel a --head_chunk x", ["--head_chunk", "'x'"]),
        ("--load_partial 2", ["--load_partial", "0 to 1"]),
        ("--my_exit_tokens -1000", ["--my_exit_tokens -1000", "type --my_exit_tokens 1000"]),
        ("--init_dtype fp16", ["init_dtype", "bf16"]),
        ("--epoch_begin 7", ["--epoch_begin 7", "newest checkpoint"]),
        ("--grad_cp yes", ["--grad_cp", "'yes'"]),
        ("--random_seed x", ["--random_seed", "'x'"]),
        ("--proj_dir a --out b", ["--out b", "as a", "different values; drop one"]),
        ("--epoch_save 1 --save_every 5", ["--save_every", "--epoch_save"]),
    ],
)
def test_a_rwkv_lm_flag_that_cannot_be_honoured_is_refused_with_the_reason(heron_, flags, words):
    code, _, err = heron_("train --max_steps 3 --dry_run", flags)
    assert_one_line(code, err, 1, *words)


# -- usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(heron_, verb):
    code, out, err = heron_(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: heron {verb}")
    assert "None)" not in out
    if verb not in ("convert", "memory", "info", "doctor"):
        assert "default: " in out


def test_bench_and_estimate_name_what_they_measured(heron_, tmp_path):
    code, out, err = heron_(f"bench {SMALL} --steps 2 --accumulate 2 --tables host --json {tmp_path / 'bench.json'}")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[:-1])) <= 80
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["tokens_per_s"] == pytest.approx(2 * 2 * 16 / found["seconds"])
    assert min(found[f"{part}seconds"] for part in ("", "update_", "gradients_")) > 0
    assert found["peak_bytes"] > 50 << 20
    assert (found["config"]["tables"], found["config"]["model"]["n_layer"]) == ("host", 2)
    code, out, err = heron_(f"estimate {SMALL} --memory 1TiB")
    assert (code, err) == (0, "")
    assert out.endswith("fits in 1,024.00 GiB\n")
    assert heron_(f"estimate {SMALL} --memory lots")[0] == heron_(f"bench {SMALL} --steps 0")[0] == 1


def test_help_names_defaults(heron_):
    out = re.sub(r"\s+", " ", heron_("train --help")[1])
    assert "learning rate after the warm-up (default: 0.0006)" in out
    assert "number of blocks (default: as --model has it)" in out
    assert "share kept for validation (the end); default: 0.1 for text, 0 for binidx" in out
    assert "number of blocks (default: 12)" in re.sub(r"\s+", " ", heron_("init --help")[1])
    assert "keep this many tokens; 0: all (default: 0)" in re.sub(r"\s+", " ", heron_("generate --help")[1])


def test_every_setting_has_a_group():
    settings = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "finetune"]  # a verb's own
    settings += [f"model.{field.name}" for field in dataclasses.fields(ModelConfig)]
    grouped = [name for parts in groups.GROUPS.values() for part in parts for name in part]
    assert sorted(grouped) == sorted(settings)


@pytest.mark.parametrize("verb", ["train", "estimate", "bench"])
def test_help_shows_the_usual_flags_and_help_all_every_flag(heron_, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    code, brief, err = heron_(verb, "--help")
    assert (code, err) == (0, "")
    assert len(re.findall(r"^  -", brief, re.MULTILINE)) <= 30
    assert brief.splitlines()[-1].startswith(f"`heron {verb} --help all` lists every flag")
    assert heron_(verb, "-h")[1] == brief

    code, full, err = heron_(verb, "--help all")
    assert (code, err) == (0, "")
    assert max(map(len, (brief + full).splitlines())) <= 80
    for out in (brief, full):
        titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
        assert [title for title in titles if title in groups.GROUPS] == list(groups.GROUPS)
    known = flags.parser().parse_args([verb]).parser._option_string_actions
    listed = {flag for flag, action in known.items() if action.help != argparse.SUPPRESS}
    assert {f"--{name}" for name in groups.GROUP_OF} <= listed
    assert listed <= set(re.findall(r"--?[\w.-]+", full))
    code, _, err = heron_(verb, "--help data")
    assert_one_line(code, err, 2, "--help", "wanted all")


def test_help_lists_the_verbs_and_the_version_is_there(heron_):
    out = heron_("--help")[1]
    assert all(f"\n    {verb} " in out for verb in VERBS)
    assert heron_("--version")[1] == f"heron {heron.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["VERB"]),
        ("trian", ["unknown verb 'trian'", "Did you mean 'train'"]),
        ("train --n_layr 3", ["--n_layr", "Did you mean '--n_layer'"]),
        ("train --n_lay 3", ["--n_lay"]),
        ("train --max_steps many", ["--max_steps", "many"]),
        ("train --max_steps", ["--max_steps"]),
        ("generate x.pth --promt hi", ["Did you mean '--prompt'"]),
        ("generate x.pth --seed -1", ["--seed"]),
        ("generate x.pth --seed 99999999999999999999", ["--seed"]),
        ("init --seed x", ["--seed", "x"]),
        ("prepare", ["required"]),
        ("prepare text.txt", ["required: --out"]),
        ("prepare text.txt --out x --window 3", ["--window is a flag of --memory"]),
        ("memory", ["ACTION"]),
        ("memory build text.txt", ["required: --out"]),
        ("memory build text.txt --out x --tokeniser y", ["Did you mean '--tokenizer'"]),
        ("convert x.pth", ["required"]),
        ("eval x.pth", ["--data"]),
        ("compare runs/x --at step", ["--at", "end, tokens, time"]),
        ("doctor now", ["now"]),
    ],
)
def test_wrong_usage_is_code_2_and_one_line(heron_, command, words):
    code, _, err = heron_(command)
    assert_one_line(code, err, 2, "--help", *words)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("ctx_length: 3\nmax_steps: 3\n", 2, ["ctx_length", "Did you mean 'ctx_len'"]),
        ("max_steps: 3\nmodel: {n_layers: 3}\n", 2, ["n_layers", "Did you mean 'n_layer'"]),
        ("max_steps: three\n", 1, ["max_steps", "'three'"]),
        ("max_steps: 3\nout: 3\n", 1, ["out", "3"]),
        ("max_steps: 3\nout:\ntokenizer: [bytes]\n", 1, ["tokenizer"]),
        ("max_steps: 3\nmodel: [1]\n", 1, ["model"]),
        ("model: {n_layer: [1, 2\n", 1, ["bad.yaml"]),
        ("max_steps: 2026-13-40\n", 1, ["bad.yaml"]),
        ("", 1, ["bad.yaml"]),
        ("- 1\n", 1, ["bad.yaml", "list"]),
    ],
)
def test_a_bad_config_file(heron_, tmp_path, content, code, words):
    (tmp_path / "bad.yaml").write_text(content)
    got, _, err = heron_(f"train --config {tmp_path}/bad.yaml --dry_run")
    assert_one_line(got, err, code, *words)


def test_a_missing_config_file(heron_):
    code, _, err = heron_("train --config missing.yaml")
    assert_one_line(code, err, 1, "missing.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max_steps: 3\nseed: 1\nmax_steps: 4\n", ["'max_steps'", "line 1", "line 3"]),
        ("max_steps: 3\nmodel: {n_layer: 3, n_embd: 64, n_layer: 4}\n", ["'n_layer'", "line 2"]),
        ("max_steps: 3\nmodel:\n  variant: v8\n  rosa: {bits: 1, source: qkv, no_match: zero, bits: 1}\n", ["'bits'"]),
        ('max_steps: 3\n"max_steps": 3\n', ["'max_steps'"]),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused(heron_, tmp_path, content, words):
    (tmp_path / "bad.yaml").write_text(content)
    got, _, err = heron_(f"train --config {tmp_path}/bad.yaml --dry_run")
    assert_one_line(got, err, 1, "bad.yaml", *words)


def test_a_mapping_may_be_taken_into_another(resolved, tmp_path):
    (tmp_path / "x.yaml").write_text("max_steps: 3\nmodel: &m {n_layer: 3}\n<<: {seed: 4}\nseed: 5\n")
    assert resolved(f"--config {tmp_path}/x.yaml").seed == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 1 --seed 2", ["--seed", "twice", "1", "2"]),
        ("--n_layer 2 --model.n_layer 3", ["--n_layer", "twice"]),
        ("--micro_bsz 2 --micro-bsz=3", ["--micro_bsz", "twice"]),
        ("--grad_checkpoint --no-grad_checkpoint", ["--grad_checkpoint", "twice"]),
        ("--proj_dir a --proj_dir b", ["--proj_dir", "twice"]),
        ("--out a --out b", ["--out", "'a'", "'b'"]),
    ],
)
def test_a_flag_that_is_given_twice_is_refused(heron_, flags, words):
    code, _, err = heron_("train --max_steps 3 --dry_run", flags)
    assert_one_line(code, err, 2, *words)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--lr_init nan", 1, "lr_init: wanted float, got nan"),
        ("--val_fraction nan", 1, "val_fraction: wanted float or nothing, got nan"),
        ("--spike=nan", 1, "spike: wanted float, got nan"),
        ("--warmup_steps 1e3", 2, "--warmup_steps: wanted a whole number, got '1e3'"),
        ("--micro_bsz 1.5", 2, "--micro_bsz: wanted a whole number, got '1.5'"),
        ("--lr_init 1,5", 2, "--lr_init: wanted a number, got '1,5'"),
    ],
)
def test_what_is_no_number_is_told(heron_, flags, code, words):
    for seed in ("x", "-1", "1.5", "9" * 5000):
        found, _, err = heron_("generate x.pth --seed", seed)
        assert_one_line(found, err, 2, "--seed: wanted a whole number from 0 to 9223372036854775807, got")
    found, _, err = heron_("train --max_steps 3 --dry_run", flags)
    assert found == code
    assert_one_line(found, err, code, words)


def test_a_flag_may_be_given_twice_with_one_value_and_some_with_several(heron_, resolved, trained):
    assert resolved("--max_steps 3 --seed 4 --seed 04 --tensorboard --tensorboard").seed == 4
    code, out, _ = heron_(f"generate {trained} --prompt Line --max_tokens 9 --stop a --stop e --temperature 0")
    assert code == 0
    assert not {"a", "e"} & set(out.removeprefix("Line"))


@pytest.mark.parametrize(
    "command",
    [
        "train --max_steps 2 --data '' --out {here}/run",
        "train --max_steps 2 --data_file '' --out {here}/run",
        "train --max_steps 2 --out ''",
        "train --max_steps 2 --proj_dir=",
        "train --max_steps 2 --out '  '",
        "train --max_steps 2 --val_data '' --out {here}/run",
        "train --max_steps 2 --tokenizer '' --out {here}/run",
        "train --max_steps 2 --resume '' --out {here}/run",
        "train --max_steps 2 --model '' --out {here}/run",
        "train --max_steps 2 --config '' --out {here}/run",
        "bench --model ''",
        "estimate --data ''",
        "demo --out ''",
        "prepare '' --out {here}/x",
        "prepare {run} '' --out {here}/x",
        "prepare {run} --out ''",
        "init --out ''",
        "generate ''",
        "generate {run} --tokenizer ''",
        "chat '' ",
        "chat {run} --load ''",
        "eval {run} '' --data x",
        "eval {run} --data ''",
        "convert '' x.pth",
        "convert {run} ''",
        "info ''",
        "plot ''",
        "plot {run} --out ''",
        "compare ''",
        "compare {run} --out ''",
        "compare {run} --plot ''",
    ],
)
def test_an_empty_value_is_refused_on_every_verb(heron_, trained, tmp_path, monkeypatch, command):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = heron_(command.format(run=trained, here=tmp_path / "here"))
    assert_one_line(code, err, 2, "empty", "shell variable")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["data", "out", "val_data", "tokenizer", "resume", "model", "device"])
def test_an_empty_name_is_refused_in_a_file_and_in_python(heron_, tmp_path, name):
    for value in ("", " "):
        with pytest.raises(heron.HeronError, match=f"{name}: wanted a name or a path, got '{value}'"):
            TrainConfig(**{"max_steps": 1, name: value})
    (tmp_path / "x.yaml").write_text(f"max_steps: 1\n{name}: ''\n")
    code, _, err = heron_(f"train --config {tmp_path}/x.yaml")
    assert_one_line(code, err, 1, name, "shell variable")


def test_texts_may_be_empty(resolved, heron_, trained):
    assert resolved("--max_steps 3 --wandb '' --sample_prompt '' --load_model ''").wandb == ""
    assert heron_(f"generate {trained} --prompt '' --max_tokens 2")[0] == 0
    with pytest.raises(heron.HeronError, match="shell variable"):
        heron.load("")


@pytest.mark.parametrize(
    ("flags", "vocab_size"),
    [
        ("--tokenizer bpe:300", 300),
        ("--tokenizer integers:17 --n_layer 2", 17),
        ("--tokenizer world", 65536),
        ("--tokenizer {folder}/tok.json", 270),
        ("--tokenizer bpe:300 --vocab_size 320", 320),
        ("--tokenizer integers:17 --model rwkv8-tiny", 256),
        ("--tokenizer bpe:300 --model rwkv8-tiny", 300),
        ("--tokenizer integers:17 --my_testing x070", 17),
        ("--n_layer 2", 256),
    ],
)
def test_the_number_of_token_ids_follows_the_tokenizer(resolved, tmp_path, flags, vocab_size):
    (tmp_path / "tok.json").write_text(tokenizer.learn_bpe([TEXT], 270), encoding="utf-8")
    assert resolved("--max_steps 3", flags.format(folder=tmp_path)).model.vocab_size == vocab_size


# -- the verbs ------------------------------------------------------------------------------------------------------


def test_prepare_then_train_then_everything_else(heron_, tmp_path, text):
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": TEXT[:99]}) + "\n")
    code, out, err = heron_(f"prepare {text} {tmp_path}/more.jsonl --out {tmp_path}/data --tokenizer bytes --workers 1")
    assert (code, err) == (0, "")
    n_bytes = 2 * len(TEXT) + 99
    assert f"{n_bytes + 3:,} tokens of 3 documents" in out
    data = binidx.open_binidx(tmp_path / "data")
    assert data.tokens.tolist() == [*TEXT.encode(), 0, *TEXT.encode(), 0, *TEXT[:99].encode(), 0]

    prime = heron.data.sampling.magic_prime(n_bytes + 3, 16)
    words = f"train {SMALL} --data_file {tmp_path}/data --data_type binidx --magic_prime {prime} --max_steps 2"
    words += f" --proj_dir {tmp_path}/run"
    code, out, err = heron_(words)
    assert (code, err) == (0, "")
    assert f"magic prime {prime}" in out
    assert len(report.read_log(tmp_path / "run")[0]) == 2
    assert "finished at step 2" in heron_(words)[1]

    code, out, err = heron_(f"eval {tmp_path}/run --data {tmp_path}/data.idx --ctx_len 16")
    assert (code, err) == (0, "")
    assert f"{n_bytes + 2:,} tokens in windows of 16" in out


def test_init(heron_, tmp_path):
    code, out, err = heron_(f"init {SIZES} --variant v7 --seed 3 --out {tmp_path}/deep/x.pth")
    assert (code, err) == (0, "")
    torch.manual_seed(3)
    expected = heron.RWKV(heron.ModelConfig(variant="v7", n_layer=2, n_embd=32, head_size=16)
                          .changed(vocab_size=256)).state_dict()  # fmt: skip
    found = torch.load(tmp_path / "deep/x.pth", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "v7 L2 C32 N16 V256, " in out
    before = (tmp_path / "deep/x.pth").read_bytes()
    code, _, err = heron_(f"init {SIZES} --out {tmp_path}/deep/x.pth")
    assert_one_line(code, err, 1, "x.pth", "exists", "--out")
    assert (tmp_path / "deep/x.pth").read_bytes() == before
    code, out, _ = heron_(f"init --model rwkv8-tiny --n_layer 1 --out {tmp_path}/y.safetensors")
    assert heron.load(tmp_path / "y.safetensors").config == heron.ModelConfig.preset("rwkv8-tiny", n_layer=1)


@pytest.mark.parametrize("source", ["", "/rwkv-final.pth", "/checkpoints/step-00000004"])
def test_generate_is_the_library_s_text(heron_, trained, source):
    flags = "--max_tokens 20 --temperature 0.9 --top_p 0.8 --top_k 9 --presence_penalty 0.1 --seed 4"
    code, out, err = heron_(f"generate {trained}{source} --prompt Line {flags}")
    assert (code, err) == (0, "")
    expected = heron.generate(
        heron.load(trained), tokenizer.load("bytes"), "Line", 20, temperature=0.9, top_p=0.8, top_k=9,
        presence_penalty=0.1, seed=4,
    )  # fmt: skip
    assert out == "Line" + expected + "\n"


def test_generate_from_nothing_and_to_a_stop(heron_, trained):
    code, out, _ = heron_(f"generate {trained} --max_tokens 30 --temperature 0")
    assert code == 0
    stop = out[9:11]
    code, cut, _ = heron_(f"generate {trained} --max_tokens 30 --temperature 0 --stop", shlex.quote(stop))
    assert (code, cut) == (0, out.split(stop)[0] + "\n")


def test_the_tokenizer_is_found_beside_the_run(heron_, trained, tmp_path, text, monkeypatch):
    small = SMALL.replace(" --vocab_size 256", "")  # so that it follows the tokenizer
    words = f"train {small} --tokenizer bpe:300 --data {text} --max_steps 1 --out {tmp_path}/bpe"
    assert heron_(words)[0] == 0
    expected = heron.generate(
        heron.load(tmp_path / "bpe"), tokenizer.load(str(tmp_path / "bpe/tokenizer.json")), "Line", 9
    )
    for source in ("bpe", "bpe/rwkv-final.pth", "bpe/checkpoints/step-00000001"):
        assert heron_(f"generate {tmp_path}/{source} --prompt Line --max_tokens 9")[1] == f"Line{expected}\n"
    monkeypatch.chdir(tmp_path / "bpe" / "checkpoints")
    assert heron_("generate step-00000001 --prompt Line --max_tokens 9")[1] == f"Line{expected}\n"

    (tmp_path / "config.yaml").write_text("learning_rate: 3\n")  # another program's
    shutil.copy(trained / "rwkv-final.pth", tmp_path / "plain.pth")
    assert heron_(f"generate {tmp_path}/plain.pth --prompt Line --max_tokens 9")[0] == 0
    shutil.copy(tmp_path / "bpe/rwkv-final.pth", tmp_path / "odd.pth")
    code, _, err = heron_(f"generate {tmp_path}/odd.pth --prompt Line")
    assert_one_line(code, err, 1, "vocab_size 300", "--tokenizer")


def test_eval_is_the_library_s_score(heron_, trained, text):
    code, out, err = heron_(f"eval {trained} --data {text} --ctx_len 32")
    assert (code, err) == (0, "")
    tokens = torch.tensor([*TEXT.encode(), 0]).numpy()
    score = heron.evaluate.evaluate(heron.load(trained), tokens, 32, len(TEXT) - 1)
    assert f"{len(TEXT):,} tokens in windows of 32" in out
    assert f"loss           {score.loss:.4f} nats" in out
    assert f"perplexity     {score.perplexity:.3f}\n" in out
    assert f"bits per byte  {score.bits_per_byte:.4f}\n" in out


def test_convert_there_and_back(heron_, trained, tmp_path):
    original = (trained / "rwkv-final.pth").read_bytes()
    code, out, err = heron_(f"convert {trained}/rwkv-final.pth {tmp_path}/x.safetensors")
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path}/x.safetensors: v8 L2 C32 N16 V256" in out
    assert heron_(f"convert {tmp_path}/x.safetensors {tmp_path}/y.pth")[0] == 0
    one, other = torch.load(trained / "rwkv-final.pth"), torch.load(tmp_path / "y.pth")
    assert one.keys() == other.keys() == load_file(tmp_path / "x.safetensors").keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    code, _, err = heron_(f"convert {trained} {tmp_path}/y.pth")
    assert_one_line(code, err, 1, "y.pth", "exists")
    code, _, err = heron_(f"convert {trained} {tmp_path}/y.zip")
    assert_one_line(code, err, 1, "y.zip", ".pth, .safetensors, .gguf")
    assert not (tmp_path / "y.zip").exists()
    assert (trained / "rwkv-final.pth").read_bytes() == original


def test_info(heron_, trained, monkeypatch):
    code, out, err = heron_(f"info {trained}")
    assert (code, err) == (0, "")
    assert "variant     v8\n" in out
    assert "blocks.0" not in out
    assert "blocks.0.att.w0" in heron_(f"info {trained} --params")[1]
    monkeypatch.setattr(info, "presets", lambda: "the presets")
    assert heron_("info")[1] == "the presets\n"
    assert heron_("info rwkv8-tiny --presets")[1].startswith("the presets\nwhat        rwkv8-tiny\n")


def test_doctor(heron_):
    code, out, err = heron_("doctor")
    assert (code, err) == (0, "")
    assert heron.__version__ in out


def test_plot(heron_, trained, tmp_path):
    code, out, err = heron_(f"plot {trained} {trained} --out {tmp_path}/curve.png")
    assert (code, out, err) == (0, f"wrote {tmp_path}/curve.png\n", "")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_compare(heron_, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "*.pth"))
    for _ in range(2):  # what this command wrote, it may replace
        code, out, err = heron_(f"compare {trained} {tmp_path}/other --out {tmp_path}/t.md --plot {tmp_path}/t.png")
        assert (code, err) == (0, "")
    table = out.partition("\n\nwrote ")[0]
    assert table.startswith("| runs | seeds | val_loss | val_bpb |")
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == f"<!-- heron compare -->\n\n{table}\n"
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_demo_runs_its_own_settings(heron_, tmp_path, monkeypatch):
    demo = pytest.importorskip("heron.commands.demo")
    settings = demo.config

    def shorter(out, memory=True):
        config = settings(out, memory)
        values = dict(model=config.model.changed(n_layer=1, n_embd=64), ctx_len=32, max_steps=2, threads=1,
                      sample_tokens=4, val_fraction=0.002, device="cpu", dtype="fp32")  # fmt: skip
        return TrainConfig.from_dict({**config.to_dict(), **values})

    monkeypatch.setattr(demo, "config", shorter)
    code, out, _ = heron_(f"demo --out {tmp_path}/demo")
    assert code == 0
    assert demo.PROMPT in out
    assert f"Both curves are in {tmp_path}/demo/memory.png" in out
    assert re.search(r"[\d.]+ bits per byte with memory, [\d.]+ without", out)
    configs = [TrainConfig.from_yaml(tmp_path / name / "config.yaml").model for name in ("demo", "demo-without")]
    assert [config.memory is not None for config in configs] == [True, False]
    commands = re.findall(r"^  (heron .*)$", out, re.MULTILINE)
    assert len(commands) == 3


# -- stopped from outside -------------------------------------------------------------------------------------------


def test_a_signal_saves_and_exits_with_75_and_the_same_command_goes_on(heron_, tmp_path, text):
    words = [*f"train {SMALL} --data {text} --out {tmp_path}/run --max_steps 100000 --sample_every 0".split()]
    log = tmp_path / "run" / "log.jsonl"
    process = warm.start(["-m", "heron", *words])
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size > 500):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (75, "")
    done = report.read_log(tmp_path / "run")[0][-1]["step"]
    status = {"status": "preempted", "step": done, "checkpoint": f"step-{done:08d}"}
    assert json.loads((tmp_path / "run" / "run_status.json").read_text()) == status
    assert f"stopped by SIGTERM at step {done}; the same command goes on from here" in out
    words[words.index("100000")] = str(done + 2)
    code, out, err = heron_(*words)
    assert (code, err) == (0, "")
    assert [r["step"] for r in report.read_log(tmp_path / "run")[0]] == list(range(1, done + 3))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(trained, tmp_path):
    """A function that writes weights of some fault into tmp_path and gives their path."""
    good = (trained / "rwkv-final.pth").read_bytes()
    tensors = torch.load(trained / "rwkv-final.pth", weights_only=True)

    def make(fault):
        path = tmp_path / f"{fault}.pth"
        if fault == "empty":
            path.write_bytes(b"")
        elif fault == "truncated":
            path.write_bytes(good[: len(good) // 2])
        elif fault == "foreign":
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
        elif fault == "other_model":
            torch.save({"layer.weight": torch.ones(2, 2)}, path)
        elif fault == "list":
            torch.save([torch.ones(2)], path)
        elif fault == "lacks":
            torch.save({name: t for name, t in tensors.items() if name != "blocks.1.att.k_k"}, path)
        elif fault == "extra":
            torch.save({**tensors, "blocks.1.att.k_q": torch.ones(1)}, path)
        elif fault == "misshaped":
            torch.save({**tensors, "blocks.1.att.k_k": torch.ones(1, 1, 31)}, path)
        elif fault == "integers":
            torch.save({**tensors, "head.weight": tensors["head.weight"].int()}, path)
        return path

    return make


FAULTS = {
    "missing": ["no such file"],
    "empty": ["empty"],
    "truncated": ["not a readable .pth"],
    "foreign": ["not a readable .pth"],
    "other_model": ["layer.weight"],
    "list": ["list"],
    "lacks": ["blocks.1.att.k_k is missing"],
    "extra": ["blocks.1.att.k_q"],
    "misshaped": ["blocks.1.att.k_k", "(1, 1, 32)", "(1, 1, 31)"],
    "integers": ["head.weight", "int32"],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "command",
    [
        "generate {} --prompt a",
        "eval {} --data {text}",
        "convert {} {out}.pth",
        "info {}",
        "train --load_model {} {more}",
    ],
    ids=lambda command: command.split()[0],
)
def test_bad_weights_are_one_line_everywhere(heron_, weights, text, tmp_path, command, fault):
    path = weights(fault)
    before = contents(tmp_path)
    more = f"--max_steps 2 --data {text} --out {tmp_path}/run"
    code, _, err = heron_(command.format(path, text=text, out=tmp_path / "out", more=more))
    assert_one_line(code, err, 1, f"{fault}.pth", *FAULTS[fault])
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate {run} --prompt hi --tokenizer world", ["65536", "256"]),
        ("generate {run} --prompt hi --tokenizer {text}", ["text.txt"]),
        ("generate {run} --prompt hi --tokenizer wrld", ["wrld", "Did you mean 'world'"]),
        ("generate {run} --prompt 300 --tokenizer integers:200", ["300", "199"]),
        ("generate {run} --tokenizer integers:200", ["prompt", "empty"]),
        ("generate {run} --prompt a --temperature -1", ["temperature"]),
        ("generate {run} --prompt a --top_p 2", ["top_p"]),
        ("generate {run} --prompt a --max_tokens -2", ["max_tokens"]),
        ("generate {run} --prompt a --device cuda:9", ["cuda:9"]),
        ("generate {here} --prompt a", ["no weights here"]),
        ("eval {run} --data {here}/none.txt", ["none.txt"]),
        ("eval {run} --data {text} --tokenizer world", ["outside the vocabulary of 256"]),
        ("eval {run} --data {text} --ctx_len 0", ["ctx_len"]),
        ("eval {run} --data {here}/empty.txt", ["at least 2 tokens"]),
        ("eval {run} --data {here}/latin.txt", ["latin.txt"]),
        ("eval {run} --data {here}/bad.jsonl", ["bad.jsonl, line 1"]),
        ("eval {run} --data {here}/torn.idx", ["torn.idx"]),
        ("prepare {here}/none.txt --out {here}/x", ["none.txt"]),
        ("prepare {here}/empty.txt --out {here}/x", ["empty"]),
        ("prepare {text} --out {text}/x", ["x.bin: cannot be written", "text.txt is not a folder"]),
        ("prepare {text} --out {here}/x --workers 0", ["workers"]),
        ("init --n_embd 33 --out {here}/x.pth", ["n_embd 33", "head_size 64"]),
        ("init --variant v9 --out {here}/x.pth", ["variant", "v9"]),
        ("init --out {text}/x.pth --n_layer 1 --n_embd 64 --vocab_size 9", ["text.txt"]),
        ("init --out {here}/x.bin --n_layer 1 --n_embd 64 --vocab_size 9", ["x.bin", ".pth"]),
        ("convert {run} {text}/x.pth", ["text.txt"]),
        ("info nothing", ["nothing", "rwkv8-tiny"]),
        ("info {here}", ["no weights here"]),
        ("plot {here}", ["log.jsonl"]),
        ("plot {run} --out {here}/x.gif", ["x.gif", ".png"]),
        ("plot {run} --out {text}/x.png", ["text.txt"]),
        ("compare {here}", ["log.jsonl"]),
        ("compare {run} {run}", ["given twice"]),
        ("compare {run} --out {text}", ["text.txt", "not written by this command"]),
        ("compare {run} --plot {here}/x.gif", ["x.gif", ".png"]),
        ("train --config {here}", ["cannot be read: Is a directory"]),
        ("train --max_steps 2 --out {text}/run", ["text.txt"]),
        ("train --max_steps 2 --out {here}/r --data {here}/none.txt", ["none.txt"]),
        (
            "train --max_steps 2 --out {here}/r --data {text} --tokenizer bpe:300 --vocab_size 256",
            ["bpe:300", "--vocab_size 300"],
        ),
        ("train --out {here}/r", ["max_steps", "max_tokens"]),
        ("train --max_steps 2 --model rwkv8-tinny", ["rwkv8-tinny"]),
        ("train --max_steps 2 --out {run} --resume none", ["holds a run already"]),
        ("train --max_steps 9 --out {run} --n_layer 3 --data {text}", ["n_layer 2 (now 3)"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_damaged(heron_, trained, tmp_path, text, command, words):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 9)
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    (tmp_path / "torn.idx").write_bytes(b"MMIDIDX\0\0")
    (tmp_path / "torn.bin").write_bytes(b"abc")
    before = contents(tmp_path), contents(trained)
    code, _, err = heron_(command.format(run=trained, here=tmp_path, text=text))
    assert_one_line(code, err, 1, *words)
    after = {path: data for path, data in contents(tmp_path).items() if path.name != "tokenizer.json"}
    assert (after, contents(trained)) == before


def test_an_id_outside_the_vocabulary_in_binidx_data(heron_, tmp_path):
    binidx.write(tmp_path / "data", [[1, 2, 3] * 30, [4, 300, 5] * 30], 65536)
    code, _, err = heron_(f"train {SMALL} --data {tmp_path}/data --max_steps 2 --out {tmp_path}/run")
    assert_one_line(code, err, 1, "id 300 at position 91", "vocabulary of 256")


def test_a_damaged_checkpoint_is_a_warning_of_one_line(heron_, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000004/model.safetensors").write_bytes(b"")
    code, out, err = heron_(f"generate {tmp_path}/run --prompt Line --max_tokens 5")
    assert code == 0
    assert out.startswith("Line")
    assert_one_line(0, err, 0, "heron: warning:", "step-00000004", "damaged")


def test_text_that_the_terminal_cannot_show_is_replaced(trained, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["generate", str(trained), "--prompt", "caf\xe9", "--max_tokens", "3"]) == 0
    assert terminal.buffer.getvalue().startswith(b"caf?")


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "heron", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def test_sizes_beside_a_file_are_compared_with_it(heron_, trained):
    file = trained / "rwkv-final.pth"
    code, out, err = heron_(f"train --max_steps 3 --dry_run --load_model {file} --n_layer 2 --n_embd 32")
    assert (code, err) == (0, "")
    assert f"model: {file}" in out
    code, _, err = heron_(f"train --max_steps 3 --dry_run --load_model {file} --n_layer 3")
    assert_one_line(code, err, 1, "--n_layer 3", "has 2")


def test_a_choice_that_does_not_exist_is_named_by_its_flag(heron_, tmp_path):
    code, _, err = heron_(f"prepare {tmp_path} --on_bad_line foo")
    assert_one_line(code, err, 2, "unknown value for --on_bad_line 'foo'", "stop, skip")


def test_a_request_that_cannot_be_is_refused_before_anything_is_shown(heron_, trained):
    code, out, err = heron_(f"generate {trained} --prompt hello --max_tokens -1")
    assert out == ""
    assert_one_line(code, err, 1, "max_tokens: wanted a whole number from 0 on, got -1")


def test_tables_on_disk_lie_in_the_run_folder(heron_, trained):
    code, _, err = heron_(f"generate {trained} --prompt a --max_tokens 2 --tables disk")
    assert (code, err) == (0, "")
    [tables] = trained.glob("*.tables")
    assert tables.name.startswith("step-")
    assert not list((trained / "checkpoints").rglob("*.tables"))
