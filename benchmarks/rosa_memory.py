"""The index of ROSA's memory: how fast it is built and asked, how large it is on disk and while it is built.

``python benchmarks/rosa_memory.py`` takes `builtin:python-stdlib` in World ids; ``--data FOLDER --glob "*.py,*.md"``
takes other text. One thread. Times of building are of one run, in a process of its own; its highest resident size is
printed beside what it had before it began. The other times are best of `--rounds`. A query is an id of a text, looked
for with the ids before it; many are asked at once, and then each in a call of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from heron import tokenizer
from heron.data.corpora import Reading, read_documents
from heron.data.prepare import encode_document
from heron.data.recalled import Rules, answers
from heron.data.token_index import build, read
from heron.ops.rosa.memory import TokenStream

QUERIES = 100_000


def best(rounds: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def matching(tokens: np.ndarray) -> None:
    """Read all tokens into a stream, as building an index does."""
    stream = TokenStream(impl="cpu")
    for first in range(0, len(tokens), 1 << 20):
        stream.read(torch.from_numpy(tokens[first : first + (1 << 20)].astype(np.int64)))


def resident() -> int:
    """The highest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def built(source: str, spec: str, reading: Reading, out: Path, found: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    world = tokenizer.load(spec)
    world.encode("loads the table")
    matching(np.zeros(2, np.uint16))
    before, start = resident(), time.perf_counter()
    build(out, [source], world, reading=reading)
    found.put((time.perf_counter() - start, before, resident()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="builtin:python-stdlib", help="what heron prepare reads")
    parser.add_argument("--glob", help="files of a folder")
    parser.add_argument("--tokenizer", default="world")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of the matching (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reading, spec = Reading(glob=args.glob), args.tokenizer
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out, found = Path(folder, "docs.memory"), context.SimpleQueue()
        process = context.Process(target=built, args=(args.data, spec, reading, out, found))
        process.start()
        seconds, before, peak = found.get()
        process.join()
        known = tokenizer.load(spec)
        index = read(out, known)
        tokens, n = index.index.parts[0].numpy(), index.n_tokens
        print(f"{args.data}, {spec}: {n:,} tokens of {index.n_documents:,} documents; torch {torch.__version__}")
        print(f"{'whole build':<34}{seconds:9.1f} s, {n / seconds / 1e6:.2f} M tokens/s, reading and encoding in it")
        print(f"{'highest memory while building':<34}{peak / 2**20:9.0f} MiB, {before / 2**20:.0f} of them before it")
        print(f"{'file':<34}{out.stat().st_size / n:9.2f} bytes a token, names in it")
        taken = best(args.rounds, lambda: matching(tokens))
        print(f"{'the matching of it':<34}{n / taken / 1e6:9.2f} M tokens/s")
        some = torch.from_numpy(tokens[:200_000].astype(np.int64))
        taken = best(args.rounds, lambda: TokenStream(impl="torch").read(some))
        print(f"{'in plain PyTorch, the first 200,000':<34}{len(some) / taken / 1e6:9.2f} M tokens/s")
        rules = Rules()
        part = tokens[: 4 << 20]
        taken = best(args.rounds, lambda: answers(part, rules))
        print(f"{f'answers for training, {rules.n_matches} matches':<34}{len(part) / taken / 1e6:9.2f} M tokens/s")
        queries = torch.from_numpy(other(known))
        for name, ids in (("text of it", torch.from_numpy(tokens[n // 2 : n // 2 + QUERIES].astype(np.int64))),
                          ("other text", queries)):  # fmt: skip
            for n_found in (1, 2):
                taken = best(args.rounds, lambda ids=ids, n_found=n_found: index.index.find(ids, len(ids), n_found))
                print(f"{f'query, {name}, {n_found} matches':<34}{1e6 * taken / len(ids):9.2f} us")
        one = queries[:64]
        taken = best(2000, lambda: index.index.find(one, 1, 2))
        print(f"{'query, one call each':<34}{1e6 * taken:9.2f} us")


def other(known: tokenizer.Tokenizer) -> np.ndarray:
    """Ids of the text of the manual, as many as are asked for or there are."""
    ids = [encode_document(known, name, text, known.vocab_size) for name, text in read_documents("builtin:python-docs")]
    return np.concatenate(ids)[:QUERIES].astype(np.int64)


if __name__ == "__main__":
    main()
