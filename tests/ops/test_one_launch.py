"""heron.ops.token_step's kernel for one sequence: its source on a CPU, and the kernel, by the definition in fp64."""

from __future__ import annotations

import ctypes
import math
import types
from pathlib import Path

import pytest
import torch

from heron.generation.step import apart
from heron.ops import _build
from heron.ops.token_step import LayerStates, OneLaunch, cuda, one_launch_choice
from tests.ops.kernels import (
    BFLOAT16,
    check_that_a_failed_build_is_said_once,
    check_that_none_spills,
    needs_nvcc,
)
from tests.ops.networks import by_definition, check_distances, embedded, network, of_codes, parts, tokens

EMULATOR = Path(__file__).parent / "emulator"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
SMALL = dict(C=128, head_size=64, hidden=320, ranks=(5, 8, 32, 70), vocab=77)
LONG = dict(C=64, head_size=64, hidden=2304, ranks=(8, 8, 8, 300), vocab=301)  # rows of several parts
SHARED = 2**17  # bytes that there are
TOKENS = 3


@pytest.fixture(scope="module")
def library():
    """The kernel's source, built for a CPU."""
    headers = [EMULATOR / f"{name}.h" for name in ("hardware", "single_token", "together")]
    flags = ("-O1", "-U_FORTIFY_SOURCE")
    depends = [cuda.SOURCE, *cuda.INCLUDES, *headers]
    built = _build.load_c_library("token_step_emulated", [EMULATOR / "token_step.cpp"], flags, depends)
    built.token_step_emulated.restype = ctypes.c_char_p
    return built


def apart_from(network):
    return network._replace(layers=[apart(layer) for layer in network.layers])


def copied(states):
    return [LayerStates(*(part.clone() for part in layer)) for layer in states]


def emulated(library, prepared, x, gates, blocks, switches, shared=SHARED):
    """Logits, by the kernel's source with so many blocks; `switches`: each gives way to others at every turn. With -n
    blocks: the bytes of shared memory that each of n takes."""
    logits = torch.full((1, prepared.head.shape[0]), torch.nan, dtype=x.dtype)
    sizes = [len(prepared.layers), x.shape[1], prepared.hidden, logits.shape[1], *prepared.ranks, prepared.gates_hidden]
    tensors = [
        prepared.layers, prepared.head, prepared.head_scales, prepared.norm.weight, prepared.norm.bias, x, gates,
        logits, prepared.scratch, prepared.counters,
    ]  # fmt: skip
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    taken = ctypes.c_int()
    error = library.token_step_emulated(
        (ctypes.c_int * 12)(*sizes, blocks, switches, shared), (ctypes.c_void_p * 10)(*pointers),
        ctypes.c_float(prepared.norm.eps), ctypes.c_float(prepared.eps_head), ctypes.byref(taken),
    )  # fmt: skip
    assert error is None, error.decode()
    return logits if blocks > 0 else taken.value


def check(step, sizes, dtype, eights, gates, device="cpu", layers=3):
    """Some tokens by `step`, made by a function of a network and the states before, from one place to another and back:
    at most twice as far from fp64 as the definition in `dtype`."""

    def networks(kind):
        made = network(**sizes, dtype=kind, gates=gates, sequences=1, layers=layers, seed=1)
        return of_codes(made, 8) if eights else (made, made)

    exact, eager, built = networks(FP64)[1], networks(dtype)[1], on(apart_from(networks(dtype)[0]), device)
    places = copied(built.states), built.states  # a step goes on from the one, and writes the other
    steps = [step(built._replace(states=places[i - 1]), places[i]) for i in range(2)]
    logits, rounds = [], []
    for number in range(TOKENS):
        ids, rows, _ = tokens(sizes, 1, gates, seed=number, layers=layers)
        before, x = parts(places[number % 2]), embedded(eager, ids)
        of_step = None if rows is None else rows.to(dtype).squeeze(1).to(device)
        got = steps[number % 2](x.to(device), of_step)
        assert got.dtype == dtype
        assert all(torch.equal(old, new) for old, new in zip(before, parts(places[number % 2]), strict=True))
        logits.append(got.cpu())
        others = [
            [by_definition(one, [0], ids, None if rows is None else rows.to(kind)), *parts(one.states)]
            for one, kind in ((eager, dtype), (exact, FP64))
        ]
        truth = others[1][0].flatten()
        along = got.cpu().double().flatten() @ truth / (truth @ truth)
        assert number > 0 or along == pytest.approx(1.0, abs=2.0**-9)  # rounding has no favourite side
        mine = [got.cpu(), *(part.cpu() for part in parts(places[number % 2 - 1]))]
        rounds.append(list(zip(mine, *others, strict=True)))
    check_distances(rounds)
    return logits


def launched(network, before):
    """The kernel, for a network that the choice may leave to its pieces."""
    cuda.FORM.load(torch.cuda.get_device_capability())
    return cuda.Prepared(network, before)


def on(value, device):
    """A network with all tensors on `device`."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, list):
        return [on(part, device) for part in value]
    return type(value)(*(on(part, device) for part in value)) if isinstance(value, tuple) else value


@needs_compiler
@pytest.mark.parametrize("eights", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize("gates", [None, "output", "hidden"])
def test_the_kernels_source_on_a_cpu_steps(library, eights, gates):
    told = []
    for blocks, switches, shared in ((1, 0, 0), (2, 0, SHARED), (3, 1, 2**16)):

        def step(built, before, blocks=blocks, switches=switches, shared=shared):
            prepared = cuda.Prepared(built, before)
            return lambda x, rows: emulated(library, prepared, x, rows, blocks, switches, shared)

        told.append(check(step, SMALL, BF16, eights, gates))
    for others in told[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(others, told[0], strict=True))


@needs_compiler
@pytest.mark.parametrize("eights", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize("ranks", [(8, 8, 8, 300), (8, 8, 40, 600), (8, 300, 8, 900)], ids=["16", "8", "a matrix"])
def test_the_kernels_source_on_a_cpu_reads_rows_of_several_parts(library, ranks, eights):
    """Of upper low-rank matrices, 16 rows of all four come at once, or 8 of all, or rows of one matrix."""

    def step(built, before):
        prepared = cuda.Prepared(built, before)
        return lambda x, rows: emulated(library, prepared, x, rows, 3, 0)  # two have an odd number of some tiles

    check(step, dict(LONG, ranks=ranks), BF16, eights, None, layers=2)


@needs_compiler
@pytest.mark.parametrize("eights", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_in_all_logits(library, eights, bad):
    made = network(**SMALL, dtype=BF16, sequences=1, layers=2)
    built = apart_from(of_codes(made, 8)[0] if eights else made)
    x = torch.ones(1, SMALL["C"], dtype=BF16)
    x[0, 3] = bad
    assert emulated(library, cuda.Prepared(built, built.states), x, None, 2, 0).isnan().all()


@needs_compiler
def test_states_may_be_those_that_a_step_goes_on_from(library):
    """A step that cannot look ahead changes them where they are."""
    apart_, in_place = (apart_from(network(**SMALL, dtype=BF16, sequences=1)) for _ in range(2))
    before, x = copied(apart_.states), embedded(apart_, [3])
    want = emulated(library, cuda.Prepared(apart_, before), x, None, 2, 1)
    assert torch.equal(emulated(library, cuda.Prepared(in_place, in_place.states), x, None, 2, 1), want)
    assert all(map(torch.equal, parts(apart_.states), parts(in_place.states)))


@needs_compiler
@pytest.mark.parametrize("eights", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize("sizes", [SMALL, LONG, dict(SMALL, C=768, hidden=64)], ids=lambda sizes: f"C{sizes['C']}")
def test_the_kernel_takes_the_shared_memory_that_the_choice_counts_with(library, sizes, eights):
    made = network(**sizes, dtype=BF16, sequences=1, layers=2)
    made = apart_from(of_codes(made, 8)[0] if eights else made)
    x = torch.zeros(1, sizes["C"], dtype=BF16)
    for blocks in (1, 5, 24):
        least = emulated(library, cuda.Prepared(made, made.states), x, None, -blocks, 0, shared=0)
        assert cuda.shared_bytes(made, blocks) == least
        for more in (0, 1000, 100_000):
            taken = emulated(library, cuda.Prepared(made, made.states), x, None, -blocks, 0, shared=least + more)
            assert least <= taken <= least + more


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({}, (9, 0), None),
        ({}, (8, 6), "it is for compute capability 9.0, this device has 8.6"),
        (dict(head_size=16), (9, 0), "it takes heads of 64, not of 16"),
        (dict(hidden=90), (9, 0), "it takes a multiple of 64 hidden channels, not 90"),
        (dict(dtype=FP32), (9, 0), "it takes bf16 and fp16, not torch.float32"),
        (dict(gates="low-rank"), (9, 0), "it has no low-rank gate (v7a)"),
        (dict(ranks=(5, 8, 32, 1025)), (9, 0), "it takes low ranks of at most 1024, not of 1025"),
        (dict(hidden=2**17), (9, 0), "bytes of shared memory, a block has 232448"),
    ],
)
def test_networks_that_the_kernel_is_not_for_are_named(monkeypatch, change, capability, reason):
    has = types.SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    made = network(**{**SMALL, "dtype": BF16, "sequences": 1, "layers": 1, **change})
    said = cuda.why_not(torch.device("cuda"), made)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(("bits", "why"), [(8, None), (4, "it takes codes of 8 bits, not of 4")])
def test_codes_of_8_bits_are_the_kernels(bits, why, monkeypatch):
    has = types.SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    made = of_codes(network(**SMALL, dtype=BF16, sequences=1, layers=1), bits)[0]
    assert cuda.why_not(torch.device("cuda"), made) == why


def test_states_in_bf16_are_not_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made = network(**SMALL, dtype=BF16, sequences=1, layers=1)
    made = made._replace(states=[layer._replace(wkv=layer.wkv.bfloat16()) for layer in made.states])
    assert cuda.why_not(torch.device("cuda"), made) == "it takes states in fp32, not in torch.bfloat16"


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, capsys):
    said = cuda.FORM, lambda: one_launch_choice(torch.device("cuda")), "reference", "token_step"
    check_that_a_failed_build_is_said_once(monkeypatch, capsys, *said)


@needs_nvcc
@pytest.mark.parametrize("eights", ["false", pytest.param("true", marks=pytest.mark.long)])
def test_the_kernel_compiles_without_spilling(tmp_path, eights):
    forms = [f"token_step<{BFLOAT16}, {eights}>(const __grid_constant__ Problem)"]
    own = "".join(f'#include "{header}"\n' for header in cuda.INCLUDES if header not in cuda.SHARED)
    before = f"using Half = __half;\n{own}"
    check_that_none_spills(tmp_path, cuda.SOURCE, forms, "90a", ["type_traits", *cuda.SHARED], before=before)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("eights", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gates", [None, "output", "hidden"])
def test_kernel_steps(gpu, dtype, eights, gates):
    first, again = (check(launched if eights else OneLaunch, SMALL, dtype, eights, gates, gpu) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("eights", [False, True], ids=["floating", "int8"])
def test_kernel_steps_with_all_blocks(gpu, eights):
    sizes = dict(C=768, head_size=64, hidden=3072, ranks=(32, 64, 64, 128), vocab=10_003)
    check(launched if eights else OneLaunch, sizes, BF16, eights, None, gpu, layers=2)
