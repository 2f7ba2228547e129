"""Conversations: what the model reads, what it remembers, and a terminal that may send and show anything."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import heron
from heron import cli, tokenizer
from heron.errors import CheckpointError, ConfigError
from heron.generation import Engine, Sampling, Snapshot, chat
from heron.generation.chat import Chat, cleaned, printable, printable_so_far
from heron.generation.prefill import PromptReader
from tests.tokenizer.tokenizer_kinds import load

LETTERS = tokenizer.load("bytes")
SAMPLING = Sampling(top_p=0.95)


@pytest.fixture
def engine(random_model):
    return Engine(random_model(vocab_size=256), LETTERS)


def talk(engine, **settings):
    return Chat(engine, **{"sampling": SAMPLING, "max_tokens": 12, "seed": 3, **settings})


def said(pieces):
    return "".join(pieces)


def alone(engine, text, seed):
    """What the model says after `text`, read from nothing."""
    return heron.generate(engine.model, LETTERS, text, 12, top_p=0.95, seed=seed, stop=chat.STOP)


def test_the_model_reads_the_template(engine):
    one = talk(engine, system=" Be\r\n\r\n\nkind. ")
    first = said(one.say("  hello\n\n\nthere\x1b \n"))
    start = "System: Be\nkind.\n\nUser: hello\nthere\n\nAssistant:"
    assert first == alone(engine, start, 3)
    assert first
    second = said(one.say("more"))
    turn = f"{start}{first.rstrip()}\n\nUser: more\n\nAssistant:"
    assert second == alone(engine, turn, 4)
    assert said(talk(engine).say("more")) == alone(engine, "User: more\n\nAssistant:", 3)


@pytest.mark.parametrize(("think", "opening"), [("", ""), ("on", " <think"), ("off", " <think>\n</think")])
def test_thinking_opens_the_answer(engine, think, opening):
    assert said(talk(engine, think=think).say("a")) == alone(engine, f"User: a\n\nAssistant:{opening}", 3)


def test_retry_answers_as_if_nothing_had_been_said(engine):
    one = talk(engine)
    said(one.say("first"))
    answer = said(one.say("second"))
    again = said(one.retry())
    assert again != answer
    other = talk(engine, seed=3)
    said(other.say("first"))
    other._seed = 5
    assert said(other.say("second")) == again
    assert said(one.say("third")) == said(other.say("third"))
    with pytest.raises(ConfigError, match="no message"):
        talk(engine).retry()


def test_a_saved_conversation_goes_on_as_one_that_never_stopped(engine, tmp_path):
    one = talk(engine)
    said(one.say("first"))
    one.save(tmp_path / "talk.safetensors")
    want = said(one.say("second"))
    two = talk(engine, seed=4)
    two.load(tmp_path / "talk.safetensors")
    assert said(two.say("second")) == want
    two.reset()
    assert said(two.say("second")) != want
    with pytest.raises(CheckpointError, match="nowhere"):
        two.load(tmp_path / "nowhere")


def test_an_answer_cut_short_is_remembered_as_far_as_it_went(engine):
    one = talk(engine)
    pieces = one.say("first")
    part = next(pieces)
    pieces.close()
    then = f"User: first\n\nAssistant:{part.rstrip()}\n\nUser: go on\n\nAssistant:"
    assert said(one.say("go on")) == alone(engine, then, 4)


def test_space_at_the_end_of_an_answer_is_not_remembered(engine):
    one, other = talk(engine), talk(engine)
    for each, end in ((one, ""), (other, " \n\n ")):
        said(each.say("first"))
        each._answer = each._answer.rstrip() + end
    assert said(one.say("second")) == said(other.say("second"))


def test_ids_that_a_file_leaves_to_be_read_are_read(engine, tmp_path):
    start = b"User: a\n\nAssistant: b\n\n"
    engine.save(Snapshot(engine.prefill(start[:-3]), tuple(start[-3:])), tmp_path / "s")
    one = talk(engine)
    one.load(tmp_path / "s")
    first = said(one.say("c"))
    turn = f"{start.decode()}User: c\n\nAssistant:"
    assert first == alone(engine, turn, 3)
    assert said(one.say("d")) == alone(engine, f"{turn}{first.rstrip()}\n\nUser: d\n\nAssistant:", 4)


def test_what_cannot_be_said_changes_nothing(engine):
    one = talk(engine)
    said(one.say("first"))
    for bad in ("", " \n \x00"):
        with pytest.raises(ConfigError, match="empty"):
            one.say(bad)
    other = talk(engine)
    said(other.say("first"))
    assert said(one.say("a")) == said(other.say("a"))
    with pytest.raises(ConfigError, match="think"):
        talk(engine, think="hard")


def test_no_character_reaches_the_terminal_that_could_act_on_it():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), 0xE0001]))
    shown = printable(every)
    assert len(shown) == len(every)
    for c in shown:
        assert c in "\n\t" or ord(c) >= 0x20
        assert not 0x7F <= ord(c) <= 0x9F
        assert c not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert printable("\x1b[2J\x07\r\x7f\x9b") == "␛[2J␇␍␡\N{REPLACEMENT CHARACTER}"
    for plain in ("héllo 日本 🙂\n\t", "שלום"):
        assert printable(plain) == plain
        assert cleaned(plain) == plain.strip()


def test_lines_that_end_in_cr_lf_end_as_others_do_however_the_text_comes():
    for cut in range(len(text := "one\r\n\rtwo\r\n")):
        first, held = printable_so_far(text[:cut])
        assert (first + printable(held + text[cut:]), held in ("", "\r")) == ("one\n␍two\n", True)


def test_line_ends_behind_an_answer_are_not_shown():
    out = []
    chat._show((piece for piece in (" Two\r", "\nlines.\r", "\n", "\n\n")), out.append)
    assert "".join(out) == "\nAssistant: Two\nlines.\n"


def conversation(engine, *lines, **settings):
    """Run a session of these lines (an exception is raised as input); what was written."""
    waiting, out = list(lines), []

    def read(prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    chat.run(talk(engine, **settings), read, out.append)
    return "".join(out)


def test_the_commands(engine, tmp_path):
    file = tmp_path / "a file.safetensors"
    out = conversation(
        engine, "hi", f"/save {file}", "/reset", f"/load {file}", "/retry", "/help", "/save", "/reset now", "/lod x",
        f"/load {tmp_path}/none", "", "//slash", "/retry", "/quit", "never",
    )  # fmt: skip
    assert f"saved {file}\n" in out
    assert f"loaded {file}\n" in out
    assert "there is no message to answer again" in out
    assert chat.HELP in out
    assert "/save: wanted a file" in out
    assert "/reset takes nothing" in out
    assert "Did you mean '/load'" in out
    assert "none: no such file" in out
    assert out.count("Assistant:") == 3
    assert not out.endswith("never")
    assert printable(alone(engine, "User: hi\n\nAssistant:", 3)) in out


@pytest.mark.parametrize("end", [(), (KeyboardInterrupt(),), (EOFError(),)])
def test_the_end_of_the_input_ends_it(engine, end):
    assert conversation(engine, *end) == "\n"


def test_ctrl_c_cuts_the_answer_and_not_the_conversation(engine):
    out, waiting = [], ["hi", "again"]

    def write(text):
        out.append(text)
        if len(out) == 3:
            raise KeyboardInterrupt

    chat.run(talk(engine), lambda prompt: waiting.pop(0) if waiting else "/quit", write)
    assert " [cut short]" in out
    assert out.count("\nAssistant:") == 2


@pytest.fixture(scope="module")
def weights(random_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "x.pth"
    heron.save(random_model(vocab_size=256), path)
    return path


def test_any_bytes_may_come_from_the_terminal(capsys, weights, monkeypatch):
    lines = [b"hello", b"\xff\xfe\x80half \xe6\x97", b"\x00\x1b[A", b"/\xff", b"/retry \xf0", b"x" * 3000, b"last \xc3"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="ascii"))
    code, out, err = run(capsys, "chat", weights, "--max_tokens", 5)
    assert (code, err) == (0, "")
    assert out.count("Assistant:") == 5
    assert "no command" in out
    assert "/retry takes nothing" in out
    assert all(c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F) for c in out)


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_chat_takes_the_flags(capsys, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hi\n/save {tmp_path}/s\n"))
    words = ("chat", weights, "--max_tokens", 7, "--temperature", 0, "--system", "calm", "--think", "off")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    model = heron.load(weights)
    want = heron.generate(
        model, LETTERS, "System: calm\n\nUser: hi\n\nAssistant: <think>\n</think", 7,
        temperature=0, presence_penalty=0.3, frequency_penalty=0.3, stop=chat.STOP,
    )  # fmt: skip
    assert printable(want) in out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(capsys, *words, "--load", tmp_path / "s")[0] == 0
    code, _, err = run(capsys, *words, "--load", weights)
    assert code == 1
    assert "not a readable state file" in err


def test_generate_shows_the_likeliest_tokens_and_the_trials(capsys, weights):
    words = ("generate", weights, "--prompt", "Line", "--max_tokens", 9, "--top_p", 1, "--seed", 4)
    code, out, err = run(capsys, *words, "--probs", 10, "--trials", 3)
    assert (code, err) == (0, "")
    model = heron.load(weights)
    with torch.no_grad():
        probs = model(torch.tensor([list(b"Line")]))[0][0, -1].softmax(0)
    lines = out.splitlines()
    for line, p, token in zip(lines[1:11], *(x.tolist() for x in probs.topk(10)), strict=True):
        text = repr(chr(token)) if token < 128 else rf"'\x{token:02x}'"
        assert line == f"{100 * p:8.3f} %  {token:>6}  {text}"
    for trial in range(3):
        text = heron.generate(model, LETTERS, "Line", 9, top_p=1.0, seed=4 + trial)
        assert f"--- trial {trial + 1}, seed {4 + trial} ---\nLine{text}\n(" in out.replace("\r\n", "\n")
    assert out.count(" tokens/s)") == 3
    for flag, value in (("--probs", -1), ("--trials", 0), ("--dtype", "int8"), ("--tables", "cloud")):
        code, out, err = run(capsys, *words, flag, value)
        assert code == 1
        assert flag.strip("-") in err


@pytest.mark.parametrize("flags", [("--tables", "host"), ("--tables", "disk"), ("--dtype", "fp32")])
def test_where_the_tables_are_changes_no_letter(capsys, weights, flags):
    words = ("generate", weights, "--prompt", "Line", "--max_tokens", 9)
    assert run(capsys, *words, *flags)[1] == run(capsys, *words)[1]


def test_half_precision_runs(capsys, weights):
    for dtype in ("bf16", "fp16"):
        assert run(capsys, "generate", weights, "--prompt", "Line", "--max_tokens", 3, "--dtype", dtype)[0] == 0


def test_an_interrupt_while_the_turns_so_far_are_read_loses_nothing(engine, monkeypatch):
    prefill, calls = Engine.prefill, []

    def interrupted(self, ids, state=None):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prefill(self, ids, state)

    monkeypatch.setattr(Engine, "prefill", interrupted)
    out = conversation(engine, "one", "two", "three", "/quit")
    assert "[cut short]" in out
    assert out.count("Assistant:") == 2


@pytest.mark.parametrize("kind", ["byte level", "llama", "metaspace", "world"])
def test_turns_are_read_as_the_conversation_encoded_whole(kind, random_model, tmp_path, monkeypatch):
    """A byte-level BPE writes two newlines at the end of a text as one id, others put a space before each text."""
    tokens = load(kind)
    engine = Engine(random_model(vocab_size=tokens.vocab_size, n_layer=1), tokens)
    piece_of, read = PromptReader.read, []

    def noted(self, ids, state=None):
        read.append((len(read) and state is not None, list(ids)))
        return piece_of(self, ids, state)

    one = Chat(engine, Sampling(top_k=1), 6)
    monkeypatch.setattr(PromptReader, "read", noted)
    text, settled = "", []
    for message in ("the heron waits", "is it there?", "where"):
        read.clear()
        assert said(one.say(message)) == one._answer
        turn = f"User: {message}\n\nAssistant:"
        *before, (_, prompt) = read  # what was settled, if anything, and the prompt but for its last id
        settled += [i for _, ids in before for i in ids]
        whole = tokens.encode(text + turn)
        assert [*settled, *prompt] == whole[:-1]
        one._answer = " it waits"  # of a model that says words
        text += f"{turn} it waits\n\n"
    one.save(tmp_path / "s")
    two = Chat(engine, Sampling(top_k=1), 6)
    two.load(tmp_path / "s")
    read.clear()
    said(two.say("the river"))
    said(one.say("the river"))
    assert read[0][1] == read[-1][1]  # goes on from the file as from the memory
    assert tokens.decode(read[0][1]).endswith("Assistant")


def test_numbers_cannot_talk(random_model):
    with pytest.raises(ConfigError, match="integers:37 has numbers only; use heron generate"):
        Chat(Engine(random_model(), tokenizer.load("integers:37")))


# -- prompts and ids at the command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(random_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "n.pth"
    heron.save(random_model(vocab_size=100), path)
    return path


def test_numbers_are_written_apart(capsys, numbers):
    words = ("generate", numbers, "--tokenizer", "integers:100", "--max_tokens", 12, "--top_p", 1)
    code, out, err = run(capsys, *words, "--prompt", "4 32 15")
    assert (code, err) == (0, "")
    ids = list(map(int, out.split()))
    assert (ids[:3], len(ids)) == ([4, 32, 15], 15)
    assert out == " ".join(map(str, ids)) + "\n"
    stop = ids[9]
    until = ids[: ids.index(stop, 3)]
    for flag in ("--stop", "--stop_ids"):
        assert run(capsys, *words, "--prompt", "4 32 15", flag, stop)[1] == " ".join(map(str, until)) + "\n"
    tried = run(capsys, *words, "--prompt", "4 32 15", "--trials", 2)[1]
    assert out in tried  # the same behind a prompt that is read once for all


def test_ids_in_and_ids_out(capsys, weights, numbers):
    words = ("generate", weights, "--max_tokens", 9, "--top_p", 1)
    text = run(capsys, *words, "--prompt", "Line")[1].removesuffix("\n")
    ids = " ".join(str(byte) for byte in b"Line")
    code, out, err = run(capsys, *words, "--ids", "--prompt", ids)
    assert (code, err) == (0, "")
    new = list(map(int, out.split()))
    assert bytes(new).decode(errors="replace") == text
    for written in (ids.replace(" ", ","), str(ids.split()).replace("'", ""), f"\n{ids}  "):
        assert run(capsys, *words, "--ids", "--prompt", written)[1] == out
    stopped = run(capsys, *words, "--ids", "--prompt", ids, "--stop_ids", f"{new[6]},255")[1]
    assert list(map(int, stopped.split())) == new[: new.index(new[6], 4)]
    empty = run(capsys, *words, "--ids")[1]
    assert list(map(int, empty.split()))
    assert not empty.startswith(" ")
    glued = run(
        capsys, "generate", numbers, "--tokenizer", "integers:100", "--max_tokens", 3, "--ids", "--prompt", "1,2"
    )
    assert len(glued[1].split()) == 5
    of_itself = run(capsys, "generate", numbers, "--max_tokens", 3, "--ids", "--prompt", "1,2")  # no tokenizer needed
    assert of_itself == glued
    for more, exit_code, cause in (
        (("--prompt", "256"), 1, "0 to 255"),
        (("--prompt", "one"), 1, "--ids: wanted token ids"),
        (("--prompt", "9" * 5000), 1, "--ids: wanted token ids"),
        (("--prompt", "-1"), 1, "--ids: wanted token ids"),
        (("--prompt", "1", "--stop_ids", ""), 2, "wanted token ids"),
        (("--prompt", "1", "--stop", "x"), 2, "--stop_ids"),
        (("--prompt", "1", "--stop_ids", "x"), 2, "wanted token ids"),
        (("--prompt", "1", "--stop_ids", "300"), 1, "stop_ids"),
    ):
        code, out, err = _outcome(capsys, *words, "--ids", *more)
        assert (code, out) == (exit_code, "")
        assert cause in err


def _outcome(capsys, *words):
    try:
        return run(capsys, *words)
    except SystemExit as end:
        return end.code, *capsys.readouterr()


def test_a_prompt_comes_from_a_file_or_the_input(capsys, weights, tmp_path, monkeypatch):
    words = ("generate", weights, "--max_tokens", 5)
    want = run(capsys, *words, "--prompt", " two\n lines é")[1]
    (tmp_path / "p.txt").write_bytes(" two\n lines é\r\n".encode())
    assert run(capsys, *words, "--prompt_file", tmp_path / "p.txt")[1] == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(" two\n lines é\n".encode()), "ascii"))
    assert run(capsys, *words, "--prompt_file", "-")[1] == want
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf two\n lines \xc3\xa9\n\n")
    assert run(capsys, *words, "--prompt_file", tmp_path / "p.txt")[1].startswith(" two\n lines é\n")
    (tmp_path / "p.txt").write_bytes(b"ab\xff")
    for more, exit_code, cause in (
        ((tmp_path / "p.txt",), 1, "0xff at byte 2"),
        ((tmp_path / "none",), 1, "none"),
        ((tmp_path / "p.txt", "--prompt", "x"), 2, "not both"),
    ):
        code, _, err = _outcome(capsys, *words, "--prompt_file", *more)
        assert code == exit_code
        assert cause in err
    monkeypatch.setattr(sys, "stdin", None)
    assert run(capsys, *words, "--prompt_file", "-")[0] == 1
