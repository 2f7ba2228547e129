"""Frozen weights in 8 and 4 bits: which layers are replaced, what is refused; with bitsandbytes, what they compute."""

from __future__ import annotations

import copy
import math
import sys
import types

import pytest
import torch
from torch import nn

import heron
from heron import TrainConfig
from heron.commands import estimate
from heron.config.finetune import QUANTIZED
from heron.errors import ConfigError
from heron.model import quantized
from heron.train.step import Learner

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


class _Layer(nn.Linear):
    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, bias=False)
        self.settings = settings


class _Weight(nn.Parameter):
    def __new__(cls, data, requires_grad, **settings):
        return super().__new__(cls, data, requires_grad)


@pytest.fixture
def library(monkeypatch):
    """A bitsandbytes whose layers keep their weights as they are, and a device that counts as a GPU."""
    named = types.SimpleNamespace(Linear8bitLt=_Layer, Linear4bit=_Layer, Int8Params=_Weight, Params4bit=_Weight)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(nn=named))
    return types.SimpleNamespace(type="cuda")


@pytest.mark.parametrize("variant", ["v7", "v8", "v8-hybrid"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_matrices_of_the_blocks_are_replaced_and_nothing_else(random_model, monkeypatch, library, variant, kind):
    model = random_model(n_layer=2, variant=variant)
    before = {name: type(module) for name, module in model.named_modules()}
    monkeypatch.setattr(_Weight, "to", lambda self, device: self, raising=False)
    quantized.quantize(model, kind, library)
    replaced = {name for name, module in model.named_modules() if type(module) is _Layer}
    assert replaced == {name for name, kind_ in before.items() if kind_ is nn.Linear and name != "head"}
    assert {"blocks.0.att.key", "blocks.1.ffn.value"} <= replaced
    assert {weight.dtype for name, weight in model.named_parameters() if name.rpartition(".")[0] in replaced} == {
        torch.bfloat16
    }
    wanted = dict(has_fp16_weights=False) if kind == "int8" else dict(quant_type="nf4", compute_dtype=torch.bfloat16)
    assert wanted.items() <= model.blocks[0].att.key.settings.items()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_cpu_and_a_missing_package_are_refused_in_one_line(random_model, monkeypatch, kind):
    with pytest.raises(ConfigError, match=f"base {kind}: is for a GPU, and the device is cpu; use --base fp32"):
        quantized.quantize(random_model(n_layer=1), kind, CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes .*pip install 'heron-rwkv\[quantized\]'"):
        quantized.quantize(random_model(n_layer=1), kind, torch.device("cuda"))


def test_adapters_that_read_weights_are_refused():
    for kind in ("pissa", "miss"):
        with pytest.raises(ConfigError, match=f"base nf4: adapter.kind {kind} needs weights that are not quantized"):
            heron.FinetuneConfig(method="lora", base="nf4", adapter=dict(kind=kind))
    with pytest.raises(ConfigError, match="weights fp32 and base bf16 contradict"):
        TrainConfig(max_steps=1, weights="fp32", finetune=heron.FinetuneConfig(method="lora", base="int8"))


def config_of(device, **finetune):
    return TrainConfig(
        max_steps=1, micro_bsz=1, ctx_len=32, dtype="bf16", device=device, compile="off",
        finetune=heron.FinetuneConfig(**{**dict(method="lora", adapter=dict(rank=4)), **finetune}),
    )  # fmt: skip


def test_an_estimate_knows_how_much_smaller_a_base_is(random_model):
    pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    model = random_model(n_layer=1, n_embd=64, ffn_dim=256).config
    sizes = {base: estimate.estimate(config_of("cuda", base=base), model) for base in ("bf16", *QUANTIZED)}
    n = 4 * 64 * 64 + 2 * 64 * 256
    assert sizes["bf16"].parameters - sizes["int8"].parameters == pytest.approx(n, rel=0.01)
    assert sizes["bf16"].parameters - sizes["nf4"].parameters == pytest.approx(1.5 * n, rel=0.02)
    assert sizes["bf16"].peak - sizes["nf4"].peak == sizes["bf16"].parameters - sizes["nf4"].parameters


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("kind", "method", "tolerance"), [("int8", "lora", 0.05), ("nf4", "lora", 0.3), ("nf4", "state", 0.3)]
)
def test_steps_beside_a_quantized_base_learn_and_are_close_to_those_beside_bf16(
    random_model, monkeypatch, device, kind, method, tolerance
):
    pytest.importorskip("bitsandbytes", reason="needs the quantized extra: pip install 'heron-rwkv[quantized]'")
    pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    if device == "cpu":  # bitsandbytes computes there too, slowly
        monkeypatch.setattr(quantized, "DEVICES", ("cpu",))
    model = random_model(n_layer=2, n_embd=64, ffn_dim=128)
    tokens = torch.randint(37, (1, 33), generator=torch.Generator().manual_seed(0))
    sample = tokens[:, :-1], tokens[:, 1:]
    losses = {}
    for base in ("bf16", kind):
        adapter = dict(rank=4) if method == "lora" else None
        torch.manual_seed(0)
        config = config_of(device, method=method, adapter=adapter, base=base)
        learner = Learner(copy.deepcopy(model), config, torch.device(device))
        steps = [learner.update(learner.gradients([sample]), 1e-2, math.inf).tolist() for _ in range(6)]
        losses[base] = [loss for loss, *_ in steps]
        assert not any(bad for _, _, bad, _ in steps)
        with torch.no_grad():
            assert learner.model(tokens.to(device))[0].isfinite().all()
    assert losses[kind][0] == pytest.approx(losses["bf16"][0], rel=tolerance)
    assert losses[kind][-1] < losses[kind][0]
