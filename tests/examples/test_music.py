"""The music application from scores to sound, on twelve chorales."""

from __future__ import annotations

import importlib.util
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

from symusic import Note, Score, Tempo, Track  # noqa: E402

import examples.music  # noqa: E402
import heron  # noqa: E402
from examples.music import command, evaluate, prepare, scores, sound, train, trigram, writing  # noqa: E402
from examples.music.keys import Key, key_of, pitch_classes, share_in  # noqa: E402
from examples.music.measures import measured  # noqa: E402
from examples.music.vocabulary import Vocabulary  # noqa: E402
from heron.data import sequences  # noqa: E402
from heron.generation import Sampling  # noqa: E402
from tests import warm  # noqa: E402

VOCABULARY = Vocabulary()
continuing = importlib.import_module("examples.music.continue")  # no name for a statement


def in_a_warm_process(command, check):
    warm.run(command[1:])
    return SimpleNamespace(returncode=0)


def melody(*pitches, quarter=scores.TICKS):
    score = Score(quarter)
    score.tempos.append(Tempo(0, 120))
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
        patch.setattr(train, "subprocess", SimpleNamespace(run=in_a_warm_process))
        patch.setattr(train, "SIZES", {"variant": "v8", "n_layer": 1, "n_embd": 32, "head_size": 32})
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
    assert VOCABULARY.bars(score) == VOCABULARY.split(row["ids"])
    assert key_of(score).to_c_or_a == 0


def tune(number):
    return melody(*(60 + (number + step) * step % 12 for step in range(16)))


def test_midi_files_are_a_source_and_what_is_of_no_use_is_told(tmp_path, capsys):
    folder, held_out = tmp_path / "mine", tmp_path / "out" / "held_out"
    for made in (folder, held_out):
        made.mkdir(parents=True)
    for number in range(3):
        tune(number).dump_midi(folder / f"{number}.mid")
    tune(0).dump_midi(folder / "same.mid")
    tune(5).dump_midi(held_out / "of an earlier call.mid")
    melody(60).dump_midi(folder / "short.mid")
    melody().dump_midi(folder / "silent.mid")
    melody(*range(110, 120)).dump_midi(folder / "shrill.mid")
    (folder / "torn.mid").write_bytes(b"MThd\0\0")
    (folder / "notes.txt").write_text("no music")
    prepare.main([str(folder), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "torn.mid: is no MIDI file" in out
    assert "silent.mid: wanted notes" in out
    assert "shrill.mid: wanted notes" in out
    assert "short: it ends with its context, after 1 bars" in out
    assert "1 pieces that share more than half" in out
    assert "notes.txt" not in out
    assert len(evaluate.rows(tmp_path / "out" / "train.jsonl")) == 2  # one of three is held out
    assert len(list(held_out.iterdir())) == 1


def test_a_bar_that_no_sample_holds_is_told(capsys):
    crowd = Score(scores.TICKS)
    crowd.tracks.append(Track())
    for number in range(3 * 16 * 16):  # three bars of sixteenths, sixteen notes each
        crowd.tracks[0].notes.append(Note(number // 16 * 120, 120, 40 + number % 16, 64))
    assert list(prepare.usable([("crowd", crowd)], VOCABULARY, 2)) == []
    assert "crowd: a bar of 530 ids does not fit a sample of 512" in capsys.readouterr().out


def test_both_roads_end_at_the_same_loss(trained):
    losses = re.findall(r"^(?:heron train|drop-in) +validation loss ([\d.]+)$", trained[1], re.MULTILINE)
    assert len(losses) == 2
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)
    assert float(losses[0]) < math.log(VOCABULARY.size)


def test_continuing_writes_midi_a_picture_and_sound(trained, chorales, tmp_path, capsys):
    (midi,) = (chorales / "held_out").glob("*.mid")

    def continued(name, *more):
        arguments = [str(midi), "--model", str(trained[0]), "--from_bars", "2", "--bars", "3", "--out"]
        continuing.main([*arguments, str(tmp_path / name), *more])
        return VOCABULARY.bars(scores.read_midi(tmp_path / f"{name}.mid"))

    once, again, other = continued("once"), continued("again"), continued("other", "--seed", "1")
    assert once[:2] == VOCABULARY.bars(scores.read_midi(midi))[:2]
    assert once == again != other
    assert capsys.readouterr().out.count("bar 5: ") == 3
    assert (tmp_path / "once.png").read_bytes().startswith(b"\x89PNG")
    with wave.open(str(tmp_path / "once.wav")) as file:
        seconds = file.getnframes() / file.getframerate()
    score = scores.read_midi(tmp_path / "once.mid")
    assert seconds == pytest.approx(score.end() / scores.TICKS * 60 / scores.BEATS_A_MINUTE, abs=0.3)


def test_a_continuation_has_the_tempo_and_the_key_of_its_file(trained, tmp_path):
    given = melody(*(62 + step for step in (0, 2, 4, 5, 7, 9, 11, 12, 7, 4, 0, 0)))  # D major, at 120 a minute
    given.dump_midi(tmp_path / "given.mid")
    arguments = [str(tmp_path / "given.mid"), "--model", str(trained[0]), "--bars", "1", "--out", str(tmp_path / "out")]
    continuing.main(arguments)
    whole = scores.read_midi(tmp_path / "out.mid")
    assert whole.tempos[0].qpm == pytest.approx(120, abs=0.01)
    assert [note.pitch for note in whole.tracks[0].notes][:12] == [note.pitch for note in given.tracks[0].notes]


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (prepare, ["{tmp}/nowhere"], "nowhere: wanted a MIDI file or a folder"),
        (prepare, ["{tmp}/empty"], "wanted at least 2 pieces to train on and to hold out, got 0"),
        (prepare, ["--composer", "nobody"], "music21's corpus has no MusicXML of that name"),
        (continuing, ["{tmp}/torn.mid"], "torn.mid: is no MIDI file"),
        (continuing, ["{tmp}/nowhere.mid"], "nowhere.mid: wanted a MIDI file"),
        (
            continuing,
            ["{tmp}/tune.mid", "--model", "{tmp}"],
            "no such file; python -m examples.music.train",
        ),
        (continuing, ["{tmp}/tune.mid", "--model", "{tmp}/other.pth"], "wanted a model of 181 ids, got one of 7"),
        (continuing, ["{tmp}/tune.mid", "--top_p", "2"], "top_p: wanted 0 to 1, got 2.0"),
        (
            evaluate,
            ["--model", "{model}", "--data", "{tmp}"],
            "no such file; python -m examples.music.prepare",
        ),
        (evaluate, ["--model", "{model}", "--data", "{data}", "--bars", "999"], "no held-out piece has 1003 bars"),
        (train, ["--data", "{tmp}"], "no such file; python -m examples.music.prepare"),
    ],
)
def test_what_a_user_can_mend_is_one_line(module, words, message, trained, chorales, tmp_path):
    (tmp_path / "torn.mid").write_bytes(b"MThd\0\0")
    (tmp_path / "empty").mkdir()
    tune(0).dump_midi(tmp_path / "tune.mid")
    config = heron.ModelConfig(variant="v8", n_layer=1, n_embd=32, head_size=32, vocab_size=7)
    heron.save(heron.RWKV(config), tmp_path / "other.pth")
    words = [word.format(tmp=tmp_path, model=trained[0], data=chorales) for word in words]
    with pytest.raises(SystemExit) as ending:
        command.run(lambda: module.main(words))
    assert message in str(ending.value.code)
    assert "\n" not in str(ending.value.code)


def test_training_ends_with_the_code_of_heron_train(chorales, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=75))
    with pytest.raises(SystemExit) as ending:
        train.main(["--data", str(chorales)])
    assert ending.value.code == 75


def test_held_out_pieces_of_one_name_are_all_written(tmp_path):
    pieces = [("same", VOCABULARY.bars(tune(number))) for number in range(3)]
    prepare.write_midi_files(pieces, VOCABULARY, tmp_path)
    written = [VOCABULARY.bars(scores.read_midi(path)) for path in tmp_path.iterdir()]
    assert len(written) == 3
    assert all(bars in written for _, bars in pieces)


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_a_share_out_of_range_is_refused(share, capsys):
    with pytest.raises(SystemExit) as ending:
        prepare.main(["--held_out", share])
    assert ending.value.code == 2
    assert "--held_out: wanted a share" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--bars", "0"], ["--bars", "-1"], ["--seed", "9" * 25], ["--from_bars", "-2"]])
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ending:
        continuing.main(["any.mid", *words])
    assert ending.value.code == 2
    assert "wanted a whole number" in capsys.readouterr().err


def test_without_the_extra_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs miditok, symusic, music21: pip install .*'\.\[music\]'"):
        importlib.reload(examples.music)


def test_bars_written_by_steps_are_those_that_a_whole_pass_would_draw(trained, chorales):
    """Greedy bars: each id is the likeliest after all before it, ends of the piece apart."""
    model = writing.load(trained[0], VOCABULARY)
    before = VOCABULARY.split(evaluate.rows(chorales / "val.jsonl")[0]["ids"])[0]
    (bar,) = writing.bars(model, VOCABULARY, [before], 1, Sampling(temperature=0), seed=0)
    logits, _ = model.forward_seq([*before, *bar], None, full_output=True)
    logits[:, VOCABULARY.end] = -math.inf
    likeliest = logits.argmax(dim=-1)[len(before) :].tolist()
    assert likeliest[: len(bar) - 1] == bar[1:]
    assert len(bar) == writing.LONGEST_BAR or likeliest[-1] == VOCABULARY.bar


def test_evaluating_prints_entropies_and_music_beside_chance(trained, chorales, capsys):
    evaluate.main(["--data", str(chorales), "--model", str(trained[0]), "--bars", "6", "--pieces", "1"])
    out = capsys.readouterr().out
    assert re.search(r"1 continuations, read again from MIDI files: \d+ to \d+ bars", out)
    assert re.search(r"trigram: [\d.]+, the model is [\d.]+ % (below|above)", out)
    itself, chance = (float(re.search(rf"{name} \| ([\d.]+)", out)[1]) for name in ("piece itself", "random pitches"))
    assert itself > 85 > chance


def test_repeated_bars_and_pitch_classes_are_measured():
    bars = VOCABULARY.bars(melody(*[60, 64, 67, 72] * 3, 61, 61, 61, 61))
    assert len(bars) == 4
    measures = measured(VOCABULARY, bars[:1], bars[1:], {tuple(bars[3])})
    assert measures.repeated == pytest.approx(100 * 2 / 3)
    assert measures.in_key == pytest.approx(100 * 2 / 3)
    assert measures.distance == pytest.approx(100 / 3)
    assert measures.in_training == pytest.approx(100 / 3)


def test_keys():
    scale = melody(*(62 + step for step in (0, 2, 4, 5, 7, 9, 11, 12, 7, 4, 0)))
    key = key_of(scale)
    assert str(key) == "D major"
    assert key.to_c_or_a == -2
    assert str(key_of(scale.shift_pitch(key.to_c_or_a))) == "C major"
    assert share_in(key, scale) == 1
    assert share_in(Key(8, "major"), scale) < 0.5
    assert str(key_of(melody(*(64 + step for step in (0, 3, 7, 12, 11, 8, 7, 3, 2, 0))))) == "E minor"
    assert all(-6 <= Key(tonic, mode).to_c_or_a <= 5 for tonic in range(12) for mode in ("major", "minor"))
    assert pitch_classes(melody(60, 60, 62)).tolist() == [2 / 3, 0, 1 / 3, *[0] * 9]


def test_a_tone_has_its_pitch_and_length(tmp_path):
    sound.write_wav(melody(69, 69), tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        wave_form = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
    peak = np.abs(np.fft.rfft(wave_form)).argmax() * sound.RATE / len(wave_form)
    assert peak == pytest.approx(440, abs=2)
    assert len(wave_form) / sound.RATE == pytest.approx(1.12, abs=0.01)  # two quarters at 120 a minute, and the release
    assert np.abs(wave_form).max() == pytest.approx(0.9 * 32767, rel=0.01)


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
