"""Backpropagation through time chunk by chunk (`tbptt`): how long a chunk is, and whether gradients pass its border."""

from __future__ import annotations

from typing import NamedTuple

from heron.errors import ConfigError

EXACT = "exact"
EXACT_CHUNK = 1024  # long enough that a GPU is busy with it; what is kept of each chunk before is a state


class Tbptt(NamedTuple):
    """A sample is read in chunks, and its state is passed from each to the next.

    Attributes:
        chunk: tokens of a chunk.
        exact: whether gradients pass from each chunk to the one before, which then is computed twice.
    """

    chunk: int
    exact: bool

    @classmethod
    def of(cls, setting: str) -> Tbptt | None:
        """What ``512``, ``exact`` or ``exact:512`` says; None for an empty text: samples are read whole.

        Raises:
            ConfigError: anything else.
        """
        if not setting:
            return None
        word, _, length = setting.rpartition(":")
        if setting == EXACT:
            word, length = EXACT, str(EXACT_CHUNK)
        if word not in ("", EXACT) or not length.isdecimal() or not int(length):
            raise ConfigError(f"tbptt: wanted tokens of a chunk, as in 512, or exact, or exact:512; got {setting!r}")
        return cls(int(length), word == EXACT)
