"""A run so small that hundreds of them fit into minutes, and children that go through one of them.

The parent imports everything once; each child is forked, runs the real `heron train`, and may be killed at any time.
Only the picture at the end is left out: it takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import heron
from heron import cli, report
from heron.checkpoint import run
from heron.train import loop as train

MODEL = heron.ModelConfig(
    n_layer=1, n_embd=16, head_size=16, vocab_size=256, ffn_dim=16, decay_rank=2, iclr_rank=2, value_rank=2, gate_rank=2
)
TEXT = "".join(f"Line {n} holds {n * n % 89} and {n * 7 % 13}.\n" for n in range(120))
SECONDS = 60.0  # no child lives longer


def config(folder: Path, **changes: object) -> heron.TrainConfig:
    """The settings of a run in ``folder/run`` over a text in `folder`, which is written if it is not there."""
    data = folder / "text.txt"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(TEXT)
    values = dict(
        model=MODEL, data=str(data), out=str(folder / "run"), ctx_len=16, micro_bsz=2, max_steps=24, warmup_steps=2,
        lr_init=3e-3, lr_final=1e-3, threads=1, dtype="fp32", device="cpu", save_every=3, eval_every=8, sample_every=12,
        sample_tokens=4, spike=50.0,
    )  # fmt: skip
    return heron.TrainConfig(**{**values, **changes})


def command(settings: heron.TrainConfig, folder: Path) -> list[str]:
    """The arguments after `heron` that train with these settings."""
    path = folder / f"{Path(settings.out).name}.yaml"
    path.write_text(settings.to_yaml())
    return ["train", "--config", str(path)]


def child(work: Callable[[], int], output: Path | None = None) -> int:
    """Fork a process group of its own that does `work` and exits with what it returns; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        gc.freeze()  # to look for cycles in what was imported would copy it
        os.setpgid(0, 0)
        sink = os.open(os.devnull if output is None else output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        code = work()
        sys.stdout.flush()
    finally:
        os._exit(code)


def reference(folder: Path, **changes: object) -> heron.TrainConfig:
    """Settings of a run that was never stopped, made in this process: children then find all modules imported."""
    settings = config(folder, out=str(folder / "reference"), **changes)
    torch.set_num_threads(1)
    output = (folder / "reference.txt").open("w")
    with output, contextlib.redirect_stdout(output), replaced(train, "plot", lambda *_: None):
        code = cli.main(command(settings, folder))
    if code != 0:
        raise RuntimeError(f"the reference run ended with {code}; see what it printed above")
    return settings


def train_in_child(settings: heron.TrainConfig, folder: Path, change: Callable[[], None] = lambda: None) -> int:
    """Start `heron train` in a child, after `change` was made to it; its process id."""
    arguments = command(settings, folder)

    def work() -> int:
        train.plot = lambda *_: None
        change()
        return cli.main(arguments)

    return child(work, folder / "output.txt")


def wait(pid: int, seconds: float = SECONDS) -> int | None:
    """The exit code of a child (minus the signal's number if one ended it); None: it had to be killed after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def curve(settings: heron.TrainConfig) -> tuple[list, list]:
    """What a run measured, to the last bit: (step, loss, gradient norm, lr) and (step, loss, bits) of validation."""
    steps, validations = report.read_log(Path(settings.out))
    return (
        [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in steps],
        [(r["step"], r["val_loss"], r.get("val_bpb")) for r in validations],
    )


def final_weights(settings: heron.TrainConfig) -> dict[str, torch.Tensor]:
    """What a finished run left: its weights, its adapter or its state."""
    method = "full" if settings.finetune is None else settings.finetune.method
    if method == "lora":
        files = sorted(Path(settings.out, "adapter").glob("*.safetensors"))  # of tables that train, their rows
        return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    file = "state.pth" if method == "state" else "rwkv-final.pth"
    return torch.load(Path(settings.out, file), weights_only=True)


def same(one: heron.TrainConfig, other: heron.TrainConfig) -> bool:
    """Whether two finished runs agree bit for bit in every number and every weight."""
    if curve(one) != curve(other):
        return False
    weights, others = final_weights(one), final_weights(other)
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def said(folder: Path) -> str:
    """The end of what the children of a folder printed."""
    path = folder / "output.txt"
    return path.read_text(errors="replace")[-300:].replace("\n", " | ") if path.exists() else "nothing"


def status(settings: heron.TrainConfig) -> dict:
    """What run_status.json says; {} where there is none."""
    path = Path(settings.out, "run_status.json")
    return json.loads(path.read_text()) if path.exists() else {}


@contextlib.contextmanager
def replaced(module: object, name: str, value: object):
    """Another value of an attribute while inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@dataclasses.dataclass
class Trained:
    """A model and its optimizer after some steps, to be saved."""

    model: heron.RWKV
    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        """One training step on random tokens."""
        tokens = torch.randint(256, (2, 9))
        self.model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, keep: int = 2) -> Path:
        """Save as a run does."""
        record = {"step": step, "weights": fingerprint(self.model)}
        return run.save(folder, step, self.model, self.optimizer, record, "seed: 0\n", keep)


def trained(seed: int) -> Trained:
    """A model of `MODEL` after one step."""
    torch.manual_seed(seed)
    model = heron.RWKV(MODEL)
    whole = Trained(model, heron.build_optimizer(model))
    whole.step()
    return whole


def fingerprint(model: heron.RWKV) -> float:
    """A number that tells the weights of one step from those of another."""
    return float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
