"""The small ROSA models that upstream published, for their tasks: counting; arithmetic and reversing of digits.

Source: BlinkDL/RWKV-LM, folder RWKV-v8: 251016_rosa_1bit_run.py and 251024_rosaQKV_run.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heron.config import ModelConfig, RosaConfig
from heron.errors import CheckpointError
from heron.model.deep_embed import Lookup
from heron.model.rosa import Rosa01Layer, RosaEmbed
from heron.model.rwkv import Block
from heron.model.state import RosaState, State

_LAYERS = {1: ("rosa1", "lin", "rosa2"), 4: ("rosa1", "lin", "rosa2", "lin1", "rosa3", "lin2", "rosa4")}
# Of a QKV toy: the parts of a block of ours under upstream's names, which count from 1.
_PARTS = {"ln1": "ln{}a", "att": "rwkv{}", "ln2": "ln{}b", "ffn": "ffn{}", "ln3": "ln{}c", "rosa": "rosa{}"}
_RANKS = ("decay_rank", "iclr_rank", "value_rank", "gate_rank")
_TOP = {"emb": "e", "ln_out": "lno", "head": "o"}


class SelfToy(nn.Module):
    """Token ROSA and layers of the self form between linear ones, each added to the residual stream. No norm, no RWKV.

    Args:
        bits: 1, for upstream's toy of 251016 (rosa, linear, rosa); 4, for that of four 4-bit layers.
    """

    def __init__(self, vocab_size: int, n_embd: int, bits: int = 1):
        super().__init__()
        rosa = RosaConfig.preset(f"self-{bits}bit")
        self.e = nn.Embedding(vocab_size, n_embd)
        self.emb_rosa = RosaEmbed(vocab_size, n_embd, RosaConfig.preset("token"))
        self.names = _LAYERS[bits]
        for name in self.names:
            self.add_module(name, Rosa01Layer(n_embd, rosa) if name.startswith("rosa") else nn.Linear(n_embd, n_embd))
        self.o = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens: Tensor, state: list[RosaState] | None = None) -> tuple[Tensor, list[RosaState]]:
        """Logits (B, T, V) of tokens (B, T), and what token ROSA and the layers remember, to go on from."""
        recalling = [getattr(self, name) for name in ("emb_rosa", *self.names) if "rosa" in name]
        before = iter(state or [part.start(len(tokens)) for part in recalling])
        predicted, after = self.emb_rosa(tokens, next(before))
        x, states = self.e(tokens) + predicted, [after]
        for name in self.names:
            layer = getattr(self, name)
            if isinstance(layer, Rosa01Layer):
                out, after = layer(x, next(before))
                states.append(after)
            else:
                out = layer(x)
            x = x + out
        return self.o(x), states


class QKVToy(nn.Module):
    """Blocks of RWKV-7 with a ROSA branch of the 1-bit QKV form, without ln0, and a head with a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(1, config.n_layer + 1))  # 0 has an ln0
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) of tokens (B, T), and the state after them, to go on from."""
        x = self.emb(tokens)
        context = Lookup(tokens, x)
        state = state or State.zeros(self.config, len(tokens), x.device, x.dtype)
        branch, v_first, layers = None, None, []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x, branch, layer_state, v_first = block(x, branch, layer_state, v_first, context)
            layers.append(layer_state)
        return self.head(self.ln_out(x + branch)), State(tuple(layers))


def toy_from(tensors: Mapping[str, Tensor], source: object) -> SelfToy | QKVToy:
    """The toy that holds upstream's named tensors; every size is read from their shapes.

    Raises:
        CheckpointError: not one of these toys; a tensor that is missing, too many or of another shape.
    """
    try:
        with torch.device("meta"):
            if "rosa1.emb0" in tensors:
                toy = SelfToy(*tensors["e.weight"].shape, bits=4 if "rosa3.emb0" in tensors else 1)
            elif "rosa1.rosa_qkv.emb" in tensors:
                toy = QKVToy(_qkv_config(tensors))
            else:
                raise CheckpointError(f"{source}: no ROSA toy: wanted rosa1.emb0 or rosa1.rosa_qkv.emb, got neither")
    except KeyError as error:
        raise CheckpointError(f"{source}: tensor {error} is missing") from None
    ours = {_upstream(name) if isinstance(toy, QKVToy) else name: name for name in toy.state_dict()}
    for name in sorted(ours.keys() | tensors.keys()):
        if name not in tensors or name not in ours:
            what = "is missing" if name in ours else "is not part of such a toy"
            raise CheckpointError(f"{source}: tensor {name} {what}")
        wanted, got = tuple(toy.get_parameter(ours[name]).shape), tuple(tensors[name].shape)
        if wanted != got:
            raise CheckpointError(f"{source}: {name} must be {wanted}, got {got}")
    toy.load_state_dict({ours[name]: tensor for name, tensor in tensors.items()}, assign=True)
    return toy.requires_grad_(True)


def _qkv_config(tensors: Mapping[str, Tensor]) -> ModelConfig:
    vocab_size, n_embd = tensors["e.weight"].shape
    ranks: dict[str, Any] = {
        name: tensors[f"rwkv1.{letter}1"].shape[1] for name, letter in zip(_RANKS, "wavg", strict=True)
    }
    return ModelConfig(
        variant="v7",
        n_layer=sum(name.endswith(".rosa_qkv.emb") for name in tensors),
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=tensors["rwkv1.r_k"].shape[1],
        ffn_dim=tensors["ffn1.key.weight"].shape[0],
        rosa=RosaConfig.preset("qkv-1bit"),
        **ranks,
    )


def _upstream(name: str) -> str:
    """ "ln1c.bias" of "blocks.0.ln3.bias", "o.bias" of "head.bias"."""
    top, *rest = name.split(".")
    if top != "blocks":
        return ".".join((_TOP[top], *rest))
    number, part, *rest = rest
    return ".".join((_PARTS[part].format(int(number) + 1), *rest))
