"""Continue a MIDI file, bar by bar, and write what came of it as MIDI, as a picture and as sound.

python -m examples.music.continue data/music/held_out/bwv103.6.mid --model runs/music --bars 8 --out runs/continued
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.music import hearing, writing
from examples.music.keys import key_of, share_in
from examples.music.scores import Vocabulary, moved, read_midi, write_midi
from heron.errors import HeronError
from heron.generation import Sampling


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("midi", type=Path, help="the file that is continued")
    parser.add_argument("--model", type=Path, default=Path("runs/music"), help="a run folder, or a .pth file")
    parser.add_argument("--from_bars", type=int, default=4, help="bars of the file that are kept; 0: all")
    parser.add_argument("--bars", type=int, default=8, help="bars that are written")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/continued"), help="of .mid, .png, .wav; without suffix")
    options = parser.parse_args(arguments)

    vocabulary = Vocabulary()
    try:
        score = read_midi(options.midi)
        model = writing.load(options.model)
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    except (OSError, ValueError, HeronError) as error:
        parser.exit(1, f"{error}\n")
    key = key_of(score)
    given = vocabulary.bars(vocabulary.ids(moved(score, key.way_home)))[: options.from_bars or None]
    print(f"{options.midi.name}: {key}, {len(given)} bars are kept")
    ids = [i for bar in given for i in bar]
    n_given, n_given_notes = len(ids), vocabulary.score(ids).note_num()
    new_bars = writing.bars(model, vocabulary, tuple(ids), options.bars, sampling, options.seed)
    for number, bar in enumerate(new_bars, start=len(given) + 1):
        ids += bar
        print(f"bar {number}: {len(bar)} ids")
    whole = moved(vocabulary.score(ids), -key.way_home)
    new = moved(vocabulary.score(ids[n_given:]), -key.way_home)
    written_from = [*sorted(note.time for note in whole.tracks[0].notes), whole.end()][n_given_notes]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    out = {suffix: options.out.with_name(f"{options.out.name}.{suffix}") for suffix in ("mid", "png", "wav")}
    write_midi(whole, out["mid"])
    title = f"{options.midi.stem}, {key}: {len(given)} bars and {options.bars} more, seed {options.seed}"
    hearing.write_roll(whole, out["png"], written_from, title)
    hearing.write_wav(whole, out["wav"])
    print(f"{100 * share_in(key, new):.1f} % of the new notes are in {key}; wrote {', '.join(map(str, out.values()))}")


if __name__ == "__main__":
    main()
