"""Tokens per second over HTTP, beside the engine's own: a server, and N clients that stream in other processes.

    python benchmarks/serve.py --clients 256                       a v7 of random weights, --n_layer, --n_embd
    python benchmarks/serve.py --model x.pth --clients 64 --arrive 2 --prompt 512
    python benchmarks/serve.py --clients 256 --step 6              HTTP alone: an engine whose step waits 6 ms
    python benchmarks/serve.py --minutes 10 --rows 8               no peer: mixed requests, errors, percentiles, memory

In one run: the engine alone with as many rows (as benchmarks/generate.py has them), and with one; the server with
--clients clients; the server with one client, its engine the same. A client is a few lines over a socket, so that the
server is measured. With --arrive SECONDS the clients come spread over so long, and with --last SECONDS they ask again
and again; tokens that come later do not count. Below each row stands the CPU time that a token took: of the engine's
thread between its steps, of the process that speaks HTTP, and of the clients. The server speaks HTTP in a process of
its own, as heron serve does, or with --one_process in that of the engine. With --minutes the clients are those of
serve_load.py, on a model of bytes, and all levels of the prefix cache are so small that each is full; the server's
memory is that of both its processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import history
import serve_clients
import serve_load
import torch
from generate import DTYPES, decoding, in_turns, random_model
from timing import device_of

import heron
from heron import tokenizer
from heron.commands.serve import PACKED
from heron.generation import OpenSequence, Request, Token
from heron.serve import ServeConfig, create_app, serve


def in_process(*command: str) -> Any:
    """What clients in a process of their own print, as JSON."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


class Times(NamedTuple):
    """Seconds so far."""

    engine: float  # of a CPU, by the engine's thread beside its steps
    http: float  # of a CPU, by the process that speaks HTTP
    steps: float  # of the engine
    n: int  # steps

    @classmethod
    def of(cls, engine: Timed) -> Times:
        ticks = 0
        for child in multiprocessing.active_children():
            user, system = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
        return cls(engine.beside, ticks / os.sysconf("SC_CLK_TCK"), engine.seconds, engine.n_steps)


def measured(port: int, n: int, engine: Timed, options: argparse.Namespace, **changes: float) -> dict[str, float]:
    """Figures of `n` clients, that run in other processes."""
    asked = {"port": port, "clients": n, "vocab_size": options.vocab_size, "prompt": options.prompt,
             "tokens": options.tokens, "arrive": 0.0, "last": 0.0, "seed": 0, **changes}  # fmt: skip
    before = Times.of(engine)
    found, cpu = in_process(serve_clients.__file__, json.dumps(asked))
    took = Times(*(now - then for now, then in zip(Times.of(engine), before, strict=True)))
    answers = [serve_clients.Asked(*one) for one in found]
    errors = [one.error for one in answers if one.error]
    good = [one for one in answers if not one.error] or [serve_clients.Asked(0, 1, 0, 0, "")]
    begun, ended = min(one.began for one in good), max(one.began + one.seconds for one in good)
    until = begun + asked["last"] if asked["last"] else ended
    firsts, wholes = sorted(one.first for one in good), sorted(one.seconds for one in good)
    decode = [(one.tokens - 1) / (one.seconds - one.first) for one in good if one.seconds > one.first]
    if errors:
        print(f"  {len(errors)} errors, such as: {errors[0][:200]}")
    n_tokens = max(sum(one.tokens for one in good), 1)
    return {
        "requests": len(answers),
        "errors": len(errors),
        "tokens/s": sum(one.tokens_until(until) for one in good) / (until - begun),
        "p50 first": statistics.median(firsts),
        "p95 first": firsts[int(0.95 * (len(firsts) - 1))],
        "p50 whole": statistics.median(wholes),
        "p95 whole": wholes[int(0.95 * (len(wholes) - 1))],
        "one": statistics.median(decode or [0.0]),
        "engine a token": took.engine / n_tokens,
        "http a token": took.http / n_tokens,
        "clients a token": cpu / n_tokens,
        "step": took.steps / max(took.n, 1),
        "of a step": n_tokens / max(took.n, 1),
    }


# -- the server ------------------------------------------------------------------------------------------------------


class Timed(heron.Engine):
    """Notes how long its steps take, and how long its thread is busy beside them."""

    seconds = beside = 0.0
    n_steps = 0
    _ended: float | None = None  # its thread's time, behind a step

    def step(self) -> list[tuple[OpenSequence, Token | heron.HeronError]]:
        self.beside += 0.0 if self._ended is None else time.thread_time() - self._ended
        began = time.perf_counter()
        drawn = self.drawn()
        self.seconds += time.perf_counter() - began
        self.n_steps += 1
        self._ended = time.thread_time()
        return drawn

    def drawn(self) -> list[tuple[OpenSequence, Token | heron.HeronError]]:
        return super().step()


class Waiting(Timed):
    """Gives every sequence the same token at each step, which takes `seconds` as on a device: others may run."""

    def __init__(self, model: heron.RWKV, rows: int, seconds: float):
        super().__init__(model, tokenizer.load(f"integers:{model.config.vocab_size}"), rows)
        self._seconds, self._there = seconds, dict[OpenSequence, None]()

    def add(self, request: Request) -> OpenSequence:
        sequence = super().add(request)
        self._there[sequence] = None
        return sequence

    def close(self, sequence: OpenSequence) -> None:
        super().close(sequence)
        self._there.pop(sequence, None)

    def drawn(self) -> list[tuple[OpenSequence, Token | heron.HeronError]]:
        time.sleep(self._seconds)
        for sequence in self._there:
            sequence.go_on(1)
        return [(sequence, Token(1, 0.0)) for sequence in self._there]


def serve_while(engine: heron.Engine, options: argparse.Namespace, work: Callable[[str], None], **caches: Any) -> None:
    """Serve the engine until `work`, which gets the address in a thread, has ended."""
    caches = caches or {"cache_device": 0, "cache_host": 0}
    config = ServeConfig(port=0, name="bench", rows=options.rows, queue=4 * options.clients, **caches)
    if options.one_process:
        from heron.serve.server import server_of

        server = server_of(create_app(engine, config), config)
        sys.setswitchinterval(5e-4)  # the engine's thread waits at most so long for Python's lock, rather than 5 ms
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        work(server.address)
        server.should_exit = True
        thread.join()
        return
    failures: list[BaseException] = []

    def worked(address: str) -> None:
        try:
            work(address)
        except BaseException as error:
            failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)  # which ends the server in order

    serve(engine, config, listening=lambda address: threading.Thread(target=worked, args=(address,)).start())
    if failures:
        raise failures[0]


def shown(name: str, figures: dict[str, float], engine: float) -> None:
    print(
        f"{name:<34}{figures['tokens/s']:>10.1f} tokens/s{figures['tokens/s'] / engine:>7.2f}x engine   "
        f"first token p50 {1e3 * figures['p50 first']:.0f} ms, p95 {1e3 * figures['p95 first']:.0f} ms   "
        f"whole p50 {figures['p50 whole']:.2f} s, p95 {figures['p95 whole']:.2f} s   "
        f"a client {figures['one']:.1f} tokens/s   "
        f"{figures['requests']:.0f} requests, {figures['errors']:.0f} errors"
    )
    print(
        f"{'  of a CPU':<34}{1e6 * figures['engine a token']:.1f} us a token between the engine's steps, "
        f"{1e6 * figures['http a token']:.1f} HTTP, {1e6 * figures['clients a token']:.1f} the clients   "
        f"a step of {figures['of a step']:.1f} sequences {1e3 * figures['step']:.2f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="weights; default: random ones of the sizes below")
    parser.add_argument("--variant", default="v7")
    parser.add_argument("--n_layer", type=int, default=2)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rows", type=int, default=0, help="places of the engine; default: as many as clients")
    parser.add_argument("--prompt", type=int, default=1, help="tokens of each prompt; 1: nothing is read")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--arrive", type=float, default=0.0, help="seconds over which the clients come")
    parser.add_argument("--step", type=float, help="in place of a model: milliseconds that a step waits; prompts of 1")
    parser.add_argument("--one_process", action="store_true", help="HTTP in the process of the engine")
    parser.add_argument("--minutes", type=float, default=0.0, help="of mixed requests, in place of everything else")
    parser.add_argument("--last", type=float, default=0.0, help="seconds for which they ask again and again")
    history.add_flags(parser)
    options = parser.parse_args()
    options.rows = options.rows or options.clients
    torch.set_num_threads(options.threads)
    device = device_of(parser, options.device)
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    if options.minutes:
        options.vocab_size = 256
    if options.model is None:
        sizes = (options.n_layer, options.n_embd, options.vocab_size, dtype, device)
        model = random_model(options.variant, *sizes)
    else:
        model = heron.load(options.model, dtype).to(device)
        options.vocab_size = model.config.vocab_size
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    config = model.config
    sizes = f"{config.variant} L{config.n_layer}-D{config.n_embd}, V {config.vocab_size}"
    print(f"torch {torch.__version__}, {where}, {sizes}\n")

    if options.minutes:
        with_minutes(heron.Engine(model, tokenizer.load("bytes"), options.rows, fit_steps=True), options)
        return
    if options.step is not None:
        engine = Waiting(model, options.rows, options.step / 1e3)
        alone = {rows: rows / max(options.step / 1e3, 1e-6) for rows in (options.rows, 1)}
    else:
        alone = engines_alone(model, options, device)
        packed = PACKED if device.type == "cuda" else 1  # as heron serve
        known = tokenizer.load(f"integers:{options.vocab_size}")
        engine = Timed(model, known, options.rows, packed=packed, fit_steps=True)

    def work(address: str) -> None:
        port = int(address.rpartition(":")[2])
        measured(port, min(4, options.clients), engine, options)  # warms up
        measured(port, options.clients, engine, options, tokens=4)
        figures = measured(port, options.clients, engine, options, arrive=options.arrive, last=options.last)
        one = measured(port, 1, engine, options, tokens=4 * options.tokens)
        for n, of_clients, engine_alone in ((options.clients, figures, alone[options.rows]), (1, one, alone[1])):
            name = f"server, {n} client{'s' if n > 1 else ''}"
            shown(name, of_clients, engine_alone)
            told = {
                "tokens/s": of_clients["tokens/s"],
                "p50 first s": of_clients["p50 first"],
                "engine tokens/s": engine_alone,
            }
            history.record(options, "serve.py", f"{sizes}, prompts of {options.prompt}, {name}", told)

    serve_while(engine, options, work)


def with_minutes(engine: heron.Engine, options: argparse.Namespace) -> None:
    """Print what mixed requests have met, and the server's memory before and after."""

    def work(address: str) -> None:
        def asked(seconds: float) -> serve_load.Found:
            port = int(address.rpartition(":")[2])
            load = {"port": port, "clients": options.clients, "tokens": options.tokens, "seconds": seconds}
            return serve_load.Found(**in_process(serve_load.__file__, json.dumps(load)))

        asked(0)  # warms up
        memory, is_over = [server_mib()], threading.Event()

        def watch() -> None:
            while not is_over.wait(6 * options.minutes):
                memory.append(server_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        found = asked(60 * options.minutes)
        is_over.set()
        watcher.join()
        print("requests        " + ", ".join(f"{n} {kind}" for kind, n in sorted(found.asked.items())))
        print(f"errors          {len(found.errors)}" + "".join(f"\n  {one}" for one in found.errors[:5]))
        print(f"tokens          {found.n_tokens / options.minutes / 60:.0f} a second, {options.tokens} an answer")
        for kind, seconds in sorted(found.firsts.items()):
            print(f"first token     {percentiles(seconds)}, {kind}")
        print(f"between pieces  {percentiles(found.gaps)}")
        print(f"memory          {', '.join(f'{one:.0f}' for one in (*memory, server_mib()))} MiB, from before to after")
        print("\n".join(found.levels), flush=True)

    with tempfile.TemporaryDirectory(prefix="heron-bench-") as folder:
        serve_while(engine, options, work, cache_device=4, cache_host=4, cache_disk=16, state_dir=folder)


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [0.0]
    at = {p: 1e3 * ordered[int(p / 100 * (len(ordered) - 1))] for p in (50, 95, 99)}
    return ", ".join(f"p{p} {value:.1f} ms" for p, value in at.items()) + f" of {len(seconds)}"


def server_mib() -> float:
    """Memory of this process and of that which speaks HTTP."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def engines_alone(model: heron.RWKV, options: argparse.Namespace, device: torch.device) -> dict[int, float]:
    """Tokens per second of an engine with as many places as the server's, and of one with one."""
    alone = {}
    for rows in (options.rows, 1):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, options.vocab_size, (options.prompt,), generator=generator).tolist()
        steps = {f"{rows} rows": decoding(model, rows, ids)}
        alone[rows] = rows / min(in_turns(steps, 5, max(8, 256 // rows), device)[f"{rows} rows"])
        print(f"{f'engine, {rows} rows':<34}{alone[rows]:>10.1f} tokens/s", flush=True)
    return alone


if __name__ == "__main__":
    main()
