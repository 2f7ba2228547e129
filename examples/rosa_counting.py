"""Teach a network whose only memory is ROSA to count on: 41 42 43 ... Upstream's task of 251014, trained by bit flips.

python examples/rosa_counting.py
"""

import argparse
import math
import random

import torch
from torch.nn.functional import cross_entropy

from heron.model.rosa_toys import SelfToy

SPACE, LENGTH = 10, 128  # after the digits 0-9; tokens of a sequence


def sequence(rng):
    """Numbers of one, two or three digits from a random one on, a space before and after each."""
    n_digits = rng.randint(1, 3)
    number = rng.randint(0 if n_digits == 1 else 10 ** (n_digits - 1), 10**n_digits - 1)
    ids = [SPACE]
    while len(ids) < LENGTH:
        ids += [*map(int, str(number)), SPACE]
        number += 1
    return ids[:LENGTH]


def loss_of(model, rng, size):
    """Mean cross entropy over all tokens of `size` sequences."""
    ids = torch.tensor([sequence(rng) for _ in range(size)])
    logits, _ = model(ids[:, :-1])
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(seed=0, steps=1000, batch=128):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = SelfToy(vocab_size=11, n_embd=32)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        optimizer.zero_grad()
        loss = loss_of(model, rng, batch)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4}  loss {loss:.3f}", flush=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="1000 take about 15 minutes on two cores")
    args = parser.parse_args()
    model = train(args.seed, args.steps)
    with torch.no_grad():
        print(f"256 fresh sequences: loss {loss_of(model, random.Random('fresh'), 256):.3f}")
