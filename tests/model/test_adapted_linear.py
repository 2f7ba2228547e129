"""Which adapted layers compute by our operator on a GPU, and that they compute what peft's do."""

from __future__ import annotations

import pytest
import torch

from heron.config.finetune_adapter import KINDS, AdapterConfig
from heron.model import adapted_linear
from heron.model.adapters import add_adapter
from heron.model.compiled import compiled
from heron.model.rwkv import Block
from heron.ops import _choice
from heron.ops.low_rank import low_rank_linear

pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")

IDS = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch):
    """The forms that the operator was called with; CPU layers take the one for a GPU."""
    forms = []

    def counted(*arguments):
        forms.append(arguments[-1])
        return low_rank_linear(*arguments)

    monkeypatch.setattr(adapted_linear, "low_rank_linear", counted)
    monkeypatch.setattr(adapted_linear, "low_rank_linear_choice", lambda device: _choice.Choice("in_place", "a test"))
    return forms


def adapted(random_model, **changes):
    """A model of two layers with an adapter that changes what it computes."""
    model = random_model(variant="v7", n_layer=2)
    torch.manual_seed(0)
    add_adapter(model, AdapterConfig(**{"kind": "lora", "rank": 4, **changes}))
    generator = torch.Generator().manual_seed(1)
    for leaf in model.parameters():
        if leaf.requires_grad:
            leaf.data += 0.05 * torch.randn(leaf.shape, generator=generator)
    return model


def learned(model):
    loss = model.loss(IDS, IDS.roll(-1, 1))
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in model.parameters() if leaf.requires_grad)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_pefts_does_and_by_our_operator_where_it_is_low_rank_alone(
    random_model, calls, kind, monkeypatch
):
    alpha = {} if kind == "miss" else {"alpha": 6}
    got = learned(adapted(random_model, kind=kind, **alpha))
    assert calls == (["in_place"] * 12 if kind in ("lora", "rslora") else [])
    monkeypatch.setattr(adapted_linear, "low_rank_linear_choice", lambda device: _choice.Choice("reference", "a test"))
    torch.testing.assert_close(got, learned(adapted(random_model, kind=kind, **alpha)), rtol=1e-4, atol=1e-6)


def test_dropout_autocast_a_disabled_adapter_and_a_weight_that_trains_are_left_to_peft(random_model, calls):
    learned(adapted(random_model, dropout=0.5))
    model = adapted(random_model)
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(IDS, IDS)
    for layer in model.modules():
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)
    model(IDS)
    model = adapted(random_model).requires_grad_(True)
    model(IDS)
    assert calls == []


def test_a_hook_on_a_part_of_a_layer_fires(random_model, calls):
    model, seen = adapted(random_model), []
    model.blocks[0].att.key.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    model(IDS)
    assert len(calls) == 11
    assert seen == [1]


def test_a_compiled_block_has_it(random_model, calls):
    model = adapted(random_model)
    wanted = learned(model)
    model.zero_grad()
    mix = compiled(Block.mix, "aot_eager")
    for block in model.blocks:
        block.compiled = mix
    torch.testing.assert_close(learned(model), wanted, rtol=1e-4, atol=1e-6)
    assert calls == ["in_place"] * 24
