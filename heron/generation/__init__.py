"""Text from a model: read the prompt in parallel, then draw token after token, each at the same cost."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from heron.generation.constraint import Constraint
from heron.generation.engine import Engine, OpenSequence
from heron.generation.requests import Piece, Request
from heron.generation.sampling import Sampling, Token, sample
from heron.generation.snapshot import Snapshot
from heron.generation.text import TextWriter
from heron.model import RWKV, State
from heron.tokenizer import Tokenizer

__all__ = [
    "Constraint", "Engine", "OpenSequence", "Piece", "Request", "Sampling", "Snapshot", "TextWriter", "Token",
    "generate", "sample", "stream",
]  # fmt: skip


def stream(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: str | Sequence[str] = (),
    seed: int = 0,
    state: State | None = None,
    stop_ids: Sequence[int] = (),
) -> Generator[str]:
    """Continue `prompt` and yield the text piece by piece, each as soon as it is certain.

    It is the text that stands behind the prompt's, the space or the separator between them included. It ends before the
    tokenizer's end-of-document token, before one of `stop_ids`, before the first text in `stop` (no part of which is
    yielded), or after `max_tokens`. Ids that stand for nothing in the tokenizer (a padded vocabulary) are never drawn.
    The same arguments give the same text on the same device. Between two pieces the model's training mode and autograd
    are as the caller left them. For more than one text build an :class:`Engine`.

    Args:
        prompt: text or its token ids. Empty: starts from the end-of-document token, as documents do in training.
        stop: texts that end it; looked for in the new text only. Under integers: whole numbers.
        state: what the model remembers from before the prompt, batch size 1; None: nothing. It is never changed.
        stop_ids: ids that end it.

    Raises:
        ConfigError: a negative `max_tokens`, an empty stop text, a tokenizer larger than the model, or an empty prompt
            under a tokenizer without end-of-document token.
        DataError: a prompt token outside the model's vocabulary.
        HeronError: the logits are not finite.
    """
    after = None if state is None else Snapshot(state)
    return Engine(model, tokenizer).stream(Request(prompt, max_tokens, sampling, stop, seed, after, stop_ids))


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
    stop_ids: Sequence[int] = (),
    count_digits: bool = False,
) -> str:
    """The text that the model puts after `prompt`. The settings are those of :class:`Sampling` and :func:`stream`."""
    sampling = Sampling(temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay, count_digits)
    return "".join(stream(model, tokenizer, prompt, max_tokens, sampling, stop, seed, stop_ids=stop_ids))
