"""A vocabulary of integers, as of MIDI events, and pairs of (context, completion): only the completion is learned.

Each piece is four notes, the bar line, and the same notes an octave higher in reverse: the model must look back.
"""

import argparse

import torch

import heron

NOTES, OCTAVE, BAR, END = 48, 12, 60, 61
VOCAB = 62


def pieces(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (count, 9) each. A target of -100 is not learned: the context asks, it is no answer."""
    notes = torch.randint(NOTES, (count, 4), generator=generator)
    bar, end = torch.full((count, 1), BAR), torch.full((count, 1), END)
    tokens = torch.cat([notes, bar, notes.flip(1) + OCTAVE, end], dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, :4] = -100  # the notes after the first, and the bar
    return tokens[:, :-1], targets


def continued(model: heron.RWKV, context: list[int]) -> list[int]:
    """The likeliest completion: the context in one parallel pass, then a token at a time from the state."""
    with torch.no_grad():
        logits, state = model(torch.tensor([context]))
        completion = [int(logits[0, -1].argmax())]
        while completion[-1] != END and len(completion) < 8:
            logits, state = model(torch.tensor([completion[-1:]]), state)
            completion.append(int(logits[0, -1].argmax()))
    return completion


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1000, help="optimizer steps; 1000 take about a minute")
steps = parser.parse_args().steps

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
model = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, head_size=32, vocab_size=VOCAB))
optimizer = heron.build_optimizer(model, lr=3e-3, weight_decay=0.01)
for step in range(1, steps + 1):
    loss = model.loss(*pieces(32, generator))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 100 == 0 or step == steps:
        print(f"step {step:4d}  loss {loss.item():.4f}")

context = [3, 1, 4, 15, BAR]
print(f"{context} -> {continued(model, context)}, wanted {[27, 16, 13, 15, END]}")
