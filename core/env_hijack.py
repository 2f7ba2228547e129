"""Environment of RWKV applications. Importing this sets the four variables below where they are unset, nothing else.

RWKV_MY_TESTING   x070; another version is refused.
RWKV_HEAD_SIZE    64; a size set by hand that the weights contradict is refused.
RWKV_CUDA_ON      1: the CUDA kernels where they can run; 0: PyTorch only.
RWKV_JIT_ON       1: kernels may be built at first use; 0: nothing is ever built.
"""

from __future__ import annotations

import os
import shutil

DEFAULTS = {"RWKV_JIT_ON": "1", "RWKV_HEAD_SIZE": "64", "RWKV_MY_TESTING": "x070", "RWKV_CUDA_ON": "1"}
SET_BY_HAND = frozenset(name for name in DEFAULTS if name in os.environ)

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)


def check_environment(head_size: int) -> None:
    """Do what the variables say; refuse settings that contradict the loaded model (heron.ConfigError)."""
    from heron.errors import ConfigError

    version = os.environ["RWKV_MY_TESTING"]
    if version != "x070":
        raise ConfigError(f"RWKV_MY_TESTING is {version!r}; this model is x070. Unset it, or set it to x070")
    wanted = os.environ["RWKV_HEAD_SIZE"]
    if "RWKV_HEAD_SIZE" in SET_BY_HAND and wanted != str(head_size):
        raise ConfigError(f"RWKV_HEAD_SIZE is {wanted!r}, but the weights have head size {head_size}. Unset it")
    for name in ("RWKV_CUDA_ON", "RWKV_JIT_ON"):
        if os.environ[name] not in ("0", "1"):
            raise ConfigError(f"{name} is {os.environ[name]!r}; wanted 0 or 1")
    if os.environ["RWKV_JIT_ON"] == "0":
        from heron.ops import _build

        _build.forbid("RWKV_JIT_ON is 0")
    if os.environ["RWKV_CUDA_ON"] == "0":
        from heron.ops import _choice

        _choice.keep_to_pytorch("RWKV_CUDA_ON is 0")


def hijack_windows_cuda_env() -> None:
    """On Windows, bring Visual Studio's C++ compiler into this environment; elsewhere change nothing."""
    if os.name != "nt":
        print("env_hijack: not Windows, nothing to change")
        return
    from heron.compat.msvc import environment_of_compiler

    found = environment_of_compiler()
    changed = [name for name, value in found.items() if os.environ.get(name) != value]
    os.environ.update(found)
    if not found:
        print("env_hijack: no Visual Studio C++ tools found; kernels can't be built, PyTorch alone needs none")
    else:
        print(f"env_hijack: compiler found; changed {', '.join(changed) or 'nothing'}")


def verify_cuda_setup() -> bool:
    """Print the GPU, PyTorch's CUDA version and the compiler that were found; True when a CUDA device is usable."""
    import torch

    usable = torch.cuda.is_available()
    print(f"env_hijack: PyTorch {torch.__version__}, built for CUDA {torch.version.cuda or '-'}")
    print(f"env_hijack: GPU {torch.cuda.get_device_name() if usable else 'none'}")
    print(f"env_hijack: nvcc {shutil.which('nvcc') or 'not on the path'}")
    return usable
