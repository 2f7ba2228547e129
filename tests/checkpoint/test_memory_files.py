"""Files of models with ROSA memory: what they say of it, what others refuse, and what `heron` does with them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import heron
from heron import cli
from heron.checkpoint.architecture import build
from heron.checkpoint.migrate import resize_vocabulary
from heron.config import RosaConfig
from heron.errors import CheckpointError

VARIANTS = ["v7", "v7b", "v8", "v8-hybrid", "rosa-lm"]
RULES = RosaConfig.preset("memory", n_matches=3, max_match=20, window=1000, end=0)
TOKENS = torch.randint(0, 5, (2, 40), generator=torch.Generator().manual_seed(0))


def assert_same(model, other):
    assert other.config == model.config
    with torch.no_grad():
        assert torch.equal(other(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_says_how_the_memory_works_and_a_bare_file_what_its_shapes_say(randomize, tmp_path, variant):
    sizes = dict(n_layer=2, n_embd=32, vocab_size=37, head_size=64 if variant == "rosa-lm" else 16)
    model = randomize(heron.RWKV(heron.ModelConfig(variant=variant, **sizes, memory=RULES)))
    if not model.config.has_ln0:
        model.blocks[0].ln0.reset_parameters()
    heron.save(model, tmp_path / "folder", format="safetensors")
    assert_same(model, heron.load(tmp_path / "folder"))
    branch = model.config.rosa
    for name in ("x.pth", "x.safetensors"):
        heron.save(model, tmp_path / name)
        bare = heron.load(tmp_path / name, rosa=branch)
        wanted = RosaConfig.preset("memory", n_matches=3, max_match=32)  # lengths from 17 to 32 share a row
        assert bare.config == dataclasses.replace(model.config, memory=wanted)
        assert all(torch.equal(value, bare.state_dict()[key]) for key, value in model.state_dict().items())
        if branch is None:
            assert_same(model, heron.load(tmp_path / name, rosa=RULES))
    shallow = dataclasses.replace(RULES, max_match=17)  # what is given goes before what the folder says
    if branch is None:
        assert heron.load(tmp_path / "folder", rosa=shallow).config.memory == shallow


def test_formats_without_a_place_for_a_memory_refuse_it(random_model, tmp_path):
    model = random_model(variant="v7", n_embd=64, head_size=64, memory="memory")
    for format, name in (("hf", "hf"), ("gguf", "x.gguf")):
        with pytest.raises(CheckpointError, match=r"^[^\n]*what a v7 with ROSA adds to a v7[^\n]*$"):
            heron.save(model, tmp_path / name, format=format)
        assert not (tmp_path / name).exists()


def test_a_file_that_is_not_quite_one_is_refused(random_model, tmp_path):
    tensors = dict(random_model(variant="v8", memory="memory").state_dict())
    for name in ("memory.scale", "memory.length", "memory.copy"):
        for content in (
            {other: tensor for other, tensor in tensors.items() if other != name},
            {**tensors, name: torch.cat((tensors[name], tensors[name], tensors[name]))},
            {**tensors, name: tensors[name][:, :0]},
            {**tensors, name: tensors[name].flatten()},
            {**tensors, name: torch.full_like(tensors[name], float("nan"))},
        ):
            with pytest.raises(CheckpointError, match=r"^x: [^\n]*memory[^\n]*$"):
                build(dict(content), "x")
    crowded = {**tensors, "memory.copy": torch.zeros(9, 18), "memory.scale": torch.zeros(9, 32)}
    with pytest.raises(
        CheckpointError, match=r"^x: no ROSA memory has a memory.copy of shape \(9, 18\): rosa, n_matches: .* got 9"
    ):
        build({**crowded, "memory.length": torch.zeros(9, 18, 32)}, "x")
    with pytest.raises(CheckpointError, match=r"memory.scale must be \(2, 32\), got \(3, 32\)"):
        build(dict(random_model(memory=RULES).state_dict()), "x", rosa=RosaConfig.preset("memory"))
    with pytest.raises(CheckpointError, match="x: there is no ROSA memory in it .heron convert --add_rosa memory"):
        build(dict(random_model().state_dict()), "x", rosa=RULES)
    lm = dict(random_model(variant="rosa-lm", memory="memory").state_dict())
    with pytest.raises(CheckpointError, match="no tensor says whether its ROSA has 1 or 4 bits"):
        build(lm, "x", rosa=RULES)


def test_another_vocabulary_keeps_the_memory(random_model):
    model = random_model(variant="v8", memory=RULES)
    for size in (20, 50):
        other = resize_vocabulary(model, size)
        assert other.config == model.config.changed(vocab_size=size)
        assert torch.equal(other.memory.length, model.memory.length)
        with torch.no_grad():
            kept = slice(min(size, 37))
            assert torch.allclose(other(TOKENS)[0][..., kept], model(TOKENS)[0][..., kept], rtol=1e-5, atol=1e-5)


def heron_(capsys, words):
    try:
        code = cli.main(words.split())
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_convert_adds_a_memory_once_and_keeps_the_logits(random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    heron.save(random_model(variant="v8"), "old.pth")
    code, out, _ = heron_(capsys, "convert old.pth new.pth --add_rosa memory --check")
    assert code == 0
    assert "wrote new.pth: v8 L3 C32 N16 V37, ROSA memory\n" in out
    assert out.endswith("in fp32: 0\n")
    model = heron.load("new.pth")
    assert model.config.memory == RosaConfig.preset("memory")
    assert torch.equal(model(TOKENS)[0], heron.load("old.pth")(TOKENS)[0])
    code, _, err = heron_(capsys, "convert new.pth newer.pth --add_rosa memory")
    assert (code, err.count("\n")) == (1, 1)
    assert "the model has a ROSA memory already" in err
    for verb in ("info", "generate", "eval --data x", "chat"):
        verb, *rest = verb.split()
        code, _, err = heron_(capsys, " ".join([verb, "old.pth", "--rosa memory", *rest]))
        assert code == 1
        assert (
            err.strip()
            .splitlines()[-1]
            .endswith("old.pth: there is no ROSA memory in it (heron convert --add_rosa memory adds one)")
        )
    trained = random_model(variant="v8", memory=RULES)
    heron.save(trained, "trained", format="safetensors")
    for target in ("trained.pth", "again --format safetensors"):
        code, out, _ = heron_(capsys, f"convert trained {target} --check")
        assert (code, out.strip().splitlines()[-1][-2:]) == (0, " 0")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["memory"]["window"] == 1000
    assert_same(trained, heron.load("again"))


def test_info_shows_the_memory_and_its_parameters(random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    heron.save(random_model(variant="v8", memory=RULES), "told", format="safetensors")
    out = heron_(capsys, "info told")[1]
    within = "over the last 1,000 tokens, within documents that end with id 0"
    assert f"\nmemory      3 matches of at most 20 tokens {within}\n" in out
    assert "more with each token" not in out
    assert (
        heron_(capsys, "init --variant v7 --n_layer 1 --n_embd 64 --vocab_size 256 --rosa memory --out x.pth")[0] == 0
    )
    out = heron_(capsys, "info x.pth --params")[1]
    assert "\nmemory      2 matches of at most 64 tokens over all tokens\n" in out
    assert "in fp32, and 12 bytes more with each token" in out
    assert "the ROSA memory adds nothing: fresh or up-cycled, not trained" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("memory.")}
    assert rows == {
        "memory.scale": ["2x64", "1x", "1x", "0", "0", "ours"],
        "memory.length": ["2x18x64", "1x", "1x", "0", "0", "ours"],
        "memory.copy": ["2x18", "10x", "10x", "0", "0", "ours"],
    }
    assert "ROSA memory's bonus: logits, which must reach several units within a short run" in out
