"""Which adapter fine-tuning puts on a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from heron.config.settings import from_dict, setting
from heron.errors import ConfigError, did_you_mean

KINDS = ("lora", "rslora", "dora", "pissa", "miss")
TABLES = ("frozen", "rows", "low-rank")
_OF_LOW_RANK = ("lora", "rslora")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """An adapter: what is trained beside the frozen weights of linear layers, and what becomes of DeepEmbed tables.

    Raises:
        ConfigError: an unknown kind, a rank below 1, and other numbers out of range.
    """

    kind: str = setting("lora", f"{', '.join(KINDS)}")
    rank: int = setting(32, "width of the adapter's factors; more of it learns more and takes more memory")
    alpha: float | None = setting(
        None, "the update is scaled by alpha / rank, in rslora by alpha / sqrt(rank); miss has none; None: the rank"
    )
    targets: str = setting("all", "linear layers by name, as in key,value,att.output,head; all: every one but the head")
    dropout: float = setting(0.0, "share of an adapter's inputs that is set to 0 while training")
    tables: str = setting(
        "frozen", "DeepEmbed tables: frozen, rows (those of tokens that occur train), or low-rank (LoRA on them)"
    )

    def __post_init__(self):
        if self.kind not in KINDS:
            hint = did_you_mean(str(self.kind), KINDS)
            raise ConfigError(f"adapter.kind: wanted {', '.join(KINDS)}, got {self.kind!r}.{hint}")
        if self.tables not in TABLES:
            hint = did_you_mean(str(self.tables), TABLES)
            raise ConfigError(f"adapter.tables: wanted {', '.join(TABLES)}, got {self.tables!r}.{hint}")
        if self.tables == "low-rank" and self.kind not in _OF_LOW_RANK:
            raise ConfigError(
                f"adapter.tables low-rank: is for adapter.kind {' and '.join(_OF_LOW_RANK)}, got {self.kind}; use one "
                "of these, or adapter.tables rows"
            )
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"adapter.rank: wanted a whole number from 1 on, got {self.rank!r}")
        if self.alpha is not None:
            if self.kind == "miss":
                raise ConfigError(f"adapter.alpha: miss is not scaled, got {self.alpha!r}; leave it out")
            if not _is_number(self.alpha) or self.alpha <= 0:
                raise ConfigError(f"adapter.alpha: wanted a number above 0, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout: wanted 0 or more and less than 1, got {self.dropout!r}")
        if not isinstance(self.targets, str) or not self.names:
            raise ConfigError(f"adapter.targets: wanted names with commas between, or all, got {self.targets!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """A config from plain values; an unknown key is a ConfigError that suggests the near name."""
        return from_dict(cls, values, where="finetune, adapter")

    @property
    def names(self) -> list[str]:
        """The targets one by one."""
        return [name.strip() for name in self.targets.split(",") if name.strip()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
