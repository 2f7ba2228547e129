"""Whether a module is what this network built, so that reading its weight is the same as calling it."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to be called before or after `module`, or after its gradients."""
    return any(getattr(module, name) for name in _HOOKS)


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """True where nothing stands between a call of `module` and its parameters.

    False for a module of another class than `kind` (an adapter of peft, a quantized or a parametrized layer, a user's
    own), for one with hooks or with a forward of its own (those of accelerate), with a bias where `kind` is
    torch.nn.Linear, and with parameters that are tensors of another class. Such a module is called, never read.
    """
    if type(module) is not kind or "forward" in vars(module) or has_hooks(module):
        return False
    if kind is nn.Linear and module.bias is not None:
        return False
    return all(type(p) in (nn.Parameter, torch.Tensor) for p in module._parameters.values() if p is not None)
