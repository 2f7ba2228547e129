"""The network, in reading order: token ids -> emb -> ln0 -> blocks -> ln_out -> head -> logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heron import ops
from heron.config import ModelConfig
from heron.errors import ConfigError, DataError
from heron.model.attention import FirstAttention, SecondAttention
from heron.model.channel_mix import ChannelMix
from heron.model.deep_embed import Lookup
from heron.model.init import initialize
from heron.model.plain import is_plain
from heron.model.rosa import RosaBlock, RosaQKV
from heron.model.state import LayerState, State
from heron.model.time_mix import TimeMix

_ATTENTION = {"v8-hybrid": FirstAttention, "v7b": SecondAttention}


class Block(nn.Module):
    """Time mixing and channel mixing, each on a LayerNorm of the residual stream and added to it.

    In v7b and v8-hybrid a third branch, DeepEmbedAttention, reads the residual stream itself; ROSA can be one more.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)  # applied to the embedding, where config.has_ln0
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.qkv = _ATTENTION[config.variant](config) if config.has_attention else None
        self.ffn = ChannelMix(config)
        self.ln3 = nn.LayerNorm(config.n_embd) if config.rosa else None
        self.rosa = RosaQKV(config.n_embd, config.rosa) if config.rosa else None

    def forward(
        self, x: Tensor, state: LayerState, v_first: Tensor | None, context: Lookup, window: int | None
    ) -> tuple[Tensor, LayerState, Tensor]:
        """x (B, T, C) -> x (B, T, C), the block's new state, and layer 0's values for the blocks above.

        `context` is every token that attention can see, the T of x last; without attention it is those T.
        """
        of_table = self.ffn.table_rows(context.last(x.shape[1]))
        return self.branches(x, state, v_first, of_table, context, window)

    def from_zero(
        self, x: Tensor, branch: Tensor | None, v_first: Tensor | None, of_table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`forward` from a zero state that nobody reads afterwards, without attention or ROSA.

        It is what a training step needs, and what :mod:`heron.compilation` compiles. The residual stream goes from
        block to block in two parts, for their sum belongs to the one kernel with the norm behind it.

        Args:
            x: (B, T, C).
            branch: (B, T, C), what the block before has to add to x; None: nothing.
            v_first: as for :meth:`branches`.
            of_table: too, but a gate on the output is left to the caller: its gradient is summed in one order there.

        Returns:
            x, what this block has to add to it, and layer 0's values for the blocks above.
        """
        x, mixed, _ = ops.shift_mix(x, branch, self.ln1.weight, self.ln1.bias, self.att.mixes, eps=self.ln1.eps)
        branch, _, v_first = self.att.from_mixed(mixed, None, v_first)
        x, mixed, _ = ops.shift_mix(x, branch, self.ln2.weight, self.ln2.bias, self.ffn.mixes, eps=self.ln2.eps)
        return x, self.ffn.from_mixed(mixed[0], mixed[-1], of_table), v_first

    def branches(
        self,
        x: Tensor,
        state: LayerState,
        v_first: Tensor | None,
        of_table: Tensor | None,
        context: Lookup | None,
        window: int | None,
    ) -> tuple[Tensor, LayerState, Tensor]:
        """:meth:`forward` with the rows of the block's own table looked up: `of_table` (B, T, width), None without."""
        out, att_shift, wkv, v_first = self.att(self.ln1(x), state.att_shift, state.wkv, v_first)
        attention = rosa = None
        if self.qkv is not None:
            looked_back, attention = self.qkv(x, state.attention, context, window)
            out = out + looked_back
        if self.rosa is not None:
            recalled, rosa = self.rosa(self.ln3(x), state.rosa)
            out = out + recalled
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, of_table)
        return x + out, LayerState(att_shift, wkv, ffn_shift, attention, rosa), v_first


class RWKV(nn.Module):
    """An RWKV-7 or RWKV-8 language model. `state_dict()` is the upstream .pth format, key for key.

    It starts from the reference initial values (:mod:`heron.model.init`), seeded by `torch.manual_seed`. Three plain
    attributes say how it runs: `grad_checkpoint`; `attention_window`, which bounds what DeepEmbedAttention (v7b,
    v8-hybrid) reads and remembers (upstream has no such bound); and `compiled_block`.

    A linear layer, an embedding or a norm may be replaced or hooked (adapters, quantized layers): what is not plain is
    called. `compiled_block` alone reads the weights of ln1, ln2 and ln_x; it is for networks whose norms are plain.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # recompute each block in the backward pass
        self.compiled_block: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None  # Block.from_zero, for `loss`
        self.attention_window: int | None = None  # tokens that DeepEmbedAttention looks back on; None: all
        # Built without memory first: the layers' own random initial values would only be thrown away.
        with torch.device("meta"):
            self.emb = nn.Embedding(config.vocab_size, config.n_embd)
            block = Block if config.has_time_mix else RosaBlock
            self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
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
            ConfigError: a state of another model or batch size, or none at all; an attention_window below 1.
        """
        hidden, state = self.hidden_states(tokens, state)
        return self.head(hidden), state

    def hidden_states(
        self, tokens: Tensor, state: State | None = None, embeddings: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As :meth:`forward`, without the head: (B, T) ids -> (B, T, C) outputs of ln_out, and the new state.

        `embeddings` (B, T, C) stand in for the rows of emb; tables are still looked up by the ids.
        """
        self._check_tokens(tokens)
        window = self.attention_window
        if window is not None and window < 1:
            raise ConfigError(f"attention_window: wanted at least 1, or None for all tokens, got {window}")
        rows = self.emb(tokens) if embeddings is None else embeddings
        if state is None:
            state = State.zeros(self.config, tokens.shape[0], tokens.device, rows.dtype)
        elif not isinstance(state, State):
            raise ConfigError(f"state: wanted a State, got {type(state).__name__}; State.from_list makes one of a list")
        else:
            state.check(self.config, tokens.shape[0])

        past = state.tokens  # the ids of the context, where attention needs them
        ids = tokens if past is None else torch.cat((past, tokens), dim=1)
        rows = rows if past is None else torch.cat((self.emb(past), rows), dim=1)
        context = Lookup(ids, self._first_norm(rows))
        x = context.last(tokens.shape[1]).embedded  # (B, T, C)
        v_first, layers = None, []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            arguments = (x, layer_state, v_first, context, window)
            if self.grad_checkpoint and torch.is_grad_enabled():
                # With its random state: an adapter may drop activations, and must drop the same ones again.
                x, layer_state, v_first = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, layer_state, v_first = block(*arguments)
            layers.append(layer_state)
        state = State(tuple(layers), None if past is None else ids)
        return self.ln_out(x), state if window is None else state.latest(window)

    def embed(self, tokens: Tensor) -> Tensor:
        """The first activations (..., C) of token ids (...): their rows of emb, through ln0 where the model has it."""
        return self._first_norm(self.emb(tokens))

    def _first_norm(self, x: Tensor) -> Tensor:
        return self.blocks[0].ln0(x) if self.config.has_ln0 else x

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats over the targets (B, T) that are not -100; L2Wrap acts in its backward."""
        if self.compiled_block is not None and torch.is_grad_enabled():
            hidden = self._compiled_hidden_states(tokens)
        else:
            hidden, _ = self.hidden_states(tokens)
        return self.head_loss(hidden, targets)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """:meth:`loss` of what :meth:`hidden_states` gave. A head that is not plain (an adapter) is called."""
        if is_plain(self.head, nn.Linear):
            return ops.linear_cross_entropy(hidden, self.head.weight, targets)
        return ops.cross_entropy(self.head(hidden), targets)

    def _compiled_hidden_states(self, tokens: Tensor) -> Tensor:
        """:meth:`hidden_states` from a zero state, block by compiled block.

        Tables are looked up between the blocks: compiled, their gradients would be summed in an order that changes.
        """
        self._check_tokens(tokens)
        context = Lookup(tokens, self.embed(tokens))
        x, branch, v_first = context.embedded, None, None
        for block in self.blocks:
            arguments = (block, x, branch, v_first, context)
            if self.grad_checkpoint:
                x, branch, v_first = checkpoint(
                    self._run_compiled, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, branch, v_first = self._run_compiled(*arguments)
        return self.ln_out(x + branch)

    def _run_compiled(
        self, block: Block, x: Tensor, branch: Tensor | None, v_first: Tensor | None, context: Lookup
    ) -> tuple[Tensor, Tensor, Tensor]:
        ffn = block.ffn
        gates_output = ffn.form == "output"
        of_table = None if gates_output else ffn.table_rows(context)
        x, branch, v_first = self.compiled_block(block, x, branch, v_first, of_table)
        return x, ffn.enn.gate(branch, context.ids) if gates_output else branch, v_first

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise DataError(f"tokens: wanted (B, T) with B, T >= 1, got {tuple(tokens.shape)}")
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
