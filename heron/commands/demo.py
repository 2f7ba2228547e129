"""`heron demo`: train a small RWKV-8 with ROSA memory on text that every Python carries, and its twin without."""

from __future__ import annotations

import argparse
from pathlib import Path

from heron.commands import EXIT_PREEMPTED
from heron.config import ModelConfig, RosaConfig, TrainConfig
from heron.errors import KernelError
from heron.train.stop import Preemption

PROMPT = "The `with` statement is used to "


def config(out: Path, memory: bool = True) -> TrainConfig:
    """The demo's settings. The text is small (0.4 MB), so it is passed several times under strong weight decay."""
    rosa = RosaConfig.preset("memory") if memory else None
    return TrainConfig(
        model=ModelConfig(variant="v8", n_layer=4, n_embd=192, vocab_size=512, rosa=rosa),
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
    """Train both, or go on with an earlier demo in `options.out`, generate, and draw both curves."""
    with Preemption():  # PyTorch takes seconds to load
        from heron import report
        from heron.train import Trainer

    out = Path(options.out)
    twin = out.with_name(f"{out.name}-without")
    print("Training a small RWKV-8 on the Python manual. About two minutes on two cores.\n")
    if Trainer(config(out)).fit() == "preempted":
        return EXIT_PREEMPTED
    show(out)
    print("\n\nNow its twin without memory, the same in all else.\n")
    if Trainer(config(twin, memory=False)).fit() == "preempted":
        return EXIT_PREEMPTED
    picture = report.plot([out, twin], out / "memory.png")
    with_memory, without = (report.read_log(folder)[1][-1]["val_bpb"] for folder in (out, twin))
    print(
        f"""
Of text that neither was trained on: {with_memory:.2f} bits per byte with memory, {without:.2f} without.
The one with memory may look back on all of the training text, and on what it has
read of the new text; its twin, on the last 512 tokens.

Both curves are in {picture}. Three commands to try next (in .venv/bin, if you came by `make demo`):
  heron generate {out} --prompt "Lists are " --temperature 0.8 --seed 1
  heron eval {out} --data builtin:python-docs
  heron train --data YOUR.txt --tokenizer bpe:512 --rosa memory --max_steps 800 --out runs/mine
"""
    )
    return 0


def show(out: Path) -> None:
    """Generate a text, with the manual in the model's memory."""
    import torch

    from heron import generation, tokenizer
    from heron.checkpoint import load
    from heron.data.corpora import read_documents
    from heron.ops.rosa import TokenIndex

    text_tokenizer = tokenizer.load(str(out / "tokenizer.json"))
    manual = [token for _, text in read_documents("builtin:python-docs") for token in text_tokenizer.encode(text)]
    try:
        documents = TokenIndex.of(torch.tensor(manual))
    except KernelError as error:
        documents = None
        print(f"\nIts memory begins empty, as there is no index of the manual: {error}")
    print(f"\nA sample (the prompt is: {PROMPT!r})\n")
    print(PROMPT, end="", flush=True)
    engine = generation.Engine(load(out), text_tokenizer, documents=documents)
    request = generation.Request(PROMPT, max_tokens=200, sampling=generation.Sampling(top_p=0.8))
    for piece in engine.stream(request):
        print(piece, end="", flush=True)
