"""The command line: `heron VERB`. Flags come from the config dataclasses; this file only parses, calls and prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from heron import __version__, streams, threads
from heron.commands import rwkv_lm_flags
from heron.config import (
    INIT_DTYPES,
    LARGEST_SEED,
    PRESETS,
    ModelConfig,
    RosaConfig,
    TrainConfig,
    read_yaml,
    setting_type,
)
from heron.errors import CheckpointError, ConfigError, DataError, HeronError, UnknownKeyError, did_you_mean
from heron.preemption import Preemption, Stopped, left_behind
from heron.progress import progress

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75


def main(arguments: Sequence[str] | None = None, before_work: Callable[[], None] = lambda: None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (usage), 75 (stopped by a signal after saving).

    `before_work` is called once the command line has been read.
    """
    of_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    threads.wait_briefly()
    streams.open_closed()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _flushed(_run(arguments, before_work))
        except SystemExit as stop:  # of argparse, which has shown a help text or what is wrong
            raise SystemExit(_flushed(stop.code or 0)) from None
    if of_process and left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a library's call goes on in a thread, which the end of Python may not disturb
    return code


def _flushed(code: int) -> int:
    """`code`, or that of a failure where what was printed can't be written."""
    try:
        streams.flush()
    except OSError as error:
        return code or _fail(f"standard output: {error.strerror}", EXIT_FAILED)
    return code


def _run(arguments: list[str], before_work: Callable[[], None]) -> int:
    try:
        options = _parser().parse_args(arguments)
        if options.run not in (_train, _demo):  # which answer a signal in a way of their own
            import torch  # noqa: F401 - what an exception would break in the middle is whole once work begins
        before_work()
        return options.run(options) or 0
    except UnknownKeyError as error:
        return _fail(error, EXIT_USAGE)
    except HeronError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Stopped:  # before a run had begun
        return EXIT_PREEMPTED
    except BrokenPipeError:  # the reader of our output, `head` for instance, has gone
        return 0
    except OSError as error:  # a folder that cannot be written, a disk that is full
        return _fail(f"{error.filename or 'disk'}: {error.strerror or error}", EXIT_FAILED)
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        return _fail("the name of a file holds a null byte; no file can have that name", EXIT_FAILED)
    except (MemoryError, RuntimeError, TypeError, OverflowError) as error:
        if "can't start new thread" in str(error):
            return _fail(f"{error}: the system allows no more processes (see ulimit -u)", EXIT_FAILED)
        if (shortage := _shortage(error)) is None:
            raise
        return _fail(f"not enough memory: {shortage}; choose smaller sizes", EXIT_FAILED)


def _shortage(error: BaseException) -> str | None:
    if "torch" not in sys.modules:
        return None
    from heron import memory

    return memory.shortage(error)


def _fail(message: object, code: int) -> int:
    print(f"heron: {_one_line(message)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"heron: warning: {_one_line(message)}", file=sys.stderr)


def _note(line: str) -> None:
    print(f"heron: {_one_line(line)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(line.strip() for line in str(message).splitlines() if line.strip())


_MAY_BE_EMPTY = {"prompt", "sample_prompt", "system", "think", "stop", "wandb", "rwkv_lm.load_model", "rwkv_lm.kernel"}


class _Once(argparse.Action):
    """Stores a value; refuses an empty one where it names something, and a second one that differs."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001, ANN204 - argparse's signature
        words = values if isinstance(values, list) else [values]
        if self.dest not in _MAY_BE_EMPTY and any(isinstance(word, str) and not word.strip() for word in words):
            raise argparse.ArgumentError(self, "wanted a value, got an empty one; is a shell variable not set?")
        _set_once(self, namespace, values, option_string)


class _OnOff(argparse.BooleanOptionalAction):
    """--flag and --no-flag; refuses both at once."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: ANN001, ANN204 - argparse's signature
        _set_once(self, namespace, not option_string.startswith("--no-"), option_string)


def _set_once(action: argparse.Action, namespace: argparse.Namespace, value: object, option: str | None) -> None:
    given = vars(namespace).setdefault("_given", {})
    if option is not None and given.setdefault(action.dest, value) != value:
        raise argparse.ArgumentError(action, f"given twice, as {given[action.dest]!r} and as {value!r}; drop one")
    setattr(namespace, action.dest, value)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the near flag or verb."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_args(self, args=None, namespace=None):  # noqa: ANN001, ANN201 - argparse's own signature
        args = [_with_underscores(argument) for argument in (sys.argv[1:] if args is None else args)]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(options, "parser", self)
            flag = unknown[0].partition("=")[0]
            parser.error(f"unknown argument {flag}.{did_you_mean(flag, parser._option_string_actions)}")
        return options

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(action.choices)
            what = f"value for {action.option_strings[0]}" if action.option_strings else "verb"
            self.error(f"unknown {what} {value!r}.{did_you_mean(value, action.choices)} There are {known}")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _with_underscores(argument: str) -> str:
    """``--max-hours=2`` as ``--max_hours=2``; what is no flag as it is."""
    if not argument.startswith("--"):
        return argument
    dashes = "--no-" if argument.startswith("--no-") else "--"
    flag, equals, value = argument.removeprefix(dashes).partition("=")
    return dashes + flag.replace("-", "_") + equals + value


_TOKENIZERS = "world, bytes, integers:V[:E] (E ends a document), a tokenizer.json"


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

    prepare = verb("prepare", _prepare, "turn texts, JSON rows, tables and folders into a binidx dataset")
    inputs_help = "txt, jsonl ({'text': ...} a line), json, csv, parquet, each also .gz .bz2 .xz; folders, builtin:NAME"
    prepare.add_argument("inputs", nargs="+", help=inputs_help)
    prepare.add_argument("--out", required=True, help="prefix of the .bin and .idx files")
    prepare.add_argument("--tokenizer", default="world", help=_TOKENIZERS)
    _add_settings(prepare, TrainConfig, prefix="", names=_READING)
    prepare.add_argument("--workers", type=int, help="processes; default: one per core")
    prepare.add_argument("--overwrite", action="store_true", help="replace existing files")
    bad_line_help = "a jsonl line or document that cannot be used: stop, or skip, count and log it"
    prepare.add_argument("--on_bad_line", choices=("stop", "skip"), default="stop", help=bad_line_help)
    prepare.add_argument("--hashes", action="store_true", help="keep a sha256 of each 64 MiB, compared at first use")

    init = verb("init", _init, "write fresh weights with the reference initial values")
    init.add_argument("--out", default="rwkv-init.pth", help="a .pth or .safetensors file")
    init.add_argument("--seed", type=_seed, default=0, help="seed of the initial values")
    init_help = "of the file; bf16 rounds the initial values, as the official trainer's --precision bf16 does"
    init.add_argument("--dtype", "--init_dtype", dest="dtype", choices=INIT_DTYPES, default="fp32", help=init_help)
    init.add_argument("--model", help=f"a preset: {', '.join(PRESETS)}; default: the sizes below")
    _add_settings(init, ModelConfig, prefix="model.")

    train = verb("train", _train, "train a model")
    train.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check the settings, print them in full, read no data"
    )
    _add_training(train)

    estimate = verb(
        "estimate", _estimate, "the memory that a training step will take, and what to turn if it won't fit"
    )
    estimate.add_argument(
        "--memory", help="what the device has, such as 24GiB or 80GB; default: only say what it takes"
    )
    estimate.add_argument("--probe", action="store_true", help="also make five steps here, and say how fast they were")
    _add_training(estimate)

    bench = verb("bench", _bench, "what a training step takes here: time, tokens/s, memory")
    bench.add_argument("--steps", type=int, default=10, help="timed steps, of which the median is told")
    bench.add_argument("--json", help="also write the figures to this file")
    _add_training(bench)

    generate = verb("generate", _generate, "continue a prompt")
    generate.add_argument("model", help="a weights file, a checkpoint or a run folder")
    generate.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    generate.add_argument(
        "--prompt_file", metavar="FILE", help="read the prompt from a file, - is the input; less one newline at its end"
    )
    generate.add_argument(
        "--ids", action="store_true", help="the prompt is token ids, and ids are printed: 24281 59 33"
    )
    generate.add_argument("--probs", type=int, default=0, help="first show this many of the likeliest next tokens")
    generate.add_argument("--trials", type=int, default=1, help="samples; each counts the seed up by one")
    generate.add_argument(
        "--stop", action="append", default=[], help="end at this text; may be given several times; default: none"
    )
    generate.add_argument("--stop_ids", type=_ids, default=[], metavar="IDS", help="end at these ids, as in 0,261")
    _add_running(generate, max_tokens=200, top_p=0.5, penalty=0.0)

    chat = verb("chat", _chat, "talk with a model in the terminal")
    chat.add_argument("model", help="a weights file, a checkpoint or a run folder")
    chat.add_argument("--system", default="", help="what the conversation is about, for the model; default: nothing")
    chat.add_argument("--think", choices=("on", "off"), default="", help="open answers with a thought, or an empty one")
    chat.add_argument("--load", help="go on from a file that /save wrote; default: a new conversation")
    _add_running(chat, max_tokens=1000, top_p=0.3, penalty=0.3)

    evaluate = verb("eval", _eval, "how well one or more models predict: a text, LAMBADA, multiple choice")
    evaluate.add_argument("models", nargs="+", metavar="model", help="weights files, checkpoints or run folders")
    evaluate.add_argument("--data", help="txt, jsonl, folder, binidx prefix or builtin:NAME: loss over all of it")
    _add_settings(evaluate, TrainConfig, prefix="", names=_READING)
    evaluate.add_argument("--lambada", help='a jsonl of {"text": ...}: perplexity and accuracy of the last words')
    evaluate.add_argument("--choices", help='a jsonl of {"question", "choices", "answer"}: share answered rightly')
    evaluate.add_argument("--limit", type=int, help="only so many texts and questions; default: all")
    evaluate.add_argument("--mode", default="gpt", help="gpt: sequences at once; rnn: token by token")
    evaluate.add_argument("--json", help="also write the figures to this file")
    evaluate.add_argument("--plot", help="also draw them over the models' steps, to a .png or .svg")
    evaluate.add_argument("--tokenizer", help=f"{_TOKENIZERS}; default: the run's own")
    evaluate.add_argument("--ctx_len", type=int, default=1024, help="window length; each starts from a zero state")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")
    _add_rosa(evaluate)

    convert = verb("convert", _convert, "rewrite weights: another format, variant, vocabulary or dtype")
    convert.add_argument("input", help="a .pth, .safetensors or .gguf, a Hugging Face folder, a checkpoint, a run")
    convert.add_argument("output", help="the new file or folder")
    convert.add_argument("--variant", help="v7, v7a, v7b, v8, v8-hybrid: what is new starts neutral")
    convert.add_argument("--deep_embed_4x", action="store_true", help="give a v8 or v8-hybrid the 4x form")
    convert.add_argument("--format", help="pth, safetensors, hf (v7) or gguf (v7); default: by the output's suffix")
    convert.add_argument("--dtype", help="fp32, bf16 or fp16; default: as in the input")
    convert.add_argument("--vocab_size", type=int, help="number of token ids; default: as in the input")
    convert.add_argument("--new_rows", default="mean", help="rows of new ids: mean (of the old ones) or initial")
    convert.add_argument("--tokenizer", help="that of the model, kept in a folder or .gguf; default: the input's own")
    convert.add_argument("--add_rosa", type=_rosa, help="add a ROSA branch: qkv-1bit or qkv-4bit; default: none")
    _add_rosa(convert)
    convert.add_argument("--check", action="store_true", help="compare the logits of both and print the difference")

    info = verb("info", _info, "what a weights file, a run, a preset or a dataset is")
    info.add_argument("model", nargs="?", help="a weights file, a checkpoint, a run folder, a preset, or binidx data")
    info.add_argument("--params", action="store_true", help="every parameter: shape, group, lr, decay, initial value")
    _add_rosa(info)
    info.add_argument("--presets", action="store_true", help="list the presets")

    verb("doctor", _doctor, "what this machine has, what each op would run on, what to install")

    plot = verb("plot", _plot, "draw the curves of one or more runs")
    plot.add_argument("runs", nargs="+", help="run folders")
    plot.add_argument("--out", default="loss.png", help="a .png or .svg file")
    return parser


# -- flags from the dataclasses -------------------------------------------------------------------------------------


_READING = ("column", "glob", "split_at", "allow_normalized", "eod")  # settings of what reads text besides train


def _add_settings(
    parser: argparse.ArgumentParser, config: type, prefix: str, names: Sequence[str] | None = None
) -> None:
    """One flag per field, or for those of `names`; absent flags stay absent, so that a config file shows through."""
    for field in dataclasses.fields(config):
        if names is not None and field.name not in names:
            continue
        kinds, _ = setting_type(config, field.name)
        flags = [f"--{prefix}{field.name}", f"--{field.name}"] if prefix else [f"--{field.name}"]
        default = "none" if field.default in (None, "") else field.default
        help_text = f"{field.metadata['doc']} (default: {default})".replace("%", "%%")
        common = dict(dest=f"{prefix}{field.name}", default=argparse.SUPPRESS, help=help_text)
        if bool in kinds:
            parser.add_argument(*flags, action=_OnOff, **common)
        else:
            kind = next((kind for kind in (int, float) if kind in kinds), str)
            parser.add_argument(*flags, type=kind, metavar=kind.__name__.upper(), **common)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """The settings of a training run, which train, estimate and bench have in common."""
    parser.add_argument("--config", help="a YAML file of settings, such as a run's config.yaml; flags override it")
    _add_settings(parser, TrainConfig, prefix="")
    _add_settings(parser, ModelConfig, prefix="model.")
    rwkv_lm_flags.add(parser)


def _add_running(parser: argparse.ArgumentParser, max_tokens: int, top_p: float, penalty: float) -> None:
    """What generate and chat have in common, with the defaults that differ."""
    parser.add_argument("--tokenizer", help=f"{_TOKENIZERS}; default: the run's own")
    parser.add_argument("--eod", help="token or id that ends a document; default: as the tokenizer's files say")
    parser.add_argument("--max_tokens", type=int, default=max_tokens, help="stop after this many tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=top_p, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--top_k", type=int, default=0, help="keep this many tokens; 0: all")
    parser.add_argument("--presence_penalty", type=float, default=penalty, help="against any repetition")
    parser.add_argument("--frequency_penalty", type=float, default=penalty, help="against frequent repetition")
    parser.add_argument("--penalty_decay", type=float, default=0.996, help="how penalties fade per token")
    parser.add_argument(
        "--count_digits", action="store_true", help="frequent space, tab and digits, too, which RWKV leaves out"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="same seed, same text")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")
    parser.add_argument("--dtype", help="run in fp32, bf16 or fp16; default: as in the file")
    parser.add_argument("--tables", default="device", help="where DeepEmbed tables are: device, host or disk")
    parser.add_argument("--tables_file", help="of --tables disk; written where missing; default: beside the weights")
    _add_rosa(parser)


def _add_rosa(parser: argparse.ArgumentParser) -> None:
    """What a bare file of weights cannot say."""
    names = "qkv-1bit, qkv-4bit"
    parser.add_argument("--rosa", type=_rosa, help=f"how the ROSA in a bare file works: {names}; default: as its run")


def _rosa(name: str) -> RosaConfig:
    try:
        return RosaConfig.preset(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"wanted token ids, as in 0,261, got {text!r:.80}")
    return [int(word) for word in words]


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"wanted 0 to {LARGEST_SEED}, got {seed}")
    return seed


def _given(options: argparse.Namespace, config: type, prefix: str) -> dict[str, Any]:
    """The settings that were given as flags."""
    names = (field.name for field in dataclasses.fields(config))
    return {name: vars(options)[prefix + name] for name in names if prefix + name in vars(options)}


_EITHER_OR = (("max_steps", "max_tokens"), ("val_data", "val_fraction"))


def _train_config(options: argparse.Namespace, any_length: bool = False) -> TrainConfig:
    """--config, with the flags laid over it; `any_length`: max_steps and max_tokens may both be missing."""
    from heron import defaults

    official = rwkv_lm_flags.read(options, any_length)
    flags, changes = _given(options, TrainConfig, ""), _given(options, ModelConfig, "model.")
    for ours, theirs in ((flags, official.settings), (changes, official.model)):
        for name, value in theirs.items():
            if ours.setdefault(name, value) != value:
                raise ConfigError(f"--{name} and its RWKV-LM name were both given, with different values")
    out = Path(flags["out"]) if "out" in flags else None
    settings = read_yaml(options.config) if options.config else defaults.of_run(out, flags.get("resume", "auto"))
    for one, other in _EITHER_OR:  # a flag takes the place of the file's other choice
        if (one in flags) != (other in flags):
            settings.pop(other if one in flags else one, None)
    settings |= flags

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
        if (resume := str(flags.get("resume", "auto"))) not in ("auto", "none"):
            raise ConfigError(f"{resume}: no settings of a run lie there; give them too (--config, or --max_steps ...)")
        raise ConfigError(f"{out}: holds no run to go on with; to begin one, give --max_steps or --max_tokens")
    if of_any_length and not settings.keys() & {"max_steps", "max_tokens"}:
        settings["max_steps"] = 1
    if official.saves_by_mini_epochs and "save_every" in flags:
        raise ConfigError("--save_every and --epoch_save were both given; drop one")
    config = official.finish(TrainConfig.from_dict(settings), has_tokenizer="tokenizer" in settings)
    for note in official.notes:  # as comments where the settings are printed
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


# -- verbs ----------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    with Preemption():  # PyTorch takes seconds to load
        from heron import demo

    return EXIT_PREEMPTED if demo.run(Path(options.out)) == "preempted" else 0


def _prepare(options: argparse.Namespace) -> None:
    from heron.data.corpora import Reading
    from heron.data.prepare import prepare

    reading = {name: value for name, value in _given(options, TrainConfig, "").items() if name in _READING}
    stats = prepare(
        options.inputs, options.out, options.tokenizer, options.workers,
        overwrite=options.overwrite, on_bad_line=options.on_bad_line, hashes=options.hashes,
        eod=reading.pop("eod", None), reading=Reading(**reading), say=_note,
    )  # fmt: skip
    print(stats)


def _init(options: argparse.Namespace) -> None:
    import torch

    from heron import memory
    from heron.checkpoint import save
    from heron.machine import DTYPES
    from heron.model import RWKV

    changes = _given(options, ModelConfig, "model.")
    config = ModelConfig.preset(options.model, **changes) if options.model else ModelConfig.from_dict(changes)
    if Path(options.out).exists():
        raise ConfigError(f"{options.out} exists already; name another --out")
    n_parameters = memory.parameters(config)
    memory.check_host(4 * n_parameters, f"a model of {n_parameters:,} parameters in fp32")
    torch.manual_seed(options.seed)
    with progress(f"making {n_parameters:,} initial values"):
        model = RWKV(config).to(DTYPES[options.dtype])
    with progress(f"writing {options.out}"):
        save(model, options.out)
    print(f"wrote {options.out}: {_sizes(config)}, {sum(p.numel() for p in model.parameters()):,} parameters")


def _train(options: argparse.Namespace) -> int:
    with Preemption():  # PyTorch, and weights whose sizes are compared, take seconds to load
        config = _train_config(options)
        if options.stage == 1 and not options.dry_run:
            print(rwkv_lm_flags.write_initial_weights(config))
            return 0
        from heron.train import Trainer

        trainer = Trainer(config)
    if options.dry_run:
        print(trainer.config.to_yaml(), end="")
        return 0
    return EXIT_PREEMPTED if trainer.fit() == "preempted" else 0


def _step_of(options: argparse.Namespace) -> tuple[TrainConfig, ModelConfig]:
    """The settings and the model of a training step; how many steps a run would have does not matter."""
    config = _train_config(options, any_length=True)
    from heron.checkpoint import load
    from heron.train import Trainer

    config = Trainer(config).config
    return config, config.model if isinstance(config.model, ModelConfig) else load(config.model).config


def _estimate(options: argparse.Namespace) -> None:
    config, model = _step_of(options)
    from heron import bench, memory
    from heron.estimate import describe

    print(describe(config, model, None if options.memory is None else memory.size(options.memory)))
    if options.probe:
        print(f"\nmeasured here\n{bench.describe(config, model, bench.bench(config, model, steps=5))}")


def _bench(options: argparse.Namespace) -> None:
    config, model = _step_of(options)
    from heron import bench
    from heron.checkpoint.atomic import new_file

    with progress(f"making {options.steps} steps"):
        result = bench.bench(config, model, options.steps)
    print(bench.describe(config, model, result))
    if options.json:
        with new_file(Path(options.json)) as temporary:
            temporary.write_text(json.dumps(bench.record(config, model, result), indent=1), encoding="utf-8")
        print(f"wrote {options.json}")


def _generate(options: argparse.Namespace) -> None:
    import time

    from heron import tokenizer
    from heron.chat import printable
    from heron.generation import Request, Snapshot
    from heron.generation.text import text_of

    if options.trials < 1:
        raise ConfigError(f"trials: wanted at least 1, got {options.trials}")
    if options.probs < 0:
        raise ConfigError(f"probs: wanted at least 0, got {options.probs}")
    if options.ids and options.stop:
        options.parser.error("--ids prints ids, which a text of --stop may cut; end at ids, with --stop_ids")
    text, sampling = _prompt(options), _sampling(options)
    engine = _engine(options)
    if options.ids:
        ids = tokenizer.load(f"integers:{engine.vocab_size}").encode(text.replace(",", " "))
        text = " ".join(map(str, ids))
    shown = printable if sys.stdout.isatty() else str
    request = Request(
        ids if options.ids else text, options.max_tokens, sampling, tuple(options.stop), options.seed,
        stop_ids=options.stop_ids,
    )  # fmt: skip
    engine.check(request)
    if options.probs or options.trials > 1:
        ids = engine.prompt_ids(request.prompt)
        # The prompt is read once for all, but for the ids that tell how its last character goes on.
        snapshot = Snapshot(engine.prefill(ids[:-4]), tuple(ids[-4:]))
        request = dataclasses.replace(request, prompt=(), after=snapshot)
    if options.probs:
        print(f"the likeliest tokens after {text!r}")
        for token, probability in engine.likeliest(snapshot, options.probs):
            print(f"{100 * probability:8.3f} %  {token:>6}  {text_of(token, ids, engine.tokenizer)!r}")
    for trial in range(options.trials):
        if options.probs or options.trials > 1:
            print(f"\n--- trial {trial + 1}, seed {options.seed + trial} ---")
        print(shown(text), end="", flush=True)
        n_tokens, start = 0, time.perf_counter()
        for piece in engine.run([dataclasses.replace(request, seed=options.seed + trial)]):
            new = piece.text
            if options.ids:
                new = "" if piece.token is None or piece.finish in ("end", "stop") else str(piece.token.id)
                new = f" {new}" if new and (n_tokens or text) else new
            n_tokens += piece.token is not None
            print(shown(new), end="", flush=True)
        print()
        if options.probs or options.trials > 1:
            seconds = time.perf_counter() - start
            print(f"({n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s)")


def _prompt(options: argparse.Namespace) -> str:
    """The text of --prompt, or of --prompt_file without the newline that editors and shells put at the end."""
    if options.prompt_file is None:
        return options.prompt
    if options.prompt:
        options.parser.error("give --prompt or --prompt_file, not both")
    if options.prompt_file != "-":
        data = Path(options.prompt_file).read_bytes()
    elif streams.was_closed("stdin") or sys.stdin.closed:
        raise ConfigError("prompt_file: wanted the prompt at the standard input, which is closed")
    else:
        data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"0x{data[error.start]:02x} at byte {error.start}"
        raise DataError(f"{options.prompt_file}: wanted a prompt in UTF-8, got {wrong}") from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _chat(options: argparse.Namespace) -> None:
    from heron import chat, line_editing

    talk = chat.Chat(
        _engine(options), _sampling(options), options.max_tokens, options.seed, options.system, options.think
    )
    if options.load:
        talk.load(options.load)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print("Type a message, or /help.")
    chat.run(talk, line_editing.reader(), lambda text: print(text, end="", flush=True))


def _sampling(options: argparse.Namespace):  # noqa: ANN202 - heron.generation.Sampling
    from heron.generation import Sampling

    return Sampling(
        options.temperature, options.top_p, options.top_k,
        options.presence_penalty, options.frequency_penalty, options.penalty_decay, options.count_digits,
    )  # fmt: skip


def _engine(options: argparse.Namespace):  # noqa: ANN202 - heron.Engine
    """An engine for one sequence, from the flags of `_add_running`."""
    from heron import machine
    from heron.checkpoint import load, weights_file
    from heron.generation import Engine

    dtypes = {None: None, **machine.DTYPES}
    if options.dtype not in dtypes:
        raise ConfigError(f"dtype: wanted fp32, bf16 or fp16, got {options.dtype!r}")
    device, file = _device(options.device), options.tables_file
    with progress(f"reading {options.model}"):
        model = load(options.model, dtypes[options.dtype], rosa=options.rosa)
    tokenizer = _tokenizer(options.model, options.tokenizer, model.config.vocab_size, options.eod)
    if options.tables == "disk" and file is None:
        weights = weights_file(Path(options.model))
        in_run = weights.parent.parent.name == "checkpoints"  # whose folders hold what they were verified with, no more
        home = weights.parents[2] / weights.parent.name if in_run else weights
        file = home.with_name(f"{home.name}.{options.dtype or 'file'}.tables")
    if options.tables == "device":
        model = model.to(device)
    return Engine(model, tokenizer, tables=options.tables, tables_file=file, device=device)


def _eval(options: argparse.Namespace) -> None:
    from heron import scores
    from heron.report import check_picture

    if not (options.data or options.lambada or options.choices):
        options.parser.error("wanted something to score on: --data, --lambada or --choices")
    if options.limit is not None and not (options.lambada or options.choices):
        options.parser.error(
            "--limit counts the texts of --lambada and the questions of --choices; --data is read whole"
        )
    if options.plot:
        check_picture(Path(options.plot))
    results = [_scores(model, options) for model in options.models]
    if len(results) > 1:
        print(scores.table(results))
    if options.json:
        scores.write(results, Path(options.json))
        print(f"wrote {options.json}")
    if options.plot:
        print(f"wrote {scores.plot(results, Path(options.plot))}")


def _scores(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model, printed where it is the only one."""
    from heron import evaluate, scores
    from heron.checkpoint import load
    from heron.data.corpora import Reading
    from heron.data.loader import load_tokens

    with progress(f"reading {path}"):
        model = load(path, rosa=options.rosa).to(_device(options.device))
    reading = {name: value for name, value in _given(options, TrainConfig, "").items() if name in _READING}
    tokenizer = _tokenizer(path, options.tokenizer, model.config.vocab_size, reading.pop("eod", None))
    result = {"model": path, "step": scores.step_of(path), "mode": options.mode}
    lines = []
    if options.data:
        tokens, n_bytes = load_tokens(options.data, tokenizer, model.config.vocab_size, Reading(**reading), _note)
        with progress(f"reading {len(tokens):,} tokens of {options.data} with {path}"):
            score = evaluate.evaluate(model, tokens, options.ctx_len, n_bytes, mode=options.mode)
        result |= {"data": options.data, "ctx_len": options.ctx_len, "tokens": score.n_targets}
        result |= {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        lines += [
            f"{options.data}: {score.n_targets:,} tokens in windows of {options.ctx_len}",
            f"loss           {score.loss:.4f} nats per token",
            f"perplexity     {score.perplexity:.3f}",
        ]
        if score.bits_per_byte is not None:
            lines.append(f"bits per byte  {score.bits_per_byte:.4f}")
    if options.lambada:
        with progress(f"reading {options.lambada} with {path}"):
            last_words = evaluate.lambada(model, tokenizer, options.lambada, options.mode, options.limit)
        result |= {"lambada": options.lambada, "lambada_texts": last_words.n_texts}
        result |= {"lambada_perplexity": last_words.perplexity, "lambada_accuracy": last_words.accuracy}
        lines += [
            f"{options.lambada}: {last_words.n_texts:,} texts",
            f"perplexity     {last_words.perplexity:.3f} of the last word",
            f"accuracy       {100 * last_words.accuracy:.2f} %",
        ]
    if options.choices:
        with progress(f"reading {options.choices} with {path}"):
            answers = evaluate.multiple_choice(model, tokenizer, options.choices, options.mode, options.limit)
        result |= {"choices": options.choices, "questions": answers.n_questions}
        result |= {"accuracy": answers.accuracy, "accuracy_per_byte": answers.accuracy_per_byte}
        lines += [
            f"{options.choices}: {answers.n_questions:,} questions",
            f"accuracy       {100 * answers.accuracy:.2f} %",
            f"per byte       {100 * answers.accuracy_per_byte:.2f} %",
        ]
    if len(options.models) == 1:
        print("\n".join(lines))
    return result


def _convert(options: argparse.Namespace) -> None:
    from heron.convert import convert, largest_difference

    with progress(f"converting {options.input}"):
        before, after = convert(
            options.input, options.output, options.variant, options.format, options.dtype,
            options.vocab_size, options.new_rows, options.deep_embed_4x, rosa=options.rosa, add_rosa=options.add_rosa,
            tokenizer=options.tokenizer, say=print,
        )  # fmt: skip
    print(f"wrote {options.output}: {_sizes(after.config)}")
    if options.check:
        with progress("comparing the logits"):
            difference = largest_difference(before, options.output, rosa=after.config.rosa)
        print(f"largest difference of a logit, before and after, in fp32: {difference:.3g}")
        if difference and options.dtype is None and options.vocab_size is None:
            raise CheckpointError(f"{options.output}: the same numbers were to give the same logits; do not use it")


def _info(options: argparse.Namespace) -> None:
    from heron import info
    from heron.data import binidx

    if options.presets or options.model is None:
        print(info.presets())
    if options.model is not None:
        is_data = binidx.is_binidx(options.model)
        print(binidx.describe(options.model) if is_data else info.describe(options.model, options.params, options.rosa))


def _doctor(options: argparse.Namespace) -> None:
    from heron import doctor

    print(doctor.report())


def _plot(options: argparse.Namespace) -> None:
    from heron.report import plot

    print(f"wrote {plot([Path(folder) for folder in options.runs], Path(options.out))}")


def _sizes(config: ModelConfig) -> str:
    head_size = f" N{config.head_size}" if config.has_time_mix else ""
    rosa = f", ROSA of {config.rosa.bits} bits" if config.rosa else ""
    return f"{config.variant} L{config.n_layer} C{config.n_embd}{head_size} V{config.vocab_size}{rosa}"


def _device(wanted: str) -> str:
    from heron import machine

    return machine.choose_device(wanted).value


def _tokenizer(model: str, wanted: str | None, vocab_size: int, eod: str | None = None):  # noqa: ANN202 - a Tokenizer
    """The tokenizer that was asked for, else the one that the weights hold or lie beside, else by the vocabulary."""
    from heron import tokenizer
    from heron.checkpoint import beside

    if wanted:
        return tokenizer.load(wanted, eod)
    if (known := beside.tokenizer_of(model, eod)) is not None:
        return known
    if (usual := beside.USUAL.get(vocab_size)) is None:
        raise ConfigError(f"{model}: vocab_size {vocab_size} does not tell the tokenizer; add --tokenizer")
    if usual == "world":  # so many ids are a usual size of other vocabularies, too; 256 ids are bytes
        warnings.warn(f"{model}: nothing tells its tokenizer; assuming World (--tokenizer names another)", stacklevel=2)
    return tokenizer.load(usual, eod)


if __name__ == "__main__":
    sys.exit(main())
