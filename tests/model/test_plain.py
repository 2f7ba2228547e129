"""Modules of a network that someone has wrapped or hooked: adapters, quantized layers, a user's own."""

from __future__ import annotations

import copy

import pytest
import torch

import heron

V = 37
IDS = torch.randint(1, V, (4, 9), generator=torch.Generator().manual_seed(0))


def near(a, b, atol):
    return torch.allclose(a, b, atol=atol, rtol=0)


FACTORS = [  # a module whose output is made 1.5 times as large, in a variant that has it
    ("v8", "head"), ("v8", "ln_out"), ("v8", "blocks.1.att.key"), ("v8", "blocks.1.att.output"), ("v8", "blocks.0.ln0"),
    ("v8", "blocks.1.att.ln_x"), ("v8", "blocks.0.ln1"), ("v8", "blocks.1.ffn.value"), ("v8", "blocks.1.ffn.enn"),
    ("v7a", "blocks.0.ffn.s_emb_x"), ("v7a", "blocks.0.ffn.s_emb"), ("v7b", "blocks.0.qkv.k_emb_x"),
    ("v7b", "blocks.1.qkv.v_emb_x"), ("v7b", "blocks.0.qkv.v_emb"), ("v8-hybrid", "emb"),
    ("v8-hybrid", "blocks.0.qkv.vvup"), ("rosa-lm", "blocks.0.rosa.o"), ("rosa-lm", "head"),
]  # fmt: skip


class Larger(torch.nn.Module):
    """A wrapper as users write it: it has no weight of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given):
        return 1.5 * self.inner(*given)


@pytest.mark.parametrize(("variant", "name"), FACTORS)
def test_a_wrapped_module_counts_wherever_its_output_does(random_model, variant, name):
    base = random_model(variant=variant, n_layer=2, vocab_size=V)
    expected, hooked, wrapper = (copy.deepcopy(base) for _ in range(3))
    with torch.no_grad():
        for part in expected.get_submodule(name).parameters():
            part.mul_(1.5)
    hooked.get_submodule(name).register_forward_hook(lambda module, given, out: 1.5 * out)
    parent, _, leaf = name.rpartition(".")
    setattr(wrapper.get_submodule(parent), leaf, Larger(wrapper.get_submodule(name)))
    logits, loss = expected(IDS)[0], expected.loss(IDS, IDS.roll(1, 1))
    assert not near(logits, base(IDS)[0], 1e-3)
    loss.backward()
    for model in (hooked, wrapper):
        assert near(model(IDS)[0], logits, 1e-4)
        again = model.loss(IDS, IDS.roll(1, 1))
        assert near(again, loss, 1e-4)
        again.backward()
        assert near(model.blocks[1].ffn.key.weight.grad, expected.blocks[1].ffn.key.weight.grad, 1e-4)
    request = heron.generation.Request([3, 5, 7], 5, heron.generation.Sampling(temperature=0))
    tokenizer = heron.tokenizer.load(f"integers:{V}")
    written = [
        [piece.token.id for piece in heron.Engine(model.requires_grad_(False), tokenizer).run([request])]
        for model in (expected, hooked, wrapper)
    ]
    assert written[0] == written[1] == written[2]  # token by token


def test_an_embedding_that_is_called_sums_its_gradients_as_one_that_is_read(monkeypatch, random_model):
    from heron.model import inputs

    look_up, read = inputs.look_up, []
    monkeypatch.setattr(inputs, "look_up", lambda ids, table: read.append(table) or look_up(ids, table))
    model = random_model(variant="v8", n_layer=1, vocab_size=V)
    calls = []
    model.emb.register_forward_hook(lambda *_: calls.append(True))
    model.loss(IDS, IDS.roll(1, 1))
    assert calls == [True]
    assert len(read) == 1
    assert read[0] is model.emb.weight
