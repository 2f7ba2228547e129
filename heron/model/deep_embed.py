"""DeepEmbed: learned rows per token and layer, looked up by the *input* token. The "8" of RWKV-8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class DeepEmbed(nn.Embedding):
    """A (V, width) table of gates, 1 at the start: ``gated = x * table[token]``. The parameter holds the gate itself.

    Source: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py (`ffn.enn.weight`) and its successors.
    """


class Lookup(NamedTuple):
    """What tables are looked up with: a run of tokens, as ids and as the network's first activations."""

    ids: Tensor  # (B, T) int64
    embedded: Tensor  # (B, T, C), after ln0

    def last(self, n: int) -> Lookup:
        """The last `n` tokens."""
        return Lookup(self.ids[:, -n:], self.embedded[:, -n:])


def rows(table: DeepEmbed, of_embedding: nn.Linear, tokens: Lookup) -> Tensor:
    """Rows (B, T, width) of ``table + embedded of_embedding^T``, in at least fp32.

    Upstream adds the second part to the table once, when it loads a file; apart, both train. Half precision would lose
    what the small part adds to the large one.
    """
    dtype = torch.promote_types(tokens.embedded.dtype, torch.float32)
    with torch.autocast(tokens.embedded.device.type, enabled=False):
        return table(tokens.ids).to(dtype) + tokens.embedded.to(dtype) @ of_embedding.weight.to(dtype).t()
