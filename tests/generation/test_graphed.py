"""heron.generation on a GPU: the recorded step is the model's, and a row's text is its own (``pytest -m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch

import heron
from heron import cli, tokenizer
from heron.config import RosaConfig
from heron.errors import HeronError
from heron.generation import Request, Sampling
from heron.generation import engine as engine_module
from heron.generation.graphed import GraphedDecoder
from tests.generation import accuracy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
VARIANTS = {
    "v7": dict(variant="v7"),
    "v8": dict(variant="v8"),
    "4x": dict(variant="v8", deep_embed_4x=True),
    "v7a": dict(variant="v7a"),
    "v8 memory": dict(variant="v8", memory="memory"),
    "v7a memory": dict(variant="v7a", memory="memory"),
}
SIZES = dict(n_layer=3, n_embd=192, head_size=64, vocab_size=100)
ODD = dict(n_layer=3, n_embd=48, head_size=16, ffn_dim=90, vocab_size=100)  # 90: matvec has no kernel for it


@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_recorded_step_is_at_most_twice_as_far_from_fp64_as_the_model(random_model, form, dtype, sizes, n):
    model = random_model(**VARIANTS[form], **sizes).to("cuda", dtype)
    ids = 4 if "memory" in form else 100  # few, which match
    texts = torch.randint(ids, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    accuracy.check(GraphedDecoder(model, n), n // 2, model, *texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [None, "memory"])
def test_a_text_is_its_own_whatever_runs_beside_it(random_model, dtype, memory):
    model = random_model(variant="v8", memory=memory, **SIZES).to("cuda", dtype)
    ids = tokenizer.load("integers:100")
    chance = random.Random(0)
    requests = [
        Request(
            [chance.randrange(1, 100) for _ in range(chance.randint(1, 9))],
            max_tokens=chance.randint(1, 20),
            sampling=Sampling(temperature=chance.choice((0, 1.0)), top_p=0.9, presence_penalty=chance.choice((0, 0.2))),
            seed=number,
        )
        for number in range(17)
    ]

    def texts(engine, some):
        written = {}
        for piece in engine.run(some):
            if piece.token is not None:
                written.setdefault(piece.request, []).append(piece.token)
        return written

    engine = heron.Engine(model, ids, rows=5)
    together = texts(engine, requests)
    assert together == texts(engine, requests)
    for number, request in enumerate(requests):
        assert texts(engine, [request])[0] == together[number]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", None])
def test_the_command_runs_on_a_device_by_any_of_its_names(random_model, tmp_path, capsys, device):
    heron.save(random_model(variant="v7", **SIZES), tmp_path / "model.pth")
    named = [] if device is None else ["--device", device]
    asked = ["generate", str(tmp_path / "model.pth"), "--tokenizer", "integers:100", "--prompt", "5 6", *named]
    assert cli.main([*asked, "--max_tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) >= 3


@pytest.mark.parametrize("tables", ["host", "disk"])
def test_tables_off_the_device_give_the_same_text(random_model, tmp_path, tables):
    model = random_model(variant="v8", **SIZES).to("cuda")
    ids, request = tokenizer.load("integers:100"), Request([5, 6, 7], max_tokens=30, sampling=Sampling(top_p=0.9))
    want = "".join(heron.Engine(model, ids).stream(request))
    place = dict(tables=tables, tables_file=tmp_path / "tables" if tables == "disk" else None, device="cuda")
    assert "".join(heron.Engine(model.cpu(), ids, **place).stream(request)) == want


@pytest.mark.parametrize("memory", [None, "memory", RosaConfig.preset("memory", window=9, n_matches=3, end=5)], ids=str)
@pytest.mark.parametrize("tables", ["device", "host"])
def test_looking_ahead_changes_nothing(random_model, tables, memory, monkeypatch):
    model, ids = random_model(variant="v8", memory=memory, **SIZES).to("cuda"), tokenizer.load("integers:100")
    if memory:
        with torch.no_grad():
            model.memory.copy += 3  # or hardly any token would be what a match predicts
    place = {} if tables == "device" else dict(tables="host", device="cuda")
    engines = [heron.Engine(model if tables == "device" else model.cpu(), ids, **place) for _ in range(2)]
    sampling, told = Sampling(top_p=0.9, presence_penalty=0.3), [[], []]
    for engine, tokens in zip(engines, told, strict=True):
        if engine is engines[1]:
            monkeypatch.setattr(GraphedDecoder, "look_ahead", lambda *_: None)
        after = None
        for seed in range(6):
            row = engine.open([seed, 7], after, sampling, seed)
            for _ in range(5):
                tokens.append(engine.step()[0][1])
                assert bool(engine._decoder.ahead) == (engine is engines[0])
            after = engine.snapshot(row)
            tokens += after.state.to_list()
            tokens += [token for _, token in engine.step()]
            engine.close(row)
    for mine, theirs in zip(*told, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_logits_that_are_not_finite_are_refused_again_and_again(random_model):
    model = random_model(variant="v8", **{**SIZES, "n_layer": 1}).to("cuda")
    engine = heron.Engine(model, tokenizer.load("integers:100"))
    engine.open([5, 6], sampling=Sampling(temperature=0))
    bad = engine.step()[0][1].id
    with torch.no_grad():
        model.blocks[0].ffn.enn.weight[bad] = float("inf")
    engine = heron.Engine(model, tokenizer.load("integers:100"))
    for _ in range(2):
        engine.open([5, 6], sampling=Sampling(temperature=0))
        assert engine.step()[0][1].id == bad
        ((_, error),) = engine.step()
        assert isinstance(error, HeronError)
        assert "wanted finite numbers" in str(error)


@pytest.mark.parametrize("form", VARIANTS)
def test_a_long_prompt_is_read_by_pieces(random_model, form, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS_CUDA", 64)
    model = random_model(**VARIANTS[form], **SIZES).to("cuda")
    ids = torch.randint(4 if "memory" in form else 100, (150,), generator=torch.Generator().manual_seed(1))
    engine = heron.Engine(model, tokenizer.load("integers:100"))
    state = engine.prefill(ids.tolist())
    with torch.inference_mode():
        _, want = model(ids[None].cuda())
    for part, true in zip(state.to_list(), want.to_list(), strict=True):
        assert accuracy.distance(part, true.cpu()) < 1e-5
