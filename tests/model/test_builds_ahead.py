"""Kernels that are built in the background: who waits for them, who counts on them, and what follows if one fails."""

from __future__ import annotations

import threading

import pytest
import torch

from heron.commands import doctor
from heron.errors import KernelError
from heron.model.compiled import compiled
from heron.ops import ahead
from heron.ops._choice import Choice, NativeForm, await_builds, counting_on_builds

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SLOW = Choice("plain", "slow")


class Build:
    """A library whose build ends when `end` is set, well or in an error."""

    def __init__(self, error=None):
        self.error, self.end, self.done = error, threading.Event(), False

    def load(self, *_):
        assert self.end.wait(30)
        if self.error is not None:
            raise KernelError(self.error)
        self.done = True


def form_of(build, impl="cpu"):
    return NativeForm("op", impl, "OP", lambda device: None, build.load)


def by_form(form):
    """x + 1 by the form, x + 2 without it."""

    def call(x):
        return x + (1 if form.choice("fast", SLOW, x.device).impl == "cpu" else 2)

    return call


def test_a_choice_waits_for_a_build_that_has_begun():
    build = Build()
    form = form_of(build)
    form.begin(CPU)
    form.begin(CPU)  # which changes nothing
    threading.Timer(0.1, build.end.set).start()
    assert form.choice("fast", SLOW, CPU) == Choice("cpu", "fast")
    assert build.done


def test_who_counts_on_builds_waits_for_those_alone_that_have_not_begun():
    begun, not_begun = Build(), Build()
    forms = [form_of(begun), form_of(not_begun)]
    forms[0].begin(CPU)
    threading.Timer(0.1, not_begun.end.set).start()
    with counting_on_builds():
        assert [form.choice("fast", SLOW, CPU).impl for form in forms] == ["cpu", "cpu"]
        forms[0].require(CPU)
        assert not begun.done
        assert not_begun.done
        threading.Timer(0.1, begun.end.set).start()
        await_builds()
        assert begun.done
    await_builds()  # nothing is counted on any more


@pytest.mark.parametrize("fails", [False, True])
def test_the_compiler_works_beside_a_build_and_the_first_run_waits_for_it(capsys, fails):
    build = Build("no nvcc" if fails else None)
    form, traced = form_of(build), []
    form.begin(CPU)

    def backend(graph, inputs):
        traced.append(build.end.is_set())
        build.end.set()
        return lambda *arguments: (traced.append(build.done), graph.forward(*arguments))[1]

    call = compiled(by_form(form), backend)
    for _ in range(2):
        assert call(torch.zeros(2)).tolist() == ([2, 2] if fails else [1, 1])
    assert traced == ([False, True, False, False] if fails else [False, True, True])
    said = "heron: going on with the slower form of OP in PyTorch: no nvcc\n" if fails else ""
    assert capsys.readouterr().err == said


def test_all_kernels_are_built_and_those_that_cannot_be_are_named(monkeypatch, capsys):
    well, badly = Build(), Build("no nvcc")
    forms = [form_of(well, "cuda"), NativeForm("other", "cuda", "OTHER", lambda device: None, badly.load)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ahead, "ALL", tuple(forms))
    for build in (well, badly):
        build.end.set()
    assert ahead.build_all(GPU) == {"OTHER": "no nvcc"}
    with pytest.raises(KernelError, match="^doctor --build: 1 of 2 kernels could not be built$"):
        doctor.build(GPU)
    monkeypatch.setattr(ahead, "ALL", tuple(forms[:1]))
    capsys.readouterr()
    doctor.build(GPU)
    assert capsys.readouterr().out.startswith("all 1 kernels are built, after 0 s")
    with pytest.raises(KernelError, match="wanted a CUDA GPU"):
        doctor.build(CPU)


def test_a_use_begins_with_what_it_needs_and_a_cpu_with_nothing(monkeypatch):
    begun = []
    monkeypatch.setattr(NativeForm, "begin", lambda form, device: begun.append(form))
    ahead.build_for_training(CPU)
    ahead.build_for_decoding(CPU)
    assert begun == []
    ahead.build_for_training(GPU)
    of_blocks = {"wkv7", "head_mix", "shift_mix"}
    of_steps = {"squared_relu_product", "rows", "linear_cross_entropy", "adamw", "global_norm"}
    assert {form.op for form in begun} == of_blocks | of_steps
    begun.clear()
    ahead.build_for_decoding(GPU)
    assert {form.op for form in begun} >= {"wkv7", "head_step", "norm_mix", "matvec", "sample_rows"}
