"""The training loop, as you would explain it: text -> ids -> batches -> model -> loss -> optimizer -> checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heron import machine, tokenizer
from heron.checkpoint import atomic, load, run, save
from heron.config import PRESETS, ModelConfig, TrainConfig
from heron.data.loader import Batches, Corpus, load_corpus, training_text
from heron.data.sampling import magic_prime
from heron.errors import CheckpointError, ConfigError, HeronError
from heron.evaluate import evaluate
from heron.generation import generate
from heron.model import RWKV
from heron.ops import _select
from heron.optim import build_optimizer, lr_at, set_lr
from heron.report import Reporter, plot

_EXACT = (  # settings that the numbers of every later step depend on
    "tokenizer", "seed", "ctx_len", "micro_bsz", "accumulate", "max_steps", "max_tokens",
    "lr_init", "lr_final", "warmup_steps", "beta1", "beta2", "adam_eps", "weight_decay", "grad_clip",
)  # fmt: skip


class Trainer:
    """One run. `Trainer(config).fit()` is what ``heron train`` does.

    Args:
        config: a TrainConfig.
        say: takes one line for the user at a time; default: print.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = print):
        self.say = say
        self.out = Path(config.out)
        device = machine.choose_device(config.device)
        self.device = torch.device(device.value)
        self.dtype = machine.choose_dtype(config.dtype, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = dataclasses.replace(
            config,
            model=_model_config(config.model),
            device=device.value,
            dtype=self.dtype.value,
            threads=torch.get_num_threads(),
        )
        self._stop_signal: str | None = None

    def fit(self) -> str:
        """Train to the end, or until a signal asks to stop.

        Returns:
            "finished", or "preempted" after SIGINT, SIGTERM or SIGUSR1 (state saved; the same call goes on from there).

        Raises:
            HeronError: bad settings, data or checkpoints; a loss that is not finite.
        """
        self._stop_signal = None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with run.lock(self.out), self._signals():
                return self._fit()
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.out}: {error.strerror or error}") from error

    def _fit(self) -> str:
        config = self.config
        resume_from = self._resume_point()
        model_config = self._resolved_model(resume_from)
        if resume_from is not None and run.trainer_of(resume_from)["step"] >= config.total_steps:
            self.say(
                f"{self.out}: finished at step {run.trainer_of(resume_from)['step']}; nothing to do. "
                "Raise --max_steps to train longer, or name another --out."
            )
            return "finished"

        # [1] text -> ids, [2] ids -> batches
        text_tokenizer = self._tokenizer(resume_from)
        if text_tokenizer.vocab_size > model_config.vocab_size:
            raise ConfigError(
                f"tokenizer {config.tokenizer} has {text_tokenizer.vocab_size} ids, the model's vocab_size is "
                f"{model_config.vocab_size}; set --vocab_size {text_tokenizer.vocab_size}"
            )
        corpus = load_corpus(
            config.data, text_tokenizer, config.val_data, config.val_fraction, text_tokenizer.vocab_size
        )
        self._check_prime(corpus)
        batches = Batches(corpus.train, config.ctx_len, config.seed, corpus.kind)

        # [3] the model, [6] its optimizer
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        if isinstance(config.model, ModelConfig) or resume_from is not None:
            model = RWKV(model_config)
        else:
            model = load(config.model, dtype=torch.float32)
        model.to(self.device)
        model.grad_checkpoint = config.grad_checkpoint
        optimizer = build_optimizer(
            model, config.lr_init, config.weight_decay, (config.beta1, config.beta2), config.adam_eps
        )
        record = {"step": 0, "seconds": 0.0}
        if resume_from is not None:
            record = run.restore(resume_from, model, optimizer)
            for reason in self._differences(record, corpus):
                self.say(f"resuming, but not bit-exact because {reason}")
        else:
            save(model, self.out / "rwkv-init.pth")
        self._write(self.out / "config.yaml", config.to_yaml())

        reporter = Reporter(
            self.out,
            config.total_steps,
            first_step=record["step"],
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=config.to_dict(),
            steps_per_epoch=config.steps_per_mini_epoch,
        )
        status = "failed"
        try:
            with contextlib.closing(reporter):
                reporter.header(self._header(model, corpus, batches, resume_from))
                status = self._loop(model, optimizer, text_tokenizer, corpus, batches, reporter, record)
        finally:
            self._write(self.out / "run_status.json", json.dumps({"status": status}))
        plot([self.out], self.out / "loss.png")
        return status

    def _loop(
        self,
        model: RWKV,
        optimizer: torch.optim.Optimizer,
        text_tokenizer: tokenizer.Tokenizer,
        corpus: Corpus,
        batches: Batches,
        reporter: Reporter,
        record: dict[str, Any],
    ) -> str:
        config = self.config
        prompt = self._prompt(text_tokenizer, corpus) if config.sample_every else []
        started = time.perf_counter() - record["seconds"]
        for step in range(record["step"], config.total_steps):
            step_started = time.perf_counter()
            lr = lr_at(step, config)
            set_lr(optimizer, lr)
            loss, grad_norm = self._step(step, model, optimizer, batches)
            done, now = step + 1, time.perf_counter()
            finished = done == config.total_steps
            stopped = self._stop_signal is not None and not finished
            if finished or stopped or done % config.log_every == 0:
                reporter.step(
                    {
                        "step": done,
                        "tokens": done * config.tokens_per_step,
                        "loss": loss,
                        "lr": lr,
                        "grad_norm": grad_norm,
                        "tokens_per_s": config.tokens_per_step / (now - step_started),
                        "time": now - started,
                    }
                )
            if corpus.val is not None and (finished or _due(done, config.eval_every)):
                precision = machine.autocast(config.dtype, self.device)
                score = evaluate(model, corpus.val, config.ctx_len, corpus.val_bytes, precision)
                seconds = time.perf_counter() - started
                reporter.validation(
                    {"step": done, "val_loss": score.loss, "val_bpb": score.bits_per_byte, "time": seconds}
                )
            if config.sample_every and (finished or _due(done, config.sample_every)):
                reporter.sample(done, self._sample(model, text_tokenizer, prompt))
            if finished:  # before the last checkpoint: with that one in place, the run counts as finished
                save(model, self.out / "rwkv-final.pth")
                reporter.note(f"wrote {self.out / 'rwkv-final.pth'}")
            if finished or stopped or _due(done, config.save_every):
                progress = {"step": done, "seconds": time.perf_counter() - started, "model": model.config.to_dict()}
                state = {**progress, **self._record(corpus)}
                folder = run.save(self.out, done, model, optimizer, state, config.to_yaml(), config.keep)
                reporter.note(f"saved {folder}")
            if stopped:
                reporter.note(f"stopped by {self._stop_signal} at step {done}; the same command goes on from here")
                return "preempted"
        return "finished"

    def _step(self, step: int, model: RWKV, optimizer: torch.optim.Optimizer, batches: Batches) -> tuple[float, float]:
        """One optimizer step; returns the mean loss and the gradient norm before clipping."""
        config = self.config
        first_sample = step * config.micro_bsz * config.accumulate
        loss = torch.zeros((), device=self.device)
        for micro in range(config.accumulate):
            x, y = batches.batch(first_sample + micro * config.micro_bsz, config.micro_bsz)
            with machine.autocast(config.dtype, self.device):
                micro_loss = model.loss(x.to(self.device), y.to(self.device)) / config.accumulate
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = _clip(list(model.parameters()), config.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise HeronError(
                f"step {step + 1}: loss {float(loss)}, gradient norm {float(grad_norm)}; nothing of this step was "
                "kept. Try a lower --lr_init or --beta2 0.95; the checkpoints before it are whole"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss), float(grad_norm)

    def _check_prime(self, corpus: Corpus) -> None:
        wanted = self.config.magic_prime
        if wanted is None:
            return
        prime = magic_prime(len(corpus.train), self.config.ctx_len) if corpus.kind == "binidx" else None
        if prime != wanted:
            raise ConfigError(
                f"magic_prime: {wanted} was given, {corpus.name} with ctx_len {self.config.ctx_len} has {prime}; "
                "drop the flag, it is computed"
            )

    def _prompt(self, text_tokenizer: tokenizer.Tokenizer, corpus: Corpus) -> list[int]:
        """The ids that every sampled text begins with."""
        if self.config.sample_prompt:
            return text_tokenizer.encode(self.config.sample_prompt)
        return (corpus.train if corpus.val is None else corpus.val)[:32].tolist()

    def _sample(self, model: RWKV, text_tokenizer: tokenizer.Tokenizer, prompt: list[int]) -> str:
        """The prompt and its continuation, under the same seed each time."""
        config = self.config
        separator = "" if text_tokenizer.is_text else " "
        continuation = generate(model, text_tokenizer, prompt, config.sample_tokens, seed=config.seed)
        return text_tokenizer.decode(prompt) + separator + continuation

    def _tokenizer(self, resume_from: Path | None) -> tokenizer.Tokenizer:
        """The tokenizer of the run. One that is a file, or is learned now, is kept in the run folder.

        A run that goes on keeps the one it has: ids would mean something else under any other.
        """
        config, kept = self.config, self.out / "tokenizer.json"
        earlier = None if resume_from is None else _content(resume_from.parents[1] / "tokenizer.json")
        if config.tokenizer.startswith(tokenizer.LEARNED):
            vocab_size = _whole_number(config.tokenizer)
            if resume_from is None:
                texts = training_text(config.data, config.val_data, config.val_fraction)
                content = tokenizer.learn_bpe(texts, vocab_size)
            elif earlier is None:
                raise CheckpointError(f"{resume_from}: its run has no tokenizer.json, so it was not {config.tokenizer}")
            else:
                content = earlier
        else:
            asked = tokenizer.load(config.tokenizer)
            if not isinstance(asked, tokenizer.JsonTokenizer):
                return asked
            vocab_size, content = asked.vocab_size, Path(config.tokenizer).read_text(encoding="utf-8")
            if resume_from is not None and content != earlier:
                raise CheckpointError(f"{resume_from}: its run has another tokenizer than {config.tokenizer}")
        self._write(kept, content)
        found = tokenizer.load(str(kept))
        if found.vocab_size != vocab_size:
            raise CheckpointError(f"{resume_from}: its run has a tokenizer of {found.vocab_size} ids, not {vocab_size}")
        return found

    @staticmethod
    def _write(path: Path, content: str) -> None:
        with atomic.new_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")

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
        path = Path(config.resume)
        folder = path if run.is_checkpoint(path) else run.newest(path, self.say)
        if folder is None:
            raise CheckpointError(f"resume: {path} is neither a checkpoint nor a run folder with one")
        run.verify(folder)
        if used and folder.resolve() != (run.newest(self.out) or self.out).resolve():
            raise CheckpointError(f"{self.out}: holds another run, or newer steps than {folder}; name another --out")
        return folder

    def _resolved_model(self, resume_from: Path | None) -> ModelConfig:
        """The model's sizes: from the config, or from the weights that it names, or from the run that goes on."""
        wanted = self.config.model
        if resume_from is None:
            return wanted if isinstance(wanted, ModelConfig) else load(wanted).config
        saved = ModelConfig.from_dict(run.trainer_of(resume_from)["model"])
        if isinstance(wanted, ModelConfig) and wanted != saved:
            differing = [
                f"{name} {value} (now {getattr(wanted, name)})"
                for name, value in saved.to_dict().items()
                if getattr(wanted, name) != value
            ]
            raise CheckpointError(
                f"{resume_from}: this run has another model: {', '.join(differing)}; name another --out"
            )
        return saved

    def _record(self, corpus: Corpus) -> dict[str, Any]:
        """What decides whether a resume can be bit-exact."""
        config = self.config
        return {
            "data": corpus.fingerprint,
            "threads": config.threads,
            "device": str(self.device),
            "dtype": config.dtype,
            "torch": torch.__version__,
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            **{name: getattr(config, name) for name in _EXACT},
        }

    def _differences(self, record: dict[str, Any], corpus: Corpus) -> list[str]:
        """Each thing that is not as it was when the checkpoint was written, as a clause."""
        now = self._record(corpus)
        return [
            f"{name} was {record.get(name)} and is {value}" for name, value in now.items() if record.get(name) != value
        ]

    def _header(self, model: RWKV, corpus: Corpus, batches: Batches, resume_from: Path | None) -> list[tuple[str, str]]:
        config, model_config = self.config, model.config
        wkv7 = _select.wkv7(self.device, config.ctx_len)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        return [
            ("model", f"{model_config.variant}  L{model_config.n_layer} C{model_config.n_embd} "
                      f"N{model_config.head_size} V{model_config.vocab_size}  {n_parameters / 1e6:.2f} M parameters"),
            ("data", f"{corpus.name}: {len(corpus.train):,} tokens"
                     + (f", {len(corpus.val):,} for validation" if corpus.val is not None else "")),
            ("order", batches.order.description),
            ("step", f"{config.micro_bsz} x {config.accumulate} samples of {config.ctx_len} = "
                     f"{config.tokens_per_step:,} tokens; {config.total_steps:,} steps"),
            ("device", f"{self.device}, {config.threads} threads"),
            ("precision", f"{config.dtype}: {self.dtype.reason}"),
            ("wkv7", f"{wkv7.impl}: {wkv7.reason}"),
            ("out", f"{self.out}" + (f", going on from {resume_from.name}" if resume_from else "")),
        ]  # fmt: skip

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGUSR1 asks to stop after the current step; a second one ends at once."""
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        before = {name: signal.getsignal(getattr(signal, name)) for name in names}

        def ask_to_stop(number: int, _frame: Any) -> None:
            self._stop_signal = signal.Signals(number).name
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

        for name in names:
            signal.signal(getattr(signal, name), ask_to_stop)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)


def _model_config(model: ModelConfig | str) -> ModelConfig | str:
    """A preset's name becomes its sizes; a path stays a path."""
    return ModelConfig.preset(model) if isinstance(model, str) and model in PRESETS else model


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _whole_number(spec: str) -> int:
    text = spec.removeprefix(tokenizer.LEARNED)
    if not text.isdecimal():
        raise ConfigError(f"tokenizer {spec}: wanted bpe:V with a whole number V, got {text!r}")
    return int(text)


def _clip(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
