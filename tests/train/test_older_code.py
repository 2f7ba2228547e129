"""Runs that an older version of Heron has begun go on bit for bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from heron import cli

ROOT = Path(__file__).parents[2]
OLDER = "f702d6b52cb0109613fdde28f6cf20f545229d25"  # before modules moved to their folders and blocks became one


VARIANTS = ("v8", "v7b", "rosa-lm")
TRAIN_ALL = """
import json, sys
import heron.cli, heron.train
heron.train.plot = lambda *_: None
assert heron.__file__.startswith(sys.argv[1])
raise SystemExit(max(heron.cli.main(words) for words in json.loads(sys.argv[2])))
"""


def test_runs_of_older_code_go_on_bit_for_bit(tmp_path):
    older = unpacked(OLDER, tmp_path / "older")
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(4000)))
    settings = f"--data {tmp_path}/text.txt --tokenizer bytes --n_layer 2 --n_embd 64 --ctx_len 32 --micro_bsz 2"
    settings += " --num_workers 2"  # processes that read batches, which there are no more
    settings += " --accumulate 2 --max_steps 5 --save_every 3 --keep 9 --eval_every 4 --val_fraction 0.1 --threads 1"
    settings += " --sample_every 0"
    commands = [
        f"train --variant {variant} {settings} --device cpu --dtype fp32 --out {tmp_path}/{variant}".split()
        for variant in VARIANTS
    ]
    process = subprocess.run(
        [sys.executable, "-c", TRAIN_ALL, str(older), json.dumps(commands)],
        cwd=older, env={**os.environ, "PYTHONPATH": str(older)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr

    for variant, words in zip(VARIANTS, commands, strict=True):
        run, whole = tmp_path / variant, tmp_path / f"{variant}-whole"
        shutil.copytree(run, whole)
        shutil.rmtree(run / "checkpoints" / "step-00000005")
        (run / "rwkv-final.pth").unlink()
        assert cli.main(words) == 0
        assert losses(run) == losses(whole), variant
        now, then = (torch.load(folder / "rwkv-final.pth") for folder in (run, whole))
        assert now.keys() == then.keys()
        assert all(torch.equal(now[name], then[name]) for name in then), variant


def unpacked(commit, folder):
    """The package as it was, out of the history of this repository."""
    try:
        command = ["git", "-C", str(ROOT), "archive", commit, "heron"]
        archive = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no history of this repository back to {commit[:7]}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def losses(run):
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [[record.get(key) for key in ("step", "loss", "grad_norm", "val_loss")] for record in records]
