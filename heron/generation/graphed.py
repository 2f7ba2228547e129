"""Decoding on a GPU: all rows at once, a step recorded as one CUDA graph, so that the host launches it as one.

The same equations as :mod:`heron.generation.decoder`, in the fewest kernels: what is elementwise is compiled where
PyTorch's compiler works, WKV is our kernel with the state in place, and the four low-rank products are one.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heron import compilation, ops
from heron.config import ModelConfig
from heron.generation.decoder import RowStates, lookup, low_rank_gates
from heron.model import RWKV, State


class GraphedDecoder:
    """Decodes a v7, v7a or v8 model on a GPU. The shapes never change: rows without a sequence are computed too.

    The graph is recorded here, which takes a moment, and where a compiler is used up to half a minute the first time.

    Args:
        model: see :func:`heron.generation.decoder.is_fusible`. On a CPU nothing is recorded or compiled (for tests).
        rows: number of sequences it has room for.
        table_rows: token ids (n,) on the host -> DeepEmbed rows (n, width) of every layer; None: looked up in the
            model's tables.
    """

    @torch.inference_mode()
    def __init__(self, model: RWKV, rows: int, table_rows: Callable[[Tensor], Sequence[Tensor]] | None = None):
        self._states = RowStates(model, rows)
        self._model = model
        self._layers = [_Layer(block, model.config) for block in model.blocks]
        device = model.emb.weight.device
        self._on_host = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._ids = self._on_host.to(device)
        self._fetch = table_rows
        self._rows = None if table_rows is None else [part.to(device).clone() for part in table_rows(self._on_host)]
        self._lookup = lookup(model)
        self._before, self._after, self._channel_mix = _Layer.before, _Layer.after, _Layer.channel_mix
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
        self._on_host[list(rows)] = torch.tensor(list(tokens))
        self._ids.copy_(self._on_host, non_blocking=True)
        if self._fetch is not None:
            for buffer, part in zip(self._rows, self._fetch(self._on_host), strict=True):
                buffer.copy_(part, non_blocking=True)
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        return self._logits if list(rows) == list(range(len(self._ids))) else self._logits[list(rows)]

    def _compute(self) -> Tensor:
        """One step of every row, from `_ids` and `_rows`; changes the states in place."""
        embedded = x = self._model.embed(self._ids)
        tables = self._lookup(self._ids) if self._rows is None else self._rows
        v_first = None
        for layer, memory, of_table in zip(self._layers, self._states.layers, tables, strict=True):
            r, w, k, v, a, b, gate, v_first = self._before(layer, x, memory.att_shift, v_first)
            y, _ = ops.wkv7(*(part.view(layer.heads) for part in (r, w, k, v, a, b)), memory.wkv, inplace_state=True)
            x = self._after(layer, x, y.view(x.shape), r, k, v, gate)
            x = self._channel_mix(layer, x, memory.ffn_shift, of_table, embedded)
        return self._model.head(self._model.ln_out(x))

    def _record(self) -> None:
        if importlib.util.find_spec("triton") is not None:
            # Each is compiled twice: for layer 0, which makes the values that layers above mix in, and for the others.
            compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
            self._before, self._after, self._channel_mix = map(
                compiled, (_Layer.before, _Layer.after, _Layer.channel_mix)
            )
            try:
                self._compute()
            except RuntimeError as error:
                if not compilation.is_failure(error):
                    raise
                print(
                    f"heron: decoding uncompiled, so it takes longer: {compilation.first_line(error)}", file=sys.stderr
                )
                self._before, self._after, self._channel_mix = _Layer.before, _Layer.after, _Layer.channel_mix
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what PyTorch allocates or chooses at a first call
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._compute()
        for row in range(len(self._ids)):
            self.write(row, None)


class _Layer:
    """One block's weights and its step, for n rows. What the compiler sees of a decoder."""

    def __init__(self, block: nn.Module, config: ModelConfig):
        att = block.att
        self.block, self.form = block, config.deep_embed
        self.heads = (-1, 1, config.n_head, config.head_size)
        self.mix = torch.stack([getattr(att, f"x_{letter}").view(1, -1) for letter in "rkvwag"])  # (6, 1, C)
        rank = max(getattr(att, f"{letter}1").shape[1] for letter in "vwag")

        def stacked(number: int, dim: int) -> Tensor:
            """The low-rank matrices of values, decay, iclr and gate, zeros up to the largest rank."""
            parts = (getattr(att, f"{letter}{number}") for letter in "vwag")
            return torch.stack([_filled_up(part, dim, rank) for part in parts])

        self.down, self.up = stacked(1, 1), stacked(2, 0)  # (4, C, rank), (4, rank, C)
        biases = [getattr(att, f"{letter}0").view(1, -1) for letter in "vwa"]
        self.bias = torch.stack([*biases, torch.zeros_like(biases[0])])  # (4, 1, C)

    def before(
        self, residual: Tensor, att_shift: Tensor, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Time mixing up to WKV: residual (n, C) -> r, w, k, v, a, b, gate and layer 0's values, all (n, C)."""
        att, norm = self.block.att, self.block.ln1
        x = F.layer_norm(residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        mixed = torch.addcmul(x, att_shift - x, self.mix)
        att_shift.copy_(x)
        r, k, v = (
            F.linear(part, m.weight) for part, m in zip(mixed, (att.receptance, att.key, att.value), strict=False)
        )
        of_v, of_w, of_a, of_g = torch.bmm(mixed[2:], self.down)
        of_v, w, of_a, gate = torch.baddbmm(
            self.bias, torch.stack((of_v, torch.tanh(of_w), of_a, torch.sigmoid(of_g))), self.up
        )
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(of_v))
        iclr = torch.sigmoid(of_a)
        per_head = (-1, *self.heads[2:])
        removal_key = F.normalize((k * att.k_k.flatten()).view(per_head), dim=-1, eps=1e-12).view(k.shape)
        k = k * (1 + (iclr - 1) * att.k_a.flatten())
        return r, w, k, v, -removal_key, removal_key * iclr, gate, v_first

    def after(self, residual: Tensor, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Time mixing from WKV's y on: all (n, C) -> residual (n, C)."""
        att, norm = self.block.att, self.block.att.ln_x
        per_head = (-1, *self.heads[2:])
        y = F.group_norm(y, norm.num_groups, norm.weight, norm.bias, norm.eps).view(per_head)
        bonus = (r * k * att.r_k.flatten()).view(per_head).sum(dim=-1, keepdim=True)
        y = (y + bonus * v.view(per_head)).view(residual.shape)
        return residual + F.linear(y * gate, att.output.weight)

    def channel_mix(self, residual: Tensor, ffn_shift: Tensor, of_table: Tensor | None, embedded: Tensor) -> Tensor:
        """residual (n, C) -> residual (n, C), with the tokens' DeepEmbed rows and the embedded tokens (n, C)."""
        ffn, norm = self.block.ffn, self.block.ln2
        x = F.layer_norm(residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        mixed = torch.addcmul(x, ffn_shift - x, ffn.x_k.flatten())
        ffn_shift.copy_(x)
        hidden = torch.relu(F.linear(mixed, ffn.key.weight)).square()
        if self.form == "hidden":
            hidden = hidden * of_table.to(hidden.dtype)
        elif self.form == "low-rank":
            gates = low_rank_gates(of_table, embedded, ffn.s_emb_x.weight)
            squeezed = (x @ ffn.s1).unsqueeze(1) @ gates  # (n, 1, 32)
            hidden = hidden * torch.addmm(ffn.s0, squeezed.squeeze(1), ffn.s2)
        out = F.linear(hidden, ffn.value.weight)
        if self.form == "output":
            out = out * of_table.to(out.dtype)
        return residual + out


def _filled_up(matrix: Tensor, dim: int, size: int) -> Tensor:
    """`matrix` with zeros behind it along `dim`, up to `size`."""
    missing = size - matrix.shape[dim]
    return F.pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing))
