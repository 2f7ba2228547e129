"""The public ROSA toys on their tasks: how many tokens they get right, beside the figures that upstream's code gives.

    python benchmarks/rosa_checkpoints.py FOLDER            ten seconds on one core

The files are RWKV-v8/*.pth of BlinkDL/RWKV-LM. Problems come from Python's `random` alone, drawn in upstream's order.
`--ablations` adds what 251024 gives when parts of its ROSA are taken out or changed (twenty more).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from heron import ops
from heron.checkpoint import load_toy
from heron.model import rosa

ARITHMETIC, REVERSE, COUNTING = (
    "251024_rosaQKV_L2_digit20.pth",
    "260123_reverse_L2_only_rwkv7.pth",
    "251016_rosa_1bit_run.pth",
)
LENGTH = 128  # of the counting texts
TOGETHER = 25
ABLATIONS = {
    "no match gives 0": 5481, "output 0": 1562, "ties to the earliest": 5256, "value index r": 1212,
    "horizon 64": 5482, "horizon 32": 5464, "horizon 16": 4871, "horizon 8": 3384, "horizon 4": 2312, "horizon 1": 1515,
}  # fmt: skip
FIXED_STARTS = (3, 12, 42, 150, 525)


class Problem(NamedTuple):
    """A text, the digits it is about, and which of its characters are scored."""

    text: str
    digits: int
    scored: slice


class Score(NamedTuple):
    """What a model got right over a set of problems."""

    right: int
    tokens: int
    exact: int  # problems without a wrong token
    script_sum: int  # right tokens as upstream's script adds them up: never reset from one number of digits to the next


def arithmetic(seed: int) -> Iterator[Problem]:
    """400 sums and differences of up to 20 digits; the result's characters are scored."""
    random.seed(seed)
    for most in range(1, 21):
        for m in range(1, 2 * most):
            digits = (m, most) if m <= most else (most, 2 * most - m)
            a, b = (_number(d) for d in digits)
            sign = random.choice(["+", "-"])
            result = str(a + b if sign == "+" else a - b)
            question = f"{a}{sign}{b}="
            yield Problem(question + result, most, slice(len(question), len(question) + len(result)))


def reverse(seed: int) -> Iterator[Problem]:
    """600 numbers of up to 60 digits; their digits backwards and the end mark are scored."""
    random.seed(seed)
    for most in range(1, 61):
        for _ in range(10):
            n = str(_number(most))
            yield Problem(f"{n},{n[::-1]}#", most, slice(len(n) + 1, 2 * len(n) + 2))


def counting(starts: list[int]) -> Tensor:
    """(number of starts, 128) ids: n, n + 1, ... each followed by the separator."""
    rows = []
    for n in starts:
        text: list[int] = [10]
        while len(text) < LENGTH:
            text += [*map(int, str(n)), 10]
            n += 1
        rows.append(text[:LENGTH])
    return torch.tensor(rows)


def random_starts(seed: int) -> list[int]:
    """The 256 starts of the counting test."""
    random.seed(seed)
    return [_number(random.randint(1, 3)) for _ in range(256)]


def score(toy: torch.nn.Module, problems: list[Problem], alphabet: str) -> Score:
    """Predictions from the true prefix, for as many problems at a time as keep their activations in a cache.

    Upstream pads every text to 129; nothing of that can reach what stands before it.
    """
    is_right = []
    for start in range(0, len(problems), TOGETHER):
        texts = [problem.text for problem in problems[start : start + TOGETHER]]
        longest = max(map(len, texts))
        ids = torch.tensor([[alphabet.index(c) for c in text.ljust(longest, text[-1])] for text in texts])
        with torch.no_grad():
            is_right += (toy(ids[:, :-1])[0].argmax(2) == ids[:, 1:]).unbind()
    right = tokens = exact = script_sum = so_far = 0
    for row, (problem, after) in enumerate(zip(problems, [*problems[1:], None], strict=True)):
        hits = is_right[row][problem.scored.start - 1 : problem.scored.stop - 1]
        right, tokens, exact = right + int(hits.sum()), tokens + len(hits), exact + bool(hits.all())
        so_far += int(hits.sum())
        if after is None or after.digits != problem.digits:
            script_sum += so_far
    return Score(right, tokens, exact, script_sum)


def count(toy: torch.nn.Module, starts: list[int]) -> tuple[Tensor, float]:
    """(number of starts, 127) whether each next token is right, and the mean loss in nats."""
    ids = counting(starts)
    with torch.no_grad():
        logits = toy(ids[:, :-1])[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return logits.argmax(2) == ids[:, 1:], float(loss)


def ablated(toy: torch.nn.Module, change: str) -> AbstractContextManager:
    """`toy` with one thing about its ROSA changed for good, and what else must be in force while it runs."""
    for block in toy.blocks:
        if change == "no match gives 0":
            block.rosa.rosa = dataclasses.replace(block.rosa.rosa, no_match="zero")
        elif change == "output 0":
            block.rosa.rosa_qkv.emb.data.zero_()
        elif change.startswith("horizon "):
            block.rosa.rosa = dataclasses.replace(block.rosa.rosa, max_match=int(change.split()[1]))
    if change in ("ties to the earliest", "value index r"):
        return mock.patch.object(rosa, "follow", functools.partial(_other_follow, change == "value index r"))
    return contextlib.nullcontext()


def _other_follow(value_at_end: bool, symbols: Tensor, state: object, max_match: int | None) -> tuple[Tensor, object]:
    """In place of :func:`heron.model.rosa.follow`, for whole sequences: the value at r instead of r + 1, or ties to the
    earliest end instead of the latest."""
    q, k, v = (kind.flatten(0, 1).long() for kind in symbols.unbind(1))
    src, length = ops.rosa(q, k, max_match)
    if not value_at_end:
        lengths = torch.zeros_like(k)  # of the match that ends at each place of k
        for i in range(1, q.shape[1]):
            longer = torch.nn.functional.pad(lengths[:, :-1], (1, 0)) + 1
            lengths = longer * (k == q[:, i : i + 1])
            first = (lengths[:, :i] == length[:, i : i + 1]).byte().argmax(1)
            src[:, i] = torch.where(src[:, i] < 0, -1, first)
    following = torch.where(src < 0, -1, v.gather(1, src.clamp(min=0) if value_at_end else src + 1))
    return following.view(symbols[:, 0].shape), state


def _number(digits: int) -> int:
    return random.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="of the .pth files")
    parser.add_argument("--ablations", action="store_true", help="also 251024 with parts of its ROSA changed")
    options = parser.parse_args()

    print(f"{'run':44}  {'tokens right':>15}  {'upstream code':>14}  {'exact':>9}  {'script sum':>10}  seconds")
    for name, seed, problems, alphabet, known in (
        (ARITHMETIC, 42, arithmetic, "0123456789+-=", 5482),
        (ARITHMETIC, 43, arithmetic, "0123456789+-=", 5473),
        (REVERSE, 42, reverse, "0123456789,#", 18900),
        (REVERSE, 43, reverse, "0123456789,#", 18898),
    ):
        _report(f"{name[:-4]}, seed {seed}", options.data / name, list(problems(seed)), alphabet, known)
    _report_counting(options.data / COUNTING)
    if options.ablations:
        problems = list(arithmetic(42))
        for change, known in ABLATIONS.items():
            path = options.data / ARITHMETIC
            _report(f"251024, seed 42, {change}", path, problems, "0123456789+-=", known, change)


def _report(run: str, path: Path, problems: list[Problem], alphabet: str, known: int, change: str = "none") -> None:
    toy, start = load_toy(path), time.perf_counter()
    with ablated(toy, change):
        got = score(toy, problems, alphabet)
    seconds = time.perf_counter() - start
    counts = f"{got.right:6} of {got.tokens:5}"
    print(f"{run:44}  {counts:>15}  {known:14}  {got.exact:3} / {len(problems)}  {got.script_sum:10}  {seconds:7.1f}")


def _report_counting(path: Path) -> None:
    toy = load_toy(path)
    for run, starts, known in (
        ("251016, five fixed starts", list(FIXED_STARTS), 119 + 122 + 115 + 110 + 101),
        ("251016, random seed 0", random_starts(0), 28051),
        ("251016, random seed 1", random_starts(1), 28453),
    ):
        begun = time.perf_counter()
        hits, loss = count(toy, starts)
        seconds = time.perf_counter() - begun
        counts = f"{int(hits.sum()):6} of {hits.numel():5}"
        print(f"{run:44}  {counts:>15}  {known:14}  loss {loss:.4f}  {'':9}  {seconds:7.1f}")


if __name__ == "__main__":
    main()
