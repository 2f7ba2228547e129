"""`heron serve` from the command line: what it prints, how it ends, what it refuses to start with."""

from __future__ import annotations

import signal
import socket
import sys

import httpx
import pytest

import heron
from heron import cli
from tests import warm


@pytest.fixture(scope="module")
def model(random_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "small.pth"
    heron.save(random_model(vocab_size=256), path)
    return path


def test_it_says_where_it_listens_and_ends_in_order_at_a_signal(model, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with warm.start(["-m", "heron", "serve", model, "--port", "0", "--api_key_file", tmp_path / "key"]) as process:
        address = process.stdout.readline().removeprefix("listening on ").strip()
        headers = {"Authorization": "Bearer secret"}
        models = httpx.get(f"{address}/v1/models", headers=headers).json()["data"]
        assert [one["id"] for one in models] == ["small"]
        body = {"prompt": "a", "max_tokens": 3}
        assert httpx.post(f"{address}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        body = {"prompt": "a", "max_tokens": 300, "stream": True, "logit_bias": {"0": -100}}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"  # what runs is finished
        out, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in out + errors


def test_what_does_not_end_in_time_is_told_when_the_server_ends(model):
    with warm.start(["-m", "heron", "serve", model, "--port", "0", "--grace", "0.2"]) as process:
        address = process.stdout.readline().removeprefix("listening on ").strip()
        body = {"prompt": "a", "max_tokens": 30_000, "stream": True, "logit_bias": {"0": -100}}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, error, done = [line for line in lines if line]
        assert '"code":"server_stopping"' in error
        assert done == "data: [DONE]"
        out, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in out + errors


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--port", "70000"], "port: wanted at most 65535"),
        (["--name", "a/b"], "name: wanted letters"),
        (["--api_key", "a", "--api_key_file", "b"], "drop one"),
        (["--api_key_file", "/nowhere/key"], "No such file"),
        (["--template", "none.jinja"], "none.jinja"),
        (["--template", "notes.txt"], "template: wanted rwkv or a FILE.jinja"),
        (["--with_state", "poet=/nowhere"], "nowhere"),
        (["--state_dir", "/proc"], "/proc: no folder that states can be written into"),
        (["--rows", "0"], "rows: wanted at least 1"),
    ],
)
def test_what_it_cannot_start_with_is_one_line(model, words, line, capsys):
    assert cli.main(["serve", str(model), *words]) == 1
    errors = [one for one in capsys.readouterr().err.splitlines() if "reading" not in one]
    assert len(errors) == 1
    assert line in errors[0]


def test_without_its_extra_it_says_what_to_type(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "heron.serve.app", None)
    assert cli.main(["serve", str(model), "--port", "0"]) == 1
    assert "pip install 'heron-rwkv[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", str(model), "--port", str(taken.getsockname()[1])]) == 1
    errors = capsys.readouterr().err
    assert "cannot listen there" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("value", ["poet", "=x", "a/b=x", ".a=x", "poet="])
def test_a_variant_is_a_name_and_a_path(model, value, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", str(model), "--with_state", value])
    assert stop.value.code == 2
    assert "NAME=PATH" in capsys.readouterr().err


def test_a_model_without_memory_looks_into_no_documents(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    built = ["memory", "build", str(tmp_path / "a.txt"), "--out", str(tmp_path / "a.memory"), "--tokenizer", "bytes"]
    assert cli.main(built) == 0
    assert cli.main(["serve", str(model), "--port", "0", "--with_memory", f"docs={tmp_path / 'a.memory'}"]) == 1
    assert "memory" in capsys.readouterr().err.splitlines()[-1]
