"""What a run trains: every weight of a model; or an adapter, or an initial state, beside weights that are frozen."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heron import dist
from heron.config import TrainConfig
from heron.config.finetune import QUANTIZED, FinetuneConfig, tables_train
from heron.config.finetune_adapter import AdapterConfig
from heron.errors import ConfigError
from heron.model import RWKV
from heron.model.adapters import Adapter, adapter_parameters, add_adapter
from heron.model.deep_embed import tables_of
from heron.model.fp8 import multiply_in_fp8
from heron.model.quantized import quantize
from heron.model.state import State, States
from heron.model.tuned_state import TunedState

Pair = tuple[nn.Parameter, nn.Parameter]


@dataclasses.dataclass(frozen=True)
class Leaves:
    """What a run trains, and the network that learns it.

    Attributes:
        model: what is evaluated and sampled from.
        network: what computes the loss: `model`, or a copy of it in bf16.
        trained: the fp32 leaves, by name: what the optimizer steps and a checkpoint holds. `model` itself where every
            weight trains.
        adapter, state: what trains beside a frozen `model`, of which an adapter may leave the tables to train.
        beside: the :attr:`pairs` of these.
    """

    model: RWKV
    network: RWKV
    trained: nn.Module
    adapter: Adapter | None = None
    state: TunedState | None = None
    beside: Sequence[Pair] = ()

    @property
    def pairs(self) -> Sequence[Pair]:
        """Each leaf as the network has it, with the one of `trained` that it is, or is a copy of."""
        return self.beside or list(zip(self.network.parameters(), self.model.parameters(), strict=True))

    @property
    def copies(self) -> list[Pair]:
        """The pairs of two different leaves."""
        return [(copy, master) for copy, master in self.pairs if copy is not master]

    @property
    def freezes(self) -> bool:
        """Whether the weights of `model` stay as they are, but for tables that an adapter's settings let train."""
        return self.trained is not self.model

    def start(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> States | None:
        """The state that these sequences start from, as :meth:`TunedState.forward` gives it; None: zeros."""
        return None if self.state is None else self.state(tokens, cu_seqlens, self.network.emb.weight.dtype)

    @torch.no_grad()
    def start_of_one(self) -> State | None:
        """The state that a sequence alone starts from; None: zeros."""
        start = self.start(torch.empty(1, 1))
        return start if isinstance(start, State) else None


def prepare_base(model: RWKV, in_half: bool, tables_train: bool, base: str, device: torch.device) -> None:
    """Freeze the weights of `model`, and cast them to what the network computes with, where they lie.

    Args:
        in_half: whether that is bf16.
        tables_train: whether DeepEmbed tables keep their dtype, as they train.
        base: FinetuneConfig's; int8 and nf4 are quantized, on `device`.

    Raises:
        ConfigError: see :func:`heron.model.quantized.quantize`.
    """
    tables = {id(table.weight) for table in tables_of(model).values()}
    model.requires_grad_(False)
    for weight in model.parameters() if in_half else ():
        if not (tables_train and id(weight) in tables):
            weight.data = weight.data.to(torch.bfloat16)
    if base in QUANTIZED:
        quantize(model, base, device)


def of_method(model: RWKV, settings: FinetuneConfig, in_half: bool) -> Leaves:
    """The leaves that train beside `model`, which :func:`prepare_base` has frozen, on its device.

    Raises:
        ConfigError: settings that this model does not fit; see :func:`heron.model.adapters.add_adapter` and
            :class:`heron.model.tuned_state.TunedState`.
    """
    if settings.adapter is not None:
        return _with_adapter(model, settings.adapter, in_half)
    state = TunedState(model.config, settings.token_shifts).to(model.emb.weight.device)
    return Leaves(model, model, state, state=state, beside=[(leaf, leaf) for leaf in state.parameters()])


def seed_dropout(config: TrainConfig, first: int, rank: int) -> None:
    """Let what an adapter drops in a step depend on the run's seed, the step's first sample and the process alone.

    Each process then drops other numbers, and a run that goes on the same as one that was never stopped.
    """
    adapter = None if config.finetune is None else config.finetune.adapter
    if adapter is not None and adapter.dropout:
        torch.manual_seed(random.Random(f"{config.seed} {first} {rank}").getrandbits(32))


def all_weights(model: RWKV, in_half: bool, in_fp8: bool = False, in_shards: bool = False) -> Leaves:
    """Every weight of `model`.

    Args:
        in_half: the network computes with a copy of them in bf16. Its gradients are the optimizer's as they are; those
            of several micro-batches are added up in fp32 as the model's.
        in_fp8: that copy multiplies its large matrices in fp8.
        in_shards: that copy has no weights until it is sharded; :func:`follow_shards` then gives it some.
    """
    if not in_half:
        return Leaves(model, model, model)
    with torch.device("meta"):
        network = RWKV(model.config)
    for name, table in tables_of(model).items():
        network.set_submodule(name, table)
    if not in_shards:
        _round_into(network, model)
    if in_fp8:
        multiply_in_fp8(network)
    return Leaves(model, network, model)


@torch.no_grad()
def follow_shards(model: RWKV, network: RWKV) -> None:
    """Shard the weights of `model`, which every process has whole, as `network` is, and give it copies of them."""
    for name, leaf in network.named_parameters():
        path, _, own = name.rpartition(".")
        module, master = model.get_submodule(path), model.get_parameter(name)
        if master is not leaf:
            setattr(module, own, nn.Parameter(dist.spread(master.detach(), leaf)))
    _round_into(network, model)


def _round_into(network: RWKV, model: RWKV) -> None:
    """Give a network without weights those of `model`, rounded to bf16; tables are one thing in both."""
    own = dict(network.named_parameters())
    weights = {
        name: master if master is own[name] else master.detach().to(torch.bfloat16)
        for name, master in model.named_parameters()
    }
    network.load_state_dict(weights, assign=True)


def check_tables(config: TrainConfig, ranks: dist.Ranks) -> None:
    """ConfigError where tables are to train by rows in several processes, beside weights that each has whole."""
    if config.freezes and tables_train(config.finetune) and ranks.count > 1:
        raise ConfigError(
            "adapter.tables rows: several processes do not share the rows of tables beside an adapter yet; use one, or "
            "adapter.tables low-rank"
        )


def n_on_device(model: RWKV, config: TrainConfig, ranks: dist.Ranks) -> int:
    """Parameters that each process has on its device where it has all that are not tables."""
    in_tables = sum(table.weight.numel() for table in tables_of(model).values())
    others = sum(parameter.numel() for parameter in model.parameters()) - in_tables
    if config.tables == "host":
        return others
    return others + (in_tables if config.freezes else -(-in_tables // ranks.count))


def whole_model(model: RWKV, tables: Mapping[str, Tensor]) -> RWKV:
    """A model that one process can use without the others: a copy of one that is spread over them, else itself.

    Args:
        tables: whole ones by name, of those whose rows several processes have.
    """
    if not tables and not any(map(dist.is_sharded, model.parameters())):
        return model
    with torch.device("meta"):
        copy = RWKV(model.config)
    copy.load_state_dict(dict(dist.whole(model.state_dict())) | dict(tables), assign=True)
    return copy.requires_grad_(False)


def _with_adapter(model: RWKV, config: AdapterConfig, in_half: bool) -> Leaves:
    """A fresh adapter on `model`, of which the network computes with bf16 copies where it computes in bf16."""
    adapter = add_adapter(model, config)
    tables = tables_of(model) if config.tables == "rows" else {}
    leaves = masters = adapter_parameters(model)
    if in_half:
        masters = {name: nn.Parameter(leaf.detach().clone(), leaf.requires_grad) for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.data = leaf.data.to(torch.bfloat16)
    pairs = [*zip(leaves.values(), masters.values(), strict=True)]
    pairs += [(weight, weight) for weight in (model.get_parameter(f"{name}.weight") for name in tables)]
    return Leaves(model, model, _module_of({**masters, **tables}), adapter=adapter, beside=pairs)


def _module_of(members: Mapping[str, nn.Parameter | nn.Module]) -> nn.Module:
    """A module of these parameters and modules alone, under these names."""
    root = nn.Module()
    for name, member in members.items():
        *path, leaf = name.split(".")
        parent: Any = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        setattr(parent, leaf, member)
    return root
