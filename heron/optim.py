"""The reference optimizer groups, each with its reason, the forms of AdamW, and the learning rate of every step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from heron import dist
from heron.config import TrainConfig
from heron.errors import ConfigError
from heron.ops.adamw import adamw_
from heron.tables.rows import RowTables


class Group(NamedTuple):
    """How the optimizer treats one parameter."""

    name: str
    lr_scale: float
    decays: bool
    reason: str


FAST = Group("2x", 2.0, False, "the decay bias learns at twice the rate")
DECAY = Group("decay", 1.0, True, "a large matrix: only these take weight decay")
PLAIN = Group("1x", 1.0, False, "vectors, norms and low-rank matrices do not decay")
COPY = Group("10x", 10.0, False, "ROSA memory's bonus: logits, which must reach several units within a short run")
ADAPTER = Group("adapter", 1.0, False, "an adapter: decay would pull it back to the base, and two factors at once")
STATE = Group("state", 1.0, False, "a trained initial state: decay would pull it back to remembering nothing")
TABLE = Group("table", 1.0, False, "rows by token, most of them gates around 1: decay would pull them to 0")

_ADAPTERS = (".lora_", ".miss_block")
_STATES = re.compile(r"(.*\.)?(wkv|att_shift|ffn_shift)\.\d+$")  # of heron.model.tuned_state.TunedState
_TABLES = tuple(f".{name}.weight" for name in ("enn", "enn4", "s_emb", "ennk", "emm", "k_emb", "v_emb"))


def group_of(name: str, parameter: torch.Tensor) -> Group:
    """The group of a parameter, by name and shape.

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, configure_optimizers. TABLE is our own choice, since that
    rule would let weight decay act on the DeepEmbed gates, and so are COPY, ADAPTER and STATE; what else v7 lacks goes
    by that rule.
    """
    if any(part in name for part in _ADAPTERS):
        return ADAPTER
    if _STATES.match(name):
        return STATE
    if name.endswith(_TABLES):
        return TABLE
    if name == "memory.copy":
        return COPY
    if "att.w0" in name:
        return FAST
    if sum(size != 1 for size in parameter.shape) >= 2 and name.endswith(".weight"):
        return DECAY
    return PLAIN


def build_optimizer(
    model: nn.Module,
    lr: float = 6e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-18,
    tables: RowTables | None = None,
    tables_state: torch.dtype = torch.float32,
    copies: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the reference groups. Each group carries "name" and "lr_scale" beside torch's own keys.

    Args:
        tables: where the model's tables train by rows, by which they are stepped then (:class:`RowAdamW`).
        tables_state: dtype of the moments of those rows.
        copies: in bf16, of some parameters of the model, by parameter (:class:`CopiedAdamW`).

    Raises:
        ConfigError: the model has no parameter to train.
    """
    members: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(group_of(name, parameter), []).append(parameter)
    if not members:
        raise ConfigError("build_optimizer: the model has no parameter that requires a gradient")
    groups = [
        {
            "name": group.name,
            "params": parameters,
            "lr": lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group, parameters in members.items()
    ]
    options: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, fused=True)
    if tables is not None:
        return RowAdamW(groups, tables, tables_state, copies, **options)
    sharded = any(dist.is_sharded(parameter) for group in groups for parameter in group["params"])
    return CopiedAdamW(groups, copies, **options) if copies or sharded else torch.optim.AdamW(groups, **options)


class CopiedAdamW(torch.optim.AdamW):
    """AdamW for fp32 parameters of which the network computes with bf16 copies (:func:`heron.ops.adamw.adamw_`).

    A parameter without a gradient takes that of its copy. After a step the copies are the parameters, rounded. Of
    parameters that are sharded each process steps its shard. State, groups, `grad_scale` and `found_inf` are those of
    torch.optim.AdamW.

    Args:
        groups: of parameters, as :func:`build_optimizer` makes them. A group has copies of all or of none.
        copies: by parameter.
        options: of torch.optim.AdamW.
    """

    impl = "auto"  # of heron.ops.adamw.adamw_

    def __init__(
        self, groups: list[dict[str, Any]], copies: Mapping[nn.Parameter, nn.Parameter] | None, **options: Any
    ):
        super().__init__(groups, **options)
        self.copies = dict(copies or {})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of everything that has a gradient, or, where `found_inf` is set and not 0, of nothing."""
        for group in self.param_groups:
            gradients = {weight: self._gradient(weight) for weight in group["params"]}
            gradients = {weight: gradient for weight, gradient in gradients.items() if gradient is not None}
            states = [self._state(weight) for weight in gradients]
            exp_avgs, exp_avg_sqs, steps = (
                [dist.local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            adamw_(
                [*map(dist.local, gradients)], [*map(dist.local, gradients.values())], exp_avgs, exp_avg_sqs, steps,
                [dist.local(self.copies[weight]) for weight in gradients if weight in self.copies],
                group["lr"], group["betas"], group["eps"], group["weight_decay"],
                getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self.impl,
            )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of the copies too."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None

    def _gradient(self, weight: nn.Parameter) -> torch.Tensor | None:
        return self.copies[weight].grad if weight.grad is None and weight in self.copies else weight.grad

    def _state(self, weight: nn.Parameter) -> dict[str, torch.Tensor]:
        """As torch.optim.AdamW makes it with fused=True."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state


class RowAdamW(CopiedAdamW):
    """AdamW in which tables are stepped by rows (:func:`heron.ops.rows.row_adamw_`), all else as in CopiedAdamW.

    A step changes the rows that were brought for it, and no other, and moments and their bias correction count a row's
    own steps. Dense AdamW counts all: it goes on moving a row whose token is not there, and lets its second moment
    fade. The two are equal where every row is brought each step.

    Args:
        groups: of parameters, as :func:`build_optimizer` makes them. Tables must not decay: a row would decay as often
            as its token comes.
        tables: the tables, which are members of `groups`.
        state_dtype: of both moments, which lie where the tables do; they are computed in the dtype of the table.
        copies: see :class:`CopiedAdamW`.
        options: of torch.optim.AdamW.
    """

    STATE = ("row_step", "exp_avg", "exp_avg_sq")  # (V,) int32, and (V, width) twice

    def __init__(
        self,
        groups: list[dict[str, Any]],
        tables: RowTables,
        state_dtype: torch.dtype,
        copies: Mapping[nn.Parameter, nn.Parameter] | None = None,
        **options: Any,
    ):
        super().__init__(groups, copies, **options)
        self.tables = tables
        self._state_dtype = state_dtype

    @torch.no_grad()
    def step(self) -> None:
        """One step of everything, or, where `found_inf` is set and not 0, of nothing.

        Raises:
            ConfigError: a table has a gradient of its own: its rows were not brought before the forward.
        """
        if any(weight.grad is not None for weight in self.tables.weights):
            raise ConfigError("tables: their rows were used but not brought; call RowTables.bring before the forward")
        super().step()
        if not self.tables.rows:
            return
        (group,) = (group for group in self.param_groups if group["name"] == TABLE.name)
        states = [self._placed(weight) for weight in self.tables.weights]
        row_steps, exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in self.STATE)
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if grad_scale is not None:
            torch._foreach_div_(self.tables.gradients(), grad_scale)  # pyright: ignore[reportPrivateImportUsage]
        self.tables.step(exp_avgs, exp_avg_sqs, row_steps, group["lr"], group["betas"], group["eps"], found_inf)

    def stepped(self) -> torch.Tensor:
        """The ids (n,) int64, ascending, on the host, of the rows that have been stepped."""
        self.tables.wait()
        counts = [self.state[weight][self.STATE[0]].cpu() for weight in self.tables.weights if self.state[weight]]
        return torch.stack(counts).any(0).nonzero().flatten() if counts else torch.empty(0, dtype=torch.int64)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, and the rows that were brought."""
        super().zero_grad(set_to_none)
        self.tables.release()

    def _placed(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of a table, zeros at first, where the step reads it; a resumed run has read it from a file."""
        state = self.state[weight]
        if not state:
            state["row_step"] = torch.zeros(len(weight), dtype=torch.int32)
            for name in self.STATE[1:]:
                state[name] = torch.zeros_like(weight, dtype=self._state_dtype)
        for name in self.STATE:
            state[name] = self.tables.place(state[name])
        return state


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): a cosine over tokens, times a linear warm-up from 1%.

    ``warmup_steps`` -1 is upstream's default: no warm-up, and a cosine that is one step ahead.

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/trainer.py.
    """
    per_step = config.tokens_per_step
    total = config.max_tokens if config.max_tokens is not None else config.total_steps * per_step
    span = total - config.warmup_steps * per_step
    progress = (step - config.warmup_steps) * per_step / span if span > 0 else 0.0  # a run of warm-up only
    progress = min(max(progress, 0.0), 1.0)
    ratio = config.lr_final / config.lr_init if config.lr_init else 0.0
    lr = config.lr_init * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * progress))
    if step < config.warmup_steps:
        lr *= 0.01 + 0.99 * step / config.warmup_steps
    return lr
