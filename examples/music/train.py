"""A v8 model of music, trained on two roads to one loss: by `heron train`, and by an own loop through `RWKV_x070`.

    python -m examples.music.train --data data/music --out runs/music

runs/music is the run of `heron train`; runs/music-drop-in.pth holds the weights of the other road.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import heron
from core.rwkv_training.rwkv_v8_model import RWKV_x070
from examples.music import command
from examples.music.prepare import CTX_LEN, prepared
from examples.music.vocabulary import Vocabulary
from heron.data import sequences
from heron.data.packs import Packs
from heron.evaluate import evaluate_batches
from heron.optim import lr_at, set_lr
from heron.report.log import read_log

SIZES = {"variant": "v8", "n_layer": 3, "n_embd": 128, "head_size": 32}
BATCH = 4  # samples


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/music"), help="what prepare wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/music"), help="run folder")
    steps_help = f"optimizer steps of {BATCH} samples of {CTX_LEN} ids"
    parser.add_argument("--steps", type=command.at_least(1), default=500, help=steps_help)
    parser.add_argument("--road", choices=("both", "heron-train", "drop-in"), default="both")
    options = parser.parse_args(arguments)

    data, val_data = prepared(options.data)
    settings = {
        "data": str(data),
        "val_data": str(val_data),
        "tokenizer": Vocabulary().spec,
        "out": str(options.out),
        "ctx_len": CTX_LEN,
        "micro_bsz": BATCH,
        "max_steps": options.steps,
        "lr_init": 3e-3,
        "lr_final": 1e-4,
        "weight_decay": 0.1,
        "dtype": "fp32",
        "eval_every": 200,
        "sample_every": 0,
    }
    losses = {}
    if options.road != "drop-in":
        losses["heron train"] = by_command(settings)
    if options.road != "heron-train":
        losses["drop-in"] = by_drop_in(settings)
    for road, loss in losses.items():
        print(f"{road:<12} validation loss {loss:.4f}")


def by_command(settings: dict[str, Any]) -> float:
    """Type `heron train`; the last validation loss of its log."""
    flags = settings | {f"model.{name}": size for name, size in SIZES.items()}
    words = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    print("heron", shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "heron", *words], check=False).returncode
    if code:
        sys.exit(code)  # it has said why
    _, validations = read_log(Path(settings["out"]))
    return validations[-1]["val_loss"]


def by_drop_in(settings: dict[str, Any]) -> float:
    """Train the drop-in on the same samples in the same order; its validation loss."""
    vocab_size = Vocabulary().size
    config = heron.TrainConfig(model=heron.ModelConfig(**SIZES, vocab_size=vocab_size), **settings)
    corpus = sequences.load(config.data, vocab_size, CTX_LEN, val_fraction=0, say=print)
    batches = Packs(corpus.samples, CTX_LEN, config.seed)
    torch.manual_seed(config.seed)
    model = RWKV_x070(SimpleNamespace(MODEL_NAME=None, **SIZES, vocab_size=vocab_size))
    optimizer = heron.build_optimizer(model, config.lr_init, config.weight_decay)
    begun = time.perf_counter()
    for step in range(config.total_steps):
        set_lr(optimizer, lr_at(step, config))
        tokens, targets, _, starts = batches.batch(step * BATCH, BATCH)
        loss = model.loss(tokens, targets, starts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == config.total_steps:
            seconds = time.perf_counter() - begun
            print(f"drop-in, step {step + 1}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    model.save(f"{config.out}-drop-in.pth")
    return held_out_loss(model, Path(settings["val_data"]))


def held_out_loss(model: heron.RWKV, rows: Path) -> float:
    """Nats an id, over the learned ids of a file of rows that prepare wrote."""
    corpus = sequences.load(str(rows), model.config.vocab_size, CTX_LEN, val_fraction=0)
    return evaluate_batches(model, Packs(corpus.samples, CTX_LEN, seed=0).each_once(BATCH)).loss


if __name__ == "__main__":
    command.run(main)
