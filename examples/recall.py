"""Tell a model random strings once, ask for them up to a million tokens later, and draw it: recall.png. Two minutes."""

import argparse
import random
import time

import torch
from matplotlib import pyplot

import heron
from heron.data.corpora import read_documents

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TEXT = next(text for _, text in read_documents("builtin:python-docs")).encode()
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--distances", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
parser.add_argument("--strings", type=int, default=50)
options = parser.parse_args()


def told(rng):  # a question, and the 32 characters that answer it
    return b"\n#%05d: " % rng.randrange(10**5), "".join(rng.choices(LETTERS, k=32)).encode()


def other_text(rng, n):  # n bytes of the Python manual, over and over
    return (TEXT[rng.randrange(len(TEXT)) :] + TEXT * (n // len(TEXT) + 1))[:n]


def sample(rng):  # two strings are told, and the first is asked for behind some other text
    facts = [*told(rng), *told(rng)]
    return list(b"".join([*facts, other_text(rng, 136), *facts[:2]]))


def trained(memory):
    torch.manual_seed(0)
    rng = random.Random(0)
    model = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, vocab_size=256, rosa=memory))
    optimizer = heron.build_optimizer(model, lr=3e-3)
    for _ in range(options.steps):
        samples = torch.tensor([sample(rng) for _ in range(16)])
        model.loss(samples[:, :-1], samples[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def answered(model, text, state):  # 32 bytes behind `text` by greedy decoding, from a copy of the state on
    text, read, state = list(text), 0, state.clone()
    for _ in range(32):
        logits, state = model(torch.tensor([text[read:]]), state)
        read = len(text)
        text.append(int(logits[0, -1].argmax()))
    return bytes(text[-32:])


for name, memory in (("with ROSA memory", "memory"), ("without", None)):
    model, rng, shares, read = trained(memory).requires_grad_(False), random.Random(1), [], 0
    facts = [told(rng) for _ in range(options.strings)]
    _, state = model.hidden_states(torch.tensor([list(b"".join(map(b"".join, facts)))]))
    for distance in options.distances:
        for piece in torch.tensor(list(other_text(rng, distance - read))).split(4096):
            _, state = model.hidden_states(piece.unsqueeze(0), state)
        read, begun = distance, time.perf_counter()
        shares.append(sum(answered(model, question, state) == answer for question, answer in facts) / len(facts))
        ms = 1e3 * (time.perf_counter() - begun) / len(facts) / 32
        print(f"{name:16} {distance:9,} tokens later: {shares[-1]:6.1%}, {ms:.2f} ms a token", flush=True)
    pyplot.semilogx(options.distances, shares, marker="o", label=name)
pyplot.legend(title="share recalled, by tokens in between")
pyplot.savefig("recall.png")
