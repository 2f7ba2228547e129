"""How the next token is drawn from the logits."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from heron.config.settings import plain
from heron.errors import ConfigError, DataError, HeronError
from heron.model.memory import Match
from heron.tokenizer import Tokenizer

_UNCOUNTED = " \t0123456789"
_SEEN = 2.0**-126  # the least count above 0 that no device rounds to 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits. The order is RWKV's (see :func:`sample`).

    Raises:
        ConfigError: a value out of range or not a number.
    """

    temperature: float = 1.0
    """Above 1 flattens what top_p and top_k leave, below 1 sharpens it; 0 always takes the likeliest token (greedy)."""
    top_p: float = 0.5
    """Keep the fewest likeliest tokens whose probabilities reach this sum, 0 to 1; 1 keeps all, 0 is greedy."""
    top_k: int = 0
    """Keep at most this many tokens; 0: any number, 1 is greedy."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was generated before; below 0 it makes such tokens likelier."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time it was generated before, counted with `penalty_decay`."""
    penalty_decay: float = 0.996
    """Factor on all counts at each new token, 0 to 1: old occurrences are forgotten."""
    count_digits: bool = False
    """Count space, tab and digits for `frequency_penalty` too; RWKV's sampler does not (see :func:`increments`)."""

    def __post_init__(self) -> None:
        lowest = {"presence_penalty": -math.inf, "frequency_penalty": -math.inf}
        highest = {"top_p": 1.0, "penalty_decay": 1.0}
        for field in dataclasses.fields(self):
            value, kinds = plain(getattr(self, field.name)), (int,) if field.name == "top_k" else (int, float)
            low, high = lowest.get(field.name, 0.0), highest.get(field.name, math.inf)
            if field.name == "count_digits":
                if not isinstance(value, bool):
                    raise ConfigError(f"count_digits: wanted true or false, got {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{field.name}: wanted {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
            if not (low <= value <= high and math.isfinite(value)):
                at_least = ", at least 0" if low == 0 else ""
                wanted = f"a finite number{at_least}" if high == math.inf else f"0 to {high:g}"
                raise ConfigError(f"{field.name}: wanted {wanted}, got {value}")
            object.__setattr__(self, field.name, value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that no random number is drawn."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated before counts."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def penalised(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Logits (V,) less the penalties of the occurrences `counts` (V,); a new tensor."""
        return logits - self.presence_penalty * (counts > 0) - self.frequency_penalty * counts


class Token(NamedTuple):
    """One drawn token."""

    id: int
    logprob: float  # natural logarithm of its probability under the model, before penalties and sampling settings
    match: Match | None = None  # the longest match of ROSA memory, where this is the token that it predicted
    top: tuple[tuple[int, float], ...] = ()  # the likeliest ids with such logprobs, where they are asked for


def increments(tokenizer: Tokenizer) -> Tensor:
    """What a drawn token adds to its count, (2, V) fp32: row 0 without, row 1 with `count_digits`.

    It is 1, or so little that only the presence penalty sees it. ``rwkv.utils.PIPELINE`` (rwkv 0.8.32) is the source of
    the rule: it gives a token whose text, decoded alone, is a part of ``" \\t0123456789"`` an occurrence of 0, to which
    the presence penalty applies and the frequency penalty does not. So "7", "45" and " " are not counted, "10" and " 7"
    are. Where ids are no text (integers) every id is counted.
    """
    weights = torch.ones(2, tokenizer.vocab_size)
    for token in range(tokenizer.vocab_size) if tokenizer.is_text else ():
        with contextlib.suppress(DataError):  # an id that stands for nothing is never drawn
            if tokenizer.decode([token]) in _UNCOUNTED:
                weights[0, token] = _SEEN
    return weights


def fade(counts: Tensor, decay: float | Tensor) -> None:
    """Let counts fade by one token, in place. What was seen once stays above 0, for the presence penalty.

    Args:
        counts: (V,) or (rows, V) fp32.
        decay: `penalty_decay`, or (rows, 1) of them.
    """
    torch.maximum(counts * decay, counts.clamp(max=_SEEN), out=counts)


def sample(logits: Tensor, sampling: Sampling, counts: Tensor | None, generator: torch.Generator) -> int:
    """Draw a token id from logits, on the CPU in fp32 (fp64 logits stay fp64).

    Penalties come off the logits first; `top_p` and `top_k` then cut the probabilities as they are, before any
    temperature; what is left is raised to the power 1 / temperature and made to sum to 1. Among equal probabilities
    the lower id goes first. Source of the order: the sampler of the `rwkv` package (``rwkv.utils.PIPELINE``).

    Args:
        logits: (V,), any floating dtype and device. -inf bars a token.
        counts: (V,) decayed occurrences of each token so far, on the CPU; None: none.
        generator: of the CPU; not advanced when `sampling` is greedy.

    Raises:
        HeronError: the largest logit is NaN or infinite.
    """
    logits = logits.detach().to("cpu", torch.promote_types(logits.dtype, torch.float32))
    check_finite(logits)
    if counts is not None:
        logits = sampling.penalised(logits, counts)
    # NumPy from here on: PyTorch's threads would still be spinning when those of the next step begin.
    if sampling.greedy:
        return int(logits.numpy().argmax())

    log_probs = log_softmax(logits)
    ids = np.arange(len(log_probs))
    if sampling.top_p < 1 or sampling.top_k:
        ids = _kept(log_probs, sampling)
    # p ** (1 / temperature), from logarithms below the largest and in fp64: no temperature above 0 is too small.
    log_probs = log_probs[ids].astype(np.float64)
    with np.errstate(over="ignore"):
        reached = np.exp((log_probs - log_probs.max()) / sampling.temperature).cumsum()
    point = torch.rand((), generator=generator, dtype=torch.float64).item() * reached[-1]
    drawn = min(reached.searchsorted(point, "right"), reached.searchsorted(reached[-1]))  # never one of weight 0
    return int(ids[drawn])


def log_softmax(logits: Tensor) -> np.ndarray:
    """Logarithms of the probabilities (V,) of logits (V,) on the CPU, in at least fp32, on this thread alone."""
    values = logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy()
    with np.errstate(over="ignore"):
        distances = values - values.max()
    return distances - np.log(np.exp(distances).sum())


def check_finite(logits: Tensor) -> None:
    """HeronError if the largest of the logits (V,) is NaN or infinite."""
    if (error := not_finite(logits)) is not None:
        raise error


def not_finite(logits: Tensor) -> HeronError | None:
    """The error of logits (V,) whose largest is NaN or infinite."""
    values = logits.detach().to("cpu", torch.promote_types(logits.dtype, torch.float32)).numpy()
    if math.isfinite(values.max()):
        return None
    return HeronError(
        f"logits: wanted finite numbers, got {float(values.max())} at token id {int(values.argmax())}. "
        "The weights are damaged or their training has diverged; load an earlier checkpoint"
    )


def _kept(log_probs: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Ids (n,), ascending, that `top_p` and `top_k` leave of log_probs (V,)."""
    candidates = log_probs
    if sampling.top_p < 1:
        # Sorting all of a large vocabulary takes longer than a small model. The last token that is kept and those
        # after it hold more than 1 - top_p between them, and it is the largest of them: none below this floor is kept.
        floor = math.log((1 - sampling.top_p) / len(log_probs))
        candidates = log_probs[log_probs >= min(floor, log_probs.max())]  # rounded, all may lie below it
    descending = -np.sort(-candidates)
    n_kept = sampling.top_k or len(descending)
    if sampling.top_p < 1:
        n_kept = min(n_kept, 1 + int(np.exp(descending).cumsum(dtype=np.float64).searchsorted(sampling.top_p)))
    last = descending[min(n_kept, len(descending)) - 1]
    ids = np.flatnonzero(log_probs >= last)
    if (n_extra := len(ids) - n_kept) > 0:  # of those as likely as the last, the lower ids stay
        equal = np.flatnonzero(log_probs[ids] == last)
        ids = np.delete(ids, equal[len(equal) - n_extra :])
    return ids
