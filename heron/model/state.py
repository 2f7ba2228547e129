"""What a model remembers between calls: per layer two shifted activations and one WKV matrix per head, which keep their
size, and what DeepEmbedAttention and ROSA saw, which grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from heron.config import ModelConfig
from heron.errors import ConfigError
from heron.model.memory import Recollection
from heron.ops._graph import in_graph

DEA_WIDTH, DEA_RANK = 256, 32  # of DeepEmbedAttention's queries and keys, and of its codes
ROSA_BYTES = 5  # a stream of ROSA and a token: three symbols and a match length (7 beyond 32768 tokens)


class AttentionState(NamedTuple):
    """What DeepEmbedAttention remembers in one block (v7b, v8-hybrid), of the t tokens so far."""

    k_codes: Tensor  # (B, t, 32)
    v_codes: Tensor  # (B, t, 32)
    last_query: Tensor | None  # (B, 256), before token shift and norm; v7b alone


class RosaState(NamedTuple):
    """What ROSA remembers of the t tokens so far, in G streams a sequence."""

    symbols: Tensor  # (B, 3, G, t) uint8: queries, keys, values; (B, 1, G, t) where all are the same; token ids int64
    shift: Tensor | None  # (B, C), the last input, for the token shift of RosaQKV (after ln3)
    lengths: Tensor | None  # (B, G, t), of the matches at the last token, by distance; None: a step will find them

    @classmethod
    def empty(cls, batch_size: int, kinds: int, streams: int, device: torch.device, shift: Tensor | None) -> RosaState:
        """Before the first token; `kinds` is 3 or 1."""
        symbols = torch.zeros(batch_size, kinds, streams, 0, device=device, dtype=torch.uint8)
        return cls(symbols, shift, None)


class LayerState(NamedTuple):
    """What one block remembers."""

    att_shift: Tensor  # (B, C), the last input of the time mix (after ln1); (B, 0) in a rosa-lm
    wkv: Tensor  # (B, H, N_value, N_key), fp32 (fp64 in a fp64 model); H = 0 in a rosa-lm
    ffn_shift: Tensor  # (B, C), the last input of the channel mix (after ln2)
    attention: AttentionState | None = None
    rosa: RosaState | None = None


@dataclasses.dataclass(frozen=True)
class State:
    """One :class:`LayerState` per block. The model never changes a state in place: each call returns a new one.

    Its size is the same after one token and after a million, with two exceptions. DeepEmbedAttention adds 64 values per
    layer and one int64 id with each token, up to `model.attention_window` tokens where that is set. ROSA adds 5 bytes
    per stream, layer and token (7 beyond 32768 tokens), without a bound. ROSA memory adds 12 to 24 bytes a token, up to
    its window where it has one.
    """

    layers: tuple[LayerState, ...]
    tokens: Tensor | None = None  # (B, t) int64, the ids of the context; v7b and v8-hybrid alone
    memory: tuple[Recollection, ...] | None = None  # of ROSA memory, one a sequence; None: nothing read

    @classmethod
    def zeros(cls, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token. `dtype` is that of the activations; the WKV part is at least fp32."""
        wkv_dtype = torch.promote_types(dtype, torch.float32)
        shift = torch.zeros(batch_size, config.n_embd, device=device, dtype=dtype)
        att_shift = shift if config.has_time_mix else shift[:, :0].clone()
        wkv = torch.zeros(batch_size, config.n_head, config.head_size, config.head_size, device=device, dtype=wkv_dtype)
        attention = tokens = None
        if config.has_attention:
            codes = torch.zeros(batch_size, 0, DEA_RANK, device=device, dtype=dtype)
            query = torch.zeros(batch_size, DEA_WIDTH, device=device, dtype=dtype) if config.variant == "v7b" else None
            attention = AttentionState(codes, codes, query)
            tokens = torch.zeros(batch_size, 0, device=device, dtype=torch.int64)
        rosa = None
        if config.rosa is not None:
            streams = config.n_embd // config.rosa.bits
            rosa = RosaState.empty(batch_size, 3, streams, device, shift if config.rosa.token_shift else None)
        layer = LayerState(att_shift, wkv, shift, attention, rosa)
        return cls((layer,) * config.n_layer, tokens)

    @property
    def batch_size(self) -> int:
        """Number of sequences (B)."""
        return self.layers[0].wkv.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the whole state takes."""
        ids = 0 if self.tokens is None else self.tokens.nbytes
        ids += sum(memory.nbytes for memory in self.memory or ())
        return ids + sum(part.nbytes for layer in self.layers for _, part in _parts(layer))

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """A new state with `function` applied to every tensor, token ids too; memories stay as they are."""
        tokens = None if self.tokens is None else function(self.tokens)
        return State(tuple(_mapped(layer, function) for layer in self.layers), tokens, self.memory)

    def of(self, sequences: Sequence[int]) -> State:
        """The state of these of its sequences, of each as often as it is named."""
        kept = torch.tensor(sequences, dtype=torch.int64)
        state = self.map(lambda part: part.index_select(0, kept.to(part.device)))
        if self.memory is None:
            return state
        memory = []
        for i, sequence in enumerate(
            sequences
        ):  # of one that comes again a copy, which shares no stream with the first
            is_first = sequences.index(sequence) == i
            memory.append(self.memory[sequence] if is_first else self.memory[sequence].clone())
        return dataclasses.replace(state, memory=tuple(memory))

    @classmethod
    def joined(cls, states: Sequence[State]) -> State:
        """One state of the sequences of several, whose contexts under attention and ROSA layers have one length."""
        parts = [dataclasses.replace(state, memory=None).to_list() for state in states]
        memories = [state.memory or (Recollection(),) * state.batch_size for state in states]
        has_memory = any(state.memory for state in states)
        joined = cls.from_list([torch.cat(part) for part in zip(*parts, strict=True)])
        return dataclasses.replace(joined, memory=tuple(chain(*memories))) if has_memory else joined

    def detach(self) -> State:
        """The same numbers, cut off from the graph: what truncated backpropagation through time hands on."""
        return self.map(Tensor.detach)

    def clone(self) -> State:
        """A copy that shares no memory."""
        return self.fork().map(Tensor.clone)

    def fork(self) -> State:
        """The same state to go on from, without a trace in this one: tensors are shared, memories are copies."""
        memory = None if self.memory is None else tuple(one.clone() for one in self.memory)
        return dataclasses.replace(self, memory=memory)

    def to(self, device: torch.device | str) -> State:
        """The state on another device, dtypes kept."""
        return self.map(lambda part: part.to(device))

    def latest(self, n: int) -> State:
        """The state in which DeepEmbedAttention remembers the last `n` tokens only, in memory of their own."""
        if self.tokens is None or self.tokens.shape[1] <= n:
            return self
        layers = []
        for layer in self.layers:
            if (old := layer.attention) is not None:
                attention = AttentionState(old.k_codes[:, -n:].clone(), old.v_codes[:, -n:].clone(), old.last_query)
                layer = layer._replace(attention=attention)
            layers.append(layer)
        return State(tuple(layers), self.tokens[:, -n:].clone(), self.memory)

    def to_list(self) -> list[Tensor]:
        """Upstream's flat list: att shift, wkv, ffn shift of block 0, then of block 1, ...

        Under DeepEmbedAttention the token ids follow, then key and value codes of block 0, of block 1, ..., and in v7b
        the last query of each block. What ROSA remembers follows: of each block the symbols, and where they are
        there, the shift and the lengths. ROSA memory comes last: of each sequence the ids that later matches depend on,
        int32.
        """
        of_memory = [memory.tokens().to(torch.int32).unsqueeze(0) for memory in self.memory or ()]
        parts = [part for layer in self.layers for part in (layer.att_shift, layer.wkv, layer.ffn_shift)]
        rosa = [part for layer in self.layers for part in layer.rosa or () if part is not None]
        if self.tokens is None:
            return [*parts, *rosa, *of_memory]
        attention = [layer.attention for layer in self.layers if layer.attention is not None]
        codes = [part for memory in attention for part in (memory.k_codes, memory.v_codes)]
        queries = [memory.last_query for memory in attention if memory.last_query is not None]
        return [*parts, self.tokens, *codes, *queries, *rosa, *of_memory]

    @classmethod
    def from_list(cls, parts: Sequence[Tensor]) -> State:
        """The inverse of :meth:`to_list`. Where a section begins shows in the dtype: of ids int64, of symbols uint8, of
        the ids of ROSA memory int32, (1, t)."""
        memory_at = next(
            (i for i, part in enumerate(parts) if part.dtype == torch.int32 and part.dim() == 2), len(parts)
        )
        memory = tuple(Recollection(part[0].long()) for part in parts[memory_at:]) or None
        parts = parts[:memory_at]
        rosa_at = next((i for i, part in enumerate(parts) if part.dtype == torch.uint8), len(parts))
        parts, rosa = parts[:rosa_at], _rosa_states(parts[rosa_at:])
        n = next((i for i, part in enumerate(parts) if not part.is_floating_point()), len(parts))
        n_layer, attention = n // 3, parts[n + 1 :]
        fits = n > 0 and n % 3 == 0 and (n == len(parts) or len(attention) in (2 * n_layer, 3 * n_layer))
        if not fits or len(rosa) not in (0, n_layer):
            raise ConfigError(
                "state list: wanted 3 tensors per layer, for DeepEmbedAttention the token ids and 2 or 3 more per "
                f"layer, and for ROSA 1 to 3 more per layer, got {rosa_at} tensors and ROSA's of {len(rosa)} layers"
            )
        layers = [LayerState(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, n, 3)]
        if rosa:
            layers = [layer._replace(rosa=memory) for layer, memory in zip(layers, rosa, strict=True)]
        if n == len(parts):
            return cls(tuple(layers), None, memory)
        queries = attention[2 * n_layer :] or [None] * n_layer
        memories = map(AttentionState, attention[0 : 2 * n_layer : 2], attention[1 : 2 * n_layer : 2], queries)
        layers = (layer._replace(attention=memory) for layer, memory in zip(layers, memories, strict=True))
        return cls(tuple(layers), parts[n], memory)

    def to_runtime(self) -> list[Tensor]:
        """The list that upstream's runtimes (the `rwkv` package, the demos) keep: :meth:`to_list` of one sequence.

        att shift (C,), wkv (H, N_value, N_key), ffn shift (C,) per block. ConfigError for more than one sequence.
        """
        if self.batch_size != 1:
            raise ConfigError(f"state: a runtime's list holds one sequence, this state has {self.batch_size}")
        return [part.squeeze(0) for part in self.to_list()]

    @classmethod
    def from_runtime(cls, parts: Sequence[Tensor]) -> State:
        """The inverse of :meth:`to_runtime`."""
        return cls.from_list([part.unsqueeze(0) for part in parts])

    def check(self, config: ModelConfig, batch_size: int) -> None:
        """Refuse a state that another model or another batch size made (ConfigError)."""
        if len(self.layers) != config.n_layer:
            raise ConfigError(f"state: wanted {config.n_layer} layers, got {len(self.layers)}")
        if (self.tokens is not None) != config.has_attention:
            has = "without" if self.tokens is None else "with"
            raise ConfigError(f"state: wanted one of a {config.variant} model, got one {has} a context of token ids")
        if self.memory is not None and (config.memory is None or len(self.memory) != batch_size):
            wanted = "none" if config.memory is None else str(batch_size)
            raise ConfigError(f"state: wanted the ROSA memories of {wanted} sequences, got {len(self.memory)}")
        for memory in () if in_graph() else self.memory or ():
            memory.check(config.vocab_size)
        n_past = 0
        if self.tokens is not None:
            n_past = self.tokens.shape[-1]
            if self.tokens.shape != (batch_size, n_past):
                raise ConfigError(f"state, tokens: wanted {(batch_size, n_past)}, got {tuple(self.tokens.shape)}")
            readable = self.tokens.device.type == "cpu" and not in_graph()
            if readable and ((self.tokens < 0) | (self.tokens >= config.vocab_size)).any():
                raise ConfigError(f"state, tokens: ids must be 0 to {config.vocab_size - 1}")
        fresh = State.zeros(config, batch_size, torch.device("meta"), torch.float32).layers[0]
        wanted = {name: tuple(part.shape) for name, part in _parts(fresh)}
        wanted |= {name: (*shape[:1], n_past, *shape[2:]) for name, shape in wanted.items() if name.endswith("_codes")}
        if config.rosa is not None and self.layers[0].rosa is not None:
            symbols = (*wanted["rosa.symbols"][:3], self.layers[0].rosa.symbols.shape[-1])
            wanted |= {"rosa.symbols": symbols, "rosa.lengths": (symbols[0], *symbols[2:])}
        for i, layer in enumerate(self.layers):
            found: dict[str, Any] = {name: tuple(part.shape) for name, part in _parts(layer)}
            found.setdefault("rosa.lengths", wanted.get("rosa.lengths"))  # a step can find them
            for name in {**wanted, **found}:
                if wanted.get(name) != found.get(name):
                    raise ConfigError(f"state of layer {i}, {name}: wanted {wanted.get(name)}, got {found.get(name)}")


def _taken_apart(state: State) -> tuple[list[Tensor], str]:
    """All tensors of `state`, and which of those that can be absent are there: for torch.export and torch.func.

    The parts are named as ``tokens:memories layer layer ...``, a layer as ``attention:rosa``, with a digit for each
    tensor.
    """
    parts, layers = [], []
    for layer in state.layers:
        memories = layer.attention or (), layer.rosa or ()
        parts += [*layer[:3], *(part for memory in memories for part in memory if part is not None)]
        layers.append(":".join("".join(str(int(part is not None)) for part in memory) for memory in memories))
    parts += [] if state.tokens is None else [state.tokens]
    parts += [memory.tokens() for memory in state.memory or ()]
    return parts, " ".join([f"{int(state.tokens is not None)}:{len(state.memory or ())}", *layers])


def _put_together(parts: Iterable[Tensor], there: str) -> State:
    """The inverse of :func:`_taken_apart`."""
    parts = iter(parts)

    def memory(kind: Callable[..., Any], digits: str) -> Any:
        return kind(*(next(parts) if digit == "1" else None for digit in digits)) if digits else None

    first, *forms = there.split(" ")
    has_tokens, _, n_memories = first.partition(":")
    layers = []
    for form in forms:
        attention, _, rosa = form.partition(":")
        always = next(parts), next(parts), next(parts)
        layers.append(LayerState(*always, memory(AttentionState, attention), memory(RosaState, rosa)))
    tokens = next(parts) if has_tokens == "1" else None
    memories = tuple(Recollection(next(parts)) for _ in range(int(n_memories or 0)))
    return State(tuple(layers), tokens, memories or None)


def _taken_apart_by_name(state: State) -> tuple[list[tuple[Any, Tensor]], str]:
    parts, there = _taken_apart(state)
    return [(_pytree.SequenceKey(i), part) for i, part in enumerate(parts)], there


_pytree.register_pytree_node(
    State, _taken_apart, _put_together,
    serialized_type_name="heron.State", flatten_with_keys_fn=_taken_apart_by_name,
)  # fmt: skip


States = State | tuple[State, ...]  # a tuple: of sequences whose states have different lengths, one each


def with_memory(state: Any, memory: tuple[Recollection, ...] | None) -> Any:
    """`state`, a State or one a sequence, with the memories of its sequences; None: as they are."""
    if memory is None:
        return state
    if isinstance(state, State):
        return dataclasses.replace(state, memory=memory)
    return tuple(dataclasses.replace(one, memory=(of_one,)) for one, of_one in zip(state, memory, strict=True))


def memories_of(state: States | None, n: int) -> list[Recollection]:
    """The memories of the `n` sequences of `state`, fresh ones where it has none; ConfigError if it has another n."""
    memories: list[Recollection] = []
    for one in state if isinstance(state, tuple) else (state,):
        if isinstance(one, State):
            memories += one.memory or (Recollection(),) * one.batch_size
    memories = memories or [Recollection() for _ in range(n)]
    if len(memories) != n:
        raise ConfigError(f"state: wanted the memories of {n} sequences, got {len(memories)}")
    return memories


def _rosa_states(parts: Sequence[Tensor]) -> list[RosaState]:
    """ROSA's section of a state list, in which each layer begins with its symbols."""
    states: list[RosaState] = []
    for part in parts:
        if part.dtype == torch.uint8:
            states.append(RosaState(part, None, None))
        elif part.is_floating_point():
            states[-1] = states[-1]._replace(shift=part)
        else:
            states[-1] = states[-1]._replace(lengths=part)
    return states


def _parts(memory: NamedTuple, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a layer's state with its name; absent parts are left out."""
    for name, part in zip(memory._fields, memory, strict=True):
        if isinstance(part, Tensor):
            yield prefix + name, part
        elif part is not None:
            yield from _parts(part, f"{prefix}{name}.")


def _mapped(memory: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return type(memory)(
        *(
            part if part is None else function(part) if isinstance(part, Tensor) else _mapped(part, function)
            for part in memory
        )
    )
