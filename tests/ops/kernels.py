"""What the tests of every op with CUDA kernels ask of them, on a machine without a GPU."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from heron.errors import KernelError
from heron.files import write_text
from heron.ops import _build
from heron.ops._choice import Choice, NativeForm

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
BFLOAT16, HALF = "__nv_bfloat16", "__half"
ARCHITECTURES = [pytest.param("80", marks=pytest.mark.long), "90a"]  # each takes nvcc seconds
_NAMESPACE = "namespace {"


def check_that_none_spills(
    folder: Path,
    source: Path,
    kernels: Sequence[str],
    arch: str,
    includes: Sequence[str | Path] = (),
    begin: str = _NAMESPACE,
    end: str = "}  // namespace\n",
    before: str = "",
) -> None:
    """Compile kernels of `source` for `arch` and assert that none keeps registers in memory.

    They are compiled without the headers of PyTorch, which may be built without CUDA.

    Args:
        folder: for temporary files.
        kernels: their instances, as they are declared: ``copy<float>(float*, int)``; of no template its name.
        includes: headers, beside those of bf16 and fp16.
        begin, end: the part of the source from the one up to the other is compiled.
        before: what that part needs, behind the headers.
    """
    text = source.read_text()
    part = text[text.index(begin) : text.index(end, text.index(begin))]
    headers = "\n".join(f"#include <{name}>" for name in ("cstdint", "cuda_bf16.h", "cuda_fp16.h", *includes))
    made = "\n".join(
        f"template __global__ void {kernel};" if "<" in kernel else f"auto* kept_{kernel} = &{kernel};"
        for kernel in kernels
    )
    closing = "}" if begin == _NAMESPACE else ""
    file = folder / "kernels.cu"
    file.write_text(f"{headers}\n{before}\n{part}\n{made}\n{closing}\n")
    said = _said_of(file, arch)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0")}, said


def _said_of(file: Path, arch: str) -> str:
    """What nvcc says of registers. It takes seconds, so what it has said of the same sources is kept."""
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    key = hashlib.sha256("\0".join([*flags, file.read_text(), _headers_and_compiler()]).encode()).hexdigest()
    kept = _build.cache_folder() / "registers" / f"{key}.txt"
    if not kept.exists():
        command = ["nvcc", *flags, str(file), "-o", str(file.with_suffix(".cubin"))]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, ran.stderr)
    return kept.read_text()


@functools.cache
def _headers_and_compiler() -> str:
    """All that kernels may include, and the version of nvcc."""
    headers = sorted(Path(_build.__file__).parent.glob("**/csrc/*.*h"))  # .h and .cuh
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "\0".join([version, *(path.read_text() for path in headers)])


def kernels_launched(run: Callable[[], object]) -> list[str]:
    """The names of the kernels that `run` launches on a GPU, without namespaces and arguments."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = (event.name for event in profile.events() or ())
    return [re.sub(r"^void |\(anonymous namespace\)::|\w+::|[<(].*", "", name) for name in names]


def check_that_a_failed_build_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    form: NativeForm,
    choose: Callable[[], Choice],
    impl: str,
    name: str,
) -> None:
    """Assert that without nvcc `choose` twice takes `impl` for that reason, and says so once.

    Args:
        form: of the op, whose `load` fails.
        name: what the build calls the kernels.
    """

    def fail(capability):
        raise KernelError(f"{name}: no nvcc")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(form, "load", fail)
    for _ in range(2):
        choice = choose()
        assert choice.impl == impl
        assert f"{name}: no nvcc" in choice.reason
    said = f"heron: going on with the slower form of {form.what} in PyTorch: {name}: no nvcc\n"
    assert capsys.readouterr().err == said
