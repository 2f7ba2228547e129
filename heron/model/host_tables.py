"""DeepEmbed tables in host memory while a model trains: the rows of a step's tokens go to the device, no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heron.errors import ConfigError, DataError
from heron.model.deep_embed import Brought, DeepEmbed
from heron.model.rwkv import RWKV


class HostTables:
    """Moves a model to a device without its tables, and brings it the rows that a step needs, of all layers at once::

        tables = HostTables(model, device)
        optimizer = heron.build_optimizer(model, tables=tables)
        tables.bring(tokens)                    # of the whole step, all its micro-batches
        model.loss(tokens, targets).backward()  # the gradients of the rows are in `tables.rows`
        optimizer.step()                        # changes these rows and their moments alone
        optimizer.zero_grad()                   # lets go of the rows

    The tables stay whole parameters of the model, in host memory (pinned where the device is a GPU), so state_dict()
    is what it always is. Outside a step (validation, samples) they are looked up where they lie.

    Args:
        model: with one DeepEmbed table a layer or more, of any variant.
        device: where the rest of it goes.

    Raises:
        ConfigError: a model without tables.
    """

    def __init__(self, model: RWKV, device: torch.device):
        self._modules = [module for module in model.modules() if isinstance(module, DeepEmbed)]
        if not self._modules:
            raise ConfigError(f"tables host: variant {model.config.variant} has no DeepEmbed tables; drop the setting")
        tables = [module.weight.detach().cpu() for module in self._modules]
        self.rows: list[Tensor] = []  # (n, width) of each table in `weights`; empty outside a step
        self.ids = torch.empty(0, dtype=torch.int64)  # (n,) ascending: whose rows those are
        self._device, self._pins = device, device.type == "cuda"
        for module in self._modules:
            module.weight = None
        model.to(device)
        for module, table in zip(self._modules, tables, strict=True):
            module.weight = nn.Parameter(table.pin_memory() if self._pins else table)
        self.weights = [module.weight for module in self._modules]

    def bring(self, tokens: Tensor) -> None:
        """Bring the rows of token ids, int64 on the host, of any shape. It replaces what was brought before.

        Raises:
            DataError: an id outside the vocabulary.
        """
        self.ids = torch.unique(tokens)
        V, n = self.weights[0].shape[0], len(self.ids)
        if n and not 0 <= int(self.ids[0]) <= int(self.ids[-1]) < V:
            raise DataError(f"tokens: ids must be 0 to {V - 1}, got {int(self.ids[0])} to {int(self.ids[-1])}")
        shapes = [(n, weight.shape[1]) for weight in self.weights]
        with torch.no_grad():
            gathered = _block(shapes, self.weights[0].dtype, self._pins)
            for weight, part in zip(self.weights, _parts(gathered, shapes), strict=True):
                torch.index_select(weight, 0, self.ids, out=part)
            position = torch.full((V,), -1)
            position[self.ids] = torch.arange(n)
            gathered, position = (part.to(self._device, non_blocking=True) for part in (gathered, position))
        self.rows = [part.requires_grad_() for part in _parts(gathered, shapes)]
        for module, rows in zip(self._modules, self.rows, strict=True):
            module.brought = Brought(rows, position)

    def gradients(self) -> list[Tensor]:
        """The gradient (n, width) of each table's rows, on the host: zeros where nothing used them. Waits for a GPU."""
        gradients = [torch.zeros_like(rows) if rows.grad is None else rows.grad for rows in self.rows]
        if self._device.type == "cpu":
            return gradients
        shapes = [tuple(rows.shape) for rows in self.rows]
        on_host = _parts(_block(shapes, self.weights[0].dtype, self._pins), shapes)
        for there, here in zip(gradients, on_host, strict=True):
            here.copy_(there, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return on_host

    def release(self) -> None:
        """Let go of the rows and their gradients: the tables themselves are looked up again."""
        self.rows = []
        for module in self._modules:
            module.brought = None


def _block(shapes: list[tuple[int, int]], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Memory for matrices of these shapes in one piece, so that one copy moves them all."""
    return torch.empty(sum(rows * width for rows, width in shapes), dtype=dtype, pin_memory=pinned)


def _parts(block: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices in a block."""
    sizes = [rows * width for rows, width in shapes]
    return [part.view(shape) for part, shape in zip(block.split(sizes), shapes, strict=True)]
