"""What a flag's text stands for: argparse's types beside numbers, each with a line on what was wanted."""

from __future__ import annotations

import argparse
import re

from heron.config import LARGEST_SEED, RosaConfig
from heron.errors import ConfigError


def rosa(name: str) -> RosaConfig:
    """The preset of that name."""
    try:
        return RosaConfig.preset(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def ids(text: str) -> list[int]:
    """The ids in ``"4 325"``, ``"4,325"`` or, as Python prints a list, ``"[4, 325]"``; at least one."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and len(word) <= 20 for word in words):
        raise argparse.ArgumentTypeError(f"wanted token ids, as in 0,261, got {text!r:.80}")
    return [int(word) for word in words]


def seed(text: str) -> int:
    """A seed of PyTorch's and NumPy's generators."""
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text) or not 0 <= int(text) <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 0 to {LARGEST_SEED}, got {text!r:.80}")
    return int(text)
