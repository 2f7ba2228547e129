"""Building native code: once, kept, whole, and one clear line when it can't be."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch.utils import cpp_extension

from heron.errors import KernelError
from heron.ops import _build

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
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(tmp_path / home))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k() {}")
    _build._outcomes.clear()
    with pytest.raises(KernelError, match=f"^{message}$"):
        _build.load_op_library("k", [source], cuda_flags=["-gencode", "arch=compute_80,code=sm_80"])
    assert built(cache) == []


@pytest.mark.skipif(_build.fcntl is None, reason="no file locks here")
def test_a_process_that_waits_says_for_whom_and_gives_up_in_the_end(cache, source, monkeypatch, capfd):
    cache.mkdir()
    lock = cache / "f-x.lock"
    monkeypatch.setattr(_build, "LOCK_TIMEOUT_S", 0.2)
    said = f"heron: waiting for process {os.getpid()}, which is building f\n"
    gives_up = pytest.raises(KernelError, match=f"^f: process {os.getpid()} has been building it for 0.2 s")
    with _build._file_lock(lock, "f"), gives_up, _build._file_lock(lock, "f"):
        pytest.fail("two held one lock")
    assert capfd.readouterr().err == said
