"""The music application from scores to sound, on twelve chorales."""

from __future__ import annotations

import importlib
import json
import math
import re
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

NEEDED = "the extra music is not installed (pip install 'heron-rwkv[music]')"
for package in ("miditok", "symusic", "music21"):
    pytest.importorskip(package, reason=NEEDED)

from symusic import Note, Score, Track  # noqa: E402

from examples.music import evaluate, hearing, prepare, scores, train, trigram, writing  # noqa: E402
from examples.music.keys import Key, key_of, pitch_classes, share_in  # noqa: E402
from heron.data import sequences  # noqa: E402
from heron.generation import Sampling  # noqa: E402
from tests import warm  # noqa: E402

VOCABULARY = scores.Vocabulary()


def melody(*pitches, quarter=scores.TICKS):
    score = Score(quarter)
    score.tracks.append(Track())
    score.tracks[0].notes.extend(Note(place * quarter, quarter, pitch, 64) for place, pitch in enumerate(pitches))
    return score


@pytest.fixture(scope="module")
def chorales(tmp_path_factory):
    """A folder with what prepare makes of twelve chorales."""
    out = tmp_path_factory.mktemp("music")
    prepare.main(["--limit", "12", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def trained(chorales, tmp_path_factory):
    """A run folder, and what training printed."""
    import contextlib
    import io

    out, printed = tmp_path_factory.mktemp("runs") / "music", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, "subprocess", SimpleNamespace(run=lambda command, check: warm.run(command[1:])))
        patch.setattr(train, "WIDTHS", {"variant": "v8", "n_layer": 1, "n_embd": 32, "head_size": 32})
        train.main(["--data", str(chorales), "--out", str(out), "--steps", "3"])
    return out, printed.getvalue()


def test_rows_hold_whole_pieces_whose_first_bars_are_masked_and_that_are_cut_at_bars(chorales):
    pieces = evaluate.rows(chorales / "train.jsonl") + evaluate.rows(chorales / "val.jsonl")
    assert len(pieces) == 12
    for row in pieces:
        ids, learned = row["ids"], row["learned"]
        assert ids[0] == VOCABULARY.bar
        assert ids[-1] == VOCABULARY.end
        context = [i for i, flag in zip(ids, learned, strict=True) if not flag]
        assert ids[: len(context)] == context
        assert context.count(VOCABULARY.bar) == 2
        assert ids[len(context)] == VOCABULARY.bar
        assert {i for i, flag in zip(ids, row["may_cut"], strict=True) if flag} == {VOCABULARY.bar}
    samples = sequences.load(str(chorales / "train.jsonl"), VOCABULARY.size, ctx_len=128).samples
    assert all(samples[number].ids[0] == VOCABULARY.bar for number in range(len(samples)))


def test_held_out_pieces_are_midi_files_of_the_same_ids(chorales):
    (row,), (path,) = evaluate.rows(chorales / "val.jsonl"), (chorales / "held_out").glob("*.mid")
    score = scores.read_midi(path)
    assert VOCABULARY.ids(score) == row["ids"][:-1]
    assert key_of(score).way_home == 0


def test_midi_files_are_a_source_and_what_is_none_is_told(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        scores.write_midi(melody(*(60 + (number + step) * step % 12 for step in range(16))), folder / f"{number}.mid")
    scores.write_midi(melody(*(60 + step * step % 12 for step in range(16))), folder / "same.mid")
    (folder / "torn.mid").write_bytes(b"MThd\0\0")
    (folder / "notes.txt").write_text("no music")
    prepare.main([str(folder), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "torn.mid: is no MIDI file" in out
    assert "notes.txt" not in out
    assert len(evaluate.rows(tmp_path / "out" / "train.jsonl")) == 2  # one of three is held out, the copy left out


def test_both_roads_end_at_the_same_loss(trained):
    losses = re.findall(r"^(?:heron train|drop-in) +validation loss ([\d.]+)$", trained[1], re.MULTILINE)
    assert len(losses) == 2
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)
    assert float(losses[0]) < math.log(VOCABULARY.size)


def test_continuing_writes_midi_a_picture_and_sound(trained, chorales, tmp_path, capsys):
    (midi,) = (chorales / "held_out").glob("*.mid")

    def continued(name, *more):
        arguments = [str(midi), "--model", str(trained[0]), "--from_bars", "2", "--bars", "3", "--out"]
        importlib.import_module("examples.music.continue").main([*arguments, str(tmp_path / name), *more])
        return VOCABULARY.bars(VOCABULARY.ids(scores.read_midi(tmp_path / f"{name}.mid")))

    once, again, other = continued("once"), continued("again"), continued("other", "--seed", "1")
    assert once[:2] == VOCABULARY.bars(VOCABULARY.ids(scores.read_midi(midi)))[:2]
    assert once == again != other
    assert capsys.readouterr().out.count("bar 5: ") == 3
    assert (tmp_path / "once.png").read_bytes().startswith(b"\x89PNG")
    with wave.open(str(tmp_path / "once.wav")) as file:
        seconds = file.getnframes() / file.getframerate()
    score = scores.read_midi(tmp_path / "once.mid")
    assert seconds == pytest.approx(score.end() / scores.TICKS * 60 / scores.BEATS_A_MINUTE, abs=0.3)


def test_what_cannot_be_continued_ends_with_one_line(trained, tmp_path, capsys):
    (tmp_path / "torn.mid").write_bytes(b"MThd\0\0")
    with pytest.raises(SystemExit) as ending:
        importlib.import_module("examples.music.continue").main([str(tmp_path / "torn.mid")])
    assert ending.value.code == 1
    assert "torn.mid: is no MIDI file" in capsys.readouterr().err


def test_bars_written_by_steps_are_those_that_a_whole_pass_would_draw(trained, chorales):
    """Greedy bars: each id is the likeliest after all before it, ends of the piece apart."""
    model = writing.load(trained[0])
    before = VOCABULARY.bars(evaluate.rows(chorales / "val.jsonl")[0]["ids"])[0]
    (bar,) = writing.bars(model, VOCABULARY, before, 1, Sampling(temperature=0), seed=0)
    logits, _ = model.forward_seq([*before, *bar], None, full_output=True)
    logits[:, VOCABULARY.end] = -math.inf
    likeliest = logits.argmax(dim=-1)[len(before) :].tolist()
    assert likeliest[: len(bar) - 1] == bar[1:]
    assert len(bar) == writing.LONGEST_BAR or likeliest[-1] == VOCABULARY.bar


def test_evaluating_prints_entropies_and_music_beside_chance(trained, chorales, capsys):
    evaluate.main(["--data", str(chorales), "--model", str(trained[0]), "--bars", "6", "--pieces", "1"])
    out = capsys.readouterr().out
    assert re.search(r"1 continuations, read again from MIDI files: \d+ to \d+ bars", out)
    assert re.search(r"trigram: [\d.]+, the model is -?[\d.]+ % below", out)
    itself, chance = (float(re.search(rf"{name} \| ([\d.]+)", out)[1]) for name in ("piece itself", "random pitches"))
    assert itself > 85 > chance


def test_repeated_bars_and_pitch_classes_are_measured():
    bars = VOCABULARY.bars(VOCABULARY.ids(melody(*[60, 64, 67, 72] * 3, 61, 61, 61, 61)))
    assert len(bars) == 4
    measures = evaluate.measured(VOCABULARY, bars[:1], bars[1:], {tuple(bars[3])})
    assert measures.repeated == pytest.approx(100 * 2 / 3)
    assert measures.in_key == pytest.approx(100 * 2 / 3)
    assert measures.distance == pytest.approx(100 / 3)
    assert measures.known == pytest.approx(100 / 3)


def test_keys():
    scale = melody(*(62 + step for step in (0, 2, 4, 5, 7, 9, 11, 12, 7, 4, 0)))
    key = key_of(scale)
    assert str(key) == "D major"
    assert key.way_home == -2
    assert str(key_of(scores.moved(scale, key.way_home))) == "C major"
    assert share_in(key, scale) == 1
    assert share_in(Key(8, "major"), scale) < 0.5
    assert str(key_of(melody(*(64 + step for step in (0, 3, 7, 12, 11, 8, 7, 3, 2, 0))))) == "E minor"
    assert all(-6 <= Key(tonic, mode).way_home <= 5 for tonic in range(12) for mode in ("major", "minor"))
    assert pitch_classes(melody(60, 60, 62)).tolist() == [2 / 3, 0, 1 / 3, *[0] * 9]


def test_a_tone_has_its_pitch_and_length(tmp_path):
    hearing.write_wav(melody(69, 69), tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
    peak = np.abs(np.fft.rfft(sound)).argmax() * hearing.RATE / len(sound)
    assert peak == pytest.approx(440, abs=2)
    assert len(sound) / hearing.RATE == pytest.approx(1.12, abs=0.01)  # two quarters at 120 a minute, and the release
    assert np.abs(sound).max() == pytest.approx(0.9 * 32767, rel=0.01)


def test_entropies_of_what_can_be_counted():
    row = {"ids": [0, 1, 2, 3] * 50, "learned": [1] * 200, "may_cut": [1] * 200}
    found = trigram.entropies([row] * 20, [row], vocab_size=4)
    assert found.unigram == pytest.approx(math.log(4), abs=0.01)
    assert found.trigram < 0.02
    new = {"ids": [3, 1, 0, 2] * 5, "learned": [0] * 4 + [1] * 16, "may_cut": [1] * 20}
    assert math.log(4) < trigram.entropies([row] * 20, [new], vocab_size=4).trigram < 20  # never infinite


def test_rows_are_plain_json(chorales):
    line = (chorales / "train.jsonl").read_text().splitlines()[0]
    assert set(json.loads(line)) == {"ids", "learned", "may_cut"}


def test_each_command_of_the_page_is_one_that_exists(capsys):
    page = (Path(prepare.__file__).parent / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m (examples\.music\.\w+)(.*)$", page, re.MULTILINE)
    assert {name.rpartition(".")[2] for name, _ in commands} == {"prepare", "train", "continue", "evaluate"}
    for name, words in commands:
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        assert set(re.findall(r"--\w+", words)) <= set(re.findall(r"--\w+", capsys.readouterr().out))
