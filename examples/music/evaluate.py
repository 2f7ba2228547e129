"""How good a model of music is: its loss beside what counting gives, and its music beside Bach's and beside chance.

python -m examples.music.evaluate --data data/music --model runs/music
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from symusic import Score

from examples.music import command, trigram, writing
from examples.music.measures import Measures, measured
from examples.music.prepare import prepared
from examples.music.scores import read_midi
from examples.music.train import held_out_loss
from examples.music.vocabulary import Vocabulary
from heron.data import jsonl
from heron.errors import DataError
from heron.generation import Sampling

IN_KEY = 90  # per cent of a piece's notes, at least


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/music"), help="what prepare wrote")
    parser.add_argument("--pieces", type=command.at_least(1), default=10, help="held-out pieces that are continued")
    parser.add_argument("--from_bars", type=command.at_least(1), default=4, help="bars of each that are given")
    writing.add_flags(parser)
    options = parser.parse_args(arguments)

    vocabulary = Vocabulary()
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    model = writing.load(options.model, vocabulary)
    train_data, val_data = prepared(options.data)
    train, val = rows(train_data), rows(val_data)

    loss = held_out_loss(model, val_data)
    print(f"model: {loss:.3f} nats an id on held-out pieces")
    for name, entropy in trigram.entropies(train, val, vocabulary.size)._asdict().items():
        side = "below" if loss <= entropy else "above"
        print(f"{name}: {entropy:.3f}, the model is {100 * abs(1 - loss / entropy):.1f} % {side}")

    length = options.from_bars + options.bars
    pieces = [piece[:length] for piece in (vocabulary.split(row["ids"]) for row in val) if len(piece) >= length]
    if not pieces:
        raise DataError(f"{options.data}: no held-out piece has {length} bars; give fewer --bars or --from_bars")
    trained_on = {tuple(bar) for row in train for bar in vocabulary.split(row["ids"])}
    found: dict[str, list[Measures]] = {"the piece itself": [], "the model": [], "random pitches": []}
    lengths = []
    for seed, piece in enumerate(pieces[: options.pieces], start=options.seed):
        given, own = piece[: options.from_bars], piece[options.from_bars :]
        written = list(writing.bars(model, vocabulary, given, options.bars, sampling, seed))
        lengths.append(len(vocabulary.bars(through_a_file(vocabulary.score(given + written)))))
        chance = vocabulary.bars(at_random(vocabulary.score(own), seed))
        for name, new in zip(found, (own, written, chance), strict=True):
            found[name].append(measured(vocabulary, given, new, trained_on))
    print(f"{len(lengths)} continuations, read again from MIDI files: {min(lengths)} to {max(lengths)} bars\n")
    header = "what follows | notes in key, % | pitch-class distance, % | repeated bars, % | bars in training, %"
    print(f"| {header} | pieces with {IN_KEY} % in key |")
    print("|---|---|---|---|---|---|")
    for name, measures in found.items():
        means = [f"{np.mean(values):.1f}" for values in zip(*measures, strict=True)]
        print(f"| {name} | {' | '.join(means)} | {sum(each.in_key >= IN_KEY for each in measures)} |")


def rows(path: Path) -> list[dict[str, Any]]:
    """The pieces of train.jsonl or val.jsonl."""
    return [row for _, row in jsonl.read(path, dict)]


def at_random(score: Score, seed: int) -> Score:
    """The same notes with pitches drawn from the range of the score."""
    draw, notes = random.Random(seed), score.tracks[0].notes
    pitches = [note.pitch for note in notes]
    for note in notes:
        note.pitch = draw.randint(min(pitches), max(pitches))
    return score


def through_a_file(score: Score) -> Score:
    """The music as a MIDI file gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "music.mid")
        score.dump_midi(path)
        return read_midi(path)


if __name__ == "__main__":
    command.run(main)
