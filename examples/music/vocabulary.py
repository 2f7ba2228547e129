"""What ids mean: miditok's REMI, in which a piece is bars, and a bar is positions with pitches and durations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from miditok import REMI, TokenizerConfig
from symusic import Score

from examples.music.scores import PIANO, TICKS, on_piano


class Vocabulary:
    """From a score of one track to bars of ids, and back.

    Attributes:
        size: every id is below it.
        end: the id behind the last bar of a piece.
        bar: the id that each bar begins with.
        spec: what `heron train --tokenizer` takes.
    """

    def __init__(self) -> None:
        self._remi: Any = REMI(
            TokenizerConfig(
                pitch_range=(PIANO.start, PIANO.stop),
                beat_res={(0, 4): 4, (4, 12): 2},  # sixteenths; of notes of four beats and more, eighths
                special_tokens=["EOS"],
                use_velocities=False,
                use_pitchdrum_tokens=False,
                use_time_signatures=True,
            )
        )
        self.size = len(self._remi)
        self.end: int = self._remi["EOS_None"]
        self.bar: int = self._remi["Bar_None"]
        self.spec = f"integers:{self.size}:{self.end}"

    def bars(self, score: Score) -> list[list[int]]:
        """The ids of a score of one track, bar by bar."""
        return self.split(self._remi(score)[0].ids)

    def score(self, bars: Iterable[Sequence[int]]) -> Score:
        """The music of bars, one track of TICKS a quarter."""
        read = self._remi.decode([joined(bars)]).resample(TICKS)
        return on_piano((note for track in read.tracks for note in track.notes), list(read.time_signatures))

    def split(self, ids: Sequence[int]) -> list[list[int]]:
        """The bars of a piece, from its ids, of which the first begins a bar; an end is left out."""
        bars: list[list[int]] = []
        for i in ids:
            if i == self.bar:
                bars.append([])
            if i != self.end:
                bars[-1].append(i)
        return bars


def joined(bars: Iterable[Sequence[int]]) -> list[int]:
    """The ids of bars one behind another."""
    return list(chain.from_iterable(bars))
