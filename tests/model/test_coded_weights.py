"""Weights of codes: what is replaced, that sequences and steps compute with the same ones, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import heron
from heron import cli, tokenizer
from heron.errors import CheckpointError, ConfigError
from heron.generation import Engine, Request, Sampling, decoders
from heron.generation import engine as engine_module
from heron.generation.decoder import CppDecoder
from heron.generation.graphed import GraphedDecoder
from heron.generation.step import matrix_of
from heron.model.coded import BITS, CodedLinear, quantize_for_running, weights_of
from heron.model.quantized import quantized_layers
from heron.ops import _build
from heron.ops._choice import Choice
from heron.ops._products import Product
from heron.ops.codes import CodedMatrix
from heron.ops.matvec.reference import matvec_reference
from tests.generation import accuracy

CPU = torch.device("cpu")
SIZES = dict(n_layer=2, n_embd=64, ffn_dim=128, vocab_size=256)
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


in_both = pytest.mark.parametrize("weights", BITS)


def stood_for(model: heron.RWKV, weights: str) -> heron.RWKV:
    """A copy whose matrices are those that the ones of codes stand for: the head's have 8 bits."""
    model = copy.deepcopy(model)
    for layer, bits in [*((layer, BITS[weights]) for layer in quantized_layers(model).values()), (model.head, 8)]:
        layer.weight.data = CodedMatrix.of(layer.weight, bits).dequantized(layer.weight.dtype)
    return model


@pytest.mark.parametrize("variant", ["v7", "v8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@in_both
def test_sequences_are_read_with_the_matrices_that_codes_stand_for(random_model, variant, dtype, weights):
    model = random_model(variant=variant, **SIZES).to(dtype)
    assert weights_of(model) is None
    want, kept = (
        stood_for(model, weights),
        {name: p for name, p in model.named_parameters() if "emb" in name or p.dim() != 2},
    )
    assert quantize_for_running(model, CPU, weights) is model
    assert weights_of(model) == weights
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, CodedLinear) for module in model.modules()) == 2 * 6 + 1
    assert all(model.get_parameter(name) is p for name, p in kept.items())
    ids = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids)[0], want(ids)[0])
        assert torch.equal(model.loss(ids, ids), heron.ops.cross_entropy(want(ids)[0], ids, 1e-4))


@needs_compiler
@pytest.mark.parametrize("variant", ["v7", "v8"])
@in_both
def test_an_engine_writes_on_with_the_matrices_that_codes_stand_for(random_model, variant, weights):
    model = random_model(variant=variant, **SIZES)
    texts = []
    for one in (stood_for(model, weights), quantize_for_running(model, CPU, weights)):
        engine = Engine(one, tokenizer.load("bytes"), rows=3)
        asked = [Request(f"of {i}", 24, Sampling(temperature=0)) for i in range(3)]
        texts.append(sorted((piece.request, piece.token.id) for piece in engine.run(asked) if piece.token))
    assert texts[0] == texts[1]
    assert isinstance(engine._decoder, CppDecoder)


@needs_compiler
@in_both
def test_tables_off_the_device_are_found_beside_weights_of_codes(random_model, tmp_path, weights):
    model = quantize_for_running(random_model(**SIZES), CPU, weights)
    asked = [Request("of", 24, Sampling(temperature=0))]
    places = (dict(), dict(tables="host"), dict(tables="disk", tables_file=tmp_path / "x.tables"))
    texts = [[p.text for p in Engine(model, tokenizer.load("bytes"), **place).run(asked)] for place in places]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        (dict(variant="v7a"), "cpu", "is for v7 and v8, and this is a v7a"),
        (dict(variant="v8-hybrid"), "cpu", "is for v7 and v8, and this is a v8-hybrid"),
        (dict(n_embd=96, head_size=32), "cpu", "n_embd must be a multiple of 64, got 96"),
        (dict(ffn_dim=100), "cpu", "ffn_dim must be a multiple of 64, got 100"),
        (dict(), "mps", "runs on a CPU or a CUDA GPU, not on mps; add --device cpu"),
    ],
)
@in_both
def test_what_has_no_form_of_codes_is_refused_in_words(random_model, changes, device, message, weights):
    model = random_model(**{**SIZES, **changes})
    with pytest.raises(ConfigError, match=f"weights {weights}: {message}"):
        quantize_for_running(model, torch.device(device), weights)
    assert not any(isinstance(module, CodedLinear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["v7", "v8"])
@pytest.mark.parametrize("n", [1, 3])
@in_both
def test_the_decoder_of_a_gpu_is_near_what_codes_stand_for(random_model, variant, dtype, n, weights):
    model = quantize_for_running(random_model(variant=variant, **SIZES).to(dtype), CPU, weights)
    texts = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    accuracy.check(GraphedDecoder(model, n), n // 2, model, *texts)


@in_both
def test_layers_of_codes_are_compiled_as_others_are(random_model, weights):
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    model = quantize_for_running(random_model(variant="v7", **SIZES), CPU, weights)
    with torch.inference_mode():
        layer, matrix = model.blocks[0].ffn.key, matrix_of(model.blocks[0].ffn.key)
        x, product = torch.randn(1, 8, 64), Product(torch.randn(1, 64), matrix)
        assert torch.equal(compiled(layer)(x), layer(x))
        (got,), (want,) = compiled(matvec_reference)([product]), matvec_reference([product])
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 3])
@in_both
def test_a_recorded_step_is_near_what_codes_stand_for(random_model, dtype, n, weights):
    model = random_model(variant="v8", n_layer=3, n_embd=192, head_size=64, ffn_dim=320, vocab_size=100).to(dtype)
    model = quantize_for_running(model, torch.device("cuda"), weights).to("cuda")
    texts = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    accuracy.check(GraphedDecoder(model, n), n // 2, model, *texts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("weights", "part"), [("int8", 0.6), ("int4", 0.4)])
def test_an_engine_on_a_gpu_writes_with_less_memory(random_model, monkeypatch, weights, part):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS_CUDA", 64)
    sizes = dict(n_layer=4, n_embd=512, head_size=64, ffn_dim=2048, vocab_size=256)
    given, taken, texts = random_model(variant="v7", **sizes).bfloat16(), [], []
    for wanted in (copy.deepcopy(given), quantize_for_running(copy.deepcopy(given), torch.device("cuda"), weights)):
        model = wanted.to("cuda")
        taken.append(sum(x.nbytes for x in (*model.parameters(), *model.buffers()) if x.dim() == 2))
    assert taken[1] < part * taken[0]
    prompts = [bytes(range(32, 32 + 70 + 9 * i)).decode("latin-1") for i in range(3)]
    for place in (dict(rows=1), dict(rows=3), dict(rows=3, fit_steps=True), dict(rows=3, packed=2)):
        engine = Engine(model, tokenizer.load("bytes"), **place)
        asked = [Request(prompt, 24, Sampling(temperature=0)) for prompt in prompts]
        texts.append([(piece.request, piece.token.id) for piece in engine.run(asked) if piece.token])
        assert len(texts[-1]) == 3 * 24
        assert isinstance(engine._decoder, GraphedDecoder)


@in_both
def test_without_the_decoder_in_cpp_there_is_none(random_model, monkeypatch, weights):
    model = quantize_for_running(random_model(**SIZES), CPU, weights)
    monkeypatch.setattr(
        decoders, "token_step_choice", lambda *_: Choice("reference", "plain PyTorch; not in C++ (none)")
    )
    with pytest.raises(
        ConfigError,
        match=rf"weights {weights}: needs the decoder in C\+\+, and there is none here: plain PyTorch; not in",
    ):
        Engine(model, tokenizer.load("bytes"))
    model.blocks[0].att.key.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="this model has hooks, adapters or several dtypes"):
        Engine(model, tokenizer.load("bytes"))


def test_unknown_weights_are_refused_in_words(random_model):
    with pytest.raises(ConfigError, match="weights: wanted one of int8, int4, got 'int2'"):
        quantize_for_running(random_model(**SIZES), CPU, "int2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("train", "--weights", "int4"), "weights: wanted one of auto, fp32, bf16, got 'int4'"),
        (("finetune", "x.pth", "--base", "int4"), "base: wanted one of auto, fp32, bf16, int8, nf4, got 'int4'"),
    ],
)
def test_what_trains_takes_no_weights_in_4_bits(random_model, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    heron.save(random_model(**SIZES), "x.pth")
    assert cli.main([*flags, "--max_steps", "1", "--data", "x.jsonl", "--out", "run"]) == 1
    assert said in capsys.readouterr().err


@in_both
def test_weights_of_codes_are_neither_saved_nor_trained(random_model, weights, tmp_path):
    model = quantize_for_running(random_model(**SIZES), CPU, weights)
    with pytest.raises(CheckpointError, match=f"x.pth: these weights are {weights}, for running alone"):
        heron.save(model, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
    with pytest.raises(ConfigError, match="the model has no parameter that requires a gradient"):
        heron.build_optimizer(model)


@needs_compiler
@in_both
def test_the_command_line_runs_and_scores_weights_of_codes(random_model, tmp_path, capsys, weights):
    path, text = tmp_path / "x.pth", tmp_path / "x.txt"
    heron.save(random_model(**SIZES), path)
    text.write_text("what is scored " * 9)
    tokens, figures = ["--tokenizer", "bytes", "--device", "cpu"], {}
    assert cli.main(["generate", str(path), "--weights", weights, "--max_tokens", "4", *tokens]) == 0
    for name, flags in {
        "file": [],
        "gpt": ["--weights", weights],
        "rnn": ["--weights", weights, "--mode", "rnn"],
    }.items():
        capsys.readouterr()
        assert cli.main(["eval", str(path), "--data", str(text), *tokens, *flags]) == 0
        figures[name] = float(capsys.readouterr().out.partition("loss")[2].split()[0])
    assert figures["gpt"] == pytest.approx(figures["rnn"], abs=2e-4)
    assert figures["gpt"] != figures["file"]
    assert figures["gpt"] == pytest.approx(figures["file"], abs={"int8": 0.05, "int4": 0.2}[weights])
