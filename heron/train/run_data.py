"""What a run reads: its tokenizer, which it keeps, its tokens, and the order of its samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from heron import files, tokenizer
from heron.config import RosaConfig, TrainConfig
from heron.data import conversations, recalled, sequences, template
from heron.data.binidx import open_binidx
from heron.data.conversations import Conversations, Samples
from heron.data.corpora import Reading
from heron.data.loader import Batches, Corpus, load_corpus, training_text
from heron.data.packs import Packs
from heron.data.pairs import ANSWERS, encode_pair
from heron.data.recalled import Recalled
from heron.data.sampling import check_prime, magic_prime
from heron.errors import CheckpointError, ConfigError
from heron.tokenizer import document_end
from heron.tokenizer import learned as vocabulary
from heron.train.stop import Preemption


def text_tokenizer(
    config: TrainConfig, resume_from: Path | None, stop: Preemption, say: Callable[[str], None], learns: bool = True
) -> tokenizer.Tokenizer:
    """The tokenizer of the run. One that is a file, or is learned now, is kept in the run folder.

    A run that goes on keeps the one it has: ids would mean something else under any other. `learns`: whether one that
    is to be learned has not been kept by another process yet.
    """
    kept, end = Path(config.out) / "tokenizer.json", None
    if config.tokenizer.startswith(tokenizer.LEARNED) and not learns:
        return tokenizer.load(str(kept))
    earlier = None if resume_from is None else _content(resume_from.parents[1] / "tokenizer.json")
    if config.tokenizer.startswith(tokenizer.LEARNED):
        vocab_size = _whole_number(config.tokenizer)
        if config.eod not in (None, "0", document_end.NAMES[0]):
            raise ConfigError(f"eod {config.eod!r}: a learned vocabulary has {document_end.NAMES[0]} for it")
        if resume_from is None:
            reading = Reading.of(config)
            texts = stop.interruptible(
                lambda: training_text(config.data, config.val_data, config.val_fraction, reading)
            )
            content = vocabulary.learn(texts, vocab_size, say)
        elif earlier is None:
            raise CheckpointError(f"{resume_from}: its run has no tokenizer.json, so it was not {config.tokenizer}")
        else:
            content = earlier
    else:
        asked = tokenizer.load(config.tokenizer, config.eod)
        if not isinstance(asked, tokenizer.JsonTokenizer):
            return asked
        vocab_size, content = asked.vocab_size, Path(config.tokenizer).read_text(encoding="utf-8")
        if resume_from is not None and content != earlier:
            raise CheckpointError(f"{resume_from}: its run has another tokenizer than {config.tokenizer}")
        before = (
            asked if resume_from is None else tokenizer.JsonTokenizer(str(resume_from.parents[1] / "tokenizer.json"))
        )
        if before.eod != asked.eod:
            raise CheckpointError(
                f"{resume_from}: its run ends documents with {before.end}; {config.tokenizer} has {asked.end}; "
                f"type --eod {before.eod}"
            )
        end = asked.end
        if end.id is not None:
            say(f"each document ends with {end}")
    if Path(config.tokenizer).resolve() != kept.resolve():
        files.write_text(kept, content)
    found = tokenizer.load(str(kept))
    if end is not None and found.eod != end.id:  # the run folder must tell by itself, wherever it is moved
        beside = kept.with_name(document_end.CONFIG)
        if beside.exists():
            raise CheckpointError(f"{beside}: names another end of a document than {end}; move it elsewhere")
        files.write_text(beside, json.dumps({"eos_token": end.token}))
        found = tokenizer.load(str(kept))
    if found.vocab_size != vocab_size:
        raise CheckpointError(f"{resume_from}: its run has a tokenizer of {found.vocab_size} ids, not {vocab_size}")
    return found


def corpus(config: TrainConfig, text_tokenizer: tokenizer.Tokenizer, say: Callable[[str], None]) -> Corpus:
    """The tokens of the run; of one that learns from conversations, these, and the corpus that they are mixed with."""
    if learns_ids(config):
        return sequences.load(
            config.data, text_tokenizer.vocab_size, config.ctx_len, config.val_data, config.val_fraction, say
        )
    if (finetune := config.finetune) is not None:
        mix = None
        if finetune.mix:
            mix = load_corpus(
                finetune.mix_data, text_tokenizer, None, 0.0, text_tokenizer.vocab_size, Reading.of(config), say
            )
        return conversations.load(
            config.data, text_tokenizer, config.ctx_len, template.load(finetune.template), finetune.loss,
            config.val_data, config.val_fraction, say, mix, encode_pair if finetune.has_pairs else None,
        )  # fmt: skip
    return load_corpus(
        config.data, text_tokenizer, config.val_data, config.val_fraction, text_tokenizer.vocab_size,
        Reading.of(config), say,
    )  # fmt: skip


def learns_ids(config: TrainConfig) -> bool:
    """Whether the run learns from rows of ids, of which some may be masked."""
    return config.finetune is None and sequences.holds_ids(config.data, Reading.of(config).field)


def batches(config: TrainConfig, corpus: Corpus, rosa: RosaConfig | None, recalled: Recalled | None) -> Batches | Packs:
    """The samples of the run.

    Args:
        rosa: of the model's memory; None: it has none.
        recalled: what it recalls at each training token.
    """
    if not isinstance(corpus, Conversations):
        return Batches(corpus.train, config.ctx_len, config.seed, corpus.kind, prime(config, corpus), recalled)
    if config.finetune is None:
        return Packs(corpus.samples, config.ctx_len, config.seed, recalled=recalled)
    mix = None
    if corpus.mix is not None:
        of_mix = recollections(dataclasses.replace(config, data=config.finetune.mix_data), rosa, corpus.mix)
        mix = Batches(corpus.mix.train, config.ctx_len, config.seed, corpus.mix.kind, None, of_mix and of_mix[0])
    packed = config.finetune.pack == "on"
    share, together = config.finetune.mix_share, _together(config)
    return Packs(corpus.samples, config.ctx_len, config.seed, packed, recalled, mix, share, together)


def val_packs(config: TrainConfig, corpus: Corpus, recalled: Recalled | None) -> Packs | None:
    """The validation conversations; None where there are none."""
    if not isinstance(corpus, Conversations) or corpus.val_samples is None:
        return None
    packed = config.finetune is None or config.finetune.pack == "on"
    return Packs(corpus.val_samples, config.ctx_len, 0, packed, recalled, together=_together(config))


def _together(config: TrainConfig) -> int:
    """How many samples make one of what is learned from."""
    return len(ANSWERS) if config.finetune is not None and config.finetune.has_pairs else 1


def with_length(config: TrainConfig, batches: Batches | Packs, done: int) -> TrainConfig:
    """The settings with as many steps as `finetune.epochs` take, where nothing else says how long the run is.

    Raises:
        ConfigError: `done` steps are more than that.
    """
    if config.total_steps or config.finetune is None or not isinstance(batches, Packs):
        return config
    epochs = config.finetune.epochs
    steps = -(-epochs * batches.samples_per_epoch // config.samples_per_step)
    if done > steps:
        raise ConfigError(f"epochs {epochs}: are {steps:,} steps, and {config.out} is at step {done:,}; give more")
    return dataclasses.replace(config, max_steps=steps)


def recollections(
    config: TrainConfig, rosa: RosaConfig | None, corpus: Corpus
) -> tuple[recalled.Recalled, recalled.Recalled | None] | None:
    """What ROSA memory recalls at each token of training and of validation; None without a memory.

    Training looks back on the training tokens before it, validation on all of them and on its own before it; on its own
    alone where training is a binidx and validation is not its end. Texts are read now; a binidx has it beside it. A
    conversation looks back on itself alone.

    Raises:
        DataError: a binidx without its `.recalled`, or with one of other tokens or rules.
    """
    if rosa is None:
        return None
    rules = recalled.Rules.of(rosa)
    n_train = len(corpus.train)
    if isinstance(corpus, Conversations):
        val = None if corpus.val_samples is None else _each_alone(corpus.val_samples, rules)
        return _each_alone(corpus.samples, rules), val
    if corpus.kind == "binidx":
        found = recalled.read(config.data, open_binidx(config.data).tokens, rules)
        if config.val_data is not None and corpus.val is not None:
            return found, recalled.answers(corpus.val, rules)
    else:
        parts = [corpus.train] if corpus.val is None else [corpus.train, corpus.val]
        found = recalled.answers(np.concatenate(parts), rules)
    return found[:n_train], None if corpus.val is None else found[n_train:]


def _each_alone(samples: Samples, rules: recalled.Rules) -> Recalled:
    return recalled.answers_each((samples[number].ids for number in range(len(samples))), rules)


def looks_back_on(config: TrainConfig, corpus: Corpus) -> str:
    """What ROSA memory may look back on in training and in validation, in words."""
    if isinstance(corpus, Conversations):
        return "a token looks back on its own conversation or sequence"
    validation = "all of these and its own before it"
    if corpus.kind == "binidx" and config.val_data is not None:
        validation = "its own before it alone"
    in_validation = f"; validation, on {validation}" if corpus.val is not None else ""
    return f"a token looks back on the training tokens before it{in_validation}"


def prime(config: TrainConfig, corpus: Corpus) -> int | None:
    """The prime of the sample order; None: a permutation.

    Raises:
        ConfigError: one was asked for that does not fit the data.
    """
    if corpus.kind != "binidx":
        if config.magic_prime is not None:
            if isinstance(corpus, Conversations):
                raise ConfigError(f"magic_prime {config.magic_prime}: orders the samples of a binidx; drop it")
            raise ConfigError(
                f"magic_prime {config.magic_prime}: it orders the samples of a binidx, and {corpus.name} is text; "
                f"drop it, or type heron prepare {config.data} --out PREFIX, and train with --data PREFIX"
            )
        return None
    if config.magic_prime is None:
        return magic_prime(len(corpus.train), config.ctx_len)
    check_prime(config.magic_prime, len(corpus.train), config.ctx_len)
    return config.magic_prime


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _whole_number(spec: str) -> int:
    text = spec.removeprefix(tokenizer.LEARNED)
    if not text.isdecimal():
        raise ConfigError(f"tokenizer {spec}: wanted bpe:V with a whole number V, got {text!r}")
    return int(text)
