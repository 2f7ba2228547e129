"""A v8 model of music, trained on two roads to one loss: by `heron train`, and by an own loop through `RWKV_x070`.

    python -m examples.music.train --data data/music --out runs/music

runs/music is the run of `heron train`; runs/music-drop-in.pth holds the weights of the other road.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

import heron
from core.rwkv_training.rwkv_v8_model import RWKV_x070
from examples.music.scores import Vocabulary
from heron.data import sequences
from heron.data.packs import Packs
from heron.evaluate import evaluate_batches
from heron.optim import lr_at, set_lr

WIDTHS = {"variant": "v8", "n_layer": 3, "n_embd": 128, "head_size": 32}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/music"), help="what prepare wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/music"), help="run folder")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of 4 samples of 512 ids")
    parser.add_argument("--road", choices=("both", "heron-train", "drop-in"), default="both")
    options = parser.parse_args(arguments)

    vocabulary = Vocabulary()
    config = heron.TrainConfig(
        model=heron.ModelConfig(**WIDTHS, vocab_size=vocabulary.size),
        data=str(options.data / "train.jsonl"),
        val_data=str(options.data / "val.jsonl"),
        tokenizer=vocabulary.spec,
        out=str(options.out),
        ctx_len=512,
        micro_bsz=4,
        max_steps=options.steps,
        lr_init=3e-3,
        lr_final=1e-4,
        weight_decay=0.1,
        dtype="fp32",
        eval_every=200,
        sample_every=0,
    )
    losses = {}
    if options.road != "drop-in":
        losses["heron train"] = by_command(config)
    if options.road != "heron-train":
        losses["drop-in"] = by_drop_in(config)
    for road, loss in losses.items():
        print(f"{road:<12} validation loss {loss:.4f}")


def by_command(config: heron.TrainConfig) -> float:
    """Type `heron train`; the last validation loss of its log."""
    names = "data val_data tokenizer out ctx_len micro_bsz max_steps lr_init lr_final weight_decay dtype eval_every"
    flags = {name: getattr(config, name) for name in [*names.split(), "sample_every"]}
    flags |= {f"model.{name}": width for name, width in WIDTHS.items()}
    words = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    print("heron", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "heron", *words], check=True)
    log = (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["val_loss"] for line in map(json.loads, log) if "val_loss" in line][-1]


def by_drop_in(config: heron.TrainConfig) -> float:
    """Train the drop-in on the same samples in the same order; its validation loss."""
    vocab_size = Vocabulary().size
    corpus = sequences.load(config.data, vocab_size, config.ctx_len, config.val_data, say=print)
    batches = Packs(corpus.samples, config.ctx_len, config.seed)
    torch.manual_seed(config.seed)
    model = RWKV_x070(SimpleNamespace(MODEL_NAME=None, vocab_size=vocab_size, **WIDTHS))
    optimizer = heron.build_optimizer(model, config.lr_init, config.weight_decay)
    begun = time.perf_counter()
    for step in range(config.total_steps):
        set_lr(optimizer, lr_at(step, config))
        tokens, targets, _, starts = batches.batch(step * config.micro_bsz, config.micro_bsz)
        loss = model.loss(tokens, targets, starts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == config.total_steps:
            seconds = time.perf_counter() - begun
            print(f"drop-in, step {step + 1}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    model.save(f"{config.out}-drop-in.pth")
    return evaluate_batches(model, Packs(corpus.val_samples, config.ctx_len, 0).each_once(config.micro_bsz)).loss


if __name__ == "__main__":
    main()
