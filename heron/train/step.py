"""What one training step computes, apart from the run around it: gradients, clipping, the verdict, the optimizer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heron import context, dist, machine
from heron.checkpoint.adapters import base_fingerprint
from heron.config import TrainConfig, finetune
from heron.config.tbptt import Tbptt
from heron.context import Part
from heron.data.conversations import Conversations
from heron.data.packs import Packs
from heron.errors import ConfigError, HeronError
from heron.model import RWKV
from heron.model import compiled as compilation
from heron.model.plain import hooks_of
from heron.ops.global_norm import global_norm, verdict
from heron.optim import build_optimizer, set_lr
from heron.reduction import Reduction
from heron.tables.rows import row_tables
from heron.train import chunks, leaves, preference
from heron.train.base_model import Base
from heron.train.passes import Means, Sample, WholePasses
from heron.train.run_data import learns_ids


class Learner:
    """A model and all that changes when it learns.

    Args:
        model: with fp32 weights, on the CPU; it is moved. Weights that `config.finetune` freezes are cast.
        config: its `dtype` is fp32, bf16 or fp8.
        device: where steps run.
        say: takes a line for the user; None: standard error.
        ranks: the processes that learn together. Each hands in its own samples, or, with the others of a group of
            `config.context_parallel`, whole samples that the group shares; gradients are those of all.

    Attributes:
        model: what is evaluated and sampled from.
        network: what computes the loss: `model`, or under `weights: bf16` a copy in bf16, which each step changes too,
            and which under `dtype: fp8` multiplies in fp8.
        leaves: what is trained, and how the network has it (:mod:`heron.train.leaves`).
        trained: the fp32 leaves alone: what the optimizer steps and a checkpoint holds. Without an adapter or a state
            that is `model`.
        tables: those of which each step is brought the rows that it needs, None where they are plain parameters.
        optimizer: of `trained`.
        pairs: of objective dpo, what compares them; :meth:`refer` comes before the first step.
        compiled: whether steps are compiled, and why.
        parallel: how the network lies over the processes, and why.

    Raises:
        ConfigError: tables on the host for a model that has none; frozen weights to be sharded, or those of a network
            in fp8; `compile` on or graph where nothing can be compiled; samples to be shared by processes for a model
            that reads them whole; chunks that the model or its shards don't fit; an adapter or a state that the model
            has no place for.
    """

    def __init__(
        self,
        model: RWKV,
        config: TrainConfig,
        device: torch.device,
        say: Callable[[str], None] | None = None,
        ranks: dist.Ranks = dist.ALONE,
    ):
        self._say = say or (lambda line: print(f"heron: {line}", file=sys.stderr))
        self.config, self.device, self.ranks = config, device, ranks
        n_parameters = leaves.n_on_device(model, config, ranks)
        self.parallel = dist.choose(config.parallel, ranks, n_parameters, device)
        sharded = self.parallel.value in dist.SHARDED
        leaves.check_tables(config, ranks)
        if sharded and config.dtype == "fp8":
            raise ConfigError("dtype fp8: weights are not sharded in it yet; use --parallel ddp, or --dtype bf16")
        if sharded and config.freezes:
            raise ConfigError(f"parallel {self.parallel.value}: frozen weights are not sharded yet; use --parallel ddp")
        tbptt = Tbptt.of(config.tbptt)
        if tbptt is not None:
            chunks.check(tbptt, model.config)
        has_pairs = config.finetune is not None and config.finetune.has_pairs
        in_pieces = tbptt is not None or has_pairs
        if in_pieces and (sharded or config.context_parallel > 1):
            what = "objective dpo" if has_pairs else f"tbptt {config.tbptt}"
            other = "sharded weights" if sharded else "samples that processes share"
            raise ConfigError(f"{what}: does not work with {other} yet; use --parallel ddp alone")
        if config.context_parallel > 1 and (why := context.why_not(model.config)) is not None:
            raise ConfigError(f"context_parallel {config.context_parallel}: {why}; leave --context_parallel out")
        self._context = ranks.context(config.context_parallel, config.dist_timeout)
        ranks.start_equal(model, device)
        tables_train = finetune.tables_train(config.finetune)
        in_half = machine.choose_weights(config.weights, config.dtype, device).value == "bf16"
        if config.freezes:
            base = "auto" if config.finetune is None else config.finetune.base
            leaves.prepare_base(model, in_half, tables_train, base, device)
        self.tables = row_tables(
            model, device, config.tables, tables_train, ranks, moves=not sharded, always=config.freezes and tables_train
        )
        if self.tables is None and not sharded:
            model.to(device)
        if config.freezes and config.finetune is not None:
            self.leaves = leaves.of_method(model, config.finetune, in_half)
        else:
            self.leaves = leaves.all_weights(model, in_half, config.dtype == "fp8", sharded)
        self.model, self.network, self.trained = self.leaves.model, self.leaves.network, self.leaves.trained
        in_place = len(self.leaves.copies) < len(self.leaves.pairs)  # its gradients are those of the pass
        adds_up = config.accumulate > 1 and in_place
        self._uneven = config.finetune is not None or learns_ids(config)  # passes differ in how many targets they have
        kind = None if self.leaves.adapter is None else self.leaves.adapter.kind
        self.compiled = compilation.choose(
            config.compile, device, model.config, tables_train, adds_up, in_pieces, kind,
            self._context is not None and config.finetune is not None,
            dist.why_not_recorded(
                self.parallel.value, n_parameters, config.context_parallel, config.accumulate, device
            ),
        )  # fmt: skip
        of_users = hooks_of(self.network)
        dist.prepare(
            self.network, ranks, self.parallel.value, device, config.grad_checkpoint, self.compiled.value != "off"
        )
        if sharded and in_half:
            leaves.follow_shards(model, self.network)
        self._copies = self.leaves.copies
        if config.freezes:
            ranks.start_equal(self.trained, device)
            self.refresh()
        self._replayed_hooks = hooks_of(self.network) - of_users  # what they start is in the recording
        self._at_once = config.accumulate == 1 and not in_pieces  # one pass has a step's gradients
        self._reduction = self._reduction_of() if self.parallel.value == "ddp" else None
        if self._reduction is not None:
            self._reduction.held = self.compiled.value != "off" and self._context is None
        autocast = "fp32" if in_half else config.dtype
        means = Means(
            self.network, self.leaves.start, lambda: machine.autocast(autocast, device), device, self._hand_over
        )
        self.pairs = preference.Pairs(means, config.finetune.dpo_beta) if has_pairs and config.finetune else None
        self._passes: WholePasses | chunks.Chunks | preference.Pairs
        if self.pairs is not None:
            self._passes = self.pairs
        elif tbptt is not None:
            self._passes = chunks.Chunks(means, tbptt)
        else:
            self._passes = whole = WholePasses(means, self._exchange, self._recorded, self._learning)
            if self.tables is not None:
                self.tables.before_moving = whole.graphs.clear
        self._figures: list[Tensor] = []  # of the last step: what `preference.FIGURES` names
        self.optimizer = build_optimizer(
            self.trained, config.lr_init, config.weight_decay, (config.beta1, config.beta2), config.adam_eps,
            self.tables if tables_train else None, machine.DTYPES[config.tables_state],
            {master: copy for copy, master in self._copies},
        )  # fmt: skip

    def refer(
        self, corpus: Conversations, packs: tuple[Packs, Packs | None], resume_from: Path | None, base: Base | None
    ) -> None:
        """Set what pairs are measured against, if the run has some: :func:`heron.train.preference.references`."""
        if (pairs := self.pairs) is None:
            return
        fingerprint, whole = None if base is None else base.fingerprint, functools.cache(self.whole)
        if resume_from is None and fingerprint is None:
            fingerprint = base_fingerprint(whole())
        self.network.eval()  # an adapter drops nothing then
        pairs.references = preference.references(
            self.config, fingerprint, corpus, packs, resume_from, lambda: self.pairs_of(whole()).log_likelihoods,
            self.ranks,
        )  # fmt: skip
        self.network.train()

    def pairs_of(self, model: RWKV) -> preference.Pairs:
        """What compares pairs outside of steps, with :meth:`whole`: the network may have some rows of tables alone."""
        assert self.pairs is not None
        if model is self.model:
            return self.pairs
        return self.pairs.on(model, lambda: machine.autocast(self.config.dtype, self.device))

    def gradients(self, samples: Sequence[Sample]) -> Tensor:
        """Start the forward and backward passes of a step.

        Args:
            samples: tokens and targets (B, T) int64 of each micro-batch, and with a memory what it recalls at the
                tokens, (B, T, K, 2) int64, or None; then cu_seqlens of packed conversations, or None; of pairs their
                numbers (:class:`heron.data.packs.Packs`). On the host.

        Returns:
            The mean loss, an fp32 scalar on the device.

        Raises:
            HeronError: the compiler failed. Under `compile: auto` that is said once, and the step made without, by all
                processes; unless one has failed where the others had already sent it what it then has no use for.
        """
        try:
            return self._gradients(samples)
        except Exception as error:
            if self.compiled.value == "off" or not compilation.is_failure(error):
                raise
            if self.ranks.count > 1:
                self._tell_of_failure(error)
            self._do_without_compiler(error)
        return self._gradients(samples)

    def _gradients(self, samples: Sequence[Sample]) -> Tensor:
        passes = self._passes.count(samples)
        spans = [self._span(sample) for sample in samples]
        if self.tables is not None:
            read = [sample[0] if span is None else span.tokens for sample, span in zip(samples, spans, strict=True)]
            self.tables.bring(torch.cat([ids for ids in read if ids is not None]), passes, self._recorded(passes))
        n_figures = 0 if self.pairs is None else len(preference.FIGURES)
        numbers = torch.zeros(1 + n_figures, device=self.device)
        for sample, parts, part in zip(samples, self._parts(samples), spans, strict=True):
            numbers += self._passes.learn(sample, parts, passes, part)
        if not self._at_once:
            self._exchange()
        if self.tables is not None:
            self.tables.collect()
        loss, *self._figures = numbers
        return loss

    def _span(self, sample: Sample) -> Part | None:
        """What this process reads of a sample that others read, too, and which has no memory; None: all of it."""
        if self._context is None:
            return None
        tokens, targets, *packed = (tensor for tensor in sample if tensor is not None)
        return self._context.part(tokens, targets, packed[0] if packed else None)

    def _parts(self, samples: Sequence[Sample]) -> list[float]:
        """Into how many parts of the size of each pass its step divides: each target counts the same in the mean."""
        if not self._uneven:
            return [len(samples) * self.ranks.group(self.config.context_parallel)[1]] * len(samples)
        counts = [self._passes.weight(sample) for sample in samples]
        (total,) = self.ranks.sum([sum(counts)])
        total /= self.config.context_parallel  # each of those that share a sample has counted it
        return [total / max(count, 1) for count in counts]

    def _learning(self) -> list[Tensor]:
        """The leaves of the network that get a gradient by a pass."""
        rows = [] if self.tables is None else self.tables.rows
        return [*(leaf for leaf, _ in self.leaves.pairs), *rows]

    def _reduction_of(self) -> Reduction:
        """Of the leaves that have a step's gradients: of several passes these are added up as the masters'."""
        on_rows = {id(weight) for weight in (self.tables.weights if self.tables is not None else [])}
        learning = (copy if self._at_once else master for copy, master in self.leaves.pairs)
        return Reduction((leaf for leaf in learning if id(leaf) not in on_rows), self._at_once)

    def _exchange(self) -> None:
        """Add up the gradients of all processes; of the first step once the compiler has served all of them."""
        if self._reduction is None:
            return
        if self._reduction.held:
            if not self.ranks.all(True):
                raise compilation.FailedElsewhere("in another process")
            self._reduction.held = False
        self._reduction.finish()

    def _tell_of_failure(self, error: Exception) -> None:
        """Let the others know that the compiler has failed here; HeronError where they are beyond the first step."""
        if self._reduction is None or not self._reduction.held:
            raise HeronError(
                f"compile {self.config.compile}: {compilation.first_line(error)}, and other processes may have gone "
                "on; use --compile off"
            ) from error
        if not isinstance(error, compilation.FailedElsewhere):
            self.ranks.all(False)

    def _recorded(self, passes: int) -> bool:
        """Whether such passes, `passes` a step, are replayed from a CUDA graph once all is compiled."""
        if self.compiled.value != "graph" or passes != self.config.accumulate:
            return False
        if hooks_of(self.network) - self._replayed_hooks:
            return False  # a replay would not call them
        return self.tables is None or self.tables.recordable

    def update(self, loss: Tensor, lr: float, limit: float, asked: bool = False) -> Tensor:
        """Start the optimizer's step, which changes nothing if loss or gradients are bad, or the loss is above `limit`.

        Args:
            asked: whether this process was asked to stop.

        Returns:
            Loss, gradient norm before clipping, 1.0 if they are bad, and how many processes were asked to stop, fp32 on
            the device, the same in all processes: (4,). Of pairs `preference.FIGURES` follow.
        """
        trained = (*self.trained.parameters(), *(copy for copy, _ in self._copies))
        of_rows = [] if self.tables is None else self.tables.gradients()
        gradients = [dist.local(leaf.grad) for leaf in trained if leaf.grad is not None]
        n_asked = torch.full((), float(asked), device=self.device)
        loss, grad_norm, n_asked, *figures = self._agreed(loss, gradients, of_rows, n_asked)
        bad, divisor = verdict(loss, grad_norm, limit, self.config.grad_clip)
        set_lr(self.optimizer, lr)
        if self.config.grad_clip:
            self.optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]
        # AdamW's own means of holding back weights, moments and step counter
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.tables is not None:
            self.tables.release()
        return torch.stack((loss, grad_norm, bad, n_asked, *figures))

    def _agreed(
        self, loss: Tensor, gradients: list[Tensor], of_rows: list[Tensor], n_asked: Tensor
    ) -> tuple[Tensor, ...]:
        """Loss, gradient norm, number of those asked and figures of all processes, from those of each, in one
        collective. The gradient of a row is with its owner alone."""
        if self.ranks.count == 1:
            return loss, global_norm([*gradients, *of_rows]), n_asked, *self._figures
        grad_norm, copies = global_norm(gradients), self.ranks.copies(self.parallel.value)
        squares = grad_norm.square() / copies  # of each gradient there are so many, which are added up
        if of_rows:
            squares = squares + global_norm(of_rows).square()
        numbers = torch.stack((loss, squares, n_asked, *self._figures))
        self.ranks.add_([numbers])
        loss, squares, n_asked, *figures = numbers
        is_known = copies == self.ranks.count and not of_rows
        return loss, grad_norm if is_known else squares.sqrt(), n_asked, *figures

    def weights_are_finite(self) -> bool:
        """Whether nothing that any process trains is infinite or NaN."""
        return self.ranks.all(all(bool(dist.local(leaf).isfinite().all()) for leaf in self.trained.parameters()))

    def whole(self) -> RWKV:
        """The model for use outside of steps, by each process alone. All of them call this together.

        Raises:
            HeronError: tables whose rows several processes have cannot be written into the run folder for a while.
        """
        tables = {} if self.tables is None else self.tables.whole(Path(self.config.out))
        return leaves.whole_model(self.model, tables)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the network what it has copies of; of use after others have changed the leaves."""
        if self._copies:
            copies, masters = ([*map(dist.local, leaves)] for leaves in zip(*self._copies, strict=True))
            torch._foreach_copy_(copies, masters)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Add the gradients of a bf16 network's copies to those of their masters, in fp32, all at once; free them."""
        pairs = [(dist.local(copy.grad), master) for copy, master in self._copies if copy.grad is not None]
        added = [(dist.local(master.grad), gradient) for gradient, master in pairs if master.grad is not None]
        first = [(gradient, master) for gradient, master in pairs if master.grad is None]
        if added:
            sums, more = zip(*added, strict=True)
            torch._foreach_add_(sums, more)  # pyright: ignore[reportPrivateImportUsage]
        if first:
            gradients, masters = zip(*first, strict=True)
            block = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients), dtype=masters[0].dtype)
            parts = torch._C._nn.unflatten_dense_tensors(block, gradients)  # pyright: ignore[reportAttributeAccessIssue]
            torch._foreach_copy_(parts, gradients)  # pyright: ignore[reportPrivateImportUsage]
            for master, part in zip(masters, parts, strict=True):
                master.grad = dist.share_of(master, part)
        for copy, _ in self._copies:
            copy.grad = None

    def _do_without_compiler(self, error: Exception) -> None:
        """Make the steps as they are written from here on, and say so."""
        told = compilation.first_line(error)
        if self.config.compile != "auto":
            raise HeronError(f"compile {self.config.compile}: {told}. Use --compile auto or --compile off") from error
        self._say(f"training steps are not compiled, so they take longer: {told}")
        self.compiled = machine.Choice("off", told)
        if self._reduction is not None:
            self._reduction.held = False
            self._reduction.forget()
        compilation.undo(self.network)
        for pair in self.leaves.pairs:
            for leaf in pair:
                leaf.grad = None
