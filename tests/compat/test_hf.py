"""heron.hf in transformers: what its common tests of models and of generation ask of every model, and more."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

import heron
from heron.errors import CheckpointError, ConfigError, DataError

transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
from heron.hf import HeronConfig, HeronForCausalLM, HeronModel  # noqa: E402

VARIANTS = ["v7", "v7 with ROSA memory", "v8", "v8-hybrid"]
ALL = [*VARIANTS, "v7a", "v7b", "rosa-lm"]  # with every kind of state, of table and of gate
V, PAD, LENGTHS = 37, 1, [9, 5, 7, 5]
IDS = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.stack([torch.arange(9) >= 9 - n for n in LENGTHS]).long()


@pytest.fixture(scope="module")
def models(random_model):
    """A function: variant -> one HeronForCausalLM in eval mode, of random weights, for tests that leave it alone."""
    made = {}

    def make(variant):
        if variant not in made:
            name, _, memory = variant.partition(" with ROSA ")
            made[variant] = wrapped(random_model(variant=name, n_layer=2, vocab_size=V, memory=memory or None))
        return made[variant]

    return make


def wrapped(model, **changes):
    ids = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
    out = HeronForCausalLM(HeronConfig(**{**model.config.to_dict(), **ids, **changes})).eval()
    out.rwkv.load_state_dict(model.state_dict())
    return out


def near(a, b, atol=2e-5):
    return torch.allclose(a, b, atol=atol, rtol=0)


def greedy(model, ids=None, n=6, **settings):
    return model.generate(ids, max_new_tokens=n, **{"do_sample": False, "eos_token_id": None, **settings})


# -- inputs and outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_have_their_forms(models, variant):
    model = models(variant)
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"
    with torch.no_grad():
        out = model(IDS, labels=IDS, output_hidden_states=True, use_cache=True)
        body = model.base_model(IDS)
        as_tuple = model(IDS, labels=IDS, output_hidden_states=True, use_cache=True, return_dict=False)
        assert near(model(IDS[:1]).logits, out.logits[:1])  # what stands beside it is another matter
        last = model(IDS, logits_to_keep=2).logits
        some = model(IDS, logits_to_keep=torch.tensor([0, 4])).logits
        each = model(IDS, logits_to_keep=torch.arange(4)[:, None]).logits
        marked = model(IDS, logits_to_keep=LEFT.bool()).logits
    assert [type(part) for part in as_tuple] == [type(part) for part in out.to_tuple()]
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[:2], out.to_tuple()[:2], strict=True))
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    if model.rwkv.memory is None:  # which adds to the embedding and to the logits
        assert torch.equal(out.hidden_states[0], model.rwkv.embed(IDS))
        assert torch.equal(model.get_output_embeddings()(body.last_hidden_state), out.logits)
    assert torch.equal(out.hidden_states[-1], body.last_hidden_state)
    assert torch.equal(model.rwkv.logits(body.last_hidden_state, body.recalled), out.logits)
    assert near(last, out.logits[:, -2:])
    assert near(some, out.logits[:, [0, 4]])
    assert near(each[:, 0], out.logits[range(4), range(4)])
    assert near(marked, out.logits[LEFT.bool()])
    assert model.get_decoder() is model.base_model
    assert model(IDS, labels=IDS).state is None
    assert model.base_model.train(False)(IDS).state is not None


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("grads", [False, True])
def test_weights_that_accelerate_brings_for_each_call_give_the_same(models, random_model, variant, grads):
    accelerate = pytest.importorskip("accelerate", reason="needs the hf extra")
    name, _, memory = variant.partition(" with ROSA ")
    model = wrapped(random_model(variant=name, n_layer=2, vocab_size=V, memory=memory or None))
    accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.set_grad_enabled(grads):
        assert torch.equal(model(IDS).logits, models(variant)(IDS).logits)
    assert torch.equal(greedy(model, IDS[:1]), greedy(models(variant), IDS[:1]))


def test_gradients_of_inner_states_are_kept(models):
    out = models("v8")(IDS, output_hidden_states=True)
    for hidden in out.hidden_states[:-1]:
        hidden.retain_grad()
    out.logits.sum().backward()
    assert all(hidden.grad.abs().sum() > 0 for hidden in out.hidden_states[:-1])
    models("v8").zero_grad()


def test_what_other_models_take_is_ignored_where_it_says_nothing_and_refused_where_it_would(models):
    model, mask = models("v8"), torch.ones_like(IDS)
    plain = model(IDS).logits
    for nothing in (
        {"attention_mask": mask, "position_ids": torch.arange(9)[None], "cache_position": torch.arange(9)},
        {"token_type_ids": torch.zeros_like(IDS), "output_attentions": False, "past_key_values": None},
        {"attention_mask": mask.bool(), "inputs_embeds": None, "is_causal": True},
    ):
        assert torch.equal(model(IDS, **nothing).logits, plain)
    for wrong, message in (
        ({"output_attentions": True}, "no attention weights"),
        ({"past_key_values": object()}, "give what it returns as state"),
        ({"attention_mask": mask[:, :8]}, r"attention_mask: wanted \(4, 9\), got \(4, 8\)"),
        ({"attention_mask": mask[:, None, None]}, r"attention_mask: wanted \(4, 9\), got \(4, 1, 1, 9\)"),
        ({"attention_mask": 0 * mask}, "padding alone"),
        ({"position_ids": torch.zeros(3, 9)}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "a batch of one row, got 4 rows"),
        ({"inputs_embeds": torch.zeros(4, 8, 32)}, r"inputs_embeds: wanted \(4, 9, 32\), got \(4, 8, 32\)"),
    ):
        with pytest.raises(DataError, match=message):
            model(IDS, **wrong)
    with pytest.raises(TypeError, match="attn_mask"):
        model(IDS, attn_mask=mask)
    with pytest.raises(DataError, match="input_ids or inputs_embeds, got neither"):
        model()


@pytest.mark.parametrize("variant", ALL)
def test_embeddings_stand_in_for_ids(models, variant):
    model = models(variant)
    embeddings = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert near(model(inputs_embeds=embeddings, attention_mask=LEFT).logits, model(IDS, LEFT).logits)
        expected = greedy(model, IDS, attention_mask=LEFT)
        for settings in ({}, {"use_cache": False}):
            found = greedy(model, inputs_embeds=embeddings, attention_mask=LEFT, **settings)
            assert torch.equal(found, expected[:, 9:])
        assert torch.equal(greedy(model, IDS, inputs_embeds=embeddings, attention_mask=LEFT), expected)
        soft = embeddings + 0.1 * embeddings.flip(2)
        if variant in ("v7", "rosa-lm"):
            assert not near(model(inputs_embeds=soft).logits, model(IDS).logits, 1e-3)
        else:
            with pytest.raises(DataError, match=f"a {variant} looks up by token id, .*; give input_ids"):
                model(inputs_embeds=soft)
        if variant in ("v8", "v8-hybrid", "v7a"):
            assert not near(model(IDS, inputs_embeds=soft).logits, model(IDS).logits, 1e-3)
        elif variant == "v7b":
            with pytest.raises(DataError, match="not the embeddings of these input_ids"):
                model(IDS, inputs_embeds=embeddings.flip(1))


# -- padding and packing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ALL)
def test_a_padded_sequence_is_as_it_is_alone(models, variant):
    model = models(variant)
    between = LEFT.clone()
    between[1, 2], between[1, 4] = 1, 0  # a token, padding, the others
    with torch.no_grad():
        for mask in (LEFT, LEFT.flip(1), between):
            out, without_state = model(IDS, mask), model(IDS, mask, use_cache=False)
            more = torch.cat((mask, torch.ones(4, 1, dtype=mask.dtype)), dim=1)
            after = model(IDS[:, :1], more, state=out.state)  # the padding left no trace in the state
            for row, at in enumerate(mask.bool()):
                alone = IDS[row : row + 1, at]
                expected = model(torch.cat((alone, IDS[row : row + 1, :1]), dim=1)).logits[0]
                assert near(out.logits[row, at], expected[:-1])
                assert near(without_state.logits[row, at], expected[:-1])
                assert near(after.logits[row], expected[-1:])
            assert not out.logits[mask == 0].any()
        other = torch.where(LEFT.bool(), IDS, 0)
        assert torch.equal(model(other, LEFT).logits, model(IDS, LEFT).logits)


@pytest.mark.parametrize("variant", ["v8", "v7b"])
def test_gradients_of_a_padded_batch_are_those_of_its_sequences(models, variant):
    model = copy.deepcopy(models(variant))
    labels = torch.where(LEFT.bool(), IDS, -100)
    model(IDS, LEFT, labels=labels).loss.backward()
    padded = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()
    n_targets = sum(LENGTHS) - len(LENGTHS)
    for row, n in enumerate(LENGTHS):
        alone = IDS[row : row + 1, 9 - n :]
        model(alone, labels=alone, num_items_in_batch=torch.tensor(n_targets)).loss.backward()
    for name, part in model.named_parameters():
        assert (part.grad is None) == (name not in padded)
        assert part.grad is None or near(part.grad, padded[name])


@pytest.mark.parametrize("variant", ALL)
def test_prompts_of_unequal_length_are_continued_as_each_alone(models, variant):
    model = models(variant)
    for settings in ({}, {"num_beams": 2}):
        alone = [greedy(model, IDS[i : i + 1, 9 - n :], **settings)[0, n:] for i, n in enumerate(LENGTHS)]
        left = greedy(model, IDS, attention_mask=LEFT, **settings)
        assert torch.equal(left[:, 9:], torch.stack(alone))
    expected = greedy(model, IDS, attention_mask=LEFT)[:, 9:]
    right = torch.stack([row.roll(n - 9) for row, n in zip(IDS, LENGTHS, strict=True)])
    for settings in ({}, {"use_cache": False}, {"inputs_embeds": model.get_input_embeddings()(right)}):
        found = greedy(model, right, attention_mask=LEFT.flip(1), **settings)
        assert torch.equal(found[:, 9:], expected)


@pytest.mark.parametrize("variant", ["v7 with ROSA memory", "v7b with ROSA memory"])
def test_what_a_text_has_said_before_reaches_logits_loss_and_state(models, variant):
    model, ids = models(variant), IDS.remainder(3) + 3
    with torch.no_grad():
        out = model(ids, labels=ids, use_cache=True)
        want, state = model.rwkv(ids)
        assert near(out.logits, want)
        assert near(out.loss, F.cross_entropy(want[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        assert not near(model.rwkv.head(model.base_model(ids).last_hidden_state), want, 1e-3)
        assert near(model(ids[:, :4], state=out.state).logits, model.rwkv(ids[:, :4], state)[0])
        for rows in ([2, 0, 1, 3], [1, 1, 2, 1]):
            found = model(ids[rows], state=model._reorder_cache(out.state, torch.tensor(rows))).logits
            assert near(found, model.rwkv(ids, state)[0][rows])


def test_a_mask_is_made_of_the_pads_or_not_at_all(models):
    model = models("v8")
    padded = torch.where(LEFT.bool(), IDS, PAD)
    expected = greedy(model, padded, attention_mask=LEFT, eos_token_id=2, min_new_tokens=6)
    assert torch.equal(greedy(model, padded, eos_token_id=2, min_new_tokens=6), expected)
    assert torch.equal(greedy(model, IDS), greedy(model, IDS, attention_mask=torch.ones_like(IDS)))
    assert torch.equal(
        greedy(model, IDS, attention_mask=LEFT, use_cache=False), greedy(model, IDS, attention_mask=LEFT)
    )


@pytest.mark.parametrize("variant", ALL)
def test_packed_documents_do_not_see_each_other(models, variant):
    model, row = models(variant), IDS[:1]
    parts = ((0, 3), (3, 4), (4, 9))
    marks = [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 4, 9], dtype=torch.int32)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2]], dtype=torch.int32)},
    ]
    with torch.no_grad():
        start = model(IDS[1:2]).state
        for mark in marks:
            out = model(row, **mark)
            for a, b in parts:
                assert near(out.logits[:, a:b], model(row[:, a:b]).logits)
            whole = torch.cat((row[:, 4:], IDS[1:2, :1]), dim=1)
            assert near(model(IDS[1:2, :1], state=out.state).logits, model(whole).logits[:, -1:])
            goes_on = model(row, state=start, **mark).logits
            assert near(goes_on[:, :3], model(row[:, :3], state=start).logits)
            assert near(goes_on[:, 3:], out.logits[:, 3:])
        two = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 2, 0, 1, 2, 3]])  # padded, then two documents
        mask = torch.tensor([[1] * 9, [0] * 2 + [1] * 7])
        both = model(IDS[:2], mask, position_ids=two).logits
        assert near(both[:1], model(row).logits)
        assert near(both[1:, 2:5], model(IDS[1:2, 2:5]).logits)
        assert near(both[1:, 5:], model(IDS[1:2, 5:]).logits)


def test_one_long_document_does_not_make_many_short_ones_long(models, monkeypatch):
    model, lengths = models("v7"), [64, *[2] * 40]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    read = []
    hidden_states = heron.RWKV.hidden_states
    monkeypatch.setattr(
        heron.RWKV,
        "hidden_states",
        lambda self, ids, *given, **named: (read.append(ids.numel()), hidden_states(self, ids, *given, **named))[1],
    )
    with torch.no_grad():
        model(positions % V, position_ids=positions, use_cache=False)
    assert sum(read) <= 2 * sum(lengths)
    assert len(read) == 2


# -- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v8", "v8-hybrid"])
def test_every_way_to_generate(models, variant):
    model = models(variant)
    sampled = greedy(model, IDS, attention_mask=LEFT, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (12, 15)
    told = greedy(
        model, IDS, attention_mask=LEFT, n=4, return_dict_in_generate=True, output_hidden_states=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    assert len(told.scores) == len(told.hidden_states) == 4
    assert all(layer.shape == (4, 1, 32) for layer in told.hidden_states[1])
    goes_on = greedy(model, told.sequences[:, -1:], n=2, state=told.past_key_values)
    assert torch.equal(goes_on[:, 1:], greedy(model, IDS, attention_mask=LEFT)[:, 13:])
    mask = torch.cat((LEFT, torch.ones(4, 4, dtype=LEFT.dtype)), dim=1)
    assert torch.equal(
        greedy(model, told.sequences[:, -1:], n=2, state=told.past_key_values, attention_mask=mask), goes_on
    )
    copies = greedy(model, told.sequences[:, -1:], n=2, state=told.past_key_values, num_beams=2, num_return_sequences=2)
    assert copies.shape == (8, 3)
    assert greedy(model, n=3).shape == (1, 4)  # from the start of a text
    with pytest.raises(ValueError, match="stateful"):
        greedy(model, IDS[:1], prompt_lookup_num_tokens=2)


# -- the vocabulary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_mean", [True, False])
@pytest.mark.parametrize("variant", ["v7", "v8", "v7b", "v8-hybrid"])
def test_the_vocabulary_grows_and_shrinks_with_every_table(models, tmp_path, variant, by_mean):
    model = copy.deepcopy(models(variant))
    with torch.no_grad():
        before = model(IDS).logits
        assert model.resize_token_embeddings(45, mean_resizing=by_mean) is model.get_input_embeddings()
        after = model(IDS).logits
    assert near(after[..., :V], before)
    assert model.config.vocab_size == model.rwkv.config.vocab_size == after.shape[-1] == 45
    tables = {name: part for name, part in model.rwkv.named_parameters() if part.shape[0] == 45}
    assert len(tables) == {"v7": 2, "v8": 4, "v7b": 8, "v8-hybrid": 8}[variant]
    for name, table in tables.items():
        if name not in ("emb.weight", "head.weight"):
            start = table[:V].mean(dim=0) if by_mean else table.new_tensor(1.0)
            assert near(table[V:], start.expand_as(table[V:])) or name.endswith("s_emb.weight")
        elif not by_mean and name == "emb.weight":
            assert table[V:].abs().max() <= (1e-4 if variant != "v8-hybrid" else 6)
    model(torch.tensor([[44, 40]]), labels=torch.tensor([[44, 40]])).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(heron.load(tmp_path)(IDS)[0], after)
    model.resize_token_embeddings(40)
    with torch.no_grad():
        assert near(model(IDS).logits[..., :V], before)
    model.resize_token_embeddings(pad_to_multiple_of=16)
    assert model.config.vocab_size == model.rwkv.config.vocab_size == 48
    with pytest.raises(DataError, match="0 to 47"):
        model(torch.tensor([[48]]))


def test_embeddings_can_be_exchanged(models):
    model = copy.deepcopy(models("v8"))
    emb, head = torch.nn.Embedding(V, 32), torch.nn.Linear(32, V, bias=False)
    model.set_input_embeddings(emb)
    model.set_output_embeddings(head)
    assert model.base_model.get_input_embeddings() is model.rwkv.emb is emb
    assert model.get_output_embeddings() is model.rwkv.head is head


def test_tied_weights_are_one_and_saved_once(random_model, tmp_path):
    model = wrapped(random_model(variant="v8", n_layer=1, vocab_size=V), tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.rwkv.head.weight is again.rwkv.emb.weight
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(heron.load(tmp_path)(IDS)[0], model(IDS).logits)
    again.resize_token_embeddings(V + 3)
    assert again.rwkv.head.weight is again.rwkv.emb.weight


# -- saving, loading, training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_in_every_way(models, tmp_path, variant):
    model = models(variant)
    model.save_pretrained(tmp_path / "whole")
    expected = model(IDS)
    for settings in ({}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **settings)
        assert torch.equal(again(IDS).logits, expected.logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert {part.dtype for part in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    assert HeronForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert heron.load(tmp_path / "half").head.weight.dtype == torch.bfloat16

    body = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert type(body) is HeronModel
    body.save_pretrained(tmp_path / "body")
    body = HeronModel.from_pretrained(pretrained_model_name_or_path=tmp_path / "body")
    assert torch.equal(body(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"missing keys: rwkv\.head\.weight"):
        HeronForCausalLM.from_pretrained(tmp_path / "body")


def test_weights_on_disk_are_read_as_they_are_needed(models, tmp_path):
    model = models("v7b")
    model.save_pretrained(tmp_path)
    places = {"rwkv.emb": "cpu", "rwkv.blocks": "disk", "rwkv.ln_out": "cpu", "rwkv.head": "disk"}
    again = HeronForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert near(again(IDS, labels=IDS).loss, model(IDS, labels=IDS).loss)


def test_a_copy_shares_nothing_and_a_model_has_each_parameter_once(models):
    model = models("v8")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.base_model.rwkv is other.rwkv is not model.rwkv
        assert torch.equal(other.base_model(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    assert model.num_parameters() == sum(part.numel() for part in model.rwkv.parameters())
    assert set(model.state_dict()) == {f"rwkv.{name}" for name in model.rwkv.state_dict()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_with_and_without_checkpointing(models, variant):
    model = copy.deepcopy(models(variant)).train()

    def gradients():
        model.zero_grad()
        model(IDS, LEFT, labels=IDS).loss.backward()
        return {name: part.grad for name, part in model.named_parameters()}

    kept = gradients()
    unused = {name for name, grad in kept.items() if grad is None}
    assert {name.split(".")[-1][0] for name in unused} <= {"v"} or variant == "v8-hybrid"  # block 0 has no v0 v1 v2
    for enable, disable in (
        (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable),
        (model.activation_checkpointing_enable, model.activation_checkpointing_disable),
    ):
        enable({"use_reentrant": True})
        assert model.is_activation_checkpointing
        again = gradients()
        disable()
        assert not model.rwkv.grad_checkpoint
        assert all(grad is None or torch.equal(grad, again[name]) for name, grad in kept.items())
    for settings in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(ConfigError, match="computes every block again"):
            model.activation_checkpointing_enable(**settings)


def test_the_loss_is_of_the_labels_that_count(models):
    model = models("v8")
    labels = IDS.masked_fill(IDS.eq(IDS[0, 3]), -100)
    out = model(IDS, labels=labels)
    n = int((labels[:, 1:] != -100).sum())
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert near(out.loss, expected)
    assert near(model(IDS, labels=labels, num_items_in_batch=2 * n).loss, expected / 2)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert near(model(IDS, shift_labels=shifted).loss, expected)
    assert model.train()(IDS, labels=labels).logits is None
    assert model(IDS).logits is not None
    model.eval()
