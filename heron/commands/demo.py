"""`heron demo`: train a small RWKV-8 on text that every Python carries, and show what it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.commands import EXIT_PREEMPTED
from heron.config import ModelConfig, TrainConfig
from heron.train.stop import Preemption

PROMPT = "The `with` statement is used to "


def config(out: Path) -> TrainConfig:
    """The demo's settings. The text is small (0.4 MB), so it is passed several times under strong weight decay."""
    return TrainConfig(
        model=ModelConfig(variant="v8", n_layer=4, n_embd=192, vocab_size=512),
        data="builtin:python-docs",
        tokenizer="bpe:512",
        out=str(out),
        ctx_len=512,
        micro_bsz=2,
        max_steps=800,
        lr_init=3e-3,
        lr_final=1e-4,
        warmup_steps=20,
        weight_decay=1.5,
        eval_every=200,
        save_every=200,
        sample_every=200,
        sample_prompt=PROMPT,
        sample_tokens=150,
    )


def run(options: argparse.Namespace) -> int:
    """Train, or go on with an earlier demo in `options.out`, and generate."""
    with Preemption():  # PyTorch takes seconds to load
        from heron import generation, tokenizer
        from heron.checkpoint import load
        from heron.train import Trainer

    out = Path(options.out)
    print("Training a small RWKV-8 on the Python reference manual. About three minutes on two cores.\n")
    status = Trainer(config(out)).fit()
    if status == "preempted":
        return EXIT_PREEMPTED
    model = load(out)
    text_tokenizer = tokenizer.load(str(out / "tokenizer.json"))
    print(f"\nA sample (the prompt is: {PROMPT!r})\n")
    print(PROMPT, end="", flush=True)
    sampling = generation.Sampling(top_p=0.8)
    for piece in generation.stream(model, text_tokenizer, PROMPT, max_tokens=200, sampling=sampling):
        print(piece, end="", flush=True)
    print(
        f"""

The curve is in {out / "loss.png"}. Three commands to try next (in .venv/bin, if you came by `make demo`):
  heron generate {out} --prompt "Lists are " --temperature 0.8 --seed 1
  heron eval {out} --data builtin:python-docs
  heron train --data YOUR.txt --tokenizer bpe:512 --max_steps 800 --out runs/mine
"""
    )
    return 0
