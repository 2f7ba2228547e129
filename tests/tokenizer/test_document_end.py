"""The end of a document under a tokenizer.json: found in the files beside it, by its name, or named by the user."""

import json
import shutil
import warnings

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from heron import cli, tokenizer
from heron.commands.sources import tokenizer_of
from heron.config import TrainConfig
from heron.data.binidx import open_binidx
from heron.data.corpora import Reading
from heron.data.encode import encode_document
from heron.data.loader import load_corpus
from heron.data.prepare import prepare
from heron.errors import CheckpointError, ConfigError, DataError
from heron.train import Trainer
from heron.train import loop as train

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(path, special=("<|endoftext|>",), normalizer=None, prefix_space=False):
    """A byte-level tokenizer of 256 ids without merges, and `special` tokens behind them."""
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens(list(special))
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))
    return str(path)


def beside(path, **files):
    for name, content in files.items():
        with open(str(path).replace("tokenizer.json", f"{name}.json"), "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))


SPECIAL = ("<pad>", "<fin>", "<turn>")  # ids 256, 257, 258


@pytest.fixture
def path(tmp_path):
    return byte_level(tmp_path / "tok" / "tokenizer.json", SPECIAL)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        ({"tokenizer_config": {"eos_token": "<fin>"}}, 257),
        ({"tokenizer_config": {"eos_token": {"content": "<turn>", "lstrip": False}}}, 258),
        ({"special_tokens_map": {"eos_token": "<fin>"}}, 257),
        ({"special_tokens_map": {"eos_token": {"content": "<fin>"}}}, 257),
        ({"generation_config": {"eos_token_id": 258}}, 258),
        ({"generation_config": {"eos_token_id": [257, 258]}}, 257),
        ({"config": {"eos_token_id": 257}}, 257),
        ({"config": {"eos_token_id": [258]}}, 258),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 257}}, 257),
        ({"tokenizer_config": {"eos_token": "<gone>"}, "generation_config": {"eos_token_id": 257}}, 257),
        ({"config": {"eos_token_id": 50256}}, None),
        ({"config": {"eos_token_id": True}}, None),
        ({"config": {"eos_token_id": "257"}}, None),
        ({"config": []}, None),
        ({"tokenizer_config": '\ufeff{"eos_token": "<fin>", "x": NaN}'}, 257),
        ({"tokenizer_config": {"eos_token": "<fin>"}, "generation_config": {"eos_token_id": [258, 257]}}, 257),
    ],
    ids=str,
)
def test_files_beside_it_say_the_end(path, files, wanted):
    beside(path, **files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.load(path).eod == wanted


def test_the_end_of_a_turn_is_told_from_the_usual_end_of_a_document(tmp_path):
    path = byte_level(tmp_path / "tokenizer.json", ("<|endoftext|>", "<|im_end|>"))
    beside(path, tokenizer_config={"eos_token": "<|im_end|>"})
    assert str(tokenizer.load(path).end).endswith("; --eod '<|endoftext|>' would be the other end that it has")
    assert tokenizer.load(path, "<|endoftext|>").eod == 256
    with pytest.raises(ConfigError, match="is a folder; name its file"):
        tokenizer.load(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        (
            {"tokenizer_config": {"eos_token": "<fin>"}, "config": {"eos_token_id": 258}},
            257,
            r"ends with '<fin>' \(id 257\), as tokenizer_config.json says; config.json says '<turn>' \(id 258\). --eod",
        ),
        (
            {"generation_config": {"eos_token_id": [258, 256]}, "config": {"eos_token_id": 257}},
            258,
            "as generation_config.json says; config.json says '<fin>'",
        ),
        ({"tokenizer_config": "{", "config": {"eos_token_id": 257}}, 257, "tokenizer_config.json: cannot be read"),
    ],
)
def test_files_that_contradict_each_other_are_told(path, files, wanted, message):
    beside(path, **files)
    with pytest.warns(UserWarning, match=message):
        assert tokenizer.load(path).eod == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.load(path, eod="256").eod == 256  # who names it need not be told


@pytest.mark.parametrize(
    ("special", "wanted"),
    [
        (("<s>", "<|end_of_text|>"), "<|end_of_text|>"),
        (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>"),
        (("<EOD>", "[PAD]"), "<EOD>"),
        (("</s>", "<|endoftext|>"), "<|endoftext|>"),
        (("<|im_end|>", "<|eot_id|>"), None),
    ],
)
def test_a_name_tells_the_end_where_no_file_does(tmp_path, special, wanted):
    loaded = tokenizer.load(byte_level(tmp_path / "tokenizer.json", special))
    assert loaded.eod == (None if wanted is None else 256 + special.index(wanted))


@pytest.mark.parametrize(
    ("eod", "wanted"), [("<turn>", 258), ("256", 256), ("65", 65), ("A", LETTERS.index("A")), ("1", 1)]
)
def test_eod_names_a_token_or_an_id(path, eod, wanted):
    beside(path, tokenizer_config={"eos_token": "<fin>"})
    assert tokenizer.load(path, eod).eod == wanted


@pytest.mark.parametrize(
    ("spec", "eod", "message"),
    [
        (None, "<fni>", "no such token. Did you mean '<fin>'.*special tokens: '<pad>'"),
        (None, "300", "no such id; wanted one of 0 to 258"),
        ("world", "5", "ends with id 0"),
        ("bytes", "<fin>", "ends with id 0"),
        ("integers:9", "9", "below V = 9"),
        ("integers:9:3", "4", "has the end of document 3, eod is '4'"),
        ("integers:9", "x", "wanted integers:V or integers:V:E"),
    ],
)
def test_an_end_that_is_not_there(path, spec, eod, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer.load(spec or path, eod)


def test_ends_of_the_other_tokenizers():
    assert tokenizer.load("bytes", "0").eod == tokenizer.load("world", "0").eod == 0
    named = tokenizer.load("integers:9", "3")
    assert (named.spec, named.eod) == ("integers:9:3", 3)
    assert tokenizer.load("integers:9:3", "3").eod == 3


# -- documents -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd", "ef")))
    return str(tmp_path / "a.jsonl")


def test_an_end_inside_a_text_says_how_to_cut_there(path):
    ended = tokenizer.load(path, "<fin>")
    with pytest.raises(DataError, match="id 257, stands inside the text .*; --split_at '<fin>' ends a document there"):
        encode_document(ended, "here", "ab<fin>cd", 300)


def test_prepare_ends_each_document_and_says_by_what(path, rows, tmp_path):
    beside(path, generation_config={"eos_token_id": [258]})
    for workers, eod, wanted in [(1, None, 258), (1, "<pad>", 256), (2, "257", 257)]:
        stats = prepare([rows], str(tmp_path / "o"), path, workers, overwrite=True, eod=eod)
        tokens = open_binidx(tmp_path / "o").tokens
        assert np.flatnonzero(tokens == wanted).tolist() == [2, 5, 8]
        reason = "as --eod says" if eod else "as generation_config.json beside the tokenizer says"
        assert f"each document ends with '{SPECIAL[wanted - 256]}' (id {wanted}), {reason}" in str(stats)


@pytest.mark.parametrize("spec", ["json", "integers:200"])
def test_documents_that_would_run_together_are_told(path, tmp_path, spec):
    text = "1 2" if spec == "integers:200" else "ab"
    spec = path if spec == "json" else spec
    source = tmp_path / "b.jsonl"
    source.write_text(json.dumps({"text": text}) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([str(source)], str(tmp_path / "one"), spec, 1)  # a single document needs no end
    source.write_text((json.dumps({"text": text}) + "\n") * 2)
    message = "'<pad>', '<fin>', '<turn>'" if spec == path else "integers:200:E"
    with pytest.warns(UserWarning, match=f"no id ends a document.*{message}"):
        prepare([str(source)], str(tmp_path / "two"), spec, 1)
    with pytest.warns(UserWarning, match="no id ends a document"):
        load_corpus(str(source), tokenizer.load(spec), None, 0.0, 300)


# -- tokenizers that normalize ---------------------------------------------------------------------------------------

NORMALIZING = {
    "NFC": (normalizers.NFC(), "cafe\u0301"),
    "NFKC": (normalizers.NFKC(), "\ufb01ne ①"),
    "lower case": (normalizers.Lowercase(), "Heron"),
    "accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "café"),
    "replaced": (normalizers.Replace("\t", "    "), "a\tb"),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in NORMALIZING), ("NFC", 2)])
def test_texts_that_the_normalizer_changes_pass_where_that_is_allowed(tmp_path, name, workers):
    normalizer, changed = NORMALIZING[name]
    path = byte_level(tmp_path / "tokenizer.json", normalizer=normalizer)
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": changed if i % 5 == 0 else "plain"}) + "\n" for i in range(50)))
    with pytest.raises(DataError, match="line 1: .*does not give the text back.*--allow_normalized"):
        prepare([str(source)], str(tmp_path / "o"), path, 1)
    stats = prepare([str(source)], str(tmp_path / "o"), path, workers, reading=Reading(allow_normalized=True))
    assert (stats.documents, stats.normalized, stats.skipped) == (50, 10, 0)
    assert "10 documents as the tokenizer normalizes them" in str(stats)
    said = []
    load_corpus(str(source), tokenizer.load(path), None, 0.0, 300, Reading(allow_normalized=True), said.append)
    assert said == [f"{source}: 10 of 50 texts as the tokenizer normalizes them"]
    said.clear()
    source = source.with_name("b.txt")
    source.write_text(changed * 50)
    load_corpus(str(source), tokenizer.load(path), None, 0.5, 300, Reading(allow_normalized=True), said.append)
    assert said == [f"{source}: 2 of 2 texts as the tokenizer normalizes them"]


def test_a_space_in_front_passes_and_lost_text_never_does(tmp_path):
    spaced = tokenizer.load(byte_level(tmp_path / "tokenizer.json", prefix_space=True))
    with pytest.raises(DataError, match="here: .*from character 0 on, wanted 'ab', got ' ab'; --allow_normalized"):
        encode_document(spaced, "here", "ab", 300)
    assert spaced.decode(encode_document(spaced, "here", "ab", 300, allow_normalized=True)) == " ab"
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    words.save(str(tmp_path / "words.json"))
    lossy = tokenizer.load(str(tmp_path / "words.json"))
    assert len(encode_document(lossy, "here", "A b", 3, allow_normalized=True)) == 2
    for text in ("a c", "a  b", "a\nb", "ab"):  # an unknown word, and spaces that get lost
        with pytest.raises(DataError, match=r"does not give the text back.*; use one without loss"):
            encode_document(lossy, "here", text, 3, allow_normalized=True)


# -- runs ------------------------------------------------------------------------------------------------------------

TINY = dict(
    model=dict(variant="v7", n_layer=1, n_embd=32, head_size=16, vocab_size=300), ctx_len=8, micro_bsz=2,
    sample_every=0, eval_every=0, save_every=0, keep=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(train, "plot", lambda folders, out: None)


def fit(**settings):
    """Train a tiny run; what it said."""
    said = []
    Trainer(TrainConfig(**{**TINY, **settings}), say=said.append).fit()
    return said


def test_a_run_knows_its_end_wherever_it_is_moved(path, rows, tmp_path):
    beside(path, tokenizer_config={"eos_token": "<fin>", "chat_template": "x"})
    out = tmp_path / "run"
    run = dict(data=rows, val_fraction=0.0, tokenizer=path, out=str(out))
    said = fit(**run, max_steps=1)
    assert "each document ends with '<fin>' (id 257), as tokenizer_config.json beside the tokenizer says" in said
    fit(**run, max_steps=2)  # it goes on
    with pytest.raises(CheckpointError, match="ends documents with '<fin>'.*'<turn>'.*type --eod 257"):
        fit(**run, max_steps=3, eod="<turn>")
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    shutil.rmtree(tmp_path / "tok")
    assert tokenizer_of(str(moved), None, 300).eod == 257
    assert tokenizer_of(str(moved), None, 300, "<pad>").eod == 256


def test_a_run_keeps_the_end_that_was_named(rows, path, tmp_path):
    fit(data=rows, val_fraction=0.0, tokenizer=path, out=str(tmp_path / "a"), max_steps=1, eod="<turn>")
    assert tokenizer_of(str(tmp_path / "a"), None, 300).eod == 258
    (tmp_path / "ids.txt").write_text("1 2 3 " * 20)
    fit(data=str(tmp_path / "ids.txt"), tokenizer="integers:300", eod=7, out=str(tmp_path / "b"), max_steps=1)
    assert tokenizer_of(str(tmp_path / "b"), None, 300).eod == 7
    foreign = tmp_path / "c" / "tokenizer_config.json"
    foreign.parent.mkdir()
    foreign.write_text('{"eos_token": "<fin>"}')
    with pytest.raises(CheckpointError, match=r"c/tokenizer_config\.json: names another end"):
        fit(data=rows, val_fraction=0.0, tokenizer=path, out=str(foreign.parent), max_steps=1, eod="<turn>")
    assert foreign.read_text() == '{"eos_token": "<fin>"}'


def test_a_run_inside_its_data_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("".join(f"Line {i} of my own text.\n" for i in range(60)))
    for out in ("run", ".", "deep/run"):
        run = dict(data=".", tokenizer="bytes", out=out, sample_every=1, sample_tokens=3, log_every=1)
        fit(**run, max_steps=1)
        said = fit(**run, max_steps=2)
        assert not any("not bit-exact because data" in line for line in said), said


def test_a_learned_vocabulary_is_cut_at_the_mark(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(f"Story {i} of the heron.\n" for i in range(40)))
    run = dict(data=str(tmp_path / "a.txt"), tokenizer="bpe:280", max_steps=1)
    with (
        pytest.warns(UserWarning, match="39 times"),
        pytest.raises(DataError, match=r"stands inside the text.*--split_at '<\|endoftext\|>'"),
    ):
        fit(**run, out=str(tmp_path / "a"))
    fit(**run, out=str(tmp_path / "b"), split_at="<|endoftext|>")
    with pytest.raises(ConfigError, match="a learned vocabulary has <|endoftext|> for it"):
        fit(**run, out=str(tmp_path / "c"), eod="</s>")


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_flags(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("print(1)\n")
    (tmp_path / "src" / "b.txt").write_text("no\n")
    (tmp_path / "s.csv").write_text('id,story\n1,"Once, ###twice"\n2,Again\n')
    prepared = ["--workers", "1", "--tokenizer", path, "--eod", "<fin>"]
    assert cli.main(["prepare", "src", "--glob", "*.py", "--out", "a", *prepared]) == 0
    out, err = capsys.readouterr()
    assert "9 bytes of text" in out
    assert err.startswith("heron: src: reads 1 file; passed over: .txt (1)")
    assert cli.main(["prepare", "s.csv", "--column", "story", "--split-at", "###", "--out", "b", *prepared]) == 0
    assert "of 3 documents" in capsys.readouterr().out
    fit(data="b", tokenizer=path, eod="<fin>", out="run", max_steps=1, ctx_len=4)
    evaluated = ["eval", "run", "--data", "s.csv", "--ctx_len", "4", "--device", "cpu"]
    assert cli.main([*evaluated, "--column", "story"]) == 0
    assert "s.csv: 20 tokens" in capsys.readouterr().out
    assert cli.main([*evaluated, "--column", "story", "--split_at", "###"]) == 0
    assert "s.csv: 18 tokens" in capsys.readouterr().out  # without ###, with another end
    assert cli.main(evaluated) == 1
    assert "--column NAME" in capsys.readouterr().err
