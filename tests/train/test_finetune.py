"""Fine-tuning runs: what they learn from, that each learned token counts the same, and that kills leave no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import heron
from heron import report
from heron.data import conversations, template
from heron.data.packs import Packs
from heron.errors import ConfigError, HeronError
from heron.train import run_data
from heron.train.step import Learner
from tests.torture import kills
from tests.train.faults import Fault, faulty

SIZES = dict(n_layer=1, n_embd=32, head_size=16, vocab_size=256)
TALKS = [
    [
        ("user", f"What is {n} and {n % 3}?"),
        ("assistant", f"It is {n + n % 3}."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    for n in range(30)
]


@pytest.fixture
def chat(tmp_path):
    """A file of 30 conversations."""
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def settings(tmp_path, chat):
    def make(**changes):
        finetune = heron.FinetuneConfig(**changes.pop("finetune", {}))
        values = dict(
            model=heron.ModelConfig(**SIZES), data=str(chat), out=str(tmp_path / "run"), ctx_len=160, micro_bsz=2,
            max_steps=4, warmup_steps=1, lr_init=3e-3, threads=1, device="cpu", dtype="fp32", sample_tokens=8,
            finetune=finetune,
        )  # fmt: skip
        return heron.TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def base(tmp_path):
    """A base model's weights, with the bytes as its vocabulary."""
    torch.manual_seed(0)
    heron.save(heron.RWKV(heron.ModelConfig(**SIZES)), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def config_out(config):
    return Path(config.out)


def fit(config, said=None):
    return heron.Trainer(config, say=(lambda line: None) if said is None else said.append).fit()


# -- what counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", ["on", "off"])
def test_every_learned_token_counts_the_same_however_the_step_is_divided(settings, random_model, pack):
    found = {}
    for accumulate, micro_bsz in ((1, 6), (3, 2), (6, 1)):
        config = settings(accumulate=accumulate, micro_bsz=micro_bsz, finetune=dict(pack=pack))
        data = conversations.load(
            config.data, heron.tokenizer.load("bytes"), config.ctx_len, template.load("rwkv"), val_fraction=0.0
        )
        packs = Packs(data.samples, config.ctx_len, 0, pack == "on")
        learner = Learner(random_model(vocab_size=256).double(), config, torch.device("cpu"))
        batches = [packs.batch(first, micro_bsz) for first in range(0, 6, micro_bsz)]
        assert len({int((targets != -100).sum()) for _, targets, *_ in batches}) > (accumulate > 1)
        loss = learner.gradients(batches)
        found[accumulate] = (
            loss,
            {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None},
        )
    loss, gradients = found[1]
    for other, others in (found[3], found[6]):
        assert float(other) == pytest.approx(float(loss), rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=1e-6)


def test_the_loss_and_its_validation_are_those_of_the_learned_tokens(settings):
    config = settings(max_steps=1, lr_init=0.0, lr_final=0.0, val_data=str(settings().data), finetune=dict(pack="on"))
    fit(config)
    model = heron.load(config.out)
    data = conversations.load(
        config.data, heron.tokenizer.load("bytes"), config.ctx_len, template.load("rwkv"), val_fraction=0.0
    )
    total = n = 0
    for number in range(len(data.samples)):
        ids, learned, _ = data.samples[number]
        targets = torch.from_numpy(ids[1:]).masked_fill(torch.from_numpy(~learned[1:]), -100)
        count = int(learned[1:].sum())
        with torch.no_grad():
            total += float(model.loss(torch.from_numpy(ids[None, :-1]), targets[None])) * count
        n += count
    _, validations = report.read_log(config_out(config))
    assert validations[-1]["val_loss"] == pytest.approx(total / n, rel=1e-5)


def test_the_head_of_a_run_says_that_it_ends_within_its_warm_up(settings, tmp_path):
    few, enough = [], []
    fit(settings(max_steps=2, warmup_steps=10, lr_init=1e-2), few)
    (line,) = (line for line in few if line.startswith("warm-up"))
    assert "10 steps, which this run does not pass: its learning rate ends at" in line
    words = " ".join(few).split()
    assert words[words.index("at", words.index("warm-up")) + 1] == "0.0011,"  # 1 % and the tenth of 99 % of 1e-2
    assert "--epochs," in words
    fit(settings(max_steps=2, warmup_steps=1, out=str(tmp_path / "enough")), enough)
    assert not any(line.startswith("warm-up") for line in enough)


# -- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_answers_and_its_result_loads(heron_, base, chat, tmp_path):
    words = ("finetune", base, "--data", chat, "--out", tmp_path / "ft", "--device", "cpu", "--dtype", "fp32")
    small = ("--ctx_len", 160, "--micro_bsz", 2, "--lr_init", 1e-2, "--lr_final", 1e-3, "--epochs", 8, "--threads", 1)
    code, out, err = heron_(*words, *small)
    assert (code, err) == (0, "")
    assert "chat.jsonl: 30 rows (messages: 30)" in out
    assert "27 sequences in 14 samples" in out
    steps, validations = report.read_log(tmp_path / "ft")
    assert len(steps) == 8 * 14 // 2
    assert steps[-1]["loss"] < 0.3 * steps[0]["loss"]
    assert validations[-1]["val_loss"] < 0.3 * steps[0]["loss"]
    config = heron.TrainConfig.from_yaml(tmp_path / "ft" / "config.yaml")
    assert (config.finetune, config.max_steps, config.weight_decay) == (heron.FinetuneConfig(epochs=8), 56, 0.0)
    sample = next((tmp_path / "ft" / "samples").glob("*.txt")).read_text()
    assert "Assistant:" in sample

    code, out, _ = heron_("generate", tmp_path / "ft", "--prompt", "User: Sure?\n\nAssistant:", "--temperature", 0)
    assert out.startswith("User: Sure?\n\nAssistant: Yes.\n\n")
    assert heron_("finetune", base, "--data", chat, "--out", tmp_path / "ft")[1].count("nothing to do") == 1
    code, out, _ = heron_(*words[:2], "--out", tmp_path / "ft", "--epochs", 9)
    assert (code, len(report.read_log(tmp_path / "ft")[0])) == (0, 63)
    assert heron_("train", "--out", tmp_path / "ft", "--max_steps", 64)[0] == 0
    assert len(report.read_log(tmp_path / "ft")[0]) == 64
    code, _, err = heron_(*words[:2], "--out", tmp_path / "ft", "--epochs", 1)
    assert (code, err) == (1, f"heron: epochs 1: are 7 steps, and {tmp_path / 'ft'} is at step 64; give more\n")


def test_the_base_says_which_tokenizer_it_has(heron_, base, chat, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("User: a\n\nAssistant: b\n\nSystem: c ### Tool Output\n" * 40)
    made = ("train", "--data", text, "--tokenizer", "bpe:280", "--out", tmp_path / "base", "--max_steps", 1)
    sizes = ("--n_layer", 1, "--n_embd", 32, "--head_size", 16, "--ctx_len", 16, "--micro_bsz", 1, "--device", "cpu")
    assert heron_(*made, *sizes, "--sample_every", 0)[0] == 0
    words = (
        "finetune",
        tmp_path / "base",
        "--data",
        chat,
        "--out",
        tmp_path / "ft",
        "--max_steps",
        1,
        "--device",
        "cpu",
    )
    code, out, err = heron_(*words, "--ctx_len", 200)
    assert (code, err) == (0, "")
    assert heron.TrainConfig.from_yaml(tmp_path / "ft" / "config.yaml").tokenizer.endswith("tokenizer.json")
    assert heron_("generate", tmp_path / "ft", "--prompt", "User: a", "--max_tokens", 3)[0] == 0


def test_a_second_corpus_is_mixed_in(settings, tmp_path):
    (tmp_path / "old: text.txt").write_text("What the base was trained on. " * 40)
    said = []
    fit(settings(finetune=dict(mix=f"{tmp_path / 'old: text.txt'}:0.25"), max_steps=2), said)
    assert "0.25 of them from the second corpus" in " ".join(" ".join(said).split())


@pytest.mark.parametrize("model", [dict(variant="v7b"), dict(variant="v7", memory="memory"), dict(rosa="qkv-1bit")])
def test_models_whose_states_grow_learn_from_packs_too(settings, model, tmp_path):
    (tmp_path / "old.txt").write_text("What the base was trained on. " * 40)
    config = settings(model=heron.ModelConfig(**SIZES, **model), finetune=dict(mix=f"{tmp_path / 'old.txt'}:0.3"))
    assert fit(config) == "finished"
    assert "val_loss" in report.read_log(config_out(config))[1][-1]


def test_a_bad_batch_is_kept_and_passed_over(settings):
    config = settings(on_nonfinite="skip", accumulate=2)
    trainer = heron.Trainer(config, say=lambda line: None)
    assert faulty(trainer, Fault(float("nan"), "gradient", forward=3)).fit() == "finished"
    (kept,) = (config_out(config) / "bad").glob("*.safetensors")
    found = load_file(kept)
    assert found["tokens"].shape == found["targets"].shape == (2, 2 * 160)
    assert (found["targets"] == -100).any()


def test_kills_leave_no_trace(chat, tmp_path):
    (tmp_path / "old.txt").write_text("What the base was trained on. " * 40)
    finetune = heron.FinetuneConfig(mix=f"{tmp_path / 'old.txt'}:0.3")
    result = kills.run(3, seed=1, data=str(chat), finetune=finetune, ctx_len=160, max_steps=12, spike=0.0)
    assert result.failures == []
    assert result.caught == result.control_trials > 0


def test_other_data_and_other_packs_are_told_when_a_run_goes_on(settings, chat):
    fit(settings())
    chat.write_text(chat.read_text().replace("Sure?", "Sure!"))
    said = []
    fit(settings(max_steps=5, finetune=dict(pack="off")), said)
    assert any("not bit-exact because data was" in line for line in said)
    assert any("not bit-exact because pack was on and is off" in line for line in said)
    with pytest.raises(HeronError, match="with other settings: pack was off and is on"):
        fit(settings(max_steps=5))


# -- showing --------------------------------------------------------------------------------------------------------

SHOWN = """\
chat.jsonl, line 1: 76 tokens, 24 learned
masked   User: What is 0 and 0?\\n
         \\n
         Assistant:
ids      85 115 101 114 58 32 87 104 97 116 32 105 115 32 48 32 97 110 100 32 48
         63 10 10 65 115 115 105 115 116 97 110 116 58
learned   It is 0.\\n
         \\n
         User:
"""


def test_show_prints_what_is_learned_and_stops_there_with_dry_run(heron_, base, chat, tmp_path, monkeypatch):
    monkeypatch.chdir(chat.parent)
    words = ("finetune", base, "--data", "chat.jsonl", "--out", tmp_path / "ft", "--device", "cpu", "--show", 2)
    code, out, err = heron_(*words, "--dry_run")
    assert (code, err) == (0, "")
    assert out.startswith("chat.jsonl: 30 rows")
    shown = out.partition("\n")[2]
    assert shown.startswith(SHOWN)
    assert "[end of document]" in shown
    assert shown.count("chat.jsonl, line") == 2
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in out
    assert not (tmp_path / "ft").exists()


def test_show_colours_on_a_terminal(settings, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    config = settings(finetune=dict(show=1))
    heron.Trainer(config).preview()
    out = capsys.readouterr().out
    assert "\x1b[1;32mlearned   It is 0.\\n" in out
    assert "\x1b[2mmasked   User: What is 0 and 0?\\n" in out


def test_dry_run_prints_a_config_file_and_finds_bad_data(heron_, base, chat, tmp_path):
    words = ("finetune", base, "--data", chat, "--out", tmp_path / "ft", "--dry_run")
    code, out, _ = heron_(*words)
    assert code == 0
    config = heron.TrainConfig.from_dict(yaml.safe_load(out))
    assert (config.lr_init, config.ctx_len, config.tokenizer) == (2e-5, 1024, "bytes")
    with chat.open("a") as file:
        file.write('\n{"messages": [{"role": "assistant", "content": "x"}]}')
    code, _, err = heron_(*words)
    assert (code, err.count("\n")) == (1, 1)
    assert "line 31: messages[0].role: roles out of order" in err


def test_what_can_not_be_is_one_line(heron_, base, chat, settings, tmp_path):
    for words, part in (
        (("--out", tmp_path / "ft"), "wanted --data FILE"),
        (("--data", chat, "--method", "lara"), "wanted one of full, lora, state, got 'lara'. Did you mean 'lora'?"),
        (("--data", tmp_path / "no.jsonl", "--out", tmp_path / "ft"), "no such file"),
        (("--data", chat, "--tokenizer", "integers:9", "--out", tmp_path / "ft2"), "has numbers only"),
    ):
        code, _, err = heron_("finetune", base, "--device", "cpu", *words)
        assert (code, err.count("\n")) == (1, 1)
        assert part in err
    assert heron_("finetune")[0] == 2
    assert "is a preset, which has no weights" in heron_("finetune", "rwkv8-tiny", "--data", chat)[2]
    with pytest.raises(ConfigError, match="magic_prime 5: orders the samples of a binidx; drop it"):
        fit(settings(magic_prime=5))
    (text := tmp_path / "text.txt").write_text("a line of text\n" * 200)
    fit(heron.TrainConfig.from_dict({**settings().to_dict(), "finetune": None, "max_steps": 1, "data": str(text)}))
    code, _, err = heron_("finetune", base, "--data", chat, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (1, 1)
    assert "a run that does not learn from conversations" in err


def test_memory_recalls_of_a_conversation_what_it_does_alone(settings, chat):
    config = settings(model=heron.ModelConfig(**SIZES, memory="memory"))
    corpus = run_data.corpus(config, heron.tokenizer.load("bytes"), lambda line: None)
    found, of_val = run_data.recollections(config, config.model.memory, corpus)
    model = heron.RWKV(config.model)
    for samples, recalled in ((corpus.samples, found), (corpus.val_samples, of_val)):
        for number in range(len(samples)):
            ids = torch.from_numpy(samples[number].ids).unsqueeze(0)
            want, _ = model.recall(ids, None)
            assert torch.equal(recalled.at(samples.offsets[number : number + 1], ids.shape[1]), want)


def test_tables_on_the_host_learn_the_same(settings, tmp_path):
    curves = []
    for tables in ("device", "host"):
        config = settings(tables=tables, accumulate=2, out=str(tmp_path / tables))
        fit(config)
        curves.append([record["loss"] for record in report.read_log(config_out(config))[0]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
