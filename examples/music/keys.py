"""In which key a piece is, and what of it is in that key."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from symusic import Score

# How well each semitone above the tonic fits a major and a minor key, as listeners judged.
# Source: Krumhansl and Kessler, "Tracing the dynamic changes in perceived tonal organization" (1982).
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10, 11)}  # minor: with the leading tone
_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


class Key(NamedTuple):
    """A tonic, 0 (C) to 11 (B), and "major" or "minor"."""

    tonic: int
    mode: str

    def __str__(self) -> str:
        return f"{_NAMES[self.tonic]} {self.mode}"

    @property
    def way_home(self) -> int:
        """Semitones, -6 to 5, that take a piece to the one key that the model knows: C major or A minor."""
        home = 0 if self.mode == "major" else 9
        return (home - self.tonic + 6) % 12 - 6

    @property
    def pitch_classes(self) -> list[int]:
        """Its notes: seven of a major key; eight of a minor one, the leading tone among them."""
        return [(self.tonic + step) % 12 for step in _SCALES[self.mode]]


def pitch_classes(score: Score, by_duration: bool = False) -> np.ndarray:
    """How often each pitch class sounds, or how long, (12,) with the sum 1; zeros for a score without notes."""
    notes = [note for track in score.tracks for note in track.notes]
    weights = [note.duration for note in notes] if by_duration else None
    counts = np.bincount([note.pitch % 12 for note in notes], weights, minlength=12).astype(float)
    return counts / max(counts.sum(), 1.0)


def key_of(score: Score) -> Key:
    """The key whose profile correlates best with how long each pitch class sounds."""
    sounds = pitch_classes(score, by_duration=True)
    fits = {
        Key(tonic, mode): np.corrcoef(np.roll(profile, tonic), sounds)[0, 1]
        for mode, profile in (("major", _MAJOR), ("minor", _MINOR))
        for tonic in range(12)
    }
    return max(fits, key=lambda key: fits[key])


def share_in(key: Key, score: Score) -> float:
    """The share of notes that belong to the key."""
    return float(pitch_classes(score)[key.pitch_classes].sum())
