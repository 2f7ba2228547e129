"""peft's linear layer with LoRA, which on a GPU computes by one operator of ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from heron.model.plain import is_plain
from heron.ops.low_rank import low_rank_linear, low_rank_linear_choice


def use_in(model: nn.Module, settings: Any) -> None:
    """Have peft take :func:`adapted_linear` for the linear layers of `model`, but where some are quantized.

    Args:
        settings: peft's LoraConfig, before it is injected.
    """
    if all(type(part) is nn.Linear for part in model.modules() if isinstance(part, nn.Linear)):
        settings._register_custom_module({nn.Linear: adapted_linear()})


@functools.cache
def adapted_linear() -> type[nn.Module]:
    """The class; peft must be there."""
    from peft.tuners.lora.layer import Linear

    class AdaptedLinear(Linear):
        """As peft's. :meth:`forward` differs in how it rounds and in what it reads and writes."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            impl = low_rank_linear_choice(x.device).impl
            name = None if impl == "reference" or args or kwargs else self._alone(x)
            if name is None:
                return super().forward(x, *args, **kwargs)
            base, down, up = (layer.weight for layer in self._layers(name))
            return low_rank_linear(x, base, down, up, self.scaling[name], impl)

        def _layers(self, name: str) -> tuple[Any, Any, Any]:
            return self.base_layer, self.lora_A[name], self.lora_B[name]

        def _alone(self, x: Tensor) -> str | None:
            """The adapter in use where nothing but it and the frozen weight takes part."""
            if torch.is_autocast_enabled(x.device.type) or self.disable_adapters or self.merged:
                return None
            if len(self.active_adapters) != 1:
                return None
            name = self.active_adapters[0]
            if name not in self.lora_A or name in self.lora_variant or type(self.lora_dropout[name]) is not nn.Identity:
                return None
            fits = all(is_plain(part, nn.Linear) and part.weight.dtype == x.dtype for part in self._layers(name))
            return name if fits and not self.base_layer.weight.requires_grad else None

    return AdaptedLinear
