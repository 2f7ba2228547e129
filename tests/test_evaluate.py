"""The score of a text against sums that are written out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import heron
from heron import cli, machine, tokenizer
from heron import evaluate as module
from heron.config import RosaConfig
from heron.data.corpora import Reading
from heron.errors import ConfigError, DataError
from heron.evaluate import evaluate, likelihood, loglikelihoods
from heron.model.memory import Documents, Recollection
from heron.ops import _build
from heron.ops.rosa import TokenIndex
from heron.report import scores
from tests.tokenizer.tokenizer_kinds import load


def literal(model, tokens, ctx_len):
    """Summed nats of every target, one window at a time, from the logits."""
    total = 0.0
    for start in range(0, len(tokens) - 1, ctx_len):
        window = torch.from_numpy(tokens[start : start + ctx_len + 1].astype(np.int64))
        with torch.no_grad():
            logits, _ = model(window[None, :-1])
        total += F.cross_entropy(logits[0].double(), window[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("mode", ["gpt", "rnn"])
@pytest.mark.parametrize("n_tokens", [7, 30])
def test_shares_together_are_the_score_of_all(random_model, monkeypatch, mode, n_tokens):
    monkeypatch.setattr(likelihood, "_TOKENS_PER_PASS", 8)
    model, tokens = random_model(), np.random.default_rng(n_tokens).integers(0, 37, n_tokens).astype(np.uint16)
    whole = evaluate(model, tokens, 4, mode=mode)
    shares = [evaluate(model, tokens, 4, mode=mode, share=(number, 3)) for number in range(3)]
    sums = [sum(score.loss * score.n_targets for score in shares), sum(score.n_targets for score in shares)]
    assert likelihood.together(shares[0], lambda _: sums).loss == pytest.approx(whole.loss, rel=1e-6)
    assert sums[1] == whole.n_targets == n_tokens - 1


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 17, 60])
@pytest.mark.parametrize("ctx_len", [1, 8, 100])
def test_each_target_counts_once(random_model, monkeypatch, n_tokens, ctx_len):
    monkeypatch.setattr(likelihood, "_TOKENS_PER_PASS", 24)  # three windows of 8 in a pass: the last pass is a part
    model = random_model()
    tokens = np.random.default_rng(n_tokens).integers(0, 37, n_tokens).astype(np.uint16)
    score = evaluate(model, tokens, ctx_len, n_bytes=3 * (n_tokens - 1))
    total = literal(model, tokens, ctx_len)
    assert score.n_targets == n_tokens - 1
    assert score.loss == pytest.approx(total / (n_tokens - 1), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / (3 * (n_tokens - 1)), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_windows_start_from_a_zero_state(random_model):
    model = random_model()
    tokens = np.random.default_rng(0).integers(0, 37, 9)
    again = np.concatenate([tokens, tokens[1:]])  # the second window begins with the last target of the first
    halves = evaluate(model, tokens, 8).loss, evaluate(model, again[8:], 8).loss
    assert evaluate(model, again, 8).loss == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_without_bytes_there_are_no_bits_per_byte(random_model):
    assert evaluate(random_model(), np.arange(9), 4).bits_per_byte is None


def test_the_model_is_left_as_it_was(random_model):
    model = random_model().train()
    evaluate(model, np.arange(9), 4)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_precision_of_the_run_is_used(random_model):
    model, tokens = random_model(), np.random.default_rng(0).integers(0, 37, 50)
    exact = evaluate(model, tokens, 16).loss
    rough = evaluate(model, tokens, 16, autocast=machine.autocast("bf16", torch.device("cpu"))).loss
    assert exact != rough
    assert exact == pytest.approx(rough, rel=0.02)


@pytest.mark.parametrize("tokens", [[], [3]])
def test_too_short_a_text_is_refused(random_model, tokens):
    with pytest.raises(DataError, match=f"at least 2 tokens, got {len(tokens)}"):
        evaluate(random_model(), np.array(tokens, dtype=np.int64), 4)


def test_an_id_outside_the_vocabulary_is_refused(random_model):
    with pytest.raises(DataError, match="vocab_size 37"):
        evaluate(random_model(), np.array([1, 2, 37, 3]), 4)


def test_a_window_without_length_is_refused(random_model):
    with pytest.raises(ConfigError, match="ctx_len: wanted at least 1, got 0"):
        evaluate(random_model(), np.arange(9), 0)


# -- RNN mode, LAMBADA, multiple choice -----------------------------------------------------------------------------

PAIRS = [([1, 2, 3], [4, 5]), ([7], [8]), ([9, 10, 11, 12, 13, 14], [15, 16, 17]), ([1], [2, 3, 4, 5]), ([7], [8])]


def by_hand(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]))[0][0].double()
    lines = logits[len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(continuation)
    return lines.gather(1, target[:, None]).sum().item(), bool((lines.argmax(-1) == target).all())


@pytest.mark.parametrize("variant", ["v8", "v7a", "v8-hybrid"])
def test_both_modes_give_the_same_numbers(random_model, monkeypatch, variant):
    monkeypatch.setattr(likelihood, "_TOKENS_PER_PASS", 12)
    monkeypatch.setattr(likelihood, "_SEQUENCES", 2)
    model = random_model(variant=variant)
    wanted = [by_hand(model, *pair) for pair in PAIRS]
    best = int(model(torch.tensor([[3, 4]]))[0][0, -1].argmax())
    pairs = [*PAIRS, ([3, 4], [best])]
    for mode in module.MODES:
        got = loglikelihoods(model, pairs, mode)
        assert [score.logprob for score in got[:-1]] == pytest.approx([w[0] for w in wanted], abs=2e-4)
        assert [score.greedy for score in got] == [w[1] for w in wanted] + [True]
    tokens = np.random.default_rng(0).integers(0, 37, 45)
    gpt, rnn = (evaluate(model, tokens, 16, n_bytes=100, mode=mode) for mode in module.MODES)
    assert rnn.loss == pytest.approx(gpt.loss, abs=1e-5)
    assert rnn.bits_per_byte == pytest.approx(gpt.bits_per_byte, abs=1e-5)
    assert rnn.n_targets == gpt.n_targets == 44


# -- ROSA memory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def remembering(random_model):
    """A function: RosaConfig fields -> a small random model with that memory."""
    return lambda variant="v8", **rules: random_model(variant=variant, memory=RosaConfig.preset("memory", **rules))


def some_text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 4, n).astype(np.uint16)


@pytest.mark.parametrize("rules", [{}, dict(n_matches=3), dict(window=9), dict(end=0)])
@pytest.mark.parametrize("n_documents", [0, 90])
@pytest.mark.parametrize("ctx_len", [8, 100])
def test_memory_looks_back_past_the_window_and_on_documents(remembering, monkeypatch, rules, n_documents, ctx_len):
    monkeypatch.setattr(likelihood, "_TOKENS_PER_PASS", 24)
    monkeypatch.setattr(likelihood, "_SEQUENCES", 3)
    monkeypatch.setattr(likelihood, "PIECE", 25)
    model, tokens, documents = remembering(**rules), some_text(61), None
    if n_documents:
        if _build.find_compiler() is None:
            pytest.skip("no C++ compiler")
        index = TokenIndex.of(torch.from_numpy(some_text(n_documents, 1).astype(np.int64)), end=rules.get("end"))
        documents = Documents(index, model.config)
    ids = torch.from_numpy(tokens.astype(np.int64))
    recalled, _, _ = Recollection().read(ids, model.config.memory, documents)
    total = 0.0
    for start in range(0, 60, ctx_len):
        window = ids[start : start + ctx_len + 1]
        with torch.no_grad():
            logits, _ = model(window[None, :-1], recalled=recalled[None, start : start + len(window) - 1])
        total += F.cross_entropy(logits[0].double(), window[1:], reduction="sum").item()
    scores = [evaluate(model, tokens, ctx_len, mode=mode, documents=documents) for mode in module.MODES]
    assert [score.loss for score in scores] == pytest.approx([total / 60] * 2, abs=2e-6)
    if ctx_len == 8:
        assert abs(literal(model, tokens, ctx_len) / 60 - scores[0].loss) > 1e-3  # windows that know themselves alone


@pytest.mark.parametrize("variant", ["v8", "v7a", "v8-hybrid"])
def test_pairs_remember_themselves_and_documents(remembering, monkeypatch, variant):
    monkeypatch.setattr(likelihood, "_TOKENS_PER_PASS", 40)
    monkeypatch.setattr(likelihood, "_SEQUENCES", 2)
    model = remembering(variant)
    texts = [some_text(n, n).tolist() for n in (4, 9, 30, 17, 30)]
    pairs = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts]
    for mode in module.MODES:
        got = loglikelihoods(model, pairs, mode)
        wanted = [by_hand(model, *pair) for pair in pairs]
        assert [score.logprob for score in got] == pytest.approx([w[0] for w in wanted], abs=2e-4)
        if _build.find_compiler() is not None:
            documents = Documents(TokenIndex.of(torch.tensor(texts[2])), model.config)
            told = loglikelihoods(model, pairs, mode, documents)
            assert told[2].logprob != pytest.approx(got[2].logprob, abs=1e-3)


@pytest.mark.parametrize("mode", ["gpt", "rnn"])
def test_ids_outside_the_vocabulary_are_refused_before_memory_reads_them(remembering, mode):
    with pytest.raises(DataError, match="vocab_size 37.*got 1 to 37"):
        evaluate(remembering(), np.array([1, 2, 37, 3]), 4, mode=mode)
    with pytest.raises(DataError, match="0 to 36"):
        loglikelihoods(remembering(), [([1, -1], [1])], mode)


@pytest.mark.parametrize("mode", ["gpt", "rnn"])
def test_pairs_that_cannot_be_scored_are_refused(random_model, mode):
    for bad in (([], [1]), ([1], [])):
        with pytest.raises(DataError, match="pair 1"):
            loglikelihoods(random_model(), [([1], [1]), bad], mode)
    for bad in (([1, 37], [1]), ([1], [1, 37]), ([1], [-1])):
        with pytest.raises(DataError, match="0 to 36"):
            loglikelihoods(random_model(), [bad], mode)


def test_an_unknown_mode_is_refused(random_model):
    for call in (
        lambda: loglikelihoods(random_model(), [], "rn"),
        lambda: evaluate(random_model(), [1, 2], 4, mode="rn"),
    ):
        with pytest.raises(ConfigError, match="mode: wanted gpt or rnn, got 'rn'. Did you mean 'rnn'"):
            call()


@pytest.fixture
def reader(random_model):
    return random_model(vocab_size=256), tokenizer.load("bytes")


@pytest.mark.parametrize("mode", ["gpt", "rnn"])
def test_lambada_is_the_upstream_definition(reader, tmp_path, mode):
    model, letters = reader
    texts = ["one two three", 'He said,\n"never again', "ein zw\u00f6lfter"]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    scores = []
    for text in texts:
        cut = text.rindex(" ")
        scores.append(by_hand(model, [0, *text[:cut].encode()], list(text[cut:].encode())))
    got = module.lambada(model, letters, path, mode)
    assert got.perplexity == pytest.approx(math.exp(-sum(s for s, _ in scores) / 3), rel=1e-4)
    assert got.accuracy == sum(greedy for _, greedy in scores) / 3
    assert got.n_texts == 3
    assert module.lambada(model, letters, path, mode, limit=2).n_texts == 2
    path.write_text(path.read_text().replace('"text"', '"story"'))
    assert module.lambada(model, letters, path, mode, reading=Reading("story")) == got


def test_lambada_counts_a_text_when_every_token_of_the_word_is_the_likeliest(reader, tmp_path):
    model, letters = reader
    with torch.no_grad():  # it says a thousand letters x, after each of which comes another
        model.ln_out.weight.zero_()
        model.ln_out.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[ord("x")] = 1.0
    scores = loglikelihoods(model, [([0, 111], [120, 120]), ([0, 111], [120, 32]), ([0, 111], [32, 120])])
    assert [score.greedy for score in scores] == [True, False, False]
    path = tmp_path / "l.jsonl"
    path.write_text('{"text": "one"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="two words"):
        module.lambada(model, letters, path)
    path.write_text('{"text": "one xx"}\n', encoding="utf-8")
    assert module.lambada(model, letters, path).accuracy == 0  # its first token is the space


def test_multiple_choice_by_hand(reader, tmp_path):
    model, letters = reader
    unlikely = min("abcdefgh", key=lambda letter: by_hand(model, [0, *b"Who?"], [ord(letter)])[0])
    rows = [
        {
            "question": "Who?",
            "choices": [unlikely, "nobody", "th\u00e9y", "anyone", "somebody else"],
        },  # one byte or many
        {"question": "2+2=", "choices": ["4", "5"]},
        {"question": "Where", "choices": [" here", " x"]},
    ]
    right = 0
    for row in rows:
        scores = [by_hand(model, [0, *row["question"].encode()], list(c.encode()))[0] for c in row["choices"]]
        row["answer"] = int(np.argmax(np.array(scores) / [len(c.encode()) for c in row["choices"]]))
        right += int(np.argmax(scores)) == row["answer"]
    rows.append({**rows[1], "answer": 1 - rows[1]["answer"]})
    assert right < 3  # else the two scores could not be told apart
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for mode in module.MODES:
        got = module.multiple_choice(model, letters, path, mode)
        assert got == (right / 4, 3 / 4, 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: wanted an object, got list"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "line 2: wanted"),
        ('{"question": 3, "choices": ["b", "c"], "answer": 0}', "line 2: wanted"),
        ('{"question": "a", "choices": ["b", ""], "answer": 0}', "line 2: wanted choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer: wanted 0 to 1, got 2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', "line 2: answer"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "A"}', "line 2: answer"),
        (
            '{"question": "\\ud800", "choices": ["b", "c"], "answer": 0}',
            "line 2: character 0 of the question is .*surrogate",
        ),
    ],
)
def test_a_bad_question_is_located(reader, tmp_path, line, words):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=words):
        module.multiple_choice(*reader, path)


def test_nothing_to_score_is_refused(reader, tmp_path, random_model):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for score in (module.lambada, module.multiple_choice):
        with pytest.raises(DataError, match="holds no"):
            score(*reader, empty)
        with pytest.raises(DataError, match=r"none\.jsonl"):
            score(*reader, tmp_path / "none.jsonl")
        with pytest.raises(ConfigError, match="end-of-document"):
            score(random_model(), tokenizer.load("integers:37"), empty)
        with pytest.raises(ConfigError, match="limit"):
            score(*reader, empty, limit=0)


def test_results_as_json_table_and_plot(reader, tmp_path, capsys):
    model, _ = reader
    for step in (20, 3):
        (tmp_path / f"step-{step:08}").mkdir()
        heron.save(model, tmp_path / f"step-{step:08}" / "model.pth")
        with torch.no_grad():
            model.head.weight.mul_(0.9)
    (tmp_path / "t.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "q.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
    models = [str(tmp_path / f"step-{step:08}" / "model.pth") for step in (20, 3)]
    words = ["eval", *models, "--data", f"{tmp_path}/t.jsonl", "--lambada", f"{tmp_path}/t.jsonl", "--ctx_len", "8"]
    words += ["--choices", f"{tmp_path}/q.jsonl", "--mode", "rnn", "--json", f"{tmp_path}/r.json"]
    assert cli.main([*words, "--plot", f"{tmp_path}/r.png"]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    assert [result["step"] for result in results] == [20, 3]
    assert [result["model"] for result in results] == models
    for result, line in zip(results, out.splitlines()[1:3], strict=True):
        tokens = np.array([*b"one two three", 0])
        score = evaluate(heron.load(result["model"]), tokens, 8, 12)
        assert result["loss"] == pytest.approx(score.loss, abs=1e-5)
        assert result["bits_per_byte"] == pytest.approx(score.bits_per_byte, abs=1e-5)
        assert result["lambada_texts"] == result["questions"] == 1
        assert line.split()[1] == f"{result['loss']:.4f}"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="png"):
        scores.plot(results, tmp_path / "r.gif")


def test_a_number_that_json_lacks_becomes_null(tmp_path):
    scores.write([{"model": "x", "perplexity": math.inf}], tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == [{"model": "x", "perplexity": None}]
    assert module.Evaluation(1e4, 1, None).perplexity == math.inf


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["--data", "t.txt", "--limit", "2"], 2, "--data is read whole"),
        ([], 2, "wanted something to score on"),
        (["--data", "t.txt", "--plot", "r.gif"], 1, "wanted a picture named .png or .svg, got r.gif"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(capsys, words, exit_code, said):
    try:
        code = cli.main(["eval", "none.pth", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == exit_code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "metaspace", "byte level, space in front", "unigram"])
def test_a_continuation_is_scored_by_the_ids_of_its_text(random_model, tmp_path, kind):
    tokens = load(kind)
    model = random_model(vocab_size=tokens.vocab_size, n_layer=1)
    texts = ["the grey heron waits at the river", "the heron waits"]
    choices = [" river", " water", "re"]  # the last goes on within a word
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    line = {"question": "the heron waits at the", "choices": choices, "answer": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))

    def score(context, continuation):
        ids = tokens.encode(context + continuation)
        n = next(n for n in range(len(ids)) if len(tokens.decode(ids[: n + 1]).lstrip(" ")) > len(context))
        return by_hand(model, [tokens.eod, *ids[:n]], ids[n:])[0]

    scores = [score(text[: text.rindex(" ")], text[text.rindex(" ") :]) for text in texts]
    got = module.lambada(model, tokens, tmp_path / "l.jsonl")
    assert got.perplexity == pytest.approx(math.exp(-sum(scores) / 2), rel=1e-4)
    scores = [score(line["question"], choice) for choice in choices]
    for answer in range(3):
        (tmp_path / "q.jsonl").write_text(json.dumps({**line, "answer": answer}))
        assert module.multiple_choice(model, tokens, tmp_path / "q.jsonl").accuracy == (answer == np.argmax(scores))
