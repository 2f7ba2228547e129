"""heron.RWKV against the equations written out token by token, and against itself along every other road."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import heron
from heron.errors import ConfigError, DataError, HeronError, KernelError, UnknownKeyError
from heron.model.deep_embed import DeepEmbed
from heron.optim import TABLE, group_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NEVER_USED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
FAMILY = {
    "v7": dict(variant="v7"),
    "v7a": dict(variant="v7a"),
    "v7b": dict(variant="v7b"),
    "v8": dict(variant="v8"),
    "v8 4x": dict(variant="v8", deep_embed_4x=True),
    "hybrid": dict(variant="v8-hybrid"),
    "hybrid 4x": dict(variant="v8-hybrid", deep_embed_4x=True, has_ln0=True),
}
every_variant = pytest.mark.parametrize("variant", FAMILY)


def never_used(config):
    return NEVER_USED if config.has_ln0 else NEVER_USED | {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}


def ids(*shape, vocab_size=37, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def some_state(model, batch_size, seed=2):
    """A state that is nowhere zero; where there is attention, with a context of 5 tokens."""
    start = heron.State.zeros(model.config, batch_size, torch.device("cpu"), model.emb.weight.dtype)
    if model.config.has_attention:
        start = model(ids(batch_size, 5, seed=seed))[1].detach()
    generator = torch.Generator().manual_seed(seed)
    return on_floats(start, lambda part: torch.randn(part.shape, generator=generator).to(part.dtype))


def on_floats(state, function):
    """The state with a function applied to all but the token ids."""
    return state.map(lambda part: function(part) if part.is_floating_point() else part)


def floats(state):
    return [part for part in state.to_list() if part.is_floating_point()]


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


def literal_attention(p, x, i, n_layer, state, embedded):
    """DeepEmbedAttention of layer i on the last token of the context; it appends to the caches in `state`."""
    context = state[3 * n_layer]
    at_k = 3 * n_layer + 1 + 2 * i
    for at, code in ((at_k, "k"), (at_k + 1, "v")):
        down = p[f"qkv.{code}1"].T if f"qkv.{code}1" in p else p[f"qkv.{code}{code}.weight"]
        state[at] = np.vstack((state[at], down @ x))
    q = p["qkv.qq.weight"] @ x
    keys, values = [], []
    for token, k_code, v_code in zip(context, state[at_k], state[at_k + 1], strict=True):
        if "qkv.k_emb.weight" in p:
            k_row = p["qkv.k_emb.weight"][token] + p["qkv.k_emb_x.weight"] @ embedded(token)
            v_row = p["qkv.v_emb.weight"][token] + p["qkv.v_emb_x.weight"] @ embedded(token)
            keys.append((k_code @ p["qkv.k2"]) * k_row)
            values.append(np.tanh(v_code @ p["qkv.v2"]) * v_row)
        else:
            keys.append((p["qkv.kkup.weight"] @ k_code) * p["qkv.ennk.weight"][token])
            values.append(np.tanh(p["qkv.vvup.weight"] @ v_code) * p["qkv.emm.weight"][token])
    cap = 32
    if "qkv.x_q" in p:
        cap = 64
        at_q = 3 * n_layer + 1 + 2 * n_layer + i
        before, state[at_q] = state[at_q], q
        q = q + (before - q) * p["qkv.x_q"]
        zero_k, zero_v = np.zeros_like(keys[0]), np.zeros_like(values[0])
        keys = [k + (b - k) * p["qkv.x_k"] for k, b in zip(keys, [zero_k, *keys[:-1]], strict=True)]
        values = [v + (b - v) * p["qkv.x_v"] for v, b in zip(values, [zero_v, *values[:-1]], strict=True)]
    q = normed(q, p["qkv.lnq.weight"], p["qkv.lnq.bias"])
    keys = [normed(k, p["qkv.lnk.weight"], p["qkv.lnk.bias"]) for k in keys]
    values = [normed(v, p["qkv.lnv.weight"], p["qkv.lnv.bias"]) for v in values]
    scores = np.array([math.exp(cap * math.tanh(q @ k / (16 * cap))) for k in keys])
    return sum(score * v for score, v in zip(scores / scores.sum(), values, strict=True))


def literal(weights, tokens, state, has_ln0=True):
    """Logits (T, V) and the new state of one sequence: numpy, fp64, one token and one head after another.

    weights: state_dict as fp64 arrays; state: the list of arrays that upstream uses. `weights` alone says which variant
    the model is; `has_ln0` is what they cannot say.
    """
    heads, size = weights["blocks.0.att.r_k"].shape
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    state = [part.copy() for part in state]

    def embedded(token):
        x = weights["emb.weight"][token]
        return normed(x, weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]) if has_ln0 else x

    logits = []
    for token in tokens:
        x = embedded(token)
        v_first = None
        if len(state) > 3 * n_layer:
            state[3 * n_layer] = np.append(state[3 * n_layer], token)
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
            looked_back = 0
            if "qkv.qq.weight" in p:
                looked_back = literal_attention(p, x, i, n_layer, state, embedded)
            x = x + p["att.output.weight"] @ (y * gate) + looked_back

            xx = normed(x, p["ln2.weight"], p["ln2.bias"])
            before, state[3 * i + 2] = state[3 * i + 2], xx
            hidden = np.maximum(p["ffn.key.weight"] @ (xx + (before - xx) * p["ffn.x_k"]), 0) ** 2
            if "ffn.enn4.weight" in p:
                hidden = hidden * p["ffn.enn4.weight"][token]
            if "ffn.s_emb.weight" in p:
                row = p["ffn.s_emb.weight"][token] + p["ffn.s_emb_x.weight"] @ embedded(token)
                squeezed = xx @ p["ffn.s1"]
                mixed = [sum(squeezed[a] * row[32 * a + b] for a in range(32)) for b in range(32)]
                hidden = hidden * (np.array(mixed) @ p["ffn.s2"] + p["ffn.s0"])
            out = p["ffn.value.weight"] @ hidden
            if "ffn.enn.weight" in p:
                out = out * p["ffn.enn.weight"][token]
            x = x + out
        logits.append(weights["head.weight"] @ normed(x, weights["ln_out.weight"], weights["ln_out.bias"]))
    return np.stack(logits), state


@pytest.mark.parametrize(("size", "n_layer"), [(16, 3), (64, 1)])
@every_variant
def test_it_computes_the_equations(random_model, variant, size, n_layer):
    model = random_model(**FAMILY[variant], n_embd=2 * size, head_size=size, n_layer=n_layer).double()
    tokens, state = ids(2, 18), some_state(model, 2)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits, new = model(tokens, state)
    for row in range(2):
        start = [part[row].numpy() for part in state.to_list()]
        want, want_state = literal(weights, tokens[row].tolist(), start, model.config.has_ln0)
        assert_close(logits[row], torch.from_numpy(want), torch.float64)
        for got, part in zip(new.to_list(), want_state, strict=True):
            assert_close(got[row], torch.from_numpy(part), torch.float64)


NEUTRAL = {"ffn.enn": 1, "ffn.enn4": 1, "ffn.s2": 0, "ffn.s0": 1, "qkv.lnv": 0}


@pytest.mark.parametrize("variant", sorted(FAMILY.keys() - {"v7"}))
def test_with_neutral_parts_every_variant_is_v7_bit_for_bit(random_model, variant):
    """Gates of 1, s2 = 0 with s0 = 1, lnv = 0; all that then has no effect stays random."""
    v7, model, tokens = random_model(variant="v7"), random_model(**FAMILY[variant], seed=1), ids(2, 19)
    want = v7(tokens)[0]
    assert not torch.equal(model(tokens)[0], want)
    content = {**model.state_dict(), **v7.state_dict()}
    if not model.config.has_ln0:
        content["emb.weight"] = v7.embed(torch.arange(37))
    model.load_state_dict(content)
    parts = {part for name in content for part in NEUTRAL if f".{part}." in f"{name}."}
    assert parts
    for part in parts:
        assert not torch.equal(model(tokens)[0], want)  # each one is needed
        for name, parameter in model.named_parameters():
            if f".{part}." in f"{name}.":
                torch.nn.init.constant_(parameter, NEUTRAL[part])
    assert torch.equal(model(tokens)[0], want)


def test_the_gate_is_that_of_the_input_token_never_of_the_target(random_model):
    model = random_model(vocab_size=10)
    tokens, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    model.loss(tokens, targets).backward()
    for block in model.blocks:
        rows = block.ffn.enn.weight.grad.abs().sum(dim=1).nonzero().flatten()
        assert rows.tolist() == [1, 2, 3]


@every_variant
def test_the_loss_is_the_cross_entropy_of_the_logits(random_model, variant):
    model, tokens, targets = random_model(**FAMILY[variant]).double(), ids(2, 5), ids(2, 5, seed=3)
    targets[0, 2] = -100
    want = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    assert_close(model.loss(tokens, targets), want, torch.float64)
    with pytest.raises(KernelError, match=r"targets.*got 37 at position \[1, 4\]"):
        model.loss(tokens, targets.index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(37)))


# ---------------------------------------------------------------------------------------------------------------------
# Two roads to one answer


@pytest.mark.parametrize(
    ("variant", "dtype", "n"),
    [*((variant, torch.float64, 19) for variant in FAMILY), ("v8", torch.float32, 35), ("v7b", torch.float32, 19)],
)
def test_at_once_is_one_by_one_is_every_split(random_model, variant, dtype, n):
    model, tokens = random_model(**FAMILY[variant]).to(dtype), ids(3, n)
    start = some_state(model, 3)
    with torch.no_grad():
        logits, end = model(tokens, start)
        state, singles = start, []
        for t in range(n):
            out, state = model(tokens[:, t : t + 1], state)
            singles.append(out)
        assert_close(torch.cat(singles, dim=1), logits, dtype)
        assert_states_close(state, end, dtype)
        for split in range(1, n):
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


@pytest.mark.parametrize("variant", ["v8", "v7b", "hybrid"])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_a_batch_are_independent(random_model, batch, tokens, variant):
    model, x = random_model(**FAMILY[variant]).double(), ids(batch, tokens)
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


@pytest.mark.parametrize(("variant", "t"), [*(("v8", t) for t in (0, 1, 15, 16, 17, 33)), ("v7b", 16), ("hybrid", 16)])
def test_no_token_changes_a_bit_of_an_earlier_output(random_model, t, variant):
    model, x = random_model(**FAMILY[variant]), ids(2, 34)
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


@every_variant
@pytest.mark.parametrize("tokens", [1, 17])
def test_every_parameter_learns(random_model, variant, tokens):
    model, tokens = random_model(**FAMILY[variant]), ids(3, tokens)
    start = some_state(model, 3)
    model(tokens, start)[0].logsumexp(dim=-1).square().sum().backward()
    for name, grad in gradients(model).items():
        if name in never_used(model.config):
            assert grad is None or not grad.any()
        else:
            assert torch.isfinite(grad).all(), name
            assert grad.any(), name


@pytest.mark.parametrize("variant", ["v7a", "v7b", "v8", "hybrid"])
def test_gradients_through_the_state_are_those_of_the_whole_sequence(random_model, variant):
    model, tokens = random_model(**FAMILY[variant]).double(), ids(2, 20)
    weights = torch.randn(2, 20, 37, generator=torch.Generator().manual_seed(4)).double()
    unused = never_used(model.config)
    used = {name: parameter for name, parameter in model.named_parameters() if name not in unused}

    def run(*pieces):
        state = start = on_floats(some_state(model, 2), torch.Tensor.requires_grad_)
        logits = []
        for piece in tokens.split(pieces, dim=1):
            out, state = model(piece, state)
            logits.append(out)
        return torch.autograd.grad((torch.cat(logits, dim=1) * weights).sum(), [*used.values(), *floats(start)])

    whole = run(20)
    for pieces in ((1, 19), (16, 4), (19, 1), (1, 1, 17, 1)):
        for i, (got, want) in enumerate(zip(run(*pieces), whole, strict=True)):
            assert_close(got, want, torch.float64, [*used, *range(18)][i])


@pytest.mark.parametrize("variant", ["v8", "v7b", "hybrid"])
def test_the_gradient_of_an_initial_state_is_the_slope_of_the_loss(random_model, variant):
    model, tokens = random_model(**FAMILY[variant]).double(), ids(2, 6)
    start = on_floats(some_state(model, 2), torch.Tensor.requires_grad_)
    direction = some_state(model, 2, seed=9)

    def loss(step):
        pairs = zip(start.to_list(), direction.to_list(), strict=True)
        moved = [a + step * b if a.is_floating_point() else a for a, b in pairs]
        logits, state = model(tokens, heron.State.from_list(moved))
        return logits.square().mean() + sum(part.square().mean() for part in floats(state))

    grads = torch.autograd.grad(loss(0.0), floats(start))
    slope = sum((g * d).sum() for g, d in zip(grads, floats(direction), strict=True))
    with torch.no_grad():
        measured = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert all(grad.any() for grad in grads)
    assert float(slope) == pytest.approx(float(measured), rel=1e-7)
    assert all(part.grad_fn is None for part in model(tokens, start)[1].detach().to_list())


@every_variant
def test_a_block_is_handed_what_it_has_a_gradient_for(random_model, variant):
    model, handed = random_model(**FAMILY[variant]), []
    hook = model.blocks[1].register_forward_pre_hook(lambda _, given: handed.append(given[4].embedded))
    model.loss(ids(2, 5), ids(2, 5))
    hook.remove()
    assert handed[0].requires_grad == model.config.reads_embedded


@pytest.mark.parametrize("variant", ["v7a", "v7b", "v8", "hybrid"])
def test_recomputing_the_blocks_gives_the_same_gradients(random_model, variant):
    model, tokens = random_model(**FAMILY[variant]), ids(2, 18)
    start = on_floats(some_state(model, 2), torch.Tensor.requires_grad_)

    def run():
        model.zero_grad()
        logits, end = model(tokens, start)
        loss = logits.square().mean() + sum(part.square().mean() for part in floats(end))
        d_start = torch.autograd.grad(loss, floats(start), retain_graph=True)
        loss.backward()
        return [*(grad for grad in gradients(model).values() if grad is not None), *d_start]

    plain = run()
    model.grad_checkpoint = True
    for a, b in zip(run(), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["v8", "v7b", "hybrid"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_state_handed_in_stays_as_it_was(random_model, tokens, variant):
    model = random_model(**FAMILY[variant])
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
@pytest.mark.parametrize("variant", ["v7b", "v8", "hybrid"])
def test_dtypes(random_model, variant, dtype, wkv_dtype, tolerance):
    model = random_model(**FAMILY[variant]).to(torch.bfloat16).double()  # weights that every dtype holds exactly
    tokens = ids(2, 20)
    with torch.no_grad():
        want, _ = model(tokens)
        logits, state = model.to(dtype)(tokens)
    assert logits.dtype == state.layers[0].att_shift.dtype == state.layers[0].ffn_shift.dtype == dtype
    assert {layer.wkv.dtype for layer in state.layers} == {wkv_dtype}
    if model.config.has_attention:
        assert state.layers[0].attention.k_codes.dtype == state.layers[0].attention.v_codes.dtype == dtype
        assert state.tokens.dtype == torch.int64
    assert (logits.double() - want).norm() <= tolerance * want.norm()
    loss = model.loss(tokens, ids(2, 20, seed=5))
    loss.backward()
    assert loss.dtype == wkv_dtype
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values() if grad is not None)


@pytest.mark.parametrize("variant", ["v7a", "v7b", "v8", "v8 4x", "hybrid"])
def test_tables_in_fp32_beside_weights_in_bf16(random_model, variant):
    model, tokens = random_model(**FAMILY[variant]).to(torch.bfloat16), ids(2, 6)
    with torch.no_grad():
        want = model(tokens)[0]
    for module in model.modules():
        if isinstance(module, DeepEmbed):
            module.float()
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
        ("v7a", False, 65536, 462, 1_007_339_520, 805_306_368),
        ("v7b", False, 65536, 678, 1_825_471_488, 1_610_612_736),
        ("v8-hybrid", False, 50304, 570, 1_252_798_464, 1_081_737_216),
        ("v8-hybrid", False, 65536, 570, 1_603_743_744, 1_409_286_144),
        ("v7a", True, 65536, 918, 3_196_674_048, 1_610_612_736),
        ("v7b", True, 65536, 1350, 6_951_481_344, 5_234_491_392),
        ("v8-hybrid", True, 50304, 1134, 6_737_051_648, 5_254_152_192),
        ("v8-hybrid", True, 65536, 1134, 8_390_393_856, 6_845_104_128),
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
    assert sum(value.numel() for name, value in state.items() if group_of(name, value) is TABLE) == tables


RELEASED = {
    "0.1b": (12, 768, 64, 64, 32, 128),
    "0.4b": (24, 1024, 64, 64, 32, 128),
    "1.5b": (24, 2048, 96, 96, 64, 256),
    "2.9b": (32, 2560, 96, 96, 64, 320),
    "7.2b": (32, 4096, 128, 128, 96, 480),
    "13.3b": (61, 4096, 192, 192, 128, 384),
}


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        *((variant, size) for variant in ("v7", "v8") for size in RELEASED),
        *((variant, size) for variant in ("v7a", "v7b", "v8-hybrid") for size in ("0.1b", "1.5b")),
    ],
)
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


HIDDEN_GATE = {"ffn.s_emb.weight": (37, 1024), "ffn.s_emb_x.weight": (1024, 32), "ffn.s1": (32, 32),
               "ffn.s2": (32, 50), "ffn.s0": (50,)}  # fmt: skip
NORMS = {f"qkv.ln{x}.{part}": (32 if x == "v" else 256,) for x in "qkv" for part in ("weight", "bias")}
ADDED = {
    "v7": {},
    "v7a": HIDDEN_GATE,
    "v7b": {
        **HIDDEN_GATE, **NORMS, "qkv.qq.weight": (256, 32), "qkv.x_q": (256,), "qkv.x_k": (256,), "qkv.x_v": (32,),
        "qkv.k1": (32, 32), "qkv.k2": (32, 256), "qkv.k_emb.weight": (37, 256), "qkv.k_emb_x.weight": (256, 32),
        "qkv.v1": (32, 32), "qkv.v2": (32, 32), "qkv.v_emb.weight": (37, 32), "qkv.v_emb_x.weight": (32, 32),
    },
    "v8": {"ffn.enn.weight": (37, 32)},
    "v8 4x": {"ffn.enn4.weight": (37, 50)},
    "hybrid": {
        **NORMS, "ffn.enn.weight": (37, 32), "qkv.qq.weight": (256, 32), "qkv.kk.weight": (32, 32),
        "qkv.kkup.weight": (256, 32), "qkv.ennk.weight": (37, 256), "qkv.vv.weight": (32, 32),
        "qkv.vvup.weight": (32, 32), "qkv.emm.weight": (37, 32),
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", ADDED)
def test_names_and_shapes_are_upstreams(random_model, variant):
    model = random_model(n_layer=2, **FAMILY[variant])
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
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
        block |= {"ffn.x_k": vector, "ffn.key.weight": (F_, C), "ffn.value.weight": (C, F_), **ADDED[variant]}
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
        (dict(variant="v7b"), 2, "state: wanted one of a v8 model, got one with a context of token ids"),
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
        (dict(variant="v9"), ConfigError, "variant: wanted one of v7, v7a, v7b, v8, v8-hybrid"),
        (dict(n_layers=3), UnknownKeyError, "model: unknown key 'n_layers'. Did you mean 'n_layer'?"),
        (dict(n_embd=100), ConfigError, "n_embd 100 is not a multiple of head_size 64"),
        (dict(head_size=8), ConfigError, "head_size: wanted 16 to 128, got 8"),
        (dict(vocab_size=0), ConfigError, "vocab_size: wanted at least 1, got 0"),
        (dict(n_layer="many"), ConfigError, "n_layer: wanted int, got 'many'"),
        (dict(variant="v7", deep_embed_4x=True), ConfigError, "deep_embed_4x is an option of v8 and v8-hybrid"),
        (dict(variant="v8", has_ln0=False), ConfigError, "has_ln0 False is for v8-hybrid alone; variant v8 always"),
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
