"""What one training step computes, apart from the run around it: gradients, clipping, the verdict, the optimizer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heron import context, dist, machine
from heron.checkpoint.adapters import base_fingerprint
from heron.config import TrainConfig
from heron.config.tbptt import Tbptt
from heron.context import Part
from heron.data.conversations import Conversations
from heron.data.packs import Packs
from heron.errors import ConfigError, HeronError
from heron.model import RWKV
from heron.model import compiled as compilation
from heron.model.plain import has_hooks
from heron.optim import build_optimizer, set_lr
from heron.tables.rows import row_tables
from heron.train import chunks, leaves, preference
from heron.train.base_model import Base
from heron.train.guard import is_bad
from heron.train.run_data import learns_ids

_IN_CHUNK = ("tokens", "targets", "recalled", "cu_seqlens")
_PASSES_BEFORE_GRAPH = 3  # by then all is compiled, tuned and loaded


class Learner:
    """A model and all that changes when it learns.

    Args:
        model: with fp32 weights, on the CPU; it is moved. Weights that `config.finetune` freezes are cast.
        config: its `dtype` is fp32 or bf16.
        device: where steps run.
        say: takes a line for the user; None: standard error.
        ranks: the processes that learn together. Each hands in its own samples, or, with the others of a group of
            `config.context_parallel`, whole samples that the group shares; gradients are those of all.

    Attributes:
        model: what is evaluated and sampled from.
        network: what computes the loss: `model`, or under `weights: bf16` a copy in bf16, which each step changes too.
        leaves: what is trained, and how the network has it (:mod:`heron.train.leaves`).
        trained: the fp32 leaves alone: what the optimizer steps and a checkpoint holds. Without an adapter or a state
            that is `model`.
        tables: those of which each step is brought the rows that it needs, None where they are plain parameters.
        optimizer: of `trained`.
        references: of objective dpo, what pairs are measured against; set before the first step.
        compiled: whether steps are compiled, and why.
        parallel: how the network lies over the processes, and why.

    Raises:
        ConfigError: tables on the host for a model that has none; frozen weights to be sharded; `compile` on or graph
            where nothing can be compiled; samples to be shared by processes for a model that reads them whole; chunks
            that the model or its shards don't fit; an adapter or a state that the model has no place for.
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
        self.parallel = dist.choose(config.parallel, ranks, leaves.n_on_device(model, config, ranks), device)
        sharded = self.parallel.value in ("fsdp", "hsdp")
        if sharded and config.freezes:
            raise ConfigError(f"parallel {self.parallel.value}: frozen weights are not sharded yet; use --parallel ddp")
        self._tbptt = Tbptt.of(config.tbptt)
        if self._tbptt is not None:
            chunks.check(self._tbptt, model.config)
        self._has_pairs = config.finetune is not None and config.finetune.has_pairs
        if self._tbptt is not None or self._has_pairs:
            what = "objective dpo" if self._has_pairs else f"tbptt {config.tbptt}"
            if sharded or config.context_parallel > 1:
                other = "sharded weights" if sharded else "samples that processes share"
                raise ConfigError(f"{what}: does not work with {other} yet; use --parallel ddp alone")
        self.references: preference.References | None = None
        self._figures = torch.zeros(len(preference.FIGURES) if self._has_pairs else 0, device=device)
        if config.context_parallel > 1 and (why := context.why_not(model.config)) is not None:
            raise ConfigError(f"context_parallel {config.context_parallel}: {why}; leave --context_parallel out")
        self._context = ranks.context(config.context_parallel, config.dist_timeout)
        ranks.start_equal(model, device)
        in_half = machine.choose_weights(config.weights, config.dtype, device).value == "bf16"
        if config.freezes:
            base = "auto" if config.finetune is None else config.finetune.base
            leaves.prepare_base(model, in_half, config.tables == "host", base, device)
        self.tables = row_tables(model, device, config.tables, not config.freezes, ranks, moves=not sharded)
        if self.tables is None and not sharded:
            model.to(device)
        if config.freezes and config.finetune is not None:
            self.leaves = leaves.of_method(model, config.finetune, in_half)
        else:
            self.leaves = leaves.all_weights(model, in_half and not sharded)
        self.model, self.network, self.trained = self.leaves.model, self.leaves.network, self.leaves.trained
        self._copies = self.leaves.copies
        if config.freezes:
            ranks.start_equal(self.trained, device)
            self.refresh()
        self._autocast_dtype = "fp32" if in_half else config.dtype
        in_place = len(self._copies) < len(self.leaves.pairs)  # its gradients are those of the pass
        adds_up = config.accumulate > 1 and in_place
        self._uneven = config.finetune is not None or learns_ids(config)  # passes differ in how many targets they have
        in_pieces = self._tbptt is not None or self._has_pairs
        kind = None if self.leaves.adapter is None else self.leaves.adapter.kind
        self.compiled = compilation.choose(
            config.compile, device, model.config, config.tables, adds_up, in_pieces, kind, sharded,
            self._context is not None,
        )  # fmt: skip
        self._passes, self._graphs = Counter(), {}  # by shape of batch
        if self.tables is not None:
            self.tables.before_moving = self._graphs.clear
        dist.prepare(
            self.network, ranks, self.parallel.value, device, config.grad_checkpoint, self.compiled.value != "off",
            in_half,
        )  # fmt: skip
        # Whether one pass has a step's gradients.
        self._at_once = config.accumulate == 1 and self._tbptt is None and not self._has_pairs
        self._reduction = self._reduction_of() if self.parallel.value == "ddp" else None
        if self._reduction is not None:
            self._reduction.held = self.compiled.value != "off" and self._context is None
        self.optimizer = build_optimizer(
            self.trained, config.lr_init, config.weight_decay, (config.beta1, config.beta2), config.adam_eps,
            None if config.freezes else self.tables, machine.DTYPES[config.tables_state],
            {master: copy for copy, master in self._copies},
        )  # fmt: skip

    def refer(
        self, corpus: Conversations, packs: tuple[Packs, Packs | None], resume_from: Path | None, base: Base | None
    ) -> None:
        """Set :attr:`references`, where the run learns from pairs; see :func:`heron.train.preference.references`."""
        if not self._has_pairs:
            return
        fingerprint = None if base is None else base.fingerprint
        if resume_from is None and fingerprint is None:
            fingerprint = base_fingerprint(self.model)
        self.network.eval()  # an adapter drops nothing then
        self.references = self.ranks.first(
            lambda: preference.references(self.config, fingerprint, corpus, packs, resume_from, self.likelihoods)
        )
        self.network.train()

    def gradients(self, samples: Sequence[tuple[Tensor | None, ...]]) -> Tensor:
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

    def _gradients(self, samples: Sequence[tuple[Tensor | None, ...]]) -> Tensor:
        in_chunks = [] if self._tbptt is None else [chunks.cut(sample, self._tbptt.chunk) for sample in samples]
        passes = sum(map(len, in_chunks)) or len(samples)
        spans = [self._span(sample) for sample in samples]
        if self.tables is not None:
            read = [sample[0] if span is None else span.tokens for sample, span in zip(samples, spans, strict=True)]
            self.tables.bring(torch.cat([ids for ids in read if ids is not None]), passes, self._recorded(passes))
        loss = torch.zeros((), device=self.device)
        self._figures = torch.zeros_like(self._figures)
        for number, (sample, parts, part) in enumerate(zip(samples, self._parts(samples), spans, strict=True)):
            if in_chunks or self._has_pairs:
                loss += self._read(in_chunks[number], parts) if in_chunks else self._compare(sample, parts)
                continue
            if part is not None:
                sample = (part.tokens, part.targets, None, part.cu_seqlens)
            loss += self._pass([_onto(self.device, tensor) for tensor in sample], len(samples), parts, part)
            if len(samples) > 1:
                self._hand_over()
        if not self._at_once:
            self._exchange()
        if self.tables is not None:
            self.tables.collect()
        return loss

    def _span(self, sample: tuple[Tensor | None, ...]) -> Part | None:
        """What this process reads of a sample that others read, too, and which has no memory; None: all of it."""
        if self._context is None:
            return None
        tokens, targets, *packed = (tensor for tensor in sample if tensor is not None)
        return self._context.part(tokens, targets, packed[0] if packed else None)

    def _parts(self, samples: Sequence[tuple[Tensor | None, ...]]) -> list[float]:
        """Into how many parts of the size of each pass its step divides: each target counts the same in the mean."""
        if not self._uneven:
            return [len(samples) * self.ranks.group(self.config.context_parallel)[1]] * len(samples)
        if self._has_pairs:
            counts = [preference.n_texts(sample) for sample in samples]
        else:
            counts = [int((targets != -100).sum()) for _, targets, *_ in samples]  # pyright: ignore[reportAttributeAccessIssue]
        (total,) = self.ranks.sum([sum(counts)])
        total /= self.config.context_parallel  # each of those that share a sample has counted it
        return [total / max(count, 1) for count in counts]

    def _read(self, sample: list[chunks.Chunk], parts: float) -> Tensor:
        """The share of the loss of a sample that is read in chunks; the gradients are in the masters."""
        assert self._tbptt is not None
        sample = [
            chunk._replace(**{name: _onto(self.device, getattr(chunk, name)) for name in _IN_CHUNK}) for chunk in sample
        ]
        reader = chunks.Reader(
            self.network,
            self.leaves.start,
            lambda: machine.autocast(self._autocast_dtype, self.device),
            self._hand_over,
        )
        return reader.learn(sample, self._tbptt.exact, parts)

    def likelihoods(self, sample: tuple[Tensor | None, ...]) -> Tensor:
        """The log-probability (n,) of what is learned of each text of a sample of pairs, which is on the host."""
        here = [_onto(self.device, part) for part in sample[:4]]
        offsets = sample[3][: preference.n_texts(sample) + 1].tolist()  # pyright: ignore[reportOptionalSubscript]
        with machine.autocast(self._autocast_dtype, self.device):
            start = self.leaves.start(here[0], here[3])  # pyright: ignore[reportArgumentType]
            return preference.log_likelihoods(self.network, here, offsets, start)

    def _compare(self, sample: tuple[Tensor | None, ...], parts: float) -> Tensor:
        """The share of the loss of a sample of pairs; the gradients are in the masters."""
        assert self.references is not None
        assert self.config.finetune is not None
        assert sample[4] is not None
        logprobs = self.likelihoods(sample)
        reference = _onto(self.device, self.references.train[sample[4][: len(logprobs)]])
        assert reference is not None
        losses, margins = preference.losses_and_margins(logprobs, reference, self.config.finetune.dpo_beta)
        loss = losses.mean() / parts
        loss.backward()
        self._hand_over()
        margins = margins.detach()
        self._figures += torch.stack(((margins > 0).float().mean(), margins.mean())) / parts
        return loss.detach()

    def _pass(self, sample: list[Any], passes: int, parts: float, part: Part | None = None) -> Tensor:
        """One of the `passes` of a step: its share of the loss; the gradients are in the network's leaves.

        `parts`: what its mean loss is divided by; `part`: of the sample, what `sample` is, where processes share it.
        """

        def run(
            divisor: Tensor, tokens: Tensor, targets: Tensor, recalled: Any = None, cu_seqlens: Any = None
        ) -> Tensor:
            state = self.leaves.start(tokens, cu_seqlens)
            span = None if part is None else part.span
            given: dict[str, Any] = {"recalled": recalled, "cu_seqlens": cu_seqlens, "state": state, "span": span}
            given = {name: part for name, part in given.items() if part is not None}
            with machine.autocast(self._autocast_dtype, self.device):
                loss = self.network.loss(tokens, targets, **given)
                loss = (loss if part is None else loss * part.share) / divisor
            loss.backward()
            if passes == 1:
                self._exchange()
            return loss.detach()

        shape = (passes, *(None if tensor is None else tensor.shape for tensor in sample))
        self._passes[shape] += 1
        given = [torch.full((), parts, device=self.device), *sample]
        if not self._recorded(passes) or self._passes[shape] <= _PASSES_BEFORE_GRAPH:
            return run(*given)
        if shape not in self._graphs:
            learning = [leaf for leaf, _ in self.leaves.pairs]
            if self.tables is not None:
                learning += self.tables.rows
            self._graphs[shape] = compilation.PassGraph(run, learning, given)
        return self._graphs[shape].replay(given)

    def _reduction_of(self) -> dist.Reduction:
        """Of the leaves that have a step's gradients: of several passes these are added up as the masters'."""
        on_rows = {id(weight) for weight in (self.tables.weights if self.tables is not None else [])}
        learning = (copy if self._at_once else master for copy, master in self.leaves.pairs)
        return dist.Reduction((leaf for leaf in learning if id(leaf) not in on_rows), self._at_once)

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
        if self.compiled.value != "graph" or passes != self.config.accumulate or self._tbptt is not None:
            return False
        if any(map(has_hooks, self.network.modules())):
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
        bad = is_bad(loss, grad_norm, limit)
        set_lr(self.optimizer, lr)
        if self.config.grad_clip:
            divisor = ((grad_norm + 1e-6) / self.config.grad_clip).clamp(min=1.0)
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
            return loss, norm_of([*gradients, *of_rows]), n_asked, *self._figures
        grad_norm, copies = norm_of(gradients), self.ranks.copies(self.parallel.value)
        squares = grad_norm.square() / copies  # of each gradient there are so many, which are added up
        if of_rows:
            squares = squares + norm_of(of_rows).square()
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
            copies, masters = zip(*self._copies, strict=True)
            torch._foreach_copy_(copies, masters)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Add the gradients of a bf16 network's copies to those of their masters, in fp32, all at once; free them."""
        pairs = [(copy, master) for copy, master in self._copies if copy.grad is not None]
        added = [(master.grad, copy.grad) for copy, master in pairs if master.grad is not None]
        first = [(copy.grad, master) for copy, master in pairs if master.grad is None]
        if added:
            sums, more = zip(*added, strict=True)
            torch._foreach_add_(sums, more)  # pyright: ignore[reportPrivateImportUsage]
        if first:
            gradients, masters = zip(*first, strict=True)
            block = masters[0].new_empty(sum(gradient.numel() for gradient in gradients))
            parts = torch._C._nn.unflatten_dense_tensors(block, masters)  # pyright: ignore[reportAttributeAccessIssue]
            torch._foreach_copy_(parts, gradients)  # pyright: ignore[reportPrivateImportUsage]
            for master, part in zip(masters, parts, strict=True):
                master.grad = part
        for copy, _ in pairs:
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


def _onto(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """Copy to a device without waiting for it."""
    if tensor is None:
        return None
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The global norm of gradients of any dtypes, in fp32."""
    norms = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        norms += torch._foreach_norm(alike, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms))
