"""How a run learns from conversations: the settings that fine-tuning has beside those of any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from heron.config.settings import check_types, from_dict, setting
from heron.errors import ConfigError, did_you_mean

METHODS = ("full", "lora", "state")
LOSSES = ("assistant", "all")
RWKV_TEMPLATE = "rwkv"

# What `heron finetune` sets where neither a flag nor a file does.
DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {
        "lr_init": 2e-5,  # about a thirtieth of a fresh model's: small steps keep what the base knows
        "lr_final": 2e-6,
        "weight_decay": 0.0,  # decay pulls weights towards 0, which is away from the base
        "ctx_len": 1024,  # most conversations are shorter; the rest of a sample is packed with others
    }
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What is learned from conversations, and by which method. Part of a :class:`heron.TrainConfig`.

    Raises:
        ConfigError: a value that does not exist or is out of range.
    """

    method: str = setting("full", "what is trained: full (all weights)")
    template: str = setting(RWKV_TEMPLATE, "how messages become text: rwkv (upstream's), or a FILE.jinja")
    loss: str = setting("assistant", "what is learned: assistant (answers and their ends), or all")
    pack: str = setting("on", "on: several conversations share a sample, each as if alone; off: one a sample")
    mix: str = setting("", "FILE:0.1: one sample in ten from this second corpus, all of it learned; empty: none")
    epochs: int = setting(3, "passes over the conversations, where neither max_steps nor max_tokens is given")
    show: int = setting(0, "print so many samples before training: learned tokens coloured, others dim, ids")

    def __post_init__(self) -> None:
        if isinstance(self.pack, bool):  # YAML 1.1 reads on and off so
            object.__setattr__(self, "pack", "on" if self.pack else "off")
        check_types(self)
        for name, known in (("method", METHODS), ("loss", LOSSES), ("pack", ("on", "off"))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"finetune, {name}: wanted one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}"
                )
        if self.method != "full":
            raise ConfigError(f"finetune, method: {self.method} is not built yet; full is")
        if self.template != RWKV_TEMPLATE and not self.template.endswith(".jinja"):
            raise ConfigError(f"finetune, template: wanted {RWKV_TEMPLATE} or a FILE.jinja, got {self.template!r}")
        for name, least in (("epochs", 1), ("show", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"finetune, {name}: wanted at least {least}, got {getattr(self, name)}")
        _ = self.mix_share

    @property
    def mix_data(self) -> str:
        """The second corpus; empty: there is none."""
        return self.mix.rpartition(":")[0]

    @property
    def mix_share(self) -> Fraction:
        """The share of samples that come from the second corpus, exactly as it was written.

        Raises:
            ConfigError: not FILE:SHARE with 0 < SHARE < 1.
        """
        if not self.mix:
            return Fraction(0)
        try:
            share = Fraction(self.mix.rpartition(":")[2])
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not (self.mix_data and 0 < share < 1):
            raise ConfigError(
                f"finetune, mix: wanted FILE:SHARE with 0 < SHARE < 1, as in old.txt:0.1; got {self.mix!r}"
            )
        return share

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """A config from plain values; an unknown key is a ConfigError that suggests the near name."""
        return from_dict(cls, values, where="finetune")
