"""What this machine can do, decided once: device and precision. `heron doctor` prints it; a run writes it down."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from heron.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8_CAPABILITY = (8, 9)


class Choice(NamedTuple):
    """A decision and the reason for it, as one clause."""

    value: str
    reason: str


def cpu_flags() -> frozenset[str]:
    """Feature flags of the CPU as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split())


def settle_threads() -> None:
    """Go on with one thread, and say so, where the system gives no more: OpenMP would end the process at its first.

    A limit on processes (ulimit -u, that of a container) is the usual reason.
    """
    wanted = torch.get_num_threads()
    if wanted == 1:
        return
    stop, started = threading.Event(), []
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:  # "can't start new thread"
        torch.set_num_threads(1)
        warnings.warn(
            f"threads: wanted {wanted}, and the system starts no more than {len(started)} (see ulimit -u); going on "
            "with one",
            stacklevel=3,
        )
    finally:
        stop.set()
        for thread in started:
            thread.join()


def choose_device(wanted: str) -> Choice:
    """The torch device to run on. `wanted` is TrainConfig.device; ConfigError when it is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return Choice("cuda", f"found {torch.cuda.get_device_name()}")
        return Choice("cpu", "no CUDA device found")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"device: wanted auto, cpu, cuda or cuda:N, got {wanted!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: wanted auto, cpu, cuda or cuda:N, got {wanted!r}; {device.type} is not tested yet")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {wanted} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return Choice(wanted, "as set")


def numbered(device: torch.device | str) -> torch.device:
    """The device as tensors on it name it: "cuda" is the current one, such as "cuda:0"."""
    device = torch.device(device)
    is_current = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_current else device


def choose_dtype(wanted: str, device: torch.device) -> Choice:
    """fp32, bf16 or fp8 for the matrix products of a training run; weights and the WKV state stay in fp32 always.

    Whether a device has fp8 is for :func:`check_dtype` to say.
    """
    if wanted != "auto":
        if wanted == "bf16" and device.type == "cpu" and not cpu_flags() & {"amx_bf16", "avx512_bf16"}:
            return Choice(wanted, "as set, but this CPU has no bf16 units: fp32 is many times faster")
        return Choice(wanted, "as set")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Choice("bf16", "this GPU has bf16 tensor cores")
        return Choice("fp32", "this GPU has no bf16 tensor cores")
    if "amx_bf16" in cpu_flags():
        return Choice("bf16", "this CPU has bf16 matrix units (AMX)")
    return Choice("fp32", "this CPU has no bf16 matrix units (AMX)")


def check_dtype(dtype: str, device: torch.device) -> None:
    """ConfigError where `device` does not multiply numbers of a decided `dtype`."""
    if dtype != "fp8":
        return
    if device.type != "cuda":
        raise ConfigError(f"dtype fp8: needs a GPU, and the device is {device}; use --dtype bf16 or fp32")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            "dtype fp8: needs a GPU of compute capability {}.{} or newer (Ada, Hopper, Blackwell); {} has {}.{}; "
            "use --dtype bf16".format(*FP8_CAPABILITY, torch.cuda.get_device_name(device), *capability)
        )


def choose_weights(wanted: str, dtype: str, device: torch.device) -> Choice:
    """fp32 or bf16 for what a training run's network computes with; those that train are fp32 either way."""
    if wanted != "auto":
        return Choice(wanted, "as set")
    if dtype == "fp8":
        return Choice("bf16", "what is rounded to fp8, and all beside it, is in bf16")
    if dtype == "bf16" and device.type == "cuda":
        return Choice("bf16", "a copy in bf16 halves what a GPU moves")
    return Choice("fp32", "a copy in bf16 is of use to a GPU at dtype bf16")


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """The precision context for `dtype`: bf16 matrix products over fp32 weights (also for fp8), or nothing at all."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype in ("bf16", "fp8"))
