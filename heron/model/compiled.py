"""Compiled training steps: the blocks as few kernels, by torch.compile.

One block is compiled, not the network: what takes half a minute is then the same at 12 layers and at 60. Layer 0, which
has no values of an earlier layer to mix in, is a second graph. Embedding, tables, head and loss stay as they are
written: the gradients of looked-up rows are then summed in one order, so a step gives the same bits each time. What a
ROSA memory makes of looked-up rows and of lengths is compiled too.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from heron import machine
from heron.config import ModelConfig
from heron.errors import ConfigError, KernelError
from heron.model import products
from heron.model.memory import WRITTEN
from heron.model.rwkv import RWKV, Block
from heron.ops import _choice
from heron.ops.wkv7 import wkv7_choice

BACKEND = "inductor"
_DORA = "the length of a weight's rows, by which dora divides, is computed in a way that can't be compiled"
_GRAPHS = 64  # a process may train with several shapes and precisions, two graphs each; PyTorch would stop at 8


def choose(
    wanted: str,
    device: torch.device,
    model: ModelConfig,
    tables_train: bool = True,
    adds_up: bool = False,
    in_pieces: bool = False,
    adapter: str | None = None,
    cut_packs: bool = False,
    not_by_itself: str | None = None,
) -> machine.Choice:
    """Whether training steps of `model` on `device` are compiled. On a GPU without triton a line says what to install.

    Args:
        wanted: TrainConfig's `compile`.
        tables_train: whether tables train, if there are any; else they are frozen.
        adds_up: whether each pass adds its gradients to those of the passes before, in place.
        in_pieces: whether a step reads texts chunk by chunk, or compares pairs.
        adapter: the kind of the adapter that is on the model, if there is one.
        cut_packs: whether several processes share a sample in which texts are packed.
        not_by_itself: why "auto" does not record passes that "graph" would, as a clause; None: it does.

    Raises:
        ConfigError: "on" or "graph" where it can't be.
    """
    if wanted == "off":
        return machine.Choice("off", "as set")
    reason = why_not(device, model) or (_DORA if adapter == "dora" else None)
    no_graph = _why_no_graph(model, tables_train, adds_up, in_pieces, cut_packs)
    if wanted != "auto":
        if reason := reason or (no_graph if wanted == "graph" else None):
            raise ConfigError(f"compile {wanted}: {reason}; use --compile auto")
        return machine.Choice(wanted, "as set")
    if reason is not None:
        return machine.Choice("off", reason)
    few = "the elementwise work of a block in few kernels"
    if no_graph is not None:
        return machine.Choice("on", f"{few}; not as one graph: {no_graph}")
    if not_by_itself is not None:
        return machine.Choice("on", f"{few}; as one graph with --compile graph alone: {not_by_itself}")
    return machine.Choice("graph", f"{few}, and a pass launched as one")


def why_not(device: torch.device, model: ModelConfig) -> str | None:
    """Why training steps are not compiled, as a clause; None where they can be."""
    if device.type != "cuda":
        return "it is for a GPU; a CPU gains little"
    if model.has_attention or model.rosa is not None:
        return f"{model.variant} has branches that look back over a growing context"
    with _choice.counting_on_builds():
        if wkv7_choice(device, 512, head_size=model.head_size).impl != "cuda":
            return "WKV7 has no kernels here"
    return _why_no_triton()


def _why_no_graph(
    model: ModelConfig, tables_train: bool, adds_up: bool, in_pieces: bool, cut_packs: bool
) -> str | None:
    """Why passes are not replayed from a CUDA graph, as a clause; None where they can be."""
    if cut_packs:
        return "where processes cut a pack is not the same for every step"
    if in_pieces:
        return "texts are read chunk by chunk, or in pairs"
    if adds_up:  # a replay overwrites its gradients
        return "gradients of several passes are added up in place"
    if model.deep_embed in (None, "output") or not tables_train:
        return None
    return f"rows of {model.variant}'s tables are looked up in a way that is not the same for every step"


def compile_blocks(network: RWKV) -> None:
    """Have every block of `network` compute by one function, compiled at its first call of a shape; its memory, too."""
    mix = compiled(Block.mix, _compile)
    for block in network.blocks:
        block.compiled = mix  # pyright: ignore[reportArgumentType]
    if network.memory is not None:
        network.memory.compiled = WRITTEN.compiled(compiled)


def undo(network: RWKV) -> None:
    """Have each block, and the memory, compute as it is written again."""
    for block in network.blocks:
        block.compiled = None  # pyright: ignore[reportArgumentType]
    if network.memory is not None:
        network.memory.compiled = None


def compiled(function: Callable, backend: str | Callable | None = None) -> Callable:
    """`function` of tensors, and of modules for their parameters, compiled whole at its first call of each shape.

    The compiler does not wait for kernels that are being built in the background; the first run does.

    Args:
        backend: torch.compile's; None: `BACKEND`.
    """
    import torch._dynamo
    import torch._inductor.config
    from torch._dynamo.exc import BackendCompilerFailed

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        # It gives gradients of (1, 1, C) as (C,), which autograd refuses: pytorch/pytorch#178080.
        torch._inductor.config.triton.mix_order_reduction = False

    optimized = torch.compile(function, backend=_then_awaits(backend or BACKEND), dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with _choice.counting_on_builds():
            try:
                return optimized(*arguments)
            except BackendCompilerFailed as error:
                if not isinstance(error.inner_exception, KernelError):
                    raise
            return optimized(*arguments)  # a build has failed; now that this is known, another form is taken

    return run


def varying(function: Callable, sized: Callable[..., Iterable[Tensor | None]], dim: int = 0) -> Callable:
    """`function` of :func:`compiled`, compiled once for all sizes above 1 that dimension `dim` of some arguments has.

    Args:
        sized: function's arguments -> these tensors.
    """
    import torch._dynamo

    def run(*arguments: Any) -> Any:
        for x in sized(*arguments):
            if x is not None and x.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(x, dim)
        return function(*arguments)

    return run


@functools.cache  # one object for each backend: the compiler takes up what it has compiled by the same one
def _then_awaits(backend: str | Callable) -> Callable[..., Any]:
    """`backend`, then the kernels that the graph counts on."""

    def compile_and_await(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        import torch._dynamo

        run = (torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend)(graph, inputs)
        _choice.await_builds()
        return run

    return compile_and_await


def _compile(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """BACKEND, but what a matrix product of the backward reads may be computed again too, from what is kept anyway, and
    large products are ours.

    A block then keeps either the key of its channel mix or its squared ReLU, the size of four tensors of (B, T, C), not
    both.
    """
    import torch._dynamo
    import torch._functorch.config

    settings = {"config_patches": products.settings()} if BACKEND == "inductor" else {}
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs, **settings)


class PassGraph:
    """A forward and backward pass over one shape of batch, recorded as a CUDA graph: the host launches it as one.

    It keeps the memory of the pass, gradients too, for as long as it lives.

    Args:
        run: makes the pass over a sample and returns its loss. It was run before, so nothing is compiled, tuned or
            loaded any more.
        leaves: get a gradient by it, and have none now.
        sample: the tensors of a batch of that shape, or None where it has none, on the GPU.
    """

    def __init__(self, run: Callable[..., Tensor], leaves: Sequence[Tensor], sample: Sequence[Tensor | None]):
        self._sample = [None if part is None else part.clone() for part in sample]
        torch.cuda.empty_cache()  # what earlier passes left can't be used by this one
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = run(*self._sample)
        self._gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]
        for leaf, _ in self._gradients:
            leaf.grad = None

    def replay(self, sample: Sequence[Tensor | None]) -> Tensor:
        """The loss of a batch; the leaves have its gradients until the next replay."""
        for mine, part in zip(self._sample, sample, strict=True):
            if mine is not None and part is not None:
                mine.copy_(part, non_blocking=True)
        self._graph.replay()
        for leaf, gradient in self._gradients:
            leaf.grad = gradient
        return self._loss


class FailedElsewhere(Exception):
    """The compiler failed in another process of the run."""


def is_failure(error: BaseException) -> bool:
    """Whether the compiler raised this, here or elsewhere, rather than what it compiled."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, (TorchDynamoException, FailedElsewhere))


def first_line(error: BaseException) -> str:
    """A compiler's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])


@functools.cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is not None:
        return None
    print("heron: training steps are not compiled, so they take longer: pip install triton", file=sys.stderr)
    return "triton, which compiles for a GPU, is not installed"
