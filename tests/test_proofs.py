"""benchmarks/proofs: what is asked, how answers are counted, what the controls lack, and a run from start to end."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.proofs import __main__ as proofs
from benchmarks.proofs import catalogue, copying, curriculum, groups, models, parity, recall, report, reversal, training
from benchmarks.proofs.batch import IGNORED
from heron import ModelConfig
from heron.errors import ConfigError, DataError
from heron.ops.head_mix import reference
from heron.report import compare

SMALL = ModelConfig(variant="v7", n_layer=2, n_embd=32, head_size=16, vocab_size=60)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


# -- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "order"), [("S5", 120), ("A5", 60)])
def test_products_form_a_group_that_is_not_commutative(group, order, rng):
    table = groups.product_table(group)
    assert table.shape == (order, order)
    for lines in (table, table.T):
        assert (np.sort(lines, axis=1) == np.arange(order)).all()
    a, b, c = rng.integers(order, size=(3, 200))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table != table.T).any()


@pytest.mark.parametrize("silent", [0, 3])
@pytest.mark.parametrize("group", ["S5", "A5"])
def test_a_word_s_targets_are_the_permutations_applied_one_after_another(group, silent, rng):
    elements = list(itertools.permutations(range(5)))
    if group == "A5":
        elements = [one for one in elements if round(np.linalg.det(np.eye(5)[list(one)])) == 1]
    tokens, targets = groups.words(group, 6, silent, rng, 3)
    tokens, targets = (part.reshape(3, 6, 1 + silent) for part in (tokens, targets))
    assert (tokens[:, :, 1:] == len(elements)).all()
    assert (targets[:, :, :-1] == IGNORED).all()
    for word, products in zip(tokens[:, :, 0], targets[:, :, -1], strict=True):
        places = tuple(range(5))
        for token, product in zip(word, products, strict=True):
            places = tuple(elements[token][place] for place in places)
            assert elements[product] == places


def test_a_word_of_few_swaps_has_elements_that_so_many_make(rng):
    elements = list(itertools.permutations(range(5)))
    swapped = {tuple(range(5))}
    for at_most, count in ((1, 11), (2, 46), (3, 96), (4, 120)):
        for one in list(swapped):
            for a, b in itertools.combinations(range(5), 2):
                other = list(one)
                other[a], other[b] = other[b], other[a]
                swapped.add(tuple(other))
        tokens, _ = groups.words("S5", 20, 0, rng, 100, at_most)
        assert {elements[token] for token in tokens.flat} == swapped
        assert len(swapped) == count
    assert np.bincount(groups.swaps("A5")).tolist() == [1, 0, 35, 0, 24]


def test_recall_asks_once_for_each_key_and_wants_its_value(rng):
    tokens, targets = recall.pairs(64, 8, rng, 50)
    for row, wanted in zip(tokens, targets, strict=True):
        known = dict(zip(row[0:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        assert len(known) == 8
        assert max(known) < recall.VOCAB // 2 <= min(known.values())
        asked = np.flatnonzero(wanted != IGNORED)
        assert asked.min() >= 16
        assert dict(zip(row[asked].tolist(), wanted[asked].tolist(), strict=True)) == known


@pytest.mark.parametrize("first_only", [False, True])
def test_reversal_asks_for_each_number_backwards_and_its_end(first_only, rng):
    tokens, targets = reversal.numbers(rng, 200, first_only)
    assert tokens.shape == targets.shape == (200, 121)
    sizes = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        text = "".join("0123456789,#"[token] for token in row)
        expected = [IGNORED] * 121
        begin = 0
        while begin < 121 and "," in text[begin:]:
            number = text[begin : text.index(",", begin)]
            sizes.add(len(number))
            answer = [*map(int, number[::-1]), reversal.END]
            comma = begin + len(number)
            expected[comma : comma + len(answer)] = answer[: 121 - comma]
            begin = comma + 1 + len(answer)
            if first_only:
                break
        assert wanted == expected
        assert begin > 121 or first_only or text[begin - 1] == "#"
    assert min(sizes) <= 3
    assert max(sizes) == 60


def test_copying_asks_for_what_is_not_noise_in_its_order(rng):
    tokens, targets = copying.noisy(40, rng, 20)
    for row, wanted in zip(tokens, targets, strict=True):
        assert (row[40:] == copying.ASK).all()
        assert (wanted[:40] == IGNORED).all()
        assert (row[:40][row[:40] != copying.NOISE] == wanted[40:]).all()


def test_parity_counts_ones(rng):
    tokens, targets = parity.bits(30, rng, 10)
    assert all((targets[:, t] == tokens[:, : t + 1].sum(axis=1) % 2).all() for t in range(30))


@pytest.mark.parametrize("name", catalogue.TASKS)
def test_every_task_fits_its_recipe(name):
    config = catalogue.Case(name, "rwkv7", 0).settings()
    task = catalogue.TASKS[name]
    tokens, targets = task.batch(np.random.default_rng(0), 4)
    assert tokens.shape == targets.shape == (4, config.ctx_len * task.pieces)
    assert max(tokens.max(), targets.max()) < config.model.vocab_size
    assert config.model.n_layer <= 4


# -- how answers are counted ----------------------------------------------------------------------------------------


def test_scores_count_what_is_asked_alone():
    targets = np.array([[IGNORED, 1, 2, IGNORED], [3, 4, IGNORED, IGNORED]])
    right = np.array([[False, True, False, True], [True, True, False, False]])
    assert training.scores(right, targets) == dict(
        accuracy=0.75, whole=0.5, last=0.5, by_position=[1.0, 1.0, 0.0, None]
    )


@pytest.mark.parametrize(
    ("shares", "place"),
    [
        ([1.0, 0.96, 0.94, 1.0], 2),
        ([0.5, 1.0], 0),
        ([1.0, 1.0], 2),
        ([None, 1.0, None, 0.2], 2),
        ([None, None, 1.0], 3),
    ],
)
def test_solved_to_is_the_last_place_before_a_wrong_one(shares, place):
    assert report.solved_to(shares) == place
    assert report.n_solved(shares) == sum(share is not None for share in shares[:place])


def test_the_picture_has_a_panel_by_layers_where_these_differ(tmp_path, monkeypatch):
    def run(task, seed, curve):
        return dict(
            task=task, model="signed", seed=seed, tests={"20": dict(by_position=[1.0]), "80": dict(by_position=curve)}
        )

    drawn = []
    monkeypatch.setattr(report, "_draw_layers", lambda axes, *given: drawn.append(given))
    found = [run("A5-20-l1", 0, [1.0, 0.9]), run("A5-20-l2", 0, [1.0, 1.0]), run("parity", 0, [1.0])]
    report.draw(found, tmp_path / "some.png")
    assert [(title, [task for task, *_ in groups]) for title, groups in drawn] == [("A5-20", ["A5-20-l1", "A5-20-l2"])]
    monkeypatch.undo()
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    report._draw_layers(axes, *drawn[0])
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 1.0], [2.0, 2.0]]


# -- the models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def removed(monkeypatch):
    """The `b` of every call of WKV7 inside a time mix."""
    module = importlib.import_module("heron.ops.head_mix.reference")
    seen, wkv7 = [], module.wkv7

    def spy(*inputs, **given):
        seen.append(inputs[5].detach())
        return wkv7(*inputs, **given)

    monkeypatch.setattr(module, "wkv7", spy)
    return seen


def test_a_decay_only_model_removes_nothing_and_does_not_learn_to(removed):
    model = models.build("decay-only", SMALL, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.loss(torch.randint(60, (2, 8)), torch.randint(60, (2, 8))).backward()
        optimizer.step()
    assert len(removed) == 6
    assert max(float(b.abs().max()) for b in removed) < 1e-15
    assert all(block.att.k_a.abs().max() > 0 for block in model.blocks)


def test_a_signed_model_with_halved_rates_is_rwkv7():
    """Rates are 1/2 in one and 1/4 in the other; keys do not depend on them, and nothing decays."""
    results = []
    for name, rate in (("rwkv7", 0.5), ("signed", 0.25)):
        torch.manual_seed(0)
        model = models.build(name, SMALL, 8).double()
        for block in model.blocks:
            torch.nn.init.normal_(block.att.output.weight)
            torch.nn.init.constant_(block.att.a0, float(np.log(rate / (1 - rate))))
            torch.nn.init.constant_(block.att.w0, -40.0)  # no decay
            torch.nn.init.zeros_(block.att.k_a)
        hidden, _ = model.hidden_states(torch.arange(16).view(2, 8), keep_state=False)
        results.append(hidden.detach())
    torch.testing.assert_close(*results)


def test_no_transition_of_a_signed_model_makes_a_state_larger(monkeypatch):
    seen, wkv7 = [], reference.wkv7

    def spy(r, w, k, v, a, b, *rest, **named):
        decay = torch.exp(-np.exp(-0.5) * torch.sigmoid(w))
        seen.append((torch.diag_embed(decay) + a[..., :, None] * b[..., None, :]).detach())
        return wkv7(r, w, k, v, a, b, *rest, **named)

    monkeypatch.setattr(reference, "wkv7", spy)
    model = models.build("signed", SMALL, 8).double()
    for block in model.blocks:
        torch.nn.init.uniform_(block.att.a0, 0, 9)
        torch.nn.init.uniform_(block.att.w0, -4, 4)
    model.hidden_states(torch.randint(60, (2, 8)), keep_state=False)
    norms = torch.linalg.matrix_norm(torch.stack(seen), ord=2)
    assert float(norms.max()) < 1 + 1e-9
    eigenvalues = torch.linalg.eigvals(torch.stack(seen)).real
    assert float(eigenvalues.min()) < -0.3


@pytest.mark.parametrize("name", models.MODELS)
def test_no_model_sees_what_comes_later(name):
    torch.manual_seed(0)
    model = models.build(name, SMALL, 8)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) if parameter.requires_grad else 0
    tokens = torch.randint(60, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 60
    with torch.no_grad():
        one, other = (model.logits(model.hidden_states(ids, keep_state=False)[0]) for ids in (tokens, changed))
    torch.testing.assert_close(one[:, :5], other[:, :5])
    assert (one[:, 5:] - other[:, 5:]).abs().amax(dim=-1).min() > 1e-4


def test_controls_are_as_large():
    sizes = [sum(p.numel() for p in models.build(name, SMALL, 8).parameters()) for name in models.MODELS]
    assert max(sizes) < 1.02 * min(sizes)


def test_a_model_that_carries_states_reads_a_sample_piece_by_piece():
    torch.manual_seed(0)
    model = models.build("signed", SMALL, 8, carries=True)
    for block in model.blocks:
        torch.nn.init.normal_(block.att.output.weight)
    tokens, targets = torch.randint(60, (2, 2, 8))
    for _ in range(2):
        losses = []
        for pieces in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
            model.forget(2)
            parts = [model.loss(tokens[:, piece], targets[:, piece]) for piece in pieces]
            parts[-1].backward()
            losses.append(float(sum(part.detach() for part in parts)) / len(parts))
        assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert model.loss(tokens[:, :4], targets[:, :4]).item() != pytest.approx(parts[0].item(), abs=1e-3)


def test_attention_carries_no_states():
    with pytest.raises(ConfigError, match="attention has no state"):
        models.build("attention", SMALL, 8, carries=True)


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="wanted one of rwkv7"):
        models.build("mamba", SMALL, 8)


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A task of a moment, and a proof of it."""
    batch = partial(parity.bits, 10)
    task = catalogue.Task(
        2, 10, batch, {"10 bits": batch, "12 bits": partial(parity.bits, 12)}, dict(n_layer=1, n_embd=16, head_size=16),
        dict(micro_bsz=8, max_steps=4, lr_init=1e-3, lr_final=1e-4, warmup_steps=1, dtype="fp32"), True, n_test=16,
    )  # fmt: skip
    monkeypatch.setitem(catalogue.TASKS, "tiny", task)
    monkeypatch.setitem(catalogue.PROOFS, "tiny", [("tiny", ("rwkv7", "decay-only"))])
    return task


def test_runs_are_of_their_seed_and_heron_compare_reads_them(tiny, tmp_path):
    cases = catalogue.cases(["tiny"], [0, 1])
    folders = [training.learn(case, tmp_path, torch.device("cpu")) for case in cases]
    again = training.learn(cases[0], tmp_path / "again", torch.device("cpu"))
    results = [json.loads((folder / training.RESULT).read_text()) for folder in (*folders, again)]
    assert results[0]["tests"] == results[-1]["tests"] != results[1]["tests"]
    assert [len(test["by_position"]) for test in results[0]["tests"].values()] == [10, 12]
    read = compare.groups(compare.read(folders))
    assert [group.name for group in read] == ["data proof:tiny:rwkv7", "data proof:tiny:decay-only"]
    assert [run.seed for run in read[0].runs] == [0, 1]
    assert "val_loss" in compare.table(read)


def test_one_more_answer_is_learned_when_those_before_are_known(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum, "_EVERY", 1)
    monkeypatch.setattr(curriculum, "_WHOLE", 2.0)
    monkeypatch.setattr(curriculum, "_KNOWN", 2.5)  # ln 2 a bit, as none is known yet: three are enough
    shown = []
    real = training.Learner.gradients
    monkeypatch.setattr(
        training.Learner, "gradients", lambda self, samples: shown.append(samples[0][1]) or real(self, samples)
    )
    training.learn(catalogue.Case("tiny", "rwkv7", 0), tmp_path, torch.device("cpu"))
    assert [int((targets != IGNORED).sum(dim=1).max()) for targets in shown] == [2, 3, 4, 4]


def _asked(lessons, rng):
    """The largest element of what a curriculum makes, and how many answers are asked for."""
    tokens, targets = lessons.batch(rng, 200)
    return groups.swaps("S5")[tokens[tokens < 120]].max(), int((targets != IGNORED).sum(axis=1).max())


def test_the_first_answers_of_easier_samples_are_learned_before_the_next_are_begun(monkeypatch, rng):
    monkeypatch.setattr(curriculum, "_EVERY", 1)
    monkeypatch.setattr(curriculum, "_EASIER", 3)
    batch = partial(groups.words, "S5", 5, 0)
    task = dataclasses.replace(
        catalogue.TASKS["S5-20-l4"], batch=batch, easier=[partial(batch, at_most=n) for n in (1, 2)]
    )
    lessons = curriculum.Curriculum(task, 100)
    seen = []
    for step in range(1, 9):
        seen.append(_asked(lessons, rng))
        lessons.after(step, torch.tensor(0.1 if step != 2 else 0.4))  # the second time three answers lose 1.2 nats
    assert seen == [(1, 2), (1, 3), (1, 3), (2, 2), (2, 3), (4, 2), (4, 3), (4, 4)]
    assert lessons.whole_from == 8


def test_a_model_that_learns_nothing_is_asked_for_all_from_half_of_the_steps_on(rng):
    lessons = curriculum.Curriculum(catalogue.TASKS["S5-20-l4"], 100)
    for step in range(1, 51):
        assert _asked(lessons, rng) == (1, 2)
        lessons.after(step, torch.tensor(9.0))
    assert _asked(lessons, rng) == (4, 20)
    assert lessons.whole_from == 50


def test_of_a_sample_in_pieces_those_are_learned_that_are_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum, "_EVERY", 1)
    monkeypatch.setattr(curriculum, "_WHOLE", 2.0)
    monkeypatch.setattr(curriculum, "_KNOWN", 100.0)
    monkeypatch.setattr(curriculum, "_LOST", 100.0)
    monkeypatch.setattr(curriculum, "_FASTER", 1)
    monkeypatch.setitem(catalogue.TASKS, "tiny", dataclasses.replace(tiny, batch=partial(parity.bits, 40), pieces=4))
    begun, shown = [], []
    real = training.Learner.gradients
    monkeypatch.setattr(
        training.Learner, "gradients", lambda self, samples: shown.append(samples[0][1]) or real(self, samples)
    )
    forget = models.CarryingRWKV.forget
    monkeypatch.setattr(models.CarryingRWKV, "forget", lambda self, n: begun.append(len(shown)) or forget(self, n))
    training.learn(catalogue.Case("tiny", "signed", 0), tmp_path, torch.device("cpu"), steps=9)
    assert [int((targets != IGNORED).sum(dim=1).max()) for targets in shown] == [2, 5, 10, 1, 10, 10, 3, 10, 10]
    assert begun == [0, 1, 2, 4, 7]


def test_a_sample_of_which_a_model_has_lost_track_is_given_up(tiny, rng):
    task = dataclasses.replace(tiny, batch=partial(parity.bits, 40), pieces=4, grows=False)
    lessons = curriculum.Curriculum(task, 100)
    pieces, begun = lessons.pieces(rng, 3), []
    for step, loss in enumerate((0.1, 0.7, 0.1, 0.1, 0.1, 0.7, 0.1)):
        begun.append(next(pieces)[0])
        lessons.after(step + 1, torch.tensor(loss))
    assert begun == [True, False, True, False, False, False, True]


def test_a_report_has_a_line_for_each_test_and_a_figure_for_each_seed(tiny, tmp_path):
    for case in catalogue.cases(["tiny"], [0, 1]):
        training.learn(case, tmp_path, torch.device("cpu"))
    page = report.write([tmp_path], tmp_path / "out")
    assert page.count("| tiny | rwkv7 | 1 x 16 |") == 2
    assert "| 12 bits | 0 1 |" in page
    assert (tmp_path / "out" / report.PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="the same run"):
        report.write([tmp_path, tmp_path], tmp_path / "out")
    with pytest.raises(DataError, match="found none"):
        report.write([tmp_path / "out"], tmp_path / "out")


def test_a_process_trains_each_seed_once(tiny, tmp_path, capsys):
    options = argparse.Namespace(
        task="tiny", model="rwkv7", seeds=[0, 1], out=tmp_path, chosen_device=torch.device("cpu"), steps=1
    )
    assert proofs.train(options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert proofs.train(options) == 0
    assert capsys.readouterr().out == ""


def test_the_command_trains_nothing_twice_and_reports(tmp_path, capfd):
    command = ["parity", "--out", str(tmp_path), "--seeds", "0", "--steps", "1", "--device", "cpu"]
    test = dict(val_loss=1.0, accuracy=0.5, whole=0.5, last=0.5, by_position=[0.5])
    for case in catalogue.cases(["parity"], [0]):
        (tmp_path / case.name).mkdir(parents=True)
        record = dict(case._asdict(), seconds=1.0, machine="CPU", torch="2", parameters=1)
        (tmp_path / case.name / training.RESULT).write_text(json.dumps({**record, "tests": {"64 bits": test}}))
    assert proofs.main(command) == 0
    assert "4 runs, 4 of them done before" in capfd.readouterr().out
    assert (tmp_path / report.TABLE).exists()
