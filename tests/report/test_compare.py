"""Runs side by side: who belongs together, by which name, and what their figures are at an equal place."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from heron.config import FinetuneConfig, ModelConfig, RosaConfig, TrainConfig
from heron.config.finetune_adapter import AdapterConfig
from heron.errors import ConfigError, DataError
from heron.report import compare, plot


@pytest.fixture
def made(tmp_path):
    """A function: a name, settings, losses of validations -> the folder of a run of ten steps of 64 tokens each."""

    def run(name, *values, seconds=1.0, model=None, bits=True, n_steps=10, **settings):
        folder = tmp_path / name
        folder.mkdir()
        sizes = dict(n_layer=1, n_embd=64, vocab_size=256, **(model or {}))
        config = TrainConfig(model=ModelConfig(**sizes), max_steps=10, out=str(folder), **settings)
        (folder / "config.yaml").write_text(config.to_yaml())
        records = []
        for step in range(1, n_steps + 1):
            time = 30 + seconds * (step - 1) + 100 * (step > 5)  # compiling, a validation
            speed = 64 / seconds if step > 1 else 2.0
            records.append(dict(step=step, tokens=64 * step, loss=5 - step / 10, lr=1e-3, grad_norm=1.0,
                                tokens_per_s=speed, time=time))  # fmt: skip
            if step % 5 == 0 and values:
                value = values[step // 5 - 1]
                records.append(dict(step=step, val_loss=value, time=time) | (dict(val_bpb=value / 2) if bits else {}))
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return run


def names(folders):
    return [group.name for group in compare.groups(compare.read(folders))]


def test_runs_that_differ_in_their_seed_alone_are_one_group(made):
    folders = [made(f"run{seed}", 4.0, 3.0 + seed, seed=seed, threads=seed, eval_every=seed, save_every=seed)
               for seed in (2, 0, 1)]  # fmt: skip
    [group] = compare.groups(compare.read(folders))
    assert [run.seed for run in group.runs] == [2, 0, 1]
    lines = compare.table([group]).splitlines()
    assert lines[0] == "| runs | seeds | val_loss | val_bpb | best | tokens | seconds | tokens/s |"
    assert lines[2] == "| variant v8 | 0 1 2 | 4.0000 ± 1.0000 | 2.0000 ± 0.5000 | 1.8333 ± 0.2887 | 640 | 9.0 | 64 |"
    assert "sample standard deviation" in lines[-1]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (dict(model=dict(rosa="memory")), {}, ["rosa memory", "no rosa"]),
        (dict(model=dict(variant="v7", rosa="memory")), {}, ["variant v7, rosa memory", "variant v8"]),
        (dict(model=dict(deep_embed_4x=True)), {}, ["deep_embed_4x", "no deep_embed_4x"]),
        (dict(lr_init=1e-3, ctx_len=64), {}, ["ctx_len 64, lr_init 0.001", "ctx_len 512, lr_init 0.0006"]),
        (dict(model=dict(rosa=RosaConfig.preset("qkv-4bit", max_match=8))), dict(model=dict(rosa="qkv-1bit")),
         ["rosa qkv-4bit (max_match 8)", "rosa qkv-1bit"]),
        (dict(model=dict(rosa="qkv-1bit", memory="memory")), {}, ["rosa qkv-1bit and memory", "no rosa"]),
        (dict(finetune=FinetuneConfig(epochs=2, show=3)), dict(finetune=FinetuneConfig(epochs=1)),
         ["finetune.epochs 2", "finetune.epochs 1"]),
        (dict(weight_decay=0.0), {}, ["weight_decay 0.0", "weight_decay 0.1"]),
    ],
)  # fmt: skip
def test_a_group_is_called_by_what_differs(made, one, other, expected):
    assert names([made("one", 4.0, 3.0, **one), made("other", 4.0, 3.0, **other)]) == expected


def test_runs_in_which_much_differs_are_called_by_their_folders(made):
    long = dict(data="a/long/path/to/a/text/of/some/length.txt", lr_init=1e-3, lr_final=1e-4, ctx_len=64, beta1=0.8)
    folders = [made("one", 4.0, 3.0, **long), made("other", 4.0, 3.0), made("again", 4.0, 3.0, seed=1)]
    assert names(folders) == [str(folders[0]), f"{folders[1]}, {folders[2]}"]
    assert all(len(name) <= compare.LONGEST_NAME for name in names(folders[1:]))


def test_sizes_that_follow_from_others_name_nothing(made):
    folders = [made("one", 4.0, 3.0), made("other", 4.0, 3.0)]
    model = ModelConfig(n_layer=1, n_embd=512, vocab_size=256)
    config = TrainConfig(model=model, max_steps=10, out="runs/x").to_yaml()
    (folders[1] / "config.yaml").write_text(config)
    assert names(folders) == ["n_embd 64", "n_embd 512"]


def test_equal_tokens_lie_between_two_validations(made):
    long, short = compare.read([made("long", 4.0, 3.0), made("short", 5.0, seed=1, n_steps=7)])
    short.validations.append({**short.validations[0], "tokens": 448.0, "val_loss": 4.5, "val_bpb": 2.25})
    assert compare.budget([long, short], "tokens") == 448
    found = compare.figures(long, "tokens", 448)
    assert found["val_loss"] == pytest.approx(4.0 - 2 / 5)
    assert found["val_bpb"] == found["best"] == pytest.approx(2.0 - 1 / 5)
    assert found["tokens"] == 448
    assert found["seconds"] == pytest.approx(6)
    assert found["loss"] == pytest.approx(statistics.mean(5 - step / 10 for step in range(1, 8)))


def test_equal_time_counts_the_steps_behind_the_first_alone(made):
    fast, slow = compare.read([made("fast", 4.0, 3.0), made("slow", 4.0, 3.0, seconds=2.0)])
    assert compare.budget([fast, slow], "time") == 9
    assert compare.figures(fast, "time", 9)["val_loss"] == 3.0
    found = compare.figures(slow, "time", 9)  # 5.5 steps: behind the validation at the fifth, half a step later
    assert found["val_loss"] == pytest.approx(4.0 - 0.5 / 5)
    assert found["tokens"] == pytest.approx(5.5 * 64)
    assert found["seconds"] == 9
    assert found["tokens/s"] == 32
    table = compare.table(compare.groups([fast, slow]), "time")
    assert "Each run after 9.0 s of training" in table


def test_what_was_validated_best_is_not_what_comes_last(made):
    [run] = compare.read([made("run", 3.0, 4.0)])
    found = compare.figures(run)
    assert (found["val_loss"], found["best"]) == (4.0, 1.5)


def test_before_the_first_validation_there_is_no_figure(made):
    early, late = compare.read([made("early", n_steps=3), made("late", 4.0, 3.0)])
    found = compare.figures(late, "tokens", compare.budget([early, late], "tokens"))
    assert math.isnan(found["val_loss"])
    assert math.isnan(found["best"])


def test_without_validation_the_training_loss_is_shown(made):
    table = compare.table(compare.groups(compare.read([made("run")])))
    assert table.splitlines()[0] == "| runs | seeds | loss | tokens | seconds | tokens/s |"
    assert "| variant v8 | 0 | 4.4500 | 640 | 9.0 | 64 |" in table
    assert "deviation" not in table


def test_losses_are_best_in_nats_where_bytes_are_not_counted(made):
    table = compare.table(compare.groups(compare.read([made("run", 3.0, 4.0, bits=False)])))
    assert "| variant v8 | 0 | 4.0000 | 3.0000 |" in table


def test_a_run_that_is_no_number_any_more_is_shown_as_such(made):
    folders = [made("one", 4.0, math.nan), made("other", 4.0, 3.0, seed=1)]
    row = compare.table(compare.groups(compare.read(folders))).splitlines()[2]
    assert row.startswith("| variant v8 | 0 1 | nan ± nan | nan ± nan | 1.7500 ± 0.3536 |")


def test_what_is_no_run_is_refused(made, tmp_path):
    folder = made("run", 4.0, 3.0)
    with pytest.raises(DataError, match="is given twice"):
        compare.read([folder, folder / "log.jsonl"])
    with pytest.raises(ConfigError, match="at: wanted one of end, tokens, time, got 'steps'"):
        compare.budget([compare.Run.read(folder)], "steps")
    with pytest.raises(DataError, match="no such log"):
        compare.read([tmp_path / "none"])
    (folder / "config.yaml").write_text("n_layers: 3\n")
    with pytest.raises(DataError, match=r"run: wanted the folder of a run, .*'n_layers'"):
        compare.read([folder])
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens": 3}\n')
    with pytest.raises(DataError, match=r"step 1: wanted tokens_per_s in its record"):
        compare.read([folder])
    (folder / "log.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no step yet"):
        compare.read([folder])


def test_runs_of_one_name_share_a_colour_and_a_line_of_the_legend(made, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), path.touch()))
    folders = [made(f"run{number}", 4.0, 3.0, seed=number) for number in range(3)]
    plot(folders, tmp_path / "x.png", ["one", "two", "one"])
    loss = next(axes for axes in drawn[0].axes if axes.get_title(loc="left") == "Training loss")
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["one", "two"]
    colours = [line.get_color() for line in loss.get_lines()]
    assert colours[0] == colours[4] != colours[2]


def test_a_run_whose_first_step_is_behind_the_place_of_all_has_no_figures_there(made):
    folders = [made("short", n_steps=1), made("long", 4.0, 3.0)]
    log = folders[1] / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(record) + "\n" for record in records if record["step"] >= 5))
    runs = compare.read(folders)
    found = compare.figures(runs[1], "tokens", compare.budget(runs, "tokens"))
    assert all(map(math.isnan, found.values()))
    assert "nan" in compare.table(compare.groups(runs), "tokens")


def test_an_adapter_is_told_by_those_of_its_settings_that_differ(made):
    adapters = [AdapterConfig(rank=rank) for rank in (4, 8)]
    folders = [
        made(f"rank{adapter.rank}", finetune=FinetuneConfig(method="lora", adapter=adapter)) for adapter in adapters
    ]
    assert names(folders) == ["finetune.adapter.rank 4", "finetune.adapter.rank 8"]
