"""In which key a piece is, and what of it is in that key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from symusic import Score

# How often each semitone above the tonic sounds in a stretch of music in a major and in a minor key.
# Source: Temperley, "Music and Probability" (2007), from the textbook of Kostka and Payne.
_MAJOR = (0.748, 0.060, 0.488, 0.082, 0.670, 0.460, 0.096, 0.715, 0.104, 0.366, 0.057, 0.400)
_MINOR = (0.712, 0.084, 0.474, 0.618, 0.049, 0.460, 0.105, 0.747, 0.404, 0.067, 0.133, 0.330)
_SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10, 11)}  # minor: with the leading tone
_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


class Key(NamedTuple):
    """A tonic, 0 (C) to 11 (B), and "major" or "minor"."""

    tonic: int
    mode: str

    def __str__(self) -> str:
        return f"{_NAMES[self.tonic]} {self.mode}"

    @property
    def to_c_or_a(self) -> int:
        """Semitones, -6 to 5, that take a piece to C major or A minor, the keys that the model knows."""
        target = 0 if self.mode == "major" else 9
        return (target - self.tonic + 6) % 12 - 6

    @property
    def scale(self) -> list[int]:
        """Its pitch classes: seven of a major key; eight of a minor one, the leading tone among them."""
        return [(self.tonic + step) % 12 for step in _SCALES[self.mode]]


def pitch_classes(score: Score, by_duration: bool = False) -> np.ndarray:
    """How often each pitch class sounds, or how long, (12,) with the sum 1; zeros for a score without notes."""
    notes = [note for track in score.tracks for note in track.notes]
    weights = [note.duration for note in notes] if by_duration else None
    counts = np.bincount([note.pitch % 12 for note in notes], weights, minlength=12).astype(float)
    return counts / max(counts.sum(), 1.0)


def key_of(score: Score) -> Key:
    """The key whose profile correlates best with how long each pitch class sounds; C major where nothing does."""
    sounds = pitch_classes(score, by_duration=True)
    fits = {
        Key(tonic, mode): np.roll(profile, tonic) @ sounds
        for mode, profile in (("major", _standardized(_MAJOR)), ("minor", _standardized(_MINOR)))
        for tonic in range(12)
    }
    return max(fits, key=lambda key: fits[key])


def share_in(key: Key, score: Score) -> float:
    """The share of notes that belong to the key."""
    return float(pitch_classes(score)[key.scale].sum())


def _standardized(profile: Sequence[float]) -> np.ndarray:
    """With mean 0 and standard deviation 1: a dot product with it ranks as a correlation does."""
    return (np.array(profile) - np.mean(profile)) / np.std(profile)
