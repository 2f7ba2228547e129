"""The network, in reading order: token ids -> emb -> ln0 -> blocks -> ln_out -> head -> logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heron import ops
from heron.config import ModelConfig
from heron.errors import ConfigError
from heron.model import mixed_dtypes
from heron.model.attention import FirstAttention, SecondAttention
from heron.model.channel_mix import ChannelMix
from heron.model.deep_embed import Lookup
from heron.model.init import initialize
from heron.model.inputs import Embedding, check_recalled, checked_offsets, checked_tokens, integers, looked_up
from heron.model.memory import Recollection, RosaMemory, recall
from heron.model.plain import has_hooks, is_plain
from heron.model.rosa import RosaQKV
from heron.model.shift import Norm, normed, normed_and_mixed
from heron.model.state import LayerState, State, States, memories_of, with_memory
from heron.model.time_mix import TimeMix
from heron.ops._graph import in_graph
from heron.ops.spans import Span

_ATTENTION = {"v8-hybrid": FirstAttention, "v7b": SecondAttention}
_ZEROS: tuple[Any, ...] = (None,) * 5  # what a LayerState holds before the first token


class Block(nn.Module):
    """Time mixing and channel mixing, each on a LayerNorm of the residual stream and added to it.

    In v7b and v8-hybrid a third branch, DeepEmbedAttention, reads the residual stream itself; ROSA can be one more. A
    rosa-lm has ROSA in the place of time mixing.

    `compiled` stands in for :meth:`mix` where gradients are wanted; :mod:`heron.model.compiled` sets it. A block with
    a hook on a module inside runs as it is written: compiled code would not know of a hook that came later.
    """

    compiled: Callable[..., tuple[Tensor, Tensor, LayerState | None, Tensor | None]] | None = None

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = Norm(config.n_embd)  # applied to the embedding, where config.has_ln0
        if config.has_time_mix:
            self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer) if config.has_time_mix else None
        self.qkv = _ATTENTION[config.variant](config) if config.has_attention else None
        # In the order of modules initial values are drawn and the squares of gradients are summed: runs depend on it.
        if config.has_time_mix:
            self.ffn = ChannelMix(config)
        if config.rosa:
            self.ln3 = nn.LayerNorm(config.n_embd)
        self.rosa = RosaQKV(config.n_embd, config.rosa) if config.rosa else None
        if not config.has_time_mix:
            self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        state: LayerState | None,
        v_first: Tensor | None,
        context: Lookup,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = True,
        span: Span | None = None,
    ) -> tuple[Tensor, Tensor, LayerState | None, Tensor | None]:
        """One block. The residual stream goes from block to block in two parts: their sum belongs to the next norm.

        Args:
            x: (B, T, C), the residual stream but for `branch`.
            branch: (B, T, C), what the block before has to add to it; None: nothing.
            state: what the sequences left off with; None: zeros, for blocks of time mixing alone.
            v_first: (B, T, C), layer 0's values; None in layer 0.
            context: every token that attention can see, the T of x last; without attention it is those T.
            window: how many tokens attention sees; None: all.
            cu_seqlens, span: as for :func:`heron.ops.wkv7`, for blocks of time mixing alone.
            keep_state: whether the new state is wanted. Where it is not, its gradient need not be computed either.

        Returns:
            x, what this block has to add to it, the new state or None, and layer 0's values for the blocks above.
        """
        tokens = context.last(x.shape[1])
        mix = self.compiled if self.compiled is not None and self._may_run_compiled() else Block.mix
        # Tables are looked up out here: compiled code would sum the gradients of their rows in an order that changes.
        of_table = self.ffn.table_rows(tokens)
        seen = None if self.qkv is None else context
        x, branch, state, v_first = mix(
            self, x, branch, state, v_first, of_table, seen, window, cu_seqlens, keep_state, span
        )
        return x, self.ffn.gate(branch, tokens.ids), state, v_first

    def _may_run_compiled(self) -> bool:
        outside = (self, getattr(self, "ln0", None))  # ln0 is called before the block is
        inside = (module for module in self.modules() if all(module is not other for other in outside))
        return torch.is_grad_enabled() and not any(map(has_hooks, inside))

    def mix(
        self,
        x: Tensor,
        branch: Tensor | None,
        state: LayerState | None,
        v_first: Tensor | None,
        of_table: Tensor | None,
        context: Lookup | None,
        window: int | None,
        cu_seqlens: Tensor | None,
        keep_state: bool,
        span: Span | None = None,
    ) -> tuple[Tensor, Tensor, LayerState | None, Tensor | None]:
        """:meth:`forward` between the tables: `of_table` (B, T, width) are the channel mix's rows, if it has any."""
        att_shift, wkv, ffn_shift, attention, rosa = _ZEROS if state is None else state
        if self.att is not None:
            x, branch, att_shift, wkv, v_first = self.att(
                partial(normed_and_mixed, self.ln1, span), x, branch, att_shift, wkv, v_first, cu_seqlens, span
            )
        elif branch is not None:
            x, branch = x + branch, None
        if self.qkv is not None:
            looked_back, attention = self.qkv(x, attention, context, window)
            branch = branch + looked_back
        if self.rosa is not None:
            recalled, rosa = self.rosa(self.ln3(x), rosa)
            branch = recalled if branch is None else branch + recalled
        x, out, shift = self.ffn(partial(normed_and_mixed, self.ln2, span), x, branch, ffn_shift, of_table, cu_seqlens)
        return x, out, LayerState(att_shift, wkv, shift, attention, rosa) if keep_state else None, v_first


class RWKV(nn.Module):
    """An RWKV-7 or RWKV-8 language model. `state_dict()` is the upstream .pth format, key for key.

    It starts from the reference initial values (:mod:`heron.model.init`), seeded by `torch.manual_seed`. Two plain
    attributes say how it runs: `grad_checkpoint`, and `attention_window`, which bounds what DeepEmbedAttention (v7b,
    v8-hybrid) reads and remembers (upstream has no such bound).

    A layer may be replaced or hooked (adapters, quantized layers): what is not plain is called.
    """

    def __init__(self, config: ModelConfig | str | Mapping[str, Any]):
        """`config` may be a preset's name, or a mapping of settings. ConfigError for what is none of these."""
        super().__init__()
        if isinstance(config, str):
            if config.endswith((".pth", ".safetensors", ".gguf")):
                raise ConfigError(f"model: {config} is a file; heron.load({config!r}) makes the model that it holds")
            config = ModelConfig.preset(config)
        elif isinstance(config, Mapping):
            config = ModelConfig.from_dict(config)
        if not isinstance(config, ModelConfig):
            kind = type(config).__name__
            raise ConfigError(f"model: wanted a ModelConfig, a preset's name or a mapping, got {kind}")
        self.config = config
        self.grad_checkpoint = False  # recompute each block in the backward pass
        self.mixes_dtypes = False  # whether weights were loaded in several dtypes: they compute in the widest of them
        self.attention_window: int | None = None  # tokens that DeepEmbedAttention looks back on; None: all
        # Built without memory first: the layers' own random initial values would only be thrown away.
        with torch.device("meta"):
            self.emb = Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_out = Norm(config.n_embd)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.memory = RosaMemory(config) if config.memory else None
        device = torch.get_default_device()
        if device.type != "meta":
            self._apply(lambda weight: torch.empty(weight.shape, device=device))  # to_empty takes as long as all else
            initialize(self, config)

    def forward(
        self,
        tokens: Tensor,
        state: States | None = None,
        cu_seqlens: Tensor | None = None,
        recalled: Tensor | None = None,
    ) -> tuple[Tensor, States]:
        """Next-token logits of a batch of sequences.

        Args:
            tokens: (B, T) integer ids, T >= 1; lists and NumPy arrays of such are taken as well.
            state: what the sequences left off with; None: zeros. Never changed in place; gradients flow into it.
            cu_seqlens: (n_seq + 1,) int32 or int64 on the device of `tokens`, or a list: sequences packed along T with
                B = 1, as in :func:`heron.ops.wkv7`. Each is as if it were alone, with a state of its own.
            recalled: (B, T, K, 2) int64, what ROSA memory found for the tokens elsewhere (:mod:`heron.model.memory`);
                what the state remembers stays as it is then. None: it is found in the tokens that the state has read
                and in these.

        Returns:
            logits (B, T, V) and the state after the last token. With `cu_seqlens` that is a state of n_seq sequences;
            of a model whose states grow (attention, ROSA) it is a tuple of n_seq states, and so is `state`.

        Raises:
            DataError: T = 0, wrong shape or dtype, an id outside the vocabulary.
            ConfigError: a state of another model or batch size, or none at all; an attention_window below 1;
                `cu_seqlens` that do not go from 0 to T.
        """
        if self.mixes_dtypes and (widest := mixed_dtypes.widest(self)) is not None:
            return mixed_dtypes.call_in(widest, RWKV.forward, self, tokens, state, cu_seqlens, recalled)
        recalled, memory = self.recall(tokens, state, cu_seqlens, recalled)
        hidden, state = self._hidden_states(tokens, state, cu_seqlens, None, True, recalled)
        return self.logits(hidden, recalled), with_memory(state, memory)

    def logits(self, hidden: Tensor, recalled: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of what :meth:`hidden_states` gave, with the bonus of what memory `recalled`."""
        logits = self.head(hidden)
        return logits if self.memory is None or recalled is None else self.memory.add_to(logits, recalled)

    def recall(
        self, tokens: Tensor, state: States | None, cu_seqlens: Tensor | None = None, recalled: Tensor | None = None
    ) -> tuple[Tensor | None, tuple[Recollection, ...] | None]:
        """What ROSA memory finds for (B, T) ids behind `state`: `recalled` (B, T, K, 2), and the memories after them.

        Where `recalled` is given it is looked at and handed on; memories are as they were. A model without memory: None
        and None.

        Raises:
            ConfigError: `recalled` of another shape or dtype, with an id or a length that can't be, or for a model
                without memory; tokens inside a graph; the memories of another number of sequences.
        """
        rosa = self.config.memory
        if rosa is None:
            if recalled is not None:
                raise ConfigError("recalled: this model has no ROSA memory; leave it out")
            return None, None
        tokens = checked_tokens(tokens, self.config.vocab_size, self.emb)
        if recalled is not None:
            check_recalled(recalled, tokens, self.config.vocab_size, rosa)
            return recalled, None
        if in_graph():
            raise ConfigError("recalled: inside a graph what memory found must be given; model.recall finds it before")
        if cu_seqlens is not None:
            cu_seqlens = checked_offsets(cu_seqlens, tokens)
        n_seq = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return recall(tokens, memories_of(state, n_seq), rosa, cu_seqlens)

    def read(
        self,
        tokens: Tensor,
        state: States | None = None,
        cu_seqlens: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, States, Tensor | None]:
        """:meth:`hidden_states`, and as the third what memory recalled, for :meth:`logits` and :meth:`head_loss`."""
        recalled, memory = self.recall(tokens, state, cu_seqlens)
        hidden, state = self.hidden_states(tokens, state, cu_seqlens, embeddings, recalled=recalled)
        return hidden, with_memory(state, memory), recalled

    def hidden_states(
        self,
        tokens: Tensor,
        state: States | None = None,
        cu_seqlens: Tensor | None = None,
        embeddings: Tensor | None = None,
        keep_state: bool = True,
        recalled: Tensor | None = None,
    ) -> tuple[Tensor, States | None]:
        """As :meth:`forward`, without the head: (B, T) ids -> (B, T, C) outputs of ln_out, and the new state.

        `embeddings` (B, T, C) stand in for the rows of emb; tables are still looked up by the ids. Without `keep_state`
        no state is returned.
        """
        if self.mixes_dtypes and (widest := mixed_dtypes.widest(self)) is not None:
            return mixed_dtypes.call_in(
                widest, RWKV.hidden_states, self, tokens, state, cu_seqlens, embeddings, keep_state, recalled
            )
        recalled, memory = self.recall(tokens, state, cu_seqlens, recalled)
        hidden, state = self._hidden_states(tokens, state, cu_seqlens, embeddings, keep_state, recalled)
        return hidden, None if state is None else with_memory(state, memory)

    def _hidden_states(
        self,
        tokens: Tensor,
        state: States | None,
        cu_seqlens: Tensor | None,
        embeddings: Tensor | None,
        keep_state: bool,
        recalled: Tensor | None,
        span: Span | None = None,
    ) -> tuple[Tensor, States | None]:
        """:meth:`hidden_states`, where memory has been asked. The new state remembers what the old one did."""
        if span is not None and (self.config.state_grows or self.memory is not None):
            raise ConfigError(f"span: {self.config.variant} with attention or ROSA needs the whole text in one place")
        tokens = checked_tokens(tokens, self.config.vocab_size, self.emb)
        window = self.attention_window
        if window is not None and window < 1:
            raise ConfigError(f"attention_window: wanted at least 1, or None for all tokens, got {window}")
        if cu_seqlens is not None:
            cu_seqlens = checked_offsets(cu_seqlens, tokens)
        n_seq = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cu_seqlens is not None and self.config.state_grows:
            return self._one_after_another(tokens, state, cu_seqlens, embeddings, keep_state, recalled)
        rows, begun = self._rows(tokens, recalled, embeddings)
        if state is None:
            zeros = State.zeros(self.config, n_seq, tokens.device, rows.dtype) if self.config.state_grows else None
            old, past = (None,) * len(self.blocks) if zeros is None else zeros.layers, zeros and zeros.tokens
        elif not isinstance(state, State):
            raise ConfigError(f"state: wanted a State, got {type(state).__name__}; State.from_list makes one of a list")
        else:
            state.check(self.config, n_seq)
            old, past = state.layers, state.tokens  # the ids of the context, where attention needs them

        ids = tokens if past is None else torch.cat((past, tokens), dim=1)
        in_context = rows if past is None else torch.cat((looked_up(self.emb, past), rows), dim=1)
        if begun is rows:
            context = Lookup(ids, self._first_norm(in_context))
            x = context.last(tokens.shape[1]).embedded  # (B, T, C)
        else:  # tables and attention look tokens up, not what memory adds to them
            x = self._first_norm(begun)
            context = Lookup(ids, self._first_norm(in_context) if self.config.reads_embedded else x)
        if not self.config.reads_embedded:  # a sharded block would hand back a gradient of zeros, to be added each time
            context = context.detached()
        branch: Any = None
        v_first, new = None, []
        for block, layer_state in zip(self.blocks, old, strict=True):
            arguments = (x, branch, layer_state, v_first, context, window, cu_seqlens, keep_state, span)
            if self.grad_checkpoint and torch.is_grad_enabled():
                # With its random state: an adapter may drop activations, and must drop the same ones again.
                x, branch, layer_state, v_first = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, branch, layer_state, v_first = block(*arguments)
            new.append(layer_state)
        hidden = normed(self.ln_out, x, branch)
        if not keep_state:
            return hidden, None
        state = State(tuple(new), None if past is None else ids, None if state is None else state.memory)
        return hidden, state if window is None else state.latest(window)

    def _one_after_another(
        self,
        tokens: Tensor,
        states: States | None,
        cu_seqlens: Tensor,
        embeddings: Tensor | None,
        keep_state: bool,
        recalled: Tensor | None,
    ) -> tuple[Tensor, tuple[State, ...] | None]:
        """:meth:`hidden_states` of packed sequences whose states have different lengths: each in a pass of its own."""
        offsets = cu_seqlens.tolist()
        n_seq = len(offsets) - 1
        if states is not None and (not isinstance(states, tuple) or len(states) != n_seq):
            got = len(states) if isinstance(states, tuple) else type(states).__name__
            raise ConfigError(f"state: wanted a tuple of {n_seq} states, one a packed sequence, got {got}")
        outputs, new = [], []
        for i, (begin, end) in enumerate(pairwise(offsets)):
            state = None if states is None else states[i]
            if begin < end:
                part = None if embeddings is None else embeddings[:, begin:end]
                found = None if recalled is None else recalled[:, begin:end]
                hidden, state = self._hidden_states(tokens[:, begin:end], state, None, part, keep_state, found)
                outputs.append(hidden)
            elif state is None:
                state = State.zeros(self.config, 1, tokens.device, self.emb.weight.dtype)
            new.append(state)
        return torch.cat(outputs, dim=1), tuple(new) if keep_state else None

    def embed(self, tokens: Tensor, recalled: Tensor | None = None) -> Tensor:
        """The first activations (..., C) of token ids (...): their rows of emb, through ln0 where the model has it.

        With what memory `recalled` (..., K, 2) it is added to the rows, which tables and attention do without.
        """
        rows = self.emb(tokens)
        if self.memory is not None and recalled is not None:
            predicted, lengths = recalled.unbind(dim=-1)
            rows = self.memory(lengths, rows, self.emb(predicted.movedim(-1, 0)))
        return self._first_norm(rows)

    def _rows(self, tokens: Tensor, recalled: Tensor | None, embeddings: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows (..., C) of emb for token ids (...), or `embeddings`; and these with what memory `recalled` adds."""
        if self.memory is None or recalled is None:
            rows = looked_up(self.emb, tokens) if embeddings is None else embeddings
            return rows, rows
        predicted, lengths = recalled.unbind(dim=-1)
        # Where there is no match, the token's own row: a batch of gradients of one row would be added up one by one.
        predicted = torch.where(lengths > 0, predicted, tokens.unsqueeze(-1)).movedim(-1, 0)
        if embeddings is None:  # one look-up: the gradients of all rows are then put together once
            rows = looked_up(self.emb, torch.cat((tokens.unsqueeze(0), predicted)))
        else:
            rows = torch.cat((embeddings.unsqueeze(0), self.emb(predicted).to(embeddings.dtype)))
        return rows[0], self.memory.begun(rows, lengths)

    def _first_norm(self, x: Tensor) -> Tensor:
        return normed(self.blocks[0].ln0, x) if self.config.has_ln0 else x  # pyright: ignore[reportArgumentType]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None = None,
        recalled: Tensor | None = None,
        state: States | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """Mean cross entropy in nats over the targets (B, T) that are not -100; L2Wrap acts in its backward.

        `cu_seqlens`, `recalled`, `state` as for :meth:`forward`. `span`: part of a longer text (:mod:`heron.context`).
        """
        if self.mixes_dtypes and (widest := mixed_dtypes.widest(self)) is not None:
            return mixed_dtypes.call_in(widest, RWKV.loss, self, tokens, targets, cu_seqlens, recalled, state, span)
        targets = integers("targets", targets, self.emb)
        recalled, _ = self.recall(tokens, state, cu_seqlens, recalled)
        hidden, _ = self._hidden_states(tokens, state, cu_seqlens, None, False, recalled, span)
        return self.head_loss(hidden, targets, recalled)

    def head_loss(self, hidden: Tensor, targets: Tensor, recalled: Tensor | None = None, l2wrap=1e-4) -> Tensor:
        """:meth:`loss` of what :meth:`hidden_states` gave. A head that is not plain (an adapter) is called."""
        bonus = None if self.memory is None or recalled is None else self.memory.bonus(recalled)
        if is_plain(self.head, nn.Linear):
            return ops.linear_cross_entropy(hidden, self.head.weight, targets, l2wrap, bonus=bonus)
        return ops.cross_entropy(self.logits(hidden, recalled), targets, l2wrap)

    def load_state_dict(self, *arguments: Any, **settings: Any) -> Any:
        """As everywhere in PyTorch; dtypes that were assigned may differ from tensor to tensor."""
        keys = super().load_state_dict(*arguments, **settings)
        self.mixes_dtypes = mixed_dtypes.widest(self) is not None
        return keys
