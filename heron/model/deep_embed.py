"""DeepEmbed: one learned row per token and layer that gates what the channel mix writes. The "8" of RWKV-8."""

from __future__ import annotations

from torch import nn


class DeepEmbed(nn.Embedding):
    """A (V, C) table of gates, 1 at the start, looked up by the *input* token: ``out = ffn(x) * table[token]``.

    Source: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py (`ffn.enn.weight`). The parameter holds the gate itself.
    """
