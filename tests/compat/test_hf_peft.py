"""peft on heron.hf and on heron.RWKV itself: adapters learn, are saved, loaded and merged wherever they sit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import heron
from heron.checkpoint import adapters
from heron.config.finetune_adapter import KINDS, AdapterConfig
from heron.errors import CheckpointError, ConfigError, DataError
from heron.model.adapters import add_adapter

pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
from heron.hf import HeronConfig, HeronForCausalLM  # noqa: E402

V = 37
IDS = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(0))
EVERY = r".*\.(emb|head|key|value|receptance|output|qq|kk|kkup|vv|vvup|enn|ennk|emm|\w*_emb|\w*_emb_x)"
WHERE = {
    "all-linear": dict(target_modules="all-linear"),
    "head": dict(target_modules=["head"]),
    "emb": dict(target_modules=["emb"]),
    "every module and table": dict(target_modules=EVERY),
    "a head of its own": dict(target_modules=["key"], modules_to_save=["head"]),
    "norms and embedding of its own": dict(target_modules=["key"], modules_to_save=["emb", "ln_x", "ln1", "ln_out"]),
    "DoRA": dict(target_modules=["head", "key", "value"], use_dora=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(random_model):
    """A function: variant -> a HeronForCausalLM in eval mode, of random weights; tests work on copies."""
    made = {}

    def make(variant):
        if variant not in made:
            model = random_model(variant=variant, n_layer=2, vocab_size=V)
            made[variant] = HeronForCausalLM(HeronConfig(**model.config.to_dict(), eos_token_id=None)).eval()
            made[variant].rwkv.load_state_dict(model.state_dict())
        return copy.deepcopy(made[variant])

    return make


@pytest.mark.parametrize("where", ["emb", "head", "every module and table", "a head of its own"])
def test_an_adapter_acts_on_what_memory_recalls(random_model, where):
    rwkv, ids = random_model(variant="v8", n_layer=2, vocab_size=V, memory="memory"), IDS.remainder(3)
    base = HeronForCausalLM(HeronConfig(**rwkv.config.to_dict())).eval()
    base.rwkv.load_state_dict(rwkv.state_dict())
    model = shake(peft.get_peft_model(base, lora(**WHERE[where]))).eval()
    loss, logits = (model(input_ids=ids, labels=ids)[name] for name in ("loss", "logits"))
    assert torch.allclose(loss, nll(logits, ids), atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    assert torch.allclose(merged.rwkv(ids)[0], logits, atol=1e-4)


def lora(task="CAUSAL_LM", **settings):
    return peft.LoraConfig(r=4, task_type=task, lora_alpha=8, **settings)


def shake(model):
    """Adapters as training might leave them: a fresh one changes nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def nll(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("variant", ["v7", "v8", "v8-hybrid"])
def test_an_adapter_learns_is_saved_and_merged(bases, tmp_path, variant, where):
    base = bases(variant)
    before = base(IDS).logits.detach()
    model = peft.get_peft_model(bases(variant), lora(**WHERE[where]))
    assert torch.allclose(model(input_ids=IDS).logits, before, atol=2e-5)
    shake(model).eval()
    out = model(input_ids=IDS, labels=IDS)
    assert not torch.allclose(out.logits, before, atol=1e-2)
    assert torch.allclose(out.loss, nll(out.logits, IDS), atol=1e-5)

    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    still = {name for name, part in model.named_parameters() if part.requires_grad and not part.grad.any()}
    assert not still
    assert not any(part.grad is not None for part in model.parameters() if not part.requires_grad)

    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(again(input_ids=IDS).logits, out.logits, atol=1e-5)
    written = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    assert type(merged) is HeronForCausalLM
    assert torch.allclose(merged(IDS).logits, out.logits, atol=5e-4)
    assert torch.equal(merged.generate(IDS, max_new_tokens=4, do_sample=False), written)


def test_all_linear_is_every_linear_but_the_head(bases):
    for variant in ("v7", "v8-hybrid", "v7b"):
        base = bases(variant)
        linear = {name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
        model = peft.get_peft_model(base, lora(target_modules="all-linear"))
        tuned = {name.removeprefix("base_model.model.") for name in model.targeted_module_names}
        assert tuned == linear - {"rwkv.head"}


@pytest.mark.parametrize("where", ["head", "every module and table", "norms and embedding of its own", "DoRA"])
@pytest.mark.parametrize("variant", ["v7a", "v8", "v7b"])
def test_an_adapter_in_a_plain_rwkv_counts_in_logits_and_loss(bases, variant, where):
    bare = bases(variant).rwkv
    before, target = bare(IDS)[0].detach(), IDS.roll(-1, 1)
    model = shake(peft.inject_adapter_in_model(lora(None, **WHERE[where]), bare)).eval()
    logits, _ = model(IDS)
    assert not torch.allclose(logits, before, atol=1e-2)
    loss = model.loss(IDS, target)
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), target.flatten()), atol=1e-5)
    loss.backward()
    assert all(part.grad.any() for part in model.parameters() if part.requires_grad)
    assert {name.split(".")[-1] for name, part in model.named_parameters() if part.grad is not None} <= {
        "weight", "bias", "default"
    }  # fmt: skip
    first, state = model(IDS[:, :4])
    assert torch.allclose(torch.cat((first, model(IDS[:, 4:], state)[0]), dim=1), logits, atol=2e-5)


@pytest.mark.parametrize("where", ["emb", "a head of its own", "DoRA"])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "folder"])
def test_heron_saves_no_adapter_by_halves(bases, tmp_path, where, name):
    model = peft.inject_adapter_in_model(lora(None, **WHERE[where]), bases("v7").rwkv)
    with pytest.raises(CheckpointError, match="an adapter is on .*; merge it first"):
        heron.save(model, tmp_path / name, None if "." in name else "safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_dropped_is_dropped_again_where_blocks_are_computed_again(bases):
    model = peft.get_peft_model(bases("v8"), lora(target_modules="all-linear", lora_dropout=0.5))
    shake(model).train()
    gradients = []
    for checkpointing in (False, True):
        model.base_model.model.rwkv.grad_checkpoint = checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([part.grad.clone() for part in model.parameters() if part.requires_grad])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_padding_and_packing_pass_through_an_adapter(bases):
    model = shake(peft.get_peft_model(bases("v8"), lora(target_modules=["emb", "key", "head"]))).eval()
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    out = model(input_ids=IDS, attention_mask=mask)
    assert torch.allclose(out.logits[:1, 4:], model(input_ids=IDS[:1, 4:]).logits, atol=2e-5)
    packed = model(input_ids=IDS[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    assert torch.allclose(packed.logits[:, 4:], model(input_ids=IDS[:1, 4:]).logits, atol=2e-5)
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.allclose(model(inputs_embeds=embeddings).logits, model(input_ids=IDS).logits, atol=2e-5)


def test_transformers_own_way_to_add_an_adapter(bases, tmp_path):
    model = bases("v8")
    model.add_adapter(lora(target_modules=["key", "head"]))
    shake(model)
    out = model(IDS, labels=IDS)
    out.loss.backward()
    model.save_pretrained(tmp_path)
    again = bases("v8")
    again.load_adapter(str(tmp_path))
    assert torch.allclose(again(IDS).logits, out.logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["v7", "v8", "v8-hybrid"])
def test_an_adapter_of_heron_is_loaded_by_peft_and_one_of_peft_by_heron(bases, tmp_path, variant, kind):
    torch.manual_seed(0)
    bare = bases(variant).rwkv
    adapter = add_adapter(bare, AdapterConfig(kind, rank=4, targets="all,head"))
    logits = shake(bare)(IDS)[0]
    adapters.save_adapter(adapter, tmp_path / "heron")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected) adapter keys")
        model = peft.PeftModel.from_pretrained(bases(variant), tmp_path / "heron").eval()
    assert torch.allclose(model(input_ids=IDS).logits, logits, atol=1e-5)
    assert (model(input_ids=IDS).logits - bases(variant)(IDS).logits).abs().max() > 0.05

    model.save_pretrained(tmp_path / "peft")
    with pytest.warns(UserWarning, match="does not say which base it is for; only shapes are compared"):
        again = adapters.load_adapter(bases(variant).rwkv, tmp_path / "peft")
    assert torch.allclose(again.model(IDS)[0], logits, atol=1e-5)
    assert torch.allclose(again.merge()(IDS)[0], logits, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(IDS).logits, logits, atol=5e-4)


@pytest.mark.parametrize(
    "where", ["emb", "every module and table", "norms and embedding of its own", "a head of its own"]
)
def test_what_peft_trained_beside_linear_layers_is_merged_too(bases, tmp_path, where):
    torch.manual_seed(0)
    model = shake(peft.get_peft_model(bases("v8"), lora(**WHERE[where]))).eval()
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="only shapes are compared"):
        adapter = adapters.load_adapter(bases("v8").rwkv, tmp_path)
    assert torch.allclose(adapter.model(IDS)[0], logits, atol=1e-5)
    merged = adapter.merge()
    assert merged.state_dict().keys() == bases("v8").rwkv.state_dict().keys()
    assert torch.allclose(merged(IDS)[0], logits, atol=1e-4)


def test_soft_prompts_need_a_model_without_tables(bases):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)  # sizes: from the model's config
    model = peft.get_peft_model(bases("v7"), config)
    model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
    assert all(part.grad.any() for part in model.parameters() if part.requires_grad)
    with pytest.raises(DataError, match="a v8 looks up by token id"):
        peft.get_peft_model(bases("v8"), config)(input_ids=IDS)


@pytest.mark.parametrize(
    "settings", [dict(target_modules=["enn"]), dict(target_modules=["key"], modules_to_save=["enn"])]
)
def test_a_vocabulary_with_an_adapter_on_a_table_keeps_its_size(bases, settings):
    model = peft.get_peft_model(bases("v8"), lora(**settings))
    with pytest.raises(ConfigError, match="an adapter is on .*enn.*; resize first"):
        model.resize_token_embeddings(50)
