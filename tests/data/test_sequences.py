"""Rows of ids: which are learned, where a row is cut, what is refused by line and field, and a run that learns them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import heron
from heron.commands import eval as eval_verb
from heron.commands import flags
from heron.commands import train as train_verb
from heron.config import RosaConfig
from heron.data import sequences
from heron.data.corpora import read_documents
from heron.data.packs import Packs
from heron.errors import ConfigError, DataError

BAR = 0  # in these tests an event begins with it


def song(bars, length=4):
    """A row of bars of so many ids, of which all but the first bar are learned."""
    ids = [BAR if place == 0 else 1 + (bar + place) % 9 for bar in range(bars) for place in range(length)]
    return {
        "ids": ids,
        "learned": [int(place >= length) for place in range(len(ids))],
        "may_cut": [int(number == BAR) for number in ids],
    }


@pytest.fixture
def write(tmp_path):
    def write_(*rows, name="songs.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write_


def load(path, ctx_len=64, vocab_size=10, val_fraction=0.0, **settings):
    return sequences.load(path, vocab_size, ctx_len, val_fraction=val_fraction, **settings)


@pytest.mark.parametrize("ctx_len", [4, 5, 7, 8, 11, 100])
def test_a_sequence_is_cut_before_events_and_each_learned_id_is_predicted_once(ctx_len):
    row = {key: np.array(values) for key, values in song(6).items()}
    ids, learned = row["ids"], row["learned"].astype(bool)
    samples = list(sequences.cut(ids, learned, row["may_cut"].astype(bool), ctx_len))
    assert all(sample.ids[0] == BAR and len(sample.ids) <= ctx_len + 1 for sample in samples)
    predicted = np.concatenate([sample.ids[1:][sample.learned[1:]] for sample in samples])
    assert predicted.tolist() == ids[learned].tolist()
    inputs = [len(sample.ids) - 1 for sample in samples]
    assert all(one + min(other, 4) > ctx_len for one, other in itertools.pairwise(inputs))  # no bar more would fit


def test_a_row_without_masks_is_learned_whole_and_cut_anywhere(write):
    corpus = load(write({"ids": list(range(10))}), ctx_len=4)
    assert [corpus.samples[i].ids.tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9]]
    assert corpus.samples.learned.all()
    assert corpus.kind == "sequences"


def test_batches_hold_the_mask_and_keep_sequences_apart(write):
    corpus = load(write(song(2), song(3)), ctx_len=19)
    tokens, targets, _, cu_seqlens = Packs(corpus.samples, 19, seed=0).batch(0, 1)
    assert tokens.shape == targets.shape == (1, 19)
    assert cu_seqlens.tolist() in ([0, 7, 18, 19], [0, 11, 18, 19], [0, 7, 18], [0, 11, 18], [0, 7, 19], [0, 11, 19])
    first = cu_seqlens[1].item()
    for start in (0, first):
        assert targets[0, start : start + 3].tolist() == [-100] * 3
    assert int((targets != -100).sum()) == 4 + 8


def test_the_last_rows_are_kept_for_validation_whole(write):
    corpus = load(write(*(song(bars) for bars in range(2, 12))), ctx_len=8, val_fraction=0.2)
    assert {where.rpartition(" ")[2] for where in corpus.val_samples.where} == {"9", "10"}
    other = load(write(*(song(bars) for bars in range(2, 12))), val_data=write(song(3), name="val.jsonl"))
    assert other.val.tolist() == song(3)["ids"]
    assert other.fingerprint != corpus.fingerprint


def test_what_was_read_is_said(write):
    lines = []
    load(write(song(3), song(4)), ctx_len=8, say=lines.append)
    assert lines == ["songs.jsonl: 2 sequences, 28 ids, of which 20 are learned; in 4 parts of at most 8"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"ids": [1, 10]}, "ids: wanted integers from 0 to 9, got 10 at place 1"),
        ({"ids": [1, True]}, "got True at place 1"),
        ({"ids": [1, 2.0]}, "got 2.0 at place 1"),
        ({"ids": [1]}, "ids: wanted at least 2, got 1"),
        ({"id": [1, 2]}, 'wanted a list of integers under "ids", got None'),
        ({"ids": [1, 2], "learned": [1]}, "learned: wanted 0 or 1 for each of the 2 ids, got 1 values"),
        ({"ids": [1, 2], "learned": [1, 2]}, "learned: wanted integers from 0 to 1, got 2 at place 1"),
        ({"ids": [1, 2], "learned": [1, 0]}, "learned: nothing of it is learned behind the first id"),
        ({"ids": [1] * 20, "may_cut": [0] * 20}, "none behind id 0 up to id 19; a ctx_len of 19 would do"),
        ({"ids": [1] * 20, "may_cut": [0] * 4 + [1] + [0] * 15}, "none behind id 4 up to id 19; a ctx_len of 15"),
    ],
)
def test_a_bad_row_is_refused_with_its_line_and_field(write, row, told):
    path = write(song(2), row)
    with pytest.raises(DataError) as error:
        load(path, ctx_len=8)
    assert "songs.jsonl, line 2: " in str(error.value)
    assert told in str(error.value)


def test_only_rows_of_ids_count_as_such(write, tmp_path):
    assert sequences.holds_ids(write(song(2)))
    assert not sequences.holds_ids(write({"ids": [1, 2], "text": "a song"}))
    assert sequences.holds_ids(write({"ids": [1, 2], "text": "a song"}), column="lyrics")
    assert not sequences.holds_ids(write({"text": "a song"}))
    assert not sequences.holds_ids(write(song(2), name="songs.txt"))
    assert not sequences.holds_ids("builtin:python-docs")
    assert not sequences.holds_ids(str(tmp_path))
    (tmp_path / "torn.jsonl").write_text('{"ids": [1,')
    assert not sequences.holds_ids(str(tmp_path / "torn.jsonl"))


def test_heron_train_learns_what_is_marked_and_goes_on_exactly(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("heron.train.loop.plot", lambda folders, out: None)  # which takes longer than the run
    data, val = write(*(song(bars) for bars in (3, 2, 5))), write(song(4), name="val.jsonl")

    def train(out, *more):
        common = "--n_layer 1 --n_embd 32 --model.head_size 32 --ctx_len 24 --micro_bsz 1 --accumulate 2 --threads 1"
        common += " --tokenizer integers:10 --save_every 2 --eval_every 2 --sample_tokens 4 --lr_init 1e-2"
        words = ["train", "--data", data, "--val_data", val, "--out", str(tmp_path / out), *common.split(), *more]
        options = flags.parser().parse_args(words)
        assert train_verb.run(options) == 0
        return heron.load(tmp_path / out)

    whole = train("whole", "--max_steps", "4")
    assert "3 sequences in 2 samples" in capsys.readouterr().out
    halfway = tmp_path / "whole" / "checkpoints" / "step-00000002"
    again = train("again", "--max_steps", "4", "--resume", str(halfway))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    corpus = load(data, ctx_len=24, val_data=val)
    (tokens, targets, _, cu_seqlens), *_ = Packs(corpus.val_samples, 24, seed=0).each_once(1)
    with torch.no_grad():
        expected = whole.loss(tokens, targets, cu_seqlens).item()
    assert next(line for line in lines[::-1] if "val_loss" in line)["val_loss"] == pytest.approx(expected, abs=1e-6)

    torch.manual_seed(0)
    fresh = heron.RWKV(whole.config)
    batches = Packs(corpus.samples, 24, seed=0)
    passes = [batches.batch(number, 1) for number in (0, 1)]
    learned = [int((targets != -100).sum()) for _, targets, *_ in passes]
    with torch.no_grad():
        losses = [fresh.loss(tokens, targets, cu).item() for tokens, targets, _, cu in passes]
    mean = sum(loss * n for loss, n in zip(losses, learned, strict=True)) / sum(learned)
    assert learned[0] != learned[1]
    assert lines[0]["loss"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("rosa", [None, "memory"])
def test_heron_eval_scores_what_is_learned(write, tmp_path, capsys, rosa):
    torch.manual_seed(0)
    memory = None if rosa is None else RosaConfig.preset(rosa)
    model = heron.RWKV(
        heron.ModelConfig(variant="v7", n_layer=1, n_embd=32, head_size=32, vocab_size=10, memory=memory)
    )
    with torch.no_grad():
        model.head.weight.normal_()
        for name, parameter in model.named_parameters():
            if name.startswith("memory"):
                parameter.normal_()
    heron.save(model, tmp_path / "model.safetensors")
    songs = [song(3), song(5)]
    words = ["eval", str(tmp_path / "model.safetensors"), "--data", write(*songs), "--tokenizer", "integers:10"]

    def evaluated(*more):
        options = flags.parser().parse_args([*words, *more, "--json", str(tmp_path / "scores.json")])
        eval_verb.run(options)
        (score,) = json.loads((tmp_path / "scores.json").read_text())
        return score["loss"], score["tokens"]

    loss, n_targets = evaluated()
    rows = [{key: torch.tensor(values) for key, values in row.items()} for row in songs]
    targets = [torch.where(row["learned"] == 1, row["ids"], -100)[None, 1:] for row in rows]
    with torch.no_grad():
        sums = [
            model.loss(row["ids"][None, :-1], y).item() * int((y != -100).sum())
            for row, y in zip(rows, targets, strict=True)
        ]
    assert n_targets == sum(sum(row["learned"]) for row in songs)
    assert loss == pytest.approx(sum(sums) / n_targets, abs=1e-5)
    with pytest.raises(ConfigError, match="drop --mode rnn"):
        evaluated("--mode", "rnn")


def test_who_reads_rows_of_ids_as_text_is_told_what_is_there(write):
    with pytest.raises(DataError, match=r"got the keys 'ids' \(list of 8\), 'learned'") as error:
        list(read_documents(write(song(2))))
    assert "jq" not in str(error.value)
