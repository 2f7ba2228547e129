"""DeepEmbed tables off the device: in the memory of the host, or in a file that is mapped into it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from heron.errors import CheckpointError, ConfigError, HeronError
from heron.files import new_file
from heron.model import RWKV
from heron.model.coded import CodedLinear
from heron.model.deep_embed import DeepEmbed
from heron.ops.rows import copy_rows, copy_rows_choice

PLACES = ("device", "host", "disk")
_MAGIC = b"HERONTAB"
_ROWS_AT_ONCE = 1024  # packed at a time: some hundred MB of the largest models
_PROBES = 1 << 16  # numbers of each tensor that enter a fingerprint


class Tables:
    """The DeepEmbed tables of all layers, rows fetched for all of them at once.

    Args:
        tables: (V, width) of each layer, on the host.
        device: that the rows are fetched for. A GPU with kernels for it reads them by itself, in pinned copies.
        file: where to keep them packed, V x L x width, so that a token's rows are one read; None: in memory as given.
            A file of the same tables is used as it is; another one is refused.

    Attributes:
        by_kernel: whether the device reads the rows by itself, with :meth:`gathered`.

    Raises:
        CheckpointError: `file` holds something else, or cannot be written.
        HeronError: the tables don't fit into memory that can be pinned.
    """

    def __init__(self, tables: list[Tensor], device: torch.device, file: Path | None = None):
        self.by_kernel = file is None and copy_rows_choice(device).impl == "cuda"
        self._tables = tables = _pinned(tables) if self.by_kernel else tables
        self._bytes = [table.contiguous().view(torch.uint8).numpy() for table in tables]
        self._n_layer, self._dtype = len(tables), tables[0].dtype
        self._packed: np.ndarray | None = None
        self._fetched: Sequence[Tensor] = ()
        if file is not None:
            self._map(file)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows (L, n, width) of token ids (n,), on the host, in the tables' dtype."""
        if self._packed is None:
            return torch.stack([table[ids] for table in self._tables])
        picked = torch.from_numpy(self._packed[ids.numpy()]).view(self._dtype)  # (n, L, width)
        return picked.transpose(0, 1).contiguous()

    def pick(self, ids: np.ndarray, out: Tensor) -> None:
        """Write the rows of token ids (n,) to `out` (n, L, width), on the host, contiguous, in the tables' dtype."""
        there = out.view(torch.uint8).numpy()
        if self._packed is not None:
            np.take(self._packed, ids, axis=0, out=there, mode="clip")  # any other mode would buffer `out`
            return
        for layer, table in enumerate(self._bytes):
            there[:, layer] = table[ids]

    def gathered(self, ids: Tensor) -> Sequence[Tensor]:
        """Rows (n, width) of each layer for token ids (n,), on their GPU, by a kernel of its current stream."""
        rows = torch.empty(self._n_layer, len(ids), self._width, dtype=self._dtype, device=ids.device).unbind()
        copy_rows(self._tables, ids, rows, None)
        return rows

    def staging(self, n: int, pinned: bool) -> Tensor:
        """Zeros (n, L, width) on the host for :meth:`pick`; `pinned`: for asynchronous copies to a GPU."""
        return torch.zeros(n, self._n_layer, self._width, dtype=self._dtype, pin_memory=pinned)

    def fetch(self, ids: Tensor, device: torch.device) -> None:
        """Bring the rows of ids (B, T) to `device`, where the next forward of the model finds them."""
        flat = ids.reshape(-1)
        rows = self.gathered(flat.to(device)) if self.by_kernel else self.rows(flat.cpu()).to(device)
        self._fetched = [part.view(*ids.shape, self._width) for part in rows]

    def fetched(self, layer: int, ids: Tensor) -> Tensor:
        """Rows (B, T, width) of `layer` that :meth:`fetch` brought."""
        rows = self._fetched[layer]
        if rows.shape[:-1] != ids.shape:
            raise ConfigError(f"tables: {tuple(rows.shape[:-1])} tokens were fetched, {tuple(ids.shape)} are looked up")
        return rows

    @property
    def _width(self) -> int:
        return self._shape[2] if self._packed is not None else self._tables[0].shape[1]

    def _map(self, file: Path) -> None:
        V, width = self._tables[0].shape
        self._shape = (V, self._n_layer, width)
        header = self._header()
        if not file.exists():
            with new_file(file) as temporary, open(temporary, "wb") as out:
                out.write(header)
                for start in range(0, V, _ROWS_AT_ONCE):
                    part = torch.stack([table[start : start + _ROWS_AT_ONCE] for table in self._tables], dim=1)
                    out.write(part.contiguous().view(torch.uint8).numpy().data)
        with open(file, "rb") as found:
            same = found.read(len(header)) == header
        n_bytes = V * len(self._tables) * width * self._dtype.itemsize
        if not same or file.stat().st_size != len(header) + n_bytes:
            raise CheckpointError(
                f"{file}: these are the tables of another model, or cut short; delete it or name another"
            )
        shape = (V, len(self._tables), width * self._dtype.itemsize)
        self._packed = np.memmap(file, mode="r", offset=len(header), shape=shape)
        self._tables, self._bytes = [], []

    def _header(self) -> bytes:
        """Fixed by the tables: magic, length, JSON; padded to 64 bytes."""
        names = {f"{layer}": table for layer, table in enumerate(self._tables)}
        about = {"shape": self._shape, "dtype": str(self._dtype), "fingerprint": fingerprint(names)}
        text = json.dumps(about).encode()
        text += b" " * (-(len(_MAGIC) + 8 + len(text)) % 64)
        return _MAGIC + struct.pack("<Q", len(text)) + text


def _pinned(tables: list[Tensor]) -> list[Tensor]:
    """Copies that no page of can be moved, so that a GPU may read them."""
    try:
        return [table.contiguous().pin_memory() for table in tables]
    except RuntimeError as error:
        size = sum(table.nbytes for table in tables) / 2**30
        raise HeronError(
            f"tables host: {size:.1f} GiB of memory, or more, as a table takes a power of two, could not be pinned for "
            f"the GPU: {str(error).splitlines()[0]}. Give tables='disk' (--tables disk)"
        ) from None


class _Fetched(nn.Module):
    """Stands where a DeepEmbed stood and gives the rows that were fetched ahead."""

    def __init__(self, tables: Tables, layer: int):
        super().__init__()
        self._tables, self._layer = tables, layer

    def forward(self, ids: Tensor) -> Tensor:
        return self._tables.fetched(self._layer, ids)


def off_device(model: RWKV, device: torch.device, file: Path | None) -> tuple[RWKV, Tables]:
    """A model on `device` that has `model`'s weights but no tables, and the tables. `model` stays as it is.

    Weights that are on `device` already are shared.

    Raises:
        ConfigError: a model without DeepEmbed, or one whose tables are looked up for the whole context.
    """
    config = model.config
    if config.deep_embed is None or config.has_attention:
        raise ConfigError(
            f"tables: those of v8 and v7a can be kept off the device, this model is {config.variant}; give 'device'"
        )
    with torch.device("meta"):
        bare = RWKV(config)
    for name, module in model.named_modules():
        if isinstance(module, CodedLinear):
            bare.set_submodule(name, module)
    bare.load_state_dict(model.state_dict(), assign=True)
    [name] = [name for name, part in bare.get_submodule("blocks.0.ffn").named_children() if isinstance(part, DeepEmbed)]
    store = Tables([getattr(block.ffn, name).weight.detach().cpu() for block in bare.blocks], device, file)
    for layer, block in enumerate(bare.blocks):
        setattr(block.ffn, name, _Fetched(store, layer))
    return bare.to(device), store


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """16 hex digits that change with any name, shape, dtype, and with nearly any training: up to 65,536 evenly spaced
    numbers of each tensor enter it."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        probes = flat[:: max(1, flat.numel() // _PROBES)].cpu().contiguous()
        digest.update(probes.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
