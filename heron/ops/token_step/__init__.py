"""One token of some sequences through a whole network, reading every weight once. README.md says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heron.errors import KernelError
from heron.ops import _choice
from heron.ops.token_step import cpu
from heron.ops.token_step.reference import (
    LayerMemory,
    LayerWeights,
    LowRank,
    Network,
    Norm,
    token_step_reference,
)

__all__ = ["LayerMemory", "LayerWeights", "LowRank", "Network", "Norm", "TokenStep", "token_step_choice"]
_FORMS = {"reference": token_step_reference, "cpu": cpu.token_step_cpu}


def token_step_choice(device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 64) -> _choice.Choice:
    """The form that "auto" takes for a network of `dtype` and `head_size` on `device`."""
    other = _choice.Choice("reference", f"plain PyTorch; runs on {device.type}")
    return cpu.FORM.choice("C++, each weight read once for all sequences", other, device, dtype, head_size)


class TokenStep:
    """A network of v7 or v8 that takes one token of each of some sequences at a time; no gradients.

    What comes out for a sequence does not depend on which others are computed beside it, not by a bit ("cpu").

    Args:
        network: :class:`Network`; the weights are not copied, but for vectors of channels.
        impl: "reference" (any device), "cpu" (C++, built at first use), or "auto": "cpu" where it runs.

    Raises:
        KernelError: an `impl` that does not exist or can't run here.
    """

    def __init__(self, network: Network, impl: str = "auto"):
        head, wkv = network.head, network.memories[0].wkv
        if impl == "auto":
            impl = token_step_choice(head.device, head.dtype, wkv.shape[3]).impl
        self._form = _choice.form_of("token_step", impl, _FORMS)
        self._network, self._n_sequences = network, wkv.shape[0]
        self._of_form = cpu.Prepared(network) if impl == "cpu" else network

    def __call__(self, rows: Sequence[int], x: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits (n, V), in at least fp32; the memories of `rows` change.

        Args:
            rows: which n of the sequences that the memories are of, all different.
            x: (n, C), their tokens, embedded, the embedding's norm included.
            gates: (L, n, C), or (L, n, F) where the network says that they are of the hidden channels: the tokens'
                DeepEmbed rows of each layer; None for a v7.

        Raises:
            KernelError: rows that are not there or not all different, shapes that do not fit.
        """
        n, L, C = len(rows), len(self._network.layers), self._network.head.shape[1]
        if not 0 <= min(rows, default=0) <= max(rows, default=0) < self._n_sequences or len(set(rows)) < n:
            raise KernelError(f"token_step: rows must be different, 0 to {self._n_sequences - 1}; got {list(rows)}")
        if tuple(x.shape) != (n, C):
            raise KernelError(f"token_step: x must be {(n, C)}, got {tuple(x.shape)}")
        wanted = (L, n, self._network.layers[0].ffn_key.shape[0] if self._network.gates_hidden else C)
        if gates is not None and tuple(gates.shape) != wanted:
            raise KernelError(f"token_step: gates must be {wanted}, got {tuple(gates.shape)}")
        return self._form(self._of_form, rows, x, gates)
