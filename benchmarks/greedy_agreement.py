"""What weights of codes change in a trained model's texts. ``python benchmarks/greedy_agreement.py MODEL --data TEXT``

Prompts are cut from a text at even distances. Each is gone on from greedily, with the weights as --dtype has them, in 8
bits and in 4: how many texts are the same to the last token, and how many tokens are up to where they part; what comes
behind is not compared. All are compared with fp32 too: rounding alone parts the texts of a model that is not sure. The
loss of each on the text stands beside it. Prompts are read side by side, as sequences; what is written behind them is
written by steps of --rows texts, on a GPU by default of one, as `heron generate` does.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time

import torch
from timing import device_of

import heron
from heron import evaluate, machine
from heron.commands.sources import tokenizer_of
from heron.data.corpora import Reading
from heron.data.loader import load_tokens
from heron.generation import Engine, Request, Sampling, Snapshot
from heron.model.coded import BITS, quantize_for_running
from heron.tokenizer import Tokenizer

READ_AT_ONCE = 32  # prompts


@torch.inference_mode()
def read(model: heron.RWKV, prompts: list[list[int]]) -> list[Snapshot]:
    """All prompts, which are equally long, but for the last token of each."""
    snapshots = []
    for begin in range(0, len(prompts), READ_AT_ONCE):
        some = torch.tensor(prompts[begin : begin + READ_AT_ONCE], device=model.emb.weight.device)
        state = model.hidden_states(some[:, :-1])[1]
        snapshots += [Snapshot(state.of([i]), (ids[-1],)) for i, ids in enumerate(some.tolist())]
    return snapshots


def greedy(
    model: heron.RWKV, tokenizer: Tokenizer, prompts: list[list[int]], n_tokens: int, rows: int
) -> list[list[int]]:
    """The ids that the model goes on with behind each prompt, `rows` texts side by side."""
    engine = Engine(model, tokenizer, rows)
    texts: list[list[int]] = [[] for _ in prompts]
    requests = [
        Request(max_tokens=n_tokens, sampling=Sampling(temperature=0), after=after) for after in read(model, prompts)
    ]
    for piece in engine.run(requests):
        if piece.token is not None:
            texts[piece.request].append(piece.token.id)
    return texts


def same(one: list[int], other: list[int]) -> int:
    """How many ids two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a weights file, a checkpoint or a run folder")
    parser.add_argument("--data", required=True, help="a text that the model was not trained on")
    parser.add_argument("--tokenizer")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, help="texts side by side; default: 8, and on a GPU 1, which codes are for")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="that are written behind it")
    parser.add_argument(
        "--scored", type=int, default=16384, help="tokens that the loss is of, from the text's begin on"
    )
    args = parser.parse_args()
    device = device_of(parser, args.device)
    rows = args.rows or (8 if device.type == "cpu" else 1)
    model = heron.load(args.model, machine.DTYPES[args.dtype]).to(device)
    tokenizer = tokenizer_of(args.model, args.tokenizer, model.config.vocab_size)
    tokens, _ = load_tokens(args.data, tokenizer, model.config.vocab_size, Reading(), lambda text: None)
    distance = (len(tokens) - args.prompt) // args.prompts
    prompts = [tokens[i * distance :][: args.prompt].tolist() for i in range(args.prompts)]
    models = {args.dtype: model, "fp32": heron.load(args.model, torch.float32).to(device)}
    models |= {weights: quantize_for_running(copy.deepcopy(model), device, weights) for weights in BITS}
    start = time.perf_counter()
    texts = {name: greedy(one, tokenizer, prompts, args.tokens, rows) for name, one in models.items()}
    taken = f"by steps of {rows}, in {time.perf_counter() - start:.0f} s in all"
    print(f"{args.model}: {args.prompts} prompts of {args.prompt} tokens, {args.tokens} tokens behind each, {taken}")
    for one, other in itertools.combinations(texts, 2):
        pairs = list(zip(texts[one], texts[other], strict=True))
        whole = sum(a == b for a, b in pairs) / len(prompts)
        alike = sum(same(a, b) for a, b in pairs) / sum(map(len, texts[other]))
        before = f"{100 * alike:5.1f} % of tokens before they part"
        print(f"{one}, {other:<8}{100 * whole:5.1f} % are the same text, {before}")
    scored = tokens[: args.scored + 1]
    losses = (f"{name} {evaluate.evaluate(one, scored, 1024).loss:.4f}" for name, one in models.items())
    print(f"loss of {len(scored) - 1:,} tokens: {', '.join(losses)}")


if __name__ == "__main__":
    main()
