"""DeepEmbed tables beside an adapter: which rows learn, what a run leaves of them, and what can not be."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import heron
from heron import dist, report
from heron.checkpoint import table_rows
from heron.checkpoint.adapters import base_fingerprint, load_adapter, merged, save_adapter
from heron.commands import estimate
from heron.config import AdapterConfig
from heron.data import conversations, template
from heron.data.packs import Packs
from heron.errors import CheckpointError, ConfigError
from heron.model.adapters import add_adapter
from heron.model.deep_embed import DeepEmbed
from heron.model.plain import own_parameters
from heron.train import loop
from heron.train.step import Learner

peft = pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")

CPU = torch.device("cpu")
IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
ROWS, LOW_RANK = dict(rank=4, tables="rows"), dict(rank=4, tables="low-rank")
FORMS = {"v8": {}, "4x": dict(deep_embed_4x=True), "v7b": dict(variant="v7b")}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr(loop, "plot", lambda folders, out: None)


@pytest.fixture
def settings(tmp_path, random_model):
    """A function: what fine-tunes a random base on conversations of few letters, beside an adapter and its tables."""

    def make(adapter=None, objective="likelihood", model=None, **changes):
        base, data = tmp_path / "base.pth", tmp_path / "chat.jsonl"
        heron.save(random_model(n_layer=2, vocab_size=256, **(model or {})), base)
        names = ("chosen", "rejected") if objective == "dpo" else ("completion",)
        talks = [{"prompt": f"What is {n}?", **{name: f"It is {n + len(name)}." for name in names}} for n in range(30)]
        data.write_text("\n".join(map(json.dumps, talks)))
        finetune = heron.FinetuneConfig(method="lora", adapter=adapter or ROWS, objective=objective)
        values = dict(
            model=str(base), data=str(data), out=str(tmp_path / "run"), ctx_len=96, micro_bsz=2, max_steps=4,
            warmup_steps=1, lr_init=1e-2, weight_decay=0.0, threads=1, device="cpu", dtype="fp32", sample_tokens=4,
            finetune=finetune,
        )  # fmt: skip
        return heron.TrainConfig(**{**values, **changes})

    return make


def fit(config, said=None):
    """Train to the end; gives the learner."""
    learners = []
    trainer = heron.Trainer(config, say=(lambda line: None) if said is None else said.append)
    rest = trainer._loop
    trainer._loop = lambda parts, progress: (learners.append(parts.learner), rest(parts, progress))[1]
    assert trainer.fit() == "finished"
    return learners[0]


def packs_of(config):
    tokenizer = heron.tokenizer.load("bytes")
    data = conversations.load(config.data, tokenizer, config.ctx_len, template.load("rwkv"))
    return Packs(data.samples, config.ctx_len, 0, True)


def tables_of(model):
    return {f"{name}.weight": part.weight for name, part in model.named_modules() if isinstance(part, DeepEmbed)}


class _Loss(torch.nn.Module):
    """The loss of a model, as a module that torch.func can call with other weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *given):
        return self.model.loss(*given)


# -- a step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, dict(tables="host"), dict(accumulate=2)], ids=str)
def test_rows_beside_an_adapter_get_the_gradients_of_whole_tables(settings, random_model, form, changes):
    config = settings(grad_clip=0.0, **changes)
    model = random_model(n_layer=2, vocab_size=256, **FORMS[form])
    by_hand, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    add_adapter(by_hand, config.finetune.adapter)
    torch.manual_seed(3)
    learner, packs = Learner(model, config, CPU), packs_of(config)
    assert {name for name, part in by_hand.named_parameters() if part.requires_grad} == {
        name for name, part in learner.trained.named_parameters()
    }
    batches = [packs.batch(2 * i, 2) for i in range(config.accumulate)]
    counts = [int((targets != -100).sum()) for _, targets, *_ in batches]
    for (tokens, targets, _, cu_seqlens), count in zip(batches, counts, strict=True):
        (by_hand.loss(tokens, targets, cu_seqlens) * count / sum(counts)).backward()
    loss = learner.gradients(batches)
    ids = learner.tables.ids
    assert ids.tolist() == torch.cat([tokens.flatten() for tokens, *_ in batches]).unique().tolist()
    for (name, table), gradient in zip(tables_of(by_hand).items(), learner.tables.gradients(), strict=True):
        torch.testing.assert_close(gradient, table.grad[ids], rtol=1e-6, atol=1e-9)
        assert gradient.any(), name
    for name, leaf in learner.trained.named_parameters():
        if "enn" not in name and "emb" not in name:
            torch.testing.assert_close(leaf.grad, by_hand.get_parameter(name).grad, rtol=1e-6, atol=1e-9)
    learner.update(loss, 1e-2, math.inf)
    others = torch.ones(256, dtype=torch.bool).index_fill(0, ids, False)
    for name, table in tables_of(learner.model).items():
        assert torch.equal(table[others], before[name][others])
        assert not torch.equal(table[ids], before[name][ids])
    (group,) = (group for group in learner.optimizer.param_groups if group["name"] == "table")
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 0.0)


@pytest.mark.parametrize("changes", [{}, dict(tables="host", tables_state="bf16")], ids=str)
def test_rows_learn_beside_a_base_in_bf16_and_stay_in_fp32(settings, random_model, changes):
    config = settings(dtype="bf16", weights="bf16", **changes)
    learner, packs = Learner(random_model(n_layer=2, vocab_size=256), config, CPU), packs_of(config)
    losses = [float(learner.update(learner.gradients([packs.batch(0, 2)]), 1e-2, math.inf)[0]) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert {table.dtype for table in tables_of(learner.model).values()} == {torch.float32}
    assert learner.model.emb.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_low_rank_update_of_tables_is_neutral_at_first_and_has_the_gradients_of_its_definition(
    settings, random_model, form, kind
):
    config = settings(dict(LOW_RANK, kind=kind, alpha=6), grad_clip=0.0)
    model = random_model(n_layer=2, vocab_size=256, **FORMS[form])
    frozen, names, before = copy.deepcopy(model.state_dict()), list(tables_of(model)), model(IDS)[0].detach()
    learner, packs = Learner(model, config, CPU), packs_of(config)
    assert torch.equal(model(IDS)[0], before)
    factors = {name: part for name, part in learner.trained.named_parameters() if ".lora_embedding_" in name}
    assert len(factors) == 2 * len(names)
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(std=0.1)
        for name, part in learner.trained.named_parameters():
            if ".lora_B." in name:
                part.zero_()

    tokens, targets, _, cu_seqlens = packs.batch(0, 2)
    update = 6 / 4 if kind == "lora" else 6 / 4**0.5
    tables, mine = dict(frozen), {name: factor.detach().requires_grad_() for name, factor in factors.items()}
    for name in names:
        A, B = (mine[f"{name.removesuffix('.weight')}.lora_embedding_{part}.default"] for part in "AB")
        tables[name] = frozen[name] + update * (B @ A).t()
    plain = heron.RWKV(model.config)
    call = torch.func.functional_call(
        _Loss(plain), {f"model.{name}": part for name, part in tables.items()}, (tokens, targets, cu_seqlens)
    )
    call.backward()
    loss = learner.gradients([(tokens, targets, None, cu_seqlens)])
    assert torch.allclose(loss, call.detach(), atol=1e-6)
    for name, factor in mine.items():
        torch.testing.assert_close(factors[name].grad, factor.grad, rtol=1e-4, atol=1e-7)
        assert factor.grad.any(), name
    learner.update(loss, 1e-2, math.inf)
    (group,) = learner.optimizer.param_groups
    assert (group["name"], group["weight_decay"]) == ("adapter", 0.0)
    after = {name: weight for _, name, weight in own_parameters(model)}
    assert all(torch.equal(after[name], frozen[name]) for name in after)


def test_a_low_rank_update_learns_the_same_over_tables_on_the_host(settings, random_model):
    losses = []
    for changes in (dict(tables="device"), dict(tables="host"), dict(tables="host", dtype="bf16", weights="bf16")):
        config = settings(LOW_RANK, **changes)
        torch.manual_seed(0)
        learner, packs = Learner(random_model(n_layer=2, vocab_size=256), config, CPU), packs_of(config)
        losses.append(
            [float(learner.update(learner.gradients([packs.batch(0, 2)]), 1e-2, math.inf)[0]) for _ in range(4)]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=2e-2)
    assert losses[0][-1] < losses[0][0]


ROADS = [
    dict(tables="host", compile="off"),
    dict(dtype="bf16", weights="bf16", compile="off"),
    dict(dtype="bf16", weights="bf16", compile="graph"),
    dict(dtype="bf16", weights="bf16", compile="on", tables="host"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("adapter", [ROWS, LOW_RANK], ids=str)
def test_on_a_gpu_tables_learn_the_same_wherever_they_lie_compiled_and_replayed(settings, random_model, adapter):
    def losses_of(n_steps=8, **changes):  # the first are not replayed; with frozen tables the last is 3 to 6 % off
        config = settings(adapter, device="cuda", **changes)
        torch.manual_seed(0)
        model = random_model(n_layer=2, n_embd=64, head_size=64, vocab_size=256)
        learner, packs = Learner(model, config, torch.device("cuda")), packs_of(config)
        batches = [packs.batch(2 * step, 2) for step in range(n_steps)]
        losses = [float(learner.update(learner.gradients([batch]), 2e-2, math.inf)[0]) for batch in batches]
        assert learner.compiled.value == config.compile
        assert len(learner._passes.graphs) == (config.compile == "graph")
        return losses

    wanted = losses_of(compile="off")
    for road in ROADS:
        assert losses_of(**road) == pytest.approx(wanted, rel=1.5e-2 if "dtype" in road else 1e-4), road


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(model=dict(variant="v7b"), adapter=dict(ROWS, kind="miss")),
        dict(objective="dpo", lr_init=1e-3, adapter=dict(ROWS, kind="pissa")),
        dict(tbptt="32", adapter=dict(ROWS, kind="dora")),
    ],
    ids=str,
)
def test_a_run_leaves_the_rows_that_occurred_and_they_merge(settings, heron_, tmp_path, changes):
    config = settings(**changes)
    learner = fit(config)
    base, run = heron.load(config.model), Path(config.out)
    rows = table_rows.read(run / "adapter" / table_rows.FILE)
    wanted, before = tables_of(learner.model), tables_of(base)
    assert rows.tables.keys() == wanted.keys()
    assert 0 < len(rows.ids) < 100
    for name, table in wanted.items():
        moved = (table != before[name]).any(1).nonzero().flatten()
        assert set(moved.tolist()) <= set(rows.ids.tolist())
        assert torch.equal(rows.tables[name], table[rows.ids])
    assert not all(torch.equal(table, before[name]) for name, table in wanted.items())

    with torch.no_grad():
        own = learner.model(IDS)[0]
        adapter = load_adapter(heron.load(config.model), run)
        torch.testing.assert_close(adapter.model(IDS)[0], own, rtol=1e-5, atol=1e-5)
        save_adapter(adapter, tmp_path / "again")
        assert load_file(tmp_path / "again" / table_rows.FILE).keys() == {"ids", *wanted}
        torch.testing.assert_close(
            merged(heron.load(config.model), tmp_path / "again")(IDS)[0], own, rtol=1e-5, atol=1e-5
        )
        assert heron_("merge", config.model, run, tmp_path / "merged.pth")[0] == 0
        torch.testing.assert_close(heron.load(tmp_path / "merged.pth")(IDS)[0], own, rtol=1e-5, atol=1e-5)
        (run / "adapter" / table_rows.FILE).rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"table_rows.safetensors: no such file, and the adapter was trained with"
    ):
        load_adapter(heron.load(config.model), run)


@pytest.mark.parametrize("changes", [{}, dict(model=dict(variant="v7b"), tables="host")], ids=str)
def test_a_run_leaves_a_low_rank_update_of_tables_that_peft_and_a_merge_take(settings, heron_, tmp_path, changes):
    config = settings(LOW_RANK, lr_init=3e-2, **changes)
    learner = fit(config)
    tensors = load_file(Path(config.out) / "adapter" / "adapter_model.safetensors")
    assert sum("lora_embedding_A" in name for name in tensors) == len(tables_of(heron.load(config.model)))
    assert not (Path(config.out) / "adapter" / table_rows.FILE).exists()
    with torch.no_grad():
        own = learner.model(IDS)[0]
        beside = load_adapter(heron.load(config.model), config.out).model(IDS)[0]
        torch.testing.assert_close(beside, own, rtol=1e-5, atol=1e-5)
        assert heron_("merge", config.model, config.out, tmp_path / "merged.pth")[0] == 0
        together = heron.load(tmp_path / "merged.pth")
        torch.testing.assert_close(together(IDS)[0], own, rtol=1e-5, atol=1e-5)
    before = tables_of(heron.load(config.model))
    for name, table in tables_of(together).items():
        assert (table - before[name]).abs().max() > 1e-2
        assert torch.equal(table[128:], before[name][128:])  # the data are ASCII
    facts = [line.split(maxsplit=1)[0] for line in heron_("info", config.out)[1].splitlines()]
    assert (facts.count("group"), facts.count("tables")) == (1, 0)

    pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    from heron.hf import HeronConfig, HeronForCausalLM

    hf = HeronForCausalLM(HeronConfig(**learner.model.config.to_dict(), eos_token_id=None)).eval()
    hf.rwkv.load_state_dict(heron.load(config.model).state_dict())
    with torch.no_grad():
        of_peft = peft.PeftModel.from_pretrained(hf, Path(config.out) / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(of_peft, own, rtol=1e-5, atol=1e-5)


def test_every_command_takes_an_adapter_with_rows(settings, heron_, tmp_path):
    config = settings()
    fit(config)
    assert heron_("merge", config.model, config.out, tmp_path / "merged.pth")[0] == 0
    words = ("--prompt", "What is", "--max_tokens", 8, "--temperature", 0, "--tokenizer", "bytes", "--device", "cpu")
    beside = heron_("generate", config.model, "--adapter", config.out, *words)
    assert beside == heron_("generate", tmp_path / "merged.pth", *words)
    assert beside != heron_("generate", config.model, *words)
    facts = [line.split(maxsplit=1) for line in heron_("info", config.out)[1].splitlines()]
    n = len(table_rows.read(Path(config.out) / "adapter" / table_rows.FILE).ids)
    assert ["tables", f"{n} rows of each of 2, in table_rows.safetensors"] in facts
    assert sum(name == "group" and text.startswith("table: lr 0.0001 ") for name, text in facts) == 1
    code, _, err = heron_("merge", tmp_path / "merged.pth", config.out, tmp_path / "twice.pth")
    assert (code, err.count("\n"), "with fingerprint" in err) == (1, 1, True)
    assert base_fingerprint(heron.load(config.model)) in err


@pytest.mark.parametrize("adapter", [ROWS, LOW_RANK], ids=str)
@pytest.mark.parametrize("changes", [{}, dict(tables="host", dtype="bf16", weights="bf16")], ids=str)
def test_a_run_that_was_killed_goes_on_bit_for_bit(settings, tmp_path, adapter, changes):
    config = settings(adapter, save_every=2, keep=3, **changes)
    fit(config)
    again = heron.TrainConfig.from_dict({**config.to_dict(), "out": str(tmp_path / "again")})
    shutil.copytree(config.out, again.out)
    shutil.rmtree(Path(again.out) / "checkpoints" / "step-00000004")
    shutil.rmtree(Path(again.out) / "adapter")
    said = []
    fit(again, said)
    assert not any("not bit-exact" in line for line in said)
    for name in ("adapter_model.safetensors", table_rows.FILE)[: 1 + (adapter is ROWS)]:
        ends = [load_file(Path(out) / "adapter" / name) for out in (config.out, again.out)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    steps = [[record["loss"] for record in report.read_log(Path(run.out))[0]] for run in (config, again)]
    assert steps[0] == steps[1]


# -- what can not be ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_refused(settings, random_model, tmp_path):
    with pytest.raises(ConfigError, match="adapter.tables: wanted frozen, rows, .*got 'row'. Did you mean 'rows'"):
        settings(dict(rank=4, tables="row"))
    with pytest.raises(ConfigError, match="adapter.tables rows: variant v7 has no DeepEmbed tables; leave it out"):
        Learner(random_model(variant="v7", vocab_size=256), settings(), CPU)
    with pytest.raises(ConfigError, match="adapter.tables low-rank: variant v7 has no DeepEmbed tables"):
        add_adapter(random_model(variant="v7"), AdapterConfig(**LOW_RANK))
    for kind in ("dora", "pissa", "miss"):
        with pytest.raises(ConfigError, match=f"low-rank: is for adapter.kind lora and rslora, got {kind}; use one of"):
            AdapterConfig(kind, **LOW_RANK)
    with pytest.raises(
        ConfigError, match=r"rank: 20 is more than the 16 that blocks.0.ffn.enn \(16 x 32\) has room for"
    ):
        add_adapter(random_model(vocab_size=16), AdapterConfig(rank=20, tables="low-rank"))
    with pytest.raises(ConfigError, match="adapter.rank: wanted a whole number from 1 on, got 0"):
        AdapterConfig(rank=0, tables="low-rank")
    with pytest.raises(ConfigError, match="adapter.tables rows: several processes do not share the rows"):
        Learner(random_model(vocab_size=256), settings(), CPU, ranks=dist.Ranks(0, 2))
    fit(settings())
    with pytest.raises(
        CheckpointError, match=r"this run trains by adapter.tables rows, not frozen; name another --out"
    ):
        fit(settings(dict(rank=4), max_steps=5))
    model = heron.load(settings().model)
    adapter = add_adapter(model, settings().finetune.adapter)
    with pytest.raises(CheckpointError, match="rows of tables were trained, so the model is no more its base"):
        save_adapter(adapter, tmp_path / "new", row_ids=torch.tensor([3]))


def test_damaged_rows_are_one_clear_error_and_change_nothing(settings, random_model):
    config = settings()
    fit(config)
    folder = Path(config.out) / "adapter"
    path, content = folder / table_rows.FILE, (folder / table_rows.FILE).read_bytes()

    def refused(message, model=None):
        model = model or heron.load(config.model)
        before = copy.deepcopy(tables_of(model))
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, folder)
        assert all(torch.equal(table, before[name]) for name, table in tables_of(model).items())

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("table_rows.safetensors: damaged, or of another adapter: wanted the sha256")
    path.write_bytes(content)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})  # as peft writes it again
    refused("table_rows.safetensors: lies beside an adapter that says nothing of it")


def test_rows_of_another_model_are_refused(random_model):
    model = random_model(n_layer=2)
    rows = table_rows.rows_of(model, torch.tensor([1, 5]))
    for other, message in (
        (random_model(n_layer=1), "blocks.1.ffn.enn.weight is a table of the file and not this model"),
        (random_model(n_layer=2, n_embd=48), r"blocks.0.ffn.enn.weight: wanted \(2, 48\) on this model, got \(2, 32\)"),
        (random_model(n_layer=2, vocab_size=4), "ids: wanted 0 to 3, got others"),
    ):
        with pytest.raises(CheckpointError, match=message):
            table_rows.put_rows(other, rows, "rows")


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [(ROWS, {}), (ROWS, dict(tables="host", tables_state="bf16")), (LOW_RANK, dict(tables="host"))],
    ids=str,
)
def test_an_estimate_counts_what_trains_of_tables(settings, random_model, adapter, changes):
    config = settings(adapter, **changes)
    model = random_model(n_layer=2, vocab_size=256)
    learner, packs = Learner(copy.deepcopy(model), config, CPU), packs_of(config)
    learner.update(learner.gradients([packs.batch(0, 2)]), 0.0, math.inf)
    found = estimate.estimate(config, model.config)
    state = learner.optimizer.state
    tables = [(table, *state.get(table, {}).values()) for table in tables_of(learner.model).values()]
    of_tables = [sum(part.nbytes for part in parts) for parts in zip(*tables, strict=True)]
    on_host = config.tables == "host"
    everything = {*learner.model.parameters(), *learner.trained.parameters()}
    assert found.tables == (sum(of_tables) if on_host else 0)
    assert found.parameters == sum(part.nbytes for part in everything) - (of_tables[0] if on_host else 0)
    moments = sum(part.nbytes for parts in state.values() for part in parts.values())
    assert found.optimizer == moments - (sum(of_tables[1:]) if on_host else 0)
