"""What a run leaves behind and prints, to the character; and that the picture of it is drawn."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from heron.errors import ConfigError, DataError
from heron.report import Reporter, figures, picture, plot, read_log

TRAIN_LOG_LINE = re.compile(
    r"(\d+) (\d+\.\d{6}) (\d+\.\d{4}) (\d+\.\d{8}) \d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? (\d+)"
)


def record(step, loss=2.0, **changes):
    """A step's record; the times are those of 2 steps a second."""
    values = dict(step=step, tokens=64 * step, loss=loss, lr=1e-3 / step, grad_norm=0.5, tokens_per_s=128.0)
    return {**values, "time": step / 2, **changes}


def train(folder, first, last, total=None, every=1, **options):
    """Steps first + 1 to last, with a validation each fifth step."""
    with Reporter(folder, total or last, first, **options) as reporter:
        for step in range(first + 1, last + 1):
            if step % every == 0:
                reporter.step(record(step, 3 + math.sin(step)))
            if step % 5 == 0:
                reporter.validation(dict(step=step, val_loss=4 / step, val_bpb=6 / step, time=step / 2))


def epochs(folder):
    """The lines of train_log.txt as (index, loss, perplexity, lr) texts."""
    lines = (folder / "train_log.txt").read_text().splitlines()
    fields = [TRAIN_LOG_LINE.fullmatch(line).groups() for line in lines]
    assert all(line[0] == line[-1] for line in fields)
    return [line[:-1] for line in fields]


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_each_record_is_one_line_that_is_there_at_once(tmp_path):
    with Reporter(tmp_path / "run", 10, quiet=True) as reporter:
        log = tmp_path / "run" / "log.jsonl"
        assert log.read_text() == ""
        reporter.step(record(1, 2.5))
        assert [strict(line) for line in log.read_text().splitlines()] == [record(1, 2.5)]
        reporter.validation(dict(step=1, val_loss=2.25, val_bpb=None, time=1.5))
        assert strict(log.read_text().splitlines()[1]) == dict(step=1, val_loss=2.25, time=1.5)
    assert read_log(tmp_path / "run") == ([record(1, 2.5)], [dict(step=1, val_loss=2.25, time=1.5)])
    assert read_log(log) == read_log(tmp_path / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_comes_back_as_nan(tmp_path, value):
    with Reporter(tmp_path, 10, quiet=True) as reporter:
        reporter.step(record(1, value))
    assert strict((tmp_path / "log.jsonl").read_text())["loss"] is None
    [step], _ = read_log(tmp_path)
    assert math.isnan(step["loss"])


@pytest.mark.parametrize(("stopped", "first"), [(8, 8), (9, 6), (9, 5), (7, 3), (12, 1), (12, 12)])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_leaves_what_an_uninterrupted_one_does(tmp_path, stopped, first, every):
    train(tmp_path / "whole", 0, 13, every=every, steps_per_epoch=4, quiet=True)
    train(tmp_path / "cut", 0, stopped, 13, every=every, steps_per_epoch=4, quiet=True)
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "los')  # killed in the middle of a line
    train(tmp_path / "cut", first, 13, every=every, steps_per_epoch=4, quiet=True)
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert epochs(tmp_path / "cut") == epochs(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["log.jsonl", "train_log.txt"]


def test_a_fresh_run_begins_with_empty_files(tmp_path):
    train(tmp_path, 0, 6, steps_per_epoch=2, quiet=True)
    (tmp_path / "log.jsonl").write_text("damaged\n")
    Reporter(tmp_path, 6, quiet=True).close()
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "train_log.txt").read_text() == ""


def test_a_resume_without_the_old_log_starts_one(tmp_path):
    train(tmp_path, 3, 5, steps_per_epoch=4, quiet=True)
    assert [step["step"] for step in read_log(tmp_path)[0]] == [4, 5]


def test_train_log_has_a_line_per_mini_epoch_and_one_for_the_rest(tmp_path):
    with Reporter(tmp_path, 5, steps_per_epoch=2, quiet=True) as reporter:
        for step, loss in enumerate([1.0, 2.0, 0.25, 0.5, 800.0], start=1):
            reporter.step(record(step, loss, lr=step * 1e-4))
            assert len(epochs(tmp_path)) == step // 2
    *whole, last = (tmp_path / "train_log.txt").read_text().splitlines()
    assert epochs_of(whole) == [
        ("0", "1.500000", "4.4817", "0.00020000"),
        ("1", "0.375000", "1.4550", "0.00040000"),
    ]
    assert last.startswith("2 800.000000 inf 0.00050000 ")


def epochs_of(lines):
    return [TRAIN_LOG_LINE.fullmatch(line).groups()[:-1] for line in lines]


def test_a_mini_epoch_ends_where_the_next_record_is_beyond_it(tmp_path):
    with Reporter(tmp_path, 20, steps_per_epoch=4, quiet=True) as reporter:
        for step in (3, 6, 9):
            reporter.step(record(step, float(step)))
    assert [(index, loss) for index, loss, *_ in epochs(tmp_path)] == [
        ("0", "3.000000"),
        ("1", "6.000000"),
        ("2", "9.000000"),
    ]


@pytest.mark.parametrize("end", ['{"step": 2, "lo', '{"step": 2', '{"step": 2, "loss": 1.5, "x": "\udcff'])
def test_a_last_line_cut_short_is_left_out(tmp_path, end):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + end, errors="surrogateescape")
    assert read_log(tmp_path) == ([{"step": 1, "loss": 2.0}], [])


def test_a_whole_last_line_counts_without_its_end(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    assert [step["step"] for step in read_log(tmp_path)[0]] == [1, 2]


@pytest.mark.parametrize("line", [b"", b'{"step": 2', b"[1, 2]", b'{"loss": 1.0}', b"\xff\xfe", b"\x00\x00\x00"])
@pytest.mark.parametrize("read", [read_log, lambda run: Reporter(run, 9, 3, quiet=True)])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, read):
    content = b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 2.0}\n'
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"log\.jsonl, line 2: wanted"):
        read(tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == content


def test_a_missing_log_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.log\.jsonl: no such log"):
        read_log(tmp_path / "nowhere")


def test_a_sample_is_kept_to_the_byte_and_shown_harmlessly(tmp_path, capsys):
    text = "first\r\n\n\x1b[31mred\tend\n" + "wide 日本 " * 30 + "\n3\n4\n5\n6\n7"
    with Reporter(tmp_path, 1000) as reporter:
        reporter.sample(500, text)
        reporter.sample(501, "")
    assert (tmp_path / "samples" / "step-00000500.txt").read_bytes() == text.encode()
    assert (tmp_path / "samples" / "step-00000501.txt").read_bytes() == b""
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.splitlines()[:3] == [
        "step  500/1000  sample (all of it in samples/step-00000500.txt)",
        "    first",
        "    \N{REPLACEMENT CHARACTER}[31mred    end",
    ]
    assert shown.splitlines()[3].startswith("    wide 日本 wide")
    assert shown.splitlines()[3].endswith("…")
    assert "    6" not in shown


@pytest.mark.parametrize(
    ("first", "total", "steps"),
    [
        (0, 200, [1, *range(10, 201, 10)]),
        (0, 1001, [1, *range(51, 1001, 51), 1001]),
        (0, 5, [1, 2, 4, 5]),
        (0, 1, [1]),
        (95, 200, [96, *range(100, 201, 10)]),
    ],
)
def test_plain_lines_come_about_twenty_times_a_run(tmp_path, capsys, first, total, steps):
    with Reporter(tmp_path, total, first) as reporter:
        for step in range(first + 1, total + 1):
            reporter.step(record(step))
    shown = [int(re.match(r"step +(\d+)/", line)[1]) for line in capsys.readouterr().out.splitlines()]
    assert shown == steps


def test_a_plain_line_to_the_character(tmp_path, capsys):
    with Reporter(tmp_path, 400) as reporter:
        for step in range(1, 31):
            reporter.step(record(step, float(step), tokens_per_s=12345.6, lr=6e-4))
        reporter.validation(dict(step=30, val_loss=1.25, val_bpb=1.80337, time=15.0))
        reporter.validation(dict(step=30, val_loss=1.25, val_bpb=None, time=15.0))
        reporter.note("saved [there]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step   1/400  loss 1.0000  lr 6.00e-04  12.3k tok/s  ETA ?"
    # The mean of losses 1 to 20, and 380 steps at 2 a second; then the line of the step it was closed at.
    assert lines[1] == "step  20/400  loss 10.5000  lr 6.00e-04  12.3k tok/s  ETA 3:10"
    assert lines[2:] == [
        "step  30/400  validation loss 1.2500  1.8034 bits per byte",
        "step  30/400  validation loss 1.2500",
        "saved [there]",
        "step  30/400  loss 20.5000  lr 6.00e-04  12.3k tok/s  ETA 3:05",
    ]


def test_the_header_is_aligned_and_fits_80_columns(tmp_path, capsys):
    with Reporter(tmp_path, 10) as reporter:
        reporter.header([("model", "word " * 20), ("out", "p/" * 100), ("wkv7", "chunked")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    values = [line[12:] for line in lines if line]
    assert all(value and value[0] != " " for value in values)
    assert [line[:12].strip() for line in lines if line[:12].strip()] == ["model", "out", "wkv7", "loss below"]
    assert "".join(values[2:5]) == "p/" * 100


def test_quiet_prints_nothing_and_needs_no_rich(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with Reporter(tmp_path, 10, quiet=True) as reporter:
        reporter.header([("model", "v8")])
        reporter.step(record(10))
        reporter.validation(dict(step=10, val_loss=1.0, time=5.0))
        reporter.sample(10, "text")
        reporter.note("done")
    assert capsys.readouterr().out == ""


def test_an_output_without_the_characters_gets_question_marks(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with Reporter(tmp_path, 10) as reporter:
        reporter.note("日 done")
        reporter.sample(1, "é")
    assert out.buffer.getvalue().splitlines()[::2] == [b"? done", b"    ?"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals are a POSIX means")
def test_a_terminal_gets_one_line_that_is_written_over(tmp_path):
    import pty

    program = (
        "import sys; from pathlib import Path; from heron import report; report.console.SECONDS_BETWEEN_REDRAWS = 0\n"
        "with report.Reporter(Path(sys.argv[1]), 30) as reporter:\n"
        "    for s in range(1, 31):\n"
        "        reporter.step(dict(step=s, tokens=s, loss=2.0, lr=1e-3, grad_norm=1.0, tokens_per_s=9.0, time=s))\n"
        "        if s == 20: reporter.note('saved')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=theirs, env=environment)
    os.close(theirs)
    data = b""
    try:
        while chunk := os.read(ours, 4096):
            data += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0
    assert all(f"step {step:>2}/30".encode() in data for step in range(1, 31))
    final = [line.rsplit(b"\r", 1)[-1] for line in data.replace(b"\r\n", b"\n").split(b"\n")]
    shown = [re.sub(rb"\x1b\[[?\d;]*[A-Za-z]", b"", line).decode() for line in final]
    assert [line for line in shown if line] == ["saved", "step 30/30  loss 2.0000  lr 1.00e-03  9 tok/s  ETA 0:00"]
    assert data.index(b"\x1b[?25h") > data.index(b"\x1b[?25l")  # the cursor is back


def test_a_missing_tensorboard_is_one_sentence_and_leaves_the_logs(tmp_path, monkeypatch):
    train(tmp_path, 0, 3, quiet=True)
    before = (tmp_path / "log.jsonl").read_bytes()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="^tensorboard: .*pip install tensorboard"):
        Reporter(tmp_path, 3, quiet=True, tensorboard=True)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def _no_login(**_):
    raise RuntimeError("api_key not configured (no-tty)")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "pip install wandb"),
        (types.SimpleNamespace(), "no attribute 'init'"),  # a folder called wandb that lies around
        (types.SimpleNamespace(init=_no_login), "api_key not configured"),
    ],
)
def test_a_run_goes_on_without_wandb_and_says_so_in_one_line(tmp_path, monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.warns(UserWarning, match=f"wandb herons: .*{re.escape(words)}.*logged in {tmp_path} alone") as said:
        reporter = Reporter(tmp_path, 3, wandb="herons", quiet=True)
    assert len(said) == 1
    with reporter:
        reporter.step(record(1, 2.5))
    assert len(read_log(tmp_path)[0]) == 1
    assert not (tmp_path / "wandb_id.txt").exists()


def test_tensorboard_tags(tmp_path, monkeypatch):
    written, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

        def close(self):
            opened.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with Reporter(tmp_path, 9, 6, tensorboard=True, quiet=True) as reporter:
        reporter.step(record(7, 2.5, lr=0.1, grad_norm=0.3, tokens_per_s=50.0))
        reporter.validation(dict(step=7, val_loss=2.0, val_bpb=3.0, time=1.0))
    assert opened == [(tmp_path / "tensorboard", 7), "closed"]
    assert written == [
        ("train/loss", 2.5, 7),
        ("train/lr", 0.1, 7),
        ("train/grad_norm", 0.3, 7),
        ("perf/tokens_per_sec", 50.0, 7),
        ("val/loss", 2.0, 7),
        ("val/bpb", 3.0, 7),
    ]


def test_wandb_keys_and_the_id_of_a_resumed_run(tmp_path, monkeypatch):
    logged, begun = [], []

    def init(**options):
        begun.append(options)
        run_id = options["id"] or f"new{len(begun)}"
        return types.SimpleNamespace(id=run_id, log=lambda values, step: logged.append((values, step)), finish=list)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for first, config in ((0, {"weight_decay": 0.1}), (1, {}), (0, {})):
        name = "65536 ctx512 L12 D768" if config else None
        with Reporter(tmp_path, 9, first, wandb="herons", wandb_name=name, config=config, quiet=True) as reporter:
            reporter.step(record(2, 2.5, lr=0.1, tokens=3 * 10**9, tokens_per_s=1500.0))
    assert [options["id"] for options in begun] == [None, "new1", None]
    assert begun[0]["project"] == "herons"
    assert re.fullmatch(r"65536 ctx512 L12 D768 \d{4}(-\d\d){5}", begun[0]["name"])  # as upstream's
    assert [options["name"] for options in begun[1:]] == [None, tmp_path.name]
    values = {"loss": 2.5, "lr": 0.1, "wd": 0.1, "Gtokens": 3.0, "kt/s": 1.5}
    assert logged[0] == (values, 2)
    assert logged[1] == ({key: value for key, value in values.items() if key != "wd"}, 2)


def labels(svg: Path) -> set[str]:
    """Every text in a picture (matplotlib leaves each as a comment beside its shapes)."""
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text()))


def test_plot_of_one_run(tmp_path):
    train(tmp_path / "first", 0, 300, quiet=True)
    picture = plot([tmp_path / "first"], tmp_path / "pictures" / "loss.svg")
    assert picture == tmp_path / "pictures" / "loss.svg"
    titles = {"Training loss", "Validation", "Learning rate", "Gradient norm before clipping", "Throughput"}
    units = {"nats per token", "bits per byte", "tokens per second", "step"}
    assert labels(picture) >= titles | units | {"first (mean of 7 records)", "validation"}
    assert any("300 steps" in label and "= 0.0200 bits per byte" in label for label in labels(picture))


@pytest.mark.filterwarnings("error")
def test_plot_of_several_runs(tmp_path):
    for name in ("a/run", "b/run"):
        with Reporter(tmp_path / name, 3, quiet=True) as reporter:
            reporter.step(record(1, math.nan, grad_norm=0.0))
            bits = 3.0 if name == "a/run" else None  # one run without them: all are shown in nats
            reporter.validation(dict(step=1, val_loss=2.0, val_bpb=bits, time=1.0))
    drawn = labels(plot([tmp_path / "a/run", tmp_path / "b/run" / "log.jsonl"], tmp_path / "both.SVG"))
    assert drawn >= {"a/run", "b/run"}
    assert "bits per byte" not in drawn
    assert plot([tmp_path / "a/run"], tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
@pytest.mark.filterwarnings("error")
def test_plot_draws_folders_of_any_names(tmp_path):
    """All in one picture, and one with all that is odd alone, which is in its title, too."""
    alone = "_$\\frac{$漢字\n"
    names = ["a$b$", r"cost$\frac{$", "$", "_first", "漢字", "a\nb"]
    with contextlib.suppress(OSError):  # some file systems have no such names
        (tmp_path / "not-utf8-\udcff").mkdir()
        names.append("not-utf8-\udcff")
    for name in (alone, *names):
        train(tmp_path / name, 0, 2)
    for drawn in ([alone], names):
        assert plot([tmp_path / name for name in drawn], tmp_path / "loss.svg").stat().st_size > 10_000
    assert picture._drawable("a$b$") == r"a\$b\$"
    assert picture._drawable("_first") == " _first"


def test_plot_refuses_what_it_cannot_draw(tmp_path):
    train(tmp_path / "run", 0, 3, quiet=True)
    with pytest.raises(ConfigError, match=r"\.png or \.svg.*loss\.pdf"):
        plot([tmp_path / "run"], tmp_path / "loss.pdf")
    with pytest.raises(ConfigError, match="at least one run"):
        plot([], tmp_path / "loss.png")
    with pytest.raises(DataError, match="no such log"):
        plot([tmp_path / "run", tmp_path / "nowhere"], tmp_path / "loss.png")
    Reporter(tmp_path / "empty", 3, quiet=True).close()
    with pytest.raises(DataError, match=r"empty.log\.jsonl: holds no step"):
        plot([tmp_path / "empty"], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("width", [1, 3, 7, 101])
def test_smoothing_is_the_mean_of_the_finite_neighbours(width):
    y = np.random.default_rng(0).normal(size=60)
    y[[4, 5, 6, 30]] = math.nan, math.inf, math.nan, -math.inf
    reach = width // 2
    near = [y[max(i - reach, 0) : i + reach + 1] for i in range(60)]
    means = [n[np.isfinite(n)].mean() if np.isfinite(n).any() else math.nan for n in near]
    np.testing.assert_allclose(picture._smoothed(y, width), means, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (5025, "1:23:45"), (86399.4, "23:59:59"), (275000, "3d 04h")],
)
def test_durations(seconds, text):
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0"), (999.4, "999"), (999.5, "1.0k"), (12345, "12.3k"), (999949, "999.9k"), (1e6, "1.00M")],
)
def test_thousands(value, text):
    assert figures.thousands(value) == text


def test_importing_needs_no_extras():
    program = (
        "import sys; import heron.report, heron.generation\n"
        "print(sorted({'rich', 'matplotlib', 'tensorboard', 'wandb', 'tokenizers', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_of_a_long_prompt_the_console_shows_the_end_and_what_the_model_says(tmp_path, capsys):
    prompt = " ".join(map(str, range(100, 132)))
    with Reporter(tmp_path, 1000) as reporter:
        reporter.sample(500, " 94 7", prompt)
        reporter.sample(600, " 3", "1 2")
    assert (tmp_path / "samples" / "step-00000500.txt").read_text(encoding="utf-8") == f"{prompt} 94 7"
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("    …")
    assert shown[1].endswith("130 131 94 7")
    assert shown[3] == "    1 2 3"
