"""Every variant through the command line: train, resume the weights, describe them, generate from them."""

from __future__ import annotations

import json

import pytest
import torch

import heron
from heron import cli

TEXT = "".join(f"Line {n} of a text that repeats itself, {n % 7} times {n % 5}.\n" for n in range(60))
FAMILY = {
    "v7b": "--variant v7b",
    "v8 4x": "--variant v8 --deep_embed_4x",
    "hybrid": "--variant v8-hybrid --has_ln0",
}


@pytest.mark.parametrize("variant", FAMILY)
def test_it_trains_and_generates(tmp_path, capsys, variant):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    words = (
        f"train {FAMILY[variant]} --n_layer 1 --n_embd 32 --head_size 16 --vocab_size 256 --data {tmp_path}/text.txt "
        f"--out {out} --ctx_len 24 --micro_bsz 4 --max_steps 12 --lr_init 0.01 --warmup_steps 0 --threads 1 "
        "--device cpu --dtype bf16 --sample_tokens 4"
    )
    assert cli.main(words.split()) == 0, capsys.readouterr().err
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert losses[-1] < losses[0] - 0.5
    model = heron.load(out / "rwkv-final.pth")
    name = variant.split()[0].replace("hybrid", "v8-hybrid")
    wanted = dict(variant=name, deep_embed_4x="4x" in variant, has_ln0=True)  # ln0: from the run
    for source in (out, next((out / "checkpoints").iterdir()), out / "rwkv-final.pth"):
        config = heron.load(source).config
        assert {name: getattr(config, name) for name in wanted} == wanted
    fresh = heron.load(out / "rwkv-init.pth")
    same = {name for name, value in model.state_dict().items() if torch.equal(value, fresh.state_dict()[name])} - {
        f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")
    }
    assert not same
    text = heron.generate(model, heron.tokenizer.load("bytes"), "Line ", max_tokens=8, seed=0)
    assert isinstance(text, str)
