"""The harness with a local task, against sums by hand. Skipped where lm-eval and what it needs are not installed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import heron
from heron import tokenizer
from heron.errors import ConfigError

LETTERS = tokenizer.load("bytes")
WHY = "lm-eval is not installed (pip install 'heron-rwkv[eval]')"


@pytest.fixture
def harness(monkeypatch, tmp_path):
    for name, value in (("HF_HOME", str(tmp_path / "hf")), ("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    return pytest.importorskip("lm_eval.evaluator", reason=WHY, exc_type=ImportError)


def test_without_the_package_the_module_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "heron.compat.lm_eval", raising=False)
    with pytest.raises(ConfigError, match=r"heron-rwkv\[eval\]"):
        import heron.compat.lm_eval  # noqa: F401


def logprob(model, context, continuation):
    ids = torch.tensor([[0, *context, *continuation]])
    with torch.no_grad():
        lines = model(ids[:, :-1])[0][0].log_softmax(-1)
    return lines.gather(1, ids[0, 1:, None])[len(context) :].sum().item()


TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}]
"""


def test_a_local_task_and_the_three_questions_that_tasks_ask(harness, random_model, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from heron.compat import lm_eval as module

    model = random_model(vocab_size=256)
    language_model = module.HeronLM(model, LETTERS, rows=2)

    rows = [dict(question=f"Which{i}", choices=["one", "two"], answer=i % 2) for i in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(TASK.replace("FILE", str(tmp_path / "q.jsonl")))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = harness.simple_evaluate(language_model, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for row in rows:
        scores = [logprob(model, row["question"].encode(), b" " + c.encode()) for c in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert results["results"]["local"]["acc,none"] == pytest.approx(right / len(rows))

    def ask(kind, *arguments):
        return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]

    [first, second] = language_model.loglikelihood(ask("loglikelihood", ("ab ", "c"), ("", "x")))
    assert first[0] == pytest.approx(logprob(model, b"ab", b" c"), abs=1e-4)
    assert second[0] == pytest.approx(logprob(model, b"", b"x"), abs=1e-4)

    [whole] = language_model.loglikelihood_rolling(ask("loglikelihood_rolling", ("heron " * 300,)))
    assert whole == pytest.approx(logprob(model, b"", b"heron " * 300), rel=1e-4)

    settings = {"until": ["e"], "max_gen_toks": 9}
    texts = language_model.generate_until(ask("generate_until", ("one", settings), ("two", settings), ("", settings)))
    for prompt, text in zip(("one", "two", ""), texts, strict=True):
        ids = [0, *prompt.encode()]
        assert text == heron.generate(model, LETTERS, ids, 9, temperature=0, stop="e")
    with pytest.raises(ConfigError, match="num_beams"):
        language_model.generate_until(ask("generate_until", ("one", {"num_beams": 2})))
