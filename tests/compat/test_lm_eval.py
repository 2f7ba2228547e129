"""The harness with local tasks, against sums by hand. Skipped where lm-eval and what it needs are not installed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import heron
from heron import tokenizer
from heron.errors import ConfigError
from tests.tokenizer.tokenizer_kinds import load

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


def logprob(model, context, continuation, start=0):
    ids = torch.tensor([[start, *context, *continuation]])
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


@pytest.fixture
def asked(harness, random_model):
    """A function: kind and arguments -> what a model of bytes, or of another tokenizer, answers."""
    from lm_eval.api.instance import Instance

    from heron.compat.lm_eval import HeronLM

    def answer(kind, *arguments, tokens=LETTERS):
        model = random_model(vocab_size=tokens.vocab_size, n_layer=1)
        requests = [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]
        return model, getattr(HeronLM(model, tokens, rows=2), kind)(requests)

    return answer


@pytest.mark.parametrize("kind", ["llama", "metaspace", "world"])
def test_a_continuation_has_the_ids_of_the_text(asked, kind):
    tokens = load(kind)
    pairs = [("the heron waits at the", " river"), ("the heron waits at the ", "river"), ("", "the"), ("a", "")]
    model, scores = asked("loglikelihood", *pairs, tokens=tokens)
    whole, context = tokens.encode("the heron waits at the river"), tokens.encode("the heron waits at the")
    assert whole[: len(context)] == context
    assert scores[0][0] == pytest.approx(logprob(model, context, whole[len(context) :], tokens.eod), abs=1e-4)
    assert scores[1] == pytest.approx(scores[0])  # spaces at the border are the continuation's
    assert scores[2][0] == pytest.approx(logprob(model, [], tokens.encode("the"), tokens.eod), abs=1e-4)
    assert scores[3] == (0.0, True)
    _, [nothing, text] = asked("loglikelihood_rolling", ("",), ("the heron",), tokens=tokens)
    assert nothing == 0.0
    assert text == pytest.approx(logprob(model, [], tokens.encode("the heron"), tokens.eod), abs=1e-4)


def test_a_long_text_is_read_with_all_that_memory_found_in_it(harness, random_model):
    from lm_eval.api.instance import Instance

    from heron.compat.lm_eval import HeronLM

    model, text = random_model(vocab_size=256, n_layer=1, memory="memory"), b"herons and hero " * 80
    [whole] = HeronLM(model, LETTERS).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text.decode(),), 0)]
    )
    assert whole == pytest.approx(logprob(model, b"", text), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"until": None, "max_gen_toks": 9}, dict(temperature=0)),
        ({"until": "e", "max_new_tokens": 9, "do_sample": False, "temperature": 0.7}, dict(temperature=0, stop="e")),
        ({"until": [], "max_tokens": 9, "temperature": 0.8}, dict(temperature=0.8, top_p=1.0)),
        ({"max_gen_toks": 9, "do_sample": True, "top_k": 3, "top_p": 0.9}, dict(top_k=3, top_p=0.9)),
        ({"max_gen_toks": 9, "num_beams": 1, "repetition_penalty": 1.0, "min_p": None}, dict(temperature=0)),
    ],
)
def test_settings_of_tasks(asked, settings, same):
    model, [text] = asked("generate_until", ("one", settings))
    assert text == heron.generate(model, LETTERS, [0, *b"one"], 9, **same)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"repetition_penalty": 1.1}, {"stop": "x"}])
def test_a_setting_that_would_change_the_text_is_refused(asked, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        asked("generate_until", ("one", settings))


def test_the_harness_finds_the_model_by_its_name(harness, random_model, tmp_path):
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    import heron.compat.lm_eval

    path = tmp_path / "x.pth"
    heron.save(random_model(vocab_size=256, n_layer=1), path)
    made = get_model("heron").create_from_arg_string(
        f"pretrained={path},tokenizer=bytes,dtype=bf16", {"batch_size": "3", "max_batch_size": None, "device": "cpu"}
    )
    assert (made._rows, made._model.emb.weight.dtype, made.device.type) == (3, torch.bfloat16, "cpu")
    assert made.tokenizer_name == "heron-bytes"
    for arguments, words in (
        ({"pretraind": "x"}, "mean 'pretrained'"),
        ({}, "wanted pretrained=FILE"),
        ({"pretrained": "x", "dtype": "int8"}, "dtype"),
        ({"pretrained": "x", "batch_size": "none"}, "batch_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            get_model("heron").create_from_arg_obj(arguments)

    task = TASK.replace("FILE", str(tmp_path / "q.jsonl")).replace("multiple_choice", "generate_until")
    task = "\n".join(line for line in task.splitlines() if "choice" not in line and "delimiter" not in line)
    task = task.replace("acc", "exact_match") + "\ngeneration_kwargs: {until: null, max_gen_toks: 3}\n"
    (tmp_path / "local.yaml").write_text(task)
    (tmp_path / "q.jsonl").write_text(json.dumps(dict(question="Which?", answer="b")) + "\n")
    results = harness.simple_evaluate(
        "heron", f"pretrained={path},tokenizer=bytes", tasks=["local"], apply_chat_template=True, device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert results["results"]["local"]["exact_match,none"] == 0
    [sample] = results["samples"]["local"]
    assert sample["arguments"][0][0] == "User: Which?\n\nAssistant:"
    assert len(sample["resps"][0][0].encode()) <= 9


def test_errors_of_ours_are_one_line_at_the_harness_s_command_line(harness, monkeypatch):
    from heron.compat import lm_eval as module

    def failing():
        raise ConfigError("x.pth: not there")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", failing)
    with pytest.raises(SystemExit, match=r"heron: x\.pth: not there"):
        module.main()


def test_messages_become_the_template_of_a_conversation(harness, random_model):
    from heron.compat.lm_eval import HeronLM

    made = HeronLM(random_model(vocab_size=256, n_layer=1), LETTERS)
    history = [
        {"role": "system", "content": "Be kind. "},
        {"role": "user", "content": "one\n\n\ntwo"},
        {"role": "assistant", "content": "three"},
    ]
    text = "System: Be kind.\n\nUser: one\ntwo\n\nAssistant: three"
    assert made.apply_chat_template(history) == text + "\n\nAssistant:"
    assert made.apply_chat_template(history, add_generation_prompt=False) == text
    assert made.chat_template(True).endswith("Assistant:")
    with pytest.raises(ConfigError, match="got 'tool'"):
        made.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(ConfigError, match="'chatml'"):
        made.chat_template("chatml")
