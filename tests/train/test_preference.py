"""DPO: its loss and gradient are those of the formula; references are computed once; kills leave no trace."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import heron
from heron import cli, report
from heron.checkpoint import run
from heron.data import conversations, template
from heron.data.packs import Packs
from heron.data.pairs import encode_pair
from heron.errors import CheckpointError, ConfigError, DataError
from heron.train import preference
from heron.train.step import Learner
from tests.train.faults import StopAt

CPU = torch.device("cpu")
BETA = 0.3
ROWS = [
    {
        "prompt": f"What is {n} and {n % 3}? ",
        "chosen": f"It is {n + n % 3}.",
        "rejected": "No idea at all" + "!" * (n % 4),
    }
    for n in range(20)
]


@pytest.fixture
def settings(tmp_path, random_model):
    heron.save(random_model(n_layer=2, vocab_size=256), tmp_path / "base.pth")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def make(method="full", **changes):
        finetune = heron.FinetuneConfig(method=method, objective="dpo", dpo_beta=BETA, **changes.pop("finetune", {}))
        values = dict(
            model=str(tmp_path / "base.pth"), data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "run"),
            ctx_len=192, micro_bsz=2, max_steps=4, warmup_steps=1, lr_init=1e-3, weight_decay=0.0, threads=1,
            device="cpu", dtype="fp32", sample_tokens=4, finetune=finetune,
        )  # fmt: skip
        return heron.TrainConfig(**{**values, **changes})

    return make


def packs_of(config, packed=True):
    tokenizer = heron.tokenizer.load("bytes")
    data = conversations.load(
        config.data, tokenizer, config.ctx_len, template.load("rwkv"), val_fraction=0.0, encode=encode_pair
    )
    return data, Packs(data.samples, config.ctx_len, 0, packed, together=2)


def fit(config):
    return heron.Trainer(config, say=lambda line: None).fit()


@pytest.mark.parametrize("changes", [{}, dict(variant="v7b"), dict(memory="memory")], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(settings, random_model, changes):
    config = settings(accumulate=2, grad_clip=0.0)
    data, packs = packs_of(config)
    reference_model = random_model(n_layer=2, vocab_size=256, **changes).double()
    model = random_model(seed=1, n_layer=2, vocab_size=256, **changes).double()
    learner = Learner(copy.deepcopy(model), config, CPU)

    def answer(network, number):
        ids, learned, _ = data.samples[number]
        ids, learned = torch.from_numpy(ids), torch.from_numpy(learned)
        logprobs = F.log_softmax(network(ids[None, :-1])[0][0], -1).gather(1, ids[1:, None])[:, 0]
        return logprobs[learned[1:]].sum()

    batches = [packs.batch(2 * i, 2) for i in range(2)]
    if model.memory is not None:
        batches = [(x, y, model.recall(x, None, cu)[0], cu, numbers) for x, y, _, cu, numbers in batches]
    chosen = sorted({int(n) for *_, numbers in batches for n in numbers if n >= 0 and n % 2 == 0})
    with torch.no_grad():
        reference = torch.stack([answer(reference_model, n) for n in range(len(data.samples))])
    learner.pairs.references = preference.References(reference, torch.zeros(0))
    margins = [BETA * (answer(model, n) - reference[n] - answer(model, n + 1) + reference[n + 1]) for n in chosen]
    expected = -torch.stack(margins).sigmoid().log().mean()
    expected.backward()
    loss = learner.gradients(batches)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, leaf in model.named_parameters():
        if leaf.grad is not None:
            got = learner.trained.get_parameter(name).grad
            torch.testing.assert_close(got, leaf.grad, rtol=1e-9, atol=1e-11, msg=name)
    accuracy, margin = map(float, learner._figures)
    assert accuracy == pytest.approx(sum(float(m.detach()) > 0 for m in margins) / len(margins))
    assert margin == pytest.approx(float(torch.stack(margins).mean().detach()), rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora", "state"])
def test_a_run_learns_to_prefer_and_says_so(settings, method):
    if method == "lora":
        pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    config = settings(method, max_steps=8, lr_init=3e-2 if method != "full" else 3e-3, eval_every=4)
    assert fit(config) == "finished"
    steps, validations = report.read_log(Path(config.out))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[0]["margin"] == pytest.approx(0.0, abs=1e-4)
    assert steps[-1]["loss"] < 0.5
    assert steps[-1]["accuracy"] == 1.0
    assert steps[-1]["margin"] > 0.3
    assert validations[-1].keys() >= {"val_loss", "val_accuracy", "val_margin"}
    assert validations[-1]["val_loss"] < math.log(2)


def test_references_are_computed_once_and_belong_to_their_base_and_data(settings, tmp_path, monkeypatch, random_model):
    config = settings(max_steps=2)
    assert fit(config) == "finished"
    kept = Path(config.out) / preference.FILE
    before = kept.read_bytes()
    monkeypatch.setattr(preference, "_of", lambda *_: pytest.fail("they are computed again"))
    refer = Learner.refer

    def refers(learner, *given):
        with monkeypatch.context() as inside:
            inside.setattr(Learner, "whole", lambda _: pytest.fail("the model is gathered for nothing"))
            return refer(learner, *given)

    monkeypatch.setattr(Learner, "refer", refers)
    assert fit(settings(max_steps=3)) == "finished"
    assert kept.read_bytes() == before
    for content in (None, b"{", before.replace(b'"fp32"', b'"bf16"', 1)):
        kept.unlink(missing_ok=True)
        if content is not None:
            kept.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"reference.json: is missing, damaged or of another base, data or dtype"
        ):
            fit(settings(max_steps=4))


def test_processes_meet_for_references_whether_they_see_the_file_of_the_first_or_not(settings, tmp_path):
    config = settings(max_steps=1, save_every=1)
    assert fit(config) == "finished"
    data, packs = packs_of(config)
    key = json.loads((tmp_path / "run" / preference.FILE).read_text())
    met, others = [], settings(out=str(tmp_path / "other"), weights=key["weights"])
    data = SimpleNamespace(fingerprint=key["data"], samples=data.samples, val_samples=None)
    ranks = SimpleNamespace(first=lambda work: [met[-1].append(work), work()][1])
    (tmp_path / "other").mkdir()
    for _ in range(2):  # the second time the file is there, as it is for a process that comes late
        met.append([])
        preference.references(others, key["base"], data, (packs, None), run.newest(tmp_path / "run"), None, ranks)
    assert len(met[0]) == len(met[1]) == 2


def test_another_base_has_references_of_its_own(settings, tmp_path, random_model):
    fit(settings(max_steps=1))
    first = json.loads((tmp_path / "run" / preference.FILE).read_text())
    heron.save(random_model(seed=3, n_layer=2, vocab_size=256), tmp_path / "base.pth")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    (tmp_path / "run" / "rwkv-final.pth").unlink()
    (tmp_path / "run" / "rwkv-init.pth").unlink(missing_ok=True)
    fit(settings(max_steps=1))
    second = json.loads((tmp_path / "run" / preference.FILE).read_text())
    assert first["base"] != second["base"]
    assert first["train"] != second["train"]


@pytest.mark.parametrize("packed", [True, False])
def test_a_pair_shares_a_sample_and_comes_chosen_first(settings, packed):
    data, packs = packs_of(settings(), packed)
    seen = []
    for tokens, targets, _, cu_seqlens, numbers in packs.each_once(1):
        assert len(cu_seqlens) == len(numbers) + 1
        for begin, end, number in zip(cu_seqlens, cu_seqlens[1:], numbers.tolist(), strict=False):
            if number >= 0:
                ids, learned, _ = data.samples[number]
                n = len(ids) - 1
                assert tokens[0, begin : begin + n].tolist() == ids[:-1].tolist()
                assert int((targets[0, begin:end] != -100).sum()) == int(learned[1:].sum())
        there = numbers[numbers >= 0].tolist()
        assert there == [n for first in there[::2] for n in (first, first + 1)]
        seen += there
    assert sorted(seen) == list(range(2 * len(ROWS)))


def test_of_messages_the_last_answer_alone_counts():
    tokenizer = heron.tokenizer.load("bytes")
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bcd"},
        {"role": "user", "content": "e"},
    ]
    fields = {"prompt": prompt, **{name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}}
    found = encode_pair(fields, tokenizer, 200, template.load("rwkv"), "assistant")
    texts = [bytes(ids[learned].tolist()).decode() for ids, learned in found.samples]
    assert ["chosen" in texts[0], "rejected" in texts[1], "bcd" in texts[0] + texts[1]] == [True, True, False]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 1: wanted prompt, chosen and rejected; rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 1: rejected: is the same as chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "prompt and rejected: completion: the answer is empty"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "chosen: wanted what prompt is"),
        ({"prompt": "a", "chosen": "b" * 300, "rejected": "c"}, "nothing that is learned fits ctx_len 192"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_line(settings, row, part):
    config = settings()
    Path(config.data).write_text(json.dumps(row))
    with pytest.raises(DataError, match=part):
        packs_of(config)


def test_settings_that_contradict_are_refused():
    for changes, name in ((dict(mix="a.txt:0.1"), "mix"), (dict(loss="all"), "loss all")):
        with pytest.raises(ConfigError, match=f"finetune, {name}: belongs to objective likelihood"):
            heron.FinetuneConfig(objective="dpo", **changes)
    with pytest.raises(ConfigError, match="dpo_beta: wanted more than 0"):
        heron.FinetuneConfig(objective="dpo", dpo_beta=0.0)
    with pytest.raises(ConfigError, match="tbptt 64: pairs"):
        heron.TrainConfig(max_steps=1, tbptt="64", finetune=heron.FinetuneConfig(objective="dpo"))


def test_the_command_shows_pairs(settings, capsys, tmp_path):
    config = settings()
    words = ("finetune", config.model, "--data", config.data, "--objective", "dpo", "--show", "2", "--dry_run")
    assert cli.main([*words, "--out", str(tmp_path / "ft"), "--ctx_len", "192"]) == 0
    out = capsys.readouterr().out
    assert "pairs: 20" in out
    assert "No idea at all" in out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(settings, tmp_path, method):
    """Kills at any instant are for tests/torture/kills_of_finetuning.py."""
    if method == "lora":
        pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")
    whole, stopped = (settings(method, out=str(tmp_path / name)) for name in ("whole", "stopped"))
    assert fit(whole) == "finished"
    assert StopAt(stopped, 2).fit() == "preempted"
    assert fit(stopped) == "finished"
    curves = [report.read_log(Path(config.out))[0] for config in (whole, stopped)]
    wanted = ("step", "loss", "grad_norm", "accuracy", "margin")
    assert [[record[name] for name in wanted] for record in curves[0]] == [
        [record[name] for name in wanted] for record in curves[1]
    ]
