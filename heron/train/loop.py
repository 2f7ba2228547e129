"""The training loop, as you would explain it: text -> ids -> batches -> model -> loss -> optimizer -> checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import heron
from heron import files, machine, tokenizer
from heron.checkpoint import load, ownership, read_tensors, run, save
from heron.checkpoint.architecture import UNUSED, lay_over
from heron.checkpoint.formats import safetensors
from heron.config import PRESETS, ModelConfig, TrainConfig
from heron.data.background import Stream
from heron.data.corpora import Reading
from heron.data.loader import Batches, Corpus, load_corpus, training_text
from heron.data.sampling import check_prime, magic_prime
from heron.errors import CheckpointError, ConfigError, DataError, HeronError
from heron.evaluate import evaluate
from heron.generation import generate
from heron.model import RWKV
from heron.model.init import round_to_bf16
from heron.ops.adamw import adamw_choice
from heron.ops.head_mix import head_mix_choice
from heron.ops.rosa import rosa_choice
from heron.ops.shift_mix import shift_mix_choice
from heron.ops.wkv7 import wkv7_choice
from heron.optim import lr_at
from heron.report import Reporter, plot
from heron.tokenizer import TextStream, document_end
from heron.tokenizer import learned as vocabulary
from heron.train import base_model, faults, resume, threads
from heron.train import guard as guards
from heron.train.guard import Guard
from heron.train.memory import knobs, shortage
from heron.train.step import Learner
from heron.train.stop import Preemption, Stopped

_STATE = ("step", "tokens", "cursor", "seconds", "owed", "guard", "model", "exact")  # of a checkpoint's trainer.json


@dataclasses.dataclass
class _Progress:
    """Where a run is: what its last accepted step left, and what that step has not done yet.

    Attributes:
        tokens: of all steps so far; another batch size may have been set in between.
        cursor: number of the next batch's first sample. Steps alone do not tell it: bad batches are passed over.
        owed: of the step: "validation", "sample".
        saved: whether a checkpoint holds all this.
        kept: the step of the newest checkpoint; None: there is none.
        begun, settled: perf_counter readings: when the run would have begun without pauses; the end of the last step.
    """

    step: int = 0
    tokens: int = 0
    cursor: int = 0
    seconds: float = 0.0
    owed: list[str] = dataclasses.field(default_factory=list)
    saved: bool = False
    kept: int | None = None
    begun: float = 0.0
    settled: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a running training consists of."""

    learner: Learner
    tokenizer: tokenizer.Tokenizer
    corpus: Corpus
    batches: Batches
    guard: Guard
    stop: Preemption
    reporter: Reporter
    pace: threads.Pace


class _Gradients(NamedTuple):
    """A forward and backward pass that was started: its loss, on the device, and the samples it is of."""

    loss: Tensor
    samples: list[tuple[Tensor, Tensor]]
    first: int
    begun: float


class _Update(NamedTuple):
    """An update that was started. A GPU makes it later; `read` waits until then."""

    gradients: _Gradients
    lr: float
    limit: float
    numbers: Tensor  # loss, gradient norm, whether they are bad
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool]:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm, bad = self.numbers.tolist()
        return loss, grad_norm, bool(bad)


class _NotWanted(Exception):
    """Leaves a validation or a sample when the run is asked to stop."""


class Trainer:
    """One run. `Trainer(config).fit()` is what ``heron train`` does.

    Args:
        config: a TrainConfig.
        say: takes one line for the user at a time, also from another thread; default: the console.
        _fault: for Heron's own tests, which alone can make it be accepted (:mod:`heron.train.faults`).
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = print, *, _fault: str | None = None):
        self.say = say
        self.out = Path(config.out)
        self._fault = None if _fault is None else faults.parse(_fault)
        self._sizes: ModelConfig | None = None  # of the model, once they are known
        device = machine.choose_device(config.device)
        self.device = torch.device(device.value)
        self.dtype = machine.choose_dtype(config.dtype, self.device)
        weights = machine.choose_weights(config.weights, self.dtype.value, self.device)
        threads.check(config.threads)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._asked = config
        self.config = dataclasses.replace(
            config,
            model=_model_config(config.model),
            device=device.value,
            dtype=self.dtype.value,
            weights=weights.value,
            threads=torch.get_num_threads(),
        )

    def fit(self) -> str:
        """Train to the end, or until a signal or `max_hours` asks to stop.

        Returns:
            "finished", or "preempted" (state saved; the same call goes on from there). It also stands in
            run_status.json, with the step and the newest checkpoint.

        Raises:
            HeronError: bad settings, data or checkpoints; a loss that is not finite.
        """
        try:
            found = base_model.candidates(self.out)
            ownership.check(self.out, [Path(self.config.tokenizer)], found[0] if found else None)
            self.out.mkdir(parents=True, exist_ok=True)
            with run.lock(self.out), Preemption(self.config.max_hours, self.say) as stop:
                ownership.claim(self.out)
                files.sweep(self.out)
                progress = _Progress()
                try:
                    return self._fit(stop, progress)
                except Stopped:
                    self._write_status("preempted", progress)
                    return "preempted"
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.out}: {error.strerror or error}") from error
        except (RuntimeError, MemoryError) as error:
            short = shortage(error)
            if short is None:
                raise
            raise HeronError(f"out of memory: {short}. {self._knobs()}") from error

    def _fit(self, stop: Preemption, progress: _Progress) -> str:
        config = self.config
        resume_from = self._resume_point()
        laid_over = bool(config.init_from) and isinstance(config.model, ModelConfig)
        start = None if resume_from is not None or laid_over else base_model.find(self.out, config.model)
        try:
            loaded = None if start is None else load(start, dtype=torch.float32)
        except CheckpointError as error:
            if not isinstance(config.model, ModelConfig):
                raise
            raise CheckpointError(
                f"{error}; a run starts from the newest weights in its folder: move this file away, or name another "
                "with --model"
            ) from None
        model_config = self._sizes = self._resolved_model(resume_from) if loaded is None else loaded.config
        if loaded is not None and isinstance(config.model, ModelConfig) and self._asked.model != TrainConfig.model:
            base_model.check_sizes(start, loaded.config, config.model)
        if resume_from is not None:
            earlier = run.trainer_of(resume_from)
            progress.step = progress.kept = earlier["step"]
            _check_tables(resume_from, earlier.get("exact", {}), config)
            if earlier["step"] >= config.total_steps and not earlier["owed"]:
                return self._nothing_to_do(resume_from, earlier["step"], stop)
        self._settle_threads(resume_from)
        config = self.config

        # [1] text -> ids, [2] ids -> batches
        text_tokenizer = self._tokenizer(resume_from, stop)
        if text_tokenizer.vocab_size > model_config.vocab_size:
            raise ConfigError(
                f"tokenizer {config.tokenizer} has {text_tokenizer.vocab_size} ids, the model's vocab_size is "
                f"{model_config.vocab_size}; set --vocab_size {text_tokenizer.vocab_size}"
            )
        if config.sample_prompt:
            try:
                text_tokenizer.encode(config.sample_prompt)
            except DataError as error:  # now, not at the first sample
                raise ConfigError(f"sample_prompt: {error}") from None
        corpus = stop.interruptible(lambda: self._corpus(text_tokenizer))
        batches = Batches(corpus.train, config.ctx_len, config.seed, corpus.kind, self._prime(corpus))

        # [3] the model, [6] its optimizer
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        model = RWKV(model_config) if loaded is None else loaded
        beginning = None if resume_from is not None else self._begin_with(model, start)
        learner = Learner(model, config, self.device, self.say)
        if self._fault is not None:
            faults.install(learner.network, self._fault)
        guard = Guard(config.on_nonfinite, config.spike)
        if resume_from is not None:
            record = self._restore(resume_from, learner, guard, progress)
            for reason in self._differences(record, corpus, learner):
                self.say(f"resuming, but not bit-exact because {reason}")
            if jump := resume.learning_rate_jump(resume_from, progress.step, config):
                self.say(jump)
        elif not base_model.candidates(self.out):  # else it is there, and stays as it is
            with ownership.writing(self.out / ownership.INIT):
                save(model, self.out / ownership.INIT)
        self._write(self.out / "config.yaml", config.to_yaml())

        reporter = Reporter(
            self.out,
            config.total_steps,
            first_step=progress.step,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            wandb_name=f"{model_config.vocab_size} ctx{config.ctx_len} L{model_config.n_layer} D{model_config.n_embd}",
            config=config.to_dict(),
            steps_per_epoch=config.steps_per_mini_epoch,
            owed=progress.owed,
            say=None if self.say is print else self.say,
        )
        parts = _Parts(learner, text_tokenizer, corpus, batches, guard, stop, reporter, threads.Pace())
        stop.at_stake = lambda: _at_stake(progress)
        self._write_status("running", progress)
        status = "failed"
        try:
            with contextlib.closing(reporter):
                reporter.header(self._header(learner, corpus, batches, resume_from, beginning))
                status = self._loop(parts, progress)
        finally:
            self._write_status(status, progress)
        if progress.step:
            plot([self.out], self.out / "loss.png")
        return status

    def _loop(self, parts: _Parts, progress: _Progress) -> str:
        progress.begun = time.perf_counter() - progress.seconds
        if parts.learner.compiled.value == "off":  # else a first step takes long, and stopped it loses nothing
            parts.stop.begin()
        if progress.owed:  # the run was stopped within this step
            self._close_step(parts, progress)
        elif progress.step == 0 and self.config.on_nonfinite == "rewind":
            self._save(parts, progress)  # so that there is something to go back to
        while progress.step < self.config.total_steps and not parts.stop.reason:
            self._train(parts, progress)
        if progress.step == self.config.total_steps and not progress.owed:
            return "finished"
        if not progress.saved:
            self._save(parts, progress)
        parts.reporter.note(
            f"stopped by {parts.stop.reason} at step {progress.step}; the same command goes on from here"
        )
        return "preempted"

    def _train(self, parts: _Parts, progress: _Progress) -> None:
        """Train until the run ends, is asked to stop, or has gone back to a checkpoint.

        A GPU is never waited for: whether a step was good is read while it is busy with the next one, of which only
        the forward and backward pass are on their way. The host waits at once where something is due after the step,
        and on a CPU, where the numbers are there anyway.
        """
        config = self.config
        workers, stopped = config.num_workers, lambda: parts.stop.reason
        with Stream(parts.batches, progress.cursor, config.micro_bsz, workers, stopped) as stream:
            update = None
            while not parts.stop.reason and progress.step + (update is not None) < config.total_steps:
                gradients = self._gradients(parts, stream)
                if gradients is None:
                    break
                if update is not None and self._settle(parts, progress, update) == "went back":
                    return
                update = self._update(parts, progress, gradients)
                if self._waits(parts, progress.step + 1):
                    if self._settle(parts, progress, update) == "went back":
                        return
                    update = None
            if update is not None:
                self._settle(parts, progress, update)

    def _waits(self, parts: _Parts, step: int) -> bool:
        """Whether a step is read before the next one begins. A GPU would stand still meanwhile, so only what is due."""
        return self.device.type == "cpu" or self._due(parts, step)

    def _gradients(self, parts: _Parts, stream: Stream) -> _Gradients | None:
        """Start the forward and backward passes of a step. None: the run was asked to stop while data were awaited."""
        begun, first = time.perf_counter(), stream.next_sample
        samples = []
        for _ in range(self.config.accumulate):
            batch = stream.take()
            if batch is None:
                return None
            samples.append(batch)
        return _Gradients(parts.learner.gradients(samples), samples, first, begun)

    def _update(self, parts: _Parts, progress: _Progress, gradients: _Gradients) -> _Update:
        """Start the optimizer step, which changes nothing if loss or gradients are bad."""
        lr, limit = lr_at(progress.step, self.config), parts.guard.limit()
        numbers, arrived = parts.learner.update(gradients.loss, lr, limit), None
        if self.device.type == "cuda":
            numbers = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Update(gradients, lr, limit, numbers, arrived)

    def _settle(self, parts: _Parts, progress: _Progress, update: _Update) -> str:
        """Read what a step gave, and do what follows: "accepted", "skipped" or "went back"."""
        config = self.config
        loss, grad_norm, bad = update.read()
        if bad:
            return self._refuse(parts, progress, update, loss, grad_norm)
        parts.stop.begin()
        parts.guard.accept(loss)
        progress.step += 1
        progress.tokens += config.tokens_per_step
        progress.cursor = update.gradients.first + config.micro_bsz * config.accumulate
        progress.saved = False
        now = time.perf_counter()
        parts.stop.step_ended()
        done, finished = progress.step, progress.step == config.total_steps
        seconds = now - max(update.gradients.begun, progress.settled)
        if finished or parts.stop.reason or done % config.log_every == 0:
            parts.reporter.step(
                {
                    "step": done,
                    "tokens": progress.tokens,
                    "loss": loss,
                    "lr": update.lr,
                    "grad_norm": grad_norm,
                    "tokens_per_s": config.tokens_per_step / seconds,
                    "time": now - progress.begun,
                }
            )
        if parts.corpus.val is not None and (finished or _every(config.eval_every, done)):
            progress.owed.append("validation")
        if config.sample_every and (finished or _every(config.sample_every, done)):
            progress.owed.append("sample")
        self._close_step(parts, progress)
        if slower := parts.pace.slowed(seconds):
            self._adapt_threads(parts, done, slower)
        progress.settled = time.perf_counter()
        return "accepted"

    def _close_step(self, parts: _Parts, progress: _Progress) -> None:
        """Validate, sample and save, where that is due. What a stop prevents stays owed."""
        work = {"validation": self._validate, "sample": self._sample}
        for name in list(progress.owed):
            with _until_stopped(parts):
                work[name](parts, progress)
                progress.owed.remove(name)
                progress.saved = False
        finished = progress.step == self.config.total_steps and not progress.owed
        if finished:  # before the last checkpoint: with that one in place, the run counts as finished
            with ownership.writing(self.out / ownership.FINAL):
                save(parts.learner.model, self.out / ownership.FINAL)
            parts.reporter.note(f"wrote {self.out / ownership.FINAL}")
        if finished or _every(self.config.save_every, progress.step):
            self._save(parts, progress)

    def _due(self, parts: _Parts, step: int) -> bool:
        """Whether something follows that step, so that its weights are needed before they change."""
        config = self.config
        periods = (config.save_every, config.sample_every, config.eval_every if parts.corpus.val is not None else 0)
        return step == config.total_steps or any(_every(period, step) for period in periods)

    def _validate(self, parts: _Parts, progress: _Progress) -> None:
        precision = machine.autocast(self.config.dtype, self.device)
        score = evaluate(parts.learner.model, parts.corpus.val, self.config.ctx_len, parts.corpus.val_bytes, precision)
        seconds = time.perf_counter() - progress.begun
        parts.reporter.validation(
            {"step": progress.step, "val_loss": score.loss, "val_bpb": score.bits_per_byte, "time": seconds}
        )

    def _sample(self, parts: _Parts, progress: _Progress) -> None:
        """A prompt and its continuation, under the same seed each time."""
        config = self.config
        if config.sample_prompt:
            prompt = parts.tokenizer.encode(config.sample_prompt)
        else:
            prompt = (parts.corpus.train if parts.corpus.val is None else parts.corpus.val)[:32].tolist()
        before = TextStream(parts.tokenizer)
        shown = "".join(map(before.push, prompt))  # but for half a character at its end, which the model may complete
        continuation = generate(parts.learner.model, parts.tokenizer, prompt, config.sample_tokens, seed=config.seed)
        parts.reporter.sample(progress.step, continuation, shown)

    def _save(self, parts: _Parts, progress: _Progress) -> None:
        progress.seconds = time.perf_counter() - progress.begun
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "cursor": progress.cursor,
            "seconds": progress.seconds,
            "owed": progress.owed,
            "guard": parts.guard.state(),
            "model": parts.learner.model.config.to_dict(),
            "exact": self._exact(parts.corpus, parts.learner),
        }
        parts.reporter.sync()  # a checkpoint whose steps are not in the log would leave a gap there
        yaml = self.config.to_yaml()
        folder = run.save(
            self.out, progress.step, parts.learner.model, parts.learner.optimizer, state, yaml, self.config.keep
        )
        progress.saved, progress.kept = True, progress.step
        parts.reporter.note(f"saved {folder}")

    def _restore(self, folder: Path, learner: Learner, guard: Guard, progress: _Progress) -> dict[str, Any]:
        """Take up the state in a verified checkpoint; gives the trainer's record."""
        record = run.restore(folder, learner.model, learner.optimizer)
        learner.refresh()
        run.check_names(folder / run.TRAINER, record, _STATE)
        run.check_names(folder / run.TRAINER, record["guard"], guard.state())
        guard.restore(record["guard"])
        for name in ("step", "tokens", "cursor", "seconds", "owed"):
            setattr(progress, name, record[name])
        progress.saved, progress.kept = True, progress.step
        return record

    def _refuse(self, parts: _Parts, progress: _Progress, update: _Update, loss: float, grad_norm: float) -> str:
        """A step that was bad: nothing of it was kept. Stop, pass over its batch, or go back as well."""
        config, first, step = self.config, update.gradients.first, progress.step + 1
        action, reason = parts.guard.refuse(all(bool(p.isfinite().all()) for p in parts.learner.model.parameters()))
        tokens, targets = (torch.cat(half) for half in zip(*update.gradients.samples, strict=True))
        kept = self.out / "bad" / f"step-{step:08d}-sample-{first}.safetensors"
        with files.new_file(kept) as temporary:
            safetensors.write({"tokens": tokens, "targets": targets}, temporary)
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if math.isfinite(update.limit):
            what += f", limit of the loss {update.limit:.4f}"
        if action == guards.STOP:
            raise HeronError(
                f"{what}; nothing of this step was kept ({reason}). Its samples are in {kept}; the checkpoints before "
                "it are whole. Try a lower --lr_init or --beta2 0.95"
                + ("" if config.on_nonfinite != guards.STOP else ", or --on_nonfinite skip")
            )
        progress.cursor = first + config.micro_bsz * config.accumulate
        progress.saved = False
        if action == guards.REWIND:
            folder = run.newest(self.out, self.say)
            if folder is None:
                raise HeronError(f"{what}; there is no checkpoint to go back to ({reason}). Try --on_nonfinite rewind")
            cursor = progress.cursor
            parts.learner.optimizer.zero_grad()  # a GPU may have begun the step after
            self._restore(folder, parts.learner, parts.guard, progress)
            progress.cursor = cursor
            parts.reporter.rewind(progress.step)
        verb = "went back" if action == guards.REWIND else "skipped"
        parts.reporter.refused(
            {
                "step": progress.step if action == guards.REWIND else step,
                "refused": step,
                "action": verb,
                "bad_loss": str(loss),
                "bad_grad_norm": str(grad_norm),
                "samples": [first, len(tokens)],
            }
        )
        parts.reporter.note(f"{what}: {verb} ({reason}); its samples are in {kept}")
        if action == guards.REWIND:
            self._save(parts, progress)  # a run that is killed now must not meet the same batch again
        return verb

    def _write_status(self, status: str, progress: _Progress) -> None:
        folders = sorted((self.out / "checkpoints").glob("step-*"), key=lambda folder: folder.stat().st_mtime)
        content = {"status": status, "step": progress.step, "checkpoint": folders[-1].name if folders else None}
        try:
            self._write(self.out / "run_status.json", json.dumps(content))
        except CheckpointError as error:  # a full disk, of which the error that ends the run tells more
            self.say(f"{error} (it would say: {status})")

    def _knobs(self) -> str:
        """Which settings to try where memory runs out."""
        if self._sizes is None:
            return "That was while the weights were read"
        flags = [flags for flags, _ in knobs(self.config, self._sizes)]
        return f"Try {', or '.join(flags)}; heron estimate says what each is worth. Checkpoints are whole"

    def _begin_with(self, model: RWKV, start: Path | None) -> str:
        """Finish what a fresh run starts from; gives the words for the header.

        Args:
            model: with the weights of the file `start`, or with initial values where that is None.

        Raises:
            CheckpointError: weights in the run folder beside those of `init_from`, or ones that don't fit the model.
        """
        if start is not None:
            return base_model.what_it_lacks(start)
        config = self.config
        words = f"initial values in {config.init_dtype}, seed {config.seed}"
        if config.init_dtype == "bf16":
            round_to_bf16(model)
        if not config.init_from:
            return words
        base = base_model.find(self.out, config.init_from, "--init_from")
        missing = lay_over(model, read_tensors(base), base)
        if not missing:
            return base_model.what_it_lacks(base)
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        return f"{base}; it lacks {len(missing)} tensors, which have their {words}: {names}"

    def _prime(self, corpus: Corpus) -> int | None:
        """The prime of the sample order; None: a permutation.

        Raises:
            ConfigError: one was asked for that does not fit the data.
        """
        config = self.config
        if corpus.kind != "binidx":
            if config.magic_prime is not None:
                raise ConfigError(
                    f"magic_prime {config.magic_prime}: it orders the samples of a binidx, and {corpus.name} is text; "
                    f"drop it, or type heron prepare {config.data} --out PREFIX, and train with --data PREFIX"
                )
            return None
        if config.magic_prime is None:
            return magic_prime(len(corpus.train), config.ctx_len)
        check_prime(config.magic_prime, len(corpus.train), config.ctx_len)
        return config.magic_prime

    def _tokenizer(self, resume_from: Path | None, stop: Preemption) -> tokenizer.Tokenizer:
        """The tokenizer of the run. One that is a file, or is learned now, is kept in the run folder.

        A run that goes on keeps the one it has: ids would mean something else under any other.
        """
        config, kept, end = self.config, self.out / "tokenizer.json", None
        earlier = None if resume_from is None else _content(resume_from.parents[1] / "tokenizer.json")
        if config.tokenizer.startswith(tokenizer.LEARNED):
            vocab_size = _whole_number(config.tokenizer)
            if config.eod not in (None, "0", document_end.NAMES[0]):
                raise ConfigError(f"eod {config.eod!r}: a learned vocabulary has {document_end.NAMES[0]} for it")
            if resume_from is None:
                reading = Reading.of(config)
                texts = stop.interruptible(
                    lambda: training_text(config.data, config.val_data, config.val_fraction, reading)
                )
                content = vocabulary.learn(texts, vocab_size, self.say)
            elif earlier is None:
                raise CheckpointError(f"{resume_from}: its run has no tokenizer.json, so it was not {config.tokenizer}")
            else:
                content = earlier
        else:
            asked = tokenizer.load(config.tokenizer, config.eod)
            if not isinstance(asked, tokenizer.JsonTokenizer):
                return asked
            vocab_size, content = asked.vocab_size, Path(config.tokenizer).read_text(encoding="utf-8")
            if resume_from is not None and content != earlier:
                raise CheckpointError(f"{resume_from}: its run has another tokenizer than {config.tokenizer}")
            before = asked if resume_from is None else tokenizer.load(str(resume_from.parents[1] / "tokenizer.json"))
            if before.eod != asked.eod:
                raise CheckpointError(
                    f"{resume_from}: its run ends documents with {before.end}; {config.tokenizer} has {asked.end}; "
                    f"type --eod {before.eod}"
                )
            end = asked.end
            if end.id is not None:
                self.say(f"each document ends with {end}")
        if Path(config.tokenizer).resolve() != kept.resolve():
            self._write(kept, content)
        found = tokenizer.load(str(kept))
        if end is not None and found.eod != end.id:  # the run folder must tell by itself, wherever it is moved
            beside = kept.with_name(document_end.CONFIG)
            if beside.exists():
                raise CheckpointError(f"{beside}: names another end of a document than {end}; move it elsewhere")
            self._write(beside, json.dumps({"eos_token": end.token}))
            found = tokenizer.load(str(kept))
        if found.vocab_size != vocab_size:
            raise CheckpointError(f"{resume_from}: its run has a tokenizer of {found.vocab_size} ids, not {vocab_size}")
        return found

    @staticmethod
    def _write(path: Path, content: str) -> None:
        with files.new_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")

    def _corpus(self, text_tokenizer: tokenizer.Tokenizer) -> Corpus:
        config = self.config
        return load_corpus(
            config.data, text_tokenizer, config.val_data, config.val_fraction, text_tokenizer.vocab_size,
            Reading.of(config), self.say,
        )  # fmt: skip

    def _nothing_to_do(self, folder: Path, step: int, stop: Preemption) -> str:
        """Say that a run is finished; CheckpointError, by their names, where settings differ from those it had."""
        home, config = folder.parents[1], self.config
        if (kept := home / "tokenizer.json").exists() and config.tokenizer.startswith(tokenizer.LEARNED):
            text_tokenizer = tokenizer.load(str(kept))
        elif config.tokenizer.startswith(tokenizer.LEARNED):
            raise CheckpointError(
                f"{home}: finished at step {step}, with another tokenizer than {config.tokenizer}; name another --out"
            )
        else:
            text_tokenizer = tokenizer.load(config.tokenizer, config.eod)
        try:
            data = stop.interruptible(lambda: self._corpus(text_tokenizer)).fingerprint
        except DataError:  # gone, as it may be when all is done
            data = None
        if found := resume.differing_settings(folder, config, self._asked, data):
            raise CheckpointError(
                f"{home}: finished at step {step}, with other settings: {'; '.join(found)}. Name another --out to "
                "train with these, or raise --max_steps or --max_tokens to go on with them"
            )
        self.say(
            f"{home}: finished at step {step}; nothing to do. Raise --max_steps to train longer, or name another --out."
        )
        return "finished"

    def _settle_threads(self, resume_from: Path | None) -> None:
        """The number of threads: as asked, else that of the run that goes on, else what is fastest here now."""
        machine.settle_threads()
        if self._asked.threads:
            return
        usual = torch.get_num_threads()
        if resume_from is None:
            number, reason = threads.settle(0, self.device)
            if reason:
                self.say(f"threads: {number}: {reason}")
        else:
            number = run.trainer_of(resume_from).get("exact", {}).get("threads", usual)
            self._use_threads(number if number <= threads.most() else usual)
            number = self.config.threads
            if self.device.type == "cpu" and number > 1:
                best, times = threads.fewer(number)
                if best != number:
                    self.say(
                        f"the machine is busy: on {best} threads this run would be {times:.0f} times as fast as on its "
                        f"{number}, and not bit-exact; --threads {best} chooses that"
                    )
        self._use_threads(number)

    def _use_threads(self, number: int) -> None:
        """So many threads from now on, or one where the system starts no more."""
        torch.set_num_threads(number)
        machine.settle_threads()
        self.config = dataclasses.replace(self.config, threads=torch.get_num_threads())

    def _adapt_threads(self, parts: _Parts, step: int, slower: float) -> None:
        """After steps that took ten times as long as those before: compute on fewer threads where that helps."""
        before = self.config.threads
        if self.device.type != "cpu":
            return
        best, times = threads.fewer(before)
        what = f"step {step}: steps take {slower:.0f} times as long as they did"
        if best == before:
            parts.reporter.note(f"{what}; fewer than {before} threads would not help")
            return
        if self._asked.threads:
            parts.reporter.note(f"{what}: the machine is busy; --threads {best} would be {times:.0f} times as fast now")
            return
        self._use_threads(best)
        parts.reporter.refused({"step": step, "threads": best, "threads_before": before})
        parts.reporter.note(
            f"{what}: the machine is busy; going on with {best} threads, not {before}, which are {times:.0f} times as "
            "fast now (not bit-exact from here on with a run that keeps them)"
        )

    def _resume_point(self) -> Path | None:
        """The verified checkpoint to go on from, or None for a fresh start."""
        config = self.config
        if config.resume == "auto":
            return run.newest(self.out, self.say)
        used = (self.out / "config.yaml").exists()
        if config.resume == "none":
            if used:
                raise CheckpointError(f"{self.out}: holds a run already and resume is none; name another --out")
            return None
        if used and TrainConfig.from_yaml(self.out / "config.yaml").resume == config.resume:
            return run.newest(self.out, self.say) or self._named(Path(config.resume))  # the same command again
        folder = self._named(Path(config.resume))
        if used and folder.resolve() != (run.newest(self.out) or self.out).resolve():
            raise CheckpointError(f"{self.out}: holds another run, or newer steps than {folder}; name another --out")
        return folder

    def _named(self, path: Path) -> Path:
        """The verified checkpoint that `resume` names, or the newest of the run that it names."""
        folder = path if run.is_checkpoint(path) else run.newest(path, self.say)
        if folder is None:
            raise CheckpointError(f"resume: {path} is neither a checkpoint nor a run folder with one")
        run.verify(folder)
        return folder

    def _resolved_model(self, resume_from: Path | None) -> ModelConfig:
        """The model's sizes: from the config, or from the run that goes on."""
        wanted = self.config.model
        if resume_from is None:
            return wanted
        saved = ModelConfig.from_dict(run.trainer_of(resume_from)["model"])
        if isinstance(wanted, ModelConfig) and wanted != saved:
            differing = [
                f"{name} {value} (now {getattr(wanted, name)})"
                for name, value in saved.to_dict().items()
                if getattr(wanted, name) != value
            ]
            remedy = "name another --out" if resume_from.is_relative_to(self.out) else "drop --resume"
            raise CheckpointError(f"{resume_from}: this run has another model: {', '.join(differing)}; {remedy}")
        return saved

    def _exact(self, corpus: Corpus, learner: Learner) -> dict[str, Any]:
        """What decides whether a resume can be bit-exact."""
        config = self.config
        units = sorted(machine.cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
        return {
            "data": corpus.fingerprint,
            "threads": config.threads,
            "device": str(self.device),
            "dtype": config.dtype,
            "heron": heron.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cpu": " ".join((platform.machine(), torch.backends.cpu.get_cpu_capability(), *units)),
            "cuda": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "MKL_CBWR": os.environ.get("MKL_CBWR"),
            "wkv7": wkv7_choice(self.device, config.ctx_len).impl,
            "shift_mix": shift_mix_choice(self.device).impl,
            "head_mix": head_mix_choice(self.device).impl,
            "adamw": adamw_choice(self.device).impl,
            "compile": learner.compiled.value,
            "magic_prime": self._prime(corpus),
            **{name: getattr(config, name) for name in resume.EXACT},
        }

    def _differences(self, record: dict[str, Any], corpus: Corpus, learner: Learner) -> list[str]:
        """Each thing that is not as it was when the checkpoint was written, as a clause."""
        largest = magic_prime(len(corpus.train), self.config.ctx_len) if corpus.kind == "binidx" else None
        before = {"magic_prime": largest, **record["exact"]}  # the only one there was before it was written down
        now = self._exact(corpus, learner)
        unknown = [f"{name} was not written down" for name in now if name not in before]
        return unknown + [
            f"{name} was {before[name]} and is {value}"
            for name, value in now.items()
            if name in before and before[name] != value
        ]

    def _header(
        self, learner: Learner, corpus: Corpus, batches: Batches, resume_from: Path | None, beginning: str | None
    ) -> list[tuple[str, str]]:
        config, model_config = self.config, learner.model.config
        wkv7 = wkv7_choice(self.device, config.ctx_len)
        rosa = rosa_choice(self.device) if model_config.rosa else None
        head_size = f"N{model_config.head_size} " if model_config.has_time_mix else ""
        n_parameters = sum(parameter.numel() for parameter in learner.model.parameters())
        return [
            ("model", f"{model_config.variant}  L{model_config.n_layer} C{model_config.n_embd} "
                      f"{head_size}V{model_config.vocab_size}  {n_parameters / 1e6:.2f} M parameters"),
            *([("start", beginning)] if beginning else []),
            ("data", f"{corpus.name}: {len(corpus.train):,} tokens"
                     + (f", {len(corpus.val):,} for validation" if corpus.val is not None else "")),
            ("order", batches.order.description),
            ("step", f"{config.micro_bsz} x {config.accumulate} samples of {config.ctx_len} = "
                     f"{config.tokens_per_step:,} tokens; {config.total_steps:,} steps"),
            ("device", f"{self.device}, {config.threads} threads"),
            ("precision", f"{config.dtype}: {self.dtype.reason}; weights {config.weights}"),
            ("compile", f"{learner.compiled.value}: {learner.compiled.reason}"),
            ("wkv7", f"{wkv7.impl}: {wkv7.reason}" if model_config.has_time_mix else "not in this model"),
            *([("rosa", f"{rosa.impl}: {rosa.reason}")] if rosa else []),
            ("out", f"{self.out}" + (f", going on from {resume_from.name}" if resume_from else "")),
        ]  # fmt: skip


@contextlib.contextmanager
def _until_stopped(parts: _Parts) -> Iterator[None]:
    """Leave the block at its next forward pass once the run is asked to stop."""

    def look(*_: object) -> None:
        if parts.stop.reason:
            raise _NotWanted

    hook = parts.learner.model.emb.register_forward_pre_hook(look)
    try:
        yield
    except _NotWanted:
        return
    finally:
        hook.remove()


def _model_config(model: ModelConfig | str) -> ModelConfig | str:
    """A preset's name becomes its sizes; a path stays a path."""
    return ModelConfig.preset(model) if isinstance(model, str) and model in PRESETS else model


def _holds(path: Path, model: RWKV) -> bool:
    """Whether a file holds a model's values, in its own dtype."""
    own, tensors = model.state_dict(), read_tensors(path)
    return tensors.keys() <= own.keys() <= tensors.keys() | set(UNUSED) and all(
        torch.equal(tensor, own[name].to(tensor.dtype)) for name, tensor in tensors.items()
    )


def _check_tables(folder: Path, before: dict[str, Any], config: TrainConfig) -> None:
    """CheckpointError where a run goes on with tables elsewhere: what the optimizer knows of them is not the same."""
    earlier = {name: before.get(name, getattr(TrainConfig, name)) for name in ("tables", "tables_state")}
    if earlier != {name: getattr(config, name) for name in earlier}:
        flags = " ".join(f"--{name} {value}" for name, value in earlier.items())
        raise CheckpointError(f"{folder}: this run trains with {flags}; give these, or start another from its weights")


def _at_stake(progress: _Progress) -> str:
    if progress.step == (progress.kept or 0):
        return "of the run, the step that has begun is lost"
    since = "the beginning" if progress.kept is None else f"step {progress.kept}"
    return f"what was trained since {since} is lost ({progress.step - (progress.kept or 0)} steps)"


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _whole_number(spec: str) -> int:
    text = spec.removeprefix(tokenizer.LEARNED)
    if not text.isdecimal():
        raise ConfigError(f"tokenizer {spec}: wanted bpe:V with a whole number V, got {text!r}")
    return int(text)
