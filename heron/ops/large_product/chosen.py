"""Which algorithm multiplies matrices of some form fastest: measured at the first product of the form, kept on disk."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _build
from heron.ops.large_product import cublaslt
from heron.ops.large_product.cublaslt import Algorithms, Matrix

TURNS = 7  # runs, of which the median counts
GAIN = 0.98  # of PyTorch's time: what is no faster than that is left to PyTorch

Multiply = Callable[[Tensor, Tensor, Tensor], object]  # a, b, out


class Form(NamedTuple):
    """What decides which algorithm is the fastest: ``out = a b``, or ``out += a b`` if `adds`."""

    a: Matrix
    b: Matrix
    out: Matrix
    adds: bool

    @property
    def name(self) -> str:
        """In one line."""
        matrices = (f"{m.rows}x{m.columns}/{m.stride}{'t' if m.turned else ''} {m.dtype}" for m in self[:3])
        return f"{', '.join(matrices)}{', adds' if self.adds else ''}"


class Kept:
    """What was measured on a device, by name, in a file that processes share."""

    def __init__(self, file: Path):
        self._file = file

    def all(self) -> dict[str, Any]:
        """Empty where there is no file yet, or a damaged one, which is written anew."""
        try:
            return json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def add(self, name: str, value: Any) -> None:
        """At once or not at all: other processes read it. Where nothing can be kept the next process measures again."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self._file.parent, delete=False) as file:
                file.write(json.dumps(self.all() | {name: value}, indent=1, sort_keys=True) + "\n")
            os.replace(file.name, self._file)


class Table:
    """What is chosen on a device, by form: the number of an algorithm, in the order in which cuBLASLt tells of them.

    Args:
        file: where it is kept.
    """

    def __init__(self, device: torch.device, file: Path):
        self._device, self._kept = device, Kept(file)
        self._chosen: dict[Form, Multiply] = {}

    def multiply(self, form: Form, by_pytorch: Multiply) -> Multiply:
        """What multiplies fastest; the first time it is measured. `by_pytorch` does it as PyTorch does."""
        if form in self._chosen:
            return self._chosen[form]
        try:
            algorithms, kept = Algorithms(*form), self._kept.all()
        except KernelError:  # cuBLASLt refuses, and would each time
            self._chosen[form] = by_pytorch
            return by_pytorch
        if (number := kept.get(form.name, -1)) is None or 0 <= number < len(algorithms):
            chosen = number
        elif torch.cuda.is_current_stream_capturing():
            return by_pytorch  # no moment to measure
        else:
            try:
                chosen = fastest(form, algorithms, by_pytorch, self._device)
            except torch.OutOfMemoryError:
                return by_pytorch
            self._kept.add(form.name, chosen)
        self._chosen[form] = by_pytorch if chosen is None else functools.partial(algorithms.run, chosen)
        return self._chosen[form]


def fastest(form: Form, algorithms: Algorithms, by_pytorch: Multiply, device: torch.device) -> int | None:
    """The number of the fastest algorithm that gives PyTorch's bits; None: PyTorch itself is."""
    random = torch.Generator(device).manual_seed(0)
    a, b, out = (_drawn(matrix, random) for matrix in form[:3])
    want, got = out.clone(), torch.empty_like(out)
    by_pytorch(a, b, want)
    best, limit = None, GAIN * seconds(lambda: by_pytorch(a, b, got))
    for number in range(len(algorithms)):
        multiply = functools.partial(algorithms.run, number, a, b, got)
        got.copy_(out)
        try:
            multiply()
        except KernelError:  # this one does not take the form after all
            continue
        if torch.equal(got, want) and (took := seconds(multiply)) < limit:
            best, limit = number, took
    return best


def seconds(run: Callable[[], object]) -> float:
    """The median time on the GPU."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TURNS + 1)]
    run()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True)) / 1e3


def _drawn(matrix: Matrix, random: torch.Generator) -> Tensor:
    size = (matrix.columns, matrix.rows) if matrix.turned else (matrix.rows, matrix.columns)
    drawn = torch.empty(size[0], matrix.stride, dtype=matrix.dtype, device=random.device).normal_(generator=random)
    drawn = drawn[:, : size[1]]
    return drawn.T if matrix.turned else drawn


@functools.cache
def table(index: int) -> Table:
    """That of a CUDA device, kept under its name and the version of cuBLASLt."""
    device = torch.device("cuda", index)
    return Table(device, file_of(device, f"cublaslt-{cublaslt.version()}"))


def file_of(device: torch.device, version: str) -> Path:
    """Where what was measured on devices like this one is kept; `version` is of what was measured."""
    name = torch.cuda.get_device_name(device).replace(" ", "-")
    return _build.cache_folder() / "products" / f"{name}-{version}.json"
