"""Decoding and reading on a GPU, each step recorded as one CUDA graph, so that the host launches it as one.

All rows decode at once. The equations are those of :mod:`heron.generation.decoder`, in few kernels: what is elementwise
is compiled where PyTorch's compiler works, WKV is our kernel with the state in place, the low-rank products are two.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron import compilation, ops
from heron.config import ModelConfig
from heron.generation.decoder import RowStates, lookup, low_rank_gates
from heron.generation.tables import Tables
from heron.model import RWKV, State
from heron.model.deep_embed import Lookup
from heron.model.rwkv import Block


class GraphedDecoder:
    """Decodes a v7, v7a or v8 model on a GPU. The shapes never change: rows without a sequence are computed too.

    The graph is recorded here, which takes a moment, and where a compiler is used up to half a minute the first time.

    Args:
        model: see :func:`heron.generation.decoder.is_fusible`. On a CPU nothing is recorded or compiled (for tests).
        rows: number of sequences it has room for.
        tables: DeepEmbed tables off the device; None: the model has its own.
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, rows: int, tables: Tables | None = None):
        self._states = RowStates(model, rows)
        self._model = model
        self._layers = [_Layer(block, model.config) for block in model.blocks]
        device = model.emb.weight.device
        self._on_host = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._ids = self._on_host.to(device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # until then the host's buffers are read
        self._in_order = list(range(rows))
        self._tables = tables
        self._picked = None if tables is None else tables.staging(rows, pinned=device.type == "cuda")
        self._rows = None if tables is None else self._picked.to(device)  # (rows, L, width)
        self._lookup = lookup(model)
        self._stages = _stages(lambda stage: stage)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._record()

    def write(self, row: int, state: State | None) -> None:
        """Let `row` go on from `state` (batch size 1; None: zeros), which is copied."""
        self._states.write(row, state)

    def read(self, row: int) -> State:
        """What `row` remembers, as a copy."""
        return self._states.read(row)

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read `tokens`, one for each of `rows`; logits (n, V), which the next step overwrites.

        A row that is left out loses its state: write it anew before its next step.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self._on_host.numpy()[list(rows)] = tokens
        self._ids.copy_(self._on_host, non_blocking=True)
        if self._tables is not None:
            self._tables.pick(self._on_host.numpy(), self._picked)
            self._rows.copy_(self._picked, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        return self._logits if list(rows) == self._in_order else self._logits[list(rows)]

    def _compute(self) -> Tensor:
        """One step of every row, from `_ids` and `_rows`; changes the states in place."""
        embedded = x = self._model.embed(self._ids)
        tables = self._lookup(self._ids) if self._rows is None else self._rows.unbind(1)
        run, v_first = self._stages, None
        for layer, memory, of_table in zip(self._layers, self._states.layers, tables, strict=True):
            mixed = run.mix_time(layer, x, memory.att_shift)
            r, w, k, v, a, b, gate, v_first = run.project(layer, mixed, v_first)
            y, _ = ops.wkv7(*(part.view(layer.heads) for part in (r, w, k, v, a, b)), memory.wkv, inplace_state=True)
            x = run.add_output(layer, x, run.normalise(layer, y.view(x.shape), r, k, v, gate))
            unmixed, mixed = run.mix_channels(layer, x, memory.ffn_shift)
            x = run.add_value(layer, x, run.hide(layer, unmixed, mixed, of_table, embedded), of_table)
        return self._model.head(self._model.ln_out(x))

    def _record(self) -> None:
        if importlib.util.find_spec("triton") is not None:
            self._stages = _stages(compilation.compiled)
            self._set_product(_matvec if len(self._ids) == 1 else F.linear)
            try:
                self._compute()
            except RuntimeError as error:
                if not compilation.is_failure(error):
                    raise
                reason = compilation.first_line(error)
                print(f"heron: decoding is not compiled, so it takes longer: {reason}", file=sys.stderr)
                self._stages = _stages(lambda stage: stage)
                self._set_product(F.linear)
        self._graph = recorded(self._compute_into_place)
        for row in range(len(self._ids)):
            self.write(row, None)

    def _set_product(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        for layer in self._layers:
            layer.product = product

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
        self._block: Callable = Block.branches
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            if importlib.util.find_spec("triton") is not None:
                self._block = compilation.compiled(Block.branches)
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
        x, v_first, tokens = embedded, None, Lookup(self._ids, embedded)
        for block, mine in zip(self._model.blocks, self._state.layers, strict=True):
            of_table = block.ffn.table_rows(tokens)
            x, new, v_first = self._block(block, x, mine, v_first, of_table, None, None)
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
    """One block's weights and its step, for n rows. What the compiler sees of a decoder."""

    def __init__(self, block: nn.Module, config: ModelConfig):
        att = block.att
        self.block, self.form = block, config.deep_embed
        self.heads = (-1, 1, config.n_head, config.head_size)
        self.mix = torch.stack([getattr(att, f"x_{letter}").view(1, -1) for letter in "rkvwag"])  # (6, 1, C)
        rank = max(getattr(att, f"{letter}1").shape[1] for letter in "vwag")

        def stacked(number: int, dim: int) -> Tensor:
            """The low-rank matrices of values, decay, iclr and gate as (out, in), zeros up to the largest rank."""
            parts = (getattr(att, f"{letter}{number}") for letter in "vwag")
            return torch.stack([_filled_up(part, dim, rank).t() for part in parts])

        self.down, self.up = stacked(1, 1), stacked(2, 0)  # (4, rank, C), (4, C, rank)
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        biases = [getattr(att, f"{letter}0").view(1, -1) for letter in "vwa"]
        self.bias = torch.stack([*biases, torch.zeros_like(biases[0])])  # (4, 1, C)

    def mix_time(self, residual: Tensor, att_shift: Tensor) -> Tensor:
        """residual (n, C) -> the inputs (6, n, C) of r, k, v, decay, iclr and gate; att_shift changes in place."""
        norm = self.block.ln1
        x = F.layer_norm(residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        mixed = torch.addcmul(x, att_shift - x, self.mix)
        att_shift.copy_(x)
        return mixed

    def project(
        self, mixed: Tensor, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """mixed (6, n, C) -> r, w, k, v, a, b, gate and layer 0's values, all (n, C)."""
        att = self.block.att
        r, k, v = (
            self.product(part, linear.weight)
            for part, linear in zip(mixed[:3], (att.receptance, att.key, att.value), strict=True)
        )
        of_v, of_w, of_a, of_g = self.products(mixed[2:], self.down)
        squeezed = torch.stack((of_v, torch.tanh(of_w), of_a, torch.sigmoid(of_g)))
        of_v, w, of_a, gate = self.bias + self.products(squeezed, self.up)
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(of_v))
        iclr = torch.sigmoid(of_a)
        per_head = (-1, *self.heads[2:])
        removal_key = F.normalize((k * att.k_k.flatten()).view(per_head), dim=-1, eps=1e-12).view(k.shape)
        k = k * (1 + (iclr - 1) * att.k_a.flatten())
        return r, w, k, v, -removal_key, removal_key * iclr, gate, v_first

    def normalise(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """WKV's y with norm, bonus and gate; all (n, C)."""
        norm, per_head = self.block.att.ln_x, (-1, *self.heads[2:])
        normed = F.group_norm(y, norm.num_groups, norm.weight, norm.bias, norm.eps).view(per_head)
        bonus = (r * k * self.block.att.r_k.flatten()).view(per_head).sum(dim=-1, keepdim=True)
        return (normed + bonus * v.view(per_head)).view(y.shape) * gate

    def add_output(self, residual: Tensor, y: Tensor) -> Tensor:
        """residual (n, C) with the branch's output."""
        return residual + self.product(y, self.block.att.output.weight)

    def mix_channels(self, residual: Tensor, ffn_shift: Tensor) -> tuple[Tensor, Tensor]:
        """residual (n, C) -> the channel mix's input, and the same mixed with the token before; ffn_shift changes."""
        norm = self.block.ln2
        x = F.layer_norm(residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        mixed = torch.addcmul(x, ffn_shift - x, self.block.ffn.x_k.flatten())
        ffn_shift.copy_(x)
        return x, mixed

    def hide(self, x: Tensor, mixed: Tensor, of_table: Tensor | None, embedded: Tensor) -> Tensor:
        """The hidden channels (n, F), with the tokens' DeepEmbed rows and the embedded tokens (n, C)."""
        ffn = self.block.ffn
        hidden = torch.relu(self.product(mixed, ffn.key.weight)).square()
        if self.form == "hidden":
            return hidden * of_table.to(hidden.dtype)
        if self.form == "low-rank":
            gates = low_rank_gates(of_table, embedded, ffn.s_emb_x.weight)
            squeezed = (x @ ffn.s1).unsqueeze(1) @ gates  # (n, 1, 32)
            return hidden * torch.addmm(ffn.s0, squeezed.squeeze(1), ffn.s2)
        return hidden

    def add_value(self, residual: Tensor, hidden: Tensor, of_table: Tensor | None) -> Tensor:
        """residual (n, C) with the channel mix of hidden (n, F)."""
        out = self.product(hidden, self.block.ffn.value.weight)
        return residual + (out * of_table.to(out.dtype) if self.form == "output" else out)

    def products(self, x: Tensor, weights: Tensor) -> Tensor:
        """Of each of k parts: x (k, n, in), weights (k, out, in) -> (k, n, out)."""
        return _matvec(x, weights) if self.product is _matvec else torch.bmm(x, weights.mT)


def _stages(prepared: Callable[[Callable], Callable]) -> SimpleNamespace:
    """The parts of a layer's step, each of which `prepared` may compile, by name.

    They are cut where a product begins, so that its input is computed once, not by every block of the product.
    """
    stages = ("mix_time", "project", "normalise", "add_output", "mix_channels", "hide", "add_value")
    return SimpleNamespace(**{name: prepared(getattr(_Layer, name)) for name in stages})


def _matvec(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., 1, in), weight (..., out, in) -> (..., 1, out), summed in fp32.

    Compiled it is a kernel that streams the weight. A library's matrix product leaves so small a problem to too few
    multiprocessors.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (weight.to(dtype) * x.to(dtype)).sum(dim=-1).to(x.dtype).unsqueeze(-2)


def _filled_up(matrix: Tensor, dim: int, size: int) -> Tensor:
    """`matrix` with zeros behind it along `dim`, up to `size`."""
    missing = size - matrix.shape[dim]
    return F.pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing))
