"""`heron generate`: continue a prompt, once or several times."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

from heron.commands import flag_values, streams
from heron.commands.citations import Citations
from heron.commands.sources import engine_of, sampling_of
from heron.errors import ConfigError, DataError, counted
from heron.generation import Request, Snapshot
from heron.generation.chat import printable, printable_so_far
from heron.generation.text import text_of


def run(options: argparse.Namespace) -> None:
    if options.trials < 1:
        raise ConfigError(f"trials: wanted at least 1, got {options.trials}")
    if options.probs < 0:
        raise ConfigError(f"probs: wanted at least 0, got {options.probs}")
    if options.ids and options.stop:
        options.parser.error("--ids prints ids, which a text of --stop may cut; end at ids, with --stop_ids")
    text, sampling = _prompt(options), sampling_of(options)
    engine, documents, _ = engine_of(options)
    if options.show_memory and engine.model.config.memory is None:
        raise ConfigError(
            f"show_memory: {options.model} has no ROSA memory; leave --show_memory out, or take a model that was "
            "trained with --rosa memory"
        )
    ids = _prompt_ids(text) if options.ids and text.strip() else []
    if options.ids:
        text = " ".join(map(str, ids))
    in_terminal = sys.stdout.isatty()
    shown = printable if in_terminal else str
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
                quoted = repr(text_of(token, ids, engine.tokenizer)).replace(r"\\x", r"\x")  # one is enough
                print(f"{100 * probability:8.3f} %  {token:>6}  {quoted}")
    for trial in range(options.trials):
        if options.probs or options.trials > 1:
            print(f"\n--- trial {trial + 1}, seed {options.seed + trial} ---")
        print(shown(text), end="", flush=True)
        citations = Citations(documents, in_terminal and os.environ.get("TERM") != "dumb")
        n_tokens, held, start = 0, "", time.perf_counter()
        for piece in engine.run([dataclasses.replace(request, seed=options.seed + trial)]):
            new = piece.text
            if options.ids:
                new = "" if piece.token is None or piece.finish in ("end", "stop") else str(piece.token.id)
                new = f" {new}" if new and (n_tokens or text) else new
            n_tokens += piece.token is not None
            new, held = printable_so_far(held + new) if in_terminal else (new, "")
            if options.show_memory:
                new = citations.add(None if piece.finish in ("end", "stop") else piece.token, new)
            print(new, end="", flush=True)
        print(shown(held))
        if options.show_memory:
            print("", *citations.sources(), sep="\n", file=sys.stdout if in_terminal else sys.stderr)
        if options.probs or options.trials > 1:
            seconds = time.perf_counter() - start
            print(f"({counted(n_tokens, 'tokens')}, {n_tokens / seconds:.1f} tokens/s)")


def _prompt_ids(text: str) -> list[int]:
    try:
        return flag_values.ids(text)
    except argparse.ArgumentTypeError as error:
        raise DataError(f"prompt: --ids: {error}") from None


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
