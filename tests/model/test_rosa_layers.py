"""ROSA layers: their output rules by literal if/else, their state, the branch, the rosa-lm, upstream's checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import heron
from heron import cli
from heron.checkpoint import load_toy, migrate
from heron.checkpoint.architecture import build
from heron.compat.x070 import RWKV_x070
from heron.config import ROSA_GRADS, ROSA_PRESETS, RosaConfig
from heron.errors import CheckpointError, ConfigError
from heron.model.init import rule
from heron.model.rosa import Rosa01Layer, RosaEmbed, RosaQKV
from heron.model.rosa_toys import SelfToy, toy_from
from heron.model.state import ROSA_BYTES, RosaState
from heron.ops.rosa.gradients import RULES
from heron.optim import group_of

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("HERON_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
CPU = torch.device("cpu")
EVERY_RULE = [(bits, no_match) for bits in (1, 4) for no_match in ("zero", "bit0")]
modes = pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no_grad"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape, seed=1):
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(seed))


def recall_of(q, k, v, i):
    """What ROSA predicts at i from lists of symbols: the definition, longest first, then latest; None for no match."""
    best = (0, -1)
    for j in range(i):
        n = 0
        while n <= j and k[j - n] == q[i - n]:
            n += 1
        if n:
            best = max(best, (n, j))
    return v[best[1] + 1] if best[0] else None


def literally(inputs, high, low, bits, no_match):
    """The layers by their table: (B, T, C) inputs q, k, v -> (B, T, C)."""
    B, T, C = inputs[0].shape
    out = torch.full((B, T, C), float("nan"))
    for b in range(B):
        for g in range(C // bits):
            q, k, v = (
                [sum(2**n for n in range(bits) if bool(x[b, t, g * bits + n] > 0)) for t in range(T)] for x in inputs
            )
            for t in range(T):
                symbol = recall_of(q, k, v, t)
                for n in range(bits):
                    c = g * bits + n
                    if symbol is None and no_match == "zero":
                        out[b, t, c] = 0.0
                    elif symbol is None:
                        out[b, t, c] = low[c]
                    elif (symbol // 2**n) % 2 == 1:
                        out[b, t, c] = high[c]
                    else:
                        out[b, t, c] = low[c]
    return out


def with_odd_numbers(x):
    """x with zeros of both signs and NaN strewn in: all of them are bit 0."""
    x = x.clone()
    x.view(-1)[::7], x.view(-1)[3::11], x.view(-1)[5::13] = 0.0, -0.0, float("nan")
    return x


# -- output rules ----------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize(("bits", "no_match"), EVERY_RULE)
def test_the_self_form_is_its_table(bits, no_match, grad):
    layer = Rosa01Layer(8, RosaConfig(source="self", bits=bits, no_match=no_match, grad="none"))
    with torch.no_grad():
        layer.emb0.copy_(normal(1, 1, 8, seed=1))
        layer.emb1.copy_(normal(1, 1, 8, seed=2))
    x = with_odd_numbers(normal(2, 24, 8))
    want = literally((x, x, x), layer.emb1.view(-1), layer.emb0.view(-1), bits, no_match)
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x, layer.start(2))[0], want)


def qkv_layer(bits, no_match, grad="none", **changes):
    torch.manual_seed(3)
    layer = RosaQKV(8, RosaConfig(source="qkv", bits=bits, no_match=no_match, grad=grad, **changes))
    with torch.no_grad():
        for letter in "qkv":
            getattr(layer, f"x_{letter}").copy_(normal(1, 1, 8, seed=ord(letter)))
        layer.rosa_qkv.emb.copy_(normal(1, 1, 8, seed=4))
    return layer


def start(batch, bits, width=8):
    return RosaState.empty(batch, 3, width // bits, CPU, torch.zeros(batch, width))


@modes
@pytest.mark.parametrize(("bits", "no_match"), EVERY_RULE)
def test_the_qkv_form_is_its_table(bits, no_match, grad):
    layer, x = qkv_layer(bits, no_match), normal(2, 24, 8)
    before = torch.cat((torch.zeros(2, 1, 8), x[:, :-1]), dim=1)
    q, k, v = (getattr(layer, letter)(x + (before - x) * getattr(layer, f"x_{letter}")).detach() for letter in "qkv")
    e = layer.rosa_qkv.emb.detach().view(-1)
    recalled = literally((q, k, v), e, -e, bits, no_match)
    with torch.set_grad_enabled(grad):
        got, state = layer(x, start(2, bits))
        assert torch.allclose(got, layer.o(recalled), rtol=1e-6, atol=1e-6)
    assert torch.equal(state.shift, x[:, -1])


@modes
def test_the_first_of_four_channels_is_the_least_significant_bit(grad):
    """1 2 4 8 | 1: what followed 1 was 2, which is channel 1 alone."""
    rows = [[1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, 1, -1], [-1, -1, -1, 1], [1, -1, -1, -1]]
    layer = Rosa01Layer(4, RosaConfig.preset("self-4bit"))
    with torch.set_grad_enabled(grad):
        out, state = layer(torch.tensor([rows]).float(), layer.start(1))
    assert state.symbols.flatten().tolist() == [1, 2, 4, 8, 1]
    low, high = float(torch.tensor(-1e-5)), float(torch.tensor(1e-5))
    assert out[0, 4].tolist() == [low, high, low, low]


def test_token_rosa_is_the_row_of_the_predicted_token():
    layer = RosaEmbed(37, 5, RosaConfig.preset("token"))
    tokens = torch.tensor([[7, 0, 7, 0, 8], [1, 2, 3, 4, 5]])
    rows, state = layer(tokens, layer.start(2))
    want = torch.zeros(2, 5, 5)
    want[0, 2], want[0, 3] = layer.emb.weight[0], layer.emb.weight[7]
    assert torch.equal(rows, want)
    one, _ = layer(torch.tensor([[7], [1]]), state)
    assert torch.equal(one, layer.emb.weight[[0, 2]].unsqueeze(1))


# -- one token at a time ---------------------------------------------------------------------------------------------

CUTS = [[1] * 23, [23], [5, 1, 1, 9, 1, 6], [22, 1], [1, 22]]


def family():
    for bits in (1, 4):
        yield Rosa01Layer(8, RosaConfig.preset(f"self-{bits}bit")), normal(2, 23, 8)
        yield qkv_layer(bits, "zero"), normal(2, 23, 8)
        yield qkv_layer(bits, "bit0", max_match=2), normal(2, 23, 8)
    yield RosaEmbed(3, 5, RosaConfig.preset("token")), ids(2, 23) % 3


@pytest.mark.parametrize("with_grad", [[True], [False], [False, True]], ids=["autograd", "no_grad", "in_turn"])
@pytest.mark.parametrize("number", range(7))
def test_any_cut_gives_the_same_bits(number, with_grad):
    layer, x = list(family())[number]
    bits = layer.rosa.bits
    begin = layer.start if hasattr(layer, "start") else lambda n: start(n, bits)
    with torch.no_grad():
        want, end = layer(x, begin(2))
        alone, _ = layer(x[1:], begin(1))
    assert torch.allclose(alone, want[1:], rtol=1e-6, atol=1e-6)
    for cut in CUTS:
        state, parts = begin(2), []
        for piece, grad in zip(x.split(cut, dim=1), itertools.cycle(with_grad), strict=False):
            before = [None if part is None else part.clone() for part in state]
            with torch.set_grad_enabled(grad):
                out, new = layer(piece, state)
            assert all(a is b or torch.equal(a, b) for a, b in zip(before, state, strict=True))
            parts.append(out)
            state = new
        got = torch.cat(parts, dim=1)
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6) if isinstance(layer, RosaQKV) else torch.equal(got, want)
        assert torch.equal(state.symbols, end.symbols)


def models(random_model):
    for variant, preset in [("v8", "qkv-1bit"), ("v7b", "qkv-4bit"), ("rosa-lm", "qkv-1bit"), ("rosa-lm", "qkv-4bit")]:
        yield random_model(variant=variant, rosa=preset)


@pytest.mark.parametrize("number", range(4))
def test_a_prefill_is_single_steps_in_a_model(random_model, number):
    model, tokens = list(models(random_model))[number], ids(2, 23)
    with torch.no_grad():
        want, end = model(tokens)
        for cut in CUTS:
            state, parts = None, []
            for piece in tokens.split(cut, dim=1):
                out, state = model(piece, state)
                parts.append(out)
            assert torch.allclose(torch.cat(parts, dim=1), want, rtol=1e-5, atol=1e-5)
            for got, layer in zip(state.layers, end.layers, strict=True):
                assert torch.equal(got.rosa.symbols, layer.rosa.symbols)
        alone, _ = model(tokens[1:])
        assert torch.allclose(alone, want[1:], rtol=1e-5, atol=1e-5)


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_the_state_is_a_value_that_grows_by_so_many_bytes(random_model, number):
    model = list(models(random_model))[number]
    config, sizes = model.config, {}
    with torch.no_grad():
        _, state = model(ids(2, 5))
        for t in range(6, 9):
            _, state = model(ids(2, 1, seed=t), state)
            sizes[t] = state.nbytes
            assert sum(part.untyped_storage().nbytes() for part in state.to_list()) == state.nbytes
        attention = 3 * 64 * 4 + 8 if config.has_attention else 0
        growth = 2 * (3 * 32 // config.rosa.bits * ROSA_BYTES + attention)
        assert sizes[8] - sizes[7] == sizes[7] - sizes[6] == growth

        want, after = model(ids(2, 1), state)
        without_lengths = state.layers[0]._replace(rosa=state.layers[0].rosa._replace(lengths=None))
        for copy in (
            state.clone(), state.detach(), heron.State.from_list(state.to_list()),
            heron.State((without_lengths, *state.layers[1:]), state.tokens),
        ):  # fmt: skip
            got, other = model(ids(2, 1), copy)
            assert torch.equal(got, want)
            assert all(torch.equal(a, b) for a, b in zip(other.to_list(), after.to_list(), strict=True))
        assert heron.State.from_list(state.to_list()).layers[2].rosa.lengths is state.layers[2].rosa.lengths
        row = state.map(lambda part: part[1:])
        assert torch.allclose(model(ids(2, 1)[1:], row)[0], want[1:], atol=1e-6)


def test_a_state_of_another_model_is_refused(random_model):
    model = random_model(rosa="qkv-1bit")
    _, state = model(ids(2, 4))
    first = state.layers[0]

    def other(**changes):
        return heron.State((first._replace(rosa=first.rosa._replace(**changes)), *state.layers[1:]))

    for bad, words in [
        (random_model()(ids(2, 4))[1], r"layer 0, rosa\.symbols: wanted \(2, 3, 32, 0\), got None"),
        (random_model(rosa="qkv-4bit")(ids(2, 4))[1], r"rosa\.symbols: wanted \(2, 3, 32, 4\), got \(2, 3, 8, 4\)"),
        (other(shift=None), r"layer 0, rosa\.shift: wanted \(2, 32\), got None"),
        (other(symbols=first.rosa.symbols[..., 1:]), r"layer 1, rosa\.symbols: wanted \(2, 3, 32, 3\), got \(2, 3, 32"),
        (other(lengths=torch.zeros(2, 32, 3)), r"rosa\.lengths: wanted \(2, 32, 4\), got \(2, 32, 3\)"),
    ]:
        with pytest.raises(ConfigError, match=words):
            model(ids(2, 1), bad)
    with pytest.raises(ConfigError, match=r"wanted one of|rosa\.symbols: wanted None, got"):
        random_model()(ids(2, 1), state)
    with pytest.raises(ConfigError, match="for ROSA 1 to 3 more per layer, got 9 tensors and ROSA's of 2 layers"):
        heron.State.from_list([part for part in state.to_list() if part is not state.layers[2].rosa.symbols])


def test_an_engine_writes_forks_and_saves(random_model, tmp_path):
    model = random_model(variant="rosa-lm", rosa="qkv-1bit", vocab_size=256)
    tokenizer = heron.tokenizer.load("bytes")
    engine = heron.Engine(model, tokenizer, rows=2)

    def continued(snapshot):
        row = engine.open(after=snapshot, seed=5)
        said = [engine.step()[0][1].id for _ in range(6)]
        engine.close(row)
        return said

    row = engine.open(b"abababab", seed=5)
    for _ in range(3):
        engine.step()
    snapshot = engine.snapshot(row)
    engine.close(row)
    engine.save(snapshot, tmp_path / "x.state")
    assert continued(snapshot) == continued(snapshot) == continued(engine.load(tmp_path / "x.state"))


# -- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["qkv-1bit", "qkv-4bit"])
@pytest.mark.parametrize("variant", ["v7", "v7b", "v8", "v8-hybrid"])
def test_a_fresh_branch_writes_nothing_and_learns(variant, preset):
    sizes = dict(variant=variant, n_layer=2, n_embd=32, vocab_size=37, head_size=16)
    twins = []
    for branch in (None, preset):
        torch.manual_seed(0)
        twins.append(heron.RWKV(heron.ModelConfig(**sizes, rosa=branch)))
    without, model = twins
    for name, value in without.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    added = {name for name in model.state_dict() if name not in without.state_dict()}
    assert len(added) == 2 * (2 + 3 + 8 + 1)
    assert torch.equal(model(ids(2, 12))[0], without(ids(2, 12))[0])
    optimizer = heron.build_optimizer(model, lr=1e-2)
    for _ in range(2):
        model.loss(ids(2, 12), ids(2, 12, seed=2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.blocks[1].rosa.o.weight.any()
    assert not (model.blocks[1].rosa.rosa_qkv.emb == 1).all()


def test_a_rosa_lm_is_its_equations(random_model):
    model, tokens = random_model(variant="rosa-lm", rosa="qkv-4bit"), ids(2, 20)
    p = model.state_dict()

    def norm(x, name):
        return F.layer_norm(x, (32,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def mixed(x, mix):
        before = torch.cat((torch.zeros(2, 1, 32), x[:, :-1]), dim=1)
        return x + (before - x) * p[mix]

    x = norm(p["emb.weight"][tokens], "blocks.0.ln0")
    for i in range(3):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.ln3")
        q, k, v = (linear(mixed(y, f"{block}.rosa.x_{c}"), f"{block}.rosa.{c}") for c in "qkv")
        e = p[f"{block}.rosa.rosa_qkv.emb"].view(-1)
        x = x + linear(literally((q, k, v), e, -e, 4, "zero"), f"{block}.rosa.o")
        y = mixed(norm(x, f"{block}.ln2"), f"{block}.ffn.x_k")
        x = x + torch.relu(y @ p[f"{block}.ffn.key.weight"].T) ** 2 @ p[f"{block}.ffn.value.weight"].T
    want = norm(x, "ln_out") @ p["head.weight"].T
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(model(tokens)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rosa-lm-1bit", "rosa-lm-4bit"])
def test_the_language_models_have_upstreams_sizes_and_start_as_linear_layers_do(name):
    config = heron.ModelConfig.preset(name)
    with torch.device("meta"):
        model = heron.RWKV(config)
    assert len(model.state_dict()) == 234
    assert sum(parameter.numel() for parameter in model.parameters()) == 185_720_832
    torch.manual_seed(0)
    small = heron.RWKV(heron.ModelConfig.preset(name, n_layer=2, n_embd=64, vocab_size=20))
    for name, parameter in small.named_parameters():
        if ".rosa." in name and name.endswith((".weight", ".bias")):
            assert 0.9 / 8 < parameter.abs().max() <= 1 / 8, name
            assert parameter.mean().abs() < 0.04
        assert rule(name, small.config).ours == (".rosa." in name or ".ln3." in name)
        if name.endswith("rosa_qkv.emb"):
            assert (parameter == 1).all()
            assert not group_of(name, parameter).decays
    assert small(ids(1, 5) % 20)[0].std() > 0.1


@pytest.mark.parametrize("rule", ["bitflip", "soft_suffix"])
def test_a_state_counts_in_the_gradients_of_what_follows_it(rule):
    """With what came before held fixed, a cut changes neither them nor the output."""
    torch.manual_seed(0)
    layer = RosaQKV(8, RosaConfig.preset("qkv-4bit", grad=rule, token_shift=False))
    x, weights = normal(2, 20, 8), normal(2, 8, 8, seed=1)
    empty = RosaState.empty(2, 3, 2, CPU, None)
    with torch.no_grad():
        _, state = layer(x[:, :12], empty)

    def gradients(x, state):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        (layer(x, state)[0][:, -8:] * weights).sum().backward()
        return x.grad[:, -8:], layer.rosa_qkv.emb.grad

    for whole, cut in zip(gradients(x, empty), gradients(x[:, 12:], state), strict=True):
        assert whole.any()
        assert torch.allclose(whole, cut, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients(x, empty)[0], gradients(x[:, 12:], empty)[0], rtol=1e-2, atol=1e-4)


def test_the_rule_for_gradients_is_the_configs():
    x, weights = normal(2, 16, 8), normal(2, 16, 8, seed=1)
    found = {}
    for grad in ("none", "bitflip", "soft_suffix"):
        layer = qkv_layer(1, "bit0", grad=grad)
        (layer(x, start(2, 1))[0] * weights).sum().backward()
        found[grad] = layer.q.weight.grad
        assert layer.v.weight.grad.any()
    assert found["none"] is None or not found["none"].any()
    assert tuple(found) == ROSA_GRADS == RULES
    assert found["bitflip"].any()
    assert not torch.allclose(found["bitflip"], found["soft_suffix"], rtol=0.1)


def test_blocks_that_are_computed_again_give_the_same_gradients(random_model):
    model, gradients = random_model(rosa="qkv-1bit"), []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model.loss(ids(2, 12), ids(2, 12, seed=2)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


# -- files and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["qkv-1bit", "qkv-4bit"])
@pytest.mark.parametrize("variant", ["v7", "v7b", "rosa-lm"])
def test_a_file_needs_to_be_told_and_a_folder_does_not(random_model, tmp_path, variant, preset):
    sizes = dict(n_layer=2, n_embd=32, vocab_size=37, head_size=64 if variant == "rosa-lm" else 16)
    model = heron.RWKV(heron.ModelConfig(variant=variant, **sizes, rosa=preset))
    heron.save(model, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"x\.pth: no tensor says whether its ROSA has 1 or 4 bits.*--rosa qkv-1b"
    ):
        heron.load(tmp_path / "x.pth")
    again = heron.load(tmp_path / "x.pth", rosa=RosaConfig.preset(preset))
    assert again.config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    heron.save(model, tmp_path / "folder", format="safetensors")
    told = heron.load(tmp_path / "folder")
    assert told.config == model.config
    other = RosaConfig.preset(preset, max_match=3)
    assert heron.load(tmp_path / "folder", rosa=other).config.rosa == other
    with torch.no_grad():
        assert torch.equal(told(ids(1, 9))[0], model(ids(1, 9))[0])
    for format, name in (("hf", "hf"), ("gguf", "x.gguf")):
        with pytest.raises(CheckpointError, match=f"a {variant} with ROSA adds to a v7"):
            heron.save(model, tmp_path / name, format=format)


def test_a_file_that_is_not_quite_one_is_refused(random_model):
    tensors = dict(random_model(variant="rosa-lm", rosa="qkv-1bit").state_dict())
    told = RosaConfig.preset("qkv-1bit")
    for name in (name for name in tensors if ".0." not in name and ".1." not in name):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        for content in (rest, {**tensors, name: torch.cat((tensors[name], tensors[name]))}):
            with pytest.raises(CheckpointError, match="^x: "):
                build(content, "x", rosa=told)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.rosa\.q\.bias is not part of a rosa-lm"):
        build(tensors, "x", rosa=dataclasses.replace(told, proj_bias=False))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.rosa\.x_q is not part of a rosa-lm"):
        build(tensors, "x", rosa=dataclasses.replace(told, token_shift=False))
    with pytest.raises(CheckpointError, match="x: there is no ROSA in it; drop rosa"):
        build(dict(random_model().state_dict()), "x", rosa=told)


def test_projections_without_bias_and_shift(random_model):
    bare = RosaConfig.preset("qkv-1bit", proj_bias=False, token_shift=False)
    model = random_model(variant="rosa-lm", rosa=bare)
    assert not any(name.endswith(("rosa.q.bias", "rosa.x_q")) for name in model.state_dict())
    with torch.no_grad():
        want, _ = model(ids(2, 9))
        first, state = model(ids(2, 9)[:, :4])
        second, state = model(ids(2, 9)[:, 4:], heron.State.from_list(state.to_list()))
    assert torch.allclose(torch.cat((first, second), dim=1), want, atol=1e-5)
    assert build(dict(model.state_dict()), "x", rosa=bare).config.rosa == bare


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: RosaConfig(bits=4),
            r"rosa, no_match: wanted one of zero, bit0, got None; the presets token, self-1bit",
        ),
        (lambda: RosaConfig(bits=2, no_match="zero"), "rosa, bits: wanted one of 1, 4, got 2"),
        (lambda: RosaConfig(source="kv", no_match="zero"), "rosa, source: wanted one of token, self, qkv, got 'kv'"),
        (lambda: RosaConfig.preset("qkv-1bit", grad="magic"), "rosa, grad: wanted one of none, bitflip, soft_suffix"),
        (lambda: RosaConfig.preset("qkv-1bit", max_match=0), "rosa, max_match: wanted at least 1, or nothing, got 0"),
        (lambda: RosaConfig(source="token", no_match="bit0"), "a token has no bit 0"),
        (lambda: RosaConfig.preset("qkv-1bits"), "no ROSA preset 'qkv-1bits'.*Did you mean 'qkv-1bit'"),
        (lambda: RosaConfig.from_dict({"bit": 1}), "rosa: unknown key 'bit'.*bits"),
        (lambda: heron.ModelConfig(rosa="self-1bit"), "rosa: a branch has source qkv, got self; give qkv-1bit"),
        (lambda: heron.ModelConfig(rosa=5), "rosa: wanted RosaConfig or nothing, got 5"),
        (
            lambda: heron.ModelConfig(variant="rosa-lm", n_embd=30, rosa="qkv-4bit"),
            "n_embd 30 is not a multiple of 4, the bits of a ROSA symbol",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_settings_survive_yaml(tmp_path):
    for rosa_config in (None, "qkv-4bit", dict(bits=1, no_match="zero", max_match=64, grad="bitflip")):
        model = heron.ModelConfig(n_layer=2, n_embd=64, rosa=rosa_config)
        config = heron.TrainConfig(model=model, max_steps=1)
        (tmp_path / "c.yaml").write_text(config.to_yaml())
        assert heron.TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    assert model.rosa == RosaConfig(no_match="zero", max_match=64, grad="bitflip")
    assert heron.ModelConfig(variant="rosa-lm").rosa == RosaConfig.preset("qkv-1bit")
    assert {name: RosaConfig.preset(name).no_match for name in ROSA_PRESETS} == {
        "token": "zero", "memory": "zero",
        "self-1bit": "zero", "self-4bit": "bit0", "qkv-1bit": "bit0", "qkv-4bit": "zero",
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["v7", "v8-hybrid"])
def test_a_branch_can_be_added_to_a_trained_model(random_model, variant):
    model = random_model(variant="v7")
    other = migrate.upcycle(model, variant, rosa=RosaConfig.preset("qkv-4bit"))
    assert other.config.rosa.bits == 4
    with torch.no_grad():
        assert torch.equal(other(ids(2, 12))[0], model(ids(2, 12))[0])
    assert other.blocks[0].rosa.q.weight.any()
    with pytest.raises(ConfigError, match="the model has a ROSA branch already"):
        migrate.upcycle(other, variant, rosa=RosaConfig.preset("qkv-1bit"))


def test_a_rosa_lm_can_get_a_time_mix_and_nothing_learned_is_lost(random_model):
    model = random_model(variant="rosa-lm", rosa="qkv-1bit", n_embd=64)
    other = migrate.upcycle(model, "v8")
    assert other.config.rosa == model.config.rosa
    with torch.no_grad():
        assert torch.equal(other(ids(2, 12))[0], model(ids(2, 12))[0])
    back = migrate.upcycle(other, "rosa-lm")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.att\.output\.weight: it is not 0 everywhere"):
        migrate.upcycle(random_model(variant="v7", rosa="qkv-1bit"), "rosa-lm")
    with pytest.raises(CheckpointError, match="a v7 has no ROSA, of which alone a rosa-lm consists"):
        migrate.upcycle(random_model(variant="v7"), "rosa-lm")


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def heron_(words):
        try:
            code = cli.main(words.split())
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    sizes = "--n_layer 2 --n_embd 32 --head_size 16 --vocab_size 256"
    assert heron_(f"init {sizes} --variant rosa-lm --rosa qkv-4bit --out lm.pth")[:2] == (
        0, "wrote lm.pth: rosa-lm L2 C32 V256, ROSA of 4 bits, 41,920 parameters\n",
    )  # fmt: skip
    for verb in ("generate lm.pth", "info lm.pth", "eval lm.pth --data x", "convert lm.pth x.pth", "chat lm.pth"):
        code, _, err = heron_(verb)
        assert code == 1
        assert "lm.pth: no tensor says whether its ROSA has 1 or 4 bits" in err
    code, out, _ = heron_("info lm.pth --rosa qkv-4bit")
    assert code == 0
    assert "rosa        qkv, 4-bit symbols, no match gives zero; gradient soft_suffix\n" in out
    assert "512 bytes a sequence in fp32, and 80 bytes more with each token\n" in out
    assert "\nodd" not in out
    assert heron_("convert lm.pth told --rosa qkv-4bit --format safetensors --check")[1].endswith("in fp32: 0\n")
    written = heron_("generate told --prompt ab --max_tokens 4 --temperature 0")
    assert written == heron_("generate lm.pth --rosa qkv-4bit --prompt ab --max_tokens 4 --temperature 0")
    assert written[0] == 0

    assert heron_(f"init {sizes} --variant v7 --out v7.pth")[0] == 0
    code, out, _ = heron_("convert v7.pth both.pth --variant v8 --add_rosa qkv-1bit --check")
    assert out.splitlines()[0] == "wrote both.pth: v8 L2 C32 N16 V256, ROSA of 1 bits"
    assert out.endswith("in fp32: 0\n")
    assert "the ROSA branch writes nothing" in heron_("info both.pth --rosa qkv-1bit")[1]
    assert "there is no ROSA in it; drop rosa" in heron_("info v7.pth --rosa qkv-1bit")[2]
    assert (
        "heron generate: argument --rosa: no ROSA preset 'qkv-2bit'" in heron_("generate both.pth --rosa qkv-2bit")[2]
    )

    code, out, _ = heron_(f"train {sizes} --rosa qkv-4bit --max_steps 1 --dry_run")
    assert heron.TrainConfig.from_dict(yaml.safe_load(out)).model.rosa == RosaConfig.preset("qkv-4bit")
    code, _, err = heron_("train --model lm.pth --rosa qkv-4bit --max_steps 1")
    assert "type heron convert lm.pth FOLDER --format safetensors --rosa qkv-4bit, and train with --model FOLDER" in err


def test_a_run_says_what_its_files_cannot(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n + 1} " for n in range(400)))
    model = heron.ModelConfig(variant="rosa-lm", n_layer=1, n_embd=16, vocab_size=256, rosa="qkv-4bit")
    settings = dict(model=model, data=str(tmp_path / "text.txt"), ctx_len=16, micro_bsz=2, sample_every=0, eval_every=0)

    config = heron.TrainConfig(**settings, out=str(tmp_path / "run"), max_steps=2, device="cpu", dtype="fp32")
    heron.Trainer(config, say=lambda text: None).fit()
    for name in ("", "rwkv-init.pth", "rwkv-final.pth", "checkpoints/step-00000002"):
        assert heron.load(tmp_path / "run" / name).config == model
    changed = dataclasses.replace(config, model=model.changed(rosa="qkv-1bit"), max_steps=3)
    with pytest.raises(CheckpointError, match="this run has another model: rosa"):
        heron.Trainer(changed, say=lambda text: None).fit()


def test_the_drop_in_carries_rosa_in_its_list(random_model, tmp_path):
    heron.save(random_model(variant="rosa-lm", rosa="qkv-4bit"), tmp_path / "x.pth")
    args = types.SimpleNamespace(MODEL_NAME=str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="no tensor says whether its ROSA has 1 or 4 bits"):
        RWKV_x070(args)
    args.rosa = "qkv-4bit"
    model = RWKV_x070(args)
    tokens = ids(1, 9)[0].tolist()
    with torch.no_grad():
        want, _ = model.forward_seq(tokens, None, full_output=True)
        state = None
        for t, token in enumerate(tokens):
            out, state = model.forward_one(token, state)
            assert torch.allclose(out, want[t], atol=1e-5)
    assert [tuple(part.shape) for part in state[9:12]] == [(3, 8, 9), (32,), (8, 9)]


# -- upstream's checkpoints ------------------------------------------------------------------------------------------


def _benchmark():
    """benchmarks/rosa_checkpoints.py, which holds the tasks."""
    spec = importlib.util.spec_from_file_location("rosa_checkpoints", REPOSITORY / "benchmarks" / "rosa_checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TASKS = _benchmark()


def published(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} of BlinkDL/RWKV-LM, RWKV-v8, is not in {DATA} (HERON_TEST_DATA names another folder)")
    return load_toy(DATA / name)


@pytest.mark.parametrize(
    ("change", "right", "script_sum"),
    [("none", 5482, 30583), ("value index r", 1212, 7295)],  # the second, so that the first means something
)
def test_upstreams_arithmetic_toy_gets_its_tokens_right(change, right, script_sum):
    toy = published(TASKS.ARITHMETIC)
    with TASKS.ablated(toy, change):
        got = TASKS.score(toy, list(TASKS.arithmetic(42)), "0123456789+-=")
    assert got.tokens == 5635
    assert abs(got.right - right) <= 3
    assert abs(got.script_sum - script_sum) <= 10


def test_upstreams_reversing_toy_gets_its_tokens_right():
    """ROSA adds its o.bias alone there: RWKV-7 does the work."""
    toy = published(TASKS.REVERSE)
    got = TASKS.score(toy, list(TASKS.reverse(42)), "0123456789,#")
    assert got.tokens == 18900
    assert got.right >= 18897
    assert not any(block.rosa.rosa_qkv.emb.any() for block in toy.blocks)


def test_upstreams_counting_toy_gets_its_tokens_right():
    toy = published(TASKS.COUNTING)
    hits, _ = TASKS.count(toy, list(TASKS.FIXED_STARTS))
    assert hits.sum(1).tolist() == [119, 122, 115, 110, 101]
    for seed, right, loss in ((0, 28051, 0.3999), (1, 28453, 0.3798)):
        hits, got = TASKS.count(toy, TASKS.random_starts(seed))
        assert abs(int(hits.sum()) - right) <= 3
        assert got == pytest.approx(loss, abs=1e-4)


def test_a_qkv_toy_is_a_model_with_a_branch_under_other_names(random_model):
    model, tokens = random_model(variant="v7", rosa="qkv-1bit"), ids(2, 12)
    parts = {"ln1": "ln{}a", "att": "rwkv{}", "ln2": "ln{}b", "ffn": "ffn{}", "ln3": "ln{}c", "rosa": "rosa{}"}
    tensors = {"e.weight": model.embed(torch.arange(37)).detach(), "o.bias": normal(37)}  # a toy has no ln0
    for name, tensor in model.state_dict().items():
        top, *rest = name.split(".")
        if top == "blocks" and rest[1] != "ln0":
            tensors[".".join((parts[rest[1]].format(int(rest[0]) + 1), *rest[2:]))] = tensor
        elif top in ("ln_out", "head"):
            tensors[".".join(({"ln_out": "lno", "head": "o"}[top], *rest))] = tensor
    toy = toy_from(tensors, "x")
    assert torch.allclose(toy(tokens)[0], model(tokens)[0] + tensors["o.bias"], atol=1e-5)
    _, state = toy(tokens[:, :7])
    assert torch.allclose(toy(tokens[:, 7:], state)[0], toy(tokens)[0][:, 7:], atol=1e-5)
    with pytest.raises(CheckpointError, match=r"x: tensor ln2c\.bias is missing"):
        toy_from({name: tensor for name, tensor in tensors.items() if name != "ln2c.bias"}, "x")


@pytest.mark.parametrize("bits", [1, 4])
def test_self_toys_are_read_from_their_tensors_and_go_on_from_a_state(bits):
    torch.manual_seed(0)
    toy, tokens = SelfToy(11, 8, bits), ids(2, 19) % 11
    for layer in toy.modules():
        if isinstance(layer, Rosa01Layer):
            layer.emb0.data.normal_()
            layer.emb1.data.normal_()
    again = toy_from(toy.state_dict(), "x")
    with torch.no_grad():
        want, _ = toy(tokens)
        assert torch.equal(again(tokens)[0], want)
        state, parts = None, []
        for piece in tokens.split([1, 1, 7, 10], dim=1):
            out, state = again(piece, state)
            parts.append(out)
    assert torch.allclose(torch.cat(parts, dim=1), want, atol=1e-5)
    tensors = toy.state_dict()
    for bad, words in [
        ({**tensors, "more": tensors["o.bias"]}, "x: tensor more is not part of such a toy"),
        ({n: t for n, t in tensors.items() if n != "lin.bias"}, r"x: tensor lin\.bias is missing"),
        ({n: t for n, t in tensors.items() if n != "e.weight"}, r"x: tensor 'e\.weight' is missing"),
        ({**tensors, "o.bias": tensors["lin.bias"]}, r"x: o\.bias must be \(11,\), got \(8,\)"),
        ({"o.bias": tensors["o.bias"]}, "x: no ROSA toy"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            toy_from(bad, "x")
    with pytest.raises(CheckpointError, match=r"x: this is a ROSA toy; heron\.checkpoint\.load_toy\(path\) loads it"):
        build(dict(tensors), "x")
