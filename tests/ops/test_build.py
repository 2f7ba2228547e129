"""Building native code: once, kept, whole, and one clear line when it can't be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch

from heron.errors import KernelError
from heron.ops import _build
from tests import warm
from tests.ops.kernels import needs_nvcc

needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler on the path")
PLUS_ONE = 'extern "C" int f(int x) { return x + 1; }'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HERON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "f.cpp"
    path.write_text(PLUS_ONE)
    return path


def built(cache):
    return sorted(path.parent.name for path in cache.glob("*/*.so"))


def load_afresh(*arguments, **options):
    """As a process does that has loaded nothing yet."""
    _build._outcomes.clear()
    return _build.load_c_library(*arguments, **options)


@needs_compiler
def test_flags_are_known_all_together_or_not_at_all(monkeypatch):
    assert _build.known("-O2", "-funroll-loops") == ("-O2", "-funroll-loops")
    assert _build.known("-O2", "-mno-such-thing") == ()
    monkeypatch.setattr(_build, "find_compiler", lambda: None)
    assert _build.known("-O2") == ()


@needs_compiler
def test_a_library_is_built_at_first_use_and_then_kept(cache, source, monkeypatch):
    assert load_afresh("f", [source]).f(41) == 42
    assert len(built(cache)) == 1
    monkeypatch.setattr(_build.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert load_afresh("f", [source]).f(41) == 42


@needs_compiler
def test_all_that_decides_its_contents_is_in_the_key(cache, source, tmp_path):
    header = tmp_path / "h.h"
    header.write_text("// one")
    load_afresh("f", [source], depends=[header])
    load_afresh("f", [source], flags=["-DX"], depends=[header])
    header.write_text("// two")
    load_afresh("f", [source], depends=[header])
    source.write_text(PLUS_ONE.replace("1", "2"))
    assert load_afresh("f", [source], depends=[header]).f(40) == 42
    assert len(built(cache)) == 4


@needs_compiler
@pytest.mark.parametrize("damage", ["a byte", "cut short", "no hash", "gone"])
def test_a_damaged_library_is_built_again_and_that_is_said(cache, source, damage, capfd):
    load_afresh("f", [source])
    [library] = cache.glob("*/*.so")
    whole = library.read_bytes()
    # A new file each time: the old one is mapped into this process, and writing into it would crash the test.
    if damage == "a byte":
        library.unlink()
        library.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    elif damage == "cut short":
        library.unlink()
        library.write_bytes(whole[:-100])
    elif damage == "no hash":
        (library.parent / "sha256").unlink()
    else:
        library.unlink()
    assert load_afresh("f", [source]).f(41) == 42
    assert library.read_bytes() == whole
    assert capfd.readouterr().err.count("damaged; building it again") == 1


@needs_compiler
def test_leftovers_of_a_killed_build_are_removed(cache, source):
    load_afresh("f", [source])
    [name] = built(cache)
    shutil.rmtree(cache / name)
    (cache / f"{name}.building-dead").mkdir()
    load_afresh("f", [source])
    assert {path.name for path in cache.iterdir()} == {name, f"{name}.lock"}


def test_no_compiler_is_one_line_that_says_what_to_install(cache, source, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(
        KernelError, match=r"^f: no C\+\+ compiler on the path \(c\+\+, g\+\+, clang\+\+\); install one"
    ):
        load_afresh("f", [source])


@needs_compiler
def test_a_failed_build_names_the_first_error_and_the_command_and_is_not_tried_twice(cache, source, monkeypatch):
    source.write_text("int f() { return nothing; }\nint g() { return less; }")
    with pytest.raises(
        KernelError, match=r"^f: the build failed: .*f.cpp:1:\d+: error: .* \(ran: .*-std=c\+\+17"
    ) as first:
        load_afresh("f", [source])
    assert "\n" not in str(first.value)
    monkeypatch.setattr(_build.subprocess, "run", lambda *a, **k: pytest.fail("tried again"))
    with pytest.raises(KernelError):
        _build.load_c_library("f", [source])
    assert built(cache) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(cache, source, monkeypatch):
    cache.write_text("a file, not a folder")
    with pytest.raises(KernelError, match=f"{cache}, can't be written .*set HERON_CACHE to a folder that can"):
        load_afresh("f", [source])


@needs_compiler
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(cache, source):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(KernelError, match="^f: the build failed: .*(File too large|error)"):
            load_afresh("f", [source])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@needs_compiler
def test_where_compiling_is_forbidden_only_what_is_built_already_loads(cache, source, monkeypatch, tmp_path):
    load_afresh("f", [source])
    monkeypatch.setattr(_build, "_forbidden", None)
    _build.forbid("RWKV_JIT_ON=0")
    assert load_afresh("f", [source]).f(1) == 2
    with pytest.raises(KernelError, match="^f: not built: RWKV_JIT_ON=0$"):
        load_afresh("f", [source], flags=["-DOTHER"])


@pytest.mark.parametrize(
    ("home", "message"),
    [
        (None, r"k: no nvcc \(looked in PATH and CUDA_HOME\); install CUDA 13.0"),
        ("elsewhere", r"k: no nvcc \(looked in .*elsewhere\); install CUDA 13.0"),
        ("cuda", r"k: .*nvcc is CUDA 9.0 and torch was built for CUDA 13.0; set CUDA_HOME"),
    ],
)
def test_a_missing_or_wrong_cuda_is_one_line(cache, tmp_path, monkeypatch, home, message):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.0, V9.0.176'\n")
    nvcc.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    if home is None:
        monkeypatch.setattr(_build.shutil, "which", lambda name, path=None: None)
    else:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / home))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k() {}")
    _build._outcomes.clear()
    with pytest.raises(KernelError, match=f"^{message}$"):
        _build.load_op_library("k", [source], ["-gencode", "arch=compute_80,code=sm_80"])
    assert built(cache) == []


def in_threads(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@needs_compiler
def test_threads_build_several_libraries_at_a_time_and_each_once(cache, tmp_path, monkeypatch):
    compile_, together, compiled = _build._compile, threading.Barrier(2, timeout=30), []

    def compile_beside(name, *arguments):
        compiled.append(name)
        together.wait()  # for the other library: it would wait for ever if they were built one after the other
        compile_(name, *arguments)

    monkeypatch.setattr(_build, "_compile", compile_beside)
    monkeypatch.setattr(_build, "_outcomes", {})
    sources = {name: tmp_path / f"{name}.cpp" for name in ("f", "g")}
    answers = []
    for path in sources.values():
        path.write_text(PLUS_ONE)

    def ask(name):
        answers.append(_build.load_c_library(name, [sources[name]]).f(41))

    in_threads(*(lambda name=name: ask(name) for name in ("f", "g", "f", "g")))
    assert answers == [42] * 4
    assert sorted(compiled) == ["f", "g"]


@needs_compiler
def test_what_threads_build_at_a_time_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("heron.progress.PATIENCE_S", 0.1)
    both, ended = threading.Barrier(2, timeout=30), []

    def build(name, seconds):
        home = tmp_path / name

        def build_into(folder):
            both.wait()
            time.sleep(seconds)
            (folder / "built").write_text("")
            ended.append(name)
            return folder / "built"

        _build._build(name, home, home / f"{name}.so", build_into)

    in_threads(lambda: build("f", 0), lambda: build("g", 0.5))
    assert ended == ["f", "g"]
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"heron: building (f, g|g, f|g), once for this machine \.\.\.", first)
    assert re.fullmatch(r"heron: building .*, once for this machine: done after \d s", last)


BEGINS = """
import sys, time, torch
from pathlib import Path
from heron.ops import _build, _choice
form = _choice.NativeForm("f", "cpu", "F", lambda device: None, lambda: _build.load_c_library("f", [Path(sys.argv[1])]))
form.begin(torch.device("cpu"))
while not list(_build.cache_folder().glob("*.building-*")):
    time.sleep(0.01)
print("begun", flush=True)
"""


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
@pytest.mark.parametrize("how", ["it ends", "it is killed"])
def test_a_build_in_the_background_keeps_no_process_alive_and_blocks_no_later_one(cache, source, tmp_path, how):
    slow = tmp_path / "bin" / "c++"
    slow.parent.mkdir()
    real = _build.find_compiler()
    slow.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exec {real} --version;; esac\nexec sleep 20\n')
    slow.chmod(0o755)
    path = f"{slow.parent}{os.pathsep}{os.environ['PATH']}"
    script = BEGINS + ("time.sleep(60)" if how == "it is killed" else "")
    environment = {**os.environ, "PATH": path}
    with warm.start(["-c", script, source], stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if how == "it is killed":
            process.kill()
        code = process.wait(15)
    assert code == (-signal.SIGKILL if how == "it is killed" else 0)
    assert load_afresh("f", [source]).f(41) == 42
    assert len(built(cache)) == 1


OPERATOR = """
#include "operator.h"
namespace {
std::tuple<Tensor, Tensors> told(const Tensor& x, const Tensors& many, const std::vector<Optional>& some,
                                 const std::vector<int64_t>& ints, const Optional& one, double e, bool b, int64_t n) {
    auto y = zeros({x.size(0), 3}, x);
    auto counts = empty({6}, x, ScalarType::Long);
    int64_t* to = counts.mutable_data_ptr<int64_t>();
    to[0] = many.size(), to[1] = some[0].has_value() + 2 * some[1].has_value(), to[2] = ints[1] + n;
    to[3] = one.has_value(), to[4] = b ? int64_t(e) : 0;
    with_dtype<float, BFloat16>(x, "told", [&](auto zero) { to[5] = sizeof(zero); });
    return {y, {counts, empty_like(x)}};
}
}  // namespace
STABLE_TORCH_LIBRARY_FRAGMENT(heron_tests, library) {
    library.def("told(Tensor x, Tensor[] many, Tensor?[] some, int[] ints, Tensor? one, float e, bool b, int n)"
                " -> (Tensor, Tensor[])");
}
STABLE_TORCH_LIBRARY_IMPL(heron_tests, CPU, library) { library.impl("told", TORCH_BOX(&told)); }
"""


@needs_nvcc
def test_operators_take_and_give_what_their_schemas_say(cache, tmp_path, monkeypatch):
    """All kinds of arguments that our operators have, through csrc/operator.h, on a CPU; from a package that has it."""
    monkeypatch.setattr(_build, "BUNDLED", tmp_path / "bundled")
    source = tmp_path / "told.cpp"
    source.write_text(OPERATOR)
    build = ("told", [source], ["-O1", f"-I{_build._CSRC}"])
    with _build.bundling():  # as for a wheel
        _build.load_op_library(*build)
    assert not hasattr(torch.ops.heron_tests, "told")
    _build._outcomes.clear()
    monkeypatch.setattr(torch.version, "cuda", _build._release(_build._nvcc("told")))
    monkeypatch.setattr(_build, "_compile", lambda *_: pytest.fail("compiled again"))
    _build.load_op_library(*build)
    assert not cache.exists()
    x = torch.ones(2, 5, dtype=torch.bfloat16)
    y, (counts, like) = torch.ops.heron_tests.told(x, [x] * 3, [None, x], [7, 8], None, 4.5, True, 9)
    assert torch.equal(y, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert counts.tolist() == [3, 2, 17, 0, 4, 2]
    assert (like.shape, like.dtype) == (x.shape, x.dtype)
    with pytest.raises(RuntimeError, match="told: no kernel for Double"):
        torch.ops.heron_tests.told(x.double(), [x], [x, x], [1, 2], x, 0.0, False, 0)


def test_a_process_that_waits_says_for_whom_and_gives_up_in_the_end(cache, source, monkeypatch, capfd):
    pytest.importorskip("fcntl")
    cache.mkdir()
    lock = cache / "f-x.lock"
    monkeypatch.setattr(_build, "LOCK_TIMEOUT_S", 0.2)
    said = f"heron: waiting for process {os.getpid()}, which is building f\n"
    gives_up = pytest.raises(KernelError, match=f"^f: process {os.getpid()} has been building it for 0.2 s")
    with _build._file_lock(lock, "f"), gives_up, _build._file_lock(lock, "f"):
        pytest.fail("two held one lock")
    assert capfd.readouterr().err == said
