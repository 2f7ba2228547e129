"""`heron eval`: how well models predict a text, the last words of LAMBADA, the answers of multiple choice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heron import evaluate
from heron.commands.settings import READING, given
from heron.commands.sources import device_of, tokenizer_of, weights_of
from heron.commands.streams import note
from heron.config import ModelConfig, TrainConfig
from heron.data import recalled, sequences, token_index
from heron.data.corpora import Reading
from heron.data.loader import load_tokens
from heron.data.packs import Packs
from heron.data.recalled import Rules
from heron.errors import ConfigError, counted
from heron.files import refuse_foreign
from heron.model import RWKV
from heron.model.memory import Documents
from heron.ops.rosa import TokenIndex
from heron.progress import progress
from heron.report import picture, scores
from heron.tokenizer import Tokenizer

_SAMPLES = 4  # of rows of ids that are read at once


def run(options: argparse.Namespace) -> None:
    if not (options.data or options.lambada or options.choices):
        options.parser.error("wanted something to score on: --data, --lambada or --choices")
    if options.limit is not None and not (options.lambada or options.choices):
        options.parser.error(
            "--limit counts the texts of --lambada and the questions of --choices; --data is read whole"
        )
    if options.memory and options.memory_from:
        options.parser.error("give --memory or --memory_from, not both")
    if options.memory_from and options.memory_from in (options.data, options.lambada, options.choices):
        options.parser.error(
            f"--memory_from {options.memory_from} is what is scored: every token would be known before"
        )
    if options.plot:
        picture.check_picture(Path(options.plot))
        refuse_foreign(Path(options.plot), picture.is_ours)
    if options.json:
        refuse_foreign(Path(options.json), scores.is_ours)
    results = [_scores(model, options) for model in options.models]
    if len(results) == 1:
        print(_described(results[0]))
    else:
        print(scores.table(results))
        for result in results:
            if "memory" in result:
                print(f"{result['model']}: its memory {result['memory']}")
    if options.json:
        scores.write(results, Path(options.json))
        print(f"wrote {options.json}")
    if options.plot:
        print(f"wrote {scores.plot(results, Path(options.plot))}")


def _scores(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model, as --json writes them."""
    weights, device = weights_of(path, options), device_of(options.device)
    model, start = weights.model.to(device), weights.start and weights.start.to(device)
    settings = {name: value for name, value in given(options, TrainConfig, "").items() if name in READING}
    tokenizer = tokenizer_of(path, options.tokenizer, model.config.vocab_size, settings.pop("eod", None))
    reading, mode = Reading(**settings), options.mode
    result = {"model": path, "step": scores.step_of(path), "mode": mode}
    result |= {name: value for name in ("adapter", "state") if (value := getattr(options, name)) is not None}
    documents = _documents(options, model.config, tokenizer, reading)
    if model.config.memory is not None:
        result["memory"] = _looks_back_on(options, model.config.memory.window)
    if options.data:
        if sequences.holds_ids(options.data, reading.field):
            score = _of_rows(model, options)
        else:
            tokens, n_bytes = load_tokens(options.data, tokenizer, model.config.vocab_size, reading, note)
            with progress(f"reading {len(tokens):,} tokens of {options.data} with {path}"):
                score = evaluate.evaluate(
                    model, tokens, options.ctx_len, n_bytes, mode=mode, documents=documents, start=start
                )
        result |= {"data": options.data, "ctx_len": options.ctx_len, "tokens": score.n_targets}
        result |= {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    if options.lambada:
        with progress(f"reading {options.lambada} with {path}"):
            words = evaluate.lambada(model, tokenizer, options.lambada, mode, options.limit, documents, start, reading)
        result |= {"lambada": options.lambada, "lambada_texts": words.n_texts}
        result |= {"lambada_perplexity": words.perplexity, "lambada_accuracy": words.accuracy}
    if options.choices:
        with progress(f"reading {options.choices} with {path}"):
            answers = evaluate.multiple_choice(model, tokenizer, options.choices, mode, options.limit, documents, start)
        result |= {"choices": options.choices, "questions": answers.n_questions}
        result |= {"accuracy": answers.accuracy, "accuracy_per_byte": answers.accuracy_per_byte}
    return result


def _described(result: dict[str, Any]) -> str:
    """The figures of one model in lines."""
    lines = [f"memory         {result['memory']}"] if "memory" in result else []
    if "data" in result:
        lines += [
            f"{result['data']}: {counted(result['tokens'], 'tokens')} in windows of {result['ctx_len']}",
            f"loss           {result['loss']:.4f} nats per token",
            f"perplexity     {result['perplexity']:.3f}",
        ]
        if result["bits_per_byte"] is not None:
            lines.append(f"bits per byte  {result['bits_per_byte']:.4f}")
    if "lambada" in result:
        lines += [
            f"{result['lambada']}: {counted(result['lambada_texts'], 'texts')}",
            f"perplexity     {result['lambada_perplexity']:.3f} of the last word",
            f"accuracy       {100 * result['lambada_accuracy']:.2f} %",
        ]
    if "choices" in result:
        lines += [
            f"{result['choices']}: {counted(result['questions'], 'questions')}",
            f"accuracy       {100 * result['accuracy']:.2f} %",
            f"per byte       {100 * result['accuracy_per_byte']:.2f} %",
        ]
    return "\n".join(lines)


def _of_rows(model: RWKV, options: argparse.Namespace) -> evaluate.Evaluation:
    """The score of the learned ids of rows of ids, each row from a zero state."""
    given_too = [f"--{name}" for name in ("memory", "memory_from", "state") if getattr(options, name)]
    if options.mode != "gpt" or given_too:
        dropped = ", ".join([*given_too, *(["--mode rnn"] if options.mode != "gpt" else [])])
        raise ConfigError(f"{options.data}: rows of ids are read in GPT mode, each from a zero state; drop {dropped}")
    samples = sequences.load(options.data, model.config.vocab_size, options.ctx_len, val_fraction=0.0, say=note).samples
    found = None
    if (rosa := model.config.memory) is not None:
        found = recalled.answers_each((samples[number].ids for number in range(len(samples))), Rules.of(rosa))
    packs = Packs(samples, options.ctx_len, 0, recalled=found)
    return evaluate.evaluate_batches(model, packs.each_once(_SAMPLES))


def _documents(
    options: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, reading: Reading
) -> Documents | None:
    """What ROSA memory looks into beside the texts that are scored."""
    if options.memory:
        return Documents(token_index.read(options.memory, tokenizer).index, config)
    if not options.memory_from:
        return None
    rosa = Documents.rules_of(config)
    tokens, _ = load_tokens(options.memory_from, tokenizer, config.vocab_size, reading, note)
    with progress(f"indexing {len(tokens):,} tokens of {options.memory_from}"):
        index = TokenIndex.of(torch.from_numpy(np.asarray(tokens, dtype=np.int64)), rosa.max_match or 1, rosa.end)
    return Documents(index, config)


def _looks_back_on(options: argparse.Namespace, window: int | None) -> str:
    """What the memory of a model knows at each token that is scored."""
    all_of = "all of" if window is None else f"the last {window:,} tokens of"
    of_data = [f"{all_of} the data before a token, past its window too"] if options.data else []
    of_texts = [f"{all_of} its text before a token"] if options.lambada or options.choices else []
    documents = options.memory or options.memory_from
    return f"looks back on {', or '.join([*of_data, *of_texts])}" + (f", and on {documents}" if documents else "")
