"""What a model is run with, made of options: the device, the tokenizer, the engine and how it samples."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from heron import machine
from heron.checkpoint import beside, load, tuned_state, weights_file
from heron.checkpoint.adapters import merged
from heron.checkpoint.architecture import in_one_dtype
from heron.data import token_index
from heron.data.token_index import DocumentIndex
from heron.errors import ConfigError
from heron.generation import Engine, Sampling
from heron.model import RWKV, State
from heron.model.coded import quantize_for_running
from heron.model.mixed_dtypes import widest
from heron.ops import ahead
from heron.progress import progress
from heron.tokenizer import Tokenizer
from heron.tokenizer import load as load_tokenizer


class Weights(NamedTuple):
    """A model to run, and the tuned states that were made for its weights."""

    model: RWKV
    start: State | None  # what sequences begin from, of --state; None: zeros
    states: dict[str, State]  # others by name, of --with_state


class Running(NamedTuple):
    """An engine, and what else a verb needs of what it was made of."""

    engine: Engine
    documents: DocumentIndex | None  # that its memory looks into
    states: dict[str, State]  # see Weights; on its device


def engine_of(options: argparse.Namespace, rows: int = 1, packed: int = 1, fit_steps: bool = False) -> Running:
    """An engine from the flags that generate, chat and serve share.

    `packed` and `fit_steps` as for an Engine, on a GPU; a CPU reads prompts one by one.
    """
    dtypes = {None: None, **machine.DTYPES}
    if options.dtype not in dtypes:
        raise ConfigError(f"dtype: wanted fp32, bf16 or fp16, got {options.dtype!r}")
    device, file = torch.device(device_of(options.device)), options.tables_file
    ahead.build_for_decoding(device)
    model, start, states = weights_of(options.model, options, dtypes[options.dtype])
    vocab_size = model.config.vocab_size
    numbers = f"integers:{vocab_size}" if getattr(options, "ids", False) else None
    tokenizer = tokenizer_of(options.model, options.tokenizer, vocab_size, options.eod, numbers)
    if options.tables == "disk" and file is None:
        weights = weights_file(Path(options.model))
        in_run = weights.parent.parent.name == "checkpoints"  # whose folders hold what they were verified with, no more
        home = weights.parents[2] / weights.parent.name if in_run else weights
        file = home.with_name(f"{home.name}.{options.dtype or 'file'}.tables")
    if options.tables == "device":
        model = model.to(device)
    documents = None if options.memory is None else token_index.read(options.memory, tokenizer)
    engine = Engine(
        model, tokenizer, rows, options.tables, file, device,
        documents=None if documents is None else documents.index,
        start=start,
        packed=packed if device.type == "cuda" else 1,
        fit_steps=fit_steps,
        states=options.states,
    )  # fmt: skip
    return Running(engine, documents, {name: state.to(device) for name, state in states.items()})


def weights_of(path: str, options: argparse.Namespace, dtype: torch.dtype | None = None) -> Weights:
    """The model at `path`, in `dtype`, with the weights of --adapter merged into its own, and as --weights says."""
    with progress(f"reading {path}"):
        if options.adapter is None:
            model = load(path, dtype, rosa=options.rosa)
        else:
            model = merged(load(path, rosa=options.rosa), options.adapter, dtype)
        # Before weights are quantized: a file of a state says which weights it was tuned on.
        start = None if options.state is None else _tuned(options.state, model)
        states = {name: _tuned(file, model) for name, file in getattr(options, "with_state", ())}
        if options.weights is not None:
            device = torch.device(device_of(options.device))
            model = quantize_for_running(in_one_dtype(model), device, options.weights)
    return Weights(model, start, states)


def _tuned(file: str, model: RWKV) -> State:
    return tuned_state(file, model.config, widest(model) or model.emb.weight.dtype, model)


def sampling_of(options: argparse.Namespace) -> Sampling:
    return Sampling(
        options.temperature, options.top_p, options.top_k,
        options.presence_penalty, options.frequency_penalty, options.penalty_decay, options.count_digits,
    )  # fmt: skip


def device_of(wanted: str) -> str:
    return machine.choose_device(wanted).value


def tokenizer_of(
    model: str, wanted: str | None, vocab_size: int, eod: str | None = None, otherwise: str | None = None
) -> Tokenizer:
    """The tokenizer asked for, else what the weights hold or lie beside, else by the vocabulary, else `otherwise`."""
    if wanted:
        return load_tokenizer(wanted, eod)
    if (known := beside.tokenizer_of(model, eod)) is not None:
        return known
    if (usual := beside.USUAL.get(vocab_size, otherwise)) is None:
        raise ConfigError(f"{model}: vocab_size {vocab_size} does not tell the tokenizer; add --tokenizer")
    if usual == "world":  # so many ids are a usual size of other vocabularies, too; 256 ids are bytes
        warnings.warn(f"{model}: nothing tells its tokenizer; assuming World (--tokenizer names another)", stacklevel=2)
    return load_tokenizer(usual, eod)
