"""`heron estimate`: the memory of a training step before it is made, and which settings to change if it won't fit.

No formula: the very step is run on tensors without contents, and every piece of memory that it would take is entered
in a ledger. What the model, the loss or the optimizer come to hold tomorrow is in the figures tomorrow. One of many
processes runs it in a group whose others are made up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import device_mesh
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from heron import dist
from heron.commands import bench
from heron.commands.settings import step_of
from heron.config import FinetuneConfig, ModelConfig, TrainConfig
from heron.config.finetune import tables_train
from heron.errors import ConfigError
from heron.model import RWKV
from heron.model.quantized import BYTES, quantized_layers
from heron.optim import CopiedAdamW
from heron.progress import progress
from heron.tables.owners import Request
from heron.train import memory
from heron.train.step import Learner

_WORTH_A_SETTING = 0.01  # of what a step takes; what a setting saves must be more, unless the step then fits
_LEAST = 1 << 20  # bytes; a smaller memory is a mistyped one
_PER_MACHINE = 8  # GPUs; hsdp shares the weights among these
# Layers that are run; each further one takes as much more as the last of these did. A sharded backward pass holds up to
# three gathered blocks, which the third layer still adds to.
_COMPARED = 3, 4
_LENGTHS = 1024, 2048  # tokens of a sample that are run; more take more by the same rule, and would take hours


def run(options: argparse.Namespace) -> None:
    if options.gpus < 1:
        raise ConfigError(f"gpus: wanted at least 1, got {options.gpus}")
    available = None if options.memory is None else memory.size(options.memory)
    if available is not None and available < _LEAST:
        raise ConfigError(f"memory: {options.memory} is {memory.in_words(available)}; wanted a size such as 24GiB")
    config, model = step_of(options)
    config = on_gpus(config, model, options.gpus, available)
    print(describe(config, model, available))
    if config.device == "cpu" and (flags := _of_a_gpu(config, vars(options))):
        print(f"\non this CPU; a run on a GPU has {flags} by itself")
    if options.probe:
        print(f"\nmeasured here\n{bench.describe(config, model, bench.bench(config, model, steps=5))}")


def _of_a_gpu(config: TrainConfig, given: dict[str, Any]) -> str:
    """The flags that say what a run on a GPU would choose otherwise than this one on a CPU; none: nothing."""
    chosen = {name: "bf16" for name in ("dtype", "weights") if name not in given and getattr(config, name) == "fp32"}
    is_of_cpu = given.get("device") == "cpu" or given.get("dtype", "bf16") != "bf16"
    return "" if is_of_cpu else " ".join(f"--{name} {value}" for name, value in chosen.items())


class Memory(NamedTuple):
    """Bytes of a training step. Tables are apart from the other parameters, their moments from the other moments."""

    parameters: int  # on the device, with what is frozen, and a bf16 copy if there is one
    optimizer: int  # on the device
    gradients: int  # on the device, all there at the end of the backward pass
    activations: int  # on the device, held when the forward pass of a micro-batch ends
    in_forward: int  # on the device, the most at any moment until the gradient of what the last block gave is there
    in_backward: int  # on the device, the most at any moment from there on; gradients come as activations go
    in_update: int  # on the device, the most at any moment behind the passes
    tables: int  # in host memory, with their moments; 0 where they are on the device

    @property
    def peak(self) -> int:
        """The most at any moment of a step, on the device; which moment that is depends on the number of layers."""
        return max(self.in_forward, self.in_backward, self.in_update)

    def between(self, other: Memory, share: float) -> Memory:
        """Each figure `share` of the way from these to those of `other`; beyond them for a share above 1."""
        return Memory(*(round(a + share * (b - a)) for a, b in zip(self, other, strict=True)))


def on_gpus(config: TrainConfig, model: ModelConfig, gpus: int, available: int | None = None) -> TrainConfig:
    """The settings of one of `gpus` processes, with the layout decided as a run would on GPUs of `available` bytes."""
    if gpus == 1:
        return config
    parallel = config.parallel
    if parallel == "auto":
        fits = available is None or dist.fits(memory.parameters(model), available)
        parallel = "ddp" if fits else "fsdp"
    return dataclasses.replace(config, processes=gpus, parallel=parallel)


def estimate(config: TrainConfig, model: ModelConfig) -> Memory:
    """What a step of `config` takes, after the first, on a GPU as on a CPU, as eager PyTorch asks for memory.

    Of `config.processes` it is each one's, on its GPU; what tables have on the host is of each process, too.

    On top come what kernels use inside, what an allocator rounds up and loses between the pieces, and the few hundred
    MiB that CUDA itself takes.

    Args:
        config: its `dtype` is fp32, bf16 or fp8; `model` in it is not looked at.
    """
    if config.finetune is not None and config.finetune.quantizes:
        return _quantized(config, config.finetune, model)
    distinct = min(config.tokens_per_step // max(1, config.processes), model.vocab_size)  # ids of one process
    return _of_length(config, model, distinct)


def _of_length(config: TrainConfig, model: ModelConfig, distinct: int) -> Memory:
    """:func:`_of_depth`; of samples of any length from two of other lengths, since a step is made chunk by chunk."""
    if config.ctx_len <= max(_LENGTHS):
        return _of_depth(config, model, distinct)
    shorter, longer = (_of_depth(dataclasses.replace(config, ctx_len=n), model, distinct) for n in _LENGTHS)
    return shorter.between(longer, (config.ctx_len - _LENGTHS[0]) / (_LENGTHS[1] - _LENGTHS[0]))


def _of_depth(config: TrainConfig, model: ModelConfig, distinct: int) -> Memory:
    """:func:`_counted`; of any number of layers from two others."""
    if model.n_layer <= max(_COMPARED):
        return _counted(config, model, distinct)
    fewer, more = (_counted(config, model.changed(n_layer=n), distinct) for n in _COMPARED)
    return fewer.between(more, (model.n_layer - _COMPARED[0]) / (_COMPARED[1] - _COMPARED[0]))


def describe(config: TrainConfig, model: ModelConfig, available: int | None) -> str:
    """What ``heron estimate`` prints: the bytes of each part, then, where they do not fit, what each setting gives."""
    with progress("estimating") as note:
        return _described(config, model, available, note)


def _described(config: TrainConfig, model: ModelConfig, available: int | None, note: Callable[[str], None]) -> str:
    found = estimate(config, model)
    batch = f"micro_bsz {config.micro_bsz}, ctx_len {config.ctx_len}, accumulate {config.accumulate}"
    places = [
        ("parameters", found.parameters, "device"),
        ("optimizer", found.optimizer, "device"),
        ("gradients", found.gradients, "device"),
        ("activations", found.activations, "device, of one pass"),
        ("most at once", found.peak, "device; gradients come as activations go"),
        ("tables, their moments", found.tables, "host"),
    ]
    lines = [
        f"{model.variant} L{model.n_layer} C{model.n_embd} V{model.vocab_size}, {batch}",
        *([f"each of {config.processes} GPUs, parallel {config.parallel}"] if config.processes > 1 else []),
        f"dtype {config.dtype}, weights {config.weights}, tables {config.tables}"
        + (", blocks recomputed" if config.grad_checkpoint else ""),
        "",
        *(f"{name:<24}{memory.in_words(n_bytes):>12}  {place}" for name, n_bytes, place in places),
    ]
    if available is None:
        return "\n".join(lines)
    if found.peak <= available:
        return "\n".join([*lines, "", f"fits in {memory.in_words(available)}"])
    lines += ["", f"does not fit in {memory.in_words(available)}; most at once with"]
    vain: set[str] = set()  # settings that saved nothing; after others they would not either
    while found.peak > available:
        tried = []
        for flags, changed in memory.knobs(config, model):
            if flags.split()[0] not in vain:
                note(f"now with {flags}")
                tried.append((estimate(changed, model), flags, changed))
        vain |= {flags.split()[0] for made, flags, _ in tried if made.peak > (1 - _WORTH_A_SETTING) * found.peak}
        enough = max((1 - _WORTH_A_SETTING) * found.peak, available)
        tried = sorted((entry for entry in tried if entry[0].peak <= enough), key=lambda entry: entry[0].peak)
        for changed, flags, _ in tried:
            verdict = "fits" if changed.peak <= available else ""
            lines.append(f"  {flags:<40}{memory.in_words(changed.peak):>12}  {verdict}".rstrip())
        if not tried:
            return "\n".join([*lines, "nothing more helps; a smaller model, or another device"])
        if tried[0][0].peak > available:
            lines.append(f"and on top of {tried[0][1]}")
        found, config = tried[0][0], tried[0][2]
    return "\n".join(lines)


def _quantized(config: TrainConfig, finetune: FinetuneConfig, model: ModelConfig) -> Memory:
    """The same beside a base in bf16, with as much less of its matrices."""
    found = estimate(dataclasses.replace(config, finetune=dataclasses.replace(finetune, base="bf16")), model)
    with torch.device("meta"):
        n_weights = sum(layer.weight.numel() for layer in quantized_layers(RWKV(model)).values())
    saved = round(n_weights * (2 - BYTES[finetune.base]))
    held = ("parameters", "in_forward", "in_backward", "in_update")
    return found._replace(**{name: getattr(found, name) - saved for name in held})


def _counted(config: TrainConfig, model: ModelConfig, distinct: int) -> Memory:
    """A step in a ledger, after one of two tokens that makes the moments; `distinct` ids occur in it."""
    passes = min(config.accumulate, 2)  # any more take no more
    with torch.device("meta"):
        network = RWKV(model)
    with _among_others(config.processes) as ranks, FakeTensorMode(), _nothing_moves(), _Ledger() as ledger:
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        learner = Learner(network, dataclasses.replace(config, compile="off"), torch.device("cpu"), ranks=ranks)
        if learner.tables is not None:
            learner.tables.impl = "reference"  # in operations that the ledger sees
            made_up = torch.empty(distinct, dtype=torch.int64)
            learner.tables.distinct = lambda *_: made_up  # pyright: ignore[reportAttributeAccessIssue]
            if learner.tables.owners is not None:
                requested = _request(ranks, made_up, model.vocab_size)
                learner.tables.owners.request = lambda _: requested  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(learner.optimizer, CopiedAdamW) and learner.optimizer.copies:
            learner.optimizer.impl = "reference"  # like the kernel, it never has all gradients in fp32
        sample, two = (_sample(model, *shape) for shape in ((config.micro_bsz, config.ctx_len), (1, 2)))
        counts: dict[str, int] = {}
        _count_activations(learner.network, ledger, counts)
        learner.update(learner.gradients([two]), 0.0, math.inf)
        ledger.peaks.clear()
        loss = learner.gradients([sample] * passes)
        on_host = learner.tables.weights if learner.tables is not None and config.tables == "host" else []
        rows = [] if learner.tables is None else learner.tables.rows
        trained = [parameter for parameter in learner.trained.parameters() if not _among(on_host, parameter)]
        others = [other for other in learner.network.parameters() if not _among([*trained, *on_host], other)]
        ahead = 0 if tables_train(config.finetune) else _bytes(rows)  # of frozen tables, on a GPU, for the step after
        gradients = _bytes(tensor.grad for tensor in (*trained, *others, *rows) if tensor.grad is not None)
        ledger.begin("update")
        learner.update(loss, 0.0, math.inf)
        state = learner.optimizer.state
        tables = _bytes(on_host) + _bytes(part for weight in on_host for part in state.get(weight, {}).values())
        return Memory(
            parameters=_bytes(trained) + _bytes(others),
            optimizer=_bytes(part for parameter in trained for part in state.get(parameter, {}).values()),
            gradients=gradients,
            activations=counts["activations"],
            **{f"in_{phase}": most - tables + ahead for phase, most in ledger.peaks.items()},
            tables=tables,
        )


def _request(ranks: dist.Ranks, ids: Tensor, n_rows: int) -> Request:
    """What tables of so many rows are asked for where each process needs as many rows as this one, evenly owned."""
    n, count = len(ids), ranks.count
    evenly = [n // count + (number < n % count) for number in range(count)]
    owned = torch.empty(min(n, -(-n_rows // count)), dtype=torch.int64)
    return Request(ranks, ids, n, evenly, owned, torch.empty_like(owned), evenly, ids, ids)


def _sample(model: ModelConfig, *shape: int) -> tuple[Tensor, ...]:
    """Tokens and targets, and what a memory recalls."""
    tokens = torch.zeros(shape, dtype=torch.int64)
    recalled = [] if model.memory is None else [torch.zeros(*shape, model.memory.n_matches, 2, dtype=torch.int64)]
    return tokens, tokens, *recalled


@contextlib.contextmanager
def _nothing_moves() -> Iterator[None]:
    """Modules are on every device while inside: tensors without contents can't be moved, and need not be."""
    usual = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.to = usual


@contextlib.contextmanager
def _among_others(processes: int) -> Iterator[dist.Ranks]:
    """Be the first of so many processes while inside. The others are made up: what they send has no contents either."""
    if processes <= 1:
        yield dist.ALONE
        return
    from torch.testing._internal.distributed import fake_pg  # torchtitan's estimates rest on it, too

    usual = device_mesh.init_device_mesh

    def of_numbers(*given: Any, **named: Any) -> Any:
        with _disable_current_modes():  # which processes it has can't be made up
            return usual(*given, **named)

    distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=processes)
    device_mesh.init_device_mesh = of_numbers
    try:
        yield dist.Ranks(0, processes, 0, min(processes, _PER_MACHINE))
    finally:
        device_mesh.init_device_mesh = usual
        distributed.destroy_process_group()


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive. For tensors without contents: what depends on them is made up.

    Attributes:
        peaks: the most in each phase that :meth:`begin` has named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._known: dict[int, int] = {}  # bytes by storage
        self._resize = torch.UntypedStorage.resize_

    def begin(self, phase: str) -> None:
        self._phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.held)

    def __enter__(self) -> _Ledger:
        def resize(storage: torch.UntypedStorage, n_bytes: int) -> Any:  # so does FSDP give back a block's weights
            if storage._cdata in self._known:
                self._count(storage._cdata, n_bytes)
            return self._resize(storage, n_bytes)

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked more often than anything is computed
            return args[0].device
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # every id is in the vocabulary, no number is bad
        if (written := _written(func)) is not None:  # in place: nothing new, and quicker than to work out its shape
            return args[0] if written == "self" else kwargs[written]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(dist.local(tensor).untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._count(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._strike, storage._cdata)

    def _count(self, key: int, n_bytes: int) -> None:
        self.held += n_bytes - self._known.get(key, 0)
        self._known[key] = n_bytes
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.held)

    def _strike(self, key: int) -> None:
        self.held -= self._known.pop(key)


@functools.cache
def _written(func: Any) -> str | None:
    """The argument that an operator writes into and returns as it was shaped: "self" or "out". None: it does not."""
    written = [argument.name for argument in func._schema.arguments if argument.is_write]
    if len(func._schema.returns) != 1 or torch.Tag.inplace_view in func.tags or written not in (["self"], ["out"]):
        return None
    return written[0]


def _count_activations(network: RWKV, ledger: _Ledger, counts: dict[str, int]) -> None:
    """Note what each forward pass leaves behind, and tell the ledger when a forward or a backward pass begins."""

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*given: Any, **named: Any) -> Any:
            counts["before"] = ledger.held
            ledger.begin("forward")
            return method(*given, **named)

        return begun

    def head_loss(hidden: Tensor, *given: Any) -> Tensor:
        hidden.register_hook(lambda _: ledger.begin("backward"))
        value = of_network(hidden, *given)
        counts["activations"] = max(counts.get("activations", 0), ledger.held - counts["before"])
        return value

    of_network = network.head_loss
    network.head_loss = head_loss  # pyright: ignore[reportAttributeAccessIssue]
    network.loss = noting(network.loss)  # pyright: ignore[reportAttributeAccessIssue]
    network.hidden_states = noting(network.hidden_states)  # pyright: ignore[reportAttributeAccessIssue]


def _among(tensors: list[Tensor], tensor: Tensor) -> bool:
    return any(tensor is other for other in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(dist.local(tensor).numel() * tensor.element_size() for tensor in tensors)
