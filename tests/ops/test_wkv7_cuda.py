"""The CUDA kernels of WKV7 against the definition in fp64: on a GPU (``pytest -m gpu``), and without one as well.

Each test with a `device` runs twice: on a CUDA device, where there is one, and on a CPU that emulates it (the same
sources, compiled for it: tests/ops/emulator).
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import heron
from heron.errors import KernelError
from heron.ops import _build, _choice, wkv7, wkv7_span, wkv7_span_gradient
from heron.ops.rosa import rosa_choice
from heron.ops.wkv7 import cuda, span, wkv7_choice
from heron.ops.wkv7.reference import wkv7_reference
from heron.optim import set_lr
from tests.ops import emulator
from tests.ops.test_wkv7 import NAMES, errors, problem, run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = (1, 15, 16, 17, 31, 33, 63, 65)
FP32_BOUNDS = dict.fromkeys(NAMES, 1e-5) | {"y": 2e-6, "state": 2e-6}
BF16_BOUNDS = dict.fromkeys(NAMES, 5e-3) | {"da": 8e-3, "db": 8e-3}
CORRELATED_BOUNDS = BF16_BOUNDS | {"da": 1e-2, "db": 1e-2}
_FORMS = {"general": (torch.float32, 16), "tensor": (torch.bfloat16, 64), "tensor of 128": (torch.bfloat16, 128)}
EVERY_FORM = pytest.mark.parametrize(("dtype", "size"), [*_FORMS.values()], ids=[*_FORMS])
FORMS = pytest.mark.parametrize(
    ("dtype", "size"), [*_FORMS.values()][:2], ids=[*_FORMS][:2]
)  # where N = 128 adds nothing
TENSOR_SIZES = pytest.mark.parametrize("size", [64, 128])


def rounded(inputs, gradients, dtype):
    """The same numbers as `dtype` can hold them; states stay."""
    inputs, gradients = list(inputs), list(gradients)
    inputs[:6] = [x.to(dtype).double() for x in inputs[:6]]
    gradients[0] = gradients[0].to(dtype).double()
    return inputs, gradients


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request):
    if request.param == "cpu" and _build.find_compiler() is None:
        pytest.skip("no C++ compiler on the path")
    return request.param


def typed(device, inputs, dtype):
    """The inputs as the kernels take them: the first six in `dtype`, the state in fp32."""
    return [x.detach().to(device, dtype if i < 6 else torch.float32) for i, x in enumerate(inputs)]


def run_kernels(device, inputs, gradients, dtype, **options):
    """y, the final state and the seven gradients, by name and on the CPU, from the kernels."""
    inputs = [x.requires_grad_() for x in typed(device, inputs, dtype)]
    outputs = cuda.wkv7_kernels(*inputs, **options)
    grads = torch.autograd.grad(outputs, inputs, [gradients[0].to(device, dtype), gradients[1].to(device).float()])
    return dict(zip(NAMES, (x.detach().cpu() for x in (*outputs, *grads)), strict=True))


def assert_within(got, want, bounds):
    found = errors(got, want)
    assert all(found[name] <= bounds[name] for name in found), found


def assert_equal(got, want):
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


# Against the definition in fp64


@pytest.mark.parametrize("kind", ["model", "floor", "slow", "correlated"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_general_kernels_are_exact_to_fp32(device, size, kind):
    inputs, gradients = problem(batch=1, tokens=35, heads=1 if size > 32 else 3, size=size, kind=kind)
    got = run_kernels(device, inputs, gradients, torch.float32)
    assert_within(got, run(inputs, gradients, "reference"), FP32_BOUNDS)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.2e-3), (torch.float16, 3e-4)])
def test_general_kernels_round_once(device, dtype, bound):
    inputs, gradients = rounded(*problem(batch=2, tokens=33, size=32), dtype)
    got = run_kernels(device, inputs, gradients, dtype)
    assert_within(got, run(inputs, gradients, "reference"), dict.fromkeys(NAMES, bound))


@TENSOR_SIZES
@pytest.mark.parametrize("kind", ["model", "floor", "slow", "correlated"])
def test_tensor_cores_stay_within_their_error(device, kind, size):
    problem_ = problem(batch=1, tokens=161, heads=128 // size, size=size, kind=kind)
    inputs, gradients = rounded(*problem_, torch.bfloat16)
    got = run_kernels(device, inputs, gradients, torch.bfloat16)
    want = run(inputs, gradients, "reference")
    assert_within(got, want, CORRELATED_BOUNDS if kind == "correlated" else BF16_BOUNDS)
    biases = {name: float((got[name].double() * want[name]).sum() / want[name].square().sum()) - 1 for name in got}
    if kind in ("model", "slow"):
        assert max(map(abs, biases.values())) < 4e-4, biases  # rounding has no sign, a factor 1.001 has


@pytest.mark.parametrize("tokens", LENGTHS)
@EVERY_FORM
def test_every_length(device, tokens, dtype, size):
    inputs, gradients = rounded(*problem(batch=3, tokens=tokens, heads=1, size=size, seed=tokens), dtype)
    got = run_kernels(device, inputs, gradients, dtype)
    assert_within(got, run(inputs, gradients, "reference"), FP32_BOUNDS if size == 16 else BF16_BOUNDS)


@pytest.mark.parametrize("output", [0, 1])
@EVERY_FORM
def test_gradient_of_one_output_alone(device, output, dtype, size):
    inputs, gradients = rounded(*problem(batch=1, tokens=49, size=size), dtype)
    inputs = [x.requires_grad_() for x in inputs]
    loop = wkv7_reference(*inputs)[output]
    want = torch.autograd.grad(loop, inputs, gradients[output], allow_unused=True)
    leaves = [x.requires_grad_() for x in typed(device, inputs, dtype)]
    y = cuda.wkv7_kernels(*leaves)[output]
    got = torch.autograd.grad(y, leaves, gradients[output].to(device, y.dtype), materialize_grads=True)
    for name, one, other in zip(NAMES[2:], got, want, strict=True):
        if other is None:
            assert not one.any(), name
        else:
            bounds = FP32_BOUNDS if size == 16 else BF16_BOUNDS
            assert errors({name: one.cpu()}, {name: other})[name] <= bounds[name]


# Two roads to one answer


@pytest.mark.parametrize("change", ["strided", "unaligned", "transposed"])
@FORMS
def test_layouts_change_nothing(device, change, dtype, size):
    inputs, gradients = problem(batch=3, tokens=34, heads=2, size=size)
    want = run_kernels(device, inputs, gradients, dtype)

    def unaligned(x):
        return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)

    layouts = {
        "strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "unaligned": unaligned,
        "transposed": lambda x: x.mT.contiguous().mT,
    }
    *moved, state = typed(device, inputs, dtype)
    leaves = [layouts[change](x).requires_grad_() for x in moved] + [state.mT.contiguous().mT.requires_grad_()]
    outputs = cuda.wkv7_kernels(*leaves)
    dy = gradients[0].to(device, dtype).transpose(0, 2).contiguous().transpose(0, 2)
    grads = torch.autograd.grad(outputs, leaves, [dy, gradients[1].to(device).float().mT.contiguous().mT])
    assert_equal(dict(zip(NAMES, (x.cpu() for x in (*outputs, *grads)), strict=True)), want)


@EVERY_FORM
def test_tokens_and_rows_that_coincide(device, dtype, size):
    *inputs, state = typed(device, problem(batch=2, tokens=34, heads=2, size=size)[0], dtype)
    shared = [inputs[0][:1].expand(2, -1, -1, -1), inputs[1][:, :1].expand(-1, 34, -1, -1), *inputs[2:]]
    want = cuda.wkv7_kernels(*(x.contiguous() for x in shared), state)
    for one, other in zip(cuda.wkv7_kernels(*shared, state), want, strict=True):
        assert torch.equal(one, other)


@FORMS
def test_a_state_at_an_odd_address(device, dtype, size):
    inputs, gradients = problem(batch=1, tokens=5, size=size)
    inputs = typed(device, inputs, dtype)
    odd = inputs[6].new_empty(inputs[6].numel() + 1)[1:].view(inputs[6].shape).copy_(inputs[6])
    for options in (dict(), dict(tensor_cores=dtype == torch.bfloat16)):
        for one, other in zip(
            cuda.wkv7_kernels(*inputs[:6], odd, **options), cuda.wkv7_kernels(*inputs, **options), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@EVERY_FORM
def test_packed_sequences_are_the_sequences_alone(device, offsets_dtype, dtype, size):
    lengths = [33, 0, 1, 32, 0, 17, 1]
    inputs, gradients = problem(batch=1, tokens=sum(lengths), heads=2, size=size)
    states, d_states = (torch.randn(len(lengths), 2, size, size, dtype=torch.float64) for _ in range(2))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=offsets_dtype)
    strided_offsets = torch.stack((offsets, offsets), dim=1)[:, 0]
    got = run_kernels(
        device, [*inputs[:6], states], (gradients[0], d_states), dtype, cu_seqlens=strided_offsets.to(device)
    )
    for i, length in enumerate(lengths):
        of_states = {name: got[name][i] for name in ("state", "d_state")}
        if length == 0:
            assert torch.equal(of_states["state"], states[i].float())
            assert torch.equal(of_states["d_state"], d_states[i].float())
            continue
        own = slice(int(offsets[i]), int(offsets[i + 1]))
        alone = run_kernels(
            device,
            [*(x[:, own] for x in inputs[:6]), states[i : i + 1]],
            (gradients[0][:, own], d_states[i : i + 1]),
            dtype,
        )
        assert_equal({name: got[name][i : i + 1] if "state" in name else got[name][:, own] for name in got}, alone)


@pytest.mark.parametrize("segments", [2, 4])
def test_a_split_over_time_changes_little(device, segments, monkeypatch):
    inputs, gradients = problem(batch=1, tokens=110, heads=2, size=64, kind="slow")
    inputs[4] = 0.1 * inputs[4]  # so that a state is still felt in the next segment but one
    inputs, gradients = rounded(inputs, gradients, torch.bfloat16)
    whole = run_kernels(device, inputs, gradients, torch.bfloat16)
    monkeypatch.setattr(cuda, "_segments", lambda heads, tokens: segments)
    split = run_kernels(device, inputs, gradients, torch.bfloat16)
    assert not torch.equal(split["y"], whole["y"])
    want = run(inputs, gradients, "reference")
    assert_within(split, want, BF16_BOUNDS)
    with torch.no_grad():
        y, _ = cuda.wkv7_kernels(*typed(device, inputs, torch.bfloat16))
    assert torch.equal(y.cpu(), split["y"])


@pytest.mark.parametrize("segments", [1, 3])
@FORMS
def test_a_span_maps_states_and_their_gradients(device, segments, dtype, size, monkeypatch):
    inputs, gradients = rounded(*problem(batch=2, tokens=83, heads=1, size=size, kind="slow"), dtype)
    r, w, k, v, a, b, _ = inputs
    transfer, local = wkv7_span(w, k, v, a, b, "reference")
    want = {"P": transfer, "C": local, "D": wkv7_span_gradient(r, w, a, b, gradients[0], "reference")}
    monkeypatch.setattr(cuda, "_segments", lambda heads, tokens: segments)
    r, w, k, v, a, b, dy = typed(device, [*inputs[:6], gradients[0]], dtype)
    maps = cuda.span_kernels(w, k, v, a, b)
    back = span.composed_backwards(maps[0], cuda.span_gradient_kernels(r, w, a, b, dy.to(dtype)))
    got = dict(zip("PCD", (*span.composed(*maps), back), strict=True))
    assert len(maps[0]) == cuda.n_segments(w) == (segments if size == 64 else 1)
    found = errors({name: x.cpu() for name, x in got.items()}, want)
    assert max(found.values()) < (2e-6 if size == 16 else 5e-3), found


def test_only_few_long_sequences_are_split():
    shapes = (512, 4096), (192, 512), (768, 512), (32, 65536), (96, 4096), (48, 4096)
    assert [cuda._segments(*x) for x in shapes] == [1, 1, 1, 16, 1, 8]
    assert cuda._segments(1, 2047) == 1


@EVERY_FORM
def test_without_gradients_nothing_is_saved(device, dtype, size):
    inputs, gradients = problem(batch=2, tokens=40, size=size)
    want = run_kernels(device, inputs, gradients, dtype)
    inputs = typed(device, inputs, dtype)
    *_, saved, kept = torch.ops.heron.wkv7_kernels(*inputs, None, False, dtype == torch.bfloat16)
    assert saved.numel() == kept.numel() == 0
    y, state = cuda.wkv7_kernels(*inputs)
    assert torch.equal(y.cpu(), want["y"])
    assert torch.equal(state.cpu(), want["state"])


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_step_form(device, tokens, size):
    inputs, _ = problem(batch=3, tokens=tokens, heads=2, size=size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        *tensors, state = typed(device, inputs, dtype)
        want = dict(zip(NAMES, wkv7_reference(*(x.cpu().double() for x in tensors), inputs[6]), strict=False))
        kept = state.clone()
        y, final = cuda.wkv7_kernels(*tensors, state)
        assert torch.equal(state, kept)
        assert_within(
            {"y": y.cpu(), "state": final.cpu()}, want, {"y": {2: 2.2e-3, 4: 1e-6}[dtype.itemsize], "state": 1e-6}
        )


def test_the_step_form_on_packed_sequences(device):
    inputs, _ = problem(batch=1, tokens=4, heads=2)
    states = torch.randn(3, 2, 16, 16, device=device)
    tensors = typed(device, inputs[:6], torch.float32)
    offsets = torch.tensor([0, 1, 1, 4], device=device)
    y, final = cuda.wkv7_kernels(*tensors, states.clone(), offsets)
    assert torch.equal(final[1], states[1])
    for i in (0, 2):
        own = slice(int(offsets[i]), int(offsets[i + 1]))
        y_alone, alone = cuda.wkv7_kernels(*(x[:, own] for x in tensors), states[i : i + 1])
        assert torch.equal(y[:, own], y_alone)
        assert torch.equal(final[i : i + 1], alone)


# Memory


@pytest.mark.parametrize("segments", [1, 2])
@EVERY_FORM
def test_all_outputs_are_written_and_nothing_beside_them(device, segments, dtype, size):
    if size != 64 and segments == 2:
        pytest.skip("these kernels take whole sequences")
    tensor_cores = dtype == torch.bfloat16
    inputs, gradients = problem(batch=1, tokens=67, heads=2, size=size)
    *tensors, state = typed(device, inputs, dtype)
    d_final, dy = gradients[1].to(device).float(), gradients[0].to(device, dtype)
    chunk = 32 if tensor_cores else 16
    segment_tokens = 67 if segments == 1 else 64
    buffers = {}
    if device == "cuda":
        cuda.library()

    def guarded(name, *shape, dtype=torch.float32):
        count = int(torch.tensor(shape).prod())
        buffers[name] = torch.full((count + 128,), float("nan"), dtype=dtype, device=device)
        return buffers[name][64 : 64 + count].view(shape)

    square = (2, size, size)
    y, final = guarded("y", *tensors[0].shape, dtype=dtype), guarded("final", 1, *square)
    saved = guarded("saved", -(-67 // chunk), *square, dtype=torch.bfloat16 if tensor_cores else torch.float32)
    work = [guarded(name, segments, *square) if segments > 1 else None for name in ("transfer", "local", "edges")]
    plan = (None, tensor_cores, segments, segment_tokens, False)
    torch.ops.heron.wkv7s_forward(*tensors, state, *plan, y, final, saved, *work)
    grads = [guarded(f"d{name}", *tensors[0].shape, dtype=dtype) for name in "rwkvab"] + [
        guarded("d_state", 1, *square)
    ]
    torch.ops.heron.wkv7s_backward(*tensors, dy, d_final, saved, work[0], *plan, *grads, *work[1:])
    for name, buffer in buffers.items():
        assert buffer[:64].isnan().all(), name
        assert buffer[-64:].isnan().all(), name
        assert not buffer[64:-64].isnan().any(), name


@TENSOR_SIZES
def test_tokens_of_a_neighbour_do_not_matter(device, size):
    inputs, _ = problem(batch=1, tokens=40, heads=2, size=size)
    padded = [torch.full((1, 80, 2, size), float("nan"), dtype=torch.bfloat16, device=device) for _ in range(6)]
    views = [x[:, :40].copy_(y) for x, y in zip(padded, inputs, strict=False)]
    state = inputs[6].to(device).float()
    want = cuda.wkv7_kernels(*(x.clone() for x in views), state)
    for one, other in zip(cuda.wkv7_kernels(*views, state), want, strict=True):
        assert torch.equal(one, other)


@TENSOR_SIZES
def test_an_older_gpu_computes_the_same(size, monkeypatch):
    inputs, gradients = problem(batch=1, tokens=70, heads=2, size=size)
    offsets = torch.tensor([0, 33, 33, 70])
    states, d_states = (torch.randn(3, 2, size, size, dtype=torch.float64) for _ in range(2))
    for problem_, options in (
        ((inputs, gradients), {}),
        (([*inputs[:6], states], (gradients[0], d_states)), dict(cu_seqlens=offsets)),
    ):
        monkeypatch.setattr(emulator, "flags", ())
        want = run_kernels("cpu", *problem_, torch.bfloat16, **options)
        monkeypatch.setattr(emulator, "flags", emulator.OLDER_GPU)
        assert_equal(run_kernels("cpu", *problem_, torch.bfloat16, **options), want)


def test_the_largest_block_is_known():
    inputs, gradients = problem(batch=1, tokens=2, heads=1, size=128)
    run_kernels("cpu", inputs, gradients, torch.float32)
    assert emulator.load().wkv7s_shared_bytes() == cuda.SHARED_BYTES_128


# Inside PyTorch


@FORMS
def test_operators_obey_pytorch(device, dtype, size):
    inputs, _ = problem(batch=1, tokens=18, heads=1, size=size)
    detached = typed(device, inputs, dtype)
    leaves = [x.clone().requires_grad_() for x in detached]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        torch.ops.heron.wkv7_kernels, (*leaves, None, True, dtype == torch.bfloat16), test_utils=tests
    )
    torch.library.opcheck(torch.ops.heron.wkv7_kernels_step, (*detached, None), test_utils=tests)


def test_torch_compile_and_checkpointing(device):
    inputs, gradients = problem(batch=1, tokens=20, heads=2)
    want = run_kernels(device, inputs, gradients, torch.float32)
    compiled = torch.compile(cuda.wkv7_kernels, backend="aot_eager", fullgraph=True)
    leaves = [x.requires_grad_() for x in typed(device, inputs, torch.float32)]
    for outputs in (compiled(*leaves), checkpoint(cuda.wkv7_kernels, *leaves, use_reentrant=False)):
        grads = torch.autograd.grad(outputs, leaves, [x.to(device).float() for x in gradients])
        assert_equal(dict(zip(NAMES, (x.cpu() for x in (*outputs, *grads)), strict=True)), want)


def test_an_empty_batch(device):
    inputs, gradients = problem(batch=0, tokens=3)
    got = run_kernels(device, inputs, gradients, torch.float32)
    assert got["y"].shape == (0, 3, 3, 16)
    assert got["d_state"].shape == (0, 3, 16, 16)


# What only a GPU can show


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [511, 4096])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 64), (torch.float32, 128), (torch.bfloat16, 64), (torch.bfloat16, 128)]
)
def test_long_sequences(tokens, dtype, size):
    inputs, gradients = rounded(*problem(batch=3, tokens=tokens, heads=5, size=size), dtype)
    on_gpu, d_outputs = [x.cuda().requires_grad_() for x in inputs], [x.cuda() for x in gradients]
    outputs = wkv7(*on_gpu, impl="chunked")
    grads = torch.autograd.grad(outputs, on_gpu, d_outputs)
    want = dict(zip(NAMES, (x.detach().cpu() for x in (*outputs, *grads)), strict=True))
    got = run_kernels("cuda", inputs, gradients, dtype)
    assert_within(got, want, BF16_BOUNDS if dtype == torch.bfloat16 else FP32_BOUNDS)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("batch", "tokens", "size"),
    [(64, 200, 64), (1, 8192, 64), (32, 200, 128)],
    ids=["whole", "split over time", "of 128"],
)
def test_two_runs_are_bit_equal(batch, tokens, size):
    inputs, gradients = problem(batch=batch, tokens=tokens, heads=12, size=size)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        first, second = (run_kernels("cuda", inputs, gradients, torch.bfloat16) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in first.values())
    assert_equal(second, first)


@pytest.mark.gpu
@needs_gpu
def test_a_thread_that_has_used_no_gpu_yet():
    *inputs, state = typed("cuda", problem(batch=1, tokens=33, heads=1, size=64)[0], torch.bfloat16)
    want = cuda.wkv7_kernels(*inputs, state, tensor_cores=True)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(cuda.wkv7_kernels, *inputs, state, tensor_cores=True).result()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@needs_gpu
@EVERY_FORM
def test_cuda_graphs_and_another_stream(dtype, size):
    inputs, gradients = problem(batch=2, tokens=70, size=size)
    want = run_kernels("cuda", inputs, gradients, dtype)
    leaves = [x.requires_grad_() for x in typed("cuda", inputs, dtype)]
    d_outputs = [gradients[0].to("cuda", dtype), gradients[1].cuda().float()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = wkv7(*leaves, impl="cuda")
        grads = torch.autograd.grad(outputs, leaves, d_outputs)
    for x in (*outputs, *grads):
        x.detach().fill_(float("nan"))
    graph.replay()
    assert_equal(dict(zip(NAMES, (x.detach().cpu() for x in (*outputs, *grads)), strict=True)), want)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y, _ = wkv7(*leaves, impl="cuda")
    stream.synchronize()
    assert torch.equal(y.cpu(), want["y"])


@pytest.mark.gpu
@needs_gpu
def test_inductor_and_auto():
    inputs, gradients = problem(batch=2, tokens=70, size=64)
    leaves = [x.requires_grad_() for x in typed("cuda", inputs, torch.bfloat16)]
    assert wkv7_choice(torch.device("cuda"), 70).impl == "cuda"
    compiled = torch.compile(lambda *x: wkv7(*(x_i * 2 for x_i in x[:6]), x[6]), fullgraph=True)
    doubled = [2 * x for x in inputs[:6]] + [inputs[6]]
    want = run_kernels("cuda", doubled, gradients, torch.bfloat16)
    outputs = compiled(*leaves)
    assert torch.equal(outputs[0].cpu(), want["y"])
    grads = torch.autograd.grad(outputs, leaves, [gradients[0].to("cuda", torch.bfloat16), gradients[1].cuda().float()])
    for name, grad in zip(NAMES[2:], grads, strict=True):
        assert torch.equal(grad.cpu(), want[name] * (1 if name == "d_state" else 2)), name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_ends_where_the_definition_ends(dtype, monkeypatch):
    """200 steps of a small model on real text (the sources of Heron), once with the kernels and once with the loop.

    They begin after 400 steps with the kernels, and the learning rate falls to 0: from random weights, or at a constant
    rate, rounding alone moves the loss by some 0.01, also between two forms in PyTorch.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path(heron.__file__).parent.rglob("*.py")))
    tokens = torch.tensor(list(text), dtype=torch.int64, device="cuda")

    def train(model, impl, steps, falls_to):
        monkeypatch.setattr(cuda.FORM, "choice", lambda *_: _choice.Choice(impl, "the test"))
        optimizer = heron.build_optimizer(model)
        generator = torch.Generator().manual_seed(steps)
        losses = []
        for step in range(steps):
            falling = (1 + math.cos(math.pi * step / steps)) / 2
            set_lr(optimizer, 6e-4 * min(1, (step + 1) / 10) * (falls_to + (1 - falls_to) * falling))
            starts = torch.randint(len(tokens) - 65, (64,), generator=generator)
            batch = torch.stack([tokens[i : i + 65] for i in starts.tolist()])
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model.loss(batch[:, :-1], batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses[-20:]).mean())

    torch.manual_seed(0)
    config = heron.ModelConfig(variant="v8", n_layer=2, n_embd=128, vocab_size=256, head_size=64)
    model = heron.RWKV(config).to("cuda")
    before = train(model, "cuda", 400, falls_to=1.0)
    by_kernel, by_loop = (train(copy.deepcopy(model), impl, 200, falls_to=0.0) for impl in ("cuda", "reference"))
    assert by_loop < before - 0.03
    assert abs(by_kernel - by_loop) < 0.01


# Which form `auto` takes on a CUDA device


@pytest.fixture
def gpu(monkeypatch):
    """Facts of a GPU, as the choice asks for them; nothing can be built."""
    facts = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(_choice, "_no_kernels", None)
    monkeypatch.setattr(cuda.FORM, "load", lambda capability: None)
    return facts


def test_auto_takes_the_kernels_where_they_run(gpu):
    device = torch.device("cuda")
    assert wkv7_choice(device, 512).impl == wkv7_choice(device, 1, torch.float16, 16).impl == "cuda"
    assert wkv7_choice(device, 512, torch.float64).impl == "chunked"
    assert "it takes heads of 16, 32, 64, 128, not of 48" in wkv7_choice(device, 512, head_size=48).reason
    gpu.shared_memory_per_block_optin = 101376
    assert "bytes of shared memory" in wkv7_choice(device, 512, head_size=128).reason
    gpu.major = 7
    assert "needs compute capability 8.0 or later; this GPU has 7.0" in wkv7_choice(device, 512, head_size=32).reason


def test_auto_says_once_that_the_kernels_cannot_be_built(gpu, monkeypatch, capsys):
    def fail(capability):
        raise KernelError("wkv7s: no nvcc")

    monkeypatch.setattr(cuda.FORM, "load", fail)
    for dtype in cuda.DTYPES:
        choice = wkv7_choice(torch.device("cuda"), 512, dtype)
        assert choice.impl == "chunked"
        assert "wkv7s: no nvcc" in choice.reason
    assert wkv7_choice(torch.device("cuda"), 1).impl == "reference"
    assert capsys.readouterr().err == "heron: going on with the slower form of WKV7 in PyTorch: wkv7s: no nvcc\n"


def test_kernels_can_be_switched_off(gpu):
    _choice.keep_to_pytorch("RWKV_CUDA_ON is 0")
    assert wkv7_choice(torch.device("cuda"), 512).impl == "chunked"
    assert "RWKV_CUDA_ON is 0" in wkv7_choice(torch.device("cuda"), 512).reason
    assert rosa_choice(torch.device("cuda")).impl == "dp"


def test_the_choice_is_a_constant_to_torch_compile(gpu):
    def choose(x):
        return x if wkv7_choice(torch.device("cuda"), x.shape[0]).impl == "cuda" else x + 1

    x = torch.zeros(3)
    assert torch.equal(torch.compile(choose, backend="eager", fullgraph=True)(x), x)


def test_a_form_may_be_built_first_while_torch_compile_traces():
    built = []

    def load():
        built.append(sum(map(len, map(str, Path(__file__).parent.iterdir()))))  # nothing that can be traced

    form = _choice.NativeForm("op", "cpu", "OP", lambda device, size: "it is large" if size > 9 else None, load)

    def call(x):
        form.require(x.device, x.shape[0])
        return x + 1

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))
    assert len(built) == 1
    with pytest.raises(KernelError, match='op: impl="cpu": it is large; use impl="auto"'):
        torch.compile(call, backend="eager", dynamic=False)(torch.zeros(10))


# What nvcc makes of the sources


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_kernels_compile_without_spilling(capability):
    """Half a minute at the first time; the answer is kept in the cache, by a hash of sources, flags and compiler."""
    flags = cuda.cuda_flags([capability])
    source, *_ = cuda.sources()
    facts = [_build._version("nvcc"), *flags, *(path.read_text() for path in (source, *cuda.headers()))]
    report = _build.cache_folder() / f"wkv7s-ptxas-{hashlib.sha256(''.join(facts).encode()).hexdigest()[:16]}"
    if not report.exists():
        report.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", *flags, "-Xptxas=-v", "-cubin", str(source), "-o", f"{report}.cubin"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        report.with_suffix(".cubin").unlink()
        report.write_text(ran.stderr)
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.read_text()
    )
    assert len(spills) == 20
    assert set(spills) == {("0", "0", "0")}
    assert "wgmma.mma_async instructions are serialized" not in report.read_text()
