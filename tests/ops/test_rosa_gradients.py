"""The gradient rules of ROSA against the golden values of their sources, their definitions, and each other."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops.rosa import rosa
from heron.ops.rosa.flips import flips_by_runs, flips_cpu
from heron.ops.rosa.gradients import rosa_emb01, rosa_qkv, to_streams
from heron.ops.rosa.soft import soft_gradients, soft_gradients_cpu, soft_gradients_torch, soft_suffix


def test_the_example_of_the_1_bit_layer():
    """BlinkDL/RWKV-LM, RWKV-v8/251014_rosa_1bit_layer.py."""
    x = [[-0.1, 2, 0], [0.4, -4.2, -1.5], [1.1, 1.2, 2.5], [-3.1, -2.2, 1.5], [2.1, -3.2, -2.5]]
    x = torch.tensor([x], requires_grad=True)
    emb0, emb1 = (torch.full((3,), value, requires_grad=True) for value in (-1e-5, 1e-5))
    out = rosa_emb01(x, emb0, emb1)
    out.mean().backward()
    assert torch.equal(out[0].sign().int(), torch.tensor([[0, 0, 0], [0, 0, -1], [1, -1, 0], [1, 1, 1], [1, -1, 1]]))
    assert torch.equal(out.abs().unique(), torch.tensor([0, 1e-5]))
    dx = [
        [-6.6667e-6, -3.3333e-7, 0],
        [3.3333e-6, 1.5873e-7, 4.4444e-7],
        [1.2121e-6, 5.5556e-7, 2.6667e-7],
        [0, 3.0303e-7, 0],
        [3.1746e-7, 0, 0],
    ]
    assert torch.allclose(x.grad[0], torch.tensor(dx), rtol=1e-4, atol=1e-12)
    assert torch.allclose(emb0.grad, torch.tensor([0, 2 / 15, 1 / 15]))
    assert torch.allclose(emb1.grad, torch.tensor([1 / 5, 1 / 15, 2 / 15]))


@pytest.mark.parametrize(("no_match", "first", "de"), [("bit0", -1.5, -4.0), ("zero", 0.0, -3.0)])
def test_values_and_e_by_hand(no_match, first, de):
    q = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]) - 0.5
    k = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]) - 0.5
    v = torch.tensor([0.5, -0.2, -1, 2, 0.0005, -0.4, 1, 0.3], requires_grad=True)
    e = torch.tensor([1.5], requires_grad=True)
    y = rosa_qkv(*(x.view(1, 8, 1) for x in (q, k, v)), e, no_match=no_match)
    y.backward(torch.tensor([1.0, -2, 3, 1, -1, 2, 1, -3]).view(1, 8, 1))
    assert torch.equal(y.flatten(), torch.tensor([first, -1.5, -1.5, 1.5, 1.5, 1.5, -1.5, 1.5]))
    assert torch.allclose(v.grad, torch.tensor([0, -15, 4.5, 0.75, 1500, 3.75, -4.5, 0]))
    assert e.grad.item() == de


def test_the_soft_carrier_by_hand():
    """wjie98/rosa_soft's rule for two bits a symbol, in fp64."""
    q = [[0.5, -1], [0.25, 0.75], [-0.5, 1.5], [1, -0.25], [0.5, 2]]
    k = [[1, -0.5], [0.5, 0.5], [-1, 0.25], [0.75, -2], [-0.5, -0.5]]
    v = [[0.5, 0.5], [-0.25, 1], [1, -1], [-2, -0.5], [0.75, 0.25]]
    weight = torch.tensor([[1, -1], [2, 0.5], [-1, 1], [0.5, 2], [1, 1]], dtype=torch.float64)[None]
    inputs = [torch.tensor(x, dtype=torch.float64)[None] for x in (q, k, v)]
    streams = [((x > 0) * torch.tensor([1, 2])).sum(2).to(torch.uint8) for x in inputs]
    nothing = torch.zeros(1, 5, dtype=torch.float64)
    found = soft_gradients(*streams, weight, nothing, nothing, max_match=None)
    dq, dk, dv = (by_sign[0] / (1 + x[0].abs()) ** 2 for by_sign, x in zip(found, inputs, strict=True))

    def close(got, wanted):
        return torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), atol=1e-6)

    assert close(
        dq, [[0, 0], [-0.055047, 0.028085], [-0.038404, -0.018674], [0.060231, -0.208926], [0.031186, -0.007242]]
    )
    assert close(
        dk, [[0.042471, -0.151873], [0.027241, -0.025023], [-0.012340, -0.015289], [0.010107, 0.003439], [0, 0]]
    )
    assert close(dv, [[0, 0], [0.580431, 0.256177], [0.045858, 0.213736], [0.015207, 0.132355], [0.026082, 0.051120]])
    p, _ = soft_suffix(*(torch.where(x > 0, 1.0, -1.0) for x in inputs[:2]))
    carrier = p.double() @ torch.where(inputs[2] > 0, 1.0, -1.0)[:, 1:].double()
    assert close(carrier[0, 1:, 0], [-0.439249, 0.052731, -0.247696, 0.274595])


@pytest.mark.parametrize("flipped", ["q", "k", "all"])
@pytest.mark.parametrize(
    ("n_tokens", "n_bits", "max_match"),
    [(1, 1, None), (2, 1, None), (17, 1, None), (33, 1, 3), (20, 4, None), (19, 4, 1), (40, 8, 2)],
)
def test_flips_in_cpp_are_runs(n_tokens, n_bits, max_match, flipped):
    torch.manual_seed(n_tokens)
    streams = [torch.randint(2**n_bits, (5, n_tokens), dtype=torch.uint8) for _ in range(3)]
    streams[0][1:3] = streams[0][1:3] % 2 * 0 + 1  # constant
    streams = [streams[0]] * 3 if flipped == "all" else streams
    gain, no_match = torch.randn(5, n_tokens, 2**n_bits), torch.randn(5, n_tokens)
    arguments = (*streams, gain, no_match, n_bits, max_match, flipped)
    assert torch.allclose(flips_cpu(*arguments), flips_by_runs(*arguments), atol=1e-5)


@pytest.mark.parametrize("n_tokens", [127, 128, 129, 300])
def test_flips_of_long_and_nearly_constant_streams(n_tokens):
    """Cells are 16 bits wide up to 128 tokens, then 32."""
    torch.manual_seed(0)
    for share in (0.0, 0.02, 0.5):
        x = (torch.rand(1, n_tokens) < share).to(torch.uint8)
        k = (torch.rand(1, n_tokens) < share).to(torch.uint8)
        gain, no_match = torch.randn(1, n_tokens, 2), torch.randn(1, n_tokens)
        for streams, flipped in (((x, x, x), "all"), ((x, k, x), "q"), ((x, k, x), "k")):
            arguments = (*streams, gain, no_match, 1, None, flipped)
            assert torch.allclose(flips_cpu(*arguments), flips_by_runs(*arguments), atol=1e-4), (share, flipped)


def _with_bit(x, t, channel, bit):
    x = x.detach().clone()
    x[:, t, channel] = x[:, t, channel].abs() * (1 if bit else -1)
    return x


@pytest.mark.parametrize(
    ("bits", "no_match", "max_match"), [(1, "zero", None), (1, "bit0", 2), (4, "bit0", None), (4, "zero", 1)]
)
def test_the_bit_flip_rule_is_the_layer_run_again(bits, no_match, max_match):
    torch.manual_seed(bits)
    choices = {"bits": bits, "no_match": no_match, "max_match": max_match, "grad": "bitflip"}
    x, q, k, v, gy = (torch.randn(2, 9, 4) for _ in range(5))
    x[0, 3, 1], v[1, 2, 2] = 1e-5, -1e-5  # under the least size that counts
    emb0, emb1 = torch.randn(4), torch.randn(4)
    cases = [
        ([x], lambda x: rosa_emb01(x, emb0, emb1, **choices)),
        ([q, k, v], lambda q, k, v: rosa_qkv(q, k, v, emb0, **choices)),
    ]
    for inputs, layer in cases:
        leaves = [y.clone().requires_grad_() for y in inputs]
        layer(*leaves).backward(gy)
        for n, leaf in enumerate(leaves):
            for t in range(9):
                for channel in range(4):
                    worth = [
                        (layer(*(_with_bit(y, t, channel, bit) if m == n else y for m, y in enumerate(inputs))) * gy)
                        .sum((1, 2)) for bit in (1, 0)
                    ]  # fmt: skip
                    slope = (worth[0] - worth[1]) / (2 * inputs[n][:, t, channel].abs().clamp(min=1e-3))
                    assert torch.allclose(leaf.grad[:, t, channel], slope, rtol=1e-4, atol=1e-5), (n, t, channel)


@pytest.mark.parametrize(("n_tokens", "n_bits"), [(1, 1), (2, 4), (9, 1), (33, 2), (130, 4)])
def test_the_soft_rule_in_cpp_is_the_one_in_pytorch(n_tokens, n_bits):
    torch.manual_seed(n_tokens)
    q, k, v = (torch.randint(2**n_bits, (3, n_tokens), dtype=torch.uint8) for _ in range(3))
    k[1, 1:] = q[1, :-1]  # one long match
    slope, *others = (torch.randn(3, n_tokens, n_bits), torch.randn(3, n_tokens), torch.randn(3, n_tokens))
    fast = soft_gradients_cpu(q, k, v, slope, *others)
    truth = soft_gradients_torch(q, k, v, slope.double(), *(x.double() for x in others), max_match=None)
    for got, wanted in zip(fast, truth, strict=True):
        assert (got - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("max_match", [1, 2, 3, 7, 8])
def test_a_limit_of_the_soft_match_counts_products_of_so_many_factors(max_match):
    torch.manual_seed(0)
    q, k = (torch.randn(2, 9, 2).sign().double() for _ in "qk")
    g = (1.5 * ((q[:, :, None] * k[:, None]).sum(3) / 2 - 1)).exp()
    soft = torch.zeros(2, 9, 8, dtype=torch.float64)
    for t in range(9):
        for u in range(min(t, 8)):
            product = 1
            for back in range(min(max_match, u + 1)):
                product = product * g[:, t - back, u - back]
                soft[:, t, u] += product
    logits = (2**0.5 + 1) * ((1 + soft).sqrt() - 1)
    for t in range(9):
        each = torch.cat([torch.full((2, 1), 0.5), logits[:, t, :t] - torch.tensor(max(t, 1.0)).log()], 1).softmax(1)
        p, none = soft_suffix(q, k, max_match)
        assert torch.allclose(none[:, t], each[:, 0])
        assert torch.allclose(p[:, t, :t], each[:, 1:])
        assert not p[:, t, t:].any()


def test_the_soft_carrier_has_the_gradient_of_its_numbers():
    torch.manual_seed(0)
    signs = [torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True) for _ in "qk"]
    assert torch.autograd.gradcheck(lambda q, k: soft_suffix(q, k, 3), signs)


@pytest.mark.parametrize("grad", ["none", "bitflip", "soft_suffix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rule_changes_the_output_and_each_reaches_its_inputs(grad, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 8, dtype=dtype, requires_grad=True) for _ in "qkv")
    e = torch.randn(8, dtype=dtype, requires_grad=True)
    y = rosa_qkv(q, k, v, e, bits=4, no_match="zero", grad=grad)
    streams = [to_streams(x, 4) for x in (q, k, v)]
    src, _ = rosa(streams[0], streams[1], impl="reference")
    for b in range(2):
        for t in range(12):
            for c in range(8):
                s = src[b * 2 + c // 4, t]
                sign = 0 if s < 0 else 1 if v[b, s + 1, c] > 0 else -1
                assert y[b, t, c] == sign * e[c]
    y.sum().backward()
    assert v.grad.dtype == dtype
    assert v.grad.any()
    assert e.grad.any()
    assert [x.grad is not None and bool(x.grad.any()) for x in (q, k)] == [grad != "none"] * 2


def test_bits_of_a_symbol_count_from_the_first_channel_and_nan_is_0():
    x = torch.tensor([[[1.0, 0, -0.0, float("nan"), 0, 2, -1, 3]]])
    assert to_streams(x, 4).flatten().tolist() == [1, 2 + 8]
    assert to_streams(x, 1).flatten().tolist() == [1, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be one of 1, 4; got 3"),
        ({"no_match": "one"}, "no_match must be one of zero, bit0; got 'one'"),
        ({"grad": "magic"}, "grad must be one of none, bitflip, soft_suffix; got 'magic'"),
        ({"q": torch.zeros(1, 5, 6), "bits": 4}, "C a multiple of 4"),
        ({"k": torch.zeros(1, 4, 8)}, r"must match, got \(1, 5, 8\) on cpu and \(1, 4, 8\)"),
        ({"e": torch.zeros(1, 8)}, r"must be \(C,\) = \(8,\), got \(1, 8\)"),
    ],
)
def test_unfit_arguments_are_refused_in_words(change, message):
    arguments = {name: torch.zeros(1, 5, 8) for name in "qkv"} | {"e": torch.zeros(8)} | change
    with pytest.raises(KernelError, match=message):
        rosa_qkv(**arguments)
