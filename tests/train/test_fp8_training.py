"""Training with dtype fp8, on a CPU, which computes it as a GPU does: what is in fp8, what is learned, and refused."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from torch import nn

import heron
from heron import machine
from heron.commands import estimate
from heron.config.finetune import FinetuneConfig
from heron.dist import Ranks
from heron.errors import ConfigError
from heron.model import fp8
from heron.train import loop
from heron.train.step import Learner

CPU = torch.device("cpu")
SIZES = dict(n_layer=2, n_embd=32, ffn_dim=64)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def config_of(dtype, **changes):
    settings = dict(max_steps=1, micro_bsz=2, ctx_len=12, device="cpu", weights="bf16", compile="off")
    return heron.TrainConfig(**{**settings, "dtype": dtype, **changes})


def learner_of(model, dtype="fp8", device=CPU, **changes):
    return Learner(copy.deepcopy(model), config_of(dtype, **changes), device)


def sample(seed=0, rows=2):
    tokens = torch.randint(0, 37, (rows, 13), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def step(learner, *samples, lr=1e-2):
    """Loss, gradient norm, whether they are bad."""
    return learner.update(learner.gradients(samples), lr, math.inf).tolist()[:3]


@pytest.mark.parametrize("variant", ["v7", "v7a", "v8", "v8-hybrid", "rosa-lm"])
def test_the_large_matrices_of_the_network_multiply_in_fp8_and_the_model_stays_as_it_is(random_model, variant):
    model = random_model(variant=variant, **SIZES)
    learner = learner_of(model)
    in_fp8 = {name for name, module in learner.network.named_modules() if type(module) is fp8.Fp8Linear}
    parts = fp8.MATRICES if model.config.has_time_mix else fp8.MATRICES[-2:]
    assert in_fp8 == {f"blocks.{layer}.{part}" for layer in range(2) for part in parts}
    y_in_bf16 = {name for name in in_fp8 if learner.network.get_submodule(name).y_in_bf16}
    assert y_in_bf16 == {f"blocks.{layer}.ffn.value" for layer in range(2)}
    assert not any(type(module) is fp8.Fp8Linear for module in learner.model.modules())
    assert list(dict(learner.network.named_parameters())) == list(dict(learner.model.named_parameters()))
    assert {weight.dtype for weight in learner.trained.parameters()} == {torch.float32}
    assert fp8.described(learner.network) == f"{len(in_fp8)} matrices of the blocks in fp8, all else in bf16"


def test_matrices_of_odd_sizes_stay_in_bf16_and_this_is_said(random_model):
    network = learner_of(random_model(variant="v7", n_layer=2)).network
    assert type(network.blocks[0].ffn.key) is nn.Linear
    assert type(network.blocks[0].att.key) is fp8.Fp8Linear
    assert fp8.described(network) == (
        "8 matrices of the blocks in fp8, all else in bf16; so are 4 more, blocks.0.ffn.key first: both sizes must be "
        "multiples of 16, and it is 50 x 32"
    )


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)])
def test_steps_learn_what_steps_in_bf16_learn(random_model, device):
    losses = {}
    for dtype in ("bf16", "fp8"):
        learner = learner_of(random_model(variant="v7", **SIZES), dtype, device, compile="auto")
        losses[dtype] = [step(learner, sample(rows=16), lr=1e-3)[0] for _ in range(8)]
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
    assert losses["fp8"][-1] < 0.9 * losses["fp8"][0]


def test_matrices_that_start_at_zero_leave_it():
    torch.manual_seed(0)
    learner = learner_of(heron.RWKV(heron.ModelConfig(variant="v7", vocab_size=37, head_size=16, **SIZES)))
    first = learner.network.blocks[0]
    of_zeros = [first.att.output.weight, first.ffn.value.weight]
    assert not any(map(torch.count_nonzero, of_zeros))
    for seed in range(3):
        step(learner, sample(seed))
    assert all(weight.all() for weight in of_zeros)


def test_gradients_of_several_passes_are_added_up_in_fp32(random_model):
    one, two = (learner_of(random_model(variant="v7", **SIZES), accumulate=passes) for passes in (1, 2))
    of_one, of_two = step(one, sample(rows=4)), step(two, sample(rows=4), sample(rows=4))
    assert of_two == pytest.approx(of_one, rel=1e-3)


def test_a_step_of_bad_numbers_changes_nothing(random_model):
    learner = learner_of(random_model(variant="v7", **SIZES))
    with torch.no_grad():
        learner.network.blocks[1].ffn.key.weight[3, 5] = math.inf
    before = {name: weight.clone() for name, weight in learner.trained.state_dict().items()}
    loss, _, bad = step(learner, sample())
    assert math.isnan(loss)
    assert bad == 1.0
    assert all(torch.equal(weight, before[name]) for name, weight in learner.trained.state_dict().items())


def test_a_run_that_goes_on_is_the_one_that_was_never_stopped(heron_, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "check_dtype", lambda *_: None)
    monkeypatch.setattr(loop, "plot", lambda *_: None)
    (tmp_path / "text.txt").write_text("".join(f"Line {n}, {n % 7} times {n % 5}.\n" for n in range(60)))
    words = (
        f"train --dtype fp8 --data {tmp_path}/text.txt --n_layer 1 --n_embd 32 --head_size 16 --ctx_len 16 "
        "--micro_bsz 1 --device cpu --threads 1 --sample_every 0 --eval_every 2 --save_every 2 --max_steps 4 --out"
    ).split()
    code, out, err = heron_(*words, tmp_path / "whole")
    assert (code, err) == (0, "")
    assert "fp8: as set; weights bf16; 6 matrices of the blocks in fp8, all else in bf16" in " ".join(out.split())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    (tmp_path / "cut" / "rwkv-final.pth").unlink()
    code, out, err = heron_(*words, tmp_path / "cut")
    assert (code, err) == (0, "")
    assert "step-00000002" in out
    assert "not bit-exact" not in out
    whole, cut = (heron.load(tmp_path / name / "rwkv-final.pth").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}


def test_an_estimate_knows_that_inputs_of_products_are_kept_in_8_bits():
    model = heron.ModelConfig(variant="v7", n_layer=1, n_embd=64, ffn_dim=256, vocab_size=64)
    sizes = {dtype: estimate.estimate(config_of(dtype, micro_bsz=8, ctx_len=512), model) for dtype in ("bf16", "fp8")}
    assert sizes["fp8"].parameters == sizes["bf16"].parameters
    n_inputs = 8 * 512 * (5 * 64 + 256)
    assert sizes["bf16"].activations - sizes["fp8"].activations == pytest.approx(n_inputs, rel=0.1)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_cpu_and_an_older_gpu_are_refused(heron_, tmp_path, monkeypatch):
    code, _, err = heron_("train", "--dtype", "fp8", "--device", "cpu", "--max_steps", 1, "--out", tmp_path / "run")
    assert (code, err) == (1, "heron: dtype fp8: needs a GPU, and the device is cpu; use --dtype bf16 or fp32\n")
    assert heron_("bench", "--dtype", "fp8", "--device", "cpu")[2] == err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "An older GPU")
    with pytest.raises(ConfigError, match=r"8\.9 or newer .*; An older GPU has 8\.0; use --dtype bf16"):
        machine.check_dtype("fp8", torch.device("cuda"))
    machine.check_dtype("bf16", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    machine.check_dtype("fp8", torch.device("cuda"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(weights="fp32"), "weights fp32: dtype fp8 rounds a copy of them in bf16; drop it"),
        (dict(finetune=FinetuneConfig(method="state")), "dtype fp8 is for runs in which every weight trains"),
    ],
)
def test_settings_that_contradict_it_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        config_of("fp8", **changes)


def test_shards_are_refused(random_model):
    config = config_of("fp8", parallel="fsdp", processes=2)
    with pytest.raises(ConfigError, match="dtype fp8: weights are not sharded in it yet; use --parallel ddp"):
        Learner(random_model(variant="v7", **SIZES), config, CPU, ranks=Ranks(0, 2, 0, 2))
