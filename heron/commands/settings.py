"""The settings of a run: from a config file or from the run's folder, overridden by flags."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from heron.commands import rwkv_lm_flags
from heron.config import PRESETS, ModelConfig, TrainConfig, read_yaml
from heron.errors import ConfigError

READING = ("column", "glob", "split_at", "allow_normalized", "eod")  # settings of what reads text besides train
_EITHER_OR = (("max_steps", "max_tokens"), ("val_data", "val_fraction"))


def given(options: argparse.Namespace, config: type, prefix: str) -> dict[str, Any]:
    """The settings that were given as flags."""
    names = (field.name for field in dataclasses.fields(config))
    return {name: vars(options)[prefix + name] for name in names if prefix + name in vars(options)}


def overridden(settings: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Settings with flags laid over them. Of two that exclude each other a flag takes the place of the other, too."""
    gone = {other for pair in _EITHER_OR for one, other in (pair, pair[::-1]) if one in flags}
    return {name: value for name, value in settings.items() if name not in gone} | flags


def train_config(options: argparse.Namespace, any_length: bool = False) -> TrainConfig:
    """--config, with the flags laid over it; `any_length`: max_steps and max_tokens may both be missing."""
    from heron.commands import defaults
    from heron.dist import Ranks

    official = rwkv_lm_flags.read(options, any_length)
    flags, changes = given(options, TrainConfig, ""), given(options, ModelConfig, "model.")
    for ours, theirs in ((flags, official.settings), (changes, official.model)):
        for name, value in theirs.items():
            if ours.setdefault(name, value) != value:
                raise ConfigError(
                    f"--{name} {ours[name]} and its RWKV-LM name, as {value}, were both given, with different values; "
                    "drop one"
                )
    out = Path(flags["out"]) if "out" in flags else None
    settings = read_yaml(options.config) if options.config else defaults.of_run(out, flags.get("resume", "auto"))
    settings = overridden(settings, flags)
    if official.is_x070 and "model" not in settings:
        changes.setdefault("variant", "v7")
    named = settings.get("model")
    lies_there = named is None and not official.is_partial and "init_from" not in settings and official.stage != 1
    found = defaults.weights_in(Path(str(settings.get("out", TrainConfig.out)))) if lies_there else None
    if found is None and "vocab_size" not in changes and isinstance(settings.get("tokenizer"), str):
        changes |= defaults.vocabulary(settings["tokenizer"], named)
    if changes or named in list(PRESETS):
        settings["model"] = _changed_model(named or found or TrainConfig.model, changes, official.model_flags)
    elif found is not None:
        settings["model"] = found
    of_any_length = any_length or official.stage == 1
    if out is not None and not of_any_length and not settings.keys() & {"max_steps", "max_tokens"}:
        raise ConfigError(f"{out}: holds no run to go on with; to begin one, give --max_steps or --max_tokens")
    if of_any_length and not settings.keys() & {"max_steps", "max_tokens"}:
        settings["max_steps"] = 1
    if official.saves_by_mini_epochs and "save_every" in flags:
        raise ConfigError("--save_every and --epoch_save were both given; drop one")
    config = official.finish(TrainConfig.from_dict(settings), has_tokenizer="tokenizer" in settings)
    for note in official.notes if Ranks.of_environment().is_first else ():  # as comments where settings are printed
        print(f"# {note}" if vars(options).get("dry_run") else note)
    options.stage = official.stage
    return config


def _changed_model(base: object, changes: dict[str, Any], flags: dict[str, str]) -> ModelConfig | str:
    """A model with `changes`. A file decides its own sizes; to name them too, as upstream's scripts do, is no harm.

    `flags` has the flag of each change that was given under another name.
    """
    if isinstance(base, dict):
        return ModelConfig.from_dict(base).changed(**changes)
    if isinstance(base, str) and base in PRESETS:
        return ModelConfig.preset(base, **changes)
    if "rosa" in changes:
        raise ConfigError(
            f"model {base} is no preset, and a run cannot tell a bare file about its ROSA; type heron convert {base} "
            f"FOLDER --format safetensors --rosa {changes['rosa']}, and train with --model FOLDER"
        )
    from heron.checkpoint import load

    held = load(str(base)).config
    for name, value in changes.items():
        if getattr(held, name) != value:
            flag, is_there = flags.get(name, name), getattr(held, name)
            raise ConfigError(f"--{flag} {value}: {base} has {is_there}, and a file decides its own sizes")
    return str(base)


def step_of(options: argparse.Namespace) -> tuple[TrainConfig, ModelConfig]:
    """The settings and the model of a training step; how many steps a run would have does not matter."""
    config = train_config(options, any_length=True)
    from heron.checkpoint import load
    from heron.train import Trainer

    config = Trainer(config).config
    if config.finetune is not None and config.finetune.has_pairs:  # a step of pairs takes as much as one of answers
        config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, objective="likelihood"))
    return config, config.model if isinstance(config.model, ModelConfig) else load(config.model).config
