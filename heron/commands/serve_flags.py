"""The flags of `heron serve`: its settings, and what it offers beside the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from heron.commands import running_flags
from heron.config.serve import NAME, ServeConfig


def add(parser: argparse.ArgumentParser, add_settings: Callable[..., None]) -> None:
    """Add them to a parser."""
    parser.add_argument("model", help="a weights file, a checkpoint or a run folder")
    groups = {title: parser.add_argument_group(title) for title in ("the server", "the model", "beside the model")}
    add_settings(groups["the server"], ServeConfig, prefix="")
    running_flags.add_source(groups["the model"])
    beside = groups["beside the model"]
    for kind, wanted, text in (
        ("adapter", "DIR", "an adapter, merged into weights of its own; chosen as MODEL:NAME"),
        ("state", "FILE", "a tuned initial state; chosen as MODEL:NAME"),
        ("memory", "FILE", "documents that ROSA memory looks into; chosen as MODEL:NAME"),
    ):
        beside.add_argument(
            f"--with_{kind}", type=named, action="append", default=[], metavar=f"NAME={wanted}",
            help=f"{text}; may be given several times; default: none",
        )  # fmt: skip


def named(text: str) -> tuple[str, str]:
    """A name and a path, from ``NAME=PATH``."""
    name, equals, path = text.partition("=")
    if not (equals and path and NAME.fullmatch(name)):
        raise argparse.ArgumentTypeError(f"wanted NAME=PATH, the name of letters and digits, got {text!r:.80}")
    return name, path
