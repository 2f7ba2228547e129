"""How a run learns from conversations: the settings that fine-tuning has beside those of any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from heron.config.finetune_adapter import AdapterConfig
from heron.config.settings import check_types, from_dict, setting
from heron.errors import ConfigError, did_you_mean

METHODS = ("full", "lora", "state")
LOSSES = ("assistant", "all")
OBJECTIVES = ("likelihood", "dpo")
BASES = ("auto", "fp32", "bf16", "int8", "nf4")
QUANTIZED = ("int8", "nf4")
RWKV_TEMPLATE = "rwkv"

# What `heron finetune` sets where neither a flag nor a file does.
DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {
        "lr_init": 2e-5,  # about a thirtieth of a fresh model's: small steps keep what the base knows
        "lr_final": 2e-6,
        "weight_decay": 0.0,  # decay pulls weights towards 0, which is away from the base
        "ctx_len": 1024,  # most conversations are shorter; the rest of a sample is packed with others
    },
    "lora": {
        "lr_init": 1e-4,  # between the 2e-5 of RWKV-PEFT (scripts/run_lora.sh) and the 2e-4 of QLoRA (arXiv:2305.14314)
        "lr_final": 1e-5,
        "weight_decay": 0.0,  # an adapter starts as no change, and decay would pull it back there
        "ctx_len": 1024,
    },
    "state": {
        # RWKV-LM's README and RWKV-PEFT (scripts/demo-state-tuning.sh) go from 1 down to 1e-2, with RWKV-6
        "lr_init": 1e-2,
        "lr_final": 1e-3,
        "weight_decay": 0.0,  # decay would pull a state back to remembering nothing
        "ctx_len": 1024,
    },
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What is learned from conversations, and by which method. Part of a :class:`heron.TrainConfig`.

    Raises:
        ConfigError: a value that does not exist or is out of range.
    """

    method: str = setting(
        "full", "what is trained: full (all weights), lora (an adapter) or state (what sequences start from)"
    )
    adapter: AdapterConfig | None = setting(None, "lora: the adapter; None: AdapterConfig()")
    token_shifts: bool = setting(False, "state: the token shifts of each layer train too; upstream's files have none")
    base: str = setting("auto", "lora, state: frozen weights in bf16, fp32, int8, nf4 (GPU), or auto: as weights says")
    objective: str = setting("likelihood", "likelihood (of answers), or dpo: the chosen of two answers is preferred")
    dpo_beta: float = setting(0.1, "dpo: how closely what is trained keeps to what the run starts from; more: closer")
    template: str = setting(RWKV_TEMPLATE, "how messages become text: rwkv (upstream's), or a FILE.jinja")
    loss: str = setting("assistant", "what is learned: assistant (answers and their ends), or all")
    pack: str = setting("on", "on: several conversations share a sample, each as if alone; off: one a sample")
    mix: str = setting("", "FILE:0.1: one sample in ten from this second corpus, all of it learned; empty: none")
    epochs: int = setting(3, "passes over the conversations, where neither max_steps nor max_tokens is given")
    show: int = setting(0, "print so many samples before training: learned tokens coloured, others dim, ids")

    def __post_init__(self) -> None:
        if isinstance(self.adapter, Mapping):
            object.__setattr__(self, "adapter", AdapterConfig.from_dict(self.adapter))
        check_types(self)
        choices = dict(method=METHODS, objective=OBJECTIVES, loss=LOSSES, pack=("on", "off"), base=BASES)
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"finetune, {name}: wanted one of {', '.join(known)}, got {value!r}.{did_you_mean(value, known)}"
                )
        if self.method == "lora" and self.adapter is None:
            object.__setattr__(self, "adapter", AdapterConfig())
        of_others = {"adapter": ("lora", self.adapter), "token_shifts": ("state", self.token_shifts)}
        for name, (method, value) in of_others.items():
            if value and self.method != method:
                raise ConfigError(f"finetune, {name}: belongs to method {method}, got method {self.method}; drop one")
        if self.base != "auto" and not self.freezes:
            raise ConfigError(f"finetune, base {self.base}: method full freezes no weights; set weights instead")
        if self.quantizes and self.adapter is not None and self.adapter.kind in ("pissa", "miss"):
            raise ConfigError(
                f"finetune, base {self.base}: adapter.kind {self.adapter.kind} needs weights that are not quantized; "
                "use lora, rslora or dora"
            )
        check_template("finetune, template", self.template)
        for name, least in (("epochs", 1), ("show", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"finetune, {name}: wanted at least {least}, got {getattr(self, name)}")
        if not self.dpo_beta > 0:
            raise ConfigError(f"finetune, dpo_beta: wanted more than 0, got {self.dpo_beta}")
        if self.has_pairs and (self.mix or self.loss == "all"):
            name = "mix" if self.mix else "loss all"
            raise ConfigError(f"finetune, {name}: belongs to objective likelihood, got objective dpo; drop one")
        _ = self.mix_share

    @property
    def freezes(self) -> bool:
        """Whether the weights of the base stay as they are, and something beside them trains."""
        return self.method != "full"

    @property
    def quantizes(self) -> bool:
        """Whether the frozen weights are kept in 8 or 4 bits."""
        return self.base in QUANTIZED

    @property
    def weights(self) -> str:
        """What the network computes with beside this base, as TrainConfig's `weights`."""
        return "bf16" if self.quantizes else self.base

    @property
    def has_pairs(self) -> bool:
        """Whether the data are pairs of answers, of which one was chosen."""
        return self.objective == "dpo"

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


def tables_train(finetune: FinetuneConfig | None) -> bool:
    """Whether DeepEmbed tables train, and not only what is beside them; None: the run trains every weight."""
    if finetune is None or not finetune.freezes:
        return True
    return finetune.adapter is not None and finetune.adapter.tables == "rows"


def check_template(name: str, template: str) -> None:
    """ConfigError, for the setting `name`, unless a chat template is upstream's or a FILE.jinja."""
    if template != RWKV_TEMPLATE and not template.endswith(".jinja"):
        raise ConfigError(f"{name}: wanted {RWKV_TEMPLATE} or a FILE.jinja, got {template!r}")
