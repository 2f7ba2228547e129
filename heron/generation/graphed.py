"""Decoding and reading on a GPU, each step recorded as one CUDA graph, so that the host launches it as one.

All rows decode at once. The equations are those of :mod:`heron.generation.decoder`, in few kernels: what is elementwise
is compiled where PyTorch's compiler works, the low-rank products are two, and all between the products of a time mix is
:func:`heron.ops.head_step`, with the state in place. For one row all products are made by :func:`heron.ops.matvec`,
those that need not wait for each other at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron.config import ModelConfig
from heron.generation.decoder import RowStates, StateDecoder, head_weights, lookup, low_rank_gates
from heron.model import RWKV, State
from heron.model import compiled as compilation
from heron.model.deep_embed import Lookup
from heron.model.rwkv import Block
from heron.model.state import LayerState
from heron.ops.head_step import HeadInputs, head_step, head_step_choice
from heron.ops.head_step.reference import head_step_reference
from heron.ops.matvec import Product, matvec, matvec_choice
from heron.ops.matvec.reference import matvec_reference
from heron.ops.norm_mix import norm_mix, norm_mix_choice
from heron.ops.norm_mix.reference import norm_mix_reference
from heron.tables.store import Tables


class GraphedDecoder(StateDecoder):
    """Decodes a v7, v7a or v8 model on a GPU. The shapes never change: rows without a sequence are computed too.

    The graph is recorded here, which takes a moment, and where a compiler is used up to half a minute the first time.
    A decoder of one row can look ahead: at every token a copy of its state is kept, a hundredth of what a step reads.

    Args:
        model: see :func:`heron.generation.decoder.is_fusible`. On a CPU nothing is recorded or compiled (for tests).
        rows: number of sequences it has room for.
        tables: DeepEmbed tables off the device; None: the model has its own.
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, rows: int, tables: Tables | None = None):
        super().__init__(model, rows)
        self._model = model
        layer = _LayerOfOneRow if rows == 1 else _Layer
        self._layers = [layer(block, model.config) for block in model.blocks]
        device = model.emb.weight.device
        self._on_host = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._ids = self._on_host.to(device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # until then the host's buffers are read
        self._in_order = list(range(rows))
        self._lookup = lookup(model) if tables is None else tables.gathered
        self._tables = None if tables is None or tables.by_kernel else tables  # whose rows the host picks
        if self._tables is not None:
            self._picked = tables.staging(rows, pinned=device.type == "cuda")
            self._there = there = self._picked.to(device)  # (rows, L, width)
            self._lookup = lambda _: there.unbind(1)
        self._before = RowStates(model, rows) if rows == 1 and self._tables is None else None  # the last step
        self._is_ahead = False
        self._stages = self._layers[0].stages(None)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._record()

    def write(self, row: int, state: State | None) -> None:
        """Let `row` go on from `state` (batch size 1; None: zeros), which is copied."""
        super().write(row, state)
        self._is_ahead = False

    def read(self, row: int) -> State:
        """What `row` remembers, as a copy."""
        return self._before.read(row) if self._is_ahead else super().read(row)

    @property
    def look_ahead(self) -> Callable[[Tensor], None] | None:
        """See :class:`heron.generation.decoder.Decoder`. None: several rows, or tables whose rows the host picks."""
        return None if self._before is None else self._look_ahead

    @torch.inference_mode()
    def _look_ahead(self, ids: Tensor) -> None:
        torch.clamp(ids, min=0, out=self._ids)  # -1: none could be drawn
        self._run()
        self._is_ahead = True

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read `tokens`, one for each of `rows`; logits (n, V), which the next step overwrites.

        A row that is left out loses its state: write it anew before its next step.
        """
        if self._is_ahead:
            self._is_ahead = False
            return self._logits
        if self._copied is not None:
            self._copied.synchronize()
        self._on_host.numpy()[list(rows)] = tokens
        self._ids.copy_(self._on_host, non_blocking=True)
        if self._tables is not None:
            self._tables.pick(self._on_host.numpy(), self._picked)
            self._there.copy_(self._picked, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._run()
        return self._logits if list(rows) == self._in_order else self._logits[list(rows)]

    def _run(self) -> None:
        if self._graph is None:
            self._compute_into_place()
        else:
            self._graph.replay()

    def _compute(self) -> Tensor:
        """One step of every row, from `_ids` and what the host picked; changes the states in place."""
        if self._before is not None:
            self._before.copy_(self._states)
        embedded = x = self._model.embed(self._ids)
        tables = self._lookup(self._ids)
        v_first = None
        for layer, memory, of_table in zip(self._layers, self._states.layers, tables, strict=True):
            x, v_first = layer.step(self._stages, x, memory, v_first, of_table, embedded)
        return self._model.head(self._model.ln_out(x))

    def _record(self) -> None:
        if importlib.util.find_spec("triton") is not None:
            plain = self._stages
            self._stages = self._layers[0].stages(compilation.compiled)
            try:
                self._compute()
            except RuntimeError as error:
                if not compilation.is_failure(error):
                    raise
                reason = compilation.first_line(error)
                print(f"heron: decoding is not compiled, so it takes longer: {reason}", file=sys.stderr)
                self._stages = plain
        self._graph = recorded(self._compute_into_place)
        for row in range(len(self._ids)):
            self.write(row, None)

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
        self._ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        self._state = State.zeros(model.config, 1, device, model.emb.weight.dtype).clone()
        self._mix: Callable = Block.mix
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            if importlib.util.find_spec("triton") is not None:
                self._mix = compilation.compiled(Block.mix)
            self._graph = recorded(self._read)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], state: State | None) -> State:
        """The state behind `ids`, which are `tokens` many, read from `state` (batch size 1; None: zeros) on."""
        self._ids.copy_(torch.tensor([list(ids)]))
        if state is None:
            self._state.map(Tensor.zero_)
        else:
            for mine, new in zip(self._state.to_list(), state.to_list(), strict=True):
                mine.copy_(new)
        self._read() if self._graph is None else self._graph.replay()
        return self._state.clone()

    def _read(self) -> None:
        embedded = self._model.embed(self._ids)
        x, branch, v_first, tokens = embedded, None, None, Lookup(self._ids, embedded)
        for block, mine in zip(self._model.blocks, self._state.layers, strict=True):
            of_table = block.ffn.table_rows(tokens)
            x, branch, new, v_first = self._mix(block, x, branch, mine, v_first, of_table, None, None, None, True)
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


class _Layer:
    """One block's weights and its step, for n rows. Its stages are what the compiler sees of a decoder."""

    STAGES = ("mix_time", "project", "add_output", "mix_channels", "hide", "add_value")

    def __init__(self, block: nn.Module, config: ModelConfig):
        att = block.att
        self.block, self.form, self.head_size = block, config.deep_embed, config.head_size
        self.mix = torch.stack([getattr(att, f"x_{letter}").view(1, -1) for letter in "rkvwag"])  # (6, 1, C)
        self.down = self.low_rank([getattr(att, f"{letter}1").t() for letter in "vwag"], 0)  # (4, rank, C)
        self.up = self.low_rank([getattr(att, f"{letter}2").t() for letter in "vwag"], 1)  # (4, C, rank)
        biases = [getattr(att, f"{letter}0").view(1, -1) for letter in "vwa"]
        self.bias = torch.stack([*biases, torch.zeros_like(biases[0])])  # (4, 1, C)
        self.head_weights = head_weights(att)

    def low_rank(self, parts: Sequence[Tensor], dim: int) -> Tensor | list[Tensor]:
        """The matrices (out, in) of values, decay, iclr and gate as one, with zeros in `dim` up to the largest rank."""
        rank = max(part.shape[dim] for part in parts)
        return torch.stack([_filled_up(part, dim, rank) for part in parts])

    def stages(self, prepared: Callable[[Callable], Callable] | None) -> SimpleNamespace:
        """The stages by name, which `prepared` compiles where it is given, and head_step, unless it has a kernel.

        They are cut where a product begins, so that its input is computed once, not by every block of the product.
        """
        stages = {name: getattr(type(self), name) for name in self.STAGES}
        run = SimpleNamespace(**{name: prepared(stage) if prepared else stage for name, stage in stages.items()})
        has_kernel = head_step_choice(self.mix.device, self.mix.dtype, self.head_size).impl == "cuda"
        run.head_step = head_step if has_kernel or prepared is None else prepared(head_step_reference)
        return run

    def step(
        self,
        run: SimpleNamespace,
        x: Tensor,
        memory: LayerState,
        v_first: Tensor | None,
        of_table: Tensor | None,
        embedded: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """residual (n, C) -> residual (n, C), and layer 0's values; `memory` changes in place.

        Args:
            run: the stages.
            of_table, embedded: the tokens' DeepEmbed rows, and the embedded tokens (n, C).
        """
        r, k, v, of_v, w, of_a, gate = run.project(self, run.mix_time(self, x, memory.att_shift))
        of_values = (None, None) if v_first is None else (of_v, v_first)
        y = run.head_step(HeadInputs(r, w, k, v, of_a, gate, *of_values), self.head_weights, memory.wkv)
        x = run.add_output(self, x, y)
        unmixed, mixed = run.mix_channels(self, x, memory.ffn_shift)
        x = run.add_value(self, x, run.hide(self, unmixed, mixed, of_table, embedded), of_table)
        return x, v if v_first is None else v_first

    def mix_time(self, residual: Tensor, att_shift: Tensor) -> Tensor:
        """residual (n, C) -> the inputs (6, n, C) of r, k, v, decay, iclr and gate; att_shift changes in place."""
        x = _layer_norm(self.block.ln1, residual)
        mixed = torch.addcmul(x, att_shift - x, self.mix)
        att_shift.copy_(x)
        return mixed

    def project(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """mixed (6, n, C) -> r, k, v, and logits of value gate, decay and iclr, and the output gate; all (n, C)."""
        att = self.block.att
        large = (
            F.linear(part, linear.weight)
            for part, linear in zip(mixed[:3], (att.receptance, att.key, att.value), strict=True)
        )
        of_v, of_w, of_a, of_g = torch.bmm(mixed[2:], self.down.mT)
        squeezed = torch.stack((of_v, torch.tanh(of_w), of_a, torch.sigmoid(of_g)))
        return *large, *(self.bias + torch.bmm(squeezed, self.up.mT)).unbind()

    def add_output(self, residual: Tensor, y: Tensor) -> Tensor:
        """residual (n, C) with the branch's output."""
        return residual + F.linear(y, self.block.att.output.weight)

    def mix_channels(self, residual: Tensor, ffn_shift: Tensor) -> tuple[Tensor, Tensor]:
        """residual (n, C) -> the channel mix's input, and the same mixed with the token before; ffn_shift changes."""
        x = _layer_norm(self.block.ln2, residual)
        mixed = torch.addcmul(x, ffn_shift - x, self.block.ffn.x_k.flatten())
        ffn_shift.copy_(x)
        return x, mixed

    def hide(self, x: Tensor, mixed: Tensor, of_table: Tensor | None, embedded: Tensor) -> Tensor:
        """The hidden channels (n, F), with the tokens' DeepEmbed rows and the embedded tokens (n, C)."""
        hidden = torch.relu(F.linear(mixed, self.block.ffn.key.weight)).square()
        if self.form == "hidden":
            return hidden * of_table.to(hidden.dtype)
        if self.form == "low-rank":
            return hidden * self.low_rank_gate(x, of_table, embedded)
        return hidden

    def low_rank_gate(self, x: Tensor, of_table: Tensor, embedded: Tensor) -> Tensor:
        """What v7a multiplies the hidden channels by, (n, F), from the channel mix's input x (n, C)."""
        ffn = self.block.ffn
        squeezed = (x @ ffn.s1).unsqueeze(1) @ low_rank_gates(of_table, embedded, ffn.s_emb_x.weight)  # (n, 1, 32)
        return torch.addmm(ffn.s0, squeezed.squeeze(1), ffn.s2)

    def add_value(self, residual: Tensor, hidden: Tensor, of_table: Tensor | None) -> Tensor:
        """residual (n, C) with the channel mix of hidden (n, F)."""
        out = F.linear(hidden, self.block.ffn.value.weight)
        return residual + (out * of_table.to(out.dtype) if self.form == "output" else out)


class _LayerOfOneRow(_Layer):
    """The same for one row, n = 1. Products are no stages: those that need not wait for each other are made at once."""

    STAGES = ("low_rank_gate",)

    def __init__(self, block: nn.Module, config: ModelConfig):
        super().__init__(block, config)
        self.mix, self.ffn_mix = self.mix.squeeze(1), block.ffn.x_k.detach().view(1, -1)  # (6, C), (1, C)

    def low_rank(self, parts: Sequence[Tensor], dim: int) -> list[Tensor]:
        """The matrices (out, in) of values, decay, iclr and gate, zeros in `dim` up to ranks the kernel takes."""
        return [_filled_up(part, dim, -(-part.shape[dim] // 8) * 8).contiguous() for part in parts]

    def stages(self, prepared: Callable[[Callable], Callable] | None) -> SimpleNamespace:
        """The stages by name, and more ops, which are compiled where they have no kernel."""
        run = super().stages(prepared)
        att, ffn = self.block.att, self.block.ffn
        linears = (att.receptance, att.key, att.value, att.output, ffn.key, ffn.value)
        has_kernel = matvec_choice([*(linear.weight for linear in linears), *self.down, *self.up]).impl == "cuda"
        run.multiply = matvec if has_kernel or prepared is None else prepared(matvec_reference)
        device, dtype, (_, C) = self.mix.device, self.mix.dtype, self.mix.shape
        has_kernel = norm_mix_choice(device, dtype, C).impl == "cuda"
        run.norm_mix = norm_mix if has_kernel or prepared is None else prepared(norm_mix_reference)
        return run

    def step(
        self,
        run: SimpleNamespace,
        x: Tensor,
        memory: LayerState,
        v_first: Tensor | None,
        of_table: Tensor | None,
        embedded: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As of :class:`_Layer`."""
        att, ffn, ln1, ln2 = self.block.att, self.block.ffn, self.block.ln1, self.block.ln2
        x_r, x_k, *x_low = run.norm_mix(x, ln1.weight, ln1.bias, ln1.eps, self.mix, memory.att_shift)
        large = map(Product, (x_r, x_k, x_low[0]), (att.receptance.weight, att.key.weight, att.value.weight))
        r, k, v, *low = run.multiply([*large, *map(Product, x_low, self.down, ("none", "tanh", "none", "sigmoid"))])
        of_v, w, of_a, gate = run.multiply(
            [Product(part, up, add=bias) for part, up, bias in zip(low, self.up, self.bias, strict=True)]
        )
        of_values = (None, None) if v_first is None else (of_v, v_first)
        y = run.head_step(HeadInputs(r, w, k, v, of_a, gate, *of_values), self.head_weights, memory.wkv)
        (x,) = run.multiply([Product(y, att.output.weight, add=x)])
        (mixed,) = run.norm_mix(x, ln2.weight, ln2.bias, ln2.eps, self.ffn_mix, memory.ffn_shift)
        if self.form == "low-rank":  # of what is not mixed, which the memory has by now
            gates = run.low_rank_gate(self, memory.ffn_shift, of_table, embedded)
        else:
            gates = None if of_table is None else of_table.to(x.dtype)
        of_output, of_hidden = (gates, None) if self.form == "output" else (None, gates)
        (hidden,) = run.multiply([Product(mixed, ffn.key.weight, "squared relu", factor=of_hidden)])
        (x,) = run.multiply([Product(hidden, ffn.value.weight, factor=of_output, add=x)])
        return x, v if v_first is None else v_first


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _filled_up(matrix: Tensor, dim: int, size: int) -> Tensor:
    """`matrix` with zeros behind it along `dim`, up to `size`."""
    missing = size - matrix.shape[dim]
    return F.pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing))
