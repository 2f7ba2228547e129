"""Weights of several dtypes, as files of llama.cpp have them: they stay as they are, and compute in the widest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from heron.model.deep_embed import DeepEmbed
from heron.model.plain import own_parameters


def widest(model: nn.Module) -> torch.dtype | None:
    """The dtype in which weights that mix several compute; None where all but the tables have one."""
    dtypes = {parameter.dtype for _, parameter in in_products(model)}
    return reduce(torch.promote_types, dtypes) if len(dtypes) > 1 else None


def in_products(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that meet each other in sums and products, by name.

    Tables do not count, as their rows are cast, nor do adapters and quantized layers, which cast their inputs.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, DeepEmbed)}
    found = own_parameters(model)
    return ((name, part) for name, _, part in found if id(part) not in tables and part.is_floating_point())


def call_in(dtype: torch.dtype, method: Callable[..., Any], model: nn.Module, *arguments: Any) -> Any:
    """Call a method of a model with its weights cast to `dtype`; gradients flow back through the cast."""
    cast = {f"model.{name}": tensor.to(dtype) for name, tensor in in_products(model)}
    return torch.func.functional_call(_Call(model, method), cast, arguments)


class _Call(nn.Module):
    """A method of a model as a module, which is what torch.func.functional_call takes."""

    def __init__(self, model: nn.Module, method: Callable[..., Any]):
        super().__init__()
        self.model, self._method = model, method

    def forward(self, *arguments: Any) -> Any:
        """Call it."""
        return self._method(self.model, *arguments)
