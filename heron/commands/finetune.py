"""`heron finetune`: train a base model on conversations, in the loop of `heron train`; show first what is learned."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heron.commands import EXIT_PREEMPTED, defaults
from heron.commands.settings import given, overridden
from heron.commands.telling import telling
from heron.config import PRESETS, FinetuneConfig, TrainConfig, read_yaml
from heron.config.finetune import DEFAULTS
from heron.config.finetune_adapter import AdapterConfig
from heron.errors import ConfigError
from heron.train.stop import Preemption


def run(options: argparse.Namespace) -> int:
    with Preemption(), telling():  # PyTorch and the base take seconds to load
        config = _config(options)
        from heron.train import Trainer

        if options.dry_run:
            if config.finetune is not None and config.finetune.show:
                Trainer(config).preview()
                return 0
            trainer = Trainer(config, say=lambda line: print(f"# {line}"))  # so that what is printed is a config file
            trainer.preview()
            print(trainer.config.to_yaml(), end="")
            return 0
        trainer = Trainer(config)
    return EXIT_PREEMPTED if trainer.fit() == "preempted" else 0


def _config(options: argparse.Namespace) -> TrainConfig:
    """The settings: of --config, else of the run in --out, else the method's; with the flags laid over them."""
    if options.base in PRESETS:
        raise ConfigError(f"{options.base}: is a preset, which has no weights to start from; name a file or a run")
    flags, of_method = given(options, TrainConfig, ""), given(options, FinetuneConfig, "finetune.")
    out = Path(flags.get("out", TrainConfig.out))
    before = read_yaml(options.config) if options.config else defaults.of_run(out, flags.get("resume", "auto"))
    if before and not options.config and not before.get("finetune"):
        raise ConfigError(f"{out}: holds a run that does not learn from conversations; name another --out")
    finetune = {**(before.get("finetune") or {}), **of_method}
    earlier = (before.get("finetune") or {}).get("method", finetune.get("method"))
    if not options.config and finetune.get("method") != earlier:
        raise ConfigError(f"{out}: holds a run of method {earlier}, not {finetune['method']}; name another --out")
    if of_adapter := given(options, AdapterConfig, "finetune.adapter."):
        finetune["adapter"] = {**(finetune.get("adapter") or {}), **of_adapter}
    method = str(finetune.get("method", FinetuneConfig.method))
    settings: dict[str, Any] = {**DEFAULTS.get(method, {}), **before}
    if "epochs" in of_method:  # it decides, unless a flag does
        settings.pop("max_steps", None)
        settings.pop("max_tokens", None)
    settings = overridden(settings, flags) | {"model": options.base, "finetune": finetune}
    if "data" not in settings:
        raise ConfigError("finetune: wanted --data FILE, a jsonl of conversations (docs/start/fine-tune.md says how)")
    if "tokenizer" not in settings:
        settings["tokenizer"] = _tokenizer_of(options.base)
    return TrainConfig.from_dict(settings)


def _tokenizer_of(base: str) -> str:
    """The name or the file of the tokenizer that a base was trained with."""
    from heron.checkpoint import load
    from heron.commands.sources import tokenizer_of

    spec = tokenizer_of(base, None, load(base).config.vocab_size).spec
    if spec.endswith(".json") and not Path(spec).is_file():
        raise ConfigError(f"{base}: holds a tokenizer and no tokenizer.json; name one with --tokenizer")
    return spec
