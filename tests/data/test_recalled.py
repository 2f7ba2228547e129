"""What a corpus recalls is the definition's answer at each token, in memory and on disk, and no other file is taken."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heron import tokenizer
from heron.data import binidx, mapped, recalled
from heron.data.binidx import open_binidx
from heron.data.prepare import prepare
from heron.data.recalled import Rules, answers, path_of, read, write
from heron.errors import CheckpointError, ConfigError, DataError
from heron.ops.rosa import memory
from heron.ops.rosa.memory import TokenStream

RULES = Rules(max_match=5, n_matches=2)


def definition(ids, rules):
    """(T, K, 2): of the latest matches of each length those with different followers, the longest first."""

    def shared(i, j):
        n = 0
        while n < min(rules.max_match, j + 1) and ids[i - n] == ids[j - n] and not (n and ids[i - n] == rules.end):
            n += 1
        return n

    rows = []
    for i in range(len(ids)):
        nearest = range(i - 1, -1 if rules.window is None else max(-1, i - rules.window - 1), -1)
        latest = {}  # of each length, where it ends last
        for j in nearest:
            for length in range(shared(i, j), 0, -1):
                latest.setdefault(length, j)
        row = {}
        for length in sorted(latest, reverse=True):
            row.setdefault(ids[latest[length] + 1], shared(i, latest[length]))
        rows.append(([*row.items()] + [(0, 0)] * rules.n_matches)[: rules.n_matches])
    return torch.tensor(rows, dtype=torch.int64).view(len(ids), rules.n_matches, 2)


def whole(found):
    return found.at(np.array([0]), len(found))[0]


@st.composite
def streams(draw):
    alphabet = draw(st.integers(1, 5))
    part = draw(st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=50))
    return (part * draw(st.integers(1, 10)))[:50]


@settings(max_examples=150, deadline=None)
@given(
    ids=streams(),
    rules=st.builds(
        Rules, st.integers(1, 20), st.integers(1, 3), st.none() | st.integers(1, 30), st.none() | st.just(0)
    ),
    piece=st.integers(1, 60),
)
def test_answers_are_those_of_the_definition_in_any_pieces(ids, rules, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recalled, "PIECE", piece)
        found = answers(np.array(ids, dtype=np.uint16), rules)
    assert torch.equal(whole(found), definition(ids, rules))


@pytest.fixture
def ids():
    """Text-like: repeats of pieces, documents that end with 0."""
    rng = np.random.default_rng(0)
    words = [rng.integers(1, 60_000, rng.integers(1, 9)) for _ in range(40)]
    documents = [np.concatenate([*(words[i] for i in rng.integers(0, 40, 30)), [0]]) for _ in range(20)]
    return [document.astype(np.uint16) for document in documents]


@pytest.fixture
def prefix(tmp_path, ids):
    binidx.write(tmp_path / "data", ids, 65536)
    return tmp_path / "data"


@pytest.mark.parametrize("rules", [RULES, Rules(64, 3, 100, 0), Rules(300, 1)])
def test_a_file_gives_what_memory_gives(prefix, ids, rules, monkeypatch):
    monkeypatch.setattr(recalled, "PIECE", 1000)
    tokens = np.concatenate(ids)
    assert write(prefix, rules) == path_of(prefix) == prefix.with_suffix(".recalled")
    found, wanted = read(prefix, open_binidx(prefix).tokens, rules), answers(tokens, rules)
    assert len(found) == len(tokens)
    assert torch.equal(whole(found), whole(wanted))
    src, length = TokenStream(rules.max_match, rules.window, rules.end).read(
        torch.tensor(tokens.astype(int)), rules.n_matches
    )
    followers = torch.where(src < 0, 0, torch.tensor(tokens.astype(int))[src + 1])
    assert torch.equal(whole(found), torch.stack((followers, length), dim=-1))
    bytes_a_match = 3 if rules.max_match < 256 else 4
    assert found.records.nbytes == len(tokens) * rules.n_matches * bytes_a_match
    assert f"{rules.n_matches * bytes_a_match} bytes a token; {rules}" in recalled.describe(prefix, verify=True)


def test_windows_of_it_begin_anywhere_and_a_slice_is_that_of_the_tokens(prefix):
    write(prefix, RULES)
    found = read(prefix, open_binidx(prefix).tokens, RULES)
    every, starts = whole(found), np.array([700, 3, 41])
    windows = found.at(starts, 16)
    assert (windows.shape, windows.dtype) == ((3, 16, 2, 2), torch.int64)
    for window, start in zip(windows, starts, strict=True):
        assert torch.equal(window, every[start : start + 16])
    assert torch.equal(found[100:].at(np.array([5]), 8)[0], every[105:113])


def test_ids_beyond_uint16_take_four_bytes(tmp_path):
    tokens = np.array([70_000, 5, 70_000, 5, 9], dtype=np.int32)
    found = answers(tokens, Rules(64, 1))
    assert whole(found)[:, 0].tolist() == [[0, 0], [0, 0], [5, 1], [70_000, 2], [0, 0]]
    assert found.records.itemsize == 5


def leaks(tokens, rules):
    """Whether an answer changes when the token behind its own does."""
    honest = whole(answers(tokens, rules))
    for at in range(1, len(tokens)):
        changed = tokens.copy()
        changed[at:] ^= 1
        if not torch.equal(whole(answers(changed, rules))[:at], honest[:at]):
            return True
    return False


@pytest.mark.parametrize("rules", [RULES, Rules(64, 3, 7, 0)])
def test_answers_depend_on_their_token_and_those_before_and_planted_leaks_are_seen(monkeypatch, rules):
    tokens = np.random.default_rng(0).integers(0, 3, 120).astype(np.uint16)
    assert not leaks(tokens, rules)
    recall_honestly = TokenStream.recall

    def one_token_ahead(stream, piece, n_found):
        return recall_honestly(stream, torch.cat((piece[1:], piece[:1])), n_found)

    def follower_of_the_follower(stream, piece, n_found):
        followers, length, src = recall_honestly(stream, piece, n_found)
        return torch.where(src < 0, followers, piece[(src + 2).clamp(max=len(piece) - 1)]), length, src

    for planted in (one_token_ahead, follower_of_the_follower):
        monkeypatch.setattr(TokenStream, "recall", planted)
        assert leaks(tokens, rules), planted


def test_the_form_without_a_compiler_gives_the_same(ids, monkeypatch):
    tokens = np.concatenate(ids)
    wanted = whole(answers(tokens, RULES))
    monkeypatch.setattr(memory, "stream_choice", lambda: memory._choice.Choice("torch", "there is no compiler"))
    monkeypatch.setattr(recalled, "PIECE", 100)
    assert torch.equal(whole(answers(tokens, RULES)), wanted)


def test_no_match_crosses_the_end_of_a_document_where_that_is_off_and_a_planted_one_is_seen():
    tokens = np.array([1, 2, 0, 3, 4, 9, 1, 2, 0, 3, 4], dtype=np.uint16)

    def longest(rules):
        return whole(answers(tokens, rules))[-1, 0].tolist()

    assert longest(Rules(64, 1, end=0)) == [9, 2]  # 3 4, which begin a document
    assert longest(Rules(64, 1)) == [9, 5]


def test_the_end_comes_from_the_tokenizer():
    assert recalled.end_of(tokenizer.load("bytes"), across_documents=True) is None
    assert recalled.end_of(tokenizer.load("integers:9:4"), across_documents=False) == 4
    with pytest.raises(ConfigError, match="integers:9 no id ends a document; --eod names one"):
        recalled.end_of(tokenizer.load("integers:9"), across_documents=False)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dict(max_match=0), "max_match: wanted a whole number from 1 to 65535, got 0"),
        (dict(max_match=None), "max_match"),
        (dict(n_matches=0), "n_matches: wanted a whole number from 1 to 255, got 0"),
        (dict(window=0), "window: wanted"),
    ],
)
def test_a_number_out_of_its_range_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        Rules(**wrong)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [Rules(6, 2), Rules(5, 3), Rules(5, 2, 100), Rules(5, 2, None, 0)],
)
def test_other_rules_are_refused_with_what_to_type(prefix, other):
    write(prefix, RULES)
    with pytest.raises(DataError) as refusal:
        read(prefix, open_binidx(prefix).tokens, other)
    assert f"was made with {RULES}" in str(refusal.value)
    assert f"--memory --overwrite {other}" in str(refusal.value)


@pytest.mark.parametrize("position", [0, -1, None])
def test_other_tokens_are_refused(prefix, ids, position):
    write(prefix, RULES)
    if position is None:
        ids = ids[:-1]
    else:
        ids[position][position] ^= 1
    binidx.write(prefix.with_name("other"), ids, 65536)
    os.replace(path_of(prefix), path_of(prefix.with_name("other")))
    with pytest.raises(DataError, match="made of other tokens"):
        read(prefix.with_name("other"), open_binidx(prefix.with_name("other")).tokens, RULES)


def test_a_missing_a_foreign_and_a_damaged_file_are_refused(prefix):
    tokens = open_binidx(prefix).tokens
    with pytest.raises(DataError, match=r"recalled: no such file; type heron prepare .*data --memory"):
        read(prefix, tokens, RULES)
    whole_file = write(prefix, RULES).read_bytes()
    for content, told in (
        (b"", "is no file of recalled tokens"),
        (b"something else" * 100, "is no file of recalled tokens"),
        (whole_file[:40], "cut short, to 40 bytes"),
        (whole_file[:-1], "cut short, or its head is damaged"),
        (whole_file + b"x", "longer than it was written"),
        (whole_file[:12] + b"\2" + whole_file[13:], "wanted version 1 .* got 2"),
        (whole_file[:-9] + b"?" + whole_file[-8:], "its header is not what its sha256 says"),
        (whole_file[:40] + b"?" + whole_file[41:], "its header is not what its sha256 says"),
    ):
        path_of(prefix).write_bytes(content)
        with pytest.raises(DataError, match=told):
            read(prefix, tokens, RULES)
    path_of(prefix).write_bytes(whole_file[:70] + bytes([whole_file[70] ^ 1]) + whole_file[71:])
    read(prefix, tokens, RULES)
    with pytest.raises(DataError, match="its arrays are not what their sha256 says"):
        recalled.describe(prefix, verify=True)


def test_what_is_there_is_replaced_only_if_asked_for_and_ours(prefix, monkeypatch):
    before = write(prefix, RULES).read_bytes()
    with pytest.raises(DataError, match="exists; allow overwriting"):
        write(prefix, Rules(7))
    monkeypatch.setattr(mapped.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        write(prefix, Rules(7), overwrite=True)
    monkeypatch.undo()
    assert path_of(prefix).read_bytes() == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.bin", "data.idx", "data.recalled"]
    write(prefix, Rules(7), overwrite=True)
    read(prefix, open_binidx(prefix).tokens, Rules(7))
    path_of(prefix).write_text("mine")
    with pytest.raises(CheckpointError, match="was not written by this command"):
        write(prefix, RULES, overwrite=True)


# -- prepare --------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the cat sat still. " * 20)
    return str(tmp_path / "text.txt")


def start(text, out, **options):
    return prepare([text], str(out), "bytes", 1, **options)


def test_prepare_writes_it_beside_the_pair_and_without_it_takes_an_old_one_away(tmp_path, text):
    stats = start(text, tmp_path / "data", memory=RULES)
    assert str(stats).endswith(f"data.recalled: {stats.tokens:,} tokens, 6 bytes a token; {RULES}")
    tokens = open_binidx(tmp_path / "data").tokens
    assert torch.equal(whole(read(tmp_path / "data", tokens, RULES)), whole(answers(tokens, RULES)))
    with pytest.raises(DataError, match="exists"):
        start(text, tmp_path / "data", memory=RULES)
    start(text, tmp_path / "data", overwrite=True)
    assert not path_of(tmp_path / "data").exists()


@pytest.mark.parametrize("pieces", [0, 3])
def test_prepare_goes_on_where_finding_was_interrupted(tmp_path, text, monkeypatch, pieces):
    start(text, tmp_path / "whole", memory=RULES)
    left, recall_honestly = [pieces], TokenStream.recall

    def interrupted(*arguments):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return recall_honestly(*arguments)

    monkeypatch.setattr(TokenStream, "recall", interrupted)
    monkeypatch.setattr(recalled, "PIECE", 100)
    with pytest.raises(KeyboardInterrupt):
        start(text, tmp_path / "data", memory=RULES)
    monkeypatch.undo()
    assert all(path.suffix == ".part" for path in tmp_path.glob("data*"))
    start(text, tmp_path / "data", memory=RULES)
    for suffix in (".bin", ".idx", ".recalled"):
        assert (tmp_path / f"data{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_is_a_data_error_and_the_next_call_goes_on(tmp_path, text, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recalled, "write_to", full)
    with pytest.raises(DataError, match=r"data.recalled.part: cannot be written: .*No space left"):
        start(text, tmp_path / "data", memory=RULES)
    monkeypatch.undo()
    assert start(text, tmp_path / "data", memory=RULES).resumed_at == 1


def test_an_interrupted_run_with_other_rules_starts_over(tmp_path, text, monkeypatch):
    monkeypatch.setattr(TokenStream, "recall", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(text, tmp_path / "data", memory=RULES)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="other inputs or settings; starting over"):
        start(text, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.glob("data*")) == ["data.bin", "data.idx"]
