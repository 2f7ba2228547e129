"""How good a model of music is: its loss beside what counting gives, and its music beside Bach's and beside chance.

python -m examples.music.evaluate --data data/music --model runs/music
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from symusic import Score

from examples.music import trigram, writing
from examples.music.keys import key_of, pitch_classes, share_in
from examples.music.scores import Vocabulary, read_midi, write_midi
from heron.data import sequences
from heron.data.packs import Packs
from heron.errors import HeronError
from heron.evaluate import evaluate_batches
from heron.generation import Sampling


class Measures(NamedTuple):
    """Of bars that follow others, in per cent."""

    in_key: float  # notes in the key of the bars before
    distance: float  # of their pitch classes to those of the bars before: half the sum of the differences of shares
    repeated: float  # bars that are the same as an earlier one
    known: float  # bars that a piece of the training data has


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/music"), help="what prepare wrote")
    parser.add_argument("--model", type=Path, default=Path("runs/music"), help="a run folder, or a .pth file")
    parser.add_argument("--pieces", type=int, default=10, help="held-out pieces that are continued")
    parser.add_argument("--from_bars", type=int, default=4, help="bars of each that are given")
    parser.add_argument("--bars", type=int, default=8, help="bars that are written")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    vocabulary = Vocabulary()
    try:
        model = writing.load(options.model)
        corpus = sequences.load(str(options.data / "val.jsonl"), vocabulary.size, ctx_len=512, val_fraction=0.0)
    except HeronError as error:
        parser.exit(1, f"{error}\n")
    val, train = (rows(options.data / f"{name}.jsonl") for name in ("val", "train"))
    loss = evaluate_batches(model, Packs(corpus.samples, 512, 0).each_once(4)).loss
    print(f"model: {loss:.3f} nats an id on held-out pieces")
    for name, entropy in trigram.entropies(train, val, vocabulary.size)._asdict().items():
        print(f"{name}: {entropy:.3f}, the model is {100 * (1 - loss / entropy):.1f} % below")

    found: dict[str, list[Measures]] = {"the piece itself": [], "the model": [], "random pitches": []}
    sampling, lengths = Sampling(temperature=options.temperature, top_p=options.top_p), []
    files = sorted((options.data / "held_out").glob("*.mid"))
    pieces = [vocabulary.bars(vocabulary.ids(read_midi(path))) for path in files]
    long_enough = [bars for bars in pieces if len(bars) >= options.from_bars + options.bars]
    known = {tuple(bar) for row in train for bar in vocabulary.bars(row["ids"])}
    for seed, bars in enumerate(long_enough[: options.pieces], start=options.seed):
        given, own = bars[: options.from_bars], bars[options.from_bars :][: options.bars]
        written = list(writing.bars(model, vocabulary, joined(given), options.bars, sampling, seed))
        lengths.append(len(vocabulary.bars(vocabulary.ids(through_a_file(vocabulary, given + written)))))
        chance = vocabulary.bars(vocabulary.ids(at_random(vocabulary.score(joined(own)), seed)))
        for name, new in zip(found, (own, written, chance), strict=True):
            found[name].append(measured(vocabulary, given, new, known))
    if not lengths:
        parser.exit(1, f"no held-out piece has {options.from_bars + options.bars} bars; give fewer --bars\n")
    print(f"{len(lengths)} continuations, read again from MIDI files: {min(lengths)} to {max(lengths)} bars\n")
    print("| what follows | notes in key, % | pitch-class distance, % | repeated bars, % | bars in training, % |")
    print("|---|---|---|---|---|")
    for name, measures in found.items():
        means = [f"{np.mean(values):.1f}" for values in zip(*measures, strict=True)]
        print(f"| {name} | {' | '.join(means)} |")


def rows(path: Path) -> list[trigram.Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def joined(bars: Sequence[Sequence[int]]) -> list[int]:
    return [i for bar in bars for i in bar]


def measured(
    vocabulary: Vocabulary, given: list[list[int]], new: list[list[int]], known: Set[tuple[int, ...]]
) -> Measures:
    """Of the bars `new` behind the bars `given`."""
    before, score = vocabulary.score(joined(given)), vocabulary.score(joined(new))
    distance = float(np.abs(pitch_classes(score) - pitch_classes(before)).sum() / 2)
    bars = [tuple(bar) for bar in given + new]
    repeated = [bar in bars[:place] for place, bar in enumerate(bars)][len(given) :]
    in_training = [bar in known for bar in bars[len(given) :]]
    of_bars = (100 * sum(flags) / max(len(new), 1) for flags in (repeated, in_training))
    return Measures(100 * share_in(key_of(before), score), 100 * distance, *of_bars)


def at_random(score: Score, seed: int) -> Score:
    """The same notes with pitches drawn from the range of the score."""
    draw, notes = random.Random(seed), score.tracks[0].notes
    low, high = min(note.pitch for note in notes), max(note.pitch for note in notes)
    for note in notes:
        note.pitch = draw.randint(low, high)
    return score


def through_a_file(vocabulary: Vocabulary, bars: list[list[int]]) -> Score:
    """The music of `bars` as a MIDI file gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "music.mid")
        write_midi(vocabulary.score(joined(bars)), path)
        return read_midi(path)


if __name__ == "__main__":
    main()
