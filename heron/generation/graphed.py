"""Decoding and reading on a GPU, each step recorded as one CUDA graph, so that the host launches it as one.

All sequences decode at once by :mod:`heron.generation.step`: what is elementwise is compiled where PyTorch's compiler
works, and all between the products of a time mix is :func:`heron.ops.head_step`. For one sequence all blocks and the
head are one kernel, :class:`heron.ops.token_step.OneLaunch`, where it runs; else all products are made by
:func:`heron.ops.matvec`, for a few sequences by :func:`heron.ops.few_rows`: those that need not wait for each other at
once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heron.errors import HeronError
from heron.generation.decoder import SequenceStates, StateDecoder
from heron.generation.sending import sent
from heron.generation.slots import Slots, sizes_up_to
from heron.generation.step import (
    Compiler,
    Pieces,
    Way,
    apart,
    blocks_of,
    channel_mix,
    layers_of,
    lookup,
    matrix_of,
    network_of,
    norm_of,
    of_any_number,
    time_mix,
    way_for,
)
from heron.model import RWKV, State
from heron.model import compiled as compilation
from heron.model.deep_embed import Lookup
from heron.model.memory import Documents
from heron.model.rwkv import Block
from heron.ops.rosa.device_stream import DeviceStream, device_stream_choice
from heron.ops.token_step import LayerWeights, OneLaunch, one_launch_choice
from heron.tables.store import Tables


class _Form:
    """How steps of some sizes are computed: at first as it is, nothing compiled."""

    def __init__(self, way: Way, layers: list[LayerWeights]):
        self.layers, self._way = layers, way
        self.pieces = self.pieces_for(None)

    def pieces_for(self, compiled: Compiler | None) -> Pieces:
        return self._way.pieces_for(self.layers[0], compiled)


@dataclasses.dataclass
class _Step:
    """A step of the first n slots."""

    n: int
    form: _Form
    before: SequenceStates  # views of those that it goes on from
    states: SequenceStates  # views of where the new ones go: elsewhere, or there
    logits: Tensor = dataclasses.field(init=False)  # (n, V), of its last run, until another one to the same place runs
    whole: OneLaunch | None = None  # computes them in place of `form`
    graph: torch.cuda.CUDAGraph | None = None  # computes them where they are


class GraphedDecoder(StateDecoder):
    """Decodes a v7, v7a or v8 model on a GPU. The shapes never change: slots without a sequence are computed too.

    The graphs are recorded here, which takes a moment, and where a compiler is used up to half a minute the first time:
    recorded at first need they would hold up every sequence, and other threads may not allocate meanwhile. The largest
    is recorded first; the others to the same place lie in the same memory, since one runs at a time.
    A step can look ahead. The states are there twice for it: each step reads them from one place and writes the new
    ones to the other, so that those from before it are there until the next one. They are copied nowhere.

    Args:
        model: see :func:`heron.generation.decoder.is_fusible`. On a CPU nothing is recorded or compiled (for tests).
        n: number of sequences it has room for.
        tables: DeepEmbed tables off the device; None: the model has its own.
        documents: what a ROSA memory looks into beside each sequence. With them no step looks ahead: they are on the
            host, which must see a token first. Nor does one of several slots where there is a memory.
        fit_steps: whether a step computes the first 1, 2, 4, ... slots, as many as its sequences need, which are moved
            (:class:`heron.generation.slots.Slots`); else it computes all. The rounding of products may depend on it.
        in_bf16: see :class:`heron.generation.decoder.SequenceStates`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: RWKV,
        n: int,
        tables: Tables | None = None,
        documents: Documents | None = None,
        fit_steps: bool = False,
        in_bf16: bool = False,
    ):
        super().__init__(model, n, documents, in_bf16)
        self._model = model
        device = model.emb.weight.device
        sizes = sizes_up_to(n) if fit_steps else [n]
        self._slots = Slots(sizes)
        self._on_host = torch.zeros(n, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._ids = self._on_host.to(device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # until then the host's buffers are read
        self._tables, self._lookup = None, lookup(model) if tables is None else tables.gathered
        if tables is not None and not tables.by_kernel:  # the host picks their rows
            self._tables, self._picked = tables, tables.staging(n, pinned=device.type == "cuda")
            self._there = there = self._picked.to(device)  # (n, L, width)
            self._lookup = lambda ids: there[: len(ids)].transpose(0, 1).contiguous().unbind()
        self._found: Tensor | None = None  # by memory, (n, K, 2), and a buffer of the host for it
        if (rosa := model.config.memory) is not None and model.memory is not None:
            self._found_on_host = torch.zeros(n, rosa.n_matches, 2, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._found = self._found_on_host.to(device)
            self._bonus: Callable[[Tensor], tuple[Tensor, Tensor]] = model.memory.bonus
        self._embed: Callable[..., Tensor] = model.embed
        self._read_there: DeviceStream | None = None  # what the memory has read, on the device; None: a copy is due
        has_matches = self._found is None or (documents is None and device_stream_choice(device).impl == "cuda")
        has_ids = self._tables is None and has_matches  # all that a step needs, once these are on the device
        self._largest_ahead = 0 if not has_ids else max((n for n in sizes if n == 1 or self._found is None), default=0)
        self._before = SequenceStates(model, n, in_bf16) if self._largest_ahead else self._states  # the last step
        self._ahead: set[int] = set()
        layers = layers_of(model)
        ways = {n: way_for(layers[0], n) for n in sizes}
        laid_out = {of: [of(layer) for layer in layers] for of in {way.laid_out for way in ways.values()}}
        forms = {way: _Form(way, laid_out[way.laid_out]) for way in ways.values()}
        places = [self._states, self._before] if self._largest_ahead else [self._states]
        self._steps: dict[int, list[_Step]] = {}  # of each size, from each place to the other
        for n, way in ways.items():
            views = [states.first(n) for states in places]
            self._steps[n] = [_Step(n, forms[way], views[i], views[i - 1]) for i in range(len(views))]
        for step in self._steps.get(1, []):
            network = network_of(model, step.states.layers)._replace(layers=laid_out[apart])
            if one_launch_choice(device, network).impl == "cuda":
                step.whole = OneLaunch(network, step.before.layers)
        self._from = 0  # in which place the next step finds its states
        self._last = self._steps[sizes[0]][0]
        self._order: list[int] = []  # slots, and what gives their logits
        self._rows: slice | Tensor = slice(0)
        if device.type == "cuda":
            self._record()

    def write(self, sequence: int, state: State | None) -> None:
        """Let `sequence` go on from `state` (batch size 1; None: zeros), which is copied."""
        slot = self._slots.take(sequence)
        self._states.write(slot, state)
        if self._memories is not None:
            self._memories.write(sequence, state)
        self._ahead.discard(sequence)
        if slot == 0:
            self._read_there = None

    def read(self, sequence: int) -> State:
        """The state of `sequence`, as a copy."""
        states = self._before if sequence in self._ahead else self._states
        return self._with_memory(states.read(self._slots[sequence]), sequence)

    def free(self, sequence: int) -> None:
        """Forget `sequence`: its slot is for another one."""
        super().free(sequence)
        self._slots.free(sequence)
        self._ahead.discard(sequence)

    @property
    def ahead(self) -> Set[int]:
        """See heron.generation.decoder.Decoder."""
        return self._ahead

    def look_ahead(self, sequences: Sequence[int], others: Mapping[int, int]) -> Callable[[Tensor], None] | None:
        """See heron.generation.decoder.Decoder. None: the host must look into tables, memories or documents."""
        n = self._slots.size(self._slots[sequence] for sequence in (*sequences, *others))
        return partial(self._look_ahead, sequences, others) if n <= self._largest_ahead else None

    @torch.inference_mode()
    def _look_ahead(self, sequences: Sequence[int], others: Mapping[int, int], ids: Tensor) -> None:
        order = [*sequences, *others]
        slots = self._prepare(order)
        if self._memories is None or self._found is None:
            n = len(sequences)
            if others:
                self._send(slots[n:], list(others.values()), None)
            rows = self._rows_of(slots[:n])
            if isinstance(rows, slice):
                torch.clamp(ids, min=0, out=self._ids[rows])
            else:
                self._ids[rows] = ids.clamp(min=0)
        else:
            if self._read_there is None or self._read_there.is_full:
                self._read_there = self._memories.on_device(order[0], ids.device)
            self._read_there.read_one_(ids, self._ids[:1], self._found[0])
        self._run()
        self._ahead = set(order)

    @torch.inference_mode()
    def step(self, sequences: Sequence[int], tokens: Sequence[int], recalled: Tensor | None = None) -> Tensor:
        """Read `tokens`, one for each of `sequences`; logits (n, V), which the step after the next one overwrites, or
        the next one if none looks ahead.

        A sequence that is left out loses its state: write it anew before its next step. `recalled` as for
        :class:`heron.generation.decoder.Decoder`.
        """
        if self._ahead:
            if not self._ahead.issuperset(sequences):
                late = sorted(set(sequences) - self._ahead)
                raise HeronError(f"step: one without the sequences {late} has begun; they join the next one")
            self._ahead = set()
            self._recalled(sequences, tokens, recalled)  # what the device has found by itself
            return self._last.logits[self._rows_of([self._slots[sequence] for sequence in sequences])]
        for new in [sequence for sequence in sequences if sequence not in self._slots]:
            self.write(new, None)
        slots = self._prepare(sequences)
        self._read_there = None
        recalled = self._recalled(sequences, tokens, recalled)
        self._send(slots, tokens, recalled)
        return self._run()[self._rows_of(slots)]

    def _prepare(self, sequences: Sequence[int]) -> list[int]:
        """Choose the next step, of `sequences`; their slots, into which they are moved."""
        for source, target in self._slots.moves():
            self._states.move(source, target)
        slots = [self._slots[sequence] for sequence in sequences]
        self._last = self._steps[self._slots.size(slots)][self._from]
        return slots

    def _rows_of(self, slots: list[int]) -> slice | Tensor:
        """The index that picks the logits of `slots`; made without waiting for what the device still computes."""
        if slots != self._order:
            is_first = slots == list(range(len(slots)))
            self._order, self._rows = slots, slice(len(slots)) if is_first else sent(slots, self._ids.device)
        return self._rows

    def _send(self, slots: list[int], tokens: Sequence[int], recalled: Tensor | None) -> None:
        """Start the copy of what a step reads to the device."""
        n = self._last.n
        if self._copied is not None:
            self._copied.synchronize()
        self._on_host.numpy()[slots] = tokens
        self._ids.copy_(self._on_host, non_blocking=True)
        if self._tables is not None:
            self._tables.pick(self._on_host.numpy()[:n], self._picked[:n])
            self._there[:n].copy_(self._picked[:n], non_blocking=True)
        if self._found is not None and recalled is not None:
            self._found_on_host[slots] = recalled
            self._found.copy_(self._found_on_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _run(self) -> Tensor:
        """The logits of the step that was prepared."""
        step = self._last
        if step.graph is None:
            step.logits = self._compute(step)
        else:
            step.graph.replay()
        self._states, self._before = self._before, self._states
        self._from = (self._from + 1) % len(self._steps[step.n])
        return step.logits

    def _compute(self, step: _Step) -> Tensor:
        """One step of the first slots, from `_ids` and what the host picked."""
        ids, found = self._ids[: step.n], None if self._found is None else self._found[: step.n]
        embedded = x = self._embed(ids) if found is None else self._embed(ids, found)
        if self._model.config.reads_embedded:  # the token alone, while x changes
            embedded = x.clone() if found is None else self._model.embed(ids)
        tables, v_first = self._lookup(ids), None
        if step.whole is not None:
            gates = None if tables[0] is None else torch.cat([rows.to(x.dtype) for rows in tables if rows is not None])
            return self._with_bonus(step.whole(x, gates), found)
        step.states.draw_after(step.before)
        of_layers = zip(step.form.layers, step.states.layers, step.before.layers, tables, strict=True)
        for layer, states, before, rows in of_layers:
            x, v_first = time_mix(step.form.pieces, layer, x, states, v_first, before, step.states.drawn)
            x = channel_mix(step.form.pieces, layer, x, states, rows, embedded, before)
        x = step.form.pieces.norm(x, norm_of(self._model.ln_out))
        return self._with_bonus(step.form.pieces.head(x, matrix_of(self._model.head)), found)

    def _with_bonus(self, logits: Tensor, found: Tensor | None) -> Tensor:
        """Add to `logits` (n, V), in place, what ROSA memory does; returns them."""
        if found is not None:
            of_memory, values = self._bonus(found)
            logits.scatter_add_(1, of_memory, values.to(logits.dtype))
        return logits

    def _record(self) -> None:
        if importlib.util.find_spec("triton") is not None:
            self._compile()
        for steps in zip(*(self._steps[n] for n in sorted(self._steps, reverse=True)), strict=True):
            pool = torch.cuda.graph_pool_handle()  # of steps to the same place: the logits of the other ones stay
            for step in steps:
                step.graph = recorded(partial(self._compute_into_place, step), pool)

    def _largest_first(self) -> list[_Step]:
        return [step for n in sorted(self._steps, reverse=True) for step in self._steps[n]]

    @torch.inference_mode()
    def _compile(self, compiled: Compiler = compilation.compiled) -> None:
        """Compile what has no kernel, once for all sizes above 1, and run each step."""
        embed, bonus = self._embed, self._memory and self._memory.bonus
        varies = len(self._steps) > 1
        for form in {step.form for step in self._largest_first() if step.whole is None}:
            pieces = form.pieces_for(compiled)
            form.pieces = of_any_number(pieces) if varies else pieces
        if bonus is not None:  # otherwise the embedding is two kernels as it is
            self._embed, self._bonus = compiled(embed), compiled(bonus)
            if varies:
                self._embed = compilation.varying(self._embed, lambda ids, found: (ids, found))
                self._bonus = compilation.varying(self._bonus, lambda found: (found,))
        try:
            for step in self._largest_first():
                self._compute(step)
        except RuntimeError as error:
            if not compilation.is_failure(error):
                raise
            reason = compilation.first_line(error)
            print(f"heron: decoding is not compiled, so it takes longer: {reason}", file=sys.stderr)
            for form in {step.form for step in self._largest_first()}:
                form.pieces = form.pieces_for(None)
            self._embed = embed
            if bonus is not None:
                self._bonus = bonus

    def _compute_into_place(self, step: _Step) -> None:
        step.logits = self._compute(step)


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
        self._ids.copy_(sent([list(ids)], self._ids.device))
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


def recorded(run: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph; it is run twice before, for what PyTorch allocates or chooses at a first call.

    Graphs of one `pool` (torch.cuda.graph_pool_handle) share memory: what one computes is there until another runs.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool):
        run()
    return graph
