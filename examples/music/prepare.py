"""Music to rows of ids for `heron train`: MIDI files, or scores that music21 carries.

    python -m examples.music.prepare --out data/music               the chorales of Bach in music21's corpus
    python -m examples.music.prepare my/midi/files --out data/mine

It writes train.jsonl and val.jsonl, a piece a row, and the held-out pieces as MIDI files in held_out/. Each piece is
moved to C major or A minor. Its first bars are its context, which is read and not learned; the rest is its completion.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from symusic import Score

from examples.music import command
from examples.music.keys import key_of
from examples.music.scores import read_midi, read_score
from examples.music.vocabulary import Vocabulary, joined
from heron.errors import DataError
from heron.progress import progress

CTX_LEN = 512  # ids of a training sample, which no bar may exceed
COPY = 0.5  # a piece that shares more of its bars than this with an earlier one is a copy of it


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("sources", nargs="*", type=Path, help="MIDI files and folders of them; none: music21's corpus")
    parser.add_argument("--composer", default="bach", help="whose scores of music21's corpus")
    parser.add_argument("--limit", type=command.at_least(2), help="only so many pieces")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of the pieces that are for validation")
    parser.add_argument(
        "--context_bars", type=command.at_least(0), default=2, help="bars at a piece's head that are only read"
    )
    parser.add_argument("--out", type=Path, default=Path("data/music"))
    options = parser.parse_args(arguments)
    if not 0 <= options.held_out < 1:
        parser.error(f"argument --held_out: wanted a share, 0 or more and below 1, got {options.held_out}")

    vocabulary = Vocabulary()
    paths = (midi_files(options.sources) if options.sources else corpus_of(options.composer))[: options.limit]
    read = read_midi if options.sources else read_score
    pieces = list(usable(named_scores(paths, read), vocabulary, options.context_bars))
    random.Random(0).shuffle(pieces)
    n_held_out = max(1, int(len(pieces) * options.held_out))
    if len(pieces) <= n_held_out:
        raise DataError(f"wanted at least {n_held_out + 1} pieces to train on and to hold out, got {len(pieces)}")
    parts = {"val": pieces[:n_held_out], "train": pieces[n_held_out:]}
    write_midi_files(parts["val"], vocabulary, options.out / "held_out")
    for name, members in parts.items():
        rows = [row(vocabulary, bars, options.context_bars) for _, bars in members]
        text = "".join(f"{json.dumps(fields)}\n" for fields in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.out / name}.jsonl: {len(rows)} pieces, {sum(len(fields['ids']) for fields in rows):,} ids")
    print(f"{options.out / 'held_out'}: the pieces of val.jsonl as MIDI files")
    print(f"vocabulary: {vocabulary.size} ids; heron train takes --tokenizer {vocabulary.spec}")


def row(vocabulary: Vocabulary, bars: list[list[int]], context_bars: int) -> dict[str, list[int]]:
    """What `heron train` reads of a piece: its ids with an end, which are learned, and where it may be cut.

    A sample may begin where a bar does, so that no bar and no note is cut in two.
    """
    ids = [*joined(bars), vocabulary.end]
    n_context = len(joined(bars[:context_bars]))
    learned = [int(place >= n_context) for place in range(len(ids))]
    return {"ids": ids, "learned": learned, "may_cut": [int(i == vocabulary.bar) for i in ids]}


def write_midi_files(pieces: Iterable[tuple[str, list[list[int]]]], vocabulary: Vocabulary, folder: Path) -> None:
    """Write each piece under its name, in place of what an earlier call wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.mid"):
        earlier.unlink()
    for number, (name, bars) in enumerate(pieces):
        path = folder / f"{name}.mid"
        vocabulary.score(bars).dump_midi(path.with_stem(f"{path.stem}-{number}") if path.exists() else path)


def prepared(folder: Path) -> tuple[Path, Path]:
    """train.jsonl and val.jsonl of a folder that this command wrote."""
    train, val = (folder / f"{name}.jsonl" for name in ("train", "val"))
    for path in (train, val):
        if not path.is_file():
            raise DataError(f"{path}: no such file; python -m examples.music.prepare --out {folder} makes it")
    return train, val


def midi_files(sources: Sequence[Path]) -> list[Path]:
    """The files among `sources`, and the MIDI files in the folders among them."""
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: wanted a MIDI file or a folder of them, and there is no such file or folder")
        within = (path for path in source.rglob("*") if path.suffix.lower() in (".mid", ".midi"))
        found += [source] if source.is_file() else sorted(within)
    return found


def corpus_of(composer: str) -> list[Path]:
    """The scores in MusicXML of music21's corpus that are of `composer`."""
    from music21 import corpus

    found = sorted(Path(path) for path in corpus.getComposer(composer))
    found = [path for path in found if path.suffix in (".mxl", ".xml", ".musicxml")]
    if not found:
        raise DataError(f"composer {composer!r}: music21's corpus has no MusicXML of that name; bach and mozart, say")
    return found


def named_scores(paths: Sequence[Path], read: Callable[[Path], Score]) -> Iterator[tuple[str, Score]]:
    """The name and the score of each piece that can be read; the others are told."""
    with progress("reading scores") as say:
        for number, path in enumerate(paths):
            say(f"{number} of {len(paths)}")
            try:
                yield path.stem, read(path)
            except DataError as error:
                print(f"left out: {error}")


def usable(
    pieces: Iterable[tuple[str, Score]], vocabulary: Vocabulary, context_bars: int
) -> Iterator[tuple[str, list[list[int]]]]:
    """The name of each piece and its bars in the key that the model knows.

    Those that no sample can hold are told and left out. Copies, which would be in training and in validation, are
    counted.
    """
    earlier: list[set[tuple[int, ...]]] = []
    n_copies = 0
    for name, score in pieces:
        bars = vocabulary.bars(score.shift_pitch(key_of(score).to_c_or_a))
        these, longest = set(map(tuple, bars)), max(map(len, bars))
        if len(bars) <= context_bars:
            print(f"left out: {name}: it ends with its context, after {len(bars)} bars")
        elif longest > CTX_LEN:
            print(f"left out: {name}: a bar of {longest} ids does not fit a sample of {CTX_LEN}")
        elif any(len(these & others) > COPY * len(these) for others in earlier):
            n_copies += 1
        else:
            earlier.append(these)
            yield name, bars
    if n_copies:
        print(f"left out: {n_copies} pieces that share more than half of their bars with another one")


if __name__ == "__main__":
    command.run(main)
