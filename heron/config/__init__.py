"""What a model is and how it is trained: frozen dataclasses, the presets, and their YAML form.

Standard library only (PyYAML is imported when YAML is read or written), so that every other module may import it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heron.config.finetune import FinetuneConfig
from heron.config.finetune_adapter import AdapterConfig as AdapterConfig
from heron.config.precision import DTYPES, INIT_DTYPES, TABLES_STATE, WEIGHTS, check_precision
from heron.config.presets import PRESETS, ROSA_PRESETS
from heron.config.settings import check_types as _check_types
from heron.config.settings import from_dict as _from_dict
from heron.config.settings import setting as _setting
from heron.config.settings import setting_type as setting_type
from heron.config.strict_yaml import read as read_yaml
from heron.config.tbptt import Tbptt
from heron.errors import ConfigError, did_you_mean

# Where the DeepEmbed gate of each variant acts; see ModelConfig.deep_embed.
_DEEP_EMBED = {"v7": None, "v7a": "low-rank", "v7b": "low-rank", "v8": "output", "v8-hybrid": "output", "rosa-lm": None}
VARIANTS = tuple(_DEEP_EMBED)
TRAINING_TABLES = ("device", "host")
COMPILE = ("auto", "on", "graph", "off")
ON_NONFINITE = ("stop", "skip", "rewind")
ON_OFF = ("auto", "on", "off")
PARALLEL = ("auto", "ddp", "fsdp", "hsdp")
ROSA_GRADS = ("none", "bitflip", "soft_suffix")
MINI_EPOCH = 40320  # samples; RWKV-LM counts its checkpoints and the lines of its log in these
LARGEST_SEED = 2**63 - 1
LARGEST_COUNT = 2**31 - 1  # of tokens, samples and the like at once
LARGEST_WIDTH = 2**24
LARGEST_SIZES = {"n_layer": 4096, "vocab_size": LARGEST_COUNT}  # no product of sizes then overflows 64 bits
_NAMES = ("model", "data", "val_data", "tokenizer", "out", "device", "resume")  # an empty text names nothing


def rank_rule(factor: float, n_embd: int) -> int:
    """Low-rank width of new models: ``max(32, 32 * round(factor * sqrt(n_embd) / 32))`` (RWKV-LM, train_temp)."""
    return max(32, 32 * round(factor * math.sqrt(n_embd) / 32))


@dataclasses.dataclass(frozen=True)
class RosaConfig:
    """How a ROSA layer works. None of this can be read from its tensors, except which of them there are.

    The source decides what comes out: rows of an embedding (token), emb1 or emb0 by the predicted bit (self), +e or -e
    by it (qkv). ``RosaConfig.preset("qkv-1bit")`` is the layer of upstream's 1-bit language model.

    Raises:
        ConfigError: a value that does not exist, a rule for no match that is not given, or that the source lacks.
    """

    source: str = _setting("qkv", "of the symbols: token (ids), self (signs of x), qkv (signs of three projections)")
    bits: int = _setting(1, "channels that share a stream: 1 or 4; the first is the least significant bit")
    no_match: str | None = _setting(None, "what no match gives: zero (0.0) or bit0 (as a predicted 0); must be given")
    max_match: int | None = _setting(None, "symbols of a match that count; None: all, as upstream")
    proj_bias: bool = _setting(True, "qkv: the projections q, k, v, o have a bias")
    token_shift: bool = _setting(True, "qkv: the projections read x mixed with the x before, by x_q, x_k, x_v")
    grad: str = _setting("soft_suffix", "rule for the gradient of the symbols: none, bitflip or soft_suffix")
    scope: str = _setting("sample", "token: what is looked into: the sample alone, or the stream of all that was read")
    n_matches: int = _setting(2, "stream: matches of a position that count; each predicts another token")
    window: int | None = _setting(None, "stream: how many tokens back a match may end; None: any number")
    end: int | None = _setting(None, "stream: id that ends a document, across which nothing matches; None: no such id")

    def __post_init__(self) -> None:
        _check_types(self)
        choices = {
            "source": ("token", "self", "qkv"), "bits": (1, 4), "no_match": ("zero", "bit0"), "grad": ROSA_GRADS,
            "scope": ("sample", "stream"),
        }  # fmt: skip
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                wanted = ", ".join(map(str, known))
                of_upstream = ", ".join(preset for preset in ROSA_PRESETS if preset != "memory")
                usual = f"; the presets {of_upstream} have upstream's" if name == "no_match" else ""
                raise ConfigError(f"rosa, {name}: wanted one of {wanted}, got {value!r}{usual}")
        if self.source == "token" and self.no_match != "zero":
            raise ConfigError("rosa, no_match: a token has no bit 0; source token gives zero")
        if self.max_match is not None and self.max_match < 1:
            raise ConfigError(f"rosa, max_match: wanted at least 1, or nothing, got {self.max_match}")
        if self.scope == "stream":
            self._check_stream()
        elif self.window is not None or self.end is not None:
            raise ConfigError(
                f"rosa, {'end' if self.window is None else 'window'}: only a ROSA of scope stream has one"
            )

    def _check_stream(self) -> None:
        if self.source != "token":
            raise ConfigError(f"rosa, scope: a stream is one of token ids; source is {self.source}")
        ranges = dict(max_match=(1, 255), n_matches=(1, 8), window=(1, LARGEST_COUNT), end=(0, LARGEST_COUNT))
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not (value is None and name in ("window", "end")) and not least <= (value or 0) <= most:
                raise ConfigError(f"rosa, {name}: of a stream wanted {least} to {most}, got {value}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RosaConfig:
        """One of upstream's layers, with `changes` laid over it."""
        if name not in ROSA_PRESETS:
            known = ", ".join(ROSA_PRESETS)
            raise ConfigError(f"no ROSA preset {name!r}; there are {known}.{did_you_mean(name, ROSA_PRESETS)}")
        return cls(**{**ROSA_PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RosaConfig:
        """A config from plain values; an unknown key is a ConfigError that suggests the near name."""
        return _from_dict(cls, values, where="rosa")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Fields left at None are filled by the rules that RWKV-LM uses for new models.

    Raises:
        ConfigError: an unknown variant, a size below 1, an n_embd that head_size does not divide, or an option that
            the variant does not have.
    """

    variant: str = _setting("v8", "v7; v8 and v7a (DeepEmbed); v7b and v8-hybrid (attention too); rosa-lm (ROSA alone)")
    n_layer: int = _setting(12, "number of blocks")
    n_embd: int = _setting(768, "width of the residual stream (C)")
    vocab_size: int = _setting(65536, "number of token ids (V)")
    head_size: int = _setting(64, "channels of one WKV head (N), 16 to 128; it must divide n_embd")
    ffn_dim: int | None = _setting(None, "hidden width of the channel mix; None: 4 * n_embd")
    decay_rank: int | None = _setting(None, "rank of att.w1/w2; None: from n_embd")
    iclr_rank: int | None = _setting(None, "rank of att.a1/a2; None: from n_embd")
    value_rank: int | None = _setting(None, "rank of att.v1/v2; None: from n_embd")
    gate_rank: int | None = _setting(None, "rank of att.g1/g2; None: from n_embd")
    deep_embed_4x: bool = _setting(False, "v8, v8-hybrid: gates on all ffn_dim hidden channels, not on n_embd outputs")
    has_ln0: bool | None = _setting(None, "normalise the embedding; None: yes, except in a v8-hybrid")
    rosa: RosaConfig | None = _setting(
        None, "a ROSA branch: qkv-1bit, qkv-4bit; memory; None: none (rosa-lm: qkv-1bit)"
    )
    memory: RosaConfig | None = _setting(None, "ROSA over all token ids read so far: memory; None: none", False)

    def __post_init__(self) -> None:
        for name in ("rosa", "memory"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, RosaConfig.preset(value))
            elif isinstance(value, Mapping):
                base = ROSA_PRESETS["memory"] if name == "memory" else {}
                object.__setattr__(self, name, RosaConfig.from_dict({**base, **value}))
        if isinstance(self.rosa, RosaConfig) and self.rosa.scope == "stream":
            if self.memory not in (None, self.rosa):
                raise ConfigError("rosa and memory are both a ROSA memory, and not the same one; give one of them")
            object.__setattr__(self, "memory", self.rosa)
            object.__setattr__(self, "rosa", None)
        _check_types(self)
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"variant: wanted one of {', '.join(VARIANTS)}, got {self.variant!r}."
                f"{did_you_mean(self.variant, VARIANTS)}"
            )
        self._check_sizes()
        for name, value in self._derived().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_sizes()
        if not 16 <= self.head_size <= 128:
            raise ConfigError(f"head_size: wanted 16 to 128, got {self.head_size}")
        if self.n_embd % self.head_size and self.has_time_mix:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of head_size {self.head_size}")
        if self.deep_embed_4x and _DEEP_EMBED[self.variant] != "output":
            raise ConfigError(f"deep_embed_4x is an option of v8 and v8-hybrid; variant is {self.variant}")
        if not self.has_ln0 and self.variant != "v8-hybrid":
            raise ConfigError(f"has_ln0 False is for v8-hybrid alone; variant {self.variant} always applies ln0")
        if self.rosa is not None and self.rosa.source != "qkv":
            raise ConfigError(f"rosa: a branch has source qkv, got {self.rosa.source}; give qkv-1bit or qkv-4bit")
        if self.memory is not None and self.memory.scope != "stream":
            raise ConfigError(f"memory: wanted a ROSA of scope stream, got scope {self.memory.scope}; give memory")
        if self.rosa is not None and self.n_embd % self.rosa.bits:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of {self.rosa.bits}, the bits of a ROSA symbol")

    def _check_sizes(self) -> None:
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), LARGEST_SIZES.get(field.name, LARGEST_WIDTH)
            if type(value) is int and not 1 <= value <= most:
                wanted = "at least 1" if value < 1 else f"at most {most}"
                raise ConfigError(f"{field.name}: wanted {wanted}, got {value}")

    @property
    def has_time_mix(self) -> bool:
        """Whether blocks mix along time by WKV7; else head_size and the ranks mean nothing."""
        return self.variant != "rosa-lm"

    @property
    def n_head(self) -> int:
        """Number of WKV heads (H)."""
        return self.n_embd // self.head_size if self.has_time_mix else 0

    @property
    def deep_embed(self) -> str | None:
        """Where the DeepEmbed gate acts: "output" or "hidden" (a table of gates), "low-rank" (hidden), or nowhere."""
        return "hidden" if self.deep_embed_4x else _DEEP_EMBED[self.variant]

    @property
    def has_attention(self) -> bool:
        """Whether every block has a DeepEmbedAttention branch beside its time mix."""
        return self.variant in ("v7b", "v8-hybrid")

    @property
    def reads_embedded(self) -> bool:
        """Whether something in a block reads the tokens as they came into the network, beside the residual stream."""
        return self.has_attention or self.deep_embed == "low-rank"

    @property
    def state_grows(self) -> bool:
        """Whether a model remembers more with each token (attention, ROSA), not only a state of one size."""
        return self.has_attention or self.rosa is not None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """The named preset, with `changes` laid over it. ``heron info --presets`` lists them all."""
        if not isinstance(name, str) or name not in PRESETS:
            near = did_you_mean(str(name), PRESETS)
            raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.{near}")
        return cls.from_dict({**PRESETS[name], **changes})

    def changed(self, **changes: Any) -> ModelConfig:
        """A copy with `changes`; what is as the rules make it (ffn_dim, ranks, has_ln0) follows them."""
        return ModelConfig.from_dict({**self.to_dict(), **self.by_rule(), **changes})

    def by_rule(self) -> dict[str, None]:
        """None for each field that is as the rules for new models make it."""
        return {name: None for name, value in self._derived().items() if getattr(self, name) == value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """A config from plain values; an unknown key is a ConfigError that suggests the near name."""
        return _from_dict(cls, values, where="model")

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for YAML or JSON."""
        return dataclasses.asdict(self)

    def _derived(self) -> dict[str, int | bool | RosaConfig | None]:
        """What the fields that are left at None become."""
        width = max(self.n_embd, 1)
        return {
            "ffn_dim": 4 * self.n_embd,
            "decay_rank": rank_rule(2.5, width),
            "iclr_rank": rank_rule(2.5, width),
            "value_rank": rank_rule(1.7, width),
            "gate_rank": rank_rule(5.0, width),
            "has_ln0": self.variant != "v8-hybrid",
            "rosa": RosaConfig.preset("qkv-1bit") if self.variant == "rosa-lm" else None,
        }


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a flag of ``heron train`` and a key of the ``config.yaml`` in the run folder.

    The fields of `finetune` are flags of ``heron finetune`` instead.

    Raises:
        ConfigError: a value out of range, or two fields that contradict each other.
    """

    model: ModelConfig | str = _setting("rwkv8-tiny", "a preset, or the checkpoint or weights to start from")
    init_from: str = _setting("", "weights to start from that may lack tensors: these keep their initial values")
    init_dtype: str = _setting("fp32", "initial values: fp32, or bf16: rounded, as RWKV-LM's --precision bf16 has them")
    data: str = _setting(
        "builtin:python-docs",
        "txt, JSON, csv, parquet, folder, binidx prefix, builtin:python-docs, builtin:python-stdlib",
    )
    val_data: str | None = _setting(None, "separate validation text or binidx; None: val_fraction of data")
    val_fraction: float | None = _setting(None, "share kept for validation (the end); None: 0.1 for text, 0 for binidx")
    column: str | None = _setting(None, "field of JSON rows, or column of csv and parquet, to read; None: text")
    glob: str | None = _setting(None, 'files of a folder to read, "*.py,*.rst" say; None: text, JSON, csv, parquet')
    split_at: str | None = _setting(None, "cut texts into documents at this, <|endoftext|> say; None: nowhere")
    allow_normalized: bool = _setting(False, "let texts through that the tokenizer's normalizer changes; count them")
    tokenizer: str = _setting(
        "bytes", "bytes, world, integers:V[:E] (E ends a document), a tokenizer.json, bpe:V (learned from the data)"
    )
    eod: str | None = _setting(None, "token or id that ends a document; None: as the tokenizer's files say")
    out: str = _setting("runs/first", "run folder: config, log, plot, samples, checkpoints, final weights")
    ctx_len: int = _setting(512, "tokens of one sample (T)")
    micro_bsz: int = _setting(8, "samples of one forward pass (B)")
    accumulate: int = _setting(1, "forward passes per optimizer step")
    max_steps: int | None = _setting(None, "stop after this many optimizer steps (give this or max_tokens)")
    max_tokens: int | None = _setting(None, "stop after this many training tokens (give this or max_steps)")
    lr_init: float = _setting(6e-4, "learning rate after the warm-up")
    lr_final: float = _setting(6e-5, "learning rate at the end of the cosine")
    warmup_steps: int = _setting(10, "steps of linear warm-up from 1% of lr_init; -1: none, as RWKV-LM has it")
    beta1: float = _setting(0.9, "AdamW: decay of the first moment")
    beta2: float = _setting(0.99, "AdamW: decay of the second moment")
    adam_eps: float = _setting(1e-18, "AdamW: epsilon")
    weight_decay: float = _setting(0.1, "AdamW: decoupled decay of the large matrices (the reference group)")
    grad_clip: float = _setting(1.0, "clip the global gradient norm to this; 0: never")
    grad_checkpoint: bool = _setting(False, "recompute each block in the backward: less memory, more time")
    tbptt: str = _setting("", "read samples in chunks of so many tokens, states passed on; exact: gradients too")
    dtype: str = _setting("auto", "of matrix products: fp32, bf16, fp8 (large ones; a GPU), or auto: what is fast here")
    weights: str = _setting(
        "auto", "the network computes with fp32 weights, a bf16 copy of them, or auto: bf16 on a GPU"
    )
    compile: str = _setting("auto", "compile the blocks: off, on, graph (replay each pass too), or auto: on a GPU")
    device: str = _setting("auto", "cpu, cuda, cuda:1, ..., or auto: cuda where there is one")
    tables: str = _setting("device", "where DeepEmbed tables are: device, or host (only the rows of a step move)")
    tables_state: str = _setting("fp32", "AdamW's moments for tables on the host: fp32 or bf16")
    threads: int = _setting(0, "CPU threads; 0: those the run began with, chosen by trial. Others change last bits")
    parallel: str = _setting("auto", "many GPUs: each has all weights (ddp) or a part (fsdp, hsdp); auto: by size")
    context_parallel: int = _setting(1, "processes that share each sample, a span of its tokens each; they divide W")
    processes: int = _setting(0, "processes that share each step, one a GPU; 0: as many as torchrun started")
    dist_timeout: float = _setting(600.0, "seconds for which one process waits for another before the run fails")
    magic_prime: int | None = _setting(None, "binidx: prime of RWKV-LM's sample order; None: the largest that fits")
    seed: int = _setting(0, "seed of the initial values, the sample order of small data, and the samples")
    save_every: int = _setting(500, "steps between checkpoints (one is always written at the end); 0: only at the end")
    keep: int = _setting(2, "newest checkpoints kept")
    background_save: str = _setting("auto", "write checkpoints from a copy while training goes on: on, off; auto: GPU")
    eval_every: int = _setting(250, "steps between validations (one is always made at the end); 0: only at the end")
    sample_every: int = _setting(250, "steps between sampled texts; 0: none")
    sample_prompt: str = _setting("", "prompt of the sampled texts; empty: the first tokens of the validation data")
    sample_tokens: int = _setting(200, "length of a sampled text, in tokens")
    log_every: int = _setting(1, "steps between log lines")
    on_nonfinite: str = _setting("stop", "after a loss or gradient that is not finite: stop, skip the batch, or rewind")
    spike: float = _setting(0.0, "the same for a loss this many standard deviations above the last 128; 0: never")
    max_hours: float | None = _setting(None, "save and stop, with exit code 75, before so many hours are over")
    num_workers: int = _setting(0, "deprecated, no effect: a batch is read in less than a hundredth of a step's time")
    resume: str = _setting("auto", "auto: go on with the run in out; none: refuse a used folder; or a checkpoint")
    tensorboard: bool = _setting(False, "also write TensorBoard events (pip install 'heron-rwkv[tensorboard]')")
    wandb: str = _setting("", "also log to this Weights & Biases project (pip install 'heron-rwkv[wandb]')")
    finetune: FinetuneConfig | None = _setting(
        None, "learn from conversations, as heron finetune does; None: from text"
    )

    def __post_init__(self) -> None:
        if isinstance(self.model, Mapping):
            object.__setattr__(self, "model", ModelConfig.from_dict(self.model))
        if isinstance(self.finetune, Mapping):
            object.__setattr__(self, "finetune", FinetuneConfig.from_dict(self.finetune))
        for name in ("eod", "tbptt"):  # YAML reads an id, or a number of tokens, as a number
            object.__setattr__(self, name, str(value) if type(value := getattr(self, name)) is int else value)
        _check_types(self)
        for name in _NAMES:
            value = getattr(self, name)
            if isinstance(value, str) and not value.strip():
                raise ConfigError(f"{name}: wanted a name or a path, got {value!r}; is a shell variable not set?")
        at_least = dict(ctx_len=1, micro_bsz=1, accumulate=1, keep=1, log_every=1, max_steps=1, max_tokens=1)
        at_least |= dict(warmup_steps=-1, dist_timeout=1, context_parallel=1)
        zero = ("threads", "processes", "seed", "save_every", "eval_every", "sample_every", "sample_tokens")
        zero += ("num_workers", "spike", "max_hours", "lr_init", "lr_final", "weight_decay", "grad_clip")
        at_least |= dict.fromkeys(zero, 0)
        counts = ("ctx_len", "micro_bsz", "accumulate", "threads", "processes", "num_workers", "sample_tokens")
        for name, most in (dict.fromkeys(counts, LARGEST_COUNT) | dict(seed=LARGEST_SEED)).items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name}: wanted at most {most}, got {getattr(self, name)}")
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name}: wanted at least {least}, got {value}")
        for name in ("beta1", "beta2", "val_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name}: wanted 0 <= {name} < 1, got {value}")
        if Tbptt.of(self.tbptt) and self.finetune is not None and self.finetune.has_pairs:
            raise ConfigError(f"tbptt {self.tbptt}: pairs of answers are read whole; drop it, or objective dpo")
        if not self.adam_eps > 0:
            raise ConfigError(f"adam_eps: wanted more than 0, got {self.adam_eps}")
        by_epochs = self.finetune is not None and self.max_steps is None
        if (self.max_steps is None) == (self.max_tokens is None) and not by_epochs:
            raise ConfigError(
                "give exactly one of max_steps and max_tokens, "
                f"got max_steps={self.max_steps} and max_tokens={self.max_tokens}"
            )
        choices = dict(
            dtype=DTYPES, init_dtype=INIT_DTYPES, tables=TRAINING_TABLES, tables_state=TABLES_STATE, weights=WEIGHTS,
            compile=COMPILE, on_nonfinite=ON_NONFINITE, parallel=PARALLEL, background_save=ON_OFF,
        )  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                near = did_you_mean(value, known)
                raise ConfigError(f"{name}: wanted one of {', '.join(known)}, got {value!r}.{near}")
        if self.init_from and isinstance(self.model, str) and self.model not in PRESETS:
            raise ConfigError(f"model {self.model} and init_from {self.init_from} are two starts; drop one")
        if self.finetune is not None and self.tokenizer.startswith("bpe:"):
            raise ConfigError(f"tokenizer {self.tokenizer}: fine-tuning keeps the base's vocabulary; name its file")
        if self.finetune is not None and (base := self.finetune.weights) != "auto":
            if self.weights not in ("auto", base):
                raise ConfigError(f"weights {self.weights} and base {base} contradict each other; drop one")
            object.__setattr__(self, "weights", base)
        if self.freezes and self.init_from:
            raise ConfigError(f"init_from {self.init_from}: beside a frozen base nothing else can train; name a model")
        frozen = self.finetune.base if self.finetune is not None and self.freezes else None
        check_precision(self.dtype, self.weights, frozen, self.tables, self.tables_state)
        if self.val_data is not None and self.val_fraction:
            raise ConfigError(
                f"val_data {self.val_data!r} and val_fraction {self.val_fraction} exclude each other; drop one"
            )

    @property
    def freezes(self) -> bool:
        """Whether the weights of the model stay as they are, and something beside them trains."""
        return self.finetune is not None and self.finetune.freezes

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        return self.samples_per_step * self.ctx_len

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, of all processes together."""
        return self.micro_bsz * self.accumulate * max(1, self.processes // self.context_parallel)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; `max_tokens` is rounded up to a whole step. 0: `finetune.epochs` decide."""
        if self.max_steps is not None:
            return self.max_steps
        return -(-(self.max_tokens or 0) // self.tokens_per_step)

    @property
    def steps_per_mini_epoch(self) -> int:
        """Optimizer steps of a mini-epoch of RWKV-LM, at least 1."""
        return max(1, MINI_EPOCH // self.samples_per_step)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from plain values; `model` may be a mapping. An unknown key is a ConfigError, as in ModelConfig."""
        return _from_dict(cls, values, where="config")

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read a ``config.yaml``, for instance the one of an earlier run."""
        return cls.from_dict(read_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for YAML."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The text of a ``config.yaml`` that gives this config again."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)
