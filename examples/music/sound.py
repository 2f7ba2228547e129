"""A score to listen to, from a plain synthesiser."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from symusic import Score

RATE = 22050  # samples of sound a second
_HARMONICS = (1.0, 0.45, 0.25, 0.12, 0.06)  # how loud the fundamental and its multiples are
_ATTACK, _RELEASE = 0.01, 0.12  # seconds


def write_wav(score: Score, path: Path) -> None:
    """Write the sound of the notes, at the first tempo of the score, as 16-bit mono."""
    seconds_a_tick = 60 / score.tempos[0].qpm / score.ticks_per_quarter
    notes = [note for track in score.tracks for note in track.notes]
    length = max((note.time + note.duration for note in notes), default=0) * seconds_a_tick + _RELEASE
    sound = np.zeros(int(length * RATE) + 1)
    for note in notes:
        wave_of_note = tone(440.0 * 2 ** ((note.pitch - 69) / 12), note.duration * seconds_a_tick)
        begin = int(note.time * seconds_a_tick * RATE)
        sound[begin : begin + len(wave_of_note)] += wave_of_note[: len(sound) - begin]
    loudest = np.abs(sound).max(initial=1e-9)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((0.9 * 32767 / loudest * sound).astype("<i2").tobytes())


def tone(frequency: float, seconds: float) -> np.ndarray:
    """A plucked sound: harmonics that fade, the higher the sooner, and a release behind `seconds`."""
    time = np.arange(int((seconds + _RELEASE) * RATE)) / RATE
    sound = np.zeros_like(time)
    for number, loudness in enumerate(_HARMONICS, start=1):
        if number * frequency < RATE / 2:
            sound += loudness * np.exp(-0.8 * number * time) * np.sin(2 * np.pi * number * frequency * time)
    return sound * np.minimum(time / _ATTACK, 1) * np.clip((seconds + _RELEASE - time) / _RELEASE, 0, 1)
