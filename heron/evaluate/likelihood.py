"""Loss, perplexity and bits per byte of a text, and how likely one text is after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from heron.checkpoint.architecture import in_one_dtype
from heron.config import RosaConfig
from heron.data.recalled import PIECE, Recalled, Rules, answers
from heron.errors import ConfigError, DataError, did_you_mean
from heron.generation.decoder import Decoder
from heron.generation.decoders import decoder_of
from heron.model import RWKV, State
from heron.model.memory import Documents, Recollection
from heron.model.state import States
from heron.progress import progress

MODES = ("gpt", "rnn")
_TOKENS_PER_PASS = 4096
_SEQUENCES = 8  # that RNN mode reads side by side


class Evaluation(NamedTuple):
    """The outcome of :func:`evaluate`."""

    loss: float  # mean negative log-likelihood of a target, in nats
    n_targets: int
    bits_per_byte: float | None  # None where the text behind the tokens is unknown

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Likelihood(NamedTuple):
    """How likely a continuation is after its context."""

    logprob: float  # sum over its tokens, in nats
    greedy: bool  # whether every one of its tokens is the likeliest


def evaluate(
    model: RWKV,
    tokens: np.ndarray,
    ctx_len: int,
    n_bytes: int | None = None,
    autocast: torch.autocast | None = None,
    mode: str = "gpt",
    recalled: Recalled | None = None,
    documents: Documents | None = None,
    start: State | None = None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Score every token but the first, once, in windows of `ctx_len` that each start from a zero state, or `start`.

    Args:
        model: any RWKV; its mode and gradients are left alone.
        tokens: 1-D array of ids.
        ctx_len: tokens of one window.
        n_bytes: UTF-8 bytes that tokens[1:] stand for.
        autocast: the precision context of the training run, if any.
        mode: "gpt" or "rnn".
        recalled: what ROSA memory recalls at each of `tokens`. None: each looks back on all that stand before it, in
            its window and before that, and on `documents`.
        documents: see :class:`heron.model.memory.Documents`.
        start: such as a tuned state, batch size 1, on the device of the model; None: zeros.
        share: i, n: score a share of them, that of number i among n processes (:func:`together`).

    Raises:
        ConfigError: a ctx_len below 1, or an unknown mode.
        DataError: fewer than two tokens, or an id outside the vocabulary.
    """
    if ctx_len < 1:
        raise ConfigError(f"ctx_len: wanted at least 1, got {ctx_len}")
    check_mode(mode)
    n_targets = len(tokens) - 1
    if n_targets < 1:
        raise DataError(f"evaluate: wanted at least 2 tokens, got {len(tokens)}")
    model = in_one_dtype(model)
    ctx_len = min(ctx_len, n_targets)
    device = next(model.parameters()).device
    rosa = model.config.memory
    if rosa is not None and recalled is None:
        in_ids = np.asarray(tokens)
        if len(in_ids) and not 0 <= in_ids.min() <= in_ids.max() < model.config.vocab_size:
            raise DataError(_outside(model, in_ids.min(), in_ids.max()))
        recalled = _recalled(in_ids, rosa, documents)
    if mode == "rnn":
        starts = range(ctx_len * share[0], n_targets, ctx_len * share[1])
        windows = [(i, tokens[i : i + ctx_len + 1].tolist()) for i in starts]
        found = [None if recalled is None else recalled.at(np.array([i]), len(ids) - 1) for i, ids in windows]
        texts = [_Text(ids[:1], ids[1:], part) for (_, ids), part in zip(windows, found, strict=True)]
        total = -sum(score.logprob for score in _likelihoods(model, texts, mode, start))
        return _evaluation(total, sum(len(ids) - 1 for _, ids in windows), n_bytes)

    total, n_targets = 0.0, 0
    with torch.no_grad(), autocast or torch.autocast(device.type, enabled=False):
        for starts, n in islice(_windows(len(tokens) - 1, ctx_len), share[0], None, share[1]):
            rows = np.asarray(tokens[starts[0] : starts[-1] + n + 1], dtype=np.int64)
            places = torch.from_numpy(starts - starts[0]).unsqueeze(1) + torch.arange(n)
            window = torch.from_numpy(rows).to(device)
            found = None if recalled is None else recalled.at(starts, n).to(device)
            total += _nll(model, window[places], window[places + 1], found, start)
            n_targets += places.numel()
    return _evaluation(total, n_targets, n_bytes)


def evaluate_batches(
    model: RWKV,
    batches: Iterable[tuple[Tensor | None, ...]],
    autocast: torch.autocast | None = None,
    start: Callable[[Tensor, Tensor | None], States | None] = lambda *_: None,
    share: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Score the targets of batches that are not -100.

    Args:
        batches: tokens, targets, recalled and cu_seqlens, as :meth:`heron.data.packs.Packs.batch` gives them.
        autocast: the precision context of the training run, if any.
        start: gives the state that the sequences of tokens and cu_seqlens start from; None: zeros.
        share: i, n: every n-th batch from number i on, see :func:`together`.

    Raises:
        DataError: no target.
    """
    model = in_one_dtype(model)
    device = next(model.parameters()).device
    total, n_targets = 0.0, 0
    with torch.no_grad(), autocast or torch.autocast(device.type, enabled=False):
        for batch in islice(batches, share[0], None, share[1]):
            tokens, targets, recalled, cu_seqlens = (None if part is None else part.to(device) for part in batch)
            if tokens is not None and targets is not None:
                n = int((targets != -100).sum())
                state = start(tokens, cu_seqlens)
                hidden, _ = model.hidden_states(tokens, state, cu_seqlens, keep_state=False, recalled=recalled)
                total += float(model.head_loss(hidden, targets, recalled).double()) * n
                n_targets += n
    if not n_targets and share == (0, 1):
        raise DataError("evaluate: wanted at least one target, got none")
    return _evaluation(total, n_targets, None)


def together(score: Evaluation, add: Callable[[list[float]], list[float]], n_bytes: int | None = None) -> Evaluation:
    """The score of all from the share of each, with what adds numbers up over the processes.

    Args:
        n_bytes: UTF-8 bytes that all targets stand for.
    """
    total, n_targets = add([score.loss * score.n_targets, score.n_targets])
    return _evaluation(total, int(n_targets), n_bytes)


def loglikelihoods(
    model: RWKV,
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    mode: str = "gpt",
    documents: Documents | None = None,
    start: State | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        pairs: (context, continuation) token ids, at least one each.
        mode: "gpt" (sequences of like length share a pass, padded at their ends) or "rnn".
        documents: what a ROSA memory looks into beside the pair, see :class:`heron.model.memory.Documents`.
        start: as for :func:`evaluate`.

    Raises:
        ConfigError: an unknown mode.
        DataError: an empty context or continuation (its number is named), or an id outside the vocabulary.
    """
    check_mode(mode)
    model, rosa = in_one_dtype(model), model.config.memory
    texts = []
    for number, (context, continuation) in enumerate(pairs):
        context, continuation, recalled = list(context), list(continuation), None
        if not context or not continuation:
            raise DataError(f"pair {number}: wanted at least one token of context and of continuation")
        if rosa is not None:
            ids = [*context, *continuation[:-1]]
            if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
                raise DataError(_outside(model, min(ids), max(ids)))
            recalled = Recollection().read(torch.tensor(ids), rosa, documents)[0].unsqueeze(0)
        texts.append(_Text(context, continuation, recalled))
    return _likelihoods(model, texts, mode, start)


class _Text(NamedTuple):
    """A text to be scored."""

    context: list[int]
    continuation: list[int]
    recalled: Tensor | None  # (1, n, K, 2), what ROSA memory found for all ids but the last

    @property
    def inputs(self) -> list[int]:
        return (self.context + self.continuation)[:-1]


def _likelihoods(model: RWKV, texts: list[_Text], mode: str, start: State | None) -> list[Likelihood]:
    """See :func:`loglikelihoods`."""
    by_length = sorted(range(len(texts)), key=lambda i: -len(texts[i].inputs))
    results: dict[int, Likelihood] = {}
    with torch.inference_mode():
        decoder = decoder_of(model, _SEQUENCES) if mode == "rnn" else None
        for numbers in _passes(by_length, texts, mode):
            of_pass = [texts[i] for i in numbers]
            if decoder is None:
                scores = _in_parallel(model, of_pass, start)
            else:
                scores = _one_by_one(model, decoder, of_pass, start)
            results.update(zip(numbers, scores, strict=True))
    return [results[i] for i in range(len(texts))]


def _recalled(tokens: np.ndarray, rosa: RosaConfig, documents: Documents | None) -> Recalled:
    """What memory recalls at each of (n,) tokens, of those before it and the documents."""
    if documents is None:
        return answers(tokens, Rules.of(rosa))
    records = np.empty((len(tokens), rosa.n_matches), np.dtype([("id", "<u4"), ("length", "<u2")]))
    memory = Recollection()
    with progress("looking the text up in the memory") as advance:
        for first in range(0, len(tokens), PIECE):
            advance(f"{first / 1e6:.0f} of {len(tokens) / 1e6:.0f} million")
            ids = torch.from_numpy(tokens[first : first + PIECE].astype(np.int64))
            found, _, memory = memory.read(ids, rosa, documents)
            records["id"][first : first + len(ids)] = found[..., 0].numpy()
            records["length"][first : first + len(ids)] = found[..., 1].numpy()
    return Recalled(records)


def _evaluation(total: float, n_targets: int, n_bytes: int | None) -> Evaluation:
    loss = total / n_targets if n_targets else 0.0  # of a share without any
    return Evaluation(loss, n_targets, total / math.log(2) / n_bytes if n_bytes else None)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode: wanted {' or '.join(MODES)}, got {mode!r}.{did_you_mean(mode, MODES)}")


def _passes(by_length: list[int], texts: list[_Text], mode: str) -> Iterator[list[int]]:
    """Numbers of texts that are computed together, longest first: of some _TOKENS_PER_PASS tokens, or _SEQUENCES."""
    while by_length:
        longest = len(texts[by_length[0]].inputs) + 1
        n = _SEQUENCES if mode == "rnn" else max(1, _TOKENS_PER_PASS // longest)
        yield by_length[:n]
        by_length = by_length[n:]


def _in_parallel(model: RWKV, texts: list[_Text], start: State | None) -> list[Likelihood]:
    """One pass. What follows a sequence changes nothing in it, so zeros may fill up the shorter ones."""
    inputs, device = [text.inputs for text in texts], model.emb.weight.device
    longest = max(map(len, inputs))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in inputs], device=device)
    recalled = None
    if any(text.recalled is not None for text in texts):
        parts = [text.recalled[0] for text in texts if text.recalled is not None]
        recalled = nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
    hidden, _ = model.hidden_states(padded, _copies(start, len(texts)), recalled=recalled)
    logits = []
    for i, (context, continuation, _) in enumerate(texts):
        part = slice(len(context) - 1, len(context) - 1 + len(continuation))
        logits.append(model.logits(hidden[i, part], None if recalled is None else recalled[i, part]))
    return [_likelihood(part, text.continuation) for part, text in zip(logits, texts, strict=True)]


def _one_by_one(model: RWKV, decoder: Decoder, texts: list[_Text], start: State | None) -> list[Likelihood]:
    """Token by token; `texts` are sorted, longest first."""
    for row in range(len(texts)):
        decoder.write(row, start)
    inputs = [text.inputs for text in texts]
    outside = [token for ids in inputs for token in ids if not 0 <= token < model.config.vocab_size]
    if outside:
        raise DataError(_outside(model, outside[0], outside[0]))
    wanted: list[list[Tensor]] = [[] for _ in texts]
    for position in range(len(inputs[0])):
        rows = [row for row, ids in enumerate(inputs) if position < len(ids)]
        parts = [text.recalled[0, position] for text in texts[: len(rows)] if text.recalled is not None]
        recalled = torch.stack(parts) if parts else None
        logits = decoder.step(rows, [inputs[row][position] for row in rows], recalled)
        for row, line in zip(rows, logits, strict=True):
            if position >= len(texts[row].context) - 1:
                wanted[row].append(line.clone())
    return [_likelihood(torch.stack(lines), text.continuation) for lines, text in zip(wanted, texts, strict=True)]


def _outside(model: RWKV, low: int, high: int) -> str:
    V = model.config.vocab_size
    return f"tokens: ids must be 0 to {V - 1} (vocab_size {V}), got {low} to {high}"


def _likelihood(logits: Tensor, continuation: list[int]) -> Likelihood:
    """Of the tokens that logits (n, V) stand before."""
    V = logits.shape[1]
    if not all(0 <= token < V for token in continuation):
        raise DataError(f"tokens: ids must be 0 to {V - 1}, got {min(continuation)} to {max(continuation)}")
    targets = torch.tensor(continuation, device=logits.device)
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    picked = log_probs.gather(1, targets.unsqueeze(1)).double().sum()
    return Likelihood(float(picked), bool((logits.argmax(dim=-1) == targets).all()))


def _windows(n_targets: int, ctx_len: int) -> Iterator[tuple[np.ndarray, int]]:
    """Where the windows of each pass begin, and how many targets each has: ctx_len, and the last one what is left."""
    full = n_targets // ctx_len
    starts = np.arange(full) * ctx_len
    of_pass = max(1, _TOKENS_PER_PASS // ctx_len)
    for i in range(0, full, of_pass):
        yield starts[i : i + of_pass], ctx_len
    if n_targets % ctx_len:
        yield np.array([full * ctx_len]), n_targets % ctx_len


def _nll(model: RWKV, x: Tensor, y: Tensor, recalled: Tensor | None, start: State | None) -> float:
    """Summed negative log-likelihood of the targets y (B, T) after the inputs x (B, T)."""
    hidden, _ = model.hidden_states(x, _copies(start, len(x)), recalled=recalled)
    return float(model.head_loss(hidden, y, recalled).double() * y.numel())


def _copies(start: State | None, n: int) -> State | None:
    """`start`, of batch size 1, for n sequences."""
    return None if start is None else start.map(lambda part: part.repeat_interleave(n, dim=0))
