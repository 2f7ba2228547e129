"""transformers' Trainer and pipelines, and TRL's SFTTrainer, on heron.hf: tiny models, no network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import heron
from heron import cli

transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
pytest.importorskip("accelerate", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
from heron.hf import HeronConfig, HeronForCausalLM  # noqa: E402

TEXTS = ["the heron " * (1 + i % 5) for i in range(24)]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE without merges: 256 bytes, a pad and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def fresh(variant="v8", **changes):
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    return HeronForCausalLM(HeronConfig(variant=variant, n_layer=1, n_embd=64, vocab_size=258, **ids, **changes))


def settings(**changes):
    given = dict(
        max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, bf16=False, seed=0,
    )  # fmt: skip
    return given | changes


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# -- Trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tokenizer):
    """A function: (folder, settings of TrainingArguments) -> a Trainer that has trained on TEXTS."""

    def run(folder, model=None, collator=None, resume=None, **changes):
        collator = collator or transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        rows = [tokenizer(text) for text in TEXTS]
        arguments = transformers.TrainingArguments(folder, **settings(**changes))
        trainer = transformers.Trainer(model or fresh(), arguments, collator, rows, eval_dataset=rows[:5])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_a_stopped_run_goes_on_as_if_it_had_not(train, tmp_path):
    whole = train(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    assert losses(whole)[-1] < losses(whole)[0] - 2
    again = train(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])
    told = whole.evaluate()
    assert told["eval_loss"] < losses(whole)[0] - 2
    predicted = whole.predict(whole.eval_dataset)
    assert predicted.predictions.shape == (5, 50, 258)  # the logits alone: no state, no hidden states


def test_gradients_are_accumulated_by_token(train, tmp_path):
    """Batches of unequal length: a mean of means would weigh the tokens of short ones more."""
    results = []
    for rows, passes in ((4, 1), (2, 2), (1, 4)):
        trainer = train(
            tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=passes, max_steps=2, optim="sgd",
            lr_scheduler_type="constant", learning_rate=0.1,
        )  # fmt: skip
        results.append((losses(trainer), torch.cat([part.flatten() for part in trainer.model.parameters()])))
    for found, weights in results[1:]:
        assert found == pytest.approx(results[0][0], abs=1e-5)
        assert torch.allclose(weights, results[0][1], atol=1e-6)


def test_documents_that_a_collator_flattens_train_as_padded_ones(train, tmp_path):
    expected = losses(train(tmp_path))
    for marks in (
        dict(return_position_ids=True),
        dict(return_position_ids=False, return_seq_idx=True),
        dict(return_position_ids=False, return_flash_attn_kwargs=True),
    ):
        flattened = train(tmp_path, collator=transformers.DataCollatorWithFlattening(**marks))
        assert losses(flattened) == pytest.approx(expected, abs=1e-4)


def test_smoothed_labels_are_shifted(train, tmp_path):
    trainer = train(tmp_path, label_smoothing_factor=0.1, max_steps=1)
    batch = trainer.data_collator(trainer.train_dataset[:4])
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(**{name: part for name, part in batch.items() if name != "labels"}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    uniform = -logits.log_softmax(-1).mean(-1)[targets != -100].mean()
    assert torch.allclose(found, 0.9 * nll + 0.1 * uniform, atol=1e-5)


def test_half_precision_checkpointing_and_noise_on_embeddings(train, tmp_path):
    trainer = train(tmp_path, bf16=True, gradient_checkpointing=True, neftune_noise_alpha=1)
    assert losses(trainer)[-1] < losses(trainer)[0] - 1


# -- pipelines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v8", "v8-hybrid"])
def test_a_pipeline_writes_in_batches_what_it_writes_alone(tokenizer, variant):
    left = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    write = transformers.pipeline("text-generation", fresh(variant), tokenizer=left)
    prompts = ["the heron", "a", "hello world, you"]
    how = dict(max_new_tokens=5, do_sample=False)
    assert write(prompts, batch_size=3, **how) == [write(prompt, **how) for prompt in prompts]
    features = transformers.pipeline("feature-extraction", fresh(variant).base_model, tokenizer=left)
    assert torch.tensor(features("heron")).shape == (1, 5, 64)


# -- TRL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(tokenizer):
    """A function: (folder, rows, settings of SFTConfig) -> an SFTTrainer that has trained."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def run(folder, rows, peft_config=None, variant="v8", **changes):
        data = datasets.Dataset.from_list(rows)
        trainer = trl.SFTTrainer(
            fresh(variant), trl.SFTConfig(str(folder), **settings(**changes)), train_dataset=data,
            eval_dataset=data.select(range(4)), processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
        trainer.train()
        return trainer

    return run


PLAIN = [{"text": text} for text in TEXTS]
PAIRS = [{"prompt": f"q: {i}", "completion": " heron" * (1 + i % 3)} for i in range(24)]


def test_sft_without_padding_is_sft_with_it(sft, tmp_path):
    padded = sft(tmp_path, PLAIN)
    assert losses(padded)[-1] < losses(padded)[0] - 2
    free = sft(tmp_path, PLAIN, padding_free=True, max_length=None)
    assert losses(free) == pytest.approx(losses(padded), abs=2e-3)  # TRL rounds what it logs to thousandths
    assert free.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], abs=2e-3)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_sft_on_packs(sft, tmp_path, strategy):
    trainer = sft(tmp_path, PLAIN, packing=True, packing_strategy=strategy, max_length=32, variant="v8-hybrid")
    assert losses(trainer)[-1] < losses(trainer)[0] - 2


def test_documents_of_a_pack_do_not_see_each_other(sft, tmp_path, tokenizer):
    trainer = sft(tmp_path, PLAIN, packing=True, max_length=64, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    body = trainer.model.eval().base_model
    with torch.no_grad():
        given = {name: part for name, part in batch.items() if name not in ("labels", "attention_mask")}
        packed = body(**given).last_hidden_state
        for a, b in zip(starts, [*starts[1:], packed.shape[1]], strict=True):
            assert torch.allclose(packed[:, a:b], body(batch["input_ids"][:, a:b]).last_hidden_state, atol=1e-5)


def test_sft_learns_completions_alone_through_an_adapter(sft, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    packed = dict(packing=True, max_length=64)
    for changes in (dict(), packed, dict(gradient_checkpointing=True, gradient_accumulation_steps=2)):
        trainer = sft(tmp_path / "run", PAIRS, peft_config=config, max_steps=4, **changes)
        assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        assert 0 < (labels != -100).sum() < labels.numel() / 1.2
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    ids = torch.arange(2, 12)[None]
    assert torch.allclose(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)


def test_the_recipe_of_the_docs_trains_an_adapter_that_heron_merges(tmp_path, tokenizer, monkeypatch):
    for package in ("peft", "trl", "datasets"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    recipe = (Path(__file__).parents[2] / "docs/start/fine-tune.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    fresh().save_pretrained("folder")
    tokenizer.save_pretrained("folder")
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    names: dict = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 3
    assert cli.main(["merge", "folder", "runs/trl/adapter", "tuned.pth"]) == 0
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        trained = names["trainer"].model.eval()(input_ids=ids).logits
        assert torch.allclose(heron.load("tuned.pth")(ids)[0], trained, atol=1e-5)
        assert not torch.allclose(fresh()(input_ids=ids).logits, trained, atol=1e-3)
