"""What users do that can't work: it ends in one sentence, nothing is lost, and no machine is harmed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import heron
from heron import cli
from heron.commands import line_editing
from heron.errors import CheckpointError, ConfigError, DataError, HeronError
from heron.files import new_file, refuse_foreign
from heron.generation import Request, Sampling, Snapshot
from heron.report import scores
from heron.train import memory

TINY = dict(variant="v8", n_layer=1, n_embd=64, vocab_size=256)
NO_FILES = ["/proc/none/talk.pth", "/", "..", "x" * 300 + ".pth", "a\0b.pth"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return heron.RWKV(TINY)


@pytest.fixture(scope="module")
def engine(model):
    return heron.Engine(model, heron.tokenizer.load("bytes"))


def sh(command):
    """A command line in which $H is `heron`; what it prints, in two parts. Nothing of PyTorch is imported: 0.2 s."""
    environment = {**os.environ, "H": f"{sys.executable} -m heron"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env=environment, capture_output=True, text=True
    )


# -- streams and signals --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="the shell of POSIX")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("$H --help | head -1", 0),
        ("$H train --help >&-", 0),
        ("$H --version <&- >&- 2>&-", 0),
        ("$H no-such-verb 2>&-", 2),
    ],
)
def test_streams_that_are_closed_make_no_noise(command, code):
    done = sh(command)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_file_of_ours_never_gets_the_place_of_a_closed_stream(tmp_path):
    code = (
        "from heron.commands import streams; streams.open_closed(); file = open('file', 'w'); print('lost'); "
        "file.write('kept'); file.close(); streams.flush()"
    )
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" >&- 2>&-'], cwd=tmp_path, env=_environment())
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(heron.__file__).parents[1])}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_while_modules_are_imported_is_one_line():
    code = (
        "import os, signal, sys, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell ignore it
        "from heron import __main__\n"
        "class Importer:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'heron.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Importer())\n"
        "__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "heron: interrupted\n")


def test_once_work_begins_an_interrupt_is_an_exception_again(monkeypatch, tmp_path, capsys):
    from heron import __main__

    monkeypatch.setattr(sys, "argv", ["heron", "info", str(tmp_path / "none.pth")])
    before = signal.getsignal(signal.SIGINT)
    assert __main__.main() == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert "none.pth: no such file" in capsys.readouterr().err


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NO_FILES, ids=repr)
def test_what_no_file_can_be_is_refused_by_everything_that_writes(path, model, engine, tmp_path):
    with pytest.raises(CheckpointError):
        heron.save(model, path)
    with pytest.raises(CheckpointError):
        engine.save(Snapshot(None), path)
    with pytest.raises(CheckpointError):
        scores.write([{"model": "a"}], Path(path))


@pytest.mark.skipif(os.name == "nt", reason="pipes and /proc of POSIX")
def test_a_device_a_pipe_or_a_stream_is_never_replaced(tmp_path, engine):
    pipe, stream = tmp_path / "pipe.safetensors", tmp_path / "stdout.pth"
    os.mkfifo(pipe)
    stream.symlink_to("/proc/self/fd/1")
    for special in (pipe, stream):
        with pytest.raises(CheckpointError, match="it is a device or a pipe"), new_file(special):
            pass
    with pytest.raises(CheckpointError, match="it is a device or a pipe"):
        engine.save(Snapshot(None), stream)
    assert pipe.is_fifo()
    assert stream.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["pipe.safetensors", "stdout.pth"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes")
def test_names_that_are_not_utf8_hold_weights_and_states(tmp_path, model, engine):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for name in ("a.pth", "b.safetensors"):
        heron.save(model, folder / name)
        assert torch.equal(heron.load(folder / name).head.weight, model.head.weight)
    snapshot = Snapshot(engine.prefill([1, 2, 3]), (4,))
    engine.save(snapshot, folder / "state")
    assert engine.load(folder / "state").pending == (4,)
    config = heron.TrainConfig(max_steps=1, out=folder)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert heron.TrainConfig.from_yaml(tmp_path / "config.yaml").out == str(folder)


def test_chat_goes_on_when_a_conversation_cannot_be_saved(engine, tmp_path):
    from heron.generation.chat import Chat, run

    chat, shown = Chat(engine, Sampling(top_k=1), max_tokens=3), []
    lines = iter(["hello", *(f"/save {path}" for path in NO_FILES), f"/load {tmp_path}", f"/save {tmp_path / 'talk'}"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    run(chat, read, shown.append)
    text = "".join(shown)
    assert text.count("cannot be written") == len(NO_FILES)
    assert f"saved {tmp_path / 'talk'}" in text


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [dict(n_layer=10**9), dict(n_embd=10**400), dict(vocab_size=2**31), dict(ffn_dim=2**60), dict(gate_rank=2**25)],
    ids=lambda sizes: next(iter(sizes)),
)
def test_sizes_that_overflow_are_refused(sizes):
    with pytest.raises(ConfigError, match=f"{next(iter(sizes))}: wanted at most"):
        heron.ModelConfig(**sizes)


@pytest.mark.parametrize("command", [["init", "--out", "x.pth"], ["bench"]], ids=str)
def test_a_model_beyond_the_memory_is_refused_before_the_system_ends_the_process(
    command, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 2**18)
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    assert cli.main([*command, *flags, *(["--device", "cpu"] if command == ["bench"] else [])]) == 1
    assert "this machine has 256.00 KiB left; choose a smaller model" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_what_an_allocator_says_is_a_line(monkeypatch, capsys):
    def fail(options):
        raise RuntimeError("Storage size calculation overflowed with sizes=[9, 9]")

    monkeypatch.setattr("heron.commands.doctor.run", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("heron: not enough memory: sizes whose product no memory holds")


# -- Python ---------------------------------------------------------------------------------------------------------


def test_ids_may_be_lists_arrays_and_any_integers(model):
    want, _ = model(torch.tensor([[1, 2, 3]]))
    for tokens in (
        [[1, 2, 3]],
        np.array([[1, 2, 3]]),
        np.array([[1, 2, 3]], np.uint16),
        torch.tensor([[1, 2, 3]]).int(),
    ):
        assert torch.equal(model(tokens)[0], want)
    assert torch.equal(
        model.loss([[1, 2]], np.array([[2, 3]], np.int32)), model.loss(*torch.tensor([[[1, 2]], [[2, 3]]]))
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"\(3,\); of one sequence, give \[tokens\]"),
        (torch.tensor([1]), r"give \[tokens\] or tokens.unsqueeze\(0\)"),
        ([[1.0, 2.0]], "got torch.float32"),
        (torch.ones(1, 2, dtype=torch.bool), "got torch.bool"),
        ([[1], [2, 3]], "got list"),
        ("text", "got str"),
        (None, "got NoneType"),
        ([[]], r"B, T >= 1, got \(1, 0\)"),
        ([[2**70]], "got list"),
        ([[256]], "ids must be 0 to 255"),
    ],
    ids=repr,
)
def test_what_are_no_ids_is_refused(model, tokens, message):
    with pytest.raises(DataError, match=message):
        model(tokens)


def test_a_model_is_made_of_a_preset_a_mapping_or_a_config():
    assert heron.RWKV("rwkv8-tiny").config == heron.ModelConfig.preset("rwkv8-tiny")
    with torch.device("meta"):
        assert heron.RWKV({"variant": "v7", "n_layer": 1}).config == heron.ModelConfig(variant="v7", n_layer=1)
    for what in ("rwkv8-tin", 3, None, {"n_layers": 3}, heron.TrainConfig(max_steps=1)):
        with pytest.raises(ConfigError):
            heron.RWKV(what)
    for name in ("runs/x/rwkv-final.pth", "a.safetensors", "b.gguf"):
        with pytest.raises(ConfigError, match=rf"is a file; heron\.load\('{name}'\) makes the model"):
            heron.RWKV(name)


def test_settings_may_be_numbers_of_numpy_and_paths():
    config = heron.TrainConfig(
        model=heron.ModelConfig(n_layer=np.int64(2), vocab_size=torch.tensor(7), deep_embed_4x=np.bool_(True)),
        max_steps=np.int32(3), lr_init=np.float64(0.5), grad_checkpoint=np.True_, out=Path("runs/x"),
    )  # fmt: skip
    assert heron.TrainConfig.from_dict(config.to_dict()) == config
    plain = (config.model.n_layer, config.max_steps, config.lr_init, config.grad_checkpoint, config.out)
    assert [type(value) for value in plain] == [int, int, float, bool, str]
    for wrong in (np.float64(2.5), np.array([3]), torch.tensor([1, 2])):
        with pytest.raises(ConfigError, match="max_steps"):
            heron.TrainConfig(max_steps=wrong)


def test_generate_takes_any_ids_and_refuses_what_is_none(model):
    bytes_ = heron.tokenizer.load("bytes")
    want = heron.generate(model, bytes_, "ab", max_tokens=3)
    for prompt in ([97, 98], np.array([97, 98]), torch.tensor([97, 98]), b"ab"):
        settings = dict(max_tokens=np.int64(3), temperature=np.float32(1), seed=np.int64(0), top_k=np.int32(0))
        assert heron.generate(model, bytes_, prompt, **settings) == want
    numbers = heron.tokenizer.load("integers:256:0")
    wrong = [dict(prompt=b"ab", tokenizer=numbers), dict(stop=5, tokenizer=numbers), dict(stop=None), dict(stop=b"a")]
    wrong += [dict(prompt=5), dict(prompt=None), dict(stop=5), dict(stop=[1]), dict(max_tokens=2.5), dict(seed="x")]
    wrong += [dict(tokenizer="bytes"), dict(tokenizer=None), dict(model="x.pth"), dict(model=bytes_, tokenizer=model)]
    for arguments in wrong:
        with pytest.raises(HeronError):
            heron.generate(**{**dict(model=model, tokenizer=bytes_, prompt="a", max_tokens=1), **arguments})


def test_what_is_no_request_is_refused(model, engine):
    bytes_ = heron.tokenizer.load("bytes")
    assert len(list(heron.Engine(model, bytes_, rows=np.int64(2)).run([Request("a", 1)]))) == 1
    for wrong in ("a text", [97], 5, {"prompt": "a"}):
        for call in (engine.stream, engine.check, lambda request: list(engine.run([request]))):
            with pytest.raises(ConfigError, match=f"wanted a Request.*got {type(wrong).__name__}"):
                call(wrong)
    for settings, what in (
        (dict(sampling={"top_p": 1}), "sampling: wanted a Sampling, got dict"),
        (dict(sampling=None), "sampling: wanted a Sampling, got NoneType"),
        (dict(after=model), "after: wanted a Snapshot, got RWKV"),
        (dict(after=Snapshot(torch.zeros(1))), "state: wanted a heron.State, got Tensor"),
    ):
        with pytest.raises(ConfigError, match=what):
            list(engine.run([Request("a", 1, **settings)]))
    assert len(list(engine.run([Request("a", 1)]))) == 1  # the engine is free again


def test_what_is_no_path_or_no_model_is_refused():
    for path in (3, None, b"x.pth", "x" * 5000 + ".pth"):
        with pytest.raises(CheckpointError):
            heron.load(path)
    for what in (3, None, {"a": torch.zeros(1)}, "x.pth"):
        with pytest.raises(CheckpointError, match="wanted a model to save"):
            heron.save(what, "x.pth")
    for spec in (3, None):
        with pytest.raises(ConfigError, match="tokenizer: wanted a name or a path"):
            heron.tokenizer.load(spec)


def test_the_page_of_the_package_index_needs_no_file_beside_it():
    root = Path(heron.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (root / project["readme"]).read_text(encoding="utf-8")
    assert "![" not in page
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", page))


# -- typing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("HERON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    def type_line(prompt):
        readline.add_history("what is a heron?")
        return "what is a heron?"

    monkeypatch.setattr("builtins.input", type_line)
    readline.clear_history()
    yield tmp_path / "cache" / "chat_history"
    readline.clear_history()


def test_lines_are_kept_for_the_user_alone(terminal):
    assert line_editing.reader()("\nUser: ") == "what is a heron?"
    assert "what is a heron?" in terminal.read_text(encoding="utf-8")
    assert terminal.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_written_stops_nobody(terminal, monkeypatch):
    monkeypatch.setenv("HERON_CACHE", "/proc/none")
    assert line_editing.reader()("\nUser: ") == "what is a heron?"
    monkeypatch.setitem(sys.modules, "readline", None)
    assert line_editing.reader() is input


# -- files of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("eval {home}/m.pth --data {home}/t.txt --ctx_len 8 --json {file}", "mine.json"),
        ("eval {home}/m.pth --data {home}/t.txt --ctx_len 8 --plot {file}", "mine.svg"),
        (
            "bench --n_layer 1 --n_embd 64 --vocab_size 256 --ctx_len 8 --micro_bsz 1 --steps 1 --json {file}",
            "mine.json",
        ),
        ("plot {home}/run --out {file}", "mine.png"),
    ],
)
def test_figures_replace_what_the_command_wrote_and_nothing_else(model, tmp_path, capsys, command, name):
    heron.save(model, tmp_path / "m.pth")
    (tmp_path / "t.txt").write_text("one two three four")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(
        '{"kind": "step", "step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}\n'
    )
    words = command.format(home=tmp_path, file=tmp_path / name).split()
    for content in (b"", b"what another program wrote", b"[]", b'{"model": 1}', b'[{"model": 1}]'):
        (tmp_path / name).write_bytes(content)
        assert cli.main(words) == 1
        assert capsys.readouterr().err == (
            f"heron: {tmp_path / name}: is there already and was not written by this command; name another file\n"
        )
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    assert cli.main(words) == 0
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (0, 0))
    assert cli.main(words) == 0
    assert (tmp_path / name).stat().st_mtime > 0


def test_a_file_too_large_for_figures_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    with open(tmp_path / "weights.pth", "wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(CheckpointError, match="was not written by this command"):
        refuse_foreign(tmp_path / "weights.pth", lambda content: bool(content))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["init", "--out", "x.txt"], "x.txt: wanted a file name ending in .pth, .safetensors, .gguf, got '.txt'"),
        (["convert", "x.pth", "y.bin"], "y.bin: wanted a file name ending in .pth, .safetensors, .gguf, got '.bin'"),
        (["convert", "x.pth", "y.pth", "--format", "gguf"], "y.pth: wanted a file name ending in .gguf, got '.pth'"),
        (["merge", "x.pth", "a", "y.pt"], "y.pt: wanted a file name ending in .pth, .safetensors, .gguf, got '.pt'"),
        (["merge", "x.pth", "a", "y", "--format", "zip"], "y: format must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_name_that_nothing_can_be_written_under_is_refused_before_the_work(words, wanted, monkeypatch, capsys):
    from heron.commands import convert, init

    for module, name in ((init, "RWKV"), (convert, "weights_file")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the work has begun"))
    assert cli.main(words) == 1
    assert wanted in capsys.readouterr().err
