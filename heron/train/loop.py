"""The training loop, as you would explain it: text -> ids -> batches -> model -> loss -> optimizer -> checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from heron import dist, files, machine, tokenizer
from heron.checkpoint import ownership, run, save
from heron.checkpoint.background import Saved, Saver
from heron.config import PRESETS, ModelConfig, TrainConfig
from heron.data.conversations import Conversations
from heron.data.loader import Corpus
from heron.data.packs import Packs
from heron.errors import CheckpointError, ConfigError, DataError, HeronError
from heron.model import RWKV
from heron.ops import ahead
from heron.optim import lr_at
from heron.report import NoReporter, Reporter, plot
from heron.report.samples import show as show_samples
from heron.tokenizer import Tokenizer
from heron.train import base_model, differences, due, first_weights, memory, result, resume, run_data, threads
from heron.train import guard as guards
from heron.train.bad_samples import keep as keep_samples
from heron.train.guard import Guard
from heron.train.header import at_stake, header, write_status
from heron.train.leaves import seed_dropout
from heron.train.parts import Gradients, Parts, Progress, Update
from heron.train.step import Learner
from heron.train.stop import Preemption, Stopped, until_stopped


class Trainer:
    """One run. `Trainer(config).fit()` is what ``heron train`` does.

    Args:
        config: a TrainConfig.
        say: takes one line for the user at a time, also from another thread; default: the console.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = print):
        self.ranks = dist.Ranks.of_environment()
        self.ranks.check_number(config.processes, config.context_parallel)
        self.say = say if self.ranks.is_first else _unheard
        self.out = Path(config.out)
        self._sizes: ModelConfig | None = None  # of the model, once they are known
        device = self.ranks.device(config.device)
        self.device = torch.device(device.value)
        ahead.build_for_training(self.device, config.dtype == "fp8")
        self.dtype = machine.choose_dtype(config.dtype, self.device)
        base_model.check_form(config, self.device, self.dtype.value)
        weights = machine.choose_weights(config.weights, self.dtype.value, self.device)
        threads.take(config.threads)
        self._asked = config
        self.config = dataclasses.replace(
            config,
            model=_model_config(config.model),
            device=device.value,
            dtype=self.dtype.value,
            weights=weights.value,
            threads=torch.get_num_threads(),
            processes=self.ranks.count if self.ranks.count > 1 else config.processes,
        )

    def fit(self) -> str:
        """Train to the end, or until a signal or `max_hours` asks to stop.

        Returns:
            "finished", or "preempted" (state saved; the same call goes on from there). It also stands in
            run_status.json, with the step and the newest checkpoint.

        Raises:
            HeronError: bad settings, data or checkpoints; a loss that is not finite; a process of the run that is gone.
        """
        machine.check_dtype(self.config.dtype, self.device)
        with self.ranks.joined(self.device, self.config.dist_timeout):
            return self._fit_here()

    def _fit_here(self) -> str:
        if self.config.num_workers:
            self.say(f"num_workers {self.config.num_workers}: has no effect any more; leave it out")
        try:
            with contextlib.ExitStack() as stack:
                self.ranks.first(lambda: self._own_folder(stack))
                stop = stack.enter_context(Preemption(self.config.max_hours, self.say, alone=self.ranks.count == 1))
                progress = Progress()
                try:
                    return self._fit(stop, progress)
                except Stopped:
                    self._write_status("preempted", progress)
                    if self.ranks.count > 1:
                        raise  # without waiting for the others, which may not come
                    return "preempted"
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.out}: {error.strerror or error}") from error
        except (RuntimeError, MemoryError) as error:
            short = memory.shortage(error)
            if short is None:
                raise
            raise HeronError(f"out of memory: {short}. {memory.remedy(self.config, self._sizes)}") from error

    def _own_folder(self, stack: contextlib.ExitStack) -> None:
        found = base_model.candidates(self.out)
        ownership.check(self.out, [Path(self.config.tokenizer)], found[0] if found else None)
        self.out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(run.lock(self.out))
        ownership.claim(self.out)
        files.sweep(self.out)

    def _write_status(self, status: str, progress: Progress) -> None:
        if self.ranks.is_first:
            write_status(self.out, status, progress, self.say)

    def preview(self) -> None:
        """Read the conversations that a run would learn from, and print as many samples as `finetune.show` says.

        Raises:
            HeronError: data on which the run would fail.
        """
        text_tokenizer = tokenizer.load(self.config.tokenizer, self.config.eod)
        self._show(run_data.corpus(self.config, text_tokenizer, self.say), text_tokenizer)

    def _show(self, corpus: Corpus, text_tokenizer: Tokenizer) -> None:
        if isinstance(corpus, Conversations) and self.config.finetune is not None and self.ranks.is_first:
            say = None if self.say is print else self.say
            show_samples(corpus.samples, text_tokenizer, self.config.finetune.show, say)

    def _fit(self, stop: Preemption, progress: Progress) -> str:
        config = self.config
        resume_from = self.ranks.first(lambda: resume.point(config, self.say))
        laid_over = bool(config.init_from) and isinstance(config.model, ModelConfig)
        if resume_from is not None:
            start = resume.frozen_weights(config, resume_from)
        else:
            start = None if laid_over else self.ranks.first(lambda: base_model.find(self.out, config.model, self.say))
        loaded = None
        if start is not None:
            loaded = first_weights.read(start, config.model)
            if resume_from is None and isinstance(config.model, ModelConfig) and self._asked.model != TrainConfig.model:
                base_model.check_sizes(start, loaded.config, config.model)
        model_config = self._sizes = resume.model_sizes(config, resume_from) if loaded is None else loaded.config
        before = earlier = None
        if resume_from is not None:
            earlier = run.trainer_of(resume_from)
            progress.step = progress.kept = earlier["step"]
            before = earlier.get("exact", {})
            resume.check_tables(resume_from, before, config)
            if config.total_steps and earlier["step"] >= config.total_steps and not earlier["owed"]:
                return resume.nothing_to_do(resume_from, earlier["step"], config, self._asked, stop, self.say)
        base = base_model.frozen(config, start, loaded, earlier)
        n_threads = threads.begin(config.threads, self._asked.threads, self.device, before, self.say)
        config = self.config = dataclasses.replace(config, threads=n_threads)

        # [1] text -> ids, [2] ids -> batches
        text_tokenizer = self.ranks.in_turn(
            lambda: run_data.text_tokenizer(config, resume_from, stop, self.say, self.ranks.is_first)
        )
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
        corpus = stop.interruptible(lambda: run_data.corpus(config, text_tokenizer, self.say))
        if resume_from is None:
            self._show(corpus, text_tokenizer)
        recalled = stop.interruptible(lambda: run_data.recollections(config, model_config.memory, corpus))
        of_train, of_val = (None, None) if recalled is None else recalled
        batches = run_data.batches(config, corpus, model_config.memory, of_train)
        config = self.config = run_data.with_length(config, batches, progress.step)

        # [3] the model, [6] its optimizer
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        model = RWKV(model_config) if loaded is None else loaded
        beginning = None if resume_from is not None else first_weights.finish(model, start, config)
        learner = Learner(model, config, self.device, self.say, self.ranks)
        guard = Guard(config.on_nonfinite, config.spike)
        if resume_from is not None:
            record = resume.restore(resume_from, learner, guard, progress)
            for reason in differences.not_exact(record, config, self.device, corpus, learner):
                self.say(f"resuming, but not bit-exact because {reason}")
            if jump := differences.learning_rate_jump(resume_from, progress.step, config):
                self.say(jump)
        elif base is None and self.ranks.first(lambda: not base_model.candidates(self.out)):  # else it stays as it is
            self._save_first_weights(learner)
        self.ranks.first(lambda: files.write_text(self.out / "config.yaml", config.to_yaml()))

        reporter = NoReporter()
        if self.ranks.is_first:
            name = f"{model_config.vocab_size} ctx{config.ctx_len} L{model_config.n_layer} D{model_config.n_embd}"
            reporter = Reporter(
                self.out, config.total_steps, progress.step, config.tensorboard, config.wandb, name, config.to_dict(),
                config.steps_per_mini_epoch, owed=progress.owed, say=None if self.say is print else self.say,
            )  # fmt: skip
        val_packs = run_data.val_packs(config, corpus, of_val)
        if isinstance(corpus, Conversations) and isinstance(batches, Packs):
            stop.interruptible(lambda: learner.refer(corpus, (batches, val_packs), resume_from, base))
        pace = threads.Pace()
        saver = Saver(config, self.ranks)
        parts = Parts(
            learner, text_tokenizer, corpus, of_val, batches, val_packs, guard, stop, reporter, pace, saver, base
        )
        stop.at_stake = lambda: at_stake(progress)
        self._write_status("running", progress)
        status = "failed"
        try:
            with contextlib.closing(reporter), saver:
                reporter.header(
                    header(config, self.device, self.dtype, learner, corpus, batches, resume_from, beginning)
                )
                status = self._loop(parts, progress)
        finally:
            self._write_status(status, progress)
        if progress.step and self.ranks.is_first:
            plot([self.out], self.out / "loss.png")
        return status

    def _loop(self, parts: Parts, progress: Progress) -> str:
        progress.begun = time.perf_counter() - progress.seconds
        if parts.learner.compiled.value == "off":  # else a first step takes long, and stopped it loses nothing
            parts.stop.begin()
        if progress.owed:  # the run was stopped within this step
            self._close_step(parts, progress)
        elif progress.step == 0 and self.config.on_nonfinite == "rewind":
            self._save(parts, progress)  # so that there is something to go back to
        while progress.step < self.config.total_steps and not parts.stop.reason:
            self._train(parts, progress)
        finished = progress.step == self.config.total_steps and not progress.owed
        if not (finished or progress.saved):
            self._save(parts, progress)
        self._saved(parts, progress, parts.saver.wait())
        if finished:
            return "finished"
        parts.reporter.note(
            f"stopped by {parts.stop.reason} at step {progress.step}; the same command goes on from here"
        )
        return "preempted"

    def _train(self, parts: Parts, progress: Progress) -> None:
        """Train until the run ends, is asked to stop, or has gone back to a checkpoint.

        A GPU is never waited for: whether a step was good is read while it is busy with the next one, of which only
        the forward and backward pass are on their way. The host waits at once where something is due after the step,
        and on a CPU, where the numbers are there anyway.
        """
        first, update = progress.cursor, None
        while not parts.stop.reason and progress.step + (update is not None) < self.config.total_steps:
            gradients = self._gradients(parts, first)
            first += self.config.samples_per_step
            if update is not None and self._settle(parts, progress, update) == "went back":
                return
            update = self._update(parts, progress, gradients)
            if self._waits(parts, progress.step + 1):
                if self._settle(parts, progress, update) == "went back":
                    return
                update = None
        if update is not None:
            self._settle(parts, progress, update)

    def _waits(self, parts: Parts, step: int) -> bool:
        """Whether a step is read before the next one begins. A GPU would stand still meanwhile, so only what is due."""
        return self.device.type == "cpu" or self._due(parts, step)

    def _due(self, parts: Parts, step: int) -> bool:
        """Whether something follows that step, so that its weights are needed before they change."""
        config = self.config
        periods = (config.save_every, config.sample_every, config.eval_every if parts.corpus.val is not None else 0)
        return step == config.total_steps or any(_every(period, step) for period in periods)

    def _gradients(self, parts: Parts, first: int) -> Gradients:
        """Start the passes of a step: of its samples, from number `first` on, those of this process's group."""
        begun, B = time.perf_counter(), self.config.micro_bsz
        group, n = self.ranks.group(self.config.context_parallel)
        seed_dropout(self.config, first, self.ranks.rank)
        samples = [parts.batches.batch(first + group + B * n * micro, B, n) for micro in range(self.config.accumulate)]
        return Gradients(parts.learner.gradients(samples), samples, first, begun)

    def _update(self, parts: Parts, progress: Progress, gradients: Gradients) -> Update:
        """Start the optimizer step, which changes nothing if loss or gradients are bad."""
        lr, limit = lr_at(progress.step, self.config), parts.guard.limit()
        numbers, arrived = parts.learner.update(gradients.loss, lr, limit, parts.stop.asked is not None), None
        if self.device.type == "cuda":
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Update(gradients, lr, limit, numbers, arrived)

    def _settle(self, parts: Parts, progress: Progress, update: Update) -> str:
        """Read what a step gave, and do what follows: "accepted", "skipped" or "went back"."""
        config = self.config
        loss, grad_norm, bad, n_asked, figures = update.read()
        parts.stop.agree(n_asked)
        self._saved(parts, progress, parts.saver.done())
        if parts.saver.failed:
            parts.stop.ask("a save that failed")
        if bad:
            return self._refuse(parts, progress, update, loss, grad_norm)
        parts.stop.begin()
        parts.guard.accept(loss)
        progress.step += 1
        progress.tokens += config.tokens_per_step
        progress.cursor = update.gradients.first + config.samples_per_step
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
                    **figures,
                }
            )
        if parts.corpus.val is not None and (finished or _every(config.eval_every, done)):
            progress.owed.append("validation")
        if config.sample_every and (finished or _every(config.sample_every, done)):
            progress.owed.append("sample")
        self._close_step(parts, progress)
        if slower := parts.pace.slowed(seconds):
            n_threads = threads.adapt(config.threads, self._asked.threads, self.device, parts.reporter, done, slower)
            self.config = dataclasses.replace(config, threads=n_threads)
        progress.settled = time.perf_counter()
        return "accepted"

    def _close_step(self, parts: Parts, progress: Progress) -> None:
        """Validate, sample and save, where that is due. What a stop prevents stays owed."""
        work = {"validation": due.validation, "sample": due.sample}
        model = parts.learner.whole() if progress.owed else parts.learner.model
        model.eval()  # an adapter drops nothing then
        for name in list(progress.owed):
            tell: Callable[[], None] | None = None
            with until_stopped(parts.stop, model):
                tell = work[name](parts, progress, model, self.config, self.ranks)
            done = self.ranks.all(tell is not None)
            if tell is None or not done:
                parts.stop.agree(1)
                continue
            tell()
            progress.owed.remove(name)
            progress.saved = False
        model.train()
        finished = progress.step == self.config.total_steps and not progress.owed
        if finished:  # before the last checkpoint: with that one in place, the run counts as finished
            model = parts.learner.whole()
            written = self.ranks.first(lambda: result.write(self.out, parts.learner, parts.base, model))
            parts.reporter.note(f"wrote {written}")
        if finished or _every(self.config.save_every, progress.step):
            self._save(parts, progress)

    def _save_first_weights(self, learner: Learner) -> None:
        model, path = learner.whole(), self.out / ownership.INIT

        def write() -> None:
            with ownership.writing(path):
                save(model, path)

        self.ranks.first(write)

    def _save(self, parts: Parts, progress: Progress) -> None:
        progress.seconds = time.perf_counter() - progress.begun
        exact = differences.exact(self.config, self.device, parts.corpus, parts.learner)
        state = resume.state(progress, parts.guard, parts.learner.model.config, exact, parts.base)
        parts.reporter.sync()  # a checkpoint whose steps are not in the log would leave a gap there
        learner, yaml = parts.learner, self.config.to_yaml()
        self._saved(parts, progress, parts.saver.wait())
        parts.saver.begin(run.contents(progress.step, learner.trained, learner.optimizer, state, yaml))
        progress.saved = True
        self._saved(parts, progress, parts.saver.done())

    def _saved(self, parts: Parts, progress: Progress, saved: Saved | None) -> None:
        if saved is not None:
            progress.kept = saved.step
            parts.reporter.note(f"saved {saved.folder}")

    def _refuse(self, parts: Parts, progress: Progress, update: Update, loss: float, grad_norm: float) -> str:
        """A step that was bad: nothing of it was kept. Stop, pass over its batch, or go back as well."""
        config, first, step = self.config, update.gradients.first, progress.step + 1
        action, reason = parts.guard.refuse(parts.learner.weights_are_finite())
        kept = keep_samples(self.out, step, update.gradients, self.ranks, config.context_parallel)
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if math.isfinite(update.limit):
            what += f", limit of the loss {update.limit:.4f}"
        if action == guards.STOP:
            raise HeronError(
                f"{what}; nothing of this step was kept ({reason}). Its samples are in {kept}; the checkpoints before "
                "it are whole. Try a lower --lr_init or --beta2 0.95"
                + ("" if config.on_nonfinite != guards.STOP else ", or --on_nonfinite skip")
            )
        progress.cursor = first + config.samples_per_step
        progress.saved = False
        if action == guards.REWIND:
            self._saved(parts, progress, parts.saver.wait())
            folder = self.ranks.first(lambda: run.newest(self.out, self.say))
            if folder is None:
                raise HeronError(f"{what}; there is no checkpoint to go back to ({reason}). Try --on_nonfinite rewind")
            cursor = progress.cursor
            parts.learner.optimizer.zero_grad()  # a GPU may have begun the step after
            resume.restore(folder, parts.learner, parts.guard, progress)
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
                "samples": [first, config.samples_per_step],
            }
        )
        parts.reporter.note(f"{what}: {verb} ({reason}); its samples are in {kept}")
        if action == guards.REWIND:
            self._save(parts, progress)  # a run that is killed now must not meet the same batch again
        return verb


def _model_config(model: ModelConfig | str) -> ModelConfig | str:
    """A preset's name becomes its sizes; a path stays a path."""
    return ModelConfig.preset(model) if isinstance(model, str) and model in PRESETS else model


def _unheard(line: str) -> None:
    """What processes beside the first one say."""


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
