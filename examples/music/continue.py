"""Continue a MIDI file, bar by bar, and write what came of it as MIDI, as a picture and as sound.

python -m examples.music.continue data/music/held_out/bwv140.7.mid --model runs/music --bars 8 --out runs/continued
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.music import command, writing
from examples.music.keys import key_of, share_in
from examples.music.picture import write_roll
from examples.music.scores import read_midi
from examples.music.sound import write_wav
from examples.music.vocabulary import Vocabulary
from heron.generation import Sampling


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("midi", type=Path, help="the file that is continued")
    parser.add_argument(
        "--from_bars", type=command.at_least(0), default=4, help="bars of the file that are kept; 0: all"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/continued"), help="of .mid, .png, .wav; without suffix")
    writing.add_flags(parser)
    options = parser.parse_args(arguments)

    vocabulary = Vocabulary()
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    score = read_midi(options.midi)
    model = writing.load(options.model, vocabulary)
    key = key_of(score)
    given = vocabulary.bars(score.shift_pitch(key.to_c_or_a))[: options.from_bars or None]
    print(f"{options.midi.name}: {key}, {len(given)} bars are kept")
    written = []
    for bar in writing.bars(model, vocabulary, given, options.bars, sampling, options.seed):
        written.append(bar)
        print(f"bar {len(given) + len(written)}: {len(bar)} ids", flush=True)

    kept, new, whole = (
        vocabulary.score(bars).shift_pitch(-key.to_c_or_a) for bars in (given, written, given + written)
    )
    whole.tempos = score.tempos
    options.out.parent.mkdir(parents=True, exist_ok=True)
    midi, picture, sound = (options.out.with_name(f"{options.out.name}.{suffix}") for suffix in ("mid", "png", "wav"))
    whole.dump_midi(midi)
    title = f"{options.midi.stem}, {key}: {len(given)} bars and {options.bars} more, seed {options.seed}"
    write_roll(whole, picture, kept.note_num(), title)
    write_wav(whole, sound)
    print(f"{100 * share_in(key, new):.1f} % of the new notes are in {key}; wrote {midi}, {picture}, {sound}")


if __name__ == "__main__":
    command.run(main)
