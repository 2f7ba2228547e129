"""A piece of music, from a MIDI file or from music21's corpus, as one piano track."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from symusic import Note, Score, Tempo, TimeSignature, Track

from heron.errors import DataError

TICKS = 480  # of a quarter note
BEATS_A_MINUTE = 84.0  # where a score says nothing
PIANO = range(21, 109)  # of a piano, as MIDI pitches


def read_midi(path: Path) -> Score:
    """All that sounds in a MIDI file but the drums, as one track at the file's first tempo.

    Raises:
        DataError: there is no such file, or it is no MIDI file, or none of its notes is on a piano.
    """
    if not path.is_file():
        raise DataError(f"{path}: wanted a MIDI file, and there is no such file")
    try:
        read = Score(path).resample(TICKS)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{path}: is no MIDI file: {error}") from None
    notes = [note for track in read.tracks if not track.is_drum for note in track.notes]
    tempo = read.tempos[0].qpm if read.tempos else BEATS_A_MINUTE
    return _sounding(on_piano(notes, list(read.time_signatures), tempo), path)


def read_score(path: Path) -> Score:
    """A score that music21 reads, MusicXML say, as one track; its pickup becomes a bar that begins with a rest.

    Raises:
        DataError: music21 cannot read it, or none of its notes is on a piano.
    """
    from music21 import converter
    from music21.exceptions21 import Music21Exception

    try:
        parsed: Any = converter.parse(str(path))
    except Music21Exception as error:
        raise DataError(f"{path}: music21 cannot read it: {error}") from None
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
    return _sounding(on_piano(notes, signatures), path)


def on_piano(notes: Iterable[Note], signatures: list[TimeSignature], tempo: float = BEATS_A_MINUTE) -> Score:
    """The notes as the keys of a piano play them, in one track: one that is struck again ends there, and unisons are
    one note. What no piano has is left out."""
    score = Score(TICKS)
    score.tempos.append(Tempo(0, tempo))
    score.time_signatures.extend(signatures or [TimeSignature(0, 4, 4)])
    score.tracks.append(Track(name="piano", program=0))
    struck: dict[int, Note] = {}
    played = []
    for note in sorted(notes, key=lambda note: (note.time, -note.duration, note.pitch)):
        before = struck.get(note.pitch)
        if note.pitch not in PIANO or (before is not None and before.time == note.time):
            continue
        if before is not None:
            before.duration = min(before.duration, note.time - before.time)
        struck[note.pitch] = note.copy()
        played.append(struck[note.pitch])
    score.tracks[0].notes.extend(sorted(played, key=lambda note: (note.time, note.pitch)))
    return score


def _sounding(score: Score, path: Path) -> Score:
    if not score.note_num():
        raise DataError(f"{path}: wanted notes that a piano plays, and it has none")
    return score


def _ticks(quarters: float) -> int:
    return math.floor(quarters * TICKS + 0.5)
