"""Seconds from an empty cache to the first step of `heron train` and to the first token of `heron generate`, on a GPU.

``python benchmarks/cold_start.py [train] [generate] [--again]``. Each is a process of its own that finds no kernel and
no compiled graph: its caches are folders made for it. With --again a second process follows, which finds them full.
Below the seconds stands where they went, in the order in which things ended; what is indented ran beside the rest.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = ["--n_layer", "12", "--n_embd", "768", "--variant", "v7"]
TRAIN = [
    *("train", *SIZES, "--data", "builtin:python-docs", "--tokenizer", "world", "--vocab_size", "65536"),
    *("--ctx_len", "512", "--micro_bsz", "16", "--max_steps", "2", "--device", "cuda"),
]
GENERATE = ["generate", "--prompt", "The kernels of", "--max_tokens", "2", "--tokenizer", "world", "--device", "cuda"]
CACHES = {"HERON_CACHE": "heron", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


class Watch:
    """When functions of a `heron` command began and ended, in seconds since it was started."""

    def __init__(self, zero: float):
        self.zero = zero
        self.lines: list[tuple[float, str]] = []
        self.seen: set[str] = set()

    def now(self) -> float:
        return time.time() - self.zero

    def note(self, name: str, begun: float, beside: bool = False) -> None:
        """Write down the first time of each name."""
        if name not in self.seen:
            self.seen.add(name)
            end = self.now()
            self.lines.append((end, f"{'    ' if beside else ''}{end:6.1f} s  {name} ({end - begun:.1f} s)"))

    def wrap(self, owner: Any, attribute: str, name: Callable[..., str], beside: bool = False) -> None:
        """Note calls of a function, under the name that `name` gives its arguments."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            begun = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.note(name(*arguments), begun, beside)

        setattr(owner, attribute, watched)


def follow(zero: float, command: list[str]) -> int:
    """Run a `heron` command in this process, and print where its time went."""
    watch = Watch(zero)
    watch.note("Python has started", 0.0)
    begun = watch.now()
    import torch

    watch.note("import torch", begun)
    begun = watch.now()
    from heron import cli
    from heron.generation import Engine
    from heron.model import compiled
    from heron.ops import _build
    from heron.train import loop
    from heron.train.step import Learner

    watch.note("import heron", begun)
    begun = watch.now()
    torch.zeros(1, device="cuda")
    watch.note("the GPU's context", begun)
    watch.wrap(_build, "_compile", lambda name, *_: f"build {name}", beside=True)
    watch.wrap(_build, "_load_op_library", lambda name, *_: f"build and load {name}", beside=True)
    watch.wrap(compiled._choice, "await_builds", lambda: "wait for builds, after the first graph")
    watch.wrap(loop.Trainer, "__init__", lambda *_: "settings of the run")
    watch.wrap(loop.run_data, "corpus", lambda *_: "data")
    watch.wrap(Learner, "__init__", lambda *_: "model on the GPU, optimizer")
    watch.wrap(Learner, "gradients", lambda *_: "first forward and backward pass, with the compiler")
    watch.wrap(Learner, "update", lambda *_: "first update")
    watch.wrap(loop.Trainer, "_settle", lambda *_: "STEP 1")
    watch.wrap(Engine, "__init__", lambda *_: "engine: decoder, with the compiler and graphs")
    run = Engine.run

    def to_the_first(engine: Engine, *arguments: Any) -> Any:
        begun = watch.now()
        for piece in run(engine, *arguments):
            watch.note("FIRST TOKEN", begun)
            yield piece

    Engine.run = to_the_first
    code = cli.main(command)
    print("\n".join(text for _, text in sorted(watch.lines)))
    return code


def measure(name: str, command: list[str], caches: Path) -> None:
    """Start `command` with caches in a folder, and print what it prints."""
    environment = {**os.environ, **{variable: str(caches / folder) for variable, folder in CACHES.items()}}
    print(f"--- {name}: heron {' '.join(command)}", flush=True)
    zero = time.time()
    child = [sys.executable, __file__, "--follow", str(zero), *command]
    ran = subprocess.run(child, env=environment, check=False)
    print(f"--- {name}: exit code {ran.returncode}, the whole process {time.time() - zero:.1f} s\n", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--follow"]:
        sys.exit(follow(float(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="train, generate; default: both")
    parser.add_argument("--again", action="store_true", help="a second time, with the caches of the first")
    options = parser.parse_args()
    if unknown := set(options.what) - {"train", "generate"}:
        parser.error(f"wanted train or generate, got {', '.join(unknown)}")
    import torch

    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: this needs a CUDA device, and there is none\n")
    with tempfile.TemporaryDirectory() as scratch:
        for what in options.what or ("train", "generate"):
            caches, model = Path(scratch) / what, Path(scratch) / "model.pth"
            if what == "generate":
                init = ["init", *SIZES, "--vocab_size", "65536", "--out", str(model), "--dtype", "bf16"]
                subprocess.run([sys.executable, "-m", "heron", *init], check=True)
            for turn in ("empty caches", "full caches")[: 1 + options.again]:
                run = Path(scratch) / turn
                command = [*TRAIN, "--out", str(run)] if what == "train" else ["generate", str(model), *GENERATE[1:]]
                measure(f"{what}, {turn}", command, caches)


if __name__ == "__main__":
    main()
