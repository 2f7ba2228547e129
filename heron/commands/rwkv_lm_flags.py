"""The flags of the official trainer, BlinkDL/RWKV-LM, RWKV-v7/train_temp/train.py: what becomes of each here.

Some have another name here, some say what Heron does in any case, some have no effect and are told, each with a line,
and the rest are refused with what to type instead. Its flags that have the same name and meaning (``--ctx_len``, ...)
are plain fields of `TrainConfig` and `ModelConfig` and not in this file. docs/migration.md has the whole list.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from heron.config import MINI_EPOCH, PRESETS, ModelConfig, TrainConfig
from heron.errors import ConfigError

PREFIX = "rwkv_lm."  # of the destinations of these flags, so that they never meet a setting's

RENAMED = {  # -> field of TrainConfig
    "load_model": "model",
    "proj_dir": "out",
    "data_file": "data",
    "my_exit_tokens": "max_tokens",
    "random_seed": "seed",
    "accumulate_grad_batches": "accumulate",
}
WIDTHS = {  # -> field of ModelConfig; 0 or less: by its rule
    "dim_ffn": "ffn_dim",
    "d_decay_lora": "decay_rank",
    "d_aaa_lora": "iclr_rank",
    "d_mv_lora": "value_rank",
    "d_gate_lora": "gate_rank",
}
TRANSLATED = {  # -> its help text
    "accelerator": "--device: gpu, cpu or auto",
    "precision": "--dtype: bf16 or fp32; tf32 becomes fp32",
    "grad_cp": "--grad_checkpoint: 0 or 1",
    "epoch_save": f"--save_every, in mini-epochs of {MINI_EPOCH} samples",
    "train_stage": "1: write PROJ_DIR/rwkv-init.pth and end; 0, 2 or 3: train",
    "epoch_begin": "0; in --train_stage 1 to 3 any number, without effect",
    "load_partial": "1: tensors that the loaded file lacks keep their initial values",
    "dim_att": "0 or n_embd",
}
CHECKED = {  # -> the values that say what Heron does, and the reason why another one is refused
    "my_testing": (("x070",), "RWKV-7, x070, is the oldest that is trained here"),
    "devices": (("1",), "torchrun --nproc-per-node N -m heron train starts N; type --devices 1 behind it"),
    "num_nodes": (("1",), "torchrun --nnodes N -m heron train starts one of N; type --num_nodes 1 behind it"),
    "strategy": (
        ("auto", "ddp", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2"),
        "type --strategy deepspeed_stage_2, and --parallel fsdp to shard weights over the GPUs that torchrun starts",
    ),
    "data_type": (("binidx", "utf-8"), "give --data_file a binidx prefix, txt or jsonl; its kind is detected"),
}
NO_EFFECT = {  # -> what any value of it would decide, and who does instead
    "kernel": "Heron picks its kernels by itself, and heron doctor lists them",
    "head_chunk": "head and loss always work in chunks",
    "ds_bucket_mb": "there is no DeepSpeed here",
    "epoch_count": "--my_exit_tokens says when the run ends, as it does there",
    "epoch_steps": f"a mini-epoch has {MINI_EPOCH} samples, as it does there",
}
_OVERWRITTEN = "train.py sets it itself"
_NOT_HERE = "a run here has nothing that it would change"
LIGHTNING_NO_EFFECT = {  # flags of pytorch-lightning 1.9's Trainer, all of which train.py takes
    **dict.fromkeys(
        ("max_epochs", "logger", "enable_checkpointing", "replace_sampler_ddp", "num_sanity_val_steps",
         "check_val_every_n_epoch", "log_every_n_steps"), _OVERWRITTEN
    ),
    "gradient_clip_val": "--grad_clip sets it, as it does there",
    "enable_progress_bar": "progress is always shown",
    "track_grad_norm": "the gradient norm of every step is in log.jsonl",
    **dict.fromkeys(
        ("min_epochs", "min_steps", "default_root_dir", "limit_val_batches", "limit_test_batches",
         "limit_predict_batches", "val_check_interval", "sync_batchnorm", "inference_mode", "move_metrics_to_cpu",
         "multiple_trainloader_mode", "enable_model_summary", "auto_lr_find", "auto_scale_batch_size",
         "auto_select_gpus", "reload_dataloaders_every_n_epochs", "amp_backend", "amp_level", "benchmark"), _NOT_HERE
    ),
}  # fmt: skip
LIGHTNING_REFUSED = {  # -> what to do
    **dict.fromkeys(("gpus", "tpu_cores", "ipus", "num_processes"), "type --accelerator gpu --devices 1, or --device"),
    "gradient_clip_algorithm": "the global norm is clipped; type --grad_clip",
    "overfit_batches": "train on a small file",
    "limit_train_batches": "type --max_steps",
    "fast_dev_run": "type --max_steps 1",
    "max_time": "type --max_hours",
    "resume_from_checkpoint": "type --resume",
    "profiler": "type heron bench",
    "deterministic": "a run on one machine repeats bit for bit anyway; drop the flag",
    "detect_anomaly": "a loss or gradient that is not finite is always seen; type --on_nonfinite",
    "plugins": "there are none; drop the flag",
}
_ACCELERATORS = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu", "auto": "auto"}
_PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "bf16-mixed": "bf16", "tf32": "fp32"}
_TOKENIZERS = {256: "bytes", 65536: "world"}


def add(parser: argparse.ArgumentParser, own: Sequence[str] = ()) -> None:
    """Let a parser accept these flags, but for its `own` of that name."""
    group = parser.add_argument_group("RWKV-LM names", "flags of the official trainer, and what each is here")

    def flag(name: str, text: str, **more: Any) -> None:
        group.add_argument(
            f"--{name}", dest=PREFIX + name, metavar="VALUE", default=argparse.SUPPRESS, help=text, **more
        )

    for name, new in RENAMED.items():
        flag(name, f"--{new}")
    for name, new in WIDTHS.items():
        flag(name, f"--{new}; 0: as its rule says")
    for name, text in TRANSLATED.items():
        flag(name, text)
    for name, (values, _) in CHECKED.items():
        flag(name, f"must be {' or '.join(values)}")
    for name, reason in NO_EFFECT.items():
        flag(name, f"no effect: {reason}")
    for name in (*LIGHTNING_NO_EFFECT, *LIGHTNING_REFUSED):  # its switches stand there with a value or without
        if name not in own:
            flag(name, argparse.SUPPRESS, nargs="?", const="True")


@dataclasses.dataclass
class Official:
    """What the flags of one command line come to.

    Attributes:
        settings: fields of TrainConfig that they set.
        model: fields of ModelConfig that they set.
        notes: one line for each flag that has no effect, or another one than there.
        stage: of --train_stage.
        given: the flags themselves, as they were typed.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    stage: int = 0
    given: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_x070(self) -> bool:
        """Whether --my_testing asks for an RWKV-7."""
        return "my_testing" in self.given

    @property
    def saves_by_mini_epochs(self) -> bool:
        """Whether --epoch_save sets how often checkpoints are written."""
        return "epoch_save" in self.given

    @property
    def is_partial(self) -> bool:
        """Whether --load_partial lays a file over initial values of the sizes that were given."""
        return _number("load_partial", self.given.get("load_partial", "0"), 0, 1) == 1

    @property
    def model_flags(self) -> dict[str, str]:
        """The flag that set each field of `model`."""
        return {new: name for name, new in WIDTHS.items() if new in self.model}

    def finish(self, config: TrainConfig, has_tokenizer: bool) -> TrainConfig:
        """The settings of the run with what depends on several of them.

        Args:
            config: made from all flags and files, `settings` and `model` among them.
            has_tokenizer: whether a tokenizer was given.
        """
        given, changes = self.given, {}
        if "epoch_save" in given:
            changes["save_every"] = _number("epoch_save", given["epoch_save"]) * config.steps_per_mini_epoch
        if config.warmup_steps == -1 and self.stage >= 2:
            newest = _weights_in(config.out)[:1]
            if newest and newest[0].stem != "rwkv-init":
                changes["warmup_steps"] = 10  # what train.py makes of -1 then
        if self.is_partial and not config.init_from:
            from heron.train import base_model

            newest = base_model.newest_whole(_weights_in(config.out), self.notes.append)
            if newest is None:
                self.notes.append("--load_partial 1: no effect; there is no file to load")
            else:
                changes["init_from"] = str(newest)
        if given.get("data_type") == "binidx" and not has_tokenizer:
            vocab_size = _model_of(config).vocab_size
            changes["tokenizer"] = _TOKENIZERS.get(vocab_size, f"integers:{vocab_size}")
            if vocab_size not in _TOKENIZERS:
                self.notes.append(
                    f"tokenizer {changes['tokenizer']}: samples are shown as ids; give --tokenizer FILE to read them"
                )
        width = _number("dim_att", given.get("dim_att", "0"))
        if width > 0 and width != (n_embd := _model_of(config).n_embd):
            raise ConfigError(f"--dim_att {width}: time mixing is as wide as the model; type 0, or n_embd, {n_embd}")
        return dataclasses.replace(config, **changes)


def read(options: argparse.Namespace, any_length: bool) -> Official:
    """Translate the flags that were given; settings that mean "not given" there (-1, 0) are taken off `options`.

    Args:
        options: of a parser that :func:`add` has seen.
        any_length: whether a run of no length will do.

    Raises:
        ConfigError: a value that cannot be honoured, with the reason and what to type.
    """
    values = vars(options)
    given = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    official = Official(stage=_number("train_stage", given.get("train_stage", "0"), 0, 3), given=given)
    settings, notes = official.settings, official.notes
    if values.get("max_steps") == -1:
        del values["max_steps"]
        notes.append("--max_steps -1: no limit, as without the flag")
    if values.get("model.vocab_size") == 0:
        del values["model.vocab_size"]
        notes.append("--vocab_size 0: as without the flag")
    for name, value in given.items():
        if name in RENAMED:
            settings |= _renamed(name, value, official)
        elif name in WIDTHS:
            if (number := _number(name, value)) > 0:
                official.model[WIDTHS[name]] = number
        elif name in CHECKED:
            known, reason = CHECKED[name]
            if value not in known:
                raise ConfigError(f"--{name} {value}: {reason}")
        elif name in NO_EFFECT:
            if name != "kernel":
                _number(name, value)
            notes.append(f"--{name} {value}: no effect; {NO_EFFECT[name]}")
        elif name in LIGHTNING_NO_EFFECT:
            if (name, value) != ("enable_progress_bar", "True"):
                notes.append(f"--{name} {value}: no effect; {LIGHTNING_NO_EFFECT[name]}")
        elif name in LIGHTNING_REFUSED:
            raise ConfigError(f"--{name} {value}: not taken here; {LIGHTNING_REFUSED[name]}")
    settings |= dict(_translated(given, official))
    may_lack_length = any_length or official.stage == 1 or "my_exit_tokens" not in given or values.get("config")
    if not may_lack_length and not {"max_steps", "max_tokens"} & (values.keys() | settings.keys()):
        raise ConfigError(
            f"--my_exit_tokens {given['my_exit_tokens']}: the run has no end then, and no learning rate (train.py "
            "stops at its first step); type the number of tokens to train on, or --max_steps"
        )
    return official


def write_initial_weights(config: TrainConfig) -> str:
    """What --train_stage 1 does: write rwkv-init.pth, the values that a run of this config would start from.

    A file that is there already is kept if it holds these very values, and otherwise refused: it may be somebody's
    base model. Where the data are a binidx, its sample order is checked as well, as upstream does.

    Returns:
        A line for the user.

    Raises:
        HeronError: a model that is a file, another rwkv-init.pth, a prime that does not fit the data.
    """
    import torch

    from heron.checkpoint import read_tensors, save
    from heron.data.binidx import is_binidx, open_binidx
    from heron.data.sampling import check_prime
    from heron.errors import CheckpointError
    from heron.model import RWKV

    path, sizes = Path(config.out) / "rwkv-init.pth", _model_of(config)
    if config.init_from or (isinstance(config.model, str) and config.model not in PRESETS):
        raise ConfigError(
            f"--train_stage 1 with {config.init_from or config.model}: initial values are not combined with a file "
            "here; drop one of the two. A base model is trained by --load_model alone, or as PROJ_DIR/rwkv-init.pth"
        )
    if config.magic_prime is not None and is_binidx(config.data):
        check_prime(config.magic_prime, len(open_binidx(config.data).tokens), config.ctx_len)
    torch.manual_seed(config.seed)
    model = RWKV(sizes)
    if config.init_dtype == "bf16":
        model = model.to(torch.bfloat16)
    if path.exists():
        old, new = read_tensors(path), model.state_dict()
        if old.keys() != new.keys() or not all(torch.equal(old[name], new[name]) for name in new):
            raise CheckpointError(
                f"{path}: is there already and holds other values; it is not written over. Train from it with "
                "--train_stage 3, or move it, or name another --proj_dir"
            )
        return f"{path}: is there already, with these very values. Now go on with --train_stage 3"
    save(model, path)
    values = "fp32 (--init_dtype bf16 rounds them as train.py does)" if config.init_dtype == "fp32" else "bf16"
    return f"wrote {path}: initial values in {values}. Now go on with --train_stage 3"


def _renamed(name: str, value: str, official: Official) -> dict[str, Any]:
    """A flag that has another name here, where its value means something."""
    new = RENAMED[name]
    if name == "load_model":
        if value in ("", "0"):  # upstream's scripts: the newest file of the folder, which a run finds by itself
            return {}
        if official.stage >= 2:
            official.notes.append(
                f"--train_stage {official.stage}: the file of --load_model is loaded; train.py would take the newest "
                "rwkv-*.pth in --proj_dir"
            )
        partial = _number("load_partial", official.given.get("load_partial", "0"), 0, 1)
        return {"init_from" if partial else new: value}
    if name in ("proj_dir", "data_file"):
        return {new: value}
    number = _number(name, value)
    if name == "random_seed" and number < 0:
        official.notes.append(f"--random_seed {value}: the seed is --seed, {TrainConfig.seed} unless given")
        return {}
    if name == "my_exit_tokens" and number < 0:
        raise ConfigError(
            f"--my_exit_tokens {value}: a negative number averages the cosine with a rate that train.py does not set; "
            f"type --my_exit_tokens {-number} for the cosine"
        )
    if name == "my_exit_tokens" and number == 0:
        return {}
    return {new: number}


def _translated(given: dict[str, str], official: Official) -> Iterator[tuple[str, Any]]:
    """Settings that a flag stands for in other words."""
    for name, new, values in (("accelerator", "device", _ACCELERATORS), ("precision", "dtype", _PRECISIONS)):
        if name in given:
            if given[name] not in values:
                wanted = "gpu or cpu" if name == "accelerator" else "fp32 or bf16"
                why = "; fp16 overflows, and bf16 is as fast" if given[name] == "fp16" else ""
                raise ConfigError(f"--{name} {given[name]}: wanted {wanted}{why}")
            yield new, values[given[name]]
    if given.get("precision") == "tf32":
        official.notes.append("--precision tf32: computes in fp32; there is no TF32 here")
    if "grad_cp" in given:
        yield "grad_checkpoint", bool(_number("grad_cp", given["grad_cp"], 0, 1))
    if given.get("data_type") == "utf-8":
        official.notes.append("--data_type utf-8: no effect; the kind of the data is detected")
    if _number("epoch_begin", given.get("epoch_begin", "0")) != 0:
        if official.stage == 0:
            raise ConfigError(
                f"--epoch_begin {given['epoch_begin']}: a run goes on by itself from its newest checkpoint; drop it"
            )
        official.notes.append(f"--epoch_begin {given['epoch_begin']}: no effect, as in stages 1 to 3 there")


def _weights_in(folder: str) -> list[Path]:
    """What train.py would load from its folder, the first one first: rwkv-N.pth by falling N, then rwkv-init.pth."""
    found = {}
    for path in Path(folder).glob("rwkv-*.pth"):
        if match := re.fullmatch(r"rwkv-(init|\d+)\.pth", path.name):
            found[-1 if match[1] == "init" else int(match[1])] = path
    return [found[number] for number in sorted(found, reverse=True)]


def _model_of(config: TrainConfig) -> ModelConfig:
    """The sizes of the model: as given, as the preset has them, or as the file that is to be trained has them."""
    if isinstance(config.model, ModelConfig):
        return config.model
    if config.model in PRESETS:
        return ModelConfig.preset(config.model)
    from heron.checkpoint import load

    return load(config.model).config


def _number(name: str, text: str, least: int | None = None, most: int | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"--{name}: wanted a whole number, got {text!r}") from None
    if least is not None and most is not None and not least <= number <= most:
        raise ConfigError(f"--{name}: wanted {least} to {most}, got {text}")
    return number
