"""Text from a model: read the prompt in pieces, then draw token after token, each at the same cost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from heron.errors import ConfigError, DataError, HeronError
from heron.model import RWKV, State
from heron.tokenizer import TextStream, Tokenizer

PREFILL_TOKENS = 1024  # of the prompt are read at once: enough to fill the machine, little enough to bound the memory


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
    """Taken off the logit of every token that was generated before."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time it was generated before, counted with `penalty_decay`."""
    penalty_decay: float = 0.996
    """Factor on all counts at each new token, 0 to 1: old occurrences are forgotten."""

    def __post_init__(self) -> None:
        highest = {"top_p": 1.0, "penalty_decay": 1.0}
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), (int,) if field.name == "top_k" else (int, float)
            high = highest.get(field.name, math.inf)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{field.name}: wanted {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
            if not (0 <= value <= high and math.isfinite(value)):
                wanted = "a finite number, at least 0" if high == math.inf else f"0 to {high:g}"
                raise ConfigError(f"{field.name}: wanted {wanted}, got {value}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that no random number is drawn."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    def penalised(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Logits (V,) less the penalties of the occurrences `counts` (V,); a new tensor."""
        return logits - self.presence_penalty * (counts > 0) - self.frequency_penalty * counts


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
    if not math.isfinite(logits.max()):
        raise HeronError(
            f"logits: wanted finite numbers, got {float(logits.max())} at token id {int(logits.argmax())}. "
            "The weights are damaged or their training has diverged; load an earlier checkpoint"
        )
    if counts is not None:
        logits = sampling.penalised(logits, counts)
    if sampling.greedy:
        return int(logits.argmax())

    log_probs = torch.log_softmax(logits, dim=0)
    ids = torch.arange(len(logits))
    if sampling.top_p < 1:
        # Sorting all of a large vocabulary takes longer than a small model. The last token that is kept and those
        # after it hold more than 1 - top_p between them, and it is the largest of them: none below this floor is kept.
        ids = (log_probs >= math.log((1 - sampling.top_p) / len(logits))).nonzero()[:, 0]
    if sampling.top_p < 1 or sampling.top_k:
        ids = ids[log_probs[ids].sort(descending=True, stable=True).indices]
        n_kept = sampling.top_k or len(ids)
        if sampling.top_p < 1:
            n_kept = min(n_kept, 1 + int((log_probs[ids].exp().cumsum(0) < sampling.top_p).sum()))
        ids = ids[:n_kept]
    # p ** (1 / temperature) / sum, as logarithms from the largest on and in fp64: no temperature above 0 is too small.
    log_probs = log_probs[ids]
    probs = torch.softmax((log_probs - log_probs.max()).double() / sampling.temperature, dim=0)
    return int(ids[torch.multinomial(probs, 1, generator=generator)])


def stream(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: str | Sequence[str] = (),
    seed: int = 0,
    state: State | None = None,
) -> Iterator[str]:
    """Continue `prompt` and yield the text piece by piece, each as soon as it is certain.

    It ends before the tokenizer's end-of-document token, before the first text in `stop` (no part of which is
    yielded), or after `max_tokens`. Ids that stand for nothing in the tokenizer (a padded vocabulary) are never drawn.
    The same arguments give the same text on the same device. Between two pieces the model's training mode and autograd
    are as the caller left them.

    Args:
        prompt: text or its token ids. Empty: starts from the end-of-document token, as documents do in training.
        stop: texts that end it; looked for in the new text only.
        state: what the model remembers from before the prompt, batch size 1; None: nothing. It is never changed.

    Raises:
        ConfigError: a negative `max_tokens`, an empty stop text, a tokenizer larger than the model, or an empty prompt
            under a tokenizer without end-of-document token.
        DataError: a prompt token outside the model's vocabulary.
        HeronError: the logits are not finite.
    """
    if max_tokens < 0:
        raise ConfigError(f"max_tokens: wanted at least 0, got {max_tokens}")
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} token ids, the model only {vocab_size} (its vocab_size); "
            "give the tokenizer that the model was trained with"
        )
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        if tokenizer.eod is None:
            raise ConfigError(
                "prompt: it is empty, and this tokenizer has no end-of-document token to start from; give some text"
            )
        ids = [tokenizer.eod]
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise DataError(
                f"prompt: token {position} has id {token}, the model knows 0 to {vocab_size - 1} "
                f"(vocab_size {vocab_size}); give the tokenizer that the model was trained with"
            )
    until_stop = _UntilStop((stop,) if isinstance(stop, str) else tuple(stop))
    tokens = _tokens(model, tokenizer, ids, max_tokens, sampling, seed, state)
    return _pieces(tokens, TextStream(tokenizer), tokenizer.eod, until_stop)


def generate(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.5,
    seed: int = 0,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    penalty_decay: float = 0.996,
    stop: str | Sequence[str] = (),
) -> str:
    """The text that the model puts after `prompt`. The settings are those of :class:`Sampling` and :func:`stream`."""
    sampling = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay)
    return "".join(stream(model, tokenizer, prompt, max_tokens, sampling, stop, seed))


def _tokens(
    model: RWKV,
    tokenizer: Tokenizer,
    ids: list[int],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    state: State | None,
) -> Iterator[int]:
    """The new token ids. Every prompt id but the last goes in without its logits, which nobody asks for."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(tokenizer.vocab_size) if sampling.presence_penalty or sampling.frequency_penalty else None

    *context, token = ids
    if max_tokens:
        for start in range(0, len(context), PREFILL_TOKENS):
            piece = torch.tensor([context[start : start + PREFILL_TOKENS]], device=device)
            with _only_computing(model):
                _, state = model.hidden_states(piece, state)
    for _ in range(max_tokens):
        with _only_computing(model):
            logits, state = model(torch.tensor([[token]], device=device), state)
        logits = logits[0, -1, : tokenizer.vocab_size].clone()
        token = sample(logits, sampling, counts, generator)
        while not _stands_for_something(tokenizer, token):
            logits[token] = -math.inf
            token = sample(logits, sampling, counts, generator)
        yield token
        if counts is not None:
            counts *= sampling.penalty_decay
            counts[token] += 1


def _pieces(tokens: Iterator[int], text: TextStream, eod: int | None, until_stop: _UntilStop) -> Iterator[str]:
    for token in tokens:
        if token == eod:
            break
        if piece := until_stop.push(text.push(token)):
            yield piece
        if until_stop.found:
            return
    if piece := until_stop.push(text.flush()) + until_stop.flush():
        yield piece


def _stands_for_something(tokenizer: Tokenizer, token: int) -> bool:
    """False for a hole in the vocabulary, such as 65530 to 65535 of World: an untrained model may well draw one."""
    try:
        tokenizer.decode_bytes([token])
    except DataError:
        return False
    return True


@contextlib.contextmanager
def _only_computing(model: RWKV) -> Iterator[None]:
    """No autograd and evaluation mode, both put back at the end (never across a yield to the caller)."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


class _UntilStop:
    """Lets text through up to the first stop text, holding back whatever could still become one."""

    def __init__(self, stops: tuple[str, ...]):
        if "" in stops:
            raise ConfigError("stop: wanted texts of at least one character, got an empty one")
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> str:
        """Take in a piece and give what is certain to come before any stop text."""
        if self.found:
            return ""
        held = self._held + piece
        # The stop text that is complete first wins, so that the result does not depend on how the text was cut.
        matches = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if matches:
            self.found = True
            n_certain = min(matches)[1]
        else:
            n_certain = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[n_certain:]
        return held[:n_certain]

    def flush(self) -> str:
        """What was held back, now that nothing follows; empty after a stop text."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, less than all of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
