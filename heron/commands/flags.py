"""The command line's flags: one verb after the other, many of them from the config dataclasses, read by argparse."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from heron import __version__
from heron.commands import EXIT_USAGE, flag_values, running_flags, rwkv_lm_flags, serve_flags
from heron.commands.help_texts import EVERY_FLAG, Help, HelpInTwoSizes
from heron.commands.running_flags import TOKENIZERS
from heron.commands.settings import READING
from heron.config import (
    INIT_DTYPES,
    PRESETS,
    FinetuneConfig,
    ModelConfig,
    TrainConfig,
    setting_type,
)
from heron.config.finetune import DEFAULTS as METHOD_DEFAULTS
from heron.config.finetune_adapter import AdapterConfig
from heron.config.groups import GROUP_OF, GROUPS
from heron.errors import did_you_mean

_MAY_BE_EMPTY = {"prompt", "sample_prompt", "system", "think", "stop", "wandb", "rwkv_lm.load_model", "rwkv_lm.kernel"}


class _Once(argparse.Action):
    """Stores a value; refuses an empty one where it names something, and a second one that differs."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = values if isinstance(values, list) else [values]
        if self.dest not in _MAY_BE_EMPTY and any(isinstance(word, str) and not word.strip() for word in words):
            raise argparse.ArgumentError(self, "wanted a value, got an empty one; is a shell variable not set?")
        _set_once(self, namespace, values, option_string)


class _OnOff(argparse.BooleanOptionalAction):
    """--flag and --no-flag; refuses both at once."""

    def __call__(self, parser, namespace, values, option_string=None):
        _set_once(self, namespace, not (option_string or "").startswith("--no-"), option_string)


def _set_once(action: argparse.Action, namespace: argparse.Namespace, value: object, option: str | None) -> None:
    given = vars(namespace).setdefault("_given", {})
    if option is not None:
        if action.dest in given and given[action.dest] != value:
            raise argparse.ArgumentError(action, f"given twice, as {given[action.dest]!r} and as {value!r}; drop one")
        given[action.dest] = value
    setattr(namespace, action.dest, value)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the near flag or verb."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        args = [_with_underscores(argument) for argument in (sys.argv[1:] if args is None else args)]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(options, "parser", self)
            flag = unknown[0].partition("=")[0]
            parser.error(f"unknown argument {flag}.{did_you_mean(flag, parser._option_string_actions)}")
        return options

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in (int, float):
                raise
        wanted = "a whole number" if action.type is int else "a number"
        raise argparse.ArgumentError(action, f"wanted {wanted}, got {arg_string!r}")

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


_NOT_OF_FINETUNE = (  # settings of a fresh model, and of data that are no conversations
    "model", "init_from", "init_dtype", "column", "glob", "split_at", "allow_normalized", "magic_prime", "num_workers",
)  # fmt: skip

_MODULES: dict[str, Callable[[], ModuleType]] = {  # most need PyTorch, so none is imported before its verb runs
    "demo": lambda: import_module("heron.commands.demo"),
    "prepare": lambda: import_module("heron.commands.prepare"),
    "init": lambda: import_module("heron.commands.init"),
    "train": lambda: import_module("heron.commands.train"),
    "finetune": lambda: import_module("heron.commands.finetune"),
    "estimate": lambda: import_module("heron.commands.estimate"),
    "bench": lambda: import_module("heron.commands.bench"),
    "generate": lambda: import_module("heron.commands.generate"),
    "chat": lambda: import_module("heron.commands.chat"),
    "serve": lambda: import_module("heron.commands.serve"),
    "eval": lambda: import_module("heron.commands.eval"),
    "convert": lambda: import_module("heron.commands.convert"),
    "merge": lambda: import_module("heron.commands.merge"),
    "memory": lambda: import_module("heron.commands.memory"),
    "info": lambda: import_module("heron.commands.info"),
    "doctor": lambda: import_module("heron.commands.doctor"),
    "plot": lambda: import_module("heron.commands.plot"),
    "compare": lambda: import_module("heron.commands.compare"),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line; of what it reads, `module()` imports the verb's module, whose `run` takes the rest."""
    parser = _Parser(
        prog="heron",
        description="Train and run RWKV-8 language models.",
        allow_abbrev=False,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"heron {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str, trains: bool = False, takes: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=Help,
            add_help=not trains,
            usage=f"%(prog)s [--help [{EVERY_FLAG}]] {takes}[--SETTING VALUE ...]" if trains else None,
        )
        if trains:
            help_text = f"show the flags that most runs need and exit; --help {EVERY_FLAG}: every flag"
            sub.add_argument("-h", "--help", action=HelpInTwoSizes, metavar=EVERY_FLAG, help=help_text)
        sub.set_defaults(verb=name, module=_MODULES[name], parser=sub)
        return sub

    demo = verb("demo", "train a small RWKV-8 on text that every Python has, and generate from it")
    demo.add_argument("--out", default="runs/demo", help="run folder")

    prepare = verb("prepare", "turn texts, JSON rows, tables and folders into a binidx dataset")
    inputs_help = "txt, jsonl ({'text': ...} a line), json, csv, parquet, each also .gz .bz2 .xz; folders, builtin:NAME"
    prepare.add_argument("inputs", nargs="+", help=inputs_help)
    prepare.add_argument("--out", help="prefix of the .bin and .idx files; default: the binidx that --memory reads")
    prepare.add_argument("--tokenizer", default="world", help=TOKENIZERS)
    _add_settings(prepare, TrainConfig, prefix="", names=READING)
    prepare.add_argument("--workers", type=int, help="processes; default: one per core")
    prepare.add_argument("--overwrite", action="store_true", help="replace existing files")
    bad_line_help = "at a damaged row, or a text that is not UTF-8: stop, or skip, count and log it"
    prepare.add_argument("--on_bad_line", choices=("stop", "skip"), default="stop", help=bad_line_help)
    prepare.add_argument("--hashes", action="store_true", help="keep a sha256 of each 64 MiB, compared at first use")
    memory_help = "also write what ROSA recalls at each token, as .recalled; without --out: beside the binidx named"
    prepare.add_argument("--memory", action="store_true", help=memory_help)
    prepare.add_argument("--n_matches", type=int, help="matches of each token; default: 2")
    prepare.add_argument("--max_match", type=int, help="tokens of a match that count; default: 64")
    prepare.add_argument("--window", type=int, help="tokens that a match may lie back; default: any number")
    across_help = "whether a match may begin in one document and end in the next"
    prepare.add_argument("--across_documents", choices=("on", "off"), help=f"{across_help}; default: on")

    init = verb("init", "write fresh weights with the reference initial values")
    init.add_argument("--out", default="rwkv-init.pth", help="a .pth or .safetensors file")
    init.add_argument("--seed", type=flag_values.seed, default=0, help="seed of the initial values")
    init_help = "of the file; bf16 rounds the initial values, as the official trainer's --precision bf16 does"
    init.add_argument("--dtype", "--init_dtype", dest="dtype", choices=INIT_DTYPES, default="fp32", help=init_help)
    init.add_argument("--model", help=f"a preset: {', '.join(PRESETS)}; default: the sizes below")
    _add_settings(init, ModelConfig, prefix="model.")

    train = verb("train", "train a model", trains=True)
    train.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check the settings, print them in full, read no data"
    )
    _add_training(train)

    finetune = verb("finetune", "train a base model on conversations", trains=True, takes="BASE ")
    finetune.add_argument("base", help="what to start from: a weights file, a checkpoint or a run folder")
    dry_help = "check the settings and all data, print what --show asks for, or else the settings in full; no training"
    finetune.add_argument("--dry_run", "--dry-run", action="store_true", help=dry_help)
    _add_settings(finetune, FinetuneConfig, prefix="finetune.")
    _add_settings(finetune, AdapterConfig, prefix="finetune.adapter.")
    finetune.add_argument("--config", help="a YAML file of settings, such as a run's config.yaml; flags override it")
    groups = {title: finetune.add_argument_group(title) for title in GROUPS if title != "model"}
    fits = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in _NOT_OF_FINETUNE]
    says = {
        "data": "jsonl of conversations: messages, prompt and completion, text, alpaca, ShareGPT; must be given",
        "val_data": "separate validation conversations; default: val_fraction of data",
        "val_fraction": "share of the conversations kept for validation (the last); default: 0.1",
        "tokenizer": f"{TOKENIZERS}; default: the base's own",
        "max_steps": "stop after this many optimizer steps; default: --epochs decides",
        "max_tokens": "stop after this many training tokens; default: --epochs decides",
    }
    by_name = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name in METHOD_DEFAULTS["full"]:
        values = ", ".join(f"{values[name]} with {method}" for method, values in METHOD_DEFAULTS.items())
        says[name] = f"{by_name[name].metadata['doc']} (default: {values})"
    _add_settings(finetune, TrainConfig, prefix="", names=fits, groups=groups, says=says)

    estimate = verb(
        "estimate", "the memory that a training step will take, and what to change if it won't fit", trains=True
    )
    estimate.add_argument(
        "--memory", help="what the device has, such as 24GiB or 80GB; default: only say what a step takes"
    )
    estimate.add_argument("--gpus", type=int, default=1, help="each of how many GPUs, that share the run by --parallel")
    estimate.add_argument("--probe", action="store_true", help="also make five steps here, and say how fast they were")
    _add_training(estimate, own=("gpus",))

    bench = verb("bench", "measure a training step here: time, tokens/s, memory", trains=True)
    bench.add_argument("--steps", type=int, default=10, help="timed steps; their median is printed")
    bench.add_argument("--json", help="also write the figures to this file")
    _add_training(bench)

    generate = verb("generate", "continue a prompt")
    generate.add_argument("model", help="a weights file, a checkpoint or a run folder")
    generate.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    generate.add_argument(
        "--prompt_file", metavar="FILE", help="read it from a file (-: standard input), less the newline at its end"
    )
    generate.add_argument(
        "--ids", action="store_true", help="the prompt is token ids, and ids are printed: 24281 59 33"
    )
    generate.add_argument("--probs", type=int, default=0, help="first print this many of the likeliest next tokens")
    generate.add_argument("--trials", type=int, default=1, help="how many texts to write, each with the next seed")
    generate.add_argument(
        "--stop", action="append", default=[], help="end at this text; may be given several times; default: none"
    )
    generate.add_argument(
        "--stop_ids", type=flag_values.ids, default=[], metavar="IDS", help="end at these ids, as in 0,261"
    )
    generate.add_argument(
        "--show_memory", action="store_true", help="underline what ROSA memory recalled, and say where it comes from"
    )
    running_flags.add_running(generate, max_tokens=200, top_p=0.5, penalty=0.0)

    chat = verb("chat", "talk with a model in the terminal")
    chat.add_argument("model", help="a weights file, a checkpoint or a run folder")
    chat.add_argument("--system", default="", help="instructions that the model reads first; default: none")
    think_help = "open answers with a thought (on; short, long: of that length), or an empty one (off)"
    chat.add_argument("--think", choices=("on", "off", "short", "long"), default="", help=think_help)
    chat.add_argument("--load", help="go on from a file that /save wrote; default: a new conversation")
    running_flags.add_running(chat, max_tokens=1000, top_p=0.3, penalty=0.3)

    serve = verb("serve", "answer requests as OpenAI's interface has them, many at a time, and show a page to chat")
    serve_flags.add(serve, _add_settings)

    evaluate = verb("eval", "how well one or more models predict: a text, LAMBADA, multiple choice")
    evaluate.add_argument("models", nargs="+", metavar="model", help="weights files, checkpoints or run folders")
    evaluate.add_argument("--data", help="txt, jsonl, folder, binidx prefix or builtin:NAME: loss over all of it")
    _add_settings(evaluate, TrainConfig, prefix="", names=READING)
    evaluate.add_argument("--lambada", help='a jsonl of {"text": ...}: perplexity and accuracy of the last words')
    evaluate.add_argument("--choices", help='a jsonl of {"question", "choices", "answer"}: share answered rightly')
    evaluate.add_argument("--limit", type=int, help="use only the first so many texts and questions; default: all")
    evaluate.add_argument("--mode", default="gpt", help="gpt: sequences at once; rnn: token by token")
    evaluate.add_argument("--json", help="also write the figures to this file")
    evaluate.add_argument("--plot", help="also draw them over the models' steps, to a .png or .svg")
    evaluate.add_argument("--tokenizer", help=f"{TOKENIZERS}; default: the run's own")
    evaluate.add_argument("--ctx_len", type=int, default=1024, help="window length; each starts from a zero state")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")
    evaluate.add_argument("--memory", metavar="FILE", help=running_flags.MEMORY)
    memory_from_help = "text or data, as --data takes it, that ROSA memory looks into beside what is scored"
    evaluate.add_argument("--memory_from", metavar="FILE", help=memory_from_help)
    running_flags.add_weights(evaluate)

    convert = verb("convert", "rewrite weights: another format, variant, vocabulary or dtype")
    convert.add_argument("input", help="a .pth, .safetensors or .gguf, a Hugging Face folder, a checkpoint, a run")
    convert.add_argument("output", help="the new file or folder")
    convert.add_argument("--variant", help="v7, v7a, v7b, v8 or v8-hybrid; parts that are new have no effect at first")
    convert.add_argument("--deep_embed_4x", action="store_true", help="v8, v8-hybrid: gates on all hidden channels")
    convert.add_argument("--format", help="pth, safetensors, hf (v7) or gguf (v7); default: by the output's suffix")
    convert.add_argument("--dtype", help="fp32, bf16 or fp16; default: as in the input")
    convert.add_argument("--vocab_size", type=int, help="number of token ids; default: as in the input")
    convert.add_argument("--new_rows", default="mean", help="rows of new ids: mean (of the old ones) or initial")
    convert.add_argument("--tokenizer", help="the model's, which a folder or .gguf keeps; default: the input's own")
    convert.add_argument(
        "--add_rosa",
        type=flag_values.rosa,
        help="add a ROSA branch, qkv-1bit or qkv-4bit, or ROSA memory: memory; default: none",
    )
    running_flags.add_rosa(convert)
    convert.add_argument("--check", action="store_true", help="compare the logits of input and output")

    merge = verb("merge", "add an adapter to the weights it was trained on, and write them as a model")
    merge.add_argument("base", help="the weights that the adapter was trained on; another base is refused")
    merge.add_argument("adapter", help="a fine-tuning run, or the folder of an adapter")
    merge.add_argument("output", help="the new .pth, .safetensors or .gguf, or a folder")
    merge.add_argument("--format", help="pth, safetensors, hf (v7) or gguf (v7); default: by the output's suffix")
    merge.add_argument("--dtype", help="fp32, bf16 or fp16; default: as in the base")
    merge.add_argument("--tokenizer", help="the model's, which a folder or .gguf keeps; default: the base's own")
    running_flags.add_rosa(merge)

    memory = verb("memory", "documents that ROSA looks into while a model runs, in one file")
    actions = memory.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True, parser_class=_Parser
    )

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=Help)
        sub.set_defaults(parser=sub)
        return sub

    build = action("build", "write documents and the index of their tokens as one file")
    build.add_argument("inputs", nargs="+", help=f"{inputs_help}, binidx prefixes")
    build.add_argument("--out", required=True, help="the file, such as docs.memory; an older one is replaced")
    build.add_argument("--tokenizer", default="world", help=f"the model's: {TOKENIZERS}")
    _add_settings(build, TrainConfig, prefix="", names=READING)
    build.add_argument("--max_match", type=int, default=64, help="tokens of a match that count")
    build.add_argument("--across_documents", choices=("on", "off"), default="on", help=across_help)

    described = action("info", "describe such a file")
    described.add_argument("file", help="what heron memory build wrote")
    described.add_argument("--tokenizer", help=f"check that it fits: {TOKENIZERS}; default: no check")
    described.add_argument("--verify", action="store_true", help="read all of it, and compare its sha256")

    info = verb("info", "describe a weights file, a run, a preset or a dataset")
    info_help = "a weights file, a checkpoint, a run folder, a preset, an adapter's folder, or binidx data"
    info.add_argument("model", nargs="?", help=info_help)
    info.add_argument("--params", action="store_true", help="every parameter: shape, group, lr, decay, initial value")
    running_flags.add_rosa(info)
    info.add_argument("--presets", action="store_true", help="list the presets")

    doctor = verb("doctor", "what this machine has, what each op would run on, what to install")
    doctor.add_argument("--build", action="store_true", help="build every kernel for this GPU now, and nothing else")

    plot = verb("plot", "draw the curves of one or more runs")
    plot.add_argument("runs", nargs="+", help="run folders")
    plot.add_argument("--out", default="loss.png", help="a .png or .svg file")

    compare = verb("compare", "the figures of several runs in a table, with their spread over seeds")
    compare.add_argument("runs", nargs="+", help="run folders; those that differ in their seed alone share a line")
    at_help = "each at its end, or all after as many tokens, or as much time, as every run has"
    compare.add_argument("--at", choices=("end", "tokens", "time"), default="end", help=at_help)
    compare.add_argument("--out", help="also write the table to this file, in Markdown")
    compare.add_argument("--plot", help="also draw the curves, a colour for each line of the table, to a .png or .svg")
    return parser


def _add_settings(
    parser: argparse._ActionsContainer,
    config: type,
    prefix: str,
    names: Sequence[str] | None = None,
    groups: Mapping[str, argparse._ArgumentGroup] | None = None,
    says: Mapping[str, str] = {},
) -> None:
    """One flag per field, or for those of `names`; absent flags stay absent, so that a config file shows through.

    `groups` has the groups of the parser by title, where each flag is to stand in that of its setting. `says` has help
    texts that stand in for the fields' own.
    """
    for field in dataclasses.fields(config):
        if field.name in ("finetune", "adapter") or (names is not None and field.name not in names):
            continue  # of what these hold, `heron finetune` has flags
        kinds, _ = setting_type(config, field.name)
        flags = [f"--{prefix.removeprefix('finetune.')}{field.name}"]
        if prefix == "model." and field.metadata["short_flag"]:
            flags.append(f"--{field.name}")
        help_text = (says.get(field.name) or _help_of(field, of_model=bool(groups and prefix))).replace("%", "%%")
        place = groups[GROUP_OF[prefix + field.name]] if groups else parser
        common: dict[str, Any] = dict(dest=f"{prefix}{field.name}", default=argparse.SUPPRESS, help=help_text)
        if bool in kinds:
            place.add_argument(*flags, action=_OnOff, **common)
        else:
            kind = next((kind for kind in (int, float) if kind in kinds), str)
            place.add_argument(*flags, type=kind, metavar=kind.__name__.upper(), **common)


def _help_of(field: dataclasses.Field, of_model: bool) -> str:
    """A setting's line of documentation with its default; `of_model`: that of the model that is named or begun with."""
    doc, unset = field.metadata["doc"], "None: " if field.default is None else "empty: "
    if of_model:
        return f"{doc.partition('; None: ')[0]} (default: as --model has it)"
    if field.default in (None, ""):
        return doc.replace(unset, "default: ") if unset in doc else f"{doc} (default: none)"
    return f"{doc} (default: {field.default})"


def _add_training(parser: argparse.ArgumentParser, own: Sequence[str] = ()) -> None:
    """The settings of a training run. `own`: flags of the verb that mean something else in the official trainer."""
    parser.add_argument("--config", help="a YAML file of settings, such as a run's config.yaml; flags override it")
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    _add_settings(parser, TrainConfig, prefix="", groups=groups)
    _add_settings(parser, ModelConfig, prefix="model.", groups=groups)
    rwkv_lm_flags.add(parser, own)
