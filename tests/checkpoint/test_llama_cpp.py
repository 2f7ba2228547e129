"""llama.cpp as the judge of our GGUF files (prebuilt in the wheel of xllamacpp), and World in every kind of folder."""

from __future__ import annotations

import json
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import heron
from heron import cli, tokenizer
from heron.checkpoint import beside, vocabulary
from heron.checkpoint.formats import gguf_header
from heron.errors import CheckpointError, DataError

TEXT = 'def f(x):\n    return "Grüße, 世界! 🦢"  # 3.14\n\n\tthe end\r\n\x00\x7f ' + "".join(
    map(chr, range(0x20, 0x250))
)
IDS = [33155, 33, 10267, 14610, 11, 261, 24281]  # "Hello 世界", and more


@pytest.fixture(scope="module")
def world(random_model, tmp_path_factory):
    """A folder with w.gguf, w16.gguf, hf and safetensors of a model of World's, and the model."""
    home = tmp_path_factory.mktemp("world")
    model = random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=65536)
    heron.save(model, home / "w.gguf", tokenizer="world")
    for kind in ("hf", "safetensors"):
        heron.save(model, home / kind, kind, tokenizer="world")
    return home, model


@pytest.fixture(scope="module")
def xllamacpp():
    pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    return pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp==2026.10.11549")


def server_of(xllamacpp, path):
    """llama.cpp's server in this process, with a model."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 512, 1
    settings.warmup, settings.verbosity, settings.cpuparams.n_threads = False, -1, 1
    return xllamacpp.Server(settings)


@pytest.fixture(scope="module")
def server(xllamacpp, world):
    return server_of(xllamacpp, world[0] / "w.gguf")


def post(server, path, **body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def logprobs(server, ids, n=500):
    """{id: log-probability} of the n likeliest ids behind `ids`."""
    answer = server.handle_completions({"prompt": ids, "n_predict": 1, "n_probs": n, "temperature": -1.0})
    return {item["id"]: item["logprob"] for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def expected(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0, -1].float().log_softmax(0)


@pytest.mark.parametrize("n", [1, 3, len(IDS)])
def test_its_logits_are_ours(server, world, n):
    got = logprobs(server, IDS[:n])
    ours = expected(world[1], IDS[:n])
    assert len(got) == 500
    assert max(abs(ours[i].item() - value) for i, value in got.items()) < 1e-4
    assert set(ours.topk(50).indices.tolist()) <= got.keys()


def test_its_ids_are_ours(server):
    ids = tokenizer.load("world").encode(TEXT)
    assert post(server, "/tokenize", content=TEXT)["tokens"] == ids
    assert post(server, "/detokenize", tokens=ids)["content"] == TEXT


def test_it_ends_where_a_document_or_a_turn_does(server):
    for end, text in ((0, ""), (261, "\n\n")):
        request = {"prompt": IDS, "n_predict": 5, "logit_bias": [[end, 1000]]}
        (choice,) = server.handle_completions(request)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    (choice,) = server.handle_completions({"prompt": IDS, "n_predict": 5, "logit_bias": [[33, 1000]]})["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" " * 5, "length")


def test_it_uses_the_chat_template(server):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " One\n\n\ntwo "},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "three"},
    ]
    shown = "System: Be brief.\n\nUser: One\ntwo\n\nAssistant: An answer.\n\nUser: three\n\nAssistant:"
    assert post(server, "/apply-template", messages=turns)["prompt"] == shown
    answer = server.handle_chat_completions({"messages": turns, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.load("world").encode(shown))


def test_what_its_converter_writes_is_in_the_metadata(world):
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    told = gguf.GGUFReader(world[0] / "w.gguf").fields
    said = {
        "general.name": "w", "general.type": "model", "general.file_type": gguf.LlamaFileType.ALL_F32,
        "tokenizer.ggml.model": "rwkv", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 261,
    }  # fmt: skip
    assert {key: told[key].contents() for key in said} == said
    assert told["tokenizer.chat_template"].contents() == vocabulary.CHAT_TEMPLATE
    tokens, world_ids = told["tokenizer.ggml.tokens"], tokenizer.load("world")
    assert len(tokens.data) == 65536
    for text in ("The", " the", "\n\n", "你", "é"):
        [number] = world_ids.encode(text)
        assert tokens.contents(number).encode().decode("unicode_escape").encode("latin-1") == text.encode()
    assert beside.vocabulary_of(world[0] / "w.gguf").spec == "world"


@pytest.mark.parametrize(("dtype", "file_type", "error"), [("fp16", 1, 2e-2), ("bf16", 32, 2e-1)])
@pytest.mark.filterwarnings("ignore:.*mix dtypes")
def test_half_precision_goes_there_and_back(xllamacpp, random_model, tmp_path, dtype, file_type, error):
    import gguf

    model = random_model(variant="v7", n_layer=1, n_embd=64, head_size=64, vocab_size=300)
    heron.save(model, tmp_path / "w.pth")
    (tmp_path / "t.json").write_text(tokenizer.learn_bpe(["the heron and the hen " * 9], 262))
    command = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "x.gguf"), "--dtype", dtype]
    assert cli.main([*command, "--tokenizer", str(tmp_path / "t.json")]) == 0
    assert gguf.GGUFReader(tmp_path / "x.gguf").get_field("general.file_type").contents() == file_type
    server = server_of(xllamacpp, tmp_path / "x.gguf")
    got, ours = (
        logprobs(server, [104, 5, 7], 50),
        expected(heron.load(tmp_path / "x.gguf", dtype=torch.float32), [104, 5, 7]),
    )
    assert max(abs(ours[i].item() - value) for i, value in got.items()) < error
    text = "the heron's hen,  and 12345 more\n\n äöü 世"
    assert post(server, "/tokenize", content=text)["tokens"] == tokenizer.load(str(tmp_path / "t.json")).encode(text)


def test_a_tokenizer_without_merges_runs_there(xllamacpp, random_model, tmp_path):
    from tests.checkpoint.test_exports import late_end

    late_end(tmp_path / "t.json")
    heron.save(
        random_model(variant="v7", n_layer=1, n_embd=64, head_size=64, vocab_size=257),
        tmp_path / "x.gguf",
        tokenizer=str(tmp_path / "t.json"),
    )
    server = server_of(xllamacpp, tmp_path / "x.gguf")
    assert post(server, "/tokenize", content="a b\n")["tokens"] == tokenizer.load(str(tmp_path / "t.json")).encode(
        "a b\n"
    )
    (choice,) = server.handle_completions({"prompt": "a", "n_predict": 5, "logit_bias": [[256, 1000]]})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


# -- World in folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "safetensors"])
def test_world_needs_no_code_of_anyone(world, kind, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known = transformers.AutoTokenizer.from_pretrained(world[0] / kind, trust_remote_code=False)
    ours = tokenizer.load("world")
    rng = np.random.default_rng(0)
    texts = [TEXT, Path(cli.__file__).read_text(), "a" * 3000, "世" * 3000, " " * 3000, "\n" * 99, ""]
    texts += ["".join(map(chr, rng.integers(1, 0xD800, size=500))) for _ in range(5)]
    for text in texts:
        assert known(text)["input_ids"] == ours.encode(text)
        assert known.decode(ours.encode(text)) == text
    assert known.eos_token_id == known.bos_token_id == known.pad_token_id == 0
    batch = known(["a", "b c"], padding=True)
    assert batch["attention_mask"] in ([[1, 0], [1, 1]], [[0, 1], [1, 1]])


def test_rwkv7_hf_takes_the_folder(world, monkeypatch):
    rwkv7_hf = pytest.importorskip("rwkv7_hf", reason="rwkv7-hf is not installed: pip install rwkv7-hf==0.9.0")
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = rwkv7_hf.RWKV7Tokenizer.from_pretrained(world[0] / "hf")
    assert theirs(TEXT)["input_ids"] == tokenizer.load("world").encode(TEXT)
    pipe = transformers.pipeline("text-generation", model=str(world[0] / "hf"), trust_remote_code=True)
    assert type(pipe.model).__name__ == "RWKV7ForCausalLM"
    (out,) = pipe("Hello", max_new_tokens=3, do_sample=False)
    ours = heron.generate(world[1], tokenizer.load("world"), "Hello", max_tokens=3, temperature=0)
    assert out["generated_text"] == "Hello" + ours


def test_its_converter_finds_what_it_reads(world):
    """What convert_hf_to_gguf.py asks of a folder of RWKV7ForCausalLM: its fields, the table, the special tokens."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    folder = world[0] / "hf"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RWKV7ForCausalLM"]
    for field in (
        "head_dim", "norm_eps", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
        "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim",
    ):  # fmt: skip
        assert config[field] is not None, field
    assert (folder / vocabulary.WORLD_FILE).read_bytes() == vocabulary.world_file().read_bytes()
    special = gguf.SpecialVocab(folder, load_merges=False)
    assert special.special_token_ids == {"bos": 0, "eos": 0, "pad": 0}
    assert special.chat_template == vocabulary.CHAT_TEMPLATE


def test_another_table_is_not_taken_for_world(world, tmp_path):
    """A released folder holds the table and code; a later table has another name or content."""
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / vocabulary.WORLD_FILE).write_bytes(vocabulary.world_file().read_bytes().replace(b"\n", b"\r\n"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["hf_rwkv_tokenizer.X", None]}})
    )
    found = vocabulary.from_folder(folder)
    assert found.spec == "world"
    assert b"auto_map" not in found.folder()["tokenizer_config.json"]
    (folder / vocabulary.WORLD_FILE).write_bytes(vocabulary.world_file().read_bytes() + b"65530 'x' 1\n")
    with pytest.raises(DataError, match="another table than rwkv_vocab_v20230424.txt, the only one"):
        vocabulary.from_folder(folder)


@pytest.mark.parametrize("spec", ["bytes", "integers:65536:9", "bpe"])
@pytest.mark.filterwarnings("ignore:.*llama.cpp has no tokenizer like")
def test_a_model_of_as_many_ids_with_another_tokenizer_never_gets_worlds_table(random_model, tmp_path, spec):
    pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    if spec == "bpe":
        spec = str(tmp_path / "t.json")
        Path(spec).write_text(tokenizer.learn_bpe(["the heron and the hen " * 9], 262))
    model = random_model(variant="v7", n_layer=1, n_embd=32, head_size=32, vocab_size=65536)
    heron.save(model, tmp_path / "x.gguf", tokenizer=spec)
    heron.save(model, tmp_path / "f", "safetensors", tokenizer=spec)
    keys = [f"tokenizer.ggml.{key}" for key in ("model", "eos_token_id", "eot_token_id")]
    told = gguf_header.read(tmp_path / "x.gguf", keys)
    assert told["tokenizer.ggml.model"] == ("gpt2" if spec.endswith("t.json") else "none")
    assert "tokenizer.ggml.eot_token_id" not in told
    assert not (tmp_path / "f" / vocabulary.WORLD_FILE).exists()
    eod = tokenizer.load(spec).eod
    for path in (tmp_path / "x.gguf", tmp_path / "f"):
        assert beside.vocabulary_of(path).eod == eod
    assert told["tokenizer.ggml.eos_token_id"] == eod


def test_a_tokenizer_of_others_in_a_gguf_is_not_taken_for_world(random_model, tmp_path, capsys):
    """Nothing is guessed where the file says that there is one; weights alone come out without it."""
    from tests.checkpoint.test_malformed import rewrite_gguf

    path = tmp_path / "x.gguf"
    (tmp_path / "t.json").write_text(tokenizer.learn_bpe(["the heron and the hen " * 9], 262))
    model = random_model(variant="v7", n_layer=1, n_embd=64, head_size=64, vocab_size=262)
    heron.save(model, path, tokenizer=str(tmp_path / "t.json"))
    rewrite_gguf(path, lambda tensors: None, {"tokenizer.huggingface.json": None})
    with pytest.raises(CheckpointError, match=r"its tokenizer \('gpt2', 262 ids\) is not known here; name one"):
        beside.vocabulary_of(path)
    assert cli.main(["generate", str(path), "--prompt", "a"]) == 1
    assert "is not known here; name one (--tokenizer)" in capsys.readouterr().err
    assert cli.main(["convert", str(path), str(tmp_path / "f"), "--format", "hf"]) == 1
    assert cli.main(["convert", str(path), str(tmp_path / "x.pth")]) == 0


def test_world_is_assumed_for_its_number_of_ids_and_said(world, tmp_path):
    with pytest.warns(UserWarning, match="x.gguf: nothing tells the tokenizer; World is assumed, for 65,536 ids"):
        heron.save(world[1], tmp_path / "x.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heron.save(world[1], tmp_path / "y.gguf", tokenizer="world")
    assert (tmp_path / "x.gguf").stat().st_size == (tmp_path / "y.gguf").stat().st_size
