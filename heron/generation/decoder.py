"""One token for each of several sequences, at a cost that never grows: what an engine runs after the prompt.

:class:`heron.RWKV` is the definition. On a CPU :class:`CppDecoder` computes the same in C++ or, where that can't run,
:class:`TorchDecoder` in PyTorch; on a GPU :mod:`heron.generation.graphed` does. They change their sequences' states in
place. :class:`ModelDecoder` asks the model itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Protocol, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.errors import ConfigError
from heron.generation.memories import SequenceMemories
from heron.generation.step import PLAIN, channel_mix, layers_of, lookup, network_of, norm_of, time_mix
from heron.model import RWKV, State
from heron.model.deep_embed import DeepEmbed
from heron.model.memory import Documents, Match
from heron.model.plain import is_plain
from heron.ops.token_step import LayerStates, LayerWeights, TokenStep
from heron.tables.store import Tables

HEAD_COLUMNS = 4096  # logits that are computed at once on a CPU: this part of the head stays in its cache for all

_KNOWN = re.compile(
    r"(emb|head)\.weight|ln_out\.(weight|bias)|memory\.(scale|length|copy)|blocks\.\d+\."
    r"(ln[012]\.(weight|bias)|att\.(x_[rwkvag]|[wav]0|[wavg][12]|k_k|k_a|r_k|ln_x\.(weight|bias)"
    r"|(receptance|key|value|output)\.weight)"
    r"|ffn\.(x_k|(key|value|enn|enn4|s_emb|s_emb_x)\.weight|s[012]))"
)


class Decoder(Protocol):
    """Several sequences, numbered from 0, that go on token by token."""

    @property
    def ahead(self) -> Set[int]:
        """The sequences whose next step has begun. :meth:`read` gives their states from before it; :meth:`write` and
        :meth:`free` leave a sequence out of it, and no other."""
        ...

    def look_ahead(self, sequences: Sequence[int], others: Mapping[int, int]) -> Callable[[Tensor], None] | None:
        """A function that starts the next step on the device before the host has read what was drawn. None: cannot.

        :meth:`step` then returns the logits of that step; it may be asked only for sequences that are :attr:`ahead`.

        Args:
            sequences: those of the last step that go on, with the token ids (n,) on the device that the function gets;
                where none could be drawn (-1) the step means nothing.
            others: those that join them, with their tokens.
        """

    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from `state` (batch size 1; None: zeros), which is copied."""

    def read(self, sequence: int) -> State | None:
        """The state of `sequence`, as a copy."""

    def free(self, sequence: int) -> None:
        """Forget `sequence`: write it anew before its next step."""

    def step(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None = None) -> Tensor:
        """Read `tokens`, one for each of `sequences`; logits (n, V), which the next step may overwrite unless it is one
        that has looked ahead.

        A sequence that is left out may lose its state: write it anew before its next step.

        Args:
            recalled: (n, K, 2) int64 on the host, what ROSA memory found for the tokens elsewhere; the sequences'
                memories stay as they are then. None: they read the tokens.
        """
        ...

    @property
    def longest(self) -> list[Match] | None:
        """The longest match of each sequence of the last step; None where no memory has looked for any."""


class Remembering:
    """What is common to decoders: the memories of n sequences, where the model has a ROSA memory.

    They do not look ahead, unless they say so.
    """

    ahead: Set[int] = frozenset()

    def look_ahead(self, sequences: Sequence[int], others: Mapping[int, int]) -> Callable[[Tensor], None] | None:
        """See :class:`Decoder`."""
        return None

    def __init__(self, model: nn.Module, n: int, documents: Documents | None = None):
        rosa = getattr(model.config, "memory", None)
        self._memories = None if rosa is None else SequenceMemories(rosa, n, documents)

    @property
    def longest(self) -> list[Match] | None:
        """See :class:`Decoder`."""
        return None if self._memories is None else self._memories.longest

    def _recalled(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None) -> Tensor | None:
        """What goes into a step of `tokens`, (n, K, 2) on the host: `recalled`, or what the memories find."""
        if self._memories is None:
            if recalled is not None:
                raise ConfigError("recalled: this model has no ROSA memory; leave it out")
            return None
        if recalled is None:
            return self._memories.step(sequences, tokens)
        self._memories.longest = None
        return recalled

    def free(self, sequence: int) -> None:
        """Forget what `sequence` has read."""
        if self._memories is not None:
            self._memories.write(sequence, None)

    def _with_memory(self, state: State, sequence: int) -> State:
        return state if self._memories is None else dataclasses.replace(state, memory=self._memories.read(sequence))


class ModelDecoder(Remembering):
    """Decodes with the model, one sequence after another: for models of which a step does not know every part."""

    def __init__(self, model: nn.Module, n: int, documents: Documents | None = None):
        super().__init__(model, n, documents)
        self._model = model
        self._device = next(model.parameters()).device
        self._states: list[State | None] = [None] * n

    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from `state` (batch size 1; None: zeros)."""
        if self._memories is not None:
            self._memories.write(sequence, state)
            state = None if state is None else dataclasses.replace(state, memory=None)
        self._states[sequence] = state

    def read(self, sequence: int) -> State | None:
        """The state of `sequence`."""
        state = self._states[sequence]
        return None if state is None else self._with_memory(state, sequence)

    def free(self, sequence: int) -> None:
        """Forget `sequence`, whose state may have grown."""
        super().free(sequence)
        self._states[sequence] = None

    def step(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None = None) -> Tensor:
        """Read `tokens`, one for each of `sequences`; logits (n, V)."""
        recalled, logits = self._recalled(sequences, tokens, recalled), []
        with only_computing(self._model):
            for number, (i, token) in enumerate(zip(sequences, tokens, strict=True)):
                of_memory = (
                    {} if recalled is None else {"recalled": recalled[None, number : number + 1].to(self._device)}
                )
                ids = torch.tensor([[token]], device=self._device)
                new, self._states[i] = self._model(ids, self._states[i], **of_memory)
                logits.append(new[0, -1:])
            return torch.cat(logits)


class SequenceStates:
    """The states of n sequences of a v7, v7a or v8 model, in tensors that a decoder changes in place.

    Args:
        in_bf16: whether those of WKV7 are in bf16, half as large, not in fp32 (fp64 under fp64).

    Attributes:
        layers: of each layer att_shift (n, C), wkv (n, H, N_value, N_key), ffn_shift (n, C); views of two tensors.
        drawn: in bf16, what the rounding of the next step draws from, (n,), see :func:`heron.ops.head_step`: how many
            tokens each has read since it was written, so that the same texts are the same again. Else None.
    """

    def __init__(self, model: RWKV, n: int, in_bf16: bool = False):
        config, device, dtype = model.config, model.emb.weight.device, model.emb.weight.dtype
        L, C, H, N = config.n_layer, config.n_embd, config.n_head, config.head_size
        self._shifts = torch.zeros(L, 2, n, C, dtype=dtype, device=device)
        self._in_fp32 = torch.promote_types(dtype, torch.float32)
        kept = torch.bfloat16 if in_bf16 else self._in_fp32
        self._wkv = torch.zeros(L, n, H, N, N, dtype=kept, device=device)
        self.drawn = torch.zeros(n, dtype=torch.int64, device=device) if in_bf16 else None
        self.layers = self._by_layer()

    def first(self, n: int) -> SequenceStates:
        """The first n of them: views, which change with them."""
        views = copy.copy(self)
        views._shifts, views._wkv = self._shifts[:, :, :n], self._wkv[:, :n]
        views.drawn = None if self.drawn is None else self.drawn[:n]
        views.layers = views._by_layer()
        return views

    def _by_layer(self) -> list[LayerStates]:
        return [LayerStates(att, wkv, ffn) for (att, ffn), wkv in zip(self._shifts, self._wkv, strict=True)]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let the sequence at `target` go on from the state of that at `source`."""
        self._shifts[:, :, target] = self._shifts[:, :, source]
        self._wkv[:, target] = self._wkv[:, source]
        if self.drawn is not None:
            self.drawn[target] = self.drawn[source]

    def draw_after(self, before: SequenceStates) -> None:
        """Let the rounding of a step draw from what comes after `before`, of as many sequences of the same model."""
        if self.drawn is not None and before.drawn is not None:
            torch.add(before.drawn, 1, out=self.drawn)

    def of(self, sequence: int) -> list[LayerStates]:
        """The part of each layer that belongs to `sequence`: views of batch size 1."""
        return [LayerStates(*(part[sequence : sequence + 1] for part in layer)) for layer in self.layers]

    @torch.inference_mode()
    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from `state` (batch size 1; None: zeros), which is copied."""
        if state is None:
            self._shifts[:, :, sequence] = 0
            self._wkv[:, sequence] = 0
        else:  # all layers together: on a GPU a few copies rather than three for each
            shifts = torch.cat([shift for layer in state.layers for shift in (layer.att_shift, layer.ffn_shift)])
            self._shifts[:, :, sequence] = shifts.view(len(self.layers), 2, -1)
            self._wkv[:, sequence] = torch.cat([layer.wkv for layer in state.layers])
        if self.drawn is not None:
            self.drawn[sequence] = 0

    @torch.inference_mode()
    def read(self, sequence: int) -> State:
        """The state of `sequence`, as a copy."""
        layers = ((att, wkv.to(self._in_fp32), ffn) for att, wkv, ffn in self.of(sequence))
        return State.from_list([part.clone() for layer in layers for part in layer])


class StateDecoder(Remembering):
    """What is common to decoders that keep :class:`SequenceStates`."""

    def __init__(self, model: RWKV, n: int, documents: Documents | None = None, in_bf16: bool = False):
        super().__init__(model, n, documents)
        self._states = SequenceStates(model, n, in_bf16)
        self._memory = model.memory

    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from `state` (batch size 1; None: zeros), which is copied."""
        self._states.write(sequence, state)
        if self._memories is not None:
            self._memories.write(sequence, state)

    def read(self, sequence: int) -> State:
        """The state of `sequence`, as a copy."""
        return self._with_memory(self._states.read(sequence), sequence)


class TorchDecoder(StateDecoder):
    """Decodes a v7, v7a or v8 model on a CPU by :mod:`heron.generation.step` in plain PyTorch.

    Every sequence is computed by itself, so that what it says cannot depend on its neighbours, not by a bit. They take
    turns at each half of a block, whose matrices the second one finds in the cache. In fp32 these are copies laid out
    (in, out): a product with one vector reads those a third faster.

    Args:
        model: see :func:`is_fusible`.
        n: number of sequences it has room for.
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each sequence.
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, n: int, tables: Tables | None = None, documents: Documents | None = None):
        super().__init__(model, n, documents)
        self._of_sequence = [self._states.of(sequence) for sequence in range(n)]
        self._embed = model.embed
        self._layers = [_for_cpu(layer) for layer in layers_of(model)]
        self._norm = norm_of(model.ln_out)
        self._head = _columns(*model.head.weight.split(HEAD_COLUMNS))
        self._table_rows = lookup(model) if tables is None else tables.rows

    @torch.inference_mode()
    def step(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None = None) -> Tensor:
        """Read `tokens`, one for each of `sequences`; logits (n, V). `recalled` as for :class:`Decoder`."""
        recalled = self._recalled(sequences, tokens, recalled)
        ids = [torch.tensor([token]) for token in tokens]
        embedded = [self._embed(i) for i in ids]
        rows = [self._table_rows(i) for i in ids]
        states = [self._of_sequence[sequence] for sequence in sequences]
        x = list(embedded) if recalled is None else list(map(self._embed, ids, recalled.split(1)))
        v_first: list[Tensor | None] = [None] * len(ids)
        for number, layer in enumerate(self._layers):
            for i, own in enumerate(states):
                x[i], v_first[i] = time_mix(PLAIN, layer, x[i], own[number], v_first[i])
            for i, own in enumerate(states):
                x[i] = channel_mix(PLAIN, layer, x[i], own[number], rows[i][number], embedded[i])
        x = [PLAIN.norm(part, self._norm) for part in x]
        columns = [torch.cat([F.linear(part, matrix) for part in x]) for matrix in self._head]
        logits = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return logits if self._memory is None or recalled is None else self._memory.add_to_(logits, recalled)


class CppDecoder(StateDecoder):
    """Decodes a v7 or v8 model on a CPU by :class:`heron.ops.token_step.TokenStep`: a matrix is read once for all.

    Args:
        model: see :func:`is_fusible`; no v7a.
        n: number of sequences it has room for.
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each sequence.
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, n: int, tables: Tables | None = None, documents: Documents | None = None):
        super().__init__(model, n, documents)
        self._step = TokenStep(network_of(model, self._states.layers))
        self._table_rows = lookup(model) if tables is None else tables.rows

    @torch.inference_mode()
    def step(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None = None) -> Tensor:
        """Read `tokens`, one for each of `sequences`; logits (n, V). `recalled` as for :class:`Decoder`."""
        recalled = self._recalled(sequences, tokens, recalled)
        rows = self._table_rows(torch.tensor(tokens))
        if not isinstance(rows, Tensor):
            there = [part for part in rows if part is not None]
            rows = torch.stack(there) if there else None
        return self._step(sequences, tokens, rows, recalled)


def is_fusible(model: nn.Module) -> TypeGuard[RWKV]:
    """Whether :mod:`heron.generation.step` computes with every parameter that `model` has, and all in one dtype.

    It calls no module, so there may be no hooks and no adapters.
    """
    if not isinstance(model, RWKV) or not all(_KNOWN.fullmatch(name) for name, _ in model.named_parameters()):
        return False
    if not all(is_plain(module, type(module)) for module in model.modules()):
        return False
    tables = {id(module.weight) for module in model.modules() if isinstance(module, DeepEmbed)}
    return len({parameter.dtype for parameter in model.parameters() if id(parameter) not in tables}) == 1


@contextlib.contextmanager
def only_computing(model: nn.Module) -> Iterator[None]:
    """No autograd and evaluation mode, both put back at the end (never across a yield to the caller)."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _for_cpu(layer: LayerWeights) -> LayerWeights:
    """`layer` with its large matrices as of :func:`_columns`, and the weights of single channels as head_step wants."""
    names = "receptance", "key", "value", "output", "ffn_key", "ffn_value"
    matrices = dict(zip(names, _columns(*(getattr(layer, name) for name in names)), strict=True))
    dtype, of_head = torch.promote_types(layer.mix.dtype, torch.float32), layer.head._asdict().items()
    head = layer.head._replace(**{name: x.to(dtype) for name, x in of_head if isinstance(x, Tensor)})
    return layer._replace(head=head, **matrices)


def _columns(*weights: Tensor) -> list[Tensor]:
    """Matrices (out, in) whose columns are contiguous: copies of those of fp32 and fp64, any others as they are.

    The copies lie in one block of NumPy's, which asks the system for huge pages: they stream a tenth faster.
    """
    if weights[0].dtype not in (torch.float32, torch.float64):
        return list(weights)
    sizes = [weight.numel() for weight in weights]
    block = np.empty(sum(sizes), dtype=torch.empty(0, dtype=weights[0].dtype).numpy().dtype)
    parts = torch.from_numpy(block).split(sizes)
    return [part.view(weight.shape[::-1]).copy_(weight.t()).t() for part, weight in zip(parts, weights, strict=True)]
