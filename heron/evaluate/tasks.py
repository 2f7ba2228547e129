"""Tasks whose answers are texts: the last words of LAMBADA, and multiple choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from heron.data import jsonl
from heron.data.corpora import PLAIN, Reading, read_documents
from heron.errors import ConfigError, DataError
from heron.evaluate.likelihood import loglikelihoods
from heron.model import RWKV, State
from heron.model.memory import Documents
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_pair


class Lambada(NamedTuple):
    """The outcome of :func:`lambada`."""

    perplexity: float  # exp of minus the mean, over texts, of the last word's log-probability
    accuracy: float  # share of texts whose last word greedy decoding would have written
    n_texts: int


class MultipleChoice(NamedTuple):
    """The outcome of :func:`multiple_choice`."""

    accuracy: float  # the right choice has the highest log-probability
    accuracy_per_byte: float  # ... the highest log-probability per UTF-8 byte of the choice
    n_questions: int


def lambada(
    model: RWKV,
    tokenizer: Tokenizer,
    path: str | Path,
    mode: str = "gpt",
    limit: int | None = None,
    documents: Documents | None = None,
    start: State | None = None,
    reading: Reading = PLAIN,
) -> Lambada:
    """Predict the last word of each text, which begins at its last space.

    Source of the definition: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py: a text starts from token 0 (here: the
    tokenizer's end of document), and the word has its space. Text and word are encoded as a whole, not apart as there;
    :func:`heron.tokenizer.continuation.encode_pair` says where the word's ids begin.

    Args:
        path: a jsonl with `{"text": ...}` lines.
        limit: only so many texts; None: all.
        documents: what a ROSA memory looks into beside each text, see :class:`heron.model.memory.Documents`.
        start: as for :func:`evaluate`.
        reading: how the file becomes texts.

    Raises:
        ConfigError: a tokenizer without end of document; a limit below 1.
        DataError: a bad line, a text without a space before its last word, or no text at all.
    """
    eod, pairs = _start_of(tokenizer), []
    for where, text in _limited(read_documents(str(path), reading=reading), limit):
        context, space, word = text.rstrip().rpartition(" ")
        if not context.strip() or not word:
            raise DataError(f"{where}: wanted a text of two words or more, got {text[:60]!r}")
        of_context, of_word = encode_pair(tokenizer, context, space + word)
        pairs.append(([*eod, *of_context], of_word))
    if not pairs:
        raise DataError(f"{path}: holds no text")
    scores = loglikelihoods(model, pairs, mode, documents, start)
    mean = sum(score.logprob for score in scores) / len(scores)
    return Lambada(
        math.exp(-mean) if mean > -700 else math.inf, sum(score.greedy for score in scores) / len(scores), len(scores)
    )


def multiple_choice(
    model: RWKV,
    tokenizer: Tokenizer,
    path: str | Path,
    mode: str = "gpt",
    limit: int | None = None,
    documents: Documents | None = None,
    start: State | None = None,
) -> MultipleChoice:
    """Answer questions by the likelihood of each choice after the question. The first of equals is taken.

    Args:
        path: a jsonl with `{"question": str, "choices": [str, ...], "answer": int}` lines, `answer` counting from 0.
            Question and choice are joined as they are: give choices their leading space. They are encoded as a
            whole; :func:`heron.tokenizer.continuation.encode_pair` says where the choice's ids begin.
        limit: only so many questions; None: all.
        documents: as for :func:`lambada`.
        start: as for :func:`evaluate`.

    Raises:
        ConfigError: a tokenizer without end of document; a limit below 1.
        DataError: a bad line (its number is named), or no question at all.
    """
    eod, pairs, questions = _start_of(tokenizer), [], []
    for _, (question, choices, answer) in _limited(jsonl.read(Path(path), _question), limit):
        for choice in choices:
            context, continuation = encode_pair(tokenizer, question, choice)
            pairs.append(([*eod, *context], continuation))
        questions.append(([len(choice.encode()) for choice in choices], answer))
    if not questions:
        raise DataError(f"{path}: holds no question")
    scores = iter(loglikelihoods(model, pairs, mode, documents, start))
    right = right_per_byte = 0
    for lengths, answer in questions:
        logprobs = [next(scores).logprob for _ in lengths]
        per_byte = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
        right += logprobs.index(max(logprobs)) == answer
        right_per_byte += per_byte.index(max(per_byte)) == answer
    return MultipleChoice(right / len(questions), right_per_byte / len(questions), len(questions))


def _start_of(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eod is None:
        raise ConfigError(f"tokenizer {tokenizer.spec}: has no end-of-document token, from which every text starts")
    return [tokenizer.eod]


def _limited(records: Iterator[tuple[str, Any]], limit: int | None) -> Iterator[tuple[str, Any]]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: wanted at least 1, got {limit}")
    for number, record in enumerate(records):
        if number == limit:
            return
        yield record


def _question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """Question, choices and the number of the right one; ValueError where `row` is none."""
    choices, answer = row.get("choices"), row.get("answer")
    if not (isinstance(row.get("question"), str) and isinstance(choices, list) and len(choices) > 1):
        raise ValueError('wanted {"question": text, "choices": two texts or more, "answer": number}')
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"wanted choices that are texts of at least one character, got {choices!r:.80}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer: wanted 0 to {len(choices) - 1}, got {answer!r:.40}")
    texts = {f"choice {number}": choice for number, choice in enumerate(choices)}
    return jsonl.text(row, "question"), [jsonl.text(texts, name) for name in texts], answer
