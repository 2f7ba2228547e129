"""benchmarks/study_memory: what is trained on what, texts, processes side by side, and tables."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import jobs
from benchmarks.study_memory import __main__ as study
from benchmarks.study_memory import report, runs, texts
from heron.commands import demo
from heron.errors import DataError
from tests import warm

KEPT = ("config.yaml", "job.json", "log.jsonl")
SMALL = ["--n_layer", "1", "--n_embd", "64", "--ctx_len", "32", "--micro_bsz", "1", "--steps", "2"]


# -- what is trained ------------------------------------------------------------------------------------------------


def test_every_small_text_has_nine_models_and_three_seeds():
    found = runs.cases(["python-docs", "python-stdlib", "prose"], None, [0, 1, 2])
    assert len(found) == len({case.name for case in found}) == 81
    assert {case.seed for case in found[:27]} == {0}
    assert {case.model for case in runs.cases(["collected"], None, [0])} == set(runs.MODELS_OF_LARGE)


@pytest.mark.parametrize("model", runs.MODELS)
def test_a_run_is_the_demo_s_with_another_model(model, tmp_path):
    text = texts.Text("builtin:python-docs", "bytes", 0.1)
    config = runs.settings(runs.Case("python-docs", model, 2), text, runs.Sizes())
    recipe = demo.config(Path("x"), memory=False)
    assert (config.lr_init, config.weight_decay, config.micro_bsz) == (recipe.lr_init, recipe.weight_decay, 2)
    assert (config.model.n_layer, config.model.n_embd, config.seed, config.max_steps) == (4, 192, 2, 400)
    assert (config.model.memory is not None) == model.endswith("+memory")
    assert (config.model.rosa is not None) == model.endswith("+rosa-qkv")
    assert config.model.deep_embed_4x == model.startswith("v8-4x")
    assert config.model.variant == model.partition("+")[0].partition("-")[0]


def test_at_size_a_run_goes_once_over_the_text(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 400}) + "\n" for n in range(40)))
    texts.write_binidx([str(tmp_path / "text.jsonl")], str(tmp_path / "collected"), "world")
    text = texts.prepared(tmp_path)["collected"]
    sizes = runs.Sizes(ctx_len=64, micro_bsz=4)
    config = runs.settings(runs.Case("collected", "v8+memory", 0), text, sizes)
    n_tokens = len(runs.open_binidx(text.data).tokens)
    assert config.max_steps == int(0.98 * n_tokens) // 256
    assert (config.model.n_layer, config.model.n_embd, config.model.vocab_size) == (12, 768, 65536)
    assert config.tokenizer == "world"


# -- texts ----------------------------------------------------------------------------------------------------------


def documents(out):
    return [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]


def test_collected_is_each_text_once_whatever_packs_it(tmp_path):
    (tmp_path / "doc" / "deep").mkdir(parents=True)
    one, two, three = ("".join(f"{word} {n}, " for n in range(60)) for word in ("één", "two", "three"))
    (tmp_path / "a.py").write_text(one, encoding="utf-8")
    (tmp_path / "b.md").write_text(one, encoding="utf-8")  # the same text
    (tmp_path / "doc" / "deep" / "changelog.gz").write_bytes(gzip.compress(two.encode()))
    (tmp_path / "c.bin").write_text(three)  # no document by its name, outside doc
    (tmp_path / "d.py").write_bytes(b"\xff\xfe" + three.encode())
    (tmp_path / "e.py").write_text("short")
    (tmp_path / "f.py").write_text(three + "\0")
    (tmp_path / "g.py").symlink_to(tmp_path / "c.bin")
    line = texts.collect([tmp_path], tmp_path / "out.jsonl", 10**6)
    assert sorted(documents(tmp_path / "out.jsonl")) == sorted([one, two])
    assert line.startswith(f"collected: 2 documents of 2, {len((one + two).encode()):,} bytes, sha256 ")


def test_collected_is_the_same_wherever_the_files_lie_and_no_larger_than_asked(tmp_path):
    for name, order in (("x", range(20)), ("y", reversed(range(20)))):
        (tmp_path / name).mkdir()
        for n in order:
            (tmp_path / name / f"{(7 * n + len(name) * (name == 'y')) % 20}-{name}.txt").write_text(f"text {n}. " * 100)
    lines = [texts.collect([tmp_path / name], tmp_path / f"{name}.jsonl", 9000) for name in ("x", "y")]
    assert lines[0] == lines[1]
    assert documents(tmp_path / "x.jsonl") == documents(tmp_path / "y.jsonl")
    assert 7000 < sum(map(len, documents(tmp_path / "x.jsonl"))) <= 9000


def test_nothing_to_collect_is_told(tmp_path):
    with pytest.raises(DataError, match="wanted sources or documentation in UTF-8, found none"):
        texts.collect([tmp_path], tmp_path / "out.jsonl", 100)
    assert not (tmp_path / "out.jsonl").exists()


def test_how_much_repeats_is_counted_where_it_is_validated(tmp_path):
    (tmp_path / "x.txt").write_text("abcdefghijklmnopqrst" * 2 + "#" + "abcdefghijklmnopqrs")
    text = texts.Text(str(tmp_path / "x.txt"), "bytes", 19 / 60)
    row = texts.described({"x": text}).splitlines()[-1]
    # behind each of 19 letters: the next is right but for the end of the text; from the eighth on the match is long
    assert row == f"| x | 62 | 20 | {12 / 19:.1%} | {18 / 19:.1%} |"


# -- side by side ---------------------------------------------------------------------------------------------------


def job(name, program, kept, wanted="done.txt"):
    return jobs.Job(
        name,
        lambda folder: [sys.executable, "-c", program, str(folder)],
        lambda folder: (folder / wanted).exists(),
        lambda folder, seconds: kept.append((name, (folder / wanted).read_text())),
    )


DONE = "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'done.txt').write_text(os.environ['OMP_NUM_THREADS'])"


def side_by_side(work, n=2, seconds=60, expected=1):
    lines = []
    return jobs.run(work, n, seconds, lambda job: expected, lines.append), lines


def test_all_run_and_what_failed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs.tempfile, "tempdir", str(tmp_path))
    kept = []
    work = [job(f"job {n}", DONE, kept) for n in range(3)] + [job("bad", "raise SystemExit('no luck')", kept)]
    failed, lines = side_by_side(work)
    assert failed == ["bad"]
    assert sorted(kept) == [(f"job {n}", "1") for n in range(3)]
    assert "bad: failed: no luck" in lines
    assert list(tmp_path.iterdir()) == []


def test_what_a_job_would_do_when_all_is_there_is_not_waited_for():
    kept, begun = [], time.monotonic()
    assert side_by_side([job("slow", f"{DONE}; import time; time.sleep(60)", kept)])[0] == []
    assert kept == [("slow", "1")]
    assert time.monotonic() - begun < 20


def test_none_begins_that_would_not_end_and_none_goes_on_beyond_the_time(monkeypatch, tmp_path):
    kept = []
    failed, lines = side_by_side([job("long", DONE, kept)], seconds=5, expected=6)
    assert (failed, kept, lines) == ([], [], ["1 runs had no time; the same command goes on with them"])
    monkeypatch.setattr(jobs.tempfile, "tempdir", str(tmp_path))
    failed, [line] = side_by_side([job("longer", "import time; time.sleep(60)", kept)], seconds=1.5)
    assert (failed, kept) == ([], [])
    assert line.startswith("longer: ended after ")
    assert list(tmp_path.iterdir()) == []


def test_jobs_go_round_the_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    kept = []
    program = DONE.replace("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    assert side_by_side([job(f"job {n}", program, kept) for n in range(4)], n=4)[0] == []
    assert [device for _, device in sorted(kept)] == ["3", "5", "3", "5"]


# -- the whole of it ------------------------------------------------------------------------------------------------


def popen(command, env, stdout, stderr, start_new_session):
    """In the place of subprocess.Popen."""
    assert start_new_session
    return warm.start(command[1:], stdout, stderr, env)


def test_the_study_from_its_texts_to_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "SOURCES", {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))
    prose = "".join(f"On day {n} she counted {n * n % 97} birds, and went home.\n" for n in range(400))
    (tmp_path / "tale.txt").write_text(prose)
    data, results = str(tmp_path / "texts"), tmp_path / "results"
    assert study.main(["prepare", data, "--prose", f"{tmp_path}/tale.txt", "--megabytes", "0"]) == 0
    line = ["run", data, str(results), "--models", "v8", "v8+memory", "--seeds", "0", "--jobs", "2", *SMALL]
    assert study.main(line) == 0
    kept = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    of_runs = {f"prose/{model}/0/{name}" for model in ("v8", "v8+memory") for name in KEPT}
    assert kept == of_runs | {"results.jsonl", "results.md", "results.png", "texts.md"}
    assert "| rosa memory | 0 | " in capsys.readouterr().out

    monkeypatch.setattr(jobs, "subprocess", None)  # nothing is run again
    assert study.main(line) == 0
    assert "2 runs, 2 of them done before" in capsys.readouterr().out

    for seed in (1, 2):  # what another machine sent
        for model in ("v8", "v8+memory"):
            there = tmp_path / "other" / "prose" / model / str(seed)
            there.mkdir(parents=True)
            for path in (results / "prose" / model / "0").iterdir():
                text = path.read_text().replace("seed: 0", f"seed: {seed}")
                (there / path.name).write_text(text)
    assert study.main(["report", str(results), f"{tmp_path}/other", "--out", f"{tmp_path}/all"]) == 0
    page = (tmp_path / "all" / "results.md").read_text(encoding="utf-8")
    assert page.count("| no rosa | 0 1 2 | ") == page.count("| rosa memory | 0 1 2 | ") == 2
    rows = [json.loads(row) for row in (tmp_path / "all" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert page.startswith("| text | tokens | validated on |")
    assert {"text", "model", "seed", "val_bpb", "process_seconds", "machine"} <= rows[0].keys()
    bits = {row["model"]: row["val_bpb"] for row in rows}
    assert f"| v8 | {bits['v8+memory'] / bits['v8'] - 1:.2%} | " in page

    assert study.main(["report", str(results), str(results / "." / "..") + "/results"]) == 1
    assert "are the same run" in capsys.readouterr().err


def test_memory_is_compared_seed_by_seed(tmp_path):
    def run(seed, bits):
        steps = [dict(step=n, loss=1.0, tokens=64.0 * n, tokens_per_s=64.0, seconds=n - 1.0) for n in (1, 2)]
        return report.compare.Run(tmp_path, {}, seed, steps, [dict(steps[1], val_loss=bits, val_bpb=bits)])

    changes = report.gain([run(0, 2.0), run(1, 4.0), run(5, 9.0)], [run(1, 3.0), run(0, 1.0)], "tokens")
    assert changes == [-0.25, -0.5]


def test_at_equal_time_twins_have_as_much_as_both_have_whatever_other_seeds_took(tmp_path):
    def run(seed, seconds, bits):  # `seconds` a step behind the first; bits fall from 4 at the first step
        steps = [dict(step=n, loss=1.0, tokens=64.0 * n, tokens_per_s=64.0, seconds=seconds * (n - 1)) for n in (1, 2)]
        validations = [dict(steps[n], val_loss=value, val_bpb=value) for n, value in enumerate((4.0, bits))]
        return report.compare.Run(tmp_path, {}, seed, steps, validations)

    fast, slow = (run(0, 1.0, 2.0), run(0, 1.0, 1.0)), (run(1, 10.0, 2.0), run(1, 20.0, 2.0))
    changes = report.gain([fast[0], slow[0]], [fast[1], slow[1]], "time")
    assert changes == [-0.5, 0.5]  # the slow twin with memory is half-way, at 3.0, when the other ends at 2.0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run {here}/none {here}/r", "holds no text of the study; type: prepare"),
        ("run {here}/none {here}/r --on prose", "prose is not there; prepare makes it"),
        ("report {here}", "wanted results of the study, found none"),
        ("prepare {here}/t --prose {here}/none.txt --megabytes 0", "none.txt: no such file"),
    ],
)
def test_what_can_not_be_is_one_line(tmp_path, capsys, monkeypatch, line, words):
    monkeypatch.setattr(texts, "SOURCES", {})
    assert study.main(line.format(here=tmp_path).split()) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) in ([], ["t"])
