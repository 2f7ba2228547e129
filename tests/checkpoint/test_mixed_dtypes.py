"""Weights that mix dtypes, as llama.cpp's F16 and BF16 files do: they load as they are and compute in the widest."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import heron
from heron import cli, evaluate
from heron.commands.convert import convert
from heron.compat.x070 import RWKV_x070
from heron.config import RosaConfig

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SIZES = dict(n_layer=2, n_embd=64, head_size=64, vocab_size=256)
TOKENS = torch.tensor([[1, 2, 3, 250, 7]])


def mixed(model, matrices, vectors):
    """The tensors of a model, matrices in one dtype and all else in the other, tables in fp32."""
    return {
        name: tensor.to(F32 if ".enn." in name else matrices if tensor.dim() == 2 else vectors)
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def llama_file(random_model, tmp_path_factory):
    """A function: a dtype -> a .gguf with matrices in it, vectors in fp32 and no word of heron; and its model."""
    pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    from tests.checkpoint.test_malformed import rewrite_gguf

    def make(dtype):
        path = tmp_path_factory.mktemp("gguf") / "x.gguf"
        model = random_model(variant="v7", **SIZES)
        heron.save(model.to(dtype), path, tokenizer="bytes")
        rewrite_gguf(path, lambda tensors: None, {"heron.dtypes": None, "heron.tokenizer": None})
        return path, model

    return make


@pytest.mark.filterwarnings("ignore:.*has no tokenizer like bytes")
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_file_of_llama_cpp_runs_in_every_verb(llama_file, tmp_path, capsys, dtype):
    path, model = llama_file(dtype)
    with pytest.warns(UserWarning, match="x.gguf: its weights mix dtypes; .* compute in float32"):
        loaded = heron.load(path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype, F32}
    assert torch.equal(loaded(TOKENS)[0], model.float()(TOKENS)[0])
    (tmp_path / "t.txt").write_text("Some text to be scored.")
    for command in (
        ["generate", str(path), "--prompt", "ab", "--max_tokens", "3"],
        ["generate", str(path), "--prompt", "ab", "--max_tokens", "3", "--dtype", "bf16"],
        ["eval", str(path), "--data", str(tmp_path / "t.txt")],
        ["eval", str(path), "--data", str(tmp_path / "t.txt"), "--mode", "rnn"],
        ["convert", str(path), str(tmp_path / "x.pth")],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        assert err.count("mix dtypes") == (0 if "--dtype" in command or command[0] == "convert" else 1), err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {p.dtype for p in heron.load(path, dtype=F16).parameters()} == {F16}


@pytest.mark.parametrize(
    ("variant", "matrices", "vectors"),
    [
        *((variant, *two) for variant in ("v7", "v7b", "v8-hybrid", "rosa-lm") for two in ((BF16, F32), (F32, F16))),
        *(("v8", *two) for two in ((F16, F32), (BF16, F32), (F32, F16), (F16, BF16), (BF16, torch.float64))),
    ],
)
@pytest.mark.filterwarnings("ignore:.*mix dtypes", "ignore:.*cannot say whether its ln0")
def test_every_variant_computes_in_the_widest(random_model, tmp_path, variant, matrices, vectors):
    rosa = RosaConfig.preset("qkv-1bit") if variant == "rosa-lm" else None
    path = tmp_path / "x.pth"
    torch.save(mixed(random_model(variant=variant, rosa=rosa, **SIZES), matrices, vectors), path)
    widest = torch.promote_types(matrices, vectors)
    model, wide = heron.load(path, rosa=rosa), heron.load(path, dtype=widest, rosa=rosa)
    logits, state = model(TOKENS)
    assert logits.dtype == widest
    assert torch.equal(logits, wide(TOKENS)[0])
    assert torch.equal(model(TOKENS, state)[0], wide(TOKENS, wide(TOKENS)[1])[0])
    loss = model.loss(TOKENS, TOKENS)
    assert torch.equal(loss, wide.loss(TOKENS, TOKENS))
    loss.backward()
    assert all(p.grad.dtype == p.dtype for p in (model.emb.weight, model.head.weight, model.blocks[1].ln2.weight))
    assert evaluate.loglikelihoods(model, [([1], [2, 3])]) == evaluate.loglikelihoods(wide, [([1], [2, 3])])


@pytest.mark.filterwarnings("ignore:.*mix dtypes")
def test_an_engine_brings_them_into_one_dtype_once(random_model, tmp_path):
    torch.save(mixed(random_model(variant="v8", **SIZES), BF16, F32), tmp_path / "x.pth")
    model, tokenizer = heron.load(tmp_path / "x.pth"), heron.tokenizer.load("bytes")
    engine = heron.Engine(model, tokenizer)
    assert engine._is_fusible
    assert {p.dtype for p in engine.model.parameters()} == {F32}
    assert {p.dtype for p in model.parameters()} == {BF16, F32}  # the caller's own stays
    wide = heron.load(tmp_path / "x.pth", dtype=F32)
    settings = dict(max_tokens=5, temperature=0)
    assert heron.generate(model, tokenizer, "ab", **settings) == heron.generate(wide, tokenizer, "ab", **settings)
    tokens = np.arange(1, 40)
    assert evaluate.evaluate(model, tokens, 8) == evaluate.evaluate(wide, tokens, 8)


@pytest.mark.filterwarnings("ignore:.*mix dtypes")
def test_the_drop_in_computes_in_the_widest(random_model, tmp_path):
    torch.save(mixed(random_model(variant="v7", **SIZES), F16, F32), tmp_path / "x.pth")
    model = RWKV_x070(SimpleNamespace(MODEL_NAME=str(tmp_path / "x")))
    wide = heron.load(tmp_path / "x.pth", dtype=F32)
    assert torch.equal(model.forward_seq([1, 2, 3], None, full_output=True)[0], wide(torch.tensor([[1, 2, 3]]))[0][0])


@pytest.mark.filterwarnings("ignore:.*mix dtypes")
def test_tables_in_fp32_beside_bf16_are_no_mix(random_model, tmp_path):
    """As training keeps them: their rows are cast when they are looked up, and the network stays in bf16."""
    torch.save(mixed(random_model(variant="v8", **SIZES), BF16, BF16), tmp_path / "x.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = heron.load(tmp_path / "x.pth")
    assert model.blocks[0].ffn.enn.weight.dtype == F32
    assert model(TOKENS)[0].dtype == BF16


@pytest.mark.filterwarnings("ignore:.*mix dtypes")
def test_converting_keeps_or_changes_them_as_asked(random_model, tmp_path):
    torch.save(mixed(random_model(variant="v7", **SIZES), F16, F32), tmp_path / "x.pth")
    _, kept = convert(tmp_path / "x.pth", tmp_path / "y.safetensors")
    assert {p.dtype for p in kept.parameters()} == {F16, F32}
    _, one = convert(tmp_path / "x.pth", tmp_path / "z.safetensors", dtype="bf16")
    assert {p.dtype for p in one.parameters()} == {BF16}
