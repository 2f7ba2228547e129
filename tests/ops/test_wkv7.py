"""heron.ops.wkv7: the definition against golden numbers, the chunked form against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from heron.errors import KernelError
from heron.ops import wkv7
from heron.ops.wkv7.reference import decay

NAMES = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "d_state")
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(batch=2, tokens=40, heads=3, size=16, kind="model", seed=0):
    """Inputs (r, w, k, v, a, b, state) and gradients (dy, d_state), fp64, exactly representable in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low, high):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, tokens, heads, size)
    r, k, v, keys, iclr = (normal(*shape) for _ in range(5))
    w = uniform(-6, 3) + 0.7 * normal(*shape)
    if "floor" in kind:
        w = uniform(2, 8)
    if "slow" in kind:
        w = uniform(-8, -3)
    if "correlated" in kind:
        keys, iclr = normal(1, 1, heads, size) + 0.3 * keys, iclr + 2
    keys = F.normalize(keys, dim=-1)
    tensors = (r, w, k, v, -keys, keys * iclr.sigmoid(), normal(batch, heads, size, size))
    gradients = (normal(*shape), normal(batch, heads, size, size))
    return [x.float().double() for x in tensors], [x.float().double() for x in gradients]


def run(inputs, gradients, impl, dtype=torch.float64):
    """y, the final state and the seven gradients, by name."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = wkv7(*inputs, impl=impl)
    grads = torch.autograd.grad(outputs, inputs, [x.to(dtype) for x in gradients])
    return dict(zip(NAMES, (*(x.detach() for x in outputs), *grads), strict=True))


def errors(got, want):
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in got}


# The definition


def test_golden_example():
    def per_token(*rows):
        return torch.tensor(rows, dtype=torch.float64).view(1, 2, 1, 2)

    r, k, v = per_token([1, 0], [1, 1]), per_token([1, 0], [0, 1]), per_token([1, 2], [3, 4])
    keys = per_token([1, 0], [0.6, 0.8])
    for impl in ("reference", "chunked"):
        y, state = wkv7(r, torch.zeros_like(r), k, v, -keys, keys * 0.5, impl=impl)
        torch.testing.assert_close(y, per_token([1, 2], [3.318403, 4.636806]), atol=1e-6, rtol=0)
        want = torch.tensor([[0.558403, 2.76], [1.116806, 3.52]], dtype=torch.float64)
        torch.testing.assert_close(state[0, 0], want, atol=1e-6, rtol=0)


def test_golden_decays():
    logits = torch.tensor([-6.0, -2.0, 0.0, 2.0, 6.0], dtype=torch.float64)
    want = torch.tensor([0.998501402, 0.930251567, 0.738403150, 0.586120176, 0.546057532], dtype=torch.float64)
    torch.testing.assert_close(decay(logits), want, atol=1e-9, rtol=0)
    log_log = -F.softplus(-logits) - 0.5
    torch.testing.assert_close(decay(logits), torch.exp(-torch.exp(log_log)), atol=1e-14, rtol=0)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradients_against_finite_differences(impl):
    inputs, _ = problem(batch=1, tokens=5, heads=2, size=3)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, impl=impl), inputs)


# The chunked form against the definition


@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunked_equals_reference_at_every_length(tokens):
    inputs, gradients = problem(batch=1, tokens=tokens)
    want = run(inputs, gradients, "reference")
    assert max(errors(run(inputs, gradients, "chunked"), want).values()) < 1e-13
    assert max(errors(run(inputs, gradients, "chunked", torch.float32), want).values()) < 3e-6


@pytest.mark.parametrize("kind", ["model", "floor", "slow", "correlated", "slow correlated"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_chunked_is_exact_on_hard_inputs(size, kind):
    inputs, gradients = problem(batch=1, tokens=70, heads=1 if size > 32 else 3, size=size, kind=kind)
    want = run(inputs, gradients, "reference")
    assert max(errors(run(inputs, gradients, "chunked"), want).values()) < 1e-13
    assert max(errors(run(inputs, gradients, "chunked", torch.float32), want).values()) < 5e-6


@pytest.mark.parametrize("scaled", ["a", "k", "v", "state", "dy", "d_state"])
def test_chunked_is_exact_at_extreme_scales(scaled):
    inputs, gradients = problem()
    factors = {"a": 0.0, "k": 0.0, "v": 100.0, "state": 10.0, "dy": 1e-8, "d_state": 10.0}
    named = dict(zip(("r", "w", "k", "v", "a", "b", "state", "dy", "d_state"), (*inputs, *gradients), strict=True))
    named[scaled] = named[scaled] * factors[scaled]
    inputs, gradients = list(named.values())[:7], list(named.values())[7:]
    want = run(inputs, gradients, "reference")
    got = errors(run(inputs, gradients, "chunked"), want)
    assert max(error for name, error in got.items() if want[name].norm() > 0) < 1e-13


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output):
    inputs, gradients = problem(tokens=37)
    grads = []
    for impl in ("reference", "chunked"):
        x = [t.requires_grad_() for t in inputs]
        grads.append(torch.autograd.grad(wkv7(*x, impl=impl)[output], x, gradients[output], allow_unused=True))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wanted", range(7))
def test_gradient_of_one_input_alone(wanted):
    inputs, gradients = problem(tokens=37)
    want = run(inputs, gradients, "reference")[NAMES[2 + wanted]]
    inputs = [x.detach() for x in inputs]
    inputs[wanted].requires_grad_()
    (got,) = torch.autograd.grad(wkv7(*inputs, impl="chunked"), inputs[wanted], gradients)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_strided_inputs():
    inputs, gradients = problem(batch=3, heads=2)
    want = run(inputs, gradients, "chunked")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]]
    got = run([*strided, inputs[6].mT.contiguous().mT], gradients, "chunked")
    assert max(errors(got, want).values()) < 1e-14


# Two roads to one answer


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_every_split_gives_the_same(impl):
    inputs, gradients = problem(batch=1, tokens=37, heads=2)
    want = run(inputs, gradients, impl)
    for cut in range(1, 37):
        inputs = [x.detach().requires_grad_() for x in inputs]
        y1, state = wkv7(*(x[:, :cut] for x in inputs[:6]), inputs[6], impl=impl)
        y2, state = wkv7(*(x[:, cut:] for x in inputs[:6]), state, impl=impl)
        y = torch.cat((y1, y2), dim=1)
        grads = torch.autograd.grad((y, state), inputs, gradients)
        got = dict(zip(NAMES, (y.detach(), state.detach(), *grads), strict=True))
        assert max(errors(got, want).values()) < 1e-13, cut


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_sequences_and_heads_do_not_mix(impl):
    inputs, gradients = problem(batch=3)
    want = run(inputs, gradients, impl)
    rows, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])

    def shuffled(tensors):
        return [x[rows][:, :, heads] if i < 6 else x[rows][:, heads] for i, x in tensors]

    got = run(shuffled(enumerate(inputs)), shuffled(zip((0, 6), gradients, strict=True)), impl)
    for name, x in got.items():
        is_state = name in ("state", "d_state")
        expected = want[name][rows][:, heads] if is_state else want[name][rows][:, :, heads]
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_cannot_reach_back(impl, dtype):
    inputs = [x.to(dtype) for x in problem(tokens=50)[0][:6]]
    y, _ = wkv7(*inputs, impl=impl)
    for t in (0, 1, 15, 16, 31, 32, 33, 49):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t] += 1
        y_changed, _ = wkv7(*changed, impl=impl)
        assert torch.equal(y_changed[:, :t], y[:, :t])
        assert not torch.equal(y_changed[:, t], y[:, t])


def test_two_runs_are_bit_equal():
    inputs, gradients = problem()
    first, second = (run(inputs, gradients, "chunked", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


# How it behaves inside a model


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_inputs_are_never_modified(impl, tokens):
    inputs, gradients = problem(tokens=tokens)
    copies = [x.clone() for x in inputs]
    with torch.no_grad():
        _, state = wkv7(*inputs, impl=impl)
    state.zero_()
    run(inputs, gradients, impl)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_dtypes(impl):
    inputs = [x.bfloat16() for x in problem()[0]]
    y, state = wkv7(*inputs, impl=impl)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want_y, want_state = wkv7(*(x.double() for x in inputs), impl="reference")
    assert (y.double() - want_y).norm() / want_y.norm() < 2e-3
    torch.testing.assert_close(state.double(), want_state, rtol=1e-5, atol=1e-5)


def test_autocast_outside_changes_nothing():
    inputs, gradients = problem()
    want = run(inputs, gradients, "chunked", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(inputs, gradients, "chunked", torch.float32)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_gradient_checkpointing():
    inputs, gradients = problem()
    want = run(inputs, gradients, "chunked")
    inputs = [x.requires_grad_() for x in inputs]
    outputs = checkpoint(lambda *x: wkv7(*x, impl="chunked"), *inputs, use_reentrant=False)
    grads = torch.autograd.grad(outputs, inputs, gradients)
    assert all(torch.equal(got, want[name]) for name, got in zip(NAMES[2:], grads, strict=True))


def test_no_state_is_a_zero_state():
    inputs = problem()[0]
    for impl in ("reference", "chunked", "auto"):
        y, state = wkv7(*inputs[:6], impl=impl)
        want_y, want_state = wkv7(*inputs[:6], torch.zeros_like(inputs[6]), impl="reference")
        torch.testing.assert_close((y, state), (want_y, want_state), rtol=1e-11, atol=1e-11)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(2, 40, 16)}, r"r must be \(B, T, H, N\).*\(2, 40, 16\)"),
        ({"r": torch.zeros(2, 0, 3, 16)}, r"T >= 1.*\(2, 0, 3, 16\)"),
        ({"r": torch.zeros(2, 40, 3, 16, dtype=torch.int64)}, "floating dtype, got torch.int64"),
        ({"v": torch.zeros(2, 40, 3, 8)}, r"v must match r.*\(2, 40, 3, 8\)"),
        ({"b": torch.zeros(2, 40, 3, 16, dtype=torch.bfloat16)}, "b must match r.*torch.bfloat16"),
        ({"k": torch.zeros(2, 40, 3, 16, device="meta")}, "k must match r.*on meta"),
        ({"state": torch.zeros(2, 3, 16, 8)}, r"state must be.*\(2, 3, 16, 16\).*\(2, 3, 16, 8\)"),
        ({"impl": "fast"}, "impl must be auto, reference, chunked, cuda; got 'fast'"),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    arguments = {name: torch.zeros(2, 40, 3, 16) for name in "rwkvab"} | change
    with pytest.raises(KernelError, match=message):
        wkv7(**arguments)


def test_the_kernels_without_a_device_say_what_to_type():
    x = torch.zeros(1, 4, 2, 16)
    with pytest.raises(KernelError, match='impl="cuda": it needs tensors on a CUDA device, got cpu; use impl="auto"'):
        wkv7(x, x, x, x, x, x, impl="cuda")


# Packed sequences


@pytest.mark.parametrize("impl", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_the_sequences_alone(impl, dtype):
    lengths = [5, 0, 1, 20, 0]
    inputs, gradients = problem(batch=1, tokens=sum(lengths), heads=2)
    states, d_states = torch.randn(2, len(lengths), 2, 16, 16, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs[:6], states)]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)
    outputs = wkv7(*leaves, impl=impl, cu_seqlens=offsets)
    grads = torch.autograd.grad(outputs, leaves, [gradients[0], d_states])
    got = dict(zip(NAMES, (*(x.detach() for x in outputs), *grads), strict=True))
    for i, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(got["state"][i], states[i])
            assert torch.equal(got["d_state"][i], d_states[i])
            continue
        own = slice(int(offsets[i]), int(offsets[i + 1]))
        alone = [*(x[:, own] for x in inputs[:6]), states[i : i + 1]]
        want = run([x.detach() for x in alone], (gradients[0][:, own], d_states[i : i + 1]), "reference")
        for name in NAMES:
            mine = got[name][i : i + 1] if "state" in name else got[name][:, own]
            torch.testing.assert_close(mine, want[name], rtol=1e-11, atol=1e-11, msg=name)
    assert wkv7(*inputs[:6], impl=impl, cu_seqlens=offsets)[1].shape == (len(lengths), 2, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cu_seqlens=torch.tensor([0, 40])), "packs all sequences into one row, B = 1; got B = 2"),
        (dict(batch=1, cu_seqlens=torch.tensor([0.0, 40.0])), r"int32 or int64, on cpu; got \(2,\) torch.float32"),
        (dict(batch=1, cu_seqlens=torch.tensor([40])), r"\(n_seq \+ 1,\), n_seq >= 1.*got \(1,\)"),
        (
            dict(batch=1, cu_seqlens=torch.tensor([0, 30, 20, 40])),
            r"from 0 to T = 40 and never decrease; got \[0, 30, 20",
        ),
        (dict(batch=1, cu_seqlens=torch.tensor([0, 39])), "from 0 to T = 40"),
        (dict(batch=1, cu_seqlens=[0, 40]), "int32 or int64, on cpu; got list"),
        (
            dict(batch=1, cu_seqlens=torch.tensor([0, 40]), state=torch.zeros(2, 3, 16, 16)),
            r"state must be.*\(1, 3, 16, 16\)",
        ),
    ],
)
def test_unfit_packs_and_states_are_refused_in_words(change, message):
    change = dict(change)
    batch = change.pop("batch", 2)
    with pytest.raises(KernelError, match=message):
        wkv7(*(torch.zeros(batch, 40, 3, 16) for _ in range(6)), **change)
