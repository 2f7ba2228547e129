"""What is due after some steps: a validation, a sampled text. Each is made first, and told when all have theirs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from heron import machine
from heron.config import TrainConfig
from heron.data.conversations import Conversations
from heron.data.packs import Packs
from heron.dist import Ranks
from heron.evaluate import evaluate, evaluate_batches, together
from heron.generation import generate
from heron.model import RWKV
from heron.tokenizer import TextStream
from heron.train import preference
from heron.train.parts import Parts, Progress


def validation(parts: Parts, progress: Progress, model: RWKV, config: TrainConfig, ranks: Ranks) -> Callable[[], None]:
    """Score this process's share of the validation data; gives what adds up those of all, and logs the score."""
    val, share = parts.corpus.val, (ranks.rank, ranks.count)
    if val is None:
        return lambda: None  # it was owed by a run that had validation data before it was stopped
    if parts.learner.pairs is not None and parts.val_packs is not None:
        return _of_pairs(parts, parts.learner.pairs_of(model), parts.val_packs, progress, config, ranks)
    precision = machine.autocast(config.dtype, torch.device(config.device))
    if parts.val_packs is not None:
        packs = parts.val_packs.each_once(config.micro_bsz)
        score = evaluate_batches(model, packs, precision, parts.learner.leaves.start, share)
    else:
        score = evaluate(
            model, val, config.ctx_len, parts.corpus.val_bytes, precision, recalled=parts.recalled_val, share=share
        )

    def tell() -> None:
        of_all = score if ranks.count == 1 else together(score, ranks.sum, parts.corpus.val_bytes)
        seconds = time.perf_counter() - progress.begun
        parts.reporter.validation(
            {"step": progress.step, "val_loss": of_all.loss, "val_bpb": of_all.bits_per_byte, "time": seconds}
        )

    return tell


def _of_pairs(
    parts: Parts, pairs: preference.Pairs, packs: Packs, progress: Progress, config: TrainConfig, ranks: Ranks
) -> Callable[[], None]:
    """:func:`validation` where answers are preferred to others."""
    sums = preference.score(pairs, packs, config, (ranks.rank, ranks.count))

    def tell() -> None:
        *of_all, n = ranks.sum(sums)
        names = ("val_loss", *(f"val_{name}" for name in preference.FIGURES))
        record = {name: value / n for name, value in zip(names, of_all, strict=True)}
        seconds = time.perf_counter() - progress.begun
        parts.reporter.validation({"step": progress.step, **record, "val_bpb": None, "time": seconds})

    return tell


def sample(parts: Parts, progress: Progress, model: RWKV, config: TrainConfig, ranks: Ranks) -> Callable[[], None]:
    """A prompt and its continuation, under the same seed each time, in the first process; gives what shows them."""
    if not ranks.is_first:
        return lambda: None
    if config.sample_prompt:
        prompt = parts.tokenizer.encode(config.sample_prompt)
    elif isinstance(parts.corpus, Conversations):
        prompt = parts.corpus.prompt.tolist()
    else:
        prompt = (parts.corpus.train if parts.corpus.val is None else parts.corpus.val)[:32].tolist()
    before = TextStream(parts.tokenizer)
    shown = "".join(map(before.push, prompt))  # but for half a character at its end, which the model may complete
    start = parts.learner.leaves.start_of_one()
    continuation = generate(model, parts.tokenizer, prompt, config.sample_tokens, seed=config.seed, state=start)
    return lambda: parts.reporter.sample(progress.step, continuation, shown)
