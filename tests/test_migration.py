"""docs/migration.md: every command and every program in it is run, on a small model and a small corpus."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch

import heron
from heron import cli
from heron.commands import rwkv_lm_flags
from heron.commands.flags import parser
from heron.data import sampling
from heron.train import loop as train

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
SMALL = {  # instead of a flag's value in the page
    "--n_layer": "2", "--n_embd": "64", "--ctx_len": "32", "--micro_bsz": "2", "--my_exit_tokens": "128",
    "--max_steps": "2", "--accelerator": "cpu", "--precision": "fp32", "--tokenizer": "bytes",
}  # fmt: skip
VOCABULARIES = {"65536": "256", "65600": "300"}
WORDS = ["heron", "river", " the", "stands", "\n", "water", "1998", "über", "and"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    assert {line[0] for line in words} == {"heron"}
    return [line[1:] for line in words]


def shrunk(words: list[str]) -> list[str]:
    """The command with small values; the prime becomes that of the corpus."""
    small = dict(SMALL)
    if "--magic_prime" in words:
        texts = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
        n_tokens = sum(len(text.encode()) + 1 for text in texts)
        small["--magic_prime"] = str(sampling.magic_prime(n_tokens, int(SMALL["--ctx_len"])))
    quick = ["--sample_every", "0"] if words[0] == "train" else []
    pairs = zip(["", *words], words, strict=False)
    return [small.get(flag, VOCABULARIES.get(value, value)) for flag, value in pairs] + quick


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory) -> Path:
    """A v7, a text, and a jsonl."""
    folder = tmp_path_factory.mktemp("migration")
    model = random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=256)
    heron.save(model.to(torch.bfloat16), folder / "rwkv7.pth")
    choice = random.Random(0)
    texts = [" ".join(choice.choices(WORDS, k=60)) for _ in range(30)]
    (folder / "text.txt").write_text(texts[0], encoding="utf-8")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_every_command_of_the_page_works_in_its_order(folder, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "plot", lambda *_: None)  # seconds, and tested elsewhere
    checks = []
    for words in commands():
        code = cli.main(shrunk(words))
        out, err = capsys.readouterr()
        assert code == 0, (words, err)
        if "--check" in words:
            checks.append((words[2], float(re.search(r"in fp32: (\S+)", out)[1])))
    assert [name for name, _ in checks] == [
        "rwkv8.pth", "larger.pth", "rwkv7-hf", "rwkv7.gguf", "rwkv8-folder", "from-gguf.pth",
    ]  # fmt: skip
    assert max(difference for _, difference in checks) == 0
    assert heron.load("runs/minipile").config.variant == "v7"
    assert heron.load("runs/v8").config.variant == "v8"
    for name in ("rwkv7.safetensors", "from-hf.pth", "from-gguf.pth"):
        tensors, old = heron.load(name).state_dict(), heron.load("rwkv7.pth").state_dict()
        for tensor in old.keys() - {f"blocks.0.att.v{i}" for i in range(3)}:
            assert tensors[tensor].dtype == torch.bfloat16
            assert torch.equal(tensors[tensor], old[tensor]), (name, tensor)


def test_the_programs_of_the_page_run(folder, monkeypatch):
    pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    monkeypatch.chdir(folder)
    if not Path("rwkv8-folder").exists():
        heron.save(heron.load("rwkv7.pth"), "rwkv8-folder", "safetensors")
    _, parts = heron.load("rwkv7.pth")(torch.tensor([[1, 2, 3]]))
    names = {"parts": parts.to_runtime()}
    for program in blocks("python"):
        exec(compile(program, "docs/migration.md", "exec"), names)
    assert names["model"](torch.tensor([[1, 2]])).logits.shape == (1, 2, 256)
    assert all(torch.equal(a, b) for a, b in zip(names["parts"], parts.to_runtime(), strict=True))


TRAIN_PY = """
    load_model wandb proj_dir random_seed data_file data_type vocab_size ctx_len epoch_steps epoch_count
    epoch_begin epoch_save micro_bsz n_layer n_embd dim_att dim_ffn lr_init lr_final warmup_steps beta1 beta2
    adam_eps grad_cp weight_decay grad_clip train_stage ds_bucket_mb head_size head_chunk load_partial
    magic_prime my_testing kernel my_exit_tokens d_decay_lora d_aaa_lora d_mv_lora d_gate_lora
"""
LIGHTNING = """
    logger enable_checkpointing default_root_dir gradient_clip_val gradient_clip_algorithm num_nodes
    num_processes devices gpus auto_select_gpus tpu_cores ipus enable_progress_bar overfit_batches
    track_grad_norm check_val_every_n_epoch fast_dev_run accumulate_grad_batches max_epochs min_epochs max_steps
    min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches
    val_check_interval log_every_n_steps accelerator strategy sync_batchnorm precision enable_model_summary
    num_sanity_val_steps resume_from_checkpoint profiler benchmark deterministic
    reload_dataloaders_every_n_epochs auto_lr_find replace_sampler_ddp detect_anomaly auto_scale_batch_size
    plugins amp_backend amp_level move_metrics_to_cpu multiple_trainloader_mode inference_mode
"""


def rows_of_flags() -> list[list[str]]:
    """The cells of the table of flags: flags, their default, the setting here, its default, what becomes of them."""
    table = PAGE.partition("| official flag | its default |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_has_every_flag_of_the_official_trainer_once_and_no_other():
    flags = [flag for row in rows_of_flags() for flag in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(flags) == sorted((TRAIN_PY + LIGHTNING).split())
    options = parser().parse_args(["train", "--max_steps", "1"]).parser._option_string_actions
    assert {f"--{flag}" for flag in flags} <= options.keys()
    theirs = {
        name.removeprefix("--") for name, action in options.items() if action.dest.startswith(rwkv_lm_flags.PREFIX)
    }
    assert theirs <= set(flags)


def test_the_table_of_flags_is_true():
    """Settings and their defaults are those of the code, and what is said to have no effect or to be refused is so."""
    defaults = {field.name: field.default for field in dataclasses.fields(heron.TrainConfig)}
    defaults = heron.ModelConfig.preset(heron.TrainConfig.model).to_dict() | defaults
    renamed = rwkv_lm_flags.RENAMED | rwkv_lm_flags.WIDTHS
    without_effect = {**rwkv_lm_flags.NO_EFFECT, **rwkv_lm_flags.LIGHTNING_NO_EFFECT}
    for cell, theirs, setting, ours, text in rows_of_flags():
        flags, name = re.findall(r"`([^`]+)`", cell), setting.strip("`")
        assert {flag in without_effect for flag in flags} == {"no effect" in text and "epoch_begin" not in flags}, flags
        assert {flag in rwkv_lm_flags.LIGHTNING_REFUSED for flag in flags} == {text.startswith("refused")}, flags
        for flag in flags:
            assert renamed.get(flag, name) == name
        if not name:
            assert not ours
            continue
        assert name in defaults
        if ours:
            value = defaults[name]
            assert ours.strip("*") == str(value) or float(ours.strip("*")) == value, name
            same = theirs.strip("*") == ours.strip("*")
            told = {"precision", "accelerator", "my_testing"} & set(flags)  # theirs is another kind of value
            if not told:  # what differs stands in bold
                assert ours.startswith("**") != same, flags
                assert theirs.startswith("**") == (bool(theirs) and not same), flags
