"""Music to rows of ids for `heron train`: MIDI files, or scores that music21 carries.

    python -m examples.music.prepare --out data/music               the chorales of Bach in music21's corpus
    python -m examples.music.prepare my/midi/files --out data/mine

It writes train.jsonl and val.jsonl, a piece a row, and the held-out pieces as MIDI files in held_out/. Each piece is
moved to C major or A minor. Its first bars are its context, which is read and not learned; the rest is its completion.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from symusic import Score

from examples.music.keys import key_of
from examples.music.scores import Vocabulary, moved, read_midi, read_score, write_midi

COPY = 0.5  # a piece that shares more of its bars than this with an earlier one is a copy of it


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="MIDI files and folders of them; none: music21's corpus")
    parser.add_argument("--composer", default="bach", help="whose scores of music21's corpus")
    parser.add_argument("--limit", type=int, help="only so many pieces")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of the pieces that are for validation")
    parser.add_argument("--context_bars", type=int, default=2, help="bars at a piece's head that are only read")
    parser.add_argument("--out", type=Path, default=Path("data/music"))
    options = parser.parse_args(arguments)

    vocabulary = Vocabulary()
    pieces = list(distinct(read(options.sources, options.composer, options.limit), vocabulary, options.context_bars))
    random.Random(0).shuffle(pieces)
    n_held_out = max(1, int(len(pieces) * options.held_out))
    if len(pieces) <= n_held_out:
        parser.error(f"wanted at least {n_held_out + 1} pieces, found {len(pieces)}")
    parts = {"val": pieces[:n_held_out], "train": pieces[n_held_out:]}
    (options.out / "held_out").mkdir(parents=True, exist_ok=True)
    for name, members in parts.items():
        rows = [row(vocabulary, ids, options.context_bars) for _, ids in members]
        text = "".join(f"{json.dumps(fields)}\n" for fields in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.out / name}.jsonl: {len(rows)} pieces, {sum(len(ids) for _, ids in members):,} ids")
    for name, ids in parts["val"]:
        write_midi(vocabulary.score(ids), options.out / "held_out" / f"{name}.mid")
    print(f"vocabulary: {vocabulary.size} ids; heron train takes --tokenizer {vocabulary.spec}")


def row(vocabulary: Vocabulary, ids: list[int], context_bars: int) -> dict[str, list[int]]:
    """What `heron train` reads of a piece: its ids with an end, which are learned, and where it may be cut."""
    ids = [*ids, vocabulary.end]
    n_context = sum(map(len, vocabulary.bars(ids)[:context_bars]))
    learned = [int(place >= n_context) for place in range(len(ids))]
    return {"ids": ids, "learned": learned, "may_cut": vocabulary.may_cut(ids)}


def read(sources: Sequence[Path], composer: str, limit: int | None) -> Iterator[tuple[str, Score]]:
    """The name and the score of each piece that can be read; the others are named."""
    if sources:
        found = [source for source in sources if source.is_file()]
        for folder in (source for source in sources if not source.is_file()):
            found += sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi"))
    else:
        from music21 import corpus

        found = sorted(path for path in corpus.getComposer(composer) if path.suffix in (".mxl", ".xml", ".musicxml"))
    for path in found[:limit]:
        try:
            yield path.stem, read_midi(path) if sources else read_score(path)
        except ValueError as error:
            print(f"left out: {error}")


def distinct(
    pieces: Iterator[tuple[str, Score]], vocabulary: Vocabulary, context_bars: int
) -> Iterator[tuple[str, list[int]]]:
    """The ids of each piece in the model's key, without copies, which would be in training and in validation.

    A piece that ends with its context is left out, too.
    """
    earlier: list[set[tuple[int, ...]]] = []
    for name, score in pieces:
        ids = vocabulary.ids(moved(score, key_of(score).way_home))
        bars = vocabulary.bars(ids)
        these = set(map(tuple, bars))
        if len(bars) <= context_bars or any(len(these & others) > COPY * len(these) for others in earlier):
            continue
        earlier.append(these)
        yield name, ids


if __name__ == "__main__":
    main()
