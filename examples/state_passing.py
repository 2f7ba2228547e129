"""Truncated backpropagation through time: a long text in short pieces, the state handed from each to the next.

The forward pass never forgets; gradients stop at the border of a piece, so memory stays that of one piece.
"""

import argparse
import math

import torch

import heron
from heron.data.corpora import builtin

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="optimizer steps, one a piece")
parser.add_argument("--piece", type=int, default=64, help="tokens of a piece (T)")
args = parser.parse_args()

ROWS = 8  # B texts side by side, each read from its beginning to its end
text = torch.tensor(heron.tokenizer.load("bytes").encode("\n".join(builtin("builtin:python-docs"))))
rows = text[: len(text) // ROWS * ROWS].view(ROWS, -1)

torch.manual_seed(0)
model = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, vocab_size=256))
optimizer = heron.build_optimizer(model, lr=3e-3)
state, at = None, 0
for step in range(1, args.steps + 1):
    if at + args.piece >= rows.shape[1]:
        state, at = None, 0  # the end of the texts: begin again from a zero state
    tokens, targets = rows[:, at : at + args.piece], rows[:, at + 1 : at + args.piece + 1]
    hidden, state = model.hidden_states(tokens, state)
    loss = heron.ops.linear_cross_entropy(hidden, model.head.weight, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    state, at = state.detach(), at + args.piece
    if step == 1 or step % 50 == 0 or step == args.steps:
        bits = loss.item() / math.log(2)
        print(f"step {step:4d}  {bits:.3f} bits per byte  state {state.nbytes / ROWS / 1024:.0f} KiB a text")
