"""A piece of music: from a MIDI file or music21's corpus to one piano track, and from that to ids and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from miditok import REMI, TokenizerConfig
from symusic import Note, Score, Tempo, TimeSignature, Track

TICKS = 480  # of a quarter note
BEATS_A_MINUTE = 84


class Vocabulary:
    """What ids mean: miditok's REMI, in which a piece is bars, and a bar is positions with pitches and durations.

    Attributes:
        size: every id is below it.
        end: the id behind the last bar of a piece.
        bar: the id that each bar begins with.
        spec: what `heron train --tokenizer` takes.
    """

    def __init__(self) -> None:
        self._remi: Any = REMI(
            TokenizerConfig(
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

    def ids(self, score: Score) -> list[int]:
        """The ids of a score of one track, without an end; none for one without notes."""
        tracks = self._remi(score)
        return list(tracks[0].ids) if tracks else []

    def score(self, ids: Sequence[int]) -> Score:
        """The music that `ids` say, one track of TICKS a quarter."""
        read = self._remi.decode([[i for i in ids if i != self.end]]).resample(TICKS)
        notes = [note for track in read.tracks for note in track.notes]
        return _one_track(notes, list(read.time_signatures))

    def bars(self, ids: Sequence[int]) -> list[list[int]]:
        """The ids bar by bar."""
        bars: list[list[int]] = []
        for i in ids:
            if i == self.bar:
                bars.append([])
            bars[-1].append(i)
        return bars

    def may_cut(self, ids: Sequence[int]) -> list[int]:
        """1 for each id that a sample may begin with, so that no bar and no note is cut in two; else 0."""
        return [int(i == self.bar) for i in ids]


def read_midi(path: Path) -> Score:
    """All that sounds in a MIDI file but the drums, as one track. ValueError for a file that is none, or is silent."""
    try:
        read = Score(path).resample(TICKS)
    except RuntimeError as error:
        raise ValueError(f"{path}: is no MIDI file: {error}") from None
    notes = [note for track in read.tracks if not track.is_drum for note in track.notes]
    if not notes:
        raise ValueError(f"{path}: has no notes")
    return _one_track(notes, list(read.time_signatures))


def read_score(path: Path) -> Score:
    """A score that music21 reads, MusicXML say, as one track; its pickup becomes a bar that begins with a rest."""
    from music21 import converter

    parsed: Any = converter.parse(str(path))
    measures = parsed.parts[0].getElementsByClass("Measure")
    pickup = measures[0].paddingLeft if measures else 0.0
    notes = [
        Note(_ticks(sound.offset + pickup), max(_ticks(sound.quarterLength), 1), pitch.midi, 64)
        for sound in parsed.flatten().notes
        for pitch in sound.pitches
    ]
    signatures = [
        TimeSignature(_ticks(sign.offset + (pickup if sign.offset else 0)), sign.numerator, sign.denominator)
        for sign in parsed.parts[0].flatten().getTimeSignatures()
    ]
    if not notes:
        raise ValueError(f"{path}: has no notes")
    return _one_track(notes, signatures)


def write_midi(score: Score, path: Path) -> None:
    score.dump_midi(path)


def moved(score: Score, semitones: int) -> Score:
    """The score with each note so many semitones higher."""
    return score.shift_pitch(semitones)


def _one_track(notes: list[Note], signatures: list[TimeSignature]) -> Score:
    score = Score(TICKS)
    score.tempos.append(Tempo(0, BEATS_A_MINUTE))
    score.time_signatures.extend(signatures or [TimeSignature(0, 4, 4)])
    score.tracks.append(Track(name="piano", program=0))
    score.tracks[0].notes.extend(_on_keys(notes))
    return score


def _on_keys(notes: Iterable[Note]) -> list[Note]:
    """The notes as the keys of a piano play them: one that is struck again ends there, and unisons are one note."""
    struck: dict[int, Note] = {}
    played = []
    for note in sorted(notes, key=lambda note: (note.time, -note.duration, note.pitch)):
        before = struck.get(note.pitch)
        if before is not None and before.time == note.time:
            continue
        if before is not None:
            before.duration = min(before.duration, note.time - before.time)
        struck[note.pitch] = note.copy()
        played.append(struck[note.pitch])
    return sorted(played, key=lambda note: (note.time, note.pitch))


def _ticks(quarters: float) -> int:
    return math.floor(quarters * TICKS + 0.5)
