"""Teach a small RWKV-7 to repeat, reverse or add, with ROSA beside its time mixing or without it.

python examples/rosa_tasks.py repeat [--without_rosa]
"""

import argparse
import random

import torch
from torch.nn.utils.rnn import pad_sequence

import heron

PLUS, MARK, END = 64, 65, 66  # after the symbols 0 to 63


def problem(task, rng):
    """Ids of a question and of its answer."""
    if task == "add":
        a, b = rng.randrange(1000), rng.randrange(1000)
        return [*map(int, str(a)), PLUS, *map(int, str(b)), MARK], [*map(int, str(a + b)), END]
    length, alphabet = (rng.randint(25, 50), 64) if task == "repeat" else (rng.randint(5, 20), 10)
    symbols = [rng.randrange(alphabet) for _ in range(length)]
    return [MARK, *symbols, MARK], [*(symbols if task == "repeat" else symbols[::-1]), END]


def batch(task, rng, size):
    """Tokens and targets (size, T); only answers have targets."""
    problems = [problem(task, rng) for _ in range(size)]
    ids = pad_sequence([torch.tensor(question + answer) for question, answer in problems], True, END)
    scored = pad_sequence([torch.arange(len(q + a)) >= len(q) for q, a in problems], True)
    return ids[:, :-1].contiguous(), ids[:, 1:].where(scored[:, 1:], -100).contiguous()


@torch.no_grad()
def accuracy(model, task):
    """Share of answer tokens that come out likeliest, each after a right beginning, in 256 fresh problems."""
    tokens, targets = batch(task, random.Random("fresh"), 256)
    return (model(tokens)[0].argmax(-1) == targets)[targets >= 0].float().mean().item()


def train(task, rosa: str | None = "qkv-4bit", seed=0, steps=200):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = heron.RWKV(heron.ModelConfig("v7", n_layer=2, n_embd=64, vocab_size=67, head_size=16, rosa=rosa))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1, cycle_momentum=False)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model.loss(*batch(task, rng, 32))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4}  loss {loss:.3f}  answers {accuracy(model, task):6.1%}", flush=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("task", nargs="?", choices=("repeat", "reverse", "add"), default="repeat")
    parser.add_argument("--without_rosa", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    train(args.task, None if args.without_rosa else "qkv-4bit", args.seed, args.steps)
