"""Adapters on a heron.RWKV: what a fresh one changes (nothing), what trains, what is refused, and the merge."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import heron
from heron import evaluate
from heron.checkpoint.adapters import base_fingerprint
from heron.config.finetune_adapter import KINDS, AdapterConfig
from heron.errors import CheckpointError, ConfigError
from heron.generation.decoder import is_fusible
from heron.model.adapters import Adapter, adapter_parameters, add_adapter
from heron.optim import group_of

pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")

V = 37
IDS = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
OF_V7 = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
VARIANTS = {
    "v7": (dict(variant="v7"), []),
    "v7a": (dict(variant="v7a"), ["ffn.s_emb_x"]),
    "v7b": (dict(variant="v7b"), ["qkv.qq", "qkv.k_emb_x", "qkv.v_emb_x", "ffn.s_emb_x"]),
    "v8": (dict(variant="v8"), []),
    "v8-hybrid": (dict(variant="v8-hybrid"), ["qkv.qq", "qkv.kk", "qkv.kkup", "qkv.vv", "qkv.vvup"]),
    "v8 with ROSA": (
        dict(variant="v8", rosa=heron.config.RosaConfig.preset("qkv-1bit")),
        ["rosa.q", "rosa.k", "rosa.v", "rosa.o"],
    ),
}


@pytest.fixture
def base(random_model):
    """A function: variant -> a random model of two layers."""
    torch.manual_seed(0)  # initial values of adapters are drawn
    return lambda variant="v8", **changes: random_model(**{**VARIANTS[variant][0], "n_layer": 2, **changes})


def trained(model, seed=5):
    """An adapter as training might leave it: a fresh one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("v8", kind) for kind in KINDS),
        *((variant, kind) for variant in VARIANTS if variant != "v8" for kind in ("lora", "pissa")),
    ],
)
def test_an_adapter_starts_as_the_base_trains_alone_and_merges_into_the_same_logits(base, variant, kind):
    model = base(variant)
    names, before = [name for name, _ in model.named_parameters()], model(IDS)[0].detach()
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    fingerprint = base_fingerprint(model)
    adapter = add_adapter(model, AdapterConfig(kind, rank=4, targets="all,head"))
    fresh = model(IDS)[0].detach()
    assert torch.allclose(fresh, before, atol=1e-5) if kind == "pissa" else torch.equal(fresh, before)

    of_adapter = adapter_parameters(model)
    learns = {name: part for name, part in model.named_parameters() if part.requires_grad}
    assert learns.keys() == {name for name in of_adapter if ".start." not in name}
    assert (learns.keys() == of_adapter.keys()) == (kind != "pissa")
    wanted = {name for name in frozen if name.endswith(".weight") and name[: -len(".weight")].endswith(tuple(OF_V7))}
    assert len({name.split(".lora_")[0].split(".miss_")[0] for name in learns}) >= len(wanted)

    trained(model)
    target = IDS.roll(-1, 1)
    logits = model(IDS)[0]
    assert not torch.allclose(logits, before, atol=0.05)
    loss = model.loss(IDS, target)
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), target.flatten()), atol=1e-5)
    loss.backward()
    assert all(part.grad.any() for part in learns.values())
    assert all(part.grad is None for part in model.parameters() if not part.requires_grad)
    assert base_fingerprint(model) == fingerprint

    with torch.no_grad():
        first, state = model(IDS[:, :4])
        assert torch.allclose(torch.cat((first, model(IDS[:, 4:], state)[0]), 1), logits, atol=1e-5)
        packed = model(IDS.reshape(1, -1), cu_seqlens=torch.tensor([0, 9, 18]))[0]
        assert torch.allclose(packed.view(2, 9, V), logits, atol=1e-5)
    assert not is_fusible(model)

    exact = copy.deepcopy(model).double()
    before_merge = exact(IDS)[0]
    assert torch.allclose(Adapter(exact, kind).merge()(IDS)[0], before_merge, atol=1e-11)
    merged = adapter.merge()
    assert merged is model
    assert [name for name, _ in merged.named_parameters()] == names
    assert all(part.requires_grad for part in merged.parameters())
    assert not hasattr(merged, "peft_config")
    assert type(merged.head) is nn.Linear
    assert is_fusible(merged) == (variant in ("v7", "v7a", "v8"))
    assert torch.allclose(merged(IDS)[0], logits, atol=1e-5)
    assert base_fingerprint(merged) != fingerprint
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, frozen[name])}
    layers = [*OF_V7, *VARIANTS[variant][1]]
    assert changed == {"head.weight", *(f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers)}


@pytest.mark.parametrize("exact", [True, False])
def test_pissa_trains_the_largest_singular_vectors_and_leaves_the_weight_alone(base, monkeypatch, exact):
    monkeypatch.setattr(heron.model.adapters, "_EXACT", 64 if exact else 8)
    model = base()
    weight = model.blocks[1].att.key.weight.detach().clone()
    add_adapter(model, AdapterConfig("pissa", rank=4, alpha=6, targets="att.key"))
    layer = model.blocks[1].att.key
    assert torch.equal(layer.get_base_layer().weight, weight)
    left, values, right = torch.linalg.svd(weight)
    best = left[:, :4] * values[:4] @ right[:4]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (6 / 4)
    assert (product - weight).norm() <= (best - weight).norm() * (1 + 1e-5 if exact else 1.001)
    assert torch.allclose(model(IDS)[0], base()(IDS)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_half_precision_rounds_once(base, kind, dtype):
    model = base().to(dtype)
    adapter = add_adapter(model, AdapterConfig(kind, rank=4))
    assert all(part.dtype == torch.float32 for part in adapter_parameters(model).values())
    trained(model)
    exact = copy.deepcopy(model).double()
    logits = exact(IDS)[0]
    weights = Adapter(exact, kind).merge().state_dict()
    assert torch.allclose(exact(IDS)[0], logits, atol=1e-12)
    for name, weight in adapter.merge().state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, weights[name].to(dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_bf16_under_an_adapter_in_fp32_runs_and_is_evaluated(base, kind):
    model = base().bfloat16()
    adapter = add_adapter(model, AdapterConfig(kind, rank=4))
    trained(model)
    logits = model(IDS)[0].detach()
    assert logits.dtype == torch.bfloat16
    exact = copy.deepcopy(model).double()(IDS)[0].detach()
    scores = [evaluate.evaluate(model, IDS[0].numpy(), 8, mode=mode).loss for mode in evaluate.MODES]
    wanted = F.cross_entropy(exact[0, :-1], IDS[0, 1:]).item()
    assert scores == pytest.approx([wanted, wanted], abs=0.05)
    merged = adapter.merge()(IDS)[0]
    assert (logits - exact).square().mean() <= 2**2 * (merged - exact).square().mean()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("key", ["att.key", "ffn.key"]),
        ("att.key, head", ["att.key", "head"]),
        ("blocks.1.att.output", ["blocks.1.att.output"]),
        ("all", OF_V7),
    ],
)
def test_targets_are_ends_of_names(base, targets, layers):
    model = base("v7")
    adapter = add_adapter(model, AdapterConfig(rank=2, targets=targets))
    at = {name.split(".lora_")[0] for name in adapter_parameters(model)}
    prefixes = ("", "blocks.0.", "blocks.1.")
    assert at == {prefix + layer for prefix in prefixes for layer in layers} & {
        name for name, _ in base("v7").named_modules()
    }
    assert adapter.settings()["target_modules"] == sorted(
        layers if targets == "all" else map(str.strip, targets.split(","))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), r"adapter.rank: wanted a whole number from 1 on, got 0"),
        (dict(kind="lroa"), r"adapter.kind: wanted lora, .*, got 'lroa'. Did you mean 'lora'\?"),
        (dict(alpha=0), r"adapter.alpha: wanted a number above 0, got 0"),
        (dict(kind="miss", alpha=8), r"adapter.alpha: miss is not scaled, got 8; leave it out"),
        (dict(dropout=1.0), r"adapter.dropout: wanted 0 or more and less than 1, got 1.0"),
        (dict(targets=" ,"), r"adapter.targets: wanted names with commas between, or all, got ' ,'"),
        (dict(targets="q_proj"), r"no linear layer of this v8 is named 'q_proj'.* There are att.receptance, att.key"),
        (dict(targets="key,vlaue"), r"named 'vlaue'. Did you mean 'value'"),
        (dict(targets="w1"), r"no linear layer of this v8 is named 'w1'"),
        (dict(targets="enn"), r"'enn' names blocks.0.ffn.enn, of the class DeepEmbed, and wanted are linear layers"),
        (dict(targets="emb"), r"'emb' names emb, of the class Embedding, and wanted are linear layers"),
        (dict(targets="key,att"), r"'att' names blocks.0.att, of the class TimeMix, and wanted are linear layers"),
        (dict(rank=33), r"adapter.rank: 33 is more than the 32 that blocks.0.att.receptance \(32 x 32\) has room for"),
        (dict(kind="miss", rank=40, targets="ffn.key"), r"40 is more than the 32 that blocks.0.ffn.key \(50 x 32\)"),
    ],
)
def test_bad_settings_are_one_clear_error_and_change_nothing(base, settings, message):
    model = base()
    with pytest.raises(ConfigError, match=message):
        add_adapter(model, AdapterConfig(**{"rank": 4, **settings}))
    assert not adapter_parameters(model)
    assert all(part.requires_grad for part in model.parameters())


def test_dora_on_fresh_weights_is_refused(base):
    fresh = heron.RWKV(base().config)
    with pytest.raises(ConfigError, match=r"dora divides .* blocks.0.att.output has rows of zeros, .* take lora"):
        add_adapter(fresh, AdapterConfig("dora", rank=4))
    add_adapter(fresh, AdapterConfig("dora", rank=4, targets="att.key"))
    assert fresh(IDS)[0].isfinite().all()


def test_a_second_adapter_is_refused(base):
    model = base()
    add_adapter(model, AdapterConfig(rank=4, targets="ffn.key"))
    with pytest.raises(ConfigError, match="an adapter is on blocks.0.ffn.key already; merge it"):
        add_adapter(model, AdapterConfig(rank=4, targets="att.key"))


def test_a_diverged_adapter_is_not_merged(base):
    model = base()
    adapter = add_adapter(model, AdapterConfig(rank=4))
    trained(model).blocks[1].ffn.key.lora_B["default"].weight.data[3, 2] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"blocks.1.ffn.key: .* not finite in float32: the adapter's training div"
    ):
        adapter.merge()


def test_without_peft_the_error_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"adapters need the package peft .* pip install 'heron-rwkv\[finetune\]'"):
        add_adapter(base(), AdapterConfig(rank=4))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_do_not_decay(base, kind):
    model = base()
    add_adapter(model, AdapterConfig(kind, rank=4))
    optimizer = heron.build_optimizer(model, lr=1e-4, weight_decay=0.1)
    (group,) = optimizer.param_groups
    assert (group["name"], group["lr"], group["weight_decay"]) == ("adapter", 1e-4, 0)
    assert len(group["params"]) == sum(part.requires_grad for part in model.parameters())
    assert {group_of(name, part).name for name, part in base().named_parameters()} == {"decay", "1x", "2x", "table"}


def test_a_linear_layer_with_dropout_drops_in_training_alone(base):
    model = base()
    add_adapter(model, AdapterConfig(rank=4, dropout=0.5))
    trained(model).eval()
    assert torch.equal(model(IDS)[0], model(IDS)[0])
    assert not torch.equal(model.train()(IDS)[0], model(IDS)[0])
