"""Many processes that make one run: who they are, what they decide together, and how a network lies over them.

Elsewhere only weights are gathered (:mod:`heron.gathering`), gradients travel (:mod:`heron.reduction`), those that
share a text speak with each other (:mod:`heron.context`), and those that write a checkpoint together
(:mod:`heron.checkpoint.sharded`). torchrun starts the processes, one a GPU, and tells each its number in the
environment; PyTorch moves the numbers: NCCL between GPUs, Gloo between hosts and for what is decided.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from heron import machine
from heron.context import Context
from heron.errors import ConfigError, HeronError
from heron.model import RWKV
from heron.model.compiled import compile_blocks
from heron.model.deep_embed import DeepEmbed

Result = TypeVar("Result")

SHARDED = ("fsdp", "hsdp")  # of what :func:`choose` gives: each process has a part of the weights
_COME, _FAILED = "come", "failed"  # keys of the store where processes meet
_LOOKS_PER_SECOND, _SECONDS_TO_TELL = 500, 30  # at the store, of all processes that wait for others there
_BYTES_PER_WEIGHT = 16  # fp32 weights, their bf16 copies, bf16 gradients and two fp32 moments
_FOR_WEIGHTS = 0.6  # of a GPU's memory; the rest is for activations
_FOR_VALIDATION = 0.1  # likewise, of shards put together
_NO_MULTIPROCESSORS = 2  # NCCL_CTA_POLICY_ZERO


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes of a run: this is number `rank` of `count`. One that torchrun did not start is alone.

    Attributes:
        local_rank, local_count: the same among those on this machine.
        connection: of these processes; None: the one that :meth:`joined` made.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    connection: distributed.ProcessGroup | None = None

    @classmethod
    def of_environment(cls) -> Ranks:
        """As torchrun tells it; ConfigError where it tells half of it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if not {"RANK", "MASTER_ADDR"} <= os.environ.keys():  # of clusters, some set WORLD_SIZE for every program
            return cls()
        try:
            rank, count, local_rank, local_count, _ = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"RANK is set, and {error} in the environment is missing or wrong; start with torchrun, or unset RANK"
            ) from None
        return cls(rank, count, local_rank, local_count)

    def check_number(self, wanted: int, sharing: int = 1) -> None:
        """ConfigError where a run is for another number of processes (0: for any), or for groups that these don't make.

        Args:
            sharing: how many share a sample.
        """
        if wanted not in (0, self.count):
            raise ConfigError(
                f"processes {wanted}: started {'without torchrun' if self.count == 1 else f'on {self.count}'}; type "
                f"torchrun --nproc-per-node {wanted} -m heron train ..., or leave --processes out"
            )
        if self.count % sharing:
            raise ConfigError(
                f"context_parallel {sharing}: wanted a number that divides that of the processes, {self.count}; type "
                f"torchrun --nproc-per-node {sharing} -m heron train ..., or leave --context_parallel out"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, wanted: str) -> machine.Choice:
        """The device of this process, as :func:`heron.machine.choose_device`: of many, each takes a GPU of its own.

        Raises:
            ConfigError: a GPU that is named by its number, or more processes than GPUs.
        """
        if self.count == 1 or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
            return machine.choose_device(wanted)
        if wanted not in ("auto", "cuda"):
            raise ConfigError(
                f"device {wanted}: torchrun started {self.count} processes, one a GPU; leave --device out"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"device: rank {self.rank} has no GPU: torchrun started {self.local_count} processes here, and PyTorch "
                f"sees {torch.cuda.device_count()} GPUs; use --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(self.local_rank)
        return machine.choose_device("cuda")

    @contextlib.contextmanager
    def joined(self, device: torch.device, timeout: float) -> Iterator[None]:
        """Be connected to the others inside. Returns from the beginning, and the end, when all have come there.

        Args:
            timeout: seconds for which one process waits for another, here and inside.

        Raises:
            HeronError: they did not come, or one of them went away inside; with the rank of this one in its message,
                as every HeronError from inside has it.
        """
        if self.count == 1:
            yield
            return
        try:
            wait, store = datetime.timedelta(seconds=timeout), self._met(timeout)
            settings: dict[str, Any] = dict(backend="gloo")
            if device.type == "cuda":
                settings = dict(backend="cpu:gloo,cuda:nccl", pg_options=nccl_options(wait))
            distributed.init_process_group(timeout=wait, store=store, rank=self.rank, world_size=self.count, **settings)
            yield
            self.all(True)  # who leaves first must not take the connection from the others
            gc.collect()  # NCCL does not end while a recorded pass holds it, and what holds that is of cycles
            distributed.destroy_process_group()
        except HeronError as error:
            raise type(error)(f"rank {self.rank}: {error}") from error
        except RuntimeError as error:
            if not _is_of_connection(error):
                raise
            told = str(error).splitlines()[0]
            raise HeronError(
                f"rank {self.rank}: another process of the run failed, or did not answer within {timeout:g} s "
                f"(--dist_timeout): {told}. Checkpoints are whole, the same command goes on"
            ) from error

    def tell(self, failure: Exception) -> None:
        """Have the others, who wait in :meth:`joined`, end since this process will not come there.

        Processes that torchrun did not start meet at a store of the first: it cannot tell that it has failed, and the
        others wait up to half a minute for it to tell theirs.
        """
        if self.count > 1 and (not self.is_first or _is_of_torchrun()):
            with contextlib.suppress(RuntimeError):  # nobody is there to be told
                self._store(_SECONDS_TO_TELL).set(_FAILED, f"ends as rank {self.rank} failed: {failure}")

    def _store(self, timeout: float) -> PrefixStore:
        """Where the processes meet: torchrun's store, else one of the first process.

        After a restart it may still have the addresses of those before, so each start has its own part of it.

        Args:
            timeout: seconds to wait for the store, and for each of its answers.
        """
        wait = datetime.timedelta(seconds=timeout)
        is_host, port = self.is_first and not _is_of_torchrun(), int(os.environ["MASTER_PORT"])
        store = TCPStore(
            os.environ["MASTER_ADDR"], port, self.count, is_host, wait, wait_for_workers=False, multi_tenant=True
        )
        return PrefixStore(f"heron-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _met(self, timeout: float) -> PrefixStore:
        """Wait for all processes at their store; HeronError where one has failed, or does not come."""
        store, until = self._store(timeout), time.monotonic() + timeout
        store.set(f"{_COME}-{self.rank}", "")
        store.add(_COME, 1)
        while store.add(_COME, 0) < self.count:
            if store.check([_FAILED]):
                raise HeronError(store.get(_FAILED).decode())
            if time.monotonic() > until:
                missing = [str(rank) for rank in range(self.count) if not store.check([f"{_COME}-{rank}"])]
                raise HeronError(
                    f"rank {', '.join(missing)} of {self.count} did not come within {timeout:g} s (--dist_timeout): "
                    "see what they have printed; start those that are not there, or give them longer"
                )
            time.sleep(self.count / _LOOKS_PER_SECOND)
        return store

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in the first process, which alone does it, in all of them.

        Raises:
            HeronError: in all of them, where `work` raised one or an OSError.
        """
        if self.count == 1:
            return work()
        result, failure = None, None
        if self.is_first:
            try:
                result = work()
            except (HeronError, OSError) as error:
                failure = error
        told: list[Any] = [result, None if failure is None else str(failure)]
        distributed.broadcast_object_list(told, 0, self.connection, torch.device("cpu"))
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise HeronError(f"ends as rank 0 failed: {told[1]}")
        return told[0]

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """`work()` in the first process, and in the others when it has succeeded there."""
        found: list[Result] = []
        self.first(lambda: found.append(work()))
        return found[0] if found else work()

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` gives in each process, in order, in all of them.

        Raises:
            HeronError: in all of them, where `work` raised one or an OSError.
        """
        result, failure = None, None
        try:
            result = work()
        except (HeronError, OSError) as error:
            failure = error
        told: list[Any] = [None] * self.count
        mine = (result, None if failure is None else str(failure))
        if self.count == 1:
            told = [mine]
        else:
            distributed.all_gather_object(told, mine, self.connection)
        if failure is not None:
            raise failure
        for rank, (_, why) in enumerate(told):
            if why is not None:
                raise HeronError(f"ends as rank {rank} failed: {why}")
        return [result for result, _ in told]

    def apart(self, timeout: float) -> Ranks:
        """The same processes over a connection of their own, for what a thread of each decides with the others'."""
        if self.count == 1:
            return self
        wait = datetime.timedelta(seconds=timeout)
        group = distributed.new_group(backend="gloo", timeout=wait)
        assert isinstance(group, distributed.ProcessGroup)
        return dataclasses.replace(self, connection=group)

    def all(self, holds: bool) -> bool:
        """Whether something holds in every process."""
        return self.sum([float(not holds)]) == [0.0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Numbers of the hosts, each added up over all processes."""
        if self.count == 1:
            return list(values)
        added = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(added, group=self.connection)
        return added.tolist()

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the host of each process, in order; they are alike in shape."""
        if self.count == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous(), self.connection)
        return parts

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor, group=self.connection)

    def exchange(self, given: Iterable[Tensor], filled: Iterable[Tensor], sent: list[int], received: list[int]) -> None:
        """Give rank 0 the first `sent[0]` rows of each tensor, rank 1 the next `sent[1]`, ...; fill others likewise.

        Both are contiguous, on one device; `received[0]` rows come from rank 0, and so on.
        """
        pairs = zip(filled, given, strict=True)
        works = [distributed.all_to_all_single(*pair, received, sent, self.connection, True) for pair in pairs]
        for work in works:
            if work is not None:  # this process is one of the group
                work.wait()

    def start_equal(self, model: nn.Module, device: torch.device) -> None:
        """Give every process the first one's weights: initial values differ in last bits from CPU to CPU."""
        for tensor in model.state_dict().values() if self.count > 1 else ():
            there = tensor.to(device)
            distributed.broadcast(there, 0)
            tensor.copy_(there)

    def group(self, sharing: int) -> tuple[int, int]:
        """Whose samples this process reads: its group's number, of how many groups of `sharing` processes each."""
        return self.rank // sharing, self.count // sharing

    def context(self, sharing: int, timeout: float) -> Context | None:
        """The `sharing` processes that read the same samples, neighbours by their rank; None where each reads alone.

        Args:
            timeout: seconds for which one waits for another.
        """
        if sharing == 1:
            return None
        group, _ = distributed.new_subgroups(sharing, timeout=datetime.timedelta(seconds=timeout))
        assert isinstance(group, distributed.ProcessGroup)
        return Context(group)

    def copies(self, parallel: str) -> int:
        """How many processes have the same gradient after a step's backward passes, see :func:`choose`."""
        return {"fsdp": 1, "hsdp": self.count // self.local_count}.get(parallel, self.count)


ALONE = Ranks()


def nccl_options(timeout: datetime.timedelta) -> Any:
    """Of a group of processes with GPUs, which takes no multiprocessors where copy engines do (:mod:`heron.gathering`).

    Args:
        timeout: for which one waits for another.
    """
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    if hasattr(options.config, "cta_policy"):  # PyTorch may be built with an older NCCL
        options.config.cta_policy = _NO_MULTIPROCESSORS  # pyright: ignore[reportAttributeAccessIssue]
    return options


def choose(wanted: str, ranks: Ranks, n_parameters: int, device: torch.device) -> machine.Choice:
    """How a network lies over the processes: "none" for one process, else "ddp", "fsdp" or "hsdp".

    Args:
        wanted: TrainConfig.parallel.
    """
    if ranks.count == 1:
        return machine.Choice("none", "one process")
    if wanted != "auto":
        return machine.Choice(wanted, "as asked")
    if device.type == "cuda" and not fits(n_parameters, torch.cuda.get_device_properties(device).total_memory):
        return machine.Choice("fsdp", "a GPU has no room for all weights and moments")
    return machine.Choice("ddp", "each GPU has room for all weights and moments")


def fits(n_parameters: int, n_bytes: int) -> bool:
    """Whether a GPU of so many bytes has room for all weights and moments beside the activations."""
    return _BYTES_PER_WEIGHT * n_parameters <= _FOR_WEIGHTS * n_bytes


def why_not_recorded(
    parallel: str, n_parameters: int, sharing: int, accumulate: int, device: torch.device
) -> str | None:
    """Why ``--compile auto`` does not record passes over shards, or over spans of samples, as a clause; None: it does.

    Args:
        parallel: as :func:`choose` gives it.
        n_parameters: as :func:`choose` takes it.
        sharing: how many processes share a sample.
        accumulate: passes a step.
    """
    sharded = parallel in SHARDED
    if device.type != "cuda" or not (sharded or sharing > 1):
        return None
    if accumulate > 1:
        return "several of these passes a step have not been compared with recorded ones"
    if sharded and 4 * n_parameters > _FOR_VALIDATION * torch.cuda.get_device_properties(device).total_memory:
        return "beside what a recorded pass keeps a validation, which reads all weights in fp32, may have no room"
    return None


def prepare(
    network: RWKV, ranks: Ranks, parallel: str, device: torch.device, grad_checkpoint: bool, compiled: bool
) -> None:
    """Make a network ready to learn: activation checkpointing, then compiled blocks, then shards.

    Args:
        parallel: as :func:`choose` gives it. With fsdp and hsdp parameters become shards, DTensors on `device`, or on
            "meta" where they were there; each block is gathered while it computes. Tables, whose rows are brought, stay
            as they are.
    """
    network.grad_checkpoint = grad_checkpoint
    if compiled:
        compile_blocks(network)
    if parallel in SHARDED:
        _shard(network, ranks, parallel, device)


def _shard(network: RWKV, ranks: Ranks, parallel: str, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if parallel == "hsdp":
        shape, names = (ranks.count // ranks.local_count, ranks.local_count), ("replicate", "shard")
    else:
        shape, names = (ranks.count,), ("shard",)
    how: dict[str, Any] = dict(
        mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),  # all travels in the dtype that it has
        ignored_params={module.weight for module in network.modules() if isinstance(module, DeepEmbed)},
    )
    parts, last = [network.emb, *network.blocks], network.blocks[-1]
    if isinstance(norm := getattr(network.blocks[0], "ln0", None), nn.Module):
        parts.insert(1, norm)  # it is called before its block is
    last.add_module("head", network.head)  # for the moment: it travels with the last block, behind which it is used
    parts.append(network.ln_out)  # FSDP frees what the last block was gathered in as soon as it gathers another part
    for part in parts:  # the last block is the first that the backward pass needs
        fully_shard(part, **how, reshard_after_forward=part is not last)
    del last.head
    network.emb.set_unshard_in_backward(False)  # pyright: ignore[reportCallIssue]
    how["ignored_params"].add(network.head.weight)
    fully_shard(network, **how, reshard_after_forward=False)
    # Nothing is added in place to what a block returns, which is where a view would do harm.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    register_fsdp_forward_method(network, "loss")
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a loss is this process's share already: gradients are summed
            module.set_force_sum_reduction_for_comms(True)
    if parallel == "fsdp" and device.type == "cuda" and ranks.count == ranks.local_count:
        _gather_by_copies(network, ranks, how["mesh"].get_group())


def _gather_by_copies(network: RWKV, ranks: Ranks, group: distributed.ProcessGroup) -> None:
    """Have copy engines gather all blocks but the last, which comes with the head, where they can."""
    from heron import gathering

    blocks: list[Any] = [*network.blocks[:-1]]
    if not blocks or not ranks.all(gathering.is_there(ranks.count)):
        return
    most = max(gathering.numel(filter(is_sharded, block.parameters()), ranks.count) for block in blocks)
    gather = gathering.CopiedGather(group, most)
    network.emb.register_forward_pre_hook(gather.begin)
    for block in blocks:
        block.set_custom_all_gather(gather)
        block.register_forward_pre_hook(gather.has_weights)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: of a DTensor its shard, of any other all."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, placed and sharded as `like` is. Nothing is sent."""
    if not is_sharded(like) or not tensor.dim():
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore[reportAttributeAccessIssue]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)


def share_of(like: Tensor, part: Tensor) -> Tensor:
    """A tensor placed and sharded as `like` is, of which `part` is the share of this process."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore[reportAttributeAccessIssue]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name with their shards put together, one after another. All processes go through it together."""
    for name, tensor in tensors.items():
        yield name, tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has a part of it alone."""
    return hasattr(tensor, "device_mesh")  # to ask for the class would load half a second of modules


def _is_of_torchrun() -> bool:
    """Whether torchrun keeps the store where processes meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether one process tells with this error that another is gone or late. Gloo has no class for it."""
    return isinstance(error, distributed.DistError) or any(
        words in str(error) for words in ("gloo", "Connection closed", "Connection reset", "Timed out")
    )
