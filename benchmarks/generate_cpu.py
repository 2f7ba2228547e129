"""Decoding on a CPU beside llama.cpp: one text, and a prompt. ``python benchmarks/generate_cpu.py``

Needs llama-cpp-python, which brings llama.cpp, and gguf. The same random RWKV-7 is written as a .gguf in fp16, which
llama.cpp itself turns into Q8_0 and Q4_0. All forms run in one process on the same number of threads and take turns, a
few tokens each, so that other work on the machine falls on all; the threads of one wait while another runs. Ratios are
of medians and of the fastest turns, to llama.cpp with weights of the same size. How far the logits of each lie from
those of fp32 is printed before.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from generate import in_turns, random_model

import heron
from heron import tokenizer
from heron.generation.decoder import CppDecoder
from heron.model.coded import BITS, quantize_for_running

CPU = torch.device("cpu")
_KEPT = []  # what llama.cpp calls


class Form(NamedTuple):
    """A way to run the model."""

    step: Callable[[int], np.ndarray]
    """Reads a token; the logits (V,) behind it."""
    read: Callable[[list[int]], object]
    """Reads a prompt from a zero state."""
    peer: str | None = None
    """Whose speed it is compared with."""


def of_heron(model: heron.RWKV, peer: str) -> Form:
    decoder, ids = CppDecoder(model, 1), tokenizer.load(f"integers:{model.config.vocab_size}")
    engine = heron.Engine(model, ids)
    return Form(lambda token: decoder.step([0], [token])[0].numpy(), engine.prefill, peer)


def of_llama_cpp(library: ModuleType, path: Path, threads: int, prompt: int) -> Form:
    """llama.cpp through its C interface, without what the package's own classes add to a token."""
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(prompt, 512)
    settings.n_threads = settings.n_threads_batch = threads
    context = library.llama_init_from_model(model, settings)
    vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def read(ids: list[int]) -> np.ndarray:
        tokens = (library.llama_token * len(ids))(*ids)
        if status := library.llama_decode(context, library.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit(f"llama.cpp: decoding {len(ids)} tokens failed with {status}")
        return np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (vocab_size,))

    def afresh(ids: list[int]) -> np.ndarray:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        return read(ids)

    return Form(lambda token: read([token]), afresh)


def llama_cpp(parser: argparse.ArgumentParser) -> ModuleType:
    """The package, silent; leave with one line where it is missing."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            parser.exit(2, f"{parser.prog}: {package} is missing; type: pip install llama-cpp-python gguf\n")
    import llama_cpp

    _KEPT.append(llama_cpp.llama_log_callback(lambda *_: None))
    llama_cpp.llama_log_set(_KEPT[-1], ctypes.c_void_p())
    return llama_cpp


def forms_of(
    library: ModuleType, sizes: tuple[int, int, int], threads: int, prompt: int, folder: Path
) -> dict[str, Form]:
    """Every form by its name; the files in `folder` are needed no longer."""
    half = folder / "f16.gguf"
    model = random_model("v7", *sizes, torch.float32, CPU)
    coded = {name: quantize_for_running(random_model("v7", *sizes, torch.bfloat16, CPU), CPU, name) for name in BITS}
    heron.save(random_model("v7", *sizes, torch.float16, CPU), half, tokenizer="world" if sizes[2] == 65536 else None)
    quantized = {name: folder / f"{name}.gguf" for name in ("Q8_0", "Q4_0")}
    for name, path in quantized.items():
        settings = library.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = getattr(library, f"LLAMA_FTYPE_MOSTLY_{name}"), threads
        if library.llama_model_quantize(str(half).encode(), str(path).encode(), ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp: quantizing to {name} failed")
    return {
        "llama.cpp F16": of_llama_cpp(library, half, threads, prompt),
        **{f"llama.cpp {name}": of_llama_cpp(library, path, threads, prompt) for name, path in quantized.items()},
        "heron fp32": of_heron(model, "llama.cpp F16"),
        "heron bf16": of_heron(random_model("v7", *sizes, torch.bfloat16, CPU), "llama.cpp F16"),
        "heron int8": of_heron(coded["int8"], "llama.cpp Q8_0"),
        "heron int4": of_heron(coded["int4"], "llama.cpp Q4_0"),
    }


def report(title: str, seconds: dict[str, list[float]], tokens: int, forms: dict[str, Form]) -> None:
    """One line for each form, `tokens` of which a call reads."""
    print(f"\n{title:<20}{'tokens/s':>10}{'fastest':>10}   beside")
    for name, taken in seconds.items():
        line = f"{name:<20}{tokens / statistics.median(taken):>10.1f}{tokens / min(taken):>10.1f}"
        if (peer := forms[name].peer) is not None:
            median = statistics.median(seconds[peer]) / statistics.median(taken)
            line += f"   {peer} {median:.2f}x, fastest {min(seconds[peer]) / min(taken):.2f}x"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=12, help="of a turn")
    args = parser.parse_args()
    library = llama_cpp(parser)
    torch.set_num_threads(args.threads)
    sizes = args.n_layer, args.n_embd, args.vocab_size
    what = f"L{args.n_layer}-D{args.n_embd}, V {args.vocab_size}"
    print(f"CPU, {args.threads} threads, {what}, llama-cpp-python {library.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        forms = forms_of(library, sizes, args.threads, args.prompt, Path(folder))
    ids = torch.randint(1, args.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    written = {name: np.stack([form.step(token).copy() for token in ids[:32]]) for name, form in forms.items()}
    exact = written["heron fp32"]
    print("logits of 32 tokens, how far from fp32:", flush=True)
    for name, logits in written.items():
        print(f"  {name:<18}{np.linalg.norm(logits - exact) / np.linalg.norm(exact):.5f}")
    steps = {name: (lambda form=form: form.step(ids[0]).argmax()) for name, form in forms.items()}
    report("one text", in_turns(steps, args.turns, args.tokens, CPU), 1, forms)
    reads = {name: (lambda form=form: form.read(ids)) for name, form in forms.items()}
    report(f"a prompt of {len(ids)}", in_turns(reads, 3, 1, CPU), len(ids), forms)


if __name__ == "__main__":
    main()
