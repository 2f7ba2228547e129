"""State tuning: an initial state that trains, starts every sequence, and is a file that other tools read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import heron
from heron.checkpoint import read_tensors, save_tuned_state, tuned_state
from heron.config import RosaConfig
from heron.errors import CheckpointError, ConfigError
from heron.model.tuned_state import TunedState

V = 37
IDS = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(0))
TARGETS = IDS.roll(-1, 1)
MODELS = {
    "v7": dict(variant="v7"),
    "v7a": dict(variant="v7a"),
    "v8": dict(variant="v8"),
    "v7b": dict(variant="v7b"),
    "v8-hybrid": dict(variant="v8-hybrid"),
    "v8 with ROSA": dict(variant="v8", rosa=RosaConfig.preset("qkv-1bit")),
    "v8 with ROSA memory": dict(variant="v8", memory=RosaConfig.preset("memory")),
}


@pytest.fixture
def tuned(random_model):
    """A function: name of a model -> it, frozen, in fp64, and a random tuned state of it."""

    def make(name, token_shifts=False, seed=3):
        model = random_model(n_layer=2, **MODELS[name]).double().requires_grad_(False)
        state = TunedState(model.config, token_shifts).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in state.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return model, state

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_one_changes_nothing(random_model, name):
    model = random_model(n_layer=2, **MODELS[name])
    for token_shifts in (False, True):
        start = TunedState(model.config, token_shifts)(IDS)
        assert torch.allclose(model(IDS, start)[0], model(IDS)[0], atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if "ROSA" not in name or "memory" in name])
def test_gradients_are_finite_differences(tuned, name, packed):
    model, state = tuned(name, token_shifts=True)
    tokens, targets, bounds = IDS, TARGETS, None
    if packed:
        tokens, targets = IDS.reshape(1, -1), TARGETS.reshape(1, -1)
        bounds = torch.tensor([0, 5, 5, 14]) if not model.config.state_grows else torch.tensor([0, 5, 14])

    def loss():  # model.loss has L2Wrap in its gradient, too
        logits, _ = model(tokens, state(tokens, bounds, torch.float64), bounds)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss().backward()
    assert torch.allclose(model.loss(tokens, targets, bounds, state=state(tokens, bounds, torch.float64)), loss())
    generator = torch.Generator().manual_seed(1)
    for parameter in state.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                values.append(loss())
                parameter -= sign * 1e-5 * direction
        slope = float(values[0] - values[1]) / 2e-5
        assert parameter.grad.any()
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_start_from_it_each(tuned, name):
    model, state = tuned(name, token_shifts=True)
    with torch.no_grad():
        alone = model(IDS, state(IDS, dtype=torch.float64))[0]
        tokens, bounds = IDS.reshape(1, -1), torch.tensor([0, 7, 14])
        packed = model(tokens, state(tokens, bounds, torch.float64), bounds)[0]
        assert not torch.allclose(alone, model(IDS)[0], atol=0.01)
    assert torch.allclose(packed.view_as(alone), alone, atol=1e-12)


@pytest.mark.parametrize("token_shifts", [False, True])
@pytest.mark.parametrize("file", ["state.pth", "state.safetensors"])
def test_the_file_is_upstreams(tuned, tmp_path, file, token_shifts):
    model, state = tuned("v7", token_shifts)
    state.float()
    save_tuned_state(state, tmp_path / file)
    tensors = read_tensors(tmp_path / file)
    shifts = {f"blocks.{i}.{part}.shift_state" for i in range(2) for part in ("att", "ffn")} if token_shifts else set()
    assert tensors.keys() == {f"blocks.{i}.att.time_state" for i in range(2)} | shifts
    assert tensors["blocks.1.att.time_state"].shape == (2, 16, 16)
    again = tuned_state(tmp_path / file, model.config)
    wanted = state(IDS[:1])
    assert all(torch.equal(one, other) for one, other in zip(again.to_list(), wanted.to_list(), strict=True))
    in_bf16 = tuned_state(tmp_path / file, model.config, torch.bfloat16).layers[1]
    assert (in_bf16.att_shift.dtype, in_bf16.wkv.dtype) == (torch.bfloat16, torch.float32)
    if file == "state.pth":
        assert torch.equal(tuned_state(tmp_path, model.config).layers[1].wkv, again.layers[1].wkv)


def test_a_state_of_another_model_is_refused(tuned, tmp_path):
    model, state = tuned("v7", token_shifts=True)
    save_tuned_state(state.float(), tmp_path / "s.pth")
    with pytest.raises(
        CheckpointError, match=r"blocks.0.att.time_state must be \(1, 32, 32\), floating, got \(2, 16, 16"
    ):
        tuned_state(tmp_path / "s.pth", model.config.changed(head_size=32))
    torch.save({k: v for k, v in state.tensors().items() if k != "blocks.1.ffn.shift_state"}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="blocks.1.ffn.shift_state is missing"):
        tuned_state(tmp_path / "less.pth", model.config)
    lm = heron.ModelConfig(variant="rosa-lm", n_layer=1, n_embd=32, vocab_size=V, rosa=RosaConfig.preset("qkv-1bit"))
    with pytest.raises(ConfigError, match="a rosa-lm has no WKV state to tune"):
        TunedState(lm)


def test_it_learns_while_the_weights_stay(random_model):
    model = random_model(variant="v8", n_layer=2).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = TunedState(model.config)
    optimizer = heron.build_optimizer(state, lr=3e-2)
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [("state", 0)]
    losses = []
    for _ in range(40):
        losses.append(model.loss(IDS, TARGETS, state=state(IDS)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_rwkv_package_gives_the_same_logits(random_model, rwkv_package, tmp_path):
    model = random_model(variant="v7", n_layer=2, n_embd=128, head_size=64, vocab_size=50)
    state = TunedState(model.config, token_shifts=True)
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    heron.save(model, tmp_path / "x.pth")
    save_tuned_state(state, tmp_path / "state.pth")
    start = tuned_state(tmp_path / "state.pth", model.config)
    file = torch.load(tmp_path / "state.pth")
    names = ("att.shift_state", "att.time_state", "ffn.shift_state")
    of_file = [file[f"blocks.{i}.{name}"] for i in range(2) for name in names]  # as the package keeps them
    tokens = IDS.flatten().tolist()
    for pieces in ([14], [1] * 14):
        [(want, want_state)] = rwkv_package([(tmp_path / "x", tokens, pieces, of_file)])
        with torch.no_grad():
            got, after = model(torch.tensor([tokens]), start)
            assert not torch.allclose(got, model(torch.tensor([tokens]))[0], atol=0.1)
        assert (got[0] - want).abs().max() < 1e-5
        for one, other in zip(after.to_runtime(), want_state, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
