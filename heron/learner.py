"""What one training step computes, apart from the run around it: gradients, clipping, the verdict, the optimizer."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from heron import machine
from heron.config import TrainConfig
from heron.guards import is_bad
from heron.model import RWKV
from heron.model.deep_embed import DeepEmbed
from heron.model.host_tables import HostTables
from heron.optim import build_optimizer, set_lr


class Learner:
    """A model and all that changes when it learns.

    Args:
        model: with fp32 weights, on the CPU; it is moved.
        config: its `dtype` is fp32 or bf16.
        device: where steps run.

    Attributes:
        model: the weights that are trained, saved and evaluated.
        network: what computes the loss: `model`, or under `weights: bf16` a copy in bf16, made again after each step.
        tables: those in host memory, None where they are with the model.
        optimizer: of `model`'s parameters.

    Raises:
        ConfigError: tables on the host for a model that has none.
    """

    def __init__(self, model: RWKV, config: TrainConfig, device: torch.device):
        self.config, self.device, self.model = config, device, model
        self.tables = HostTables(model, device) if config.tables == "host" else None
        if self.tables is None:
            model.to(device)
        self.network = in_bf16(model) if config.weights == "bf16" else model
        self.network.grad_checkpoint = config.grad_checkpoint
        self.optimizer = build_optimizer(
            model, config.lr_init, config.weight_decay, (config.beta1, config.beta2), config.adam_eps,
            self.tables, machine.DTYPES[config.tables_state],
        )  # fmt: skip

    def gradients(self, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Start the forward and backward passes of a step.

        Args:
            samples: tokens and targets (B, T) int64 of each micro-batch, on the host.

        Returns:
            The mean loss, an fp32 scalar on the device.
        """
        if self.tables is not None:
            self.tables.bring(torch.cat([tokens for tokens, _ in samples]))
        by_autocast = self.config.dtype if self.config.weights == "fp32" else "fp32"
        loss = torch.zeros((), device=self.device)
        for sample in samples:
            x, y = (_onto(self.device, part) for part in sample)
            with machine.autocast(by_autocast, self.device):
                micro_loss = self.network.loss(x, y) / len(samples)
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def update(self, loss: Tensor, lr: float, limit: float) -> Tensor:
        """Start the optimizer's step, which changes nothing if loss or gradients are bad, or the loss is above `limit`.

        Returns:
            Loss, gradient norm before clipping, and 1.0 if they are bad: (3,) fp32 on the device.
        """
        rows = [] if self.tables is None else self.tables.rows
        grad_norm = _clip([*self.model.parameters(), *rows], self.config.grad_clip)
        bad = is_bad(loss, grad_norm, limit)
        set_lr(self.optimizer, lr)
        self.optimizer.found_inf = bad  # AdamW's own means of holding back weights, moments and step counter
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.refresh()
        return torch.stack((loss, grad_norm, bad))

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the network the model's weights; of use where the two are not one, after the weights were changed."""
        for copy, master in zip(self.network.parameters(), self.model.parameters(), strict=True):
            if copy is not master:
                copy.copy_(master)


def in_bf16(model: RWKV) -> RWKV:
    """A network that computes as `model` in bf16, tables apart: these are `model`'s own.

    Its gradients are added up in fp32 as those of `model`: each is handed over, and freed, once it is complete.
    """
    with torch.device("meta"):
        network = RWKV(model.config)
    tables = {name: module for name, module in model.named_modules() if isinstance(module, DeepEmbed)}
    for name, table in tables.items():
        network.set_submodule(name, table)
    masters = dict(model.named_parameters())
    for name, module in network.named_modules():
        for leaf in () if name in tables else list(dict(module.named_parameters(recurse=False))):
            master = masters[f"{name}.{leaf}" if name else leaf]
            copy = nn.Parameter(master.detach().to(torch.bfloat16))
            copy.register_post_accumulate_grad_hook(functools.partial(_hand_over, master))
            setattr(module, leaf, copy)
    return network


def _hand_over(master: nn.Parameter, copy: nn.Parameter) -> None:
    gradient = copy.grad.to(master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    copy.grad = None


def _onto(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _clip(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
