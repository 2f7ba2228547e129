"""`heron convert`: one model written as another variant, with another vocabulary, in another dtype or format."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from heron import machine
from heron.checkpoint import (
    assume,
    card,
    check_name,
    holds_tokenizer,
    load,
    migrate,
    read_tensors,
    unsaid,
    weights_file,
    write,
)
from heron.checkpoint.adapters import merged
from heron.checkpoint.architecture import build, converted, in_one_dtype
from heron.checkpoint.beside import papers_of, vocabulary_of
from heron.checkpoint.vocabulary import Vocabulary
from heron.commands.info import sizes
from heron.config import ModelConfig, RosaConfig
from heron.errors import CheckpointError, ConfigError, DataError
from heron.model import RWKV
from heron.model.tuned_state import TUNED
from heron.progress import progress
from heron.tokenizer import load as load_tokenizer

_CHECKED_TOKENS = 32
_SEED = 42


def run(options: argparse.Namespace) -> None:
    with progress(f"converting {options.input}"):
        before, after = convert(
            options.input, options.output, options.variant, options.format, options.dtype,
            options.vocab_size, options.new_rows, options.deep_embed_4x, rosa=options.rosa, add_rosa=options.add_rosa,
            tokenizer=options.tokenizer, say=print,
        )  # fmt: skip
    print(f"wrote {options.output}: {sizes(after.config)}")
    if options.check:
        with progress("comparing the logits"):
            difference = largest_difference(before, options.output, rosa=after.config.rosa or after.config.memory)
        print(f"largest difference of a logit, before and after, in fp32: {difference:.3g}")
        if difference and options.dtype is None and options.vocab_size is None:
            raise CheckpointError(f"{options.output}: the same numbers were to give the same logits; do not use it")


def convert(
    source: str | Path,
    target: str | Path,
    variant: str | None = None,
    format: str | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    new_rows: str = "mean",
    deep_embed_4x: bool = False,
    rosa: RosaConfig | None = None,
    add_rosa: RosaConfig | None = None,
    tokenizer: str | None = None,
    adapter: str | Path | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> tuple[RWKV, RWKV]:
    """Read a model, change what is asked for, and write it, with its tokenizer where the target has a place for one.

    Args:
        source: what :func:`heron.load` takes.
        target: a file or folder that does not exist yet.
        variant: make it this one (:func:`heron.checkpoint.migrate.upcycle`); None: as it is.
        format: of :func:`heron.save`; None: by the suffix of `target`.
        dtype: fp32, bf16 or fp16; None: as in the source.
        vocab_size: number of token ids (:func:`heron.checkpoint.migrate.resize_vocabulary`); None: as it is.
        new_rows: the rule for rows of new ids.
        deep_embed_4x: give the new variant the 4x form.
        rosa: how the ROSA in the source works, where nothing beside it says so.
        add_rosa: give the model such a ROSA branch, or such a ROSA memory.
        tokenizer: what :func:`heron.tokenizer.load` takes; None: what the source holds or lies in, and for 65,536 ids
            of which nothing tells, World. Warns of one that is assumed.
        adapter: first merged into the weights (:func:`heron.checkpoint.adapters.merged`).
        say: told of a tokenizer that the target can't hold.

    Returns:
        The model before and after.

    Raises:
        ConfigError: the target exists, or settings that contradict each other.
        CheckpointError: the source cannot be read, or the target cannot hold the model.
    """
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists already; name another file")
    check_name(target, format)  # not after minutes
    if dtype is not None and dtype not in machine.DTYPES:
        raise ConfigError(f"dtype: wanted {', '.join(machine.DTYPES)}, got {dtype!r}")
    named = None if tokenizer is None else Vocabulary.of(load_tokenizer(tokenizer))
    source = weights_file(Path(source))
    known = named
    if named is None:
        try:
            known = vocabulary_of(source)
        except (CheckpointError, DataError):
            if holds_tokenizer(target, format):
                raise
    tensors = read_tensors(source)
    tuned = {name: tensor for name, tensor in tensors.items() if TUNED.match(name)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in tuned}
    before = after = build(rest, source, None, *unsaid(tensors, source, rosa=rosa))
    if adapter is not None:
        before = after = merged(after, adapter, None if dtype is None else machine.DTYPES[dtype])
    torch.manual_seed(_SEED)  # of what is random in new parts, whose effect is multiplied by 0 before training
    if (deep_embed_4x or add_rosa) and variant is None:
        variant, deep_embed_4x = before.config.variant, deep_embed_4x or before.config.deep_embed_4x
    is_another = (variant, deep_embed_4x) != (before.config.variant, before.config.deep_embed_4x)
    if variant is not None and (is_another or add_rosa):
        after = migrate.upcycle(after, variant, deep_embed_4x, add_rosa)
    if vocab_size is not None and vocab_size != after.config.vocab_size:
        after = migrate.resize_vocabulary(after, vocab_size, new_rows)
    if dtype is not None:
        after = in_one_dtype(after, machine.DTYPES[dtype], source)
        tuned = converted(tuned, machine.DTYPES[dtype], source)
    _check_target(target, format, after.config, tuned)
    holds = holds_tokenizer(target, format)
    if holds and known is None:
        known = assume(after.config.vocab_size, target)
    elif known is not None and holds and named is None and known.vocab_size > after.config.vocab_size:
        warnings.warn(
            f"{target}: the tokenizer {known.spec} has {known.vocab_size} ids, the model only "
            f"{after.config.vocab_size}; it does not go along",
            stacklevel=2,
        )
        known = None
    same = (before.config.variant, before.config.vocab_size) == (after.config.variant, after.config.vocab_size)
    papers = papers_of(source)
    if (not same or adapter is not None) and card.CARD in papers:
        papers[card.CARD] = card.licence_alone(papers[card.CARD])  # the rest of it speaks of another model
    write({**after.state_dict(), **tuned}, after.config, target, format, known if holds else None, papers)
    if known is not None and not holds:
        say(
            f"{target}: this file has no place for the tokenizer ({known.spec}), which stays behind; name it "
            "(--tokenizer) wherever nothing else tells"
        )
    return before, after


def _check_target(target: Path, format: str | None, config: ModelConfig, tuned: dict[str, Tensor]) -> None:
    """CheckpointError where the target would silently hold less than the model."""
    is_folder = format == "safetensors" and not target.suffix
    if config.variant == "v8-hybrid" and config.has_ln0 and not is_folder:
        raise CheckpointError(
            f"{target}: one file cannot say that this v8-hybrid applies its ln0; write a folder, whose config.json "
            "can: --format safetensors and a name without a suffix"
        )
    if tuned and (format == "hf" or (format or target.suffix[1:]) == "gguf"):
        raise CheckpointError(
            f"{target}: this format has no place for the tuned initial state that lies beside the weights "
            "(att.time_state); .pth and .safetensors have"
        )


@torch.no_grad()
def largest_difference(before: RWKV, target: str | Path, rosa: RosaConfig | None = None) -> float:
    """The largest difference of a logit between a model and the file it was written to, both computed in fp32.

    Over 32 random tokens, from the ids and for the ids that both models have. `rosa`: as in :func:`heron.load`.
    """
    after = load(target, rosa=rosa)
    ids = min(before.config.vocab_size, after.config.vocab_size)
    tokens = torch.randint(ids, (1, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(_SEED))
    one, other = (in_one_dtype(model, torch.float32, target)(tokens)[0][..., :ids] for model in (before, after))
    return float((one - other).abs().max())
