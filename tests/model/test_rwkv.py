"""heron.RWKV against the equations written out token by token, and against itself along every other road."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import heron
from heron.errors import ConfigError, DataError, HeronError, KernelError, UnknownKeyError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NEVER_USED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}


def ids(*shape, vocab_size=37, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def some_state(model, batch_size, seed=2):
    """A state that is nowhere zero."""
    zeros = heron.State.zeros(model.config, batch_size, torch.device("cpu"), model.emb.weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    return zeros.map(lambda part: torch.randn(part.shape, generator=generator).to(part.dtype))


def assert_close(got, want, dtype, what=""):
    """Relative to the largest value, so that one tolerance fits logits, states and gradients."""
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error < TOLERANCE[dtype], (what, float(error))


def assert_states_close(got, want, dtype):
    for i, (a, b) in enumerate(zip(got.to_list(), want.to_list(), strict=True)):
        assert_close(a, b, dtype, f"state part {i}")


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# The equations, literally


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def literal(weights, tokens, state):
    """Logits (T, V) and the new state of one sequence: numpy, fp64, one token and one head after another.

    weights: state_dict as fp64 arrays; state: 3 arrays a layer, as upstream lists them. `weights` alone says whether
    the model is v7 or v8.
    """
    heads, size = weights["blocks.0.att.r_k"].shape
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    state = [part.copy() for part in state]
    logits = []
    for token in tokens:
        x = normed(weights["emb.weight"][token], weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"])
        v_first = None
        for i in range(n_layer):
            p = {name.removeprefix(f"blocks.{i}."): value for name, value in weights.items()}
            for name in p:
                if p[name].ndim == 3:
                    p[name] = p[name].reshape(-1)

            xx = normed(x, p["ln1.weight"], p["ln1.bias"])
            before, state[3 * i] = state[3 * i], xx
            x_r, x_w, x_k, x_v, x_a, x_g = (xx + (before - xx) * p[f"att.x_{c}"] for c in "rwkvag")
            r = p["att.receptance.weight"] @ x_r
            k = p["att.key.weight"] @ x_k
            v = p["att.value.weight"] @ x_v
            z = p["att.w0"] + np.tanh(x_w @ p["att.w1"]) @ p["att.w2"]
            iclr = sigmoid(p["att.a0"] + x_a @ p["att.a1"] @ p["att.a2"])
            gate = sigmoid(x_g @ p["att.g1"]) @ p["att.g2"]
            if i == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(p["att.v0"] + x_v @ p["att.v1"] @ p["att.v2"])
            kk = k * p["att.k_k"]
            k = k * (1 + (iclr - 1) * p["att.k_a"])
            decay = np.exp(-math.exp(-0.5) * sigmoid(z))
            y = np.empty_like(x)
            for h in range(heads):
                c = slice(h * size, (h + 1) * size)
                removal = kk[c] / max(np.linalg.norm(kk[c]), 1e-12)
                old = state[3 * i + 1][h]
                new = old @ np.diag(decay[c]) + np.outer(old @ -removal, removal * iclr[c]) + np.outer(v[c], k[c])
                state[3 * i + 1][h] = new
                out = normed(new @ r[c], p["att.ln_x.weight"][c], p["att.ln_x.bias"][c], eps=64e-5)
                y[c] = out + (r[c] * k[c] * p["att.r_k"][h]).sum() * v[c]
            x = x + p["att.output.weight"] @ (y * gate)

            xx = normed(x, p["ln2.weight"], p["ln2.bias"])
            before, state[3 * i + 2] = state[3 * i + 2], xx
            hidden = np.maximum(p["ffn.key.weight"] @ (xx + (before - xx) * p["ffn.x_k"]), 0) ** 2
            out = p["ffn.value.weight"] @ hidden
            if "ffn.enn.weight" in p:
                out = out * p["ffn.enn.weight"][token]
            x = x + out
        logits.append(weights["head.weight"] @ normed(x, weights["ln_out.weight"], weights["ln_out.bias"]))
    return np.stack(logits), state


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_it_computes_the_equations(random_model, variant, size):
    model = random_model(variant=variant, n_embd=2 * size, head_size=size).double()
    tokens, state = ids(2, 21), some_state(model, 2)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits, new = model(tokens, state)
    for row in range(2):
        want, want_state = literal(weights, tokens[row].tolist(), [part[row].numpy() for part in state.to_list()])
        assert_close(logits[row], torch.from_numpy(want), torch.float64)
        for got, part in zip(new.to_list(), want_state, strict=True):
            assert_close(got[row], torch.from_numpy(part), torch.float64)


def test_gates_of_one_make_v8_equal_to_v7_bit_for_bit(random_model):
    v7, v8 = random_model(variant="v7"), random_model(variant="v8", seed=1)
    ones = {name: torch.ones_like(value) for name, value in v8.state_dict().items() if "enn" in name}
    v8.load_state_dict({**v7.state_dict(), **ones})
    tokens = ids(2, 19)
    assert torch.equal(v7(tokens)[0], v8(tokens)[0])


def test_the_gate_is_that_of_the_input_token_never_of_the_target(random_model):
    model = random_model(vocab_size=10)
    tokens, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    model.loss(tokens, targets).backward()
    for block in model.blocks:
        rows = block.ffn.enn.weight.grad.abs().sum(dim=1).nonzero().flatten()
        assert rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_the_loss_is_the_cross_entropy_of_the_logits(random_model, variant):
    model, tokens, targets = random_model(variant=variant).double(), ids(2, 5), ids(2, 5, seed=3)
    targets[0, 2] = -100
    want = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    assert_close(model.loss(tokens, targets), want, torch.float64)
    with pytest.raises(KernelError, match=r"targets.*got 37 at position \[1, 4\]"):
        model.loss(tokens, targets.index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(37)))


# ---------------------------------------------------------------------------------------------------------------------
# Two roads to one answer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_at_once_is_one_by_one_is_every_split(random_model, variant, dtype):
    model, tokens = random_model(variant=variant).to(dtype), ids(3, 35)
    start = some_state(model, 3)
    with torch.no_grad():
        logits, end = model(tokens, start)
        state, singles = start, []
        for t in range(35):
            out, state = model(tokens[:, t : t + 1], state)
            singles.append(out)
        assert_close(torch.cat(singles, dim=1), logits, dtype)
        assert_states_close(state, end, dtype)
        for split in range(1, 35):
            first, state = model(tokens[:, :split], start)
            second, state = model(tokens[:, split:], state)
            assert_close(torch.cat((first, second), dim=1), logits, dtype, split)
            assert_states_close(state, end, dtype)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_every_head_size(random_model, size):
    model, tokens = random_model(n_layer=2, n_embd=size, head_size=size).double(), ids(1, 40)
    with torch.no_grad():
        logits, end = model(tokens)
        first, state = model(tokens[:, :33])
        rest = []
        for t in range(33, 40):
            out, state = model(tokens[:, t : t + 1], state)
            rest.append(out)
    assert logits.shape == (1, 40, 37)
    assert end.layers[0].wkv.shape == (1, 1, size, size)
    assert_close(torch.cat((first, *rest), dim=1), logits, torch.float64)
    assert_states_close(state, end, torch.float64)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_a_batch_are_independent(random_model, batch, tokens):
    model, x = random_model().double(), ids(batch, tokens)
    start = some_state(model, batch)
    logits, end = model(x, start)
    for row in range(batch):
        alone, alone_end = model(x[row : row + 1], start.map(lambda part, row=row: part[row : row + 1]))
        assert_close(logits[row : row + 1], alone, torch.float64)
        assert_states_close(end.map(lambda part, row=row: part[row : row + 1]), alone_end, torch.float64)
    if batch > 1:
        changed = x.clone()
        changed[1] = (changed[1] + 1) % 37
        others = [0, 2]
        assert torch.equal(model(changed, start)[0][others], logits[others])


@pytest.mark.parametrize("t", [0, 1, 15, 16, 17, 33])
def test_no_token_changes_a_bit_of_an_earlier_output(random_model, t):
    model, x = random_model(), ids(2, 34)
    changed = x.clone()
    changed[:, t] = (changed[:, t] + 1) % 37
    with torch.no_grad():
        before, after = model(x)[0], model(changed)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(dim=-1).all()


def test_layer_0_never_reads_its_value_mixing_and_the_layers_above_read_layer_0(random_model):
    model, tokens = random_model(), ids(2, 9)
    with torch.no_grad():
        logits = model(tokens)[0]
        for name in NEVER_USED:
            model.get_parameter(name).mul_(-3)
        assert torch.equal(model(tokens)[0], logits)
        for layer in (1, 2):
            model.get_parameter(f"blocks.{layer}.att.v0").add_(1)
            changed = model(tokens)[0]
            assert not torch.equal(changed, logits)
            logits = changed


@pytest.mark.parametrize("variant", ["v7", "v8"])
@pytest.mark.parametrize("tokens", [1, 17])
def test_every_parameter_learns(random_model, variant, tokens):
    model, tokens = random_model(variant=variant), ids(3, tokens)
    start = some_state(model, 3)
    model(tokens, start)[0].logsumexp(dim=-1).square().sum().backward()
    for name, grad in gradients(model).items():
        if name in NEVER_USED:
            assert grad is None or not grad.any()
        else:
            assert torch.isfinite(grad).all(), name
            assert grad.any(), name


def test_gradients_through_the_state_are_those_of_the_whole_sequence(random_model):
    model, tokens = random_model().double(), ids(2, 20)
    weights = torch.randn(2, 20, 37, generator=torch.Generator().manual_seed(4)).double()
    used = {name: parameter for name, parameter in model.named_parameters() if name not in NEVER_USED}

    def run(*pieces):
        state = start = some_state(model, 2).map(torch.Tensor.requires_grad_)
        logits = []
        for piece in tokens.split(pieces, dim=1):
            out, state = model(piece, state)
            logits.append(out)
        return torch.autograd.grad((torch.cat(logits, dim=1) * weights).sum(), [*used.values(), *start.to_list()])

    whole = run(20)
    for pieces in ((1, 19), (16, 4), (19, 1), (1, 1, 17, 1)):
        for i, (got, want) in enumerate(zip(run(*pieces), whole, strict=True)):
            assert_close(got, want, torch.float64, [*used, *range(9)][i])


def test_the_gradient_of_an_initial_state_is_the_slope_of_the_loss(random_model):
    model, tokens = random_model().double(), ids(2, 6)
    start = some_state(model, 2).map(torch.Tensor.requires_grad_)
    direction = some_state(model, 2, seed=9)

    def loss(step):
        moved = [a + step * b for a, b in zip(start.to_list(), direction.to_list(), strict=True)]
        logits, state = model(tokens, heron.State.from_list(moved))
        return logits.square().mean() + sum(part.square().mean() for part in state.to_list())

    grads = torch.autograd.grad(loss(0.0), start.to_list())
    slope = sum((g * d).sum() for g, d in zip(grads, direction.to_list(), strict=True))
    with torch.no_grad():
        measured = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert all(grad.any() for grad in grads)
    assert float(slope) == pytest.approx(float(measured), rel=1e-7)
    assert all(part.grad_fn is None for part in model(tokens, start)[1].detach().to_list())


def test_recomputing_the_blocks_gives_the_same_gradients(random_model):
    model, tokens = random_model(), ids(2, 18)
    start = some_state(model, 2).map(torch.Tensor.requires_grad_)

    def run():
        model.zero_grad()
        logits, end = model(tokens, start)
        loss = logits.square().mean() + sum(part.square().mean() for part in end.to_list())
        d_start = torch.autograd.grad(loss, start.to_list(), retain_graph=True)
        loss.backward()
        return [*(grad for grad in gradients(model).values() if grad is not None), *d_start]

    plain = run()
    model.grad_checkpoint = True
    for a, b in zip(run(), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_state_handed_in_stays_as_it_was(random_model, tokens):
    model = random_model()
    start = some_state(model, 2)
    kept = start.clone()
    with torch.no_grad():
        _, end = model(ids(2, tokens), start)
        for part in end.to_list():
            part.zero_()
    assert all(torch.equal(a, b) for a, b in zip(start.to_list(), kept.to_list(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "wkv_dtype", "tolerance"),
    [(torch.float64, torch.float64, 0), (torch.float32, torch.float32, 1e-5), (torch.bfloat16, torch.float32, 0.1)],
)
def test_dtypes(random_model, dtype, wkv_dtype, tolerance):
    model = random_model().to(torch.bfloat16).double()  # weights that every dtype holds exactly
    tokens = ids(2, 20)
    with torch.no_grad():
        want, _ = model(tokens)
        logits, state = model.to(dtype)(tokens)
    assert logits.dtype == state.layers[0].att_shift.dtype == state.layers[0].ffn_shift.dtype == dtype
    assert {layer.wkv.dtype for layer in state.layers} == {wkv_dtype}
    assert (logits.double() - want).norm() <= tolerance * want.norm()
    loss = model.loss(tokens, ids(2, 20, seed=5))
    loss.backward()
    assert loss.dtype == wkv_dtype
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values() if grad is not None)


def test_a_table_in_fp32_beside_weights_in_bf16(random_model):
    model, tokens = random_model().to(torch.bfloat16), ids(2, 6)
    with torch.no_grad():
        want = model(tokens)[0]
    for block in model.blocks:
        block.ffn.enn.float()
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], want)


def test_int32_ids_are_ids(random_model):
    model, tokens = random_model(), ids(2, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens.int())[0], model(tokens)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("variant", "big", "vocab_size", "tensors", "parameters", "tables"),
    [
        ("v7", False, 65536, 402, 191_084_544, 0),
        ("v7", False, 50304, 402, 167_688_192, 0),
        ("v8", False, 50304, 414, 631_289_856, 463_601_664),
        ("v8", False, 65536, 414, 795_064_320, 603_979_776),
        ("v7", True, 65536, 798, 1_527_668_736, 0),
        ("v8", True, 50304, 822, 3_937_820_672, 2_472_542_208),
        ("v8", True, 65536, 822, 4_748_894_208, 3_221_225_472),
    ],
)
def test_tensors_and_parameters_of_released_sizes(variant, big, vocab_size, tensors, parameters, tables):
    config = heron.ModelConfig.preset("rwkv7-1.5b" if big else "rwkv7-0.1b", variant=variant, vocab_size=vocab_size)
    with torch.device("meta"):
        state = heron.RWKV(config).state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters
    assert sum(value.numel() for name, value in state.items() if name.endswith("ffn.enn.weight")) == tables


RELEASED = {
    "0.1b": (12, 768, 64, 64, 32, 128),
    "0.4b": (24, 1024, 64, 64, 32, 128),
    "1.5b": (24, 2048, 96, 96, 64, 256),
    "2.9b": (32, 2560, 96, 96, 64, 320),
    "7.2b": (32, 4096, 128, 128, 96, 480),
    "13.3b": (61, 4096, 192, 192, 128, 384),
}


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_released_presets(variant, size):
    config = heron.ModelConfig.preset(f"rwk{variant}-{size}")
    ranks = (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank)
    assert (config.n_layer, config.n_embd, *ranks) == RELEASED[size]
    assert (config.variant, config.head_size, config.vocab_size) == (variant, 64, 65536)
    assert config.ffn_dim == 4 * config.n_embd


@pytest.mark.parametrize(
    ("n_embd", "ranks"),
    [
        (32, (32, 32, 32, 32)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
        (2560, (128, 128, 96, 256)),
        (4096, (160, 160, 96, 320)),
    ],
)
def test_ranks_of_new_models(n_embd, ranks):
    config = heron.ModelConfig(n_embd=n_embd, head_size=32)
    assert (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank) == ranks


def test_names_and_shapes_are_upstreams(random_model):
    state = {name: tuple(value.shape) for name, value in random_model(n_layer=2).state_dict().items()}
    C, V, F_, H, N, vector = 32, 37, 50, 2, 16, (1, 1, 32)
    want = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    want |= {"blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    for i in range(2):
        block = {f"ln{j}.{part}": (C,) for j in (1, 2) for part in ("weight", "bias")}
        block |= {f"att.x_{letter}": vector for letter in "rwkvag"}
        block |= {f"att.{name}": vector for name in ("w0", "a0", "v0", "k_k", "k_a")}
        block |= {f"att.{letter}1": (C, rank) for letter, rank in zip("wavg", (5, 6, 7, 9), strict=True)}
        block |= {f"att.{letter}2": (rank, C) for letter, rank in zip("wavg", (5, 6, 7, 9), strict=True)}
        block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
        block |= {"att.r_k": (H, N), "att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
        block |= {"ffn.x_k": vector, "ffn.key.weight": (F_, C), "ffn.value.weight": (C, F_), "ffn.enn.weight": (V, C)}
        want |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    assert state == want


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be done


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), r"tokens.*T >= 1.*\(2, 0\)"),
        (torch.zeros(4, dtype=torch.int64), r"tokens.*\(B, T\).*\(4,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"tokens.*\(1, 2, 3\)"),
        (torch.tensor([[0, 37]]), r"tokens.*0 to 36.*37"),
        (torch.tensor([[-1, 3]]), r"tokens.*0 to 36.*-1"),
        (torch.zeros(1, 2), r"tokens.*int64.*float32"),
        (torch.zeros(1, 2, dtype=torch.bool), r"tokens.*int64.*bool"),
    ],
)
def test_unfit_tokens_are_refused(random_model, tokens, words):
    with pytest.raises(DataError, match=words):
        random_model()(tokens)


@pytest.mark.parametrize(
    ("changes", "batch", "words"),
    [
        (dict(n_layer=2), 2, "state: wanted 3 layers, got 2"),
        (dict(), 1, r"state of layer 0, att_shift: wanted \(2, 32\), got \(1, 32\)"),
        (dict(n_embd=48), 2, r"state of layer 0, att_shift: wanted \(2, 32\), got \(2, 48\)"),
        (dict(head_size=32), 2, r"state of layer 0, wkv: wanted \(2, 2, 16, 16\), got \(2, 1, 32, 32\)"),
    ],
)
def test_a_foreign_state_is_refused(random_model, changes, batch, words):
    foreign = some_state(random_model(**changes), batch)
    with pytest.raises(ConfigError, match=words):
        random_model()(ids(2, 3), foreign)


def test_a_list_is_no_state_and_the_message_says_how_to_make_one(random_model):
    model = random_model()
    with pytest.raises(ConfigError, match=r"state.*list.*State\.from_list"):
        model(ids(2, 3), some_state(model, 2).to_list())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(variant="v9"), ConfigError, "variant: wanted one of v7, v8, got 'v9'"),
        (dict(n_layers=3), UnknownKeyError, "model: unknown key 'n_layers'. Did you mean 'n_layer'?"),
        (dict(n_embd=100), ConfigError, "n_embd 100 is not a multiple of head_size 64"),
        (dict(head_size=8), ConfigError, "head_size: wanted 16 to 128, got 8"),
        (dict(vocab_size=0), ConfigError, "vocab_size: wanted at least 1, got 0"),
        (dict(n_layer="many"), ConfigError, "n_layer: wanted int, got 'many'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, error, words):
    with pytest.raises(error) as caught:
        heron.ModelConfig.from_dict(settings)
    assert words in str(caught.value)
    assert isinstance(caught.value, HeronError)


def test_an_unknown_preset_names_the_near_one():
    with pytest.raises(ConfigError, match="no preset 'rwkv8-0.1'.*Did you mean 'rwkv8-0.1b'"):
        heron.ModelConfig.preset("rwkv8-0.1")
