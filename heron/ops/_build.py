"""The only file that builds: native code is built at first use, once for all processes, and kept.

A library lives in a folder ``<name>-<key>`` of the cache (``HERON_CACHE``, by default ``~/.cache/heron``); the key is a
hash of all that decides its contents: sources, flags, compiler, torch, CUDA, machine. It is built in a private folder
beside it and renamed into place with its sha256, under a file lock that the operating system frees when its holder
dies. So a build killed at any instant never blocks the next one, processes that start together build once, and a
damaged library is built again. Threads build several libraries at a time, each of them once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from heron.errors import KernelError
from heron.locks import locked
from heron.progress import progress

LOCK_TIMEOUT_S = 1200
_CSRC = Path(__file__).parent / "csrc"  # what some kernels include
BARRIERS, BOXES, CHUNKS, CLUSTER, COPIES, EARLY, HEAD, PRODUCTS, SHARED_ADDRESS, STRIPS = (
    _CSRC / f"{name}.cuh"
    for name in (
        "barriers", "boxes", "chunks", "cluster", "copies", "early", "head", "products", "shared_address", "strips",
    )
)  # fmt: skip
_OPERATOR = _CSRC / "operator.h"  # what all of them include
BUNDLED = Path(__file__).parent / "_built"  # libraries that a wheel brought, in the form of the cache
_COMPILERS = ("c++", "g++", "clang++")
if sys.platform == "win32":
    _LINKED = ("-ltorch_cpu", "-ltorch_cuda")
else:  # libtorch.so brings what it was built with
    _LINKED = ("-Xcompiler=-fPIC", "-Xlinker=--no-as-needed", "-ltorch")
_OLDEST_TORCH = "0x020b000000000000"  # 2.11: a library runs under this PyTorch and later ones
_forbidden: str | None = None
_bundling = False
_lock = threading.Lock()  # of what follows
_outcomes: dict[tuple, Future] = {}
_under_way: list[str] = []  # libraries that are being built
_line = contextlib.ExitStack()  # the line about them


def forbid(reason: str) -> None:
    """From here on nothing is built in this process; what would be raises KernelError with `reason`."""
    global _forbidden
    _forbidden = reason


@contextlib.contextmanager
def bundling() -> Iterator[None]:
    """Inside, libraries of ops are built into the package itself, for a wheel, and not loaded: no GPU is needed."""
    global _bundling
    _bundling = True
    try:
        yield
    finally:
        _bundling = False


def cache_folder() -> Path:
    """Where built libraries live: ``HERON_CACHE``, or ``.cache/heron`` in the home folder."""
    if _bundling:
        return BUNDLED
    if chosen := os.environ.get("HERON_CACHE"):
        return Path(chosen)
    return Path(os.path.expanduser("~")) / ".cache" / "heron"


def find_compiler() -> str | None:
    """Path of the C++ compiler that :func:`load_c_library` takes: the first of c++, g++, clang++ that there is."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def known(*flags: str) -> tuple[str, ...]:
    """`flags` where the C++ compiler knows all of them, else none."""
    compiler = find_compiler()
    command = [compiler or "", *flags, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull]
    return flags if compiler and subprocess.run(command, capture_output=True).returncode == 0 else ()


def load_c_library(
    name: str, sources: Sequence[Path], flags: Sequence[str] = (), depends: Sequence[Path] = ()
) -> ctypes.CDLL:
    """Build (once) and load C++ code with a C interface that needs no header of torch; takes seconds.

    Args:
        name: a short name for the cache and for messages.
        sources: the C++ files to build into one library.
        flags: further compiler flags, beside C++17, -O3 and threads.
        depends: files that the sources include; they count for the key.

    Raises:
        KernelError: there is no compiler, it failed, or the cache can't be written; one line with the first error.
    """
    return _load_c_library(name, tuple(map(Path, sources)), tuple(flags), tuple(map(Path, depends)))


def load_op_library(name: str, sources: Sequence[Path], flags: Sequence[str], depends: Sequence[Path] = ()) -> None:
    """Build (once) by nvcc and load a library that registers ops in ``torch.ops`` (csrc/operator.h); takes seconds.

    Args:
        name: an identifier, for the cache and for messages.
        sources: CUDA and C++ files.
        flags: further flags for nvcc; they name the architectures (``-gencode ...``).
        depends: files that the sources include, beside csrc/operator.h; they count for the key.

    Raises:
        KernelError: there is no nvcc, it failed, or the cache can't be written; one line with the first error.
    """
    _load_op_library(name, tuple(map(Path, sources)), tuple(flags), tuple(map(Path, depends)))


def load_kernels_for(
    capability: tuple[int, int], op: str, name: str, sources: Sequence[Path], depends: Sequence[Path] = ()
) -> None:
    """:func:`load_op_library` of the kernels of `op`, for devices of one compute capability.

    Raises:
        KernelError: a device older than 8.0, or as there.
    """
    if capability < (8, 0):
        raise KernelError(f"{op}: the CUDA form needs compute capability 8.0, this device has {capability}")
    arch = arch_of(capability)
    flags = ["-O3", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    load_op_library(f"{name}_sm{arch}", sources, flags, depends)


def arch_of(capability: tuple[int, int]) -> str:
    """How nvcc names the architecture of a compute capability: "80"; "90a" with what only 9.0 has, such as wgmma."""
    return "".join(map(str, capability)) + ("a" if capability[0] == 9 else "")


def _once(load: Callable) -> Callable:
    """Remember what `load` gave for the same arguments in this process: its library, or its KernelError.

    A thread that asks while another one loads waits for it.
    """

    @functools.wraps(load)
    def remembered(*arguments):
        call = (load.__name__, *arguments)
        with _lock:
            outcome = _outcomes.get(call)
            if mine := outcome is None:
                outcome = _outcomes[call] = Future()
        if mine:
            try:
                outcome.set_result(load(*arguments))
            except BaseException as error:
                if not isinstance(error, KernelError):  # such as Ctrl-C: the next one tries again
                    _outcomes.pop(call, None)
                outcome.set_exception(error)
        return outcome.result()

    return remembered


@_once
def _load_c_library(
    name: str, sources: tuple[Path, ...], flags: tuple[str, ...], depends: tuple[Path, ...]
) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise KernelError(f"{name}: no C++ compiler on the path ({', '.join(_COMPILERS)}); install one, such as g++")
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", *flags, *map(str, sources)]
    key = _key(sources + depends, [_version(compiler), *command[1 : -len(sources)]])

    def build_into(folder: Path) -> Path:
        library = folder / f"{name}.so"
        _compile(name, command, library)
        return library

    with _published(name, key, build_into) as library:
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise KernelError(f"{name}: the built library does not load: {error}") from error


@_once
def _load_op_library(name: str, sources: tuple[Path, ...], flags: tuple[str, ...], depends: tuple[Path, ...]) -> None:
    fixed = ["-std=c++17", "-shared", "-cudart=shared", "--threads=0"]
    fixed += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH}"]
    fixed += [*_LINKED, *flags]
    major = (_release(_nvcc(name)) if _bundling else torch.version.cuda or "").split(".")[0]  # of the runtime it links

    def build_into(folder: Path) -> Path:
        nvcc, of_torch = _nvcc(name), Path(torch.__file__).parent
        library = folder / f"{name}.so"
        command = [nvcc, *fixed, f"-I{of_torch / 'include'}", f"-L{of_torch / 'lib'}", *map(str, sources)]
        _compile(name, command, library)
        return library

    with _published(name, _key((*sources, *depends, _OPERATOR), [major, *fixed]), build_into) as library:
        if _bundling:
            return
        try:
            ctypes.CDLL(str(library))  # torch.ops.load_library changes how all threads load libraries meanwhile
        except OSError as error:
            raise KernelError(f"{name}: the built library does not load: {error}") from error


@contextlib.contextmanager
def _published(name: str, key: str, build_into: Callable[[Path], Path]) -> Iterator[Path]:
    """The library of this key, whole, built by `build_into` if neither the package nor the cache holds it."""
    home = cache_folder() / f"{name}-{key}"
    library = home / f"{name}.so"
    if _whole(BUNDLED / home.name / library.name):
        library = BUNDLED / home.name / library.name
    elif not _whole(library):
        if _forbidden is not None:
            raise KernelError(f"{name}: not built: {_forbidden}")
        try:
            home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _file_lock(home.with_suffix(".lock"), name):
                if not _whole(library):
                    _build(name, home, library, build_into)
        except OSError as error:
            raise KernelError(
                f"{name}: the cache for built kernels, {home.parent}, can't be written ({error.strerror or error}); "
                "set HERON_CACHE to a folder that can"
            ) from error
    yield library


def _build(name: str, home: Path, library: Path, build_into: Callable[[Path], Path]) -> None:
    """Compile in a private folder and rename it to `home`; the caller holds the lock of `home`."""
    for left_over in home.parent.glob(f"{home.name}.building-*"):  # of a process that was killed while it held the lock
        shutil.rmtree(left_over, ignore_errors=True)
    if home.exists():
        print(f"heron: the built library {library} is damaged; building it again", file=sys.stderr)
        shutil.rmtree(home)
    private = Path(tempfile.mkdtemp(prefix=f"{home.name}.building-", dir=home.parent))
    try:
        with _told(name):
            built = build_into(private)
        whole = private / "whole"
        whole.mkdir()
        os.replace(built, whole / library.name)
        (whole / "sha256").write_text(_digest(whole / library.name), encoding="ascii")
        try:
            os.rename(whole, home)
        except OSError:
            if not _whole(library):  # without file locks another process may have come first
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Say that `name` is being built. All libraries that are built at one time share a line."""
    with _lock:
        _under_way.append(name)
        if len(_under_way) == 1:
            _line.enter_context(progress(lambda: f"building {', '.join(_under_way)}, once for this machine"))
    try:
        yield
    finally:
        with _lock:
            if _under_way == [name]:
                _line.__exit__(*sys.exc_info())
            _under_way.remove(name)


def _compile(name: str, command: Sequence[str], library: Path) -> None:
    ran = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, errors="replace")
    if ran.returncode:
        raise KernelError(_failure(name, " ".join(command), f"{ran.stderr}\n{ran.stdout}"))


@contextlib.contextmanager
def _file_lock(path: Path, name: str) -> Iterator[None]:
    """Hold the lock file at `path`; while another process builds, say so once and wait."""
    with open(path, "a+", encoding="ascii") as file:
        waiting_since = time.monotonic()
        said = False
        while not locked(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not said:
                print(f"heron: waiting for process {holder}, which is building {name}", file=sys.stderr)
                said = True
            if time.monotonic() - waiting_since > LOCK_TIMEOUT_S:
                raise KernelError(
                    f"{name}: process {holder} has been building it for {LOCK_TIMEOUT_S} s; stop it and try again"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _whole(library: Path) -> bool:
    """Whether `library` is there with the very bytes that were built."""
    try:
        return (library.parent / "sha256").read_text(encoding="ascii") == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _key(files: Sequence[Path], facts: Sequence[str]) -> str:
    facts = [platform.system(), platform.machine(), *facts, *(f"{file.name} {_digest(file)}" for file in files)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace").stdout


def _nvcc(name: str) -> str:
    """Path of nvcc. KernelError unless there is one, whose CUDA is of the major version that torch was built for."""
    wanted = torch.version.cuda or "any version"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]  # None: PATH
    nvcc = next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)
    if nvcc is None:
        raise KernelError(f"{name}: no nvcc (looked in {home or 'PATH and CUDA_HOME'}); install CUDA {wanted}")
    release = _release(nvcc)
    if release and torch.version.cuda and release.split(".")[0] != wanted.split(".")[0]:
        raise KernelError(f"{name}: {nvcc} is CUDA {release} and torch was built for CUDA {wanted}; set CUDA_HOME")
    return nvcc


def _release(nvcc: str) -> str:
    """The version of CUDA that an nvcc belongs to, such as 13.0; empty where it does not say."""
    found = re.search(r"release (\d+\.\d+)", _version(nvcc))
    return found[1] if found else ""


def _failure(name: str, command: str, output: str) -> str:
    """One line: what was run, and the first line of `output` that looks like the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), None)
    return f"{name}: the build failed: {first or (lines or ['no message'])[0]} (ran: {command})"
