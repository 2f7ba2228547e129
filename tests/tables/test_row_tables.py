"""DeepEmbed tables in host memory: the same rows and gradients as with the model, and steps that touch no other row."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import heron
from heron.errors import ConfigError, DataError
from heron.model.deep_embed import DeepEmbed
from heron.tables.rows import RowTables, distinct_ids
from heron.train.step import Learner

FORMS = {
    "v8": dict(variant="v8"),
    "4x": dict(variant="v8", deep_embed_4x=True),
    "v7a": dict(variant="v7a"),
    "v7b": dict(variant="v7b"),
    "v8-hybrid": dict(variant="v8-hybrid"),
}
CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 9, 3, 20], [9, 9, 36, 0]])  # of 37; several more than once
SEEN = [0, 3, 9, 20, 36]
BETAS, EPS, LR = (0.9, 0.99), 1e-18, 3e-3


def tables_of(model):
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, DeepEmbed)}


def tokens_of(n):
    """The n-th batch: its first half has even ids only, and not all of them."""
    return torch.randint(0, 18, (2, 6), generator=torch.Generator().manual_seed(n)) * 2 + n % 2


def backward(model, tokens):
    model.loss(tokens, tokens.roll(1)).backward()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_and_gradients_are_those_of_a_table_on_the_device(random_model, form, checkpointed):
    usual = random_model(**FORMS[form])
    hosted = copy.deepcopy(usual)
    before = {name: tensor.clone() for name, tensor in usual.state_dict().items()}
    tables = RowTables(hosted, CPU)
    usual.grad_checkpoint = hosted.grad_checkpoint = checkpointed
    tables.bring(TOKENS)
    for half in TOKENS:  # accumulated
        for model in (usual, hosted):
            backward(model, half[None])
    assert tables.ids.tolist() == SEEN
    assert len(tables.rows) == len(tables.weights) == len(tables_of(usual))
    for weight, rows, gradient in zip(tables_of(usual).values(), tables.rows, tables.gradients(), strict=True):
        assert torch.equal(rows, weight[SEEN])
        assert torch.equal(gradient, weight.grad[SEEN])
        assert gradient.any()
    for name, parameter in hosted.named_parameters():
        if name.rpartition(".")[0] in tables_of(hosted):
            assert parameter.grad is None
        elif parameter.grad is not None:
            assert torch.equal(parameter.grad, usual.get_parameter(name).grad), name
    tables.release()
    assert tables.rows == []
    assert torch.equal(hosted(TOKENS + 1 - TOKENS // 36)[0], usual(TOKENS + 1 - TOKENS // 36)[0])
    assert hosted.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in hosted.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_where_every_row_is_in_every_step_it_is_dense_adamw(random_model, form):
    usual = random_model(**FORMS[form]).double()
    hosted = copy.deepcopy(usual)
    tables = RowTables(hosted, CPU)
    dense = heron.build_optimizer(usual, LR, 0.1, BETAS, EPS)
    by_rows = heron.build_optimizer(hosted, LR, 0.1, BETAS, EPS, tables, torch.float64)
    for n in range(4):
        tokens = torch.cat((torch.arange(37), tokens_of(n).view(-1)[:11])).view(2, 24)
        tables.bring(tokens)
        for model, optimizer in ((usual, dense), (hosted, by_rows)):
            backward(model, tokens)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in hosted.state_dict().items():
        assert torch.allclose(value, usual.state_dict()[name], rtol=1e-12, atol=1e-14), name


def test_a_row_counts_its_own_steps_and_all_others_rest(random_model):
    """Four steps against the formula in fp64: what bias correction counts, and that nothing else changes a bit."""
    model = random_model().double()
    tables = RowTables(model, CPU)
    optimizer = heron.build_optimizer(model, LR, 0.1, BETAS, EPS, tables, torch.float64)
    weight, wanted = tables.weights[1], tables.weights[1].detach().clone()
    first, second, count = torch.zeros_like(wanted), torch.zeros_like(wanted), torch.zeros(37, 1)
    for n in (0, 1, 2, 1):
        optimizer.zero_grad()
        tables.bring(tokens_of(n))
        backward(model, tokens_of(n))
        gradient = tables.gradients()[1].clone()
        before = weight.detach().clone()
        optimizer.step()
        ids = torch.unique(tokens_of(n))
        count[ids] += 1
        first[ids] = 0.9 * first[ids] + 0.1 * gradient
        second[ids] = 0.99 * second[ids] + 0.01 * gradient**2
        move = first[ids] / (1 - 0.9 ** count[ids]) / ((second[ids] / (1 - 0.99 ** count[ids])).sqrt() + EPS)
        wanted[ids] -= LR * move
        others = [i for i in range(37) if i not in ids]
        assert torch.equal(weight[others], before[others])
        assert not torch.isclose(weight[ids], before[ids], rtol=0, atol=1e-9).all(dim=1).any()
    assert torch.allclose(weight, wanted, rtol=1e-6, atol=1e-9)  # the counts are fp32 here
    state = optimizer.state[weight]
    assert torch.equal(state["row_step"], count.view(-1).int())
    assert torch.allclose(state["exp_avg"], first, rtol=1e-12, atol=0)
    assert torch.allclose(state["exp_avg_sq"], second, rtol=1e-12, atol=0)
    never = count.view(-1) == 0
    assert never.any()
    assert not state["exp_avg"][never].any()


def test_clipping_counts_the_gradients_of_rows_and_scales_them(random_model):
    norms, moments = [], []
    for place in ("device", "host"):
        config = heron.TrainConfig(max_steps=1, dtype="fp32", grad_clip=0.01, tables=place)
        learner = Learner(random_model(), config, CPU)
        norms.append(learner.update(learner.gradients([(TOKENS, TOKENS.roll(1))]), LR, math.inf)[1])
        weight = learner.model.blocks[1].ffn.enn.weight
        moments.append(learner.optimizer.state[weight]["exp_avg"][SEEN])
    assert torch.allclose(*norms, rtol=1e-6)
    assert torch.allclose(*moments, rtol=1e-5, atol=1e-12)
    assert moments[0].norm() < 0.1 * 0.01


@pytest.mark.parametrize("earlier_steps", [0, 2])
def test_a_step_that_is_held_back_changes_nothing(random_model, earlier_steps):
    model = random_model()
    tables = RowTables(model, CPU)
    optimizer = heron.build_optimizer(model, LR, tables=tables)

    def step(found_inf):
        optimizer.zero_grad()
        tables.bring(TOKENS)
        backward(model, TOKENS)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

    for _ in range(earlier_steps):
        step(0.0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [{name: part.clone() for name, part in optimizer.state[weight].items()} for weight in tables.weights]
    step(1.0)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for weight, before in zip(tables.weights, states, strict=True):
        for name, part in optimizer.state[weight].items():  # before the first step there was none: zeros
            assert torch.equal(part, before.get(name, torch.zeros_like(part)))
        assert len(before) == (3 if earlier_steps else 0)
    step(0.0)
    assert int(optimizer.state[tables.weights[0]]["row_step"][3]) == earlier_steps + 1


def test_moments_in_bf16_stay_close(random_model):
    models = [random_model(), random_model()]
    for model, dtype in zip(models, (torch.float32, torch.bfloat16), strict=True):
        tables = RowTables(model, CPU)
        optimizer = heron.build_optimizer(model, LR, tables=tables, tables_state=dtype)
        for n in range(6):
            optimizer.zero_grad()
            tables.bring(tokens_of(n))
            backward(model, tokens_of(n))
            optimizer.step()
        assert {part.dtype for part in optimizer.state[tables.weights[0]].values()} == {torch.int32, dtype}
    exact, rough = (model.blocks[0].ffn.enn.weight for model in models)
    assert (exact - rough).abs().max() < 0.1 * LR * 6
    assert (exact != rough).any()


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (64, 129)])
def test_distinct_ids_are_sorted(shape):
    tokens = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(0))
    for ids in (tokens, tokens.t()):
        assert torch.equal(distinct_ids(ids, 500), torch.unique(ids))


def test_misuse_is_refused(random_model):
    with pytest.raises(ConfigError, match="v7 has no DeepEmbed tables"):
        RowTables(random_model(variant="v7"), CPU)
    model = random_model()
    tables = RowTables(model, CPU)
    optimizer = heron.build_optimizer(model, tables=tables)
    for bad in (-1, 37):
        with pytest.raises(DataError, match=f"ids must be 0 to 36, got .*{bad}"):
            tables.bring(torch.tensor([[0, bad, 3]]))
    backward(model, TOKENS)
    with pytest.raises(ConfigError, match="used but not brought"):
        optimizer.step()
    tables.bring(TOKENS)
    with pytest.raises(DataError, match="token 5 was looked up, but not brought"):
        model(torch.tensor([[3, 5]]))
