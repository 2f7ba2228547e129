"""The command line: `heron VERB`. Flags come from the config dataclasses; this file only parses, calls and prints."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from heron import __version__
from heron.config import LARGEST_SEED, MINI_EPOCH, PRESETS, ModelConfig, TrainConfig, read_yaml, setting_type
from heron.errors import ConfigError, HeronError, UnknownKeyError, did_you_mean

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (usage), 75 (stopped by a signal after saving)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        options = _parser().parse_args(arguments)
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except UnknownKeyError as error:
        return _fail(error, EXIT_USAGE)
    except HeronError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has gone
        sys.stderr.close()
        return 0
    except OSError as error:  # a folder that cannot be written, a disk that is full
        return _fail(f"{error.filename or 'disk'}: {error.strerror or error}", EXIT_FAILED)


def _fail(message: object, code: int) -> int:
    print(f"heron: {_one_line(message)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"heron: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(line.strip() for line in str(message).splitlines() if line.strip())


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the near flag or verb."""

    def parse_args(self, args=None, namespace=None):  # noqa: ANN001, ANN201 - argparse's own signature
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(options, "parser", self)
            flag = unknown[0].partition("=")[0]
            parser.error(f"unknown argument {flag}.{did_you_mean(flag, parser._option_string_actions)}")
        return options

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(action.choices)
            self.error(f"unknown verb {value!r}.{did_you_mean(value, action.choices)} There are {known}")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default that is a value; where there is none, the flag's own text says what happens without it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_value = action.default is None or action.default is False or action.default in ("", [])
        return action.help if no_value else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="heron",
        description="Train and run RWKV-8 language models.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"heron {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=_Help,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    demo = verb("demo", _demo, "train a small RWKV-8 on text that every Python has, and generate from it")
    demo.add_argument("--out", default="runs/demo", help="run folder")

    prepare = verb("prepare", _prepare, "turn txt, jsonl and folders into a binidx dataset")
    prepare.add_argument("inputs", nargs="+", help="txt, jsonl ({'text': ...} a line), folders, builtin:NAME")
    prepare.add_argument("--out", required=True, help="prefix of the .bin and .idx files")
    prepare.add_argument("--tokenizer", default="world", help="world, bytes, integers:V, or a tokenizer.json")
    prepare.add_argument("--workers", type=int, help="processes; default: one per core")
    prepare.add_argument("--overwrite", action="store_true", help="replace existing files")

    init = verb("init", _init, "write fresh weights with the reference initial values")
    init.add_argument("--out", default="rwkv-init.pth", help="a .pth or .safetensors file")
    init.add_argument("--seed", type=_seed, default=0, help="seed of the initial values")
    init.add_argument("--model", help=f"a preset: {', '.join(PRESETS)}; default: the sizes below")
    _add_settings(init, ModelConfig, prefix="model.")

    train = verb("train", _train, "train a model")
    train.add_argument("--config", help="a YAML file of settings, such as a run's config.yaml; flags override it")
    train.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check the settings, print them in full, read no data"
    )
    _add_settings(train, TrainConfig, prefix="")
    _add_settings(train, ModelConfig, prefix="model.")
    _add_rwkv_lm_flags(train)

    generate = verb("generate", _generate, "continue a prompt")
    generate.add_argument("model", help="a weights file, a checkpoint or a run folder")
    generate.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    generate.add_argument("--tokenizer", help="world, bytes, integers:V, a tokenizer.json; default: the run's own")
    generate.add_argument("--max_tokens", type=int, default=200, help="stop after this many tokens")
    generate.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    generate.add_argument("--top_p", type=float, default=0.5, help="keep the likeliest tokens up to this probability")
    generate.add_argument("--top_k", type=int, default=0, help="keep this many tokens; 0: all")
    generate.add_argument("--presence_penalty", type=float, default=0.0, help="against any repetition")
    generate.add_argument("--frequency_penalty", type=float, default=0.0, help="against frequent repetition")
    generate.add_argument("--penalty_decay", type=float, default=0.996, help="how penalties fade per token")
    generate.add_argument(
        "--stop", action="append", default=[], help="end at this text; may be given several times; default: none"
    )
    generate.add_argument("--seed", type=_seed, default=0, help="same seed, same text")
    generate.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")

    evaluate = verb("eval", _eval, "loss, perplexity and bits per byte of a model on a text")
    evaluate.add_argument("model", help="a weights file, a checkpoint or a run folder")
    evaluate.add_argument("--data", required=True, help="txt, jsonl, folder, binidx prefix or builtin:NAME; all of it")
    evaluate.add_argument("--tokenizer", help="world, bytes, integers:V, a tokenizer.json; default: the run's own")
    evaluate.add_argument("--ctx_len", type=int, default=1024, help="window length; each starts from a zero state")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")

    convert = verb("convert", _convert, "rewrite weights in another format")
    convert.add_argument("input", help="a weights file, a checkpoint or a run folder")
    convert.add_argument("output", help="the new file; .pth or .safetensors")

    info = verb("info", _info, "what a weights file, a run or a preset is")
    info.add_argument("model", nargs="?", help="a weights file, a checkpoint, a run folder, or a preset's name")
    info.add_argument("--params", action="store_true", help="every parameter: shape, group, lr, decay, initial value")
    info.add_argument("--presets", action="store_true", help="list the presets")

    verb("doctor", _doctor, "what this machine has, what each op would run on, what to install")

    plot = verb("plot", _plot, "draw the curves of one or more runs")
    plot.add_argument("runs", nargs="+", help="run folders")
    plot.add_argument("--out", default="loss.png", help="a .png or .svg file")
    return parser


# -- flags from the dataclasses -------------------------------------------------------------------------------------


def _add_settings(parser: argparse.ArgumentParser, config: type, prefix: str) -> None:
    """One flag per field; absent flags stay absent, so that a config file shows through."""
    for field in dataclasses.fields(config):
        kinds, _ = setting_type(config, field.name)
        flags = [f"--{prefix}{field.name}", f"--{field.name}"] if prefix else [f"--{field.name}"]
        default = "none" if field.default in (None, "") else field.default
        help_text = f"{field.metadata['doc']} (default: {default})".replace("%", "%%")
        common = dict(dest=f"{prefix}{field.name}", default=argparse.SUPPRESS, help=help_text)
        if bool in kinds:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        else:
            kind = next((kind for kind in (int, float) if kind in kinds), str)
            parser.add_argument(*flags, type=kind, metavar=kind.__name__.upper(), **common)


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"wanted 0 to {LARGEST_SEED}, got {seed}")
    return seed


def _given(options: argparse.Namespace, config: type, prefix: str) -> dict[str, Any]:
    """The settings that were given as flags."""
    names = (field.name for field in dataclasses.fields(config))
    return {name: vars(options)[prefix + name] for name in names if prefix + name in vars(options)}


# Flags of BlinkDL/RWKV-LM, RWKV-v7/train_temp/train.py, that have another name here.
_RENAMED = {
    "load_model": "model",
    "proj_dir": "out",
    "data_file": "data",
    "my_exit_tokens": "max_tokens",
    "random_seed": "seed",
}
# Flags that say what Heron does in any case: the values that it can honour, and what to do about another one.
_FIXED = {
    "my_testing": (("x070",), "RWKV-7, x070, is the oldest that is trained here"),
    "devices": (("1",), "one device per run for now"),
    "num_nodes": (("1",), "one node per run for now"),
    "strategy": (
        ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2"),
        "one device needs no sharding; drop the flag",
    ),
    "ds_bucket_mb": (("2", "200"), "there is no DeepSpeed here; drop the flag"),
    "train_stage": (("3",), "the other stages only write initial weights; type heron init"),
    "epoch_begin": (("0",), "a run goes on by itself from its newest checkpoint; drop the flag"),
    "epoch_count": (("999999",), "--my_exit_tokens says when to stop; drop the flag"),
    "enable_progress_bar": (("True",), "progress is always shown; drop the flag"),
    "data_type": (("binidx", "utf-8"), "give --data a binidx prefix, txt or jsonl; its kind is detected"),
}
_EITHER_OR = (("max_steps", "max_tokens"), ("val_data", "val_fraction"))
_ACCELERATORS = {"gpu": "cuda", "cpu": "cpu", "auto": "auto"}
_PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "bf16-mixed": "bf16"}


def _add_rwkv_lm_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("RWKV-LM names", "accepted as they are in the official trainer's scripts")

    def add(old: str, text: str) -> None:
        group.add_argument(f"--{old}", dest=f"rwkv_lm.{old}", metavar="VALUE", default=argparse.SUPPRESS, help=text)

    for old, new in _RENAMED.items():
        add(old, f"--{new}")
    for old, (values, _) in _FIXED.items():
        add(old, f"checked: {' or '.join(values)}")
    for old, text in {
        "accelerator": "--device: gpu, cpu or auto",
        "precision": "--dtype: bf16 or fp32",
        "grad_cp": "--grad_checkpoint: 0 or 1",
        "epoch_save": f"--save_every, in mini-epochs of {MINI_EPOCH} samples",
        "head_chunk": "any value: head and loss always work in chunks",
    }.items():
        add(old, text)


def _from_rwkv_lm(given: dict[str, str]) -> dict[str, Any]:
    """Settings that the RWKV-LM flags stand for; ConfigError with the reason for one that cannot be honoured.

    "epoch_save" stays as it is, a number of mini-epochs: how many steps these are depends on other settings.
    """
    settings: dict[str, Any] = {}
    for old, value in given.items():
        if old in _FIXED:
            values, reason = _FIXED[old]
            if value not in values:
                raise ConfigError(f"--{old} {value}: {reason}")
        elif old == "load_model" and value in ("", "0"):
            pass  # upstream's scripts: the newest file of the run, as --resume auto does
        elif old in ("accelerator", "precision"):
            new, values = ("device", _ACCELERATORS) if old == "accelerator" else ("dtype", _PRECISIONS)
            if value not in values:
                raise ConfigError(f"--{old} {value}: wanted {' or '.join(values)}")
            settings[new] = values[value]
        elif old == "grad_cp":
            settings["grad_checkpoint"] = bool(_number("--grad_cp", value))
        elif old == "epoch_save":
            settings["epoch_save"] = _number("--epoch_save", value)
        elif old in _RENAMED:
            new = _RENAMED[old]
            settings[new] = _number("--" + old, value) if new in ("max_tokens", "seed") else value
    return settings


def _number(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag}: wanted a whole number, got {text!r}") from None


def _train_config(options: argparse.Namespace) -> TrainConfig:
    """--config, with the flags laid over it."""
    settings = read_yaml(options.config) if options.config else {}
    flags = _given(options, TrainConfig, "")
    rwkv_lm = {key.partition(".")[2]: value for key, value in vars(options).items() if key.startswith("rwkv_lm.")}
    aliases = _from_rwkv_lm(rwkv_lm)
    mini_epochs = aliases.pop("epoch_save", None)
    for name, value in aliases.items():
        if flags.setdefault(name, value) != value:
            raise ConfigError(f"--{name} and its RWKV-LM name were both given, with different values")
    for one, other in _EITHER_OR:  # a flag takes the place of the file's other choice
        if (one in flags) != (other in flags):
            settings.pop(other if one in flags else one, None)
    settings |= flags

    changes = _given(options, ModelConfig, "model.")
    if "my_testing" in rwkv_lm and "model" not in settings:
        changes.setdefault("variant", "v7")
    if changes:
        settings["model"] = _changed_model(settings.get("model", TrainConfig.model), changes)
    config = TrainConfig.from_dict(settings)
    if mini_epochs is None:
        return config
    if "save_every" in flags:
        raise ConfigError("--save_every and --epoch_save were both given; drop one")
    return dataclasses.replace(config, save_every=mini_epochs * config.steps_per_mini_epoch)


def _changed_model(base: object, changes: dict[str, Any]) -> ModelConfig:
    if isinstance(base, dict):
        return ModelConfig.from_dict(base).changed(**changes)
    if isinstance(base, str) and base in PRESETS:
        return ModelConfig.preset(base, **changes)
    flags = ", ".join(f"--{name}" for name in changes)
    raise ConfigError(f"model {base} is no preset: a file decides its own sizes; drop {flags}")


# -- verbs ----------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from heron import demo

    return EXIT_PREEMPTED if demo.run(Path(options.out)) == "preempted" else 0


def _prepare(options: argparse.Namespace) -> None:
    from heron.data.prepare import prepare

    stats = prepare(options.inputs, options.out, options.tokenizer, options.workers, overwrite=options.overwrite)
    print(stats)


def _init(options: argparse.Namespace) -> None:
    import torch

    from heron.checkpoint import save
    from heron.model import RWKV

    changes = _given(options, ModelConfig, "model.")
    config = ModelConfig.preset(options.model, **changes) if options.model else ModelConfig.from_dict(changes)
    if Path(options.out).exists():
        raise ConfigError(f"{options.out} exists already; name another --out")
    torch.manual_seed(options.seed)
    model = RWKV(config)
    save(model, options.out)
    print(f"wrote {options.out}: {_sizes(config)}, {sum(p.numel() for p in model.parameters()):,} parameters")


def _train(options: argparse.Namespace) -> int:
    config = _train_config(options)
    from heron.train import Trainer

    trainer = Trainer(config)
    if options.dry_run:
        print(trainer.config.to_yaml(), end="")
        return 0
    return EXIT_PREEMPTED if trainer.fit() == "preempted" else 0


def _generate(options: argparse.Namespace) -> None:
    from heron import generation
    from heron.checkpoint import load

    sampling = generation.Sampling(
        options.temperature, options.top_p, options.top_k,
        options.presence_penalty, options.frequency_penalty, options.penalty_decay,
    )  # fmt: skip
    model = load(options.model).to(_device(options.device))
    tokenizer = _tokenizer(options, model.config.vocab_size)
    print(options.prompt, end="", flush=True)
    for piece in generation.stream(
        model, tokenizer, options.prompt, options.max_tokens, sampling, tuple(options.stop), options.seed
    ):
        print(piece, end="", flush=True)
    print()


def _eval(options: argparse.Namespace) -> None:
    from heron.checkpoint import load
    from heron.data.loader import load_tokens
    from heron.evaluate import evaluate

    model = load(options.model).to(_device(options.device))
    tokenizer = _tokenizer(options, model.config.vocab_size)
    tokens, n_bytes = load_tokens(options.data, tokenizer, model.config.vocab_size)
    score = evaluate(model, tokens, options.ctx_len, n_bytes)
    print(f"{options.data}: {score.n_targets:,} tokens in windows of {options.ctx_len}")
    print(f"loss           {score.loss:.4f} nats per token")
    print(f"perplexity     {score.perplexity:.3f}")
    if score.bits_per_byte is not None:
        print(f"bits per byte  {score.bits_per_byte:.4f}")


def _convert(options: argparse.Namespace) -> None:
    from heron.checkpoint import load, save

    if Path(options.output).exists():
        raise ConfigError(f"{options.output} exists already; name another file")
    model = load(options.input)
    save(model, options.output)
    print(f"wrote {options.output}: {_sizes(model.config)}")


def _info(options: argparse.Namespace) -> None:
    from heron import info

    if options.presets or options.model is None:
        print(info.presets())
    if options.model is not None:
        print(info.describe(options.model, options.params))


def _doctor(options: argparse.Namespace) -> None:
    from heron import doctor

    print(doctor.report())


def _plot(options: argparse.Namespace) -> None:
    from heron.report import plot

    print(f"wrote {plot([Path(folder) for folder in options.runs], Path(options.out))}")


def _sizes(config: ModelConfig) -> str:
    return f"{config.variant} L{config.n_layer} C{config.n_embd} N{config.head_size} V{config.vocab_size}"


def _device(wanted: str) -> str:
    from heron import machine

    return machine.choose_device(wanted).value


def _tokenizer(options: argparse.Namespace, vocab_size: int):  # noqa: ANN202 - heron.tokenizer.Tokenizer
    """The tokenizer that was asked for, else the one of the run that the weights lie in, else by the vocabulary."""
    from heron import tokenizer
    from heron.checkpoint import run

    if options.tokenizer:
        return tokenizer.load(options.tokenizer)
    path = Path(options.model).resolve()
    if path.is_dir():
        folder = path.parents[1] if run.is_checkpoint(path) else path
    else:
        folder = path.parents[2] if run.is_checkpoint(path.parent) else path.parent
    if (folder / "tokenizer.json").is_file():
        return tokenizer.load(str(folder / "tokenizer.json"))
    if (folder / "run.lock").is_file():
        return tokenizer.load(TrainConfig.from_yaml(folder / "config.yaml").tokenizer)
    usual = {256: "bytes", 65536: "world"}
    if vocab_size not in usual:
        raise ConfigError(f"{path}: vocab_size {vocab_size} does not tell the tokenizer; add --tokenizer")
    return tokenizer.load(usual[vocab_size])


if __name__ == "__main__":
    sys.exit(main())
