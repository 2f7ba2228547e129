"""Whether a module is what this network built, so that reading its weight is the same as calling it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

Kind = TypeVar("Kind", bound=nn.Module)
_INSIDE = ("base_layer", "original_module")  # where peft keeps the module that it stands around
_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)  # the last: without contents, as in `heron estimate`
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to be called before or after `module`, or after its gradients."""
    return any(getattr(module, name) for name in _HOOKS)


def hooks_of(model: nn.Module) -> set[int]:
    """The numbers that PyTorch gave to all that is called before or after a module of `model`, or its gradients."""
    return {number for module in model.modules() for name in _HOOKS for number in getattr(module, name)}


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
    return holds_tensors(module)


def holds_tensors(module: nn.Module) -> bool:
    """Whether the parameters of `module` itself are tensors of no other class: what reads them gets their numbers."""
    return all(type(p) in _PLAIN for p in module._parameters.values() if p is not None)


def adapted(model: nn.Module) -> list[str]:
    """The names of the modules that peft stands around."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = names and name.startswith(f"{names[-1]}.")
        if not inside and any(isinstance(getattr(module, part, None), nn.Module) for part in _INSIDE):
            names.append(name)
    return names


def own_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Each parameter that is no adapter's: its name, its name without adapters, and itself."""
    around = [f"{name}." for name in adapted(model)]
    for name, parameter in model.named_parameters():
        outer = next((outer for outer in around if name.startswith(outer)), None)
        if outer is None:
            yield name, name, parameter
            continue
        part, _, rest = name.removeprefix(outer).partition(".")
        if part in _INSIDE:
            yield name, outer + rest, parameter
