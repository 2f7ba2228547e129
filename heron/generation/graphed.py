"""Decoding and reading on a GPU, each step recorded as one CUDA graph, so that the host launches it as one.

All sequences decode at once by :mod:`heron.generation.step`: what is elementwise is compiled where PyTorch's compiler
works, and all between the products of a time mix is :func:`heron.ops.head_step`. For one sequence all products are made
by :func:`heron.ops.matvec`, those that need not wait for each other at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heron.generation.decoder import SequenceStates, StateDecoder
from heron.generation.step import (
    apart,
    blocks_of,
    channel_mix,
    for_many,
    for_one,
    layers_of,
    lookup,
    time_mix,
    together,
)
from heron.model import RWKV, State
from heron.model import compiled as compilation
from heron.model.deep_embed import Lookup
from heron.model.memory import Documents
from heron.model.rwkv import Block
from heron.ops.rosa.device_stream import DeviceStream, device_stream_choice
from heron.tables.store import Tables


class GraphedDecoder(StateDecoder):
    """Decodes a v7, v7a or v8 model on a GPU. The shapes never change: places without a sequence are computed too.

    The graph is recorded here, which takes a moment, and where a compiler is used up to half a minute the first time.
    A decoder of one sequence can look ahead: it keeps a copy of the state before each token, a hundredth of what a step
    reads.

    Args:
        model: see :func:`heron.generation.decoder.is_fusible`. On a CPU nothing is recorded or compiled (for tests).
        n: number of sequences it has room for.
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each sequence. With them no step looks ahead: they are on the
            host, which must see a token first.
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, n: int, tables: Tables | None = None, documents: Documents | None = None):
        super().__init__(model, n, documents)
        self._model = model
        laid_out, self._pieces_for = (apart, for_one) if n == 1 else (together, for_many)
        self._layers = [laid_out(layer) for layer in layers_of(model)]
        self._pieces = self._pieces_for(self._layers[0], None)
        device = model.emb.weight.device
        self._on_host = torch.zeros(n, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._ids = self._on_host.to(device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # until then the host's buffers are read
        self._in_order = list(range(n))
        self._lookup = lookup(model) if tables is None else tables.gathered
        self._tables = None if tables is None or tables.by_kernel else tables  # whose rows the host picks
        if self._tables is not None:
            self._picked = self._tables.staging(n, pinned=device.type == "cuda")
            self._there = there = self._picked.to(device)  # (n, L, width)
            self._lookup = lambda _: there.unbind(1)
        self._found: Tensor | None = None  # by memory, (n, K, 2), and a buffer of the host for it
        if (rosa := model.config.memory) is not None and model.memory is not None:
            self._found_on_host = torch.zeros(n, rosa.n_matches, 2, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._found = self._found_on_host.to(device)
            self._bonus: Callable[[Tensor], tuple[Tensor, Tensor]] = model.memory.bonus
        self._embed: Callable[..., Tensor] = model.embed
        self._read_there: DeviceStream | None = None  # what the memory has read, on the device; None: a copy is due
        has_matches = self._found is None or (documents is None and device_stream_choice(device).impl == "cuda")
        looks_ahead = n == 1 and self._tables is None and has_matches
        self._before = SequenceStates(model, n) if looks_ahead else None  # the last step
        self._is_ahead = False
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._record()

    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from `state` (batch size 1; None: zeros), which is copied."""
        super().write(sequence, state)
        self._is_ahead, self._read_there = False, None

    def read(self, sequence: int) -> State:
        """The state of `sequence`, as a copy."""
        if self._is_ahead and self._before is not None:
            return self._with_memory(self._before.read(sequence), sequence)
        return super().read(sequence)

    @property
    def look_ahead(self) -> Callable[[Tensor], None] | None:
        """See heron.generation.decoder.Decoder. None: several sequences, or tables or documents that the host must look
        into."""
        return None if self._before is None else self._look_ahead

    @torch.inference_mode()
    def _look_ahead(self, ids: Tensor) -> None:
        if self._memories is None or self._found is None:
            torch.clamp(ids, min=0, out=self._ids)  # -1: none could be drawn
        else:
            if self._read_there is None or self._read_there.is_full:
                self._read_there = self._memories.on_device(0, ids.device)
            self._read_there.read_one_(ids, self._ids, self._found[0])
        self._run()
        self._is_ahead = True

    @torch.inference_mode()
    def step(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None = None) -> Tensor:
        """Read `tokens`, one for each of `sequences`; logits (n, V), which the next step overwrites.

        A sequence that is left out loses its state: write it anew before its next step. `recalled` as for
        :class:`heron.generation.decoder.Decoder`.
        """
        if self._is_ahead:
            self._is_ahead = False
            self._recalled(sequences, tokens, recalled)  # what the device has found by itself
            return self._logits
        self._read_there = None
        recalled = self._recalled(sequences, tokens, recalled)
        if self._copied is not None:
            self._copied.synchronize()
        self._on_host.numpy()[list(sequences)] = tokens
        self._ids.copy_(self._on_host, non_blocking=True)
        if self._tables is not None:
            self._tables.pick(self._on_host.numpy(), self._picked)
            self._there.copy_(self._picked, non_blocking=True)
        if self._found is not None and recalled is not None:
            self._found_on_host[list(sequences)] = recalled
            self._found.copy_(self._found_on_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._run()
        return self._logits if list(sequences) == self._in_order else self._logits[list(sequences)]

    def _run(self) -> None:
        if self._graph is None:
            self._compute_into_place()
        else:
            self._graph.replay()

    def _compute(self) -> Tensor:
        """One step of every sequence, from `_ids` and what the host picked; changes the states in place."""
        if self._before is not None:
            self._before.copy_(self._states)
        embedded = x = self._embed(self._ids) if self._found is None else self._embed(self._ids, self._found)
        if self._found is not None and self._model.config.reads_embedded:
            embedded = self._model.embed(self._ids)  # the token alone
        tables, v_first = self._lookup(self._ids), None
        for layer, states, rows in zip(self._layers, self._states.layers, tables, strict=True):
            x, v_first = time_mix(self._pieces, layer, x, states, v_first)
            x = channel_mix(self._pieces, layer, x, states, rows, embedded)
        logits = self._model.head(self._model.ln_out(x))
        if self._found is not None:
            ids, values = self._bonus(self._found)
            logits.scatter_add_(1, ids, values.to(logits.dtype))
        return logits

    def _record(self) -> None:
        if importlib.util.find_spec("triton") is not None:
            plain, embed, bonus = self._pieces, self._embed, self._memory and self._memory.bonus
            self._pieces = self._pieces_for(self._layers[0], compilation.compiled)
            if bonus is not None:  # otherwise the embedding is two kernels as it is
                self._embed, self._bonus = compilation.compiled(embed), compilation.compiled(bonus)
            try:
                self._compute()
            except RuntimeError as error:
                if not compilation.is_failure(error):
                    raise
                reason = compilation.first_line(error)
                print(f"heron: decoding is not compiled, so it takes longer: {reason}", file=sys.stderr)
                self._pieces, self._embed = plain, embed
                if bonus is not None:
                    self._bonus = bonus
        self._graph = recorded(self._compute_into_place)
        for sequence in range(len(self._ids)):
            self.write(sequence, None)

    def _compute_into_place(self) -> None:
        self._logits = self._compute()


class GraphedReader:
    """Reads pieces of a prompt that are `tokens` long, in parallel, by one CUDA graph of compiled blocks.

    Args:
        model: see :func:`heron.generation.decoder.is_fusible`, its tables with it. On a CPU nothing is recorded or
            compiled (for tests).
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, tokens: int):
        self._model, device = model, model.emb.weight.device
        self._blocks = blocks_of(model)
        self._ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        self._state = State.zeros(model.config, 1, device, model.emb.weight.dtype).clone()
        rosa = model.config.memory
        self._recalled: Tensor | None = None
        if rosa is not None:
            self._recalled = torch.zeros(1, tokens, rosa.n_matches, 2, dtype=torch.int64, device=device)
        self._mix: Callable = Block.mix
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            if importlib.util.find_spec("triton") is not None:
                self._mix = compilation.compiled(Block.mix)
            self._graph = recorded(self._read)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], state: State | None, recalled: Tensor | None = None) -> State:
        """The state behind `ids`, which are `tokens` many, read from `state` (batch size 1; None: zeros) on.

        `recalled` (1, tokens, K, 2) is what ROSA memory found for them. The state comes without a memory.
        """
        self._ids.copy_(torch.tensor([list(ids)]))
        if self._recalled is not None and recalled is not None:
            self._recalled.copy_(recalled)
        if state is None:
            self._state.map(Tensor.zero_)
        else:
            new_layers = dataclasses.replace(state, memory=None).to_list()
            for mine, new in zip(self._state.to_list(), new_layers, strict=True):
                mine.copy_(new)
        self._read() if self._graph is None else self._graph.replay()
        return self._state.clone()

    def _read(self) -> None:
        embedded = x = self._model.embed(self._ids)
        if self._recalled is not None:
            x = self._model.embed(self._ids, self._recalled)
        branch, v_first, tokens = None, None, Lookup(self._ids, embedded)
        for block, mine in zip(self._blocks, self._state.layers, strict=True):
            rows = block.ffn.table_rows(tokens)
            x, branch, new, v_first = self._mix(block, x, branch, mine, v_first, rows, None, None, None, True)
            branch = block.ffn.gate(branch, self._ids)
            for old, part in zip(mine[:3], new[:3], strict=True):
                old.copy_(part)


def recorded(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph; it is run twice before, for what PyTorch allocates or chooses at a first call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
