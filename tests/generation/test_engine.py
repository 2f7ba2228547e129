"""The engine against the plain model, and rows against the same rows alone: discrete results and states bit for bit."""

from __future__ import annotations

import gc
import math
import random
import weakref

import pytest
import torch
from safetensors.torch import save_file

import heron
from heron import tokenizer
from heron.checkpoint.formats import safetensors
from heron.errors import CheckpointError, ConfigError, DataError, HeronError
from heron.generation import Engine, Request, Sampling, Snapshot, Token, engine
from heron.generation.decoder import CppDecoder, ModelDecoder, TorchDecoder, is_fusible
from heron.generation.drawing import DeviceDraws, barred_ids
from heron.generation.graphed import GraphedDecoder, GraphedReader
from heron.model import compiled as compilation
from heron.tables.store import Tables, fingerprint
from tests.generation import accuracy
from tests.generation.recording import recorded

INTEGERS = tokenizer.load("integers:37")
GREEDY = Sampling(temperature=0)
CPU = torch.device("cpu")
FUSED = {
    "v7": dict(variant="v7"),
    "v8": dict(variant="v8"),
    "4x": dict(variant="v8", deep_embed_4x=True),
    "4x, no wider": dict(variant="v8", deep_embed_4x=True, ffn_dim=32),
    "v7a": dict(variant="v7a"),
}
SIZES = {"odd": {}, "even": dict(n_embd=64, head_size=64, ffn_dim=256, decay_rank=16, gate_rank=24)}
DECODERS = [(TorchDecoder, 2), (CppDecoder, 3), (GraphedDecoder, 2), (GraphedDecoder, 1)]
ATTENTION = {"v7b": dict(variant="v7b"), "v8-hybrid": dict(variant="v8-hybrid")}


def bits(state):
    return [part.clone() for part in state.to_list()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("sizes", "form"), [*(("odd", form) for form in FUSED), ("even", "v8"), ("even", "v7a")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decoder_class", "n"), DECODERS)
def test_a_decoder_is_at_most_twice_as_far_from_fp64_as_the_model(random_model, form, sizes, dtype, decoder_class, n):
    if decoder_class is CppDecoder and (form == "v7a" or dtype == torch.float64):
        pytest.skip("it is for v7 and v8 in fp32 and bf16")
    model = random_model(**{**SIZES[sizes], **FUSED[form]}).to(dtype)
    assert is_fusible(model)
    tokens = torch.randint(37, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    accuracy.check(decoder_class(model, n), n - 1, model, tokens)


@pytest.mark.parametrize(("n", "most"), [(1, 10), (2, 9)])
def test_the_compiled_pieces_of_a_step_are_the_same_graphs_for_every_layer(random_model, n, most):
    model, graphs = random_model(**FUSED["v7a"], n_layer=4).double(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    plain, compiled = GraphedDecoder(model, n), GraphedDecoder(model, n)
    compiled._compile(lambda piece: compilation.compiled(piece, backend))
    sequences = list(range(n))
    for token in (3, 30, 3):
        got, want = (decoder.step(sequences, [token] * n) for decoder in (compiled, plain))
        assert accuracy.distance(got, want) < 1e-12
    assert 0 < len(graphs) <= most


@pytest.mark.parametrize("form", FUSED)
def test_a_reader_of_fixed_pieces_gives_the_models_state(random_model, form):
    model = random_model(**FUSED[form])
    ids = torch.randint(37, (15,), generator=torch.Generator().manual_seed(1)).tolist()
    reader, state, want = GraphedReader(model, 5), None, None
    for start in (0, 5, 10):
        state = reader.read(ids[start : start + 5], state)
        with torch.inference_mode():
            _, want = model(torch.tensor([ids[start : start + 5]]), want)
        assert equal(bits(state), bits(want))
    with torch.inference_mode():
        _, first = model(torch.tensor([ids[:5]]))
    assert equal(bits(reader.read(ids[:5], None)), bits(first))


@pytest.mark.parametrize(
    ("decoder_class", "rows"), [(TorchDecoder, 1), (CppDecoder, 1), (GraphedDecoder, 2), (GraphedDecoder, 1)]
)
def test_every_parameter_matters_to_the_fused_step(random_model, decoder_class, rows):
    for form in ("v8",) if decoder_class is CppDecoder else ("v8", "v7a"):
        model = random_model(**FUSED[form], n_layer=2)
        tokens = [3, 30]

        def logits(model=model, tokens=tokens):
            decoder = decoder_class(model, rows)
            return torch.cat([decoder.step([0], [token]) for token in tokens])

        with torch.inference_mode():
            before = logits()
            for name, parameter in model.named_parameters():
                if name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"):
                    continue  # nothing uses them
                kept = parameter.clone()
                parameter.mul_(1.5).add_(0.1)
                assert not torch.equal(logits(), before), name
                parameter.copy_(kept)


def test_models_that_the_fused_step_does_not_know_decode_through_the_model(random_model):
    for settings in ATTENTION.values():
        assert not is_fusible(random_model(**settings))
    mixed = random_model()
    mixed.head.to(torch.float64)
    assert not is_fusible(mixed)
    stranger = random_model()
    stranger.blocks[1].register_parameter("other", torch.nn.Parameter(torch.zeros(1)))
    assert not is_fusible(stranger)
    tables = random_model().to(torch.bfloat16)
    for block in tables.blocks:
        block.ffn.enn.float()
    assert is_fusible(tables)


@pytest.mark.parametrize("form", {**FUSED, **ATTENTION})
def test_greedy_rows_that_join_and_leave_say_what_they_say_alone(random_model, form):
    model = random_model(**{**FUSED, **ATTENTION}[form])
    chance = random.Random(7)
    wanted = [
        Request([chance.randrange(37) for _ in range(chance.randrange(1, 9))], chance.randrange(1, 16), GREEDY)
        for _ in range(8)
    ]
    single = Engine(model, INTEGERS)
    alone = ["".join(single.stream(request)) for request in wanted]
    assert len(set(alone)) == len(alone)
    together = [""] * len(wanted)
    for piece in Engine(model, INTEGERS, rows=3).run(wanted):
        together[piece.request] += piece.text
    assert together == alone


@pytest.mark.parametrize("decoder_class", [TorchDecoder, CppDecoder])
def test_logits_and_states_do_not_depend_on_the_other_rows_by_a_bit(random_model, decoder_class):
    torch.manual_seed(0)
    model = random_model(n_embd=48, head_size=16, decay_rank=13)
    tokens = torch.randint(37, (6, 12)).tolist()
    chance, alone, together = random.Random(1), decoder_class(model, 6), decoder_class(model, 6)
    at = [0] * 6
    with torch.inference_mode():
        while rows := [row for row in range(6) if at[row] < 12]:
            chosen = chance.sample(rows, chance.randint(1, len(rows)))
            got = together.step(chosen, [tokens[row][at[row]] for row in chosen])
            for i, row in enumerate(chosen):
                assert torch.equal(got[i : i + 1], alone.step([row], [tokens[row][at[row]]]))
                at[row] += 1
        for row in range(6):
            assert equal(bits(together.read(row)), bits(alone.read(row)))


def test_every_row_has_settings_a_seed_and_a_stop_of_its_own(random_model):
    model = random_model(vocab_size=256)
    letters = tokenizer.load("bytes")
    requests = [
        Request("one", 30, Sampling(top_p=1.0), seed=1),
        Request("one", 30, Sampling(top_p=1.0), seed=2),
        Request("one", 30, Sampling(top_p=0.3, presence_penalty=1.0, frequency_penalty=0.5), seed=1),
        Request("two", 17, GREEDY),
        Request("one", 30, Sampling(top_p=1.0), stop=("e", "t"), seed=1),
        Request("", 5, Sampling(top_p=1.0), seed=9),
        Request("two", 0, GREEDY),
    ]

    def run(rows, order):
        texts, ends = {}, {}
        for piece in Engine(model, letters, rows).run([requests[i] for i in order]):
            texts[order[piece.request]] = texts.get(order[piece.request], "") + piece.text
            ends[order[piece.request]] = piece.finish or ends.get(order[piece.request])
        return texts, ends

    first = run(1, list(range(7)))
    assert first == run(3, list(range(7))) == run(7, [6, 2, 4, 0, 5, 1, 3])
    texts, ends = first
    assert texts[0] != texts[1]
    assert not {"e", "t"} & set(texts[4])
    assert ends[3] == ends[6] == "length"
    assert texts[6] == ""


@pytest.mark.parametrize("form", {**FUSED, **ATTENTION})
def test_saved_and_gone_on_is_never_stopped(random_model, tmp_path, form):
    model = random_model(**{**FUSED, **ATTENTION}[form])
    sampling = Sampling(top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2)
    whole, parts = Engine(model, INTEGERS), Engine(model, INTEGERS, rows=2)
    row = whole.open([1, 2, 3, 4, 5], sampling=sampling, seed=5)
    want = [whole.step()[0][1] for _ in range(20)]

    other = parts.open([1, 2, 3, 4, 5], sampling=sampling, seed=5)
    parts.open([9], sampling=Sampling(top_p=1.0), seed=1)
    got = [parts.step()[0][1] for _ in range(8)]
    parts.save(parts.snapshot(other), tmp_path / "state.safetensors")
    fresh = Engine(random_model(**{**FUSED, **ATTENTION}[form]), INTEGERS, rows=3)
    loaded = fresh.load(tmp_path / "state.safetensors")
    assert equal(bits(loaded.state), bits(parts.snapshot(other).state))
    again = fresh.open((), loaded, sampling, seed=77)
    got += [fresh.step()[0][1] for _ in range(12)]
    assert got == want
    assert equal(bits(fresh.snapshot(again).state), bits(whole.snapshot(row).state))
    twice = fresh.open((), loaded, sampling)  # the snapshot has not been touched
    assert [fresh.step()[1][1] for _ in range(12)] == want[8:]
    assert twice.place != again.place


def test_a_prompt_cache_is_shared_and_never_changed(random_model, tmp_path):
    model = random_model()
    engine = Engine(model, INTEGERS, rows=4)
    cache = Snapshot(engine.prefill([5, 6, 7, 8]))
    kept = bits(cache.state)
    engine.save(cache, tmp_path / "cache.safetensors")
    loaded = engine.load(tmp_path / "cache.safetensors")
    texts = ["".join(engine.stream(Request([9, n], 12, GREEDY, after=cache))) for n in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert texts[0] == "".join(engine.stream(Request([9, 1], 12, GREEDY, after=loaded)))
    assert texts[0] == "".join(engine.stream(Request([5, 6, 7, 8, 9, 1], 12, GREEDY)))
    assert equal(bits(cache.state), kept)
    pending = Snapshot(cache.state, (9,))
    assert texts[0] == "".join(engine.stream(Request([1], 12, GREEDY, after=pending)))


def test_a_state_of_another_model_is_refused(random_model, tmp_path):
    file = tmp_path / "state.safetensors"
    one = Engine(random_model(), INTEGERS)
    one.save(Snapshot(one.prefill([1, 2])), file)
    changed = random_model()
    with torch.no_grad():
        changed.blocks[2].att.k_a[0, 0, 3] += 1e-6
    for other in (changed, random_model(seed=1), random_model().to(torch.bfloat16), random_model(variant="v7")):
        with pytest.raises(CheckpointError, match="another model"):
            Engine(other, INTEGERS).load(file)
    data = file.read_bytes()
    for bad in (b"", data[:50], b"x" * 300, data[:-5]):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"state\.safetensors"):
            one.load(file)
    heron.save(random_model(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="wanted a state file"):
        one.load(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="nowhere"):
        one.load(tmp_path / "nowhere.safetensors")


def test_a_token_comes_with_the_models_own_log_probability(random_model):
    model, ids = random_model(), [3, 4, 5]
    sampling = Sampling(top_p=0.7, temperature=0.5, presence_penalty=2.0)
    pieces = list(Engine(model, INTEGERS).run([Request(ids, 12, sampling, seed=3)]))
    for piece in pieces:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0][0, -1]
        assert piece.token.logprob == pytest.approx(float(logits.log_softmax(0)[piece.token.id]), abs=2e-4)
        ids.append(piece.token.id)


@pytest.mark.parametrize("form", ["v8", "4x", "v7a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_off_the_device_give_the_same_bits(random_model, tmp_path, form, dtype):
    model = random_model(**FUSED[form]).to(dtype)
    request = Request([1, 2, 3, 4, 5, 6, 7], 20, Sampling(top_p=0.8), seed=2)
    want, names = list(Engine(model, INTEGERS).run([request])), set(model.state_dict())
    for place in ("host", "disk", "disk"):  # the second time from the file that is there
        file = tmp_path / "tables.bin" if place == "disk" else None
        there = Engine(model, INTEGERS, 2, place, file)
        assert list(there.run([request])) == want
        assert not [name for name in there.model.state_dict() if "enn" in name or name.endswith("s_emb.weight")]
        assert there.fingerprint == fingerprint(model.state_dict())
    assert set(model.state_dict()) == names


def test_tables_on_disk_take_no_memory(random_model, tmp_path):
    model = random_model()
    table = weakref.ref(model.blocks[1].ffn.enn)
    there = Engine(model, INTEGERS, 1, "disk", tmp_path / "tables.bin")
    del model
    gc.collect()
    assert table() is None
    assert "".join(there.stream(Request([1], 3, GREEDY)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_packed_tables_are_the_rows(tmp_path, dtype):
    tables = [torch.randn(2500, 6).to(dtype) for _ in range(3)]
    ids = torch.tensor([0, 2499, 7, 7, 1024, 1023])
    packed = Tables(tables, CPU, tmp_path / "deep" / "t.bin")
    assert torch.equal(packed.rows(ids), torch.stack([table[ids] for table in tables]))
    assert torch.equal(Tables(tables, CPU).rows(ids), packed.rows(ids))
    for kept in (Tables(tables, CPU), packed):
        staging = kept.staging(len(ids), pinned=False)
        kept.pick(ids.numpy(), staging)
        assert torch.equal(staging.transpose(0, 1), packed.rows(ids))
    data = (tmp_path / "deep" / "t.bin").read_bytes()
    with pytest.raises(CheckpointError, match="another model"):
        Tables([table + 1 for table in tables], CPU, tmp_path / "deep" / "t.bin")
    (tmp_path / "deep" / "t.bin").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        Tables(tables, CPU, tmp_path / "deep" / "t.bin")


def test_long_prompts_are_read_in_pieces_and_the_state_is_that_of_the_whole(random_model, monkeypatch):
    model, ids = random_model().double(), torch.randint(37, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    want = bits(Engine(model, INTEGERS).prefill(ids))
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 7)
    for place in ("device", "host"):
        got = bits(Engine(model, INTEGERS, tables=place).prefill(ids))
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, -1]
    best = Engine(model, INTEGERS).likeliest(Snapshot(None, tuple(ids)), 4)
    want = logits.softmax(0).topk(4)
    assert [token for token, _ in best] == want.indices.tolist()
    assert [p for _, p in best] == pytest.approx(want.values.tolist(), rel=1e-9)


def test_a_state_from_the_engine_can_be_trained_on(random_model):
    model = random_model()
    state = Engine(model, INTEGERS).prefill([1, 2, 3])
    logits, _ = model(torch.tensor([[4, 5]]), state)
    logits.square().mean().backward()
    assert model.head.weight.grad.abs().sum() > 0


def test_rows_are_given_back(random_model):
    small = Engine(random_model(), INTEGERS, rows=2)
    one, two = small.open([1]), small.open([2])
    with pytest.raises(ConfigError, match=r"the engine is full \(rows=2\)"):
        small.open([3])
    with pytest.raises(ConfigError, match="2 sequences are open"):
        next(small.run([Request([1], 3)]))
    small.close(one)
    small.close(two)
    assert len(list(small.run([Request([1], 3, GREEDY), Request([2], 3, GREEDY)]))) == 6
    for _ in small.run([Request([1], 50, GREEDY)]):
        break  # left early: the row is free again
    first, second = (small.run([Request([1], 3, GREEDY)]) for _ in range(2))
    next(first)
    for call in (lambda: next(second), lambda: small.open([1]), small.step):
        with pytest.raises(ConfigError, match="run is going on"):
            call()
    first.close()
    assert len(list(small.run([Request([1], 3, GREEDY)]))) == 3


def test_a_used_row_forgets_what_it_held(random_model):
    small = Engine(random_model(), INTEGERS)
    first = "".join(small.stream(Request([1, 2], 9, GREEDY)))
    list(small.stream(Request([30, 31, 32], 9, GREEDY)))
    assert "".join(small.stream(Request([1, 2], 9, GREEDY))) == first
    assert "".join(small.stream(Request([1], 9, GREEDY))) == "".join(
        Engine(random_model(), INTEGERS).stream(Request([1], 9, GREEDY))
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rows=0), "rows: wanted a whole number from 1 on, got 0"),
        (dict(rows=1.5), "rows: wanted a whole number from 1 on, got 1.5"),
        (dict(tables="disc"), "tables: wanted device, host, disk, got 'disc'. Did you mean 'disk'"),
        (dict(tables="disk"), "needs a tables_file"),
        (dict(tables_file="x"), "needs a tables_file"),
        (dict(tables="host", variant="v7"), "this model is v7"),
        (dict(tables="host", variant="v7b"), "only those of a v8 or v7a"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(random_model, settings, words):
    model = random_model(variant=settings.pop("variant", "v8"))
    with pytest.raises(ConfigError, match=words):
        Engine(model, INTEGERS, **settings)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request([1], -1), ConfigError, "max_tokens.*-1"),
        (Request([]), ConfigError, "prompt: it is empty"),
        (Request([1, 37]), DataError, "token 1 has id 37"),
        (Request([1], seed=-1), ConfigError, "seed: wanted a whole number from 0"),
        (Request([1], seed=1.5), ConfigError, "seed: wanted a whole number from 0"),
        (Request([1], 2.5), ConfigError, "max_tokens: wanted a whole number from 0 on, got 2.5"),
        (Request([1], float("nan")), ConfigError, "max_tokens: wanted a whole number from 0 on, got nan"),
        (Request([1.5]), DataError, "token 0 must be an id, a whole number, got 1.5"),
        (Request([1, True]), DataError, "token 1 must be an id, a whole number, got True"),
        (Request(["a"]), DataError, "token 0 must be an id, a whole number, got 'a'"),
        (Request("1 2 x"), DataError, "x"),
        (Request([1], stop=""), ConfigError, "stop"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_frees_its_row(random_model, request_, error, words):
    small = Engine(random_model(), INTEGERS)
    with pytest.raises(error, match=words):
        list(small.run([request_]))
    with pytest.raises(error, match=words):
        list(small.stream(request_))
    assert len(list(small.run([Request([1], 2, GREEDY)]))) == 2


def test_the_state_does_not_grow(random_model):
    engine = Engine(random_model(), INTEGERS)
    row = engine.open([1], sampling=GREEDY)
    sizes, storages = set(), set()
    for _ in range(60):
        engine.step()
        sizes.add(engine.snapshot(row).state.nbytes)
        storages.add(tuple(part.data_ptr() for layer in engine._decoder._states.layers for part in layer[:3]))
    assert len(sizes) == len(storages) == 1
    assert math.isfinite(sizes.pop())


def test_the_model_decoder_keeps_rows_apart(random_model):
    model = random_model(variant="v7b")
    decoder = ModelDecoder(model, 2)
    with torch.inference_mode():
        decoder.step([0], [1])
        both = decoder.step([1, 0], [5, 2])
        assert torch.equal(both[0], model(torch.tensor([[5]]))[0][0, 0])
        assert (both[1] - model(torch.tensor([[1, 2]]))[0][0, 1]).abs().max() < 1e-4


def test_a_row_that_was_closed_is_nobodys(random_model):
    engine = Engine(random_model(), INTEGERS)
    closed = engine.open([1])
    engine.close(closed)
    other = engine.open([2])
    for use in (engine.snapshot, engine.close):
        with pytest.raises(ConfigError, match="this sequence is closed"):
            use(closed)
    assert engine.snapshot(other).pending == (2,)


def test_no_file_but_a_state_file_is_written_over(random_model, tmp_path):
    engine = Engine(random_model(), INTEGERS)
    for name in ("weights.pth", "weights.safetensors"):
        heron.save(engine.model, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(CheckpointError, match="exists and is no state file"):
            engine.save(Snapshot(None, (1,)), tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    for pending in (1, 2):
        engine.save(Snapshot(None, (pending,)), tmp_path / "s")
    assert engine.load(tmp_path / "s").pending == (2,)


@pytest.mark.parametrize(
    "change",
    [
        {"pending": torch.ones(2, 2, dtype=torch.int64)},
        {"pending": torch.ones(2)},
        {"pending": torch.tensor([10**6])},
        {"counts": torch.zeros(3)},
        {"counts": torch.full((37,), float("nan"))},
        {"generator": torch.zeros(3, dtype=torch.uint8)},
        {"generator": torch.zeros(5056)},
        {"state.0001": float("nan")},
        {"state.0099": torch.zeros(1)},
        {"more": torch.zeros(1)},
    ],
)
def test_a_state_file_whose_tensors_are_not_what_was_saved_is_refused(random_model, tmp_path, change):
    engine = Engine(random_model(), INTEGERS)
    row = engine.open([1, 2], sampling=Sampling(presence_penalty=0.1))
    engine.save(engine.snapshot(row), tmp_path / "s")
    about, tensors = safetensors.metadata(tmp_path / "s"), safetensors.read(tmp_path / "s")
    assert about.pop("hash")  # which would be another one
    assert tensors["counts"].shape == (37,)
    for name, value in change.items():
        tensors[name] = torch.full_like(tensors[name], value) if isinstance(value, float) else value
    save_file(tensors, tmp_path / "s", about)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/s: damaged"):
        engine.load(tmp_path / "s")


@pytest.mark.parametrize("place", [0.2, 0.5, 1.0])
def test_a_flipped_bit_in_a_state_file_is_found(random_model, tmp_path, place):
    engine, path = Engine(random_model(), INTEGERS), tmp_path / "s"
    engine.save(Snapshot(engine.prefill([1, 2])), path)
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path}: damaged: its tensors are not those that were written"):
        engine.load(path)


def test_ids_that_stand_for_nothing_are_not_listed(random_model):
    world = tokenizer.load("world")
    engine = Engine(random_model(vocab_size=65536, n_layer=1, n_embd=16), world)
    listed = engine.likeliest(Snapshot(None, (1,)), 65536)
    assert len(listed) > 65000
    assert all(world.decode_bytes([token]) for token, _ in listed if token)
    assert [p for _, p in listed] == sorted((p for _, p in listed), reverse=True)


@pytest.fixture
def drawing_engine(monkeypatch):
    """A function as Engine's constructor; the tokens are drawn as on a CUDA device."""

    def make(model, tokens, rows=1):
        made = Engine(model, tokens, rows)
        monkeypatch.setattr(made, "_draws", DeviceDraws(tokens, rows, CPU))
        return made

    return make


def test_many_rows_drawn_at_once_say_what_each_says_alone(drawing_engine, random_model):
    model = random_model(vocab_size=256)
    letters = tokenizer.load("bytes")
    requests = [
        Request("one", 30, Sampling(top_p=1.0), seed=1),
        Request("one", 30, Sampling(top_p=1.0), seed=2),
        Request("one", 30, Sampling(top_p=0.9, presence_penalty=1.0, frequency_penalty=0.5), seed=1),
        Request("two", 17, GREEDY),
        Request("two", 17, Sampling(temperature=0, frequency_penalty=3.0, penalty_decay=0.5)),
        Request("one", 30, Sampling(top_p=1.0), stop=("e", "t"), seed=1),
        Request("", 5, Sampling(top_p=1.0, temperature=0.3), seed=9),
    ]

    def run(rows, order):
        pieces = {}
        for piece in drawing_engine(model, letters, rows).run([requests[i] for i in order]):
            pieces.setdefault(order[piece.request], []).append((piece.text, piece.token, piece.finish))
        return pieces

    first = run(1, list(range(7)))
    assert first == run(3, list(range(7))) == run(7, [6, 2, 4, 0, 5, 1, 3])
    assert first[0] != first[1]
    greedy = list(Engine(model, letters).run(requests[3:5]))  # where nothing is random every device says the same
    for i in (0, 1):
        mine, theirs = first[3 + i], [piece for piece in greedy if piece.request == i]
        assert [token.id for _, token, _ in mine] == [piece.token.id for piece in theirs]
        assert [token.logprob for _, token, _ in mine] == pytest.approx([p.token.logprob for p in theirs], abs=1e-5)


def test_rows_drawn_at_once_are_saved_and_go_on(drawing_engine, random_model, tmp_path):
    model, sampling = random_model(), Sampling(top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2)
    whole, parts = drawing_engine(model, INTEGERS), drawing_engine(model, INTEGERS, rows=3)
    whole.open([1, 2, 3], sampling=sampling, seed=5)
    want = [whole.step()[0][1] for _ in range(20)]
    parts.open([9], sampling=Sampling(top_p=1.0), seed=1)
    row = parts.open([1, 2, 3], sampling=sampling, seed=5)
    got = [parts.step()[1][1] for _ in range(8)]
    snapshot = parts.snapshot(row)
    counts = torch.zeros(37)
    for token in got:
        counts *= sampling.penalty_decay
        counts[token.id] += 1
    assert torch.equal(snapshot.counts, counts)
    parts.save(snapshot, tmp_path / "state.safetensors")
    parts.step()
    assert torch.equal(snapshot.counts, counts)  # a copy
    parts.close(row)
    again = parts.open((), parts.load(tmp_path / "state.safetensors"), sampling)
    got += [parts.step()[1][1] for _ in range(12)]
    assert got == want
    parts.close(again)
    parts.open([1, 2, 3], sampling=sampling, seed=5)  # which forgets the occurrences of the row before it
    assert [parts.step()[1][1] for _ in range(8)] == want[:8]


def test_rows_drawn_at_once_say_which_logits_are_not_finite(drawing_engine, random_model):
    model = random_model()
    with torch.no_grad():
        model.head.weight[5] = math.nan
    with pytest.raises(HeronError, match="wanted finite numbers, got nan at token id 5"):
        next(drawing_engine(model, INTEGERS).run([Request([1], 3)]))


@pytest.fixture
def looking_ahead(drawing_engine, monkeypatch):
    """A function as Engine's constructor: of one row, drawn as on a CUDA device, and that looks ahead, or not."""

    def make(model, looks_ahead=True):
        made = drawing_engine(model, INTEGERS)
        monkeypatch.setattr(made, "_decoder", recorded(GraphedDecoder(model, 1)))
        if not looks_ahead:
            monkeypatch.setattr(made._decoder, "look_ahead", lambda *_: None)
        return made

    return make


@pytest.mark.parametrize("form", ["v7", "v8", "v7a"])
def test_looking_ahead_changes_nothing(looking_ahead, random_model, form):
    """Rows are opened, closed in the middle, saved and gone on with, by chance."""
    model = random_model(variant=form)
    engines = looking_ahead(model), looking_ahead(model, looks_ahead=False)
    chance = random.Random(form)
    told = [[], []]
    for _ in range(12):
        prompt, seed = [chance.randrange(37) for _ in range(chance.randint(1, 4))], chance.randrange(9)
        sampling = Sampling(top_p=0.9, presence_penalty=chance.choice((0, 0.3)))
        after, n_tokens, is_kept = None, chance.randrange(6), chance.random() < 0.5
        for made, tokens in zip(engines, told, strict=True):
            if is_kept and tokens and not isinstance(tokens[-1], Token):
                after = tokens[-1]
            row = made.open(prompt, after, sampling, seed)
            tokens += [made.step()[0][1] for _ in range(n_tokens)]
            tokens.append(made.snapshot(row))
            tokens += [made.step()[0][1]]
            tokens.append(made.snapshot(row))
            made.close(row)
    for mine, theirs in zip(*told, strict=True):
        if isinstance(mine, Token):
            assert mine == theirs
        else:
            assert mine.pending == theirs.pending
            assert equal(bits(mine.state), bits(theirs.state))
            assert torch.equal(mine.generator, theirs.generator)
            assert (mine.counts is None) == (theirs.counts is None)
            assert mine.counts is None or torch.equal(mine.counts, theirs.counts)


def test_a_step_is_begun_before_its_token_is_known_on_the_host(looking_ahead, random_model, monkeypatch):
    engine = looking_ahead(random_model())
    begun, known = [], []
    run, receive = engine._decoder._run, engine._draws._receive
    monkeypatch.setattr(engine._decoder, "_run", lambda: (begun.append(len(known)), run())[1])
    monkeypatch.setattr(engine._draws, "_receive", lambda n: (known.append(n), receive(n))[1])
    engine.open([1, 2])
    for _ in range(4):
        engine.step()
    assert begun == [0, 0, 1, 2, 3]


def test_a_sequence_whose_token_cannot_be_drawn_is_closed(looking_ahead, random_model):
    """Only the token that it read makes its logits bad: what was looked ahead, with another one, is fine."""
    model = random_model(variant="v8", n_layer=1)
    engine = looking_ahead(model)
    engine.open([1, 2], sampling=GREEDY)
    bad = engine.step()[0][1].id
    assert bad
    with torch.no_grad():
        model.blocks[0].ffn.enn.weight[bad] = math.inf
    for engine in looking_ahead(model), looking_ahead(model, looks_ahead=False):
        sequence = engine.open([1, 2], sampling=GREEDY)
        assert engine.step()[0][1].id == bad
        before = engine.snapshot(sequence)
        for _ in range(2):
            ((closed, error),) = engine.step()
            assert isinstance(error, HeronError)
            assert "wanted finite numbers, got nan" in str(error)
            assert closed is sequence
            assert not sequence.is_open
            sequence = engine.open((), before, GREEDY)
        assert equal(bits(engine.snapshot(sequence).state), bits(before.state))


def test_after_an_interrupted_step_a_snapshot_from_before_goes_on(looking_ahead, random_model, monkeypatch):
    def interrupt(n):
        raise KeyboardInterrupt

    model, sampling = random_model(), Sampling(top_p=1.0)
    for looks_ahead in (True, False):
        made = looking_ahead(model, looks_ahead)
        made.open([1, 2], sampling=sampling, seed=3)
        want = [made.step()[0][1] for _ in range(6)]
        made = looking_ahead(model, looks_ahead)
        sequence = made.open([1, 2], sampling=sampling, seed=3)
        assert made.step()[0][1] == want[0]
        before = made.snapshot(sequence)
        with monkeypatch.context() as patch:
            patch.setattr(made._draws, "_receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                made.step()
        assert (sequence.is_open, made.n_free) == (False, 1)
        made.open((), before, sampling)
        assert [made.step()[0][1] for _ in range(5)] == want[1:]


def test_barred_ids_are_those_that_stand_for_nothing():
    world = tokenizer.load("world")
    assert barred_ids(world).nonzero()[:, 0].tolist() == list(range(65530, 65536))
    assert not barred_ids(INTEGERS).any()
