"""What is measured on one GPU and on many, and the cells of the table that it fills."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.many_gpus import going_on
from benchmarks.many_gpus.launch import Launcher
from heron import report
from heron.config import ModelConfig, TrainConfig
from heron.model import RWKV

Figures = dict[str, Any]
Settings = dict[str, Any]
NONE = "–"
WIDE = dict(n_layer=12, n_embd=768, micro_bsz=64, ctx_len=512)
LARGE = dict(n_layer=24, n_embd=2048, micro_bsz=8, ctx_len=2048)
# `heron estimate`: 76 GiB on each of 8 H200s, 87 on each of 4. Two samples would take 136, more than there is.
HUGE = dict(variant="v7", n_layer=32, n_embd=4096, micro_bsz=1, ctx_len=4096)
ONE_TEXT = dict(variant="v7", n_layer=12, n_embd=768, micro_bsz=1)
# AdamW's usual one. With the recipe's 1e-18 a gradient that is nothing but rounding moves its weight as any other does,
# and losses that agree to 1e-6 for ten steps are 1e-3 apart after a hundred.
ADAM_EPS = 1e-8
LONG, LONGEST = 131_072, 1_048_576  # tokens; of LONG, one GPU has room for the activations


class Scale(NamedTuple):
    """The sizes of what is measured: those of GPUs, or ones small enough to try the command on CPUs."""

    settings: Settings  # in the place of a row's
    text: Settings  # of runs on text
    run: TrainConfig  # that is killed and goes on; its batch is that of the runs whose losses are compared, too
    steps: int  # of these; the last quarter is compared
    steps_with_tables: int
    longest: float  # seconds that a part is expected to take at most


def full() -> Scale:
    run = TrainConfig(
        model=ModelConfig(variant="v7", n_layer=12, n_embd=768), data="builtin:python-stdlib", tokenizer="world",
        ctx_len=512, micro_bsz=64, dtype="bf16", max_steps=16, warmup_steps=4, save_every=8, keep=9, eval_every=0,
        sample_every=0,
    )  # fmt: skip
    return Scale(dict(vocab_size=65536), dict(data=run.data, tokenizer=run.tokenizer), run, 200, 60, math.inf)


def tiny(text: Path) -> Scale:
    run = dataclasses.replace(
        full().run, model=ModelConfig(variant="v7", n_layer=1, n_embd=32, head_size=16, vocab_size=256), data=str(text),
        tokenizer="bytes", ctx_len=16, micro_bsz=4, dtype="fp32", device="cpu", threads=1, max_steps=6, save_every=3,
        lr_init=1e-2, warmup_steps=1,
    )  # fmt: skip
    settings = dict(
        n_layer=1, n_embd=32, head_size=16, vocab_size=256, ctx_len=16, dtype="fp32", device="cpu", threads=1,
        lr_init=1e-2, warmup_steps=1,
    )  # fmt: skip
    return Scale(settings, dict(data=str(text), tokenizer="bytes"), run, 8, 4, 1.0)


class Part(NamedTuple):
    """What is measured at a time, and kept under its name."""

    name: str
    seconds: float  # that it takes, about
    measure: Callable[[Launcher, Path], Figures]


class Cells(NamedTuple):
    """A row of the table behind its first column."""

    one: str = NONE
    many: str = NONE
    times: str = NONE
    of_linear: str = NONE
    gib: str = NONE
    of_peak: str = NONE


class Row(NamedTuple):
    """A row of the table, from what each of its parts gave; or from why it gave nothing."""

    what: str
    parts: list[Part]
    cells: Callable[[Sequence[Figures | str]], Cells]


def rows(gpus: int, scale: Scale, seeds: Sequence[int], peak: float) -> dict[str, Row]:
    """All of them by name, the most important first.

    Args:
        seeds: of the runs whose losses are compared.
        peak: what one GPU computes in bf16 at best, floating-point operations a second.
    """
    speed, losses = partial(_speed, gpus, scale, peak), partial(_losses, gpus, scale, seeds)
    ddp, fsdp, spans = dict(parallel="ddp"), dict(parallel="fsdp"), dict(context_parallel=gpus)
    return {
        "wide": speed("v7 L12-D768, B64 T512 a GPU, ddp", dict(WIDE, variant="v7"), ddp, (45, 30)),
        "large": speed("v7 L24-D2048, B8 T2048 a GPU, fsdp", dict(LARGE, variant="v7"), fsdp, (30, 30)),
        "7.2b": speed("v7 L32-D4096 (7.2 B), B1 T4096 a GPU, fsdp", HUGE, fsdp, (None, 100)),
        "going-on": _going_on(gpus, scale),
        "loss-fp32": losses("v7 L4-D256 in fp32", dict(n_layer=4, n_embd=256, dtype="fp32", adam_eps=ADAM_EPS), 55),
        "1m": speed(
            f"v7 L12-D768, one text of {LONGEST:,} tokens, context parallel", dict(ONE_TEXT, ctx_len=LONGEST),
            {**spans, **(dict(grad_checkpoint=True) if gpus * LONG < LONGEST else {})}, (None, 50),
        ),
        "v8": _on_text(gpus, scale),
        "131k": speed(
            f"v7 L12-D768, one text of {LONG:,} tokens, context parallel", dict(ONE_TEXT, ctx_len=LONG), spans, (25, 25)
        ),
        "loss-bf16": losses("v7 L12-D768 in bf16", dict(n_layer=12, n_embd=768, dtype="bf16"), 60),
        "large-v8": speed(
            "v8 L24-D2048 (4.7 B), B8 T2048 a GPU, tables on the host, fsdp", dict(LARGE, variant="v8", tables="host"),
            fsdp, (60, 60),
        ),
    }  # fmt: skip


def _speed(
    gpus: int, scale: Scale, peak: float, what: str, settings: Settings, of_many: Settings,
    seconds: tuple[float | None, float],
) -> Row:  # fmt: skip
    """Steps on random tokens, by ``heron bench``; without the seconds of one GPU it is not measured on one."""

    def measure(n: int, launcher: Launcher, folder: Path) -> Figures:
        asked = dict(dtype="bf16", **settings, **(of_many if n > 1 else {}))
        launcher.run(_heron("bench", {**asked, **scale.settings, "json": folder / "bench.json"}), n)
        found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        figures = {name: found[name] for name in ("tokens_per_s", "seconds", "peak_bytes", "compile", "parallel")}
        return {**figures, "multiplied": n_multiplied(ModelConfig.from_dict(found["config"]["model"]))}

    def cells(found: Sequence[Figures | str]) -> Cells:
        cells, many = _compared(gpus, found), found[-1]
        if isinstance(many, str):
            return cells
        share = 6 * many["multiplied"] * many["tokens_per_s"] / (gpus * peak)
        return cells._replace(gib=f"{many['peak_bytes'] / 2**30:.1f}", of_peak=f"{share:.1%}")

    counts = [(n, s) for n, s in zip((1, gpus), seconds, strict=True) if s is not None]
    return Row(what, [_part(scale, f"{what}, on {n}", s, partial(measure, n)) for n, s in counts], cells)


def n_multiplied(model: ModelConfig) -> int:
    """The number of weights in matrix products: all but embeddings and tables, of which a token looks up a row."""
    with torch.device("meta"):
        weights = RWKV(model).named_parameters()
    return sum(weight.numel() for name, weight in weights if not (name.startswith("emb.") or ".enn." in name))


def _on_text(gpus: int, scale: Scale) -> Row:
    """A v8 whose tables are on the host, on ids that repeat as those of a text do: the later half of its steps."""

    def measure(n: int, launcher: Launcher, folder: Path) -> Figures:
        settings = dict(WIDE, variant="v8", tables="host", dtype="bf16", max_steps=scale.steps_with_tables)
        parallel = dict(parallel="ddp") if n > 1 else {}
        launcher.run(_train(scale, folder / "run", {**settings, **parallel}), n)
        records = report.read_log(folder / "run")[0]
        return {"tokens_per_s": statistics.median(record["tokens_per_s"] for record in records[len(records) // 2 :])}

    what = "v8 L12-D768 on text, B64 T512 a GPU, tables on the host, ddp"
    parts = [_part(scale, f"{what}, on {n}", 35, partial(measure, n)) for n in (1, gpus)]
    return Row(what, parts, partial(_compared, gpus))


def _losses(gpus: int, scale: Scale, seeds: Sequence[int], model: str, settings: Settings, seconds: float) -> Row:
    """Runs of one global batch: on one GPU, on one that makes as many passes a step as there are GPUs, and on many."""
    batch = scale.run.micro_bsz

    def measure(seed: int, launcher: Launcher, folder: Path) -> Figures:
        def program(name: str, micro_bsz: int, accumulate: int = 1) -> list[str]:
            of_batch = dict(ctx_len=512, micro_bsz=micro_bsz, accumulate=accumulate, max_steps=scale.steps, seed=seed)
            return _train(scale, folder / name, dict(settings, variant="v7", **of_batch))

        ones = [program("one", batch), program("accumulated", batch // gpus, gpus)]
        launcher.side_by_side([(one, 1) for one in ones])
        launcher.run(program("many", batch // gpus), gpus)
        curves = {name: report.read_log(folder / name)[0] for name in ("one", "accumulated", "many")}
        return {
            name: statistics.mean(record["loss"] for record in curve[-(len(curve) // 4) :])
            for name, curve in curves.items()
        }

    def cells(found: Sequence[Figures | str]) -> Cells:
        missing = [why for why in found if isinstance(why, str)]
        there = [figures for figures in found if not isinstance(figures, str)]
        if not there:
            return Cells(many=missing[0])
        one, accumulated, many = (statistics.mean(f[name] for f in there) for name in ("one", "accumulated", "many"))
        return Cells(
            f"{one:.4f}; in {gpus} passes {accumulated:.4f}",
            "; ".join([f"{many:.4f}, {abs(many - one):.5f} apart", *missing[:1]]),
        )

    what = (
        f"{model}, loss of the last {scale.steps // 4} of {scale.steps} steps of {batch} samples, "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    )
    name = f"{model}, loss, on 1 and {gpus}"
    return Row(what, [_part(scale, f"{name}, seed {seed}", seconds, partial(measure, seed)) for seed in seeds], cells)


def _going_on(gpus: int, scale: Scale) -> Row:
    """A run of which one process is killed."""

    def cells(found: Sequence[Figures | str]) -> Cells:
        (figures,) = found
        if isinstance(figures, str):
            return Cells(many=figures)
        counts = ", ".join(map(str, figures["counts"]))
        told = [
            f"on {counts}: each sample once: {_yes(figures['once'])}",
            f"weights and moments bit-equal after the load: {_yes(figures['loaded'])}",
            f"on {gpus} bit-equal to the end: {_yes(figures['curve'])}",
            f"losses on fewer at most {figures['apart']:.1e} apart",
        ]
        return Cells(many="; ".join(told))

    what = "v7 L12-D768, fsdp: save, kill one process, go on"
    measure = partial(going_on.measure, config=scale.run, gpus=gpus)
    return Row(what, [_part(scale, f"{what}, on {gpus}", 130, measure)], cells)


def _train(scale: Scale, out: Path, settings: Settings) -> list[str]:
    """`heron train` with nothing but its steps."""
    nothing = dict(warmup_steps=20, val_fraction=0, save_every=0, eval_every=0, sample_every=0, log_every=1)
    return _heron("train", {**nothing, **settings, **scale.text, **scale.settings, "out": out})


def _heron(verb: str, settings: Settings) -> list[str]:
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
    return ["-m", "heron", verb, *flags]


def _part(scale: Scale, name: str, seconds: float, measure: Callable[[Launcher, Path], Figures]) -> Part:
    return Part(name, min(seconds, scale.longest), measure)


def _compared(gpus: int, found: Sequence[Figures | str]) -> Cells:
    """Tokens/s of many GPUs and of one, where that was measured."""
    one, many = [NONE, *found][-2:]
    cells = Cells(
        *(speed if isinstance(speed, str) else f"{speed['tokens_per_s'] / 1e3:.1f}k" for speed in (one, many))
    )
    if isinstance(one, str) or isinstance(many, str):
        return cells
    times = many["tokens_per_s"] / one["tokens_per_s"]
    return cells._replace(times=f"{times:.2f}", of_linear=f"{times / gpus:.3f}")


def _yes(held: bool) -> str:
    return "yes" if held else "NO"
