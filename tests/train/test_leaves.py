"""Training beside frozen weights: what learns, what stays bit for bit, what it leaves; kills leave no trace."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import heron
from heron import dist, report
from heron.checkpoint import tuned_state
from heron.checkpoint.adapters import base_fingerprint, load_adapter, merged
from heron.commands import estimate
from heron.config.finetune import DEFAULTS
from heron.config.finetune_adapter import KINDS
from heron.errors import CheckpointError, ConfigError
from heron.model.adapters import adapter_parameters, add_adapter
from heron.model.plain import own_parameters
from heron.model.tuned_state import TunedState
from heron.train import leaves, loop
from heron.train.step import Learner
from tests.torture import kills, kills_of_finetuning
from tests.train.faults import Fault, faulty
from tests.train.finetuning import packs_of, settings_of

pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")

CPU = torch.device("cpu")
TALKS = [(f"What is {n} and {n % 3}?", f"It is {n + n % 3}.") for n in range(30)]
METHODS = {"lora": dict(method="lora", adapter=dict(rank=4)), "state": dict(method="state", token_shifts=True)}


@pytest.fixture
def chat(tmp_path):
    """A file of 30 conversations."""
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": question, "completion": answer}) for question, answer in TALKS))
    return path


@pytest.fixture
def base(tmp_path, random_model):
    """A function: fields of the model -> the file of a base whose vocabulary are the bytes."""

    def make(**changes):
        path = tmp_path / "base.pth"
        heron.save(random_model(**{**dict(n_layer=2, vocab_size=256), **changes}), path)
        return path

    return make


@pytest.fixture
def settings(tmp_path, chat, base):
    def make(method="lora", model=None, **changes):
        finetune = heron.FinetuneConfig(**{**METHODS.get(method, {}), **changes.pop("finetune", {})})
        return settings_of(tmp_path, model or base(), chat, finetune, **changes)

    return make


def fit(config, said=None):
    return heron.Trainer(config, say=(lambda line: None) if said is None else said.append).fit()


def weights_of(model):
    return {name: weight.detach().clone() for _, name, weight in own_parameters(model)}


# -- a step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_an_adapter_are_those_of_a_loop_made_by_hand(settings, random_model, kind):
    config = settings(finetune=dict(adapter=dict(rank=4, kind=kind)), accumulate=2, grad_clip=0.0)
    model, packs = random_model(n_layer=2, vocab_size=256), packs_of(config)
    by_hand = copy.deepcopy(model)
    torch.manual_seed(3)
    add_adapter(by_hand, config.finetune.adapter)
    learned = {name: leaf for name, leaf in adapter_parameters(by_hand).items() if leaf.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-3, betas=(0.9, 0.99), eps=1e-18, weight_decay=0.0, fused=True)
    torch.manual_seed(3)
    learner = Learner(model, config, CPU)
    for step in range(3):
        batches = [packs.batch(4 * step + 2 * i, 2) for i in range(2)]
        n_learned = sum(int((targets != -100).sum()) for _, targets, *_ in batches)
        for tokens, targets, _, cu_seqlens in batches:
            (by_hand.loss(tokens, targets, cu_seqlens) / (n_learned / int((targets != -100).sum()))).backward()
        loss = learner.gradients(batches)
        for name, leaf in learned.items():
            assert torch.equal(learner.trained.get_parameter(name).grad, leaf.grad), name
        optimizer.step()
        optimizer.zero_grad()
        learner.update(loss, 1e-3, math.inf)
    for name, leaf in learned.items():
        assert torch.equal(learner.trained.get_parameter(name), leaf), name


@pytest.mark.parametrize("model", [{}, dict(variant="v7b"), dict(memory="memory")], ids=str)
def test_gradients_of_a_state_are_those_of_conversations_one_by_one(settings, random_model, model):
    config = settings("state")
    model = random_model(n_layer=2, vocab_size=256, **model)
    learner, packs = Learner(copy.deepcopy(model), config, CPU), packs_of(config)
    tuned = TunedState(model.config, token_shifts=True)
    start = learner.leaves.state
    with torch.no_grad():
        for mine, other in zip(start.parameters(), tuned.parameters(), strict=True):
            mine.normal_(std=0.3)
            other.copy_(mine)
    tokens, targets, _, cu_seqlens = packs.batch(0, 2)
    recalled, _ = model.recall(tokens, None, cu_seqlens)
    learner.gradients([(tokens, targets, recalled, cu_seqlens)])
    total = 0.0
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if int((targets[:, begin:end] != -100).sum()):
            x, y = tokens[:, begin:end], targets[:, begin:end]
            total = total + model.loss(x, y, state=tuned(x)) * int((y != -100).sum())
    (total / int((targets != -100).sum())).backward()
    for mine, other in zip(start.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert float(start.wkv[0].grad.abs().max()) > 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, dict(dtype="bf16", weights="bf16", accumulate=2)], ids=str)
@pytest.mark.parametrize("tables", ["device", "host"])
def test_frozen_weights_have_no_gradients_moments_or_copies_and_stay_as_they_are(
    settings, random_model, method, changes, tables
):
    config, half = settings(method, **changes, tables=tables), "weights" in changes
    learner, packs = Learner(random_model(n_layer=2, vocab_size=256), config, CPU), packs_of(config)
    before = weights_of(learner.model)
    learned = {id(leaf) for leaf in learner.trained.parameters()}
    for step in range(2):
        batches = [packs.batch(2 * config.accumulate * step + 2 * i, 2) for i in range(config.accumulate)]
        loss = learner.gradients(batches)
        assert all(weight.grad is None for _, _, weight in own_parameters(learner.model))
        assert not any(weight.requires_grad for _, _, weight in own_parameters(learner.model))
        loss, _, bad, _ = learner.update(loss, 1e-2, math.inf)
        assert float(bad) == 0.0
    assert learner.network is learner.model
    assert {id(leaf) for leaf in learner.optimizer.state} == learned
    assert {leaf.dtype for leaf in learner.trained.parameters()} == {torch.float32}
    state = learner.optimizer.state.values()
    assert {part.dtype for parts in state for part in parts.values()} == {torch.float32}
    after = weights_of(learner.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    dtypes = {weight.dtype for name, weight in after.items() if tables == "device" or "enn" not in name}
    assert dtypes == {torch.bfloat16 if half else torch.float32}
    copies = {leaf.dtype for leaf in adapter_parameters(learner.model).values()}
    assert copies == (set() if method == "state" else dtypes)


def test_frozen_tables_on_the_host_are_only_looked_up(settings, random_model):
    losses = []
    for tables in ("device", "host"):
        config = settings(tables=tables)
        torch.manual_seed(0)
        learner, packs = Learner(random_model(n_layer=2, vocab_size=256), config, CPU), packs_of(config)
        steps = []
        for step in range(3):
            loss = learner.gradients([packs.batch(2 * step, 2)])
            if learner.tables is not None:
                assert learner.tables.rows
                assert not any(rows.requires_grad for rows in learner.tables.rows)
            steps.append(float(learner.update(loss, 1e-2, math.inf)[0]))
        losses.append(steps)
    assert learner.tables.rows == []
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_bf16_follow_their_leaves(settings, random_model, kind):
    config = settings(finetune=dict(adapter=dict(rank=4, kind=kind)), dtype="bf16", weights="bf16")
    model = random_model(n_layer=2, vocab_size=256)
    learner, packs = Learner(model, config, CPU), packs_of(config)
    before = {name: leaf.detach().clone() for name, leaf in learner.trained.named_parameters()}
    losses = [float(learner.update(learner.gradients([packs.batch(0, 2)]), 1e-2, math.inf)[0]) for _ in range(6)]
    assert losses[-1] < losses[0]
    for name, leaf in learner.trained.named_parameters():
        assert torch.equal(model.get_parameter(name), leaf.to(torch.bfloat16))
        assert torch.equal(leaf, before[name]) != leaf.requires_grad, name


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "fp32") for kind in KINDS), ("lora", "bf16"), ("pissa", "bf16")])
def test_a_run_leaves_an_adapter_that_merges_into_its_own_logits(settings, heron_, tmp_path, kind, dtype):
    config = settings(finetune=dict(adapter=dict(rank=4, kind=kind), base=dtype), dtype=dtype)
    found = []
    trainer = heron.Trainer(config, say=lambda line: None)
    rest = trainer._loop
    trainer._loop = lambda parts, progress: (found.append(parts.learner), rest(parts, progress))[1]
    assert trainer.fit() == "finished"
    assert not list(tmp_path.glob("run/*.pth"))
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        beside = load_adapter(heron.load(config.model), config.out).model(ids)[0]
        assert heron_("merge", config.model, config.out, tmp_path / "merged.pth")[0] == 0
        torch.testing.assert_close(heron.load(tmp_path / "merged.pth")(ids)[0], beside, rtol=1e-5, atol=1e-5)
        assert (beside - heron.load(config.model)(ids)[0]).abs().max() > 1e-3
        own = found[0].model(ids)[0].float()
        assert (own - beside).norm() < (1e-6 if dtype == "fp32" else 3e-2) * beside.norm()
    code, out, err = heron_("generate", config.model, "--adapter", config.out, "--prompt", "a", "--max_tokens", 2)
    assert (code, err) == (0, "")
    code, _, err = heron_("merge", tmp_path / "merged.pth", config.out, tmp_path / "twice.pth")
    assert (code, err.count("\n")) == (1, 1)
    assert "with fingerprint" in err


@pytest.mark.parametrize("method", METHODS)
def test_a_run_by_the_command_learns_and_says_what_it_trains(heron_, base, chat, tmp_path, method):
    words = ("finetune", base(), "--data", chat, "--method", method, "--out", tmp_path / "ft", "--device", "cpu")
    small = ("--ctx_len", 96, "--micro_bsz", 2, "--epochs", 4, "--threads", 1, "--dtype", "fp32", "--lr_init", 3e-2)
    kind = ("--adapter.rank", 4, "--adapter.targets", "ffn.key,att.output") if method == "lora" else ()
    code, out, err = heron_(*words, *small, *kind)
    assert (code, err) == (0, "")
    n_trained = {"lora": 2 * 4 * (32 + 50 + 32 + 32), "state": 2 * 2 * 16 * 16}[method]
    n_all = sum(map(torch.numel, heron.load(tmp_path / "base.pth").parameters()))
    assert f"trains      {n_trained:,} of {n_all:,} parameters: " in out
    steps, validations = report.read_log(tmp_path / "ft")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert not (tmp_path / "ft" / "rwkv-init.pth").exists()
    (checkpoint,) = (tmp_path / "ft" / "checkpoints").glob("step-*")
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert sizes["model.safetensors"] < 4 * n_trained + 10_000
    assert sizes["optimizer.safetensors"] < 8 * n_trained + 20_000
    config = heron.TrainConfig.from_yaml(tmp_path / "ft" / "config.yaml")
    assert (config.ctx_len, config.lr_final, config.weight_decay) == (96, DEFAULTS[method]["lr_final"], 0.0)

    assert heron_(*words)[1].count("nothing to do") == 1
    assert heron_("train", "--out", tmp_path / "ft", "--max_steps", len(steps) + 1)[0] == 0
    assert len(report.read_log(tmp_path / "ft")[0]) == len(steps) + 1
    flag = "--adapter" if method == "lora" else "--state"
    code, _, err = heron_("generate", tmp_path / "ft", "--prompt", "a")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path / 'base.pth'} {flag} {tmp_path / 'ft'}" in err
    assert heron_("generate", tmp_path / "base.pth", flag, tmp_path / "ft", "--prompt", "a", "--max_tokens", 2)[0] == 0
    assert base_fingerprint(heron.load(tmp_path / "base.pth")) in heron_("info", tmp_path / "ft")[1]


def test_validation_starts_from_the_state_and_the_file_holds_it(settings):
    config = settings("state", max_steps=5)
    fit(config)
    model, packs = heron.load(config.model), packs_of(config, 0.1)
    total = n = 0
    for number in range(len(packs._samples)):
        ids, learned, _ = packs._samples[number]
        targets = torch.from_numpy(ids[1:]).masked_fill(torch.from_numpy(~learned[1:]), -100)
        state, count = tuned_state(config.out, model.config, model=model), int(learned[1:].sum())
        with torch.no_grad():
            total += float(model.loss(torch.from_numpy(ids[None, :-1]), targets[None], state=state)) * count
        n += count
    assert report.read_log(Path(config.out))[1][-1]["val_loss"] == pytest.approx(total / n, rel=1e-5)


def test_dropout_is_of_training_alone(settings, tmp_path):
    config = settings(finetune=dict(adapter=dict(rank=4, dropout=0.5)), max_steps=3)
    fit(config)
    model = merged(heron.load(config.model), config.out)
    packs = packs_of(config, 0.1)
    score = heron.evaluate.evaluate_batches(model, packs.each_once(2))
    assert report.read_log(Path(config.out))[1][-1]["val_loss"] == pytest.approx(score.loss, rel=1e-5)
    other = settings(finetune=dict(adapter=dict(rank=4)), max_steps=3, out=str(tmp_path / "other"))
    fit(other)
    losses = [[record["loss"] for record in report.read_log(Path(run.out))[0]] for run in (config, other)]
    assert losses[0] != losses[1]


def test_what_is_dropped_depends_on_the_step_and_the_process_alone(settings, monkeypatch):
    config = settings(finetune=dict(adapter=dict(rank=4, dropout=0.5)))
    drawn = {}
    for first, rank in ((0, 0), (0, 1), (1, 0)):
        leaves.seed_dropout(config, first, rank)
        drawn[first, rank] = torch.rand(4).tolist()
        leaves.seed_dropout(config, first, rank)
        assert torch.rand(4).tolist() == drawn[first, rank]
    assert len(set(map(tuple, drawn.values()))) == 3
    before = torch.get_rng_state()
    for other in (settings(), settings("full")):
        leaves.seed_dropout(other, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)

    asked = []
    monkeypatch.setattr(loop, "seed_dropout", lambda config, first, rank: asked.append((first, rank)))
    trainer = heron.Trainer(config, say=lambda line: None)
    trainer.fit()
    assert asked == [(0, 0), (2, 0), (4, 0), (6, 0)]
    trainer.ranks = dist.Ranks(1, 2)
    learner = SimpleNamespace(gradients=lambda samples: torch.zeros(()))
    trainer._gradients(SimpleNamespace(batches=packs_of(config, 0.1), learner=learner), 8)
    assert asked[-1] == (8, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_step_is_gone_back_from(settings, method):
    config = settings(method, on_nonfinite="rewind", save_every=2, max_steps=5)
    trainer = heron.Trainer(config, say=lambda line: None)
    assert faulty(trainer, Fault(float("nan"), "loss", forward=4)).fit() == "finished"
    assert len({record["step"] for record in report.read_log(Path(config.out))[0]}) == 5


def test_a_run_with_copies_in_bf16_goes_on_bit_for_bit(settings, tmp_path):
    adapter = dict(rank=4, kind="pissa", dropout=0.1)
    config = settings(finetune=dict(adapter=adapter, base="bf16"), dtype="bf16", accumulate=2, save_every=2, keep=3)
    fit(config)
    shutil.copytree(config.out, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "again" / "adapter")
    said = []
    fit(dataclasses.replace(config, out=str(tmp_path / "again")), said)
    assert not any("not bit-exact" in line for line in said)
    ends = [load_file(Path(out) / "adapter" / "adapter_model.safetensors") for out in (config.out, tmp_path / "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    steps = [report.read_log(Path(out))[0] for out in (config.out, tmp_path / "again")]
    assert [record["loss"] for record in steps[0]] == [record["loss"] for record in steps[1]]


@pytest.mark.parametrize("method", ["lora", "state"])
def test_kills_leave_no_trace(tmp_path, method):
    result = kills.run(1, seed=1, max_steps=12, **kills_of_finetuning.settings(tmp_path, method))
    assert result.failures == []
    assert result.caught == result.control_trials > 0


# -- what can not be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--adapter.rank", 0), "adapter.rank: wanted a whole number from 1 on, got 0"),
        (("--adapter.rank", 99), "adapter.rank: 99 is more than the 32"),
        (("--adapter.targets", "ffn.kee"), "no linear layer of this v8 is named 'ffn.kee'. Did you mean 'ffn.key'?"),
        (("--adapter.targets", "enn"), "names blocks.0.ffn.enn, of the class DeepEmbed, and wanted are linear layers"),
        (("--adapter.kind", "lara"), "adapter.kind: wanted lora"),
        (("--token_shifts",), "token_shifts: belongs to method state, got method lora"),
        (("--base", "int2"), "base: wanted one of auto, fp32, bf16, int8, nf4, got 'int2'"),
        (("--base", "bf16", "--dtype", "fp32"), "base bf16 needs dtype bf16; dtype is fp32"),
        (("--base", "nf4"), "base nf4: is for a GPU, and the device is cpu; use --base fp32"),
        (("--base", "bf16", "--weights", "fp32"), "weights fp32 and base bf16 contradict each other"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_trained(heron_, base, chat, tmp_path, words, part):
    out = ("--out", tmp_path / "ft", "--method", "lora", "--device", "cpu", "--ctx_len", 96)
    code, _, err = heron_("finetune", base(), "--data", chat, *out, *words)
    assert (code, err.count("\n")) == (1, 1)
    assert part in err
    assert not list(tmp_path.glob("ft/checkpoints/*"))


def test_a_base_in_4_bits_may_be_planned_on_a_cpu(heron_, base, chat, tmp_path):
    words = ("--out", tmp_path / "ft", "--method", "lora", "--device", "cpu", "--base", "nf4", "--dtype", "bf16")
    code, out, err = heron_("finetune", base(), "--data", chat, *words, "--dry_run")
    assert code == 0, err
    assert "base: nf4" in out


def test_settings_of_another_method_are_refused():
    for settings in (dict(adapter=dict(rank=2)), dict(base="bf16"), dict(method="state", adapter={})):
        with pytest.raises(ConfigError, match="belongs to method lora|freezes no weights"):
            heron.FinetuneConfig(**settings)
    with pytest.raises(ConfigError, match="unknown key 'rnk'. Did you mean 'rank'"):
        heron.FinetuneConfig(method="lora", adapter=dict(rnk=2))
    with pytest.raises(ConfigError, match="init_from base.pth: beside a frozen base"):
        heron.TrainConfig(init_from="base.pth", max_steps=1, finetune=heron.FinetuneConfig(method="state"))


def test_a_model_without_weights_or_without_a_place_is_refused(settings, random_model):
    config = settings()
    with pytest.raises(ConfigError, match="method lora: trains beside weights, and the model names none"):
        fit(heron.TrainConfig.from_dict({**config.to_dict(), "model": heron.load(config.model).config.to_dict()}))
    with pytest.raises(ConfigError, match="state: a rosa-lm has no WKV state to tune"):
        Learner(random_model(variant="rosa-lm", rosa="qkv-1bit"), settings("state"), CPU)


def test_a_run_goes_on_beside_its_own_base_alone(settings, base, heron_):
    config = settings()
    fit(config)
    heron_("merge", config.model, config.out, Path(config.out).with_name("merged.pth"))
    more = {**config.to_dict(), "max_steps": 5}
    with pytest.raises(CheckpointError, match=r"merged.pth: has the fingerprint \w+, and this run began beside .*base"):
        fit(heron.TrainConfig.from_dict({**more, "model": str(Path(config.out).with_name("merged.pth"))}))
    with pytest.raises(CheckpointError, match="this run trains by method lora, not state; name another --out"):
        fit(heron.TrainConfig.from_dict({**more, "finetune": dict(method="state")}))
    with pytest.raises(CheckpointError, match="this run trains by adapter.rank 4, not 8; name another --out"):
        fit(heron.TrainConfig.from_dict({**more, "finetune": dict(method="lora", adapter=dict(rank=8))}))
    code, _, err = heron_("finetune", config.model, "--method", "state", "--out", config.out)
    assert (code, err.count("holds a run of method lora, not state; name another --out")) == (1, 1)
    said = []
    fit(heron.TrainConfig.from_dict({**more, "finetune": dict(method="lora", adapter=dict(rank=4, alpha=8))}), said)
    assert any("not bit-exact because adapter.alpha was None and is 8" in line for line in said)


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [("lora", {}), ("lora", dict(dtype="bf16", weights="bf16")), ("state", dict(tables="host"))],
    ids=str,
)
def test_an_estimate_knows_what_is_frozen(settings, random_model, method, changes):
    config = settings(method, **changes, ctx_len=48)
    model = random_model(n_layer=1, vocab_size=256)
    learner = Learner(copy.deepcopy(model), config, CPU)
    learner.update(learner.gradients([packs_of(config).batch(0, 2)]), 0.0, math.inf)
    found = estimate.estimate(config, model.config)
    tables = {module.weight for module in learner.model.modules() if isinstance(module, torch.nn.Embedding)}
    on_host = tables - {learner.model.emb.weight} if "tables" in changes else set()
    all_of_it = {*learner.model.parameters(), *learner.trained.parameters()} - on_host
    assert found.parameters == sum(weight.nbytes for weight in all_of_it)
    assert found.tables == sum(weight.nbytes for weight in on_host)
    assert found.optimizer == sum(part.nbytes for parts in learner.optimizer.state.values() for part in parts.values())
    assert found.gradients == sum(leaf.nbytes for leaf, _ in learner.leaves.pairs)


@pytest.mark.parametrize("kind", ["dora", "pissa"])  # which look at the weights
def test_an_adapter_that_looks_at_weights_is_estimated(settings, random_model, kind):
    config = settings(finetune=dict(adapter=dict(rank=4, kind=kind)), model="unused.pth", ctx_len=8)
    assert estimate.estimate(config, random_model(n_layer=1, vocab_size=256).config).optimizer > 0
