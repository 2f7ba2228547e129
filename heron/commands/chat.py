"""`heron chat`: talk with a model in the terminal."""

from __future__ import annotations

import argparse
import io
import sys

from heron.commands import line_editing
from heron.commands.sources import engine_of, sampling_of
from heron.generation import chat


def run(options: argparse.Namespace) -> None:
    engine = engine_of(options).engine
    talk = chat.Chat(engine, sampling_of(options), options.max_tokens, options.seed, options.system, options.think)
    if options.load:
        talk.load(options.load)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print("Type a message, or /help.")
    chat.run(talk, line_editing.reader(), lambda text: print(text, end="", flush=True))
