"""The network, in reading order: token ids -> emb -> ln0 -> blocks -> ln_out -> head -> logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heron import ops
from heron.config import ModelConfig
from heron.errors import ConfigError, DataError
from heron.model.channel_mix import ChannelMix
from heron.model.init import initialize
from heron.model.state import LayerState, State
from heron.model.time_mix import TimeMix


class Block(nn.Module):
    """Time mixing and channel mixing, each on a LayerNorm of the residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)  # applied to the embedding, before the first block
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, tokens: Tensor
    ) -> tuple[Tensor, LayerState, Tensor]:
        """x (B, T, C) -> x (B, T, C), the block's new state, and layer 0's values for the blocks above."""
        out, att_shift, wkv, v_first = self.att(self.ln1(x), state.att_shift, state.wkv, v_first)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, tokens)
        return x + out, LayerState(att_shift, wkv, ffn_shift), v_first


class RWKV(nn.Module):
    """An RWKV-7 or RWKV-8 language model. `state_dict()` is the upstream .pth format, key for key.

    It starts from the reference initial values (:mod:`heron.model.init`), seeded by `torch.manual_seed`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # recompute each block in the backward pass
        # Built without memory first: the layers' own random initial values would only be thrown away.
        with torch.device("meta"):
            self.emb = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_out = nn.LayerNorm(config.n_embd)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        device = torch.get_default_device()
        if device.type != "meta":
            self.to_empty(device=device)
            initialize(self, config)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Next-token logits of a batch of sequences.

        Args:
            tokens: (B, T) integer ids, T >= 1.
            state: what the sequences left off with; None: zeros. Never changed in place; gradients flow into it.

        Returns:
            logits (B, T, V) and the state after the last token.

        Raises:
            DataError: T = 0, wrong shape or dtype, an id outside the vocabulary.
            ConfigError: a state of another model or batch size, or none at all.
        """
        hidden, state = self.hidden_states(tokens, state)
        return self.head(hidden), state

    def hidden_states(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As :meth:`forward`, without the head: (B, T) ids -> (B, T, C) outputs of ln_out, and the new state."""
        self._check_tokens(tokens)
        x = self.blocks[0].ln0(self.emb(tokens))
        if state is None:
            state = State.zeros(self.config, tokens.shape[0], x.device, x.dtype)
        elif not isinstance(state, State):
            raise ConfigError(f"state: wanted a State, got {type(state).__name__}; State.from_list makes one of a list")
        else:
            state.check(self.config, tokens.shape[0])

        v_first, layers = None, []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x, layer_state, v_first = checkpoint(block, x, layer_state, v_first, tokens, use_reentrant=False)
            else:
                x, layer_state, v_first = block(x, layer_state, v_first, tokens)
            layers.append(layer_state)
        return self.ln_out(x), State(tuple(layers))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats over the targets (B, T) that are not -100; L2Wrap acts in its backward."""
        hidden, _ = self.hidden_states(tokens)
        return ops.linear_cross_entropy(hidden, self.head.weight, targets)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise DataError(f"tokens: wanted (B, T) with T >= 1, got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(f"tokens: wanted int64 ids, got {tokens.dtype}")
        # On a GPU this would wait for the device; the data loader has checked every id by then.
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = torch.aminmax(tokens)
            if low < 0 or high >= self.config.vocab_size:
                raise DataError(
                    f"tokens: ids must be 0 to {self.config.vocab_size - 1} (vocab_size {self.config.vocab_size}), "
                    f"got {int(low)} to {int(high)}"
                )
