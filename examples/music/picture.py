"""A score to look at, as a piano roll."""

from __future__ import annotations

from pathlib import Path

from symusic import Score


def write_roll(score: Score, path: Path, n_given: int, title: str = "") -> None:
    """Draw the notes of a score of one track as a PNG: the first `n_given`, and in another colour the model's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    notes, quarter = list(score.tracks[0].notes), score.ticks_per_quarter
    figure, axes = plt.subplots(figsize=(12, 4), layout="constrained")
    parts = (("given", "#8a8f98", notes[:n_given]), ("written by the model", "#d1495b", notes[n_given:]))
    for label, colour, shown in parts:
        lefts, widths = [note.time / quarter for note in shown], [0.92 * note.duration / quarter for note in shown]
        axes.barh([note.pitch for note in shown], widths, left=lefts, height=0.8, color=colour, label=label)
    if notes[n_given:]:
        axes.axvline(notes[n_given].time / quarter, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="quarter notes", ylabel="MIDI pitch", title=title)
    axes.margins(x=0.01)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
