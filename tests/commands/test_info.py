"""`heron info`: the variant, the sizes, the tables and whatever is odd about a file; and the table of parameters."""

from __future__ import annotations

import re

import pytest
import torch

import heron
from heron.commands import info
from heron.config import VARIANTS
from heron.model.init import rule
from heron.optim import group_of

FAMILY = {
    "v7": (dict(variant="v7"), "RWKV-7", 0),
    "v7a": (dict(variant="v7a"), "RWKV-7 with a hidden-gated DeepEmbed", 1024),
    "v7b": (dict(variant="v7b"), "RWKV-7 with a hidden-gated DeepEmbed and DeepEmbedAttention", 1024 + 256 + 32),
    "v8": (dict(variant="v8"), "RWKV-8: RWKV-7 with DeepEmbed", 32),
    "v8 4x": (dict(variant="v8", deep_embed_4x=True), "RWKV-8: RWKV-7 with DeepEmbed, in the 4x form", 50),
    "hybrid": (dict(variant="v8-hybrid"), "RWKV-8 with DeepEmbedAttention", 32 + 256 + 32),
}


def facts(text):
    """The lines of a description by their first column; lines without one belong to the column above."""
    found, at = {}, ""
    for line in text.split("\n\n")[0].splitlines():
        at = line[:12].strip() or at
        found.setdefault(at, []).append(line[12:])
    return found


@pytest.mark.parametrize("variant", FAMILY)
def test_a_file_is_described(random_model, tmp_path, variant):
    changes, words, row = FAMILY[variant]
    model = random_model(**changes).to(torch.bfloat16)
    heron.save(model, tmp_path / "x.pth")
    found = facts(info.describe(str(tmp_path / "x.pth"), params=False))
    assert found["variant"] == [model.config.variant, words]
    assert found["sizes"] == ["n_layer 3, n_embd 32, head_size 16", "ffn_dim 50, vocab_size 37"]
    assert found["ranks"] == ["decay 5, iclr 6, value 7, gate 9"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"][0].split(", ")[0] == f"{total:,}"
    assert found["dtype"] == ["bfloat16"]
    if row:
        assert found["parameters"][0].endswith(f", {3 * 37 * row:,} of them in tables")
        n_tables = {"v7b": 9, "hybrid": 9}.get(variant, 3)
        assert found["tables"][0].startswith(f"{n_tables} of ")
        kib = re.findall(r"([\d.e+]+) (bytes|KiB)", found["tables"][0])
        sizes = [float(number) * {"bytes": 1, "KiB": 1024}[unit] for number, unit in kib]
        assert sizes == pytest.approx([3 * 37 * row * 2, 3 * row * 2], rel=0.01)
    else:
        assert "tables" not in found
    grows = "more with each token" in found["state"][0]
    assert grows == model.config.has_attention


def odd(tensors, tmp_path):
    torch.save(tensors, tmp_path / "x.pth")
    return "\n".join(facts(info.describe(str(tmp_path / "x.pth"), params=False)).get("odd", []))


def test_what_is_odd_about_a_file_is_said(random_model, tmp_path):
    plain = dict(random_model(variant="v8", n_embd=64, head_size=64, ffn_dim=256).state_dict())
    assert odd(plain, tmp_path) == ""
    unused = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
    for change, words in [
        (lambda name, x: None if name in unused else x, "v0, blocks.0.att.v1, blocks.0.att.v2 absent (never used)"),
        (lambda name, x: x.bfloat16() if name == "emb.weight" else x, "dtypes are mixed"),
        (lambda name, x: torch.ones_like(x) if "enn" in name else x, "every DeepEmbed gate is 1"),
        (lambda name, x: x * 1e7 if name == "head.weight" else x, "head.weight beyond 65504"),
        (lambda name, x: 0 * x if name.endswith(("output.weight", "ffn.value.weight")) else x, "no block writes"),
    ]:
        changed = {name: change(name, x) for name, x in plain.items()}
        assert words in odd({name: x for name, x in changed.items() if x is not None}, tmp_path)
    assert "names begin with '_forward_module.'" in odd({f"_forward_module.{n}": x for n, x in plain.items()}, tmp_path)
    small = odd(dict(random_model(variant="v7").state_dict()), tmp_path)
    assert "head_size is 16; all released models have 64" in small
    assert "ffn_dim is 50, not 4 * n_embd" in small


def test_what_is_odd_about_attention_and_low_rank_gates(random_model, tmp_path):
    tensors = dict(random_model(variant="v7b").state_dict())
    flat = {name: x.view(1, 1, -1) if ".qkv.x_q" in name else x for name, x in tensors.items()}
    assert "blocks.2.qkv.x_q stored as (1, 1, n)" in odd(flat, tmp_path)
    silent = {name: 0 * x if ".lnv." in name else x for name, x in tensors.items()}
    assert "the attention writes nothing" in odd(silent, tmp_path)
    merged = {name: 0 * x if "s_emb_x" in name else x for name, x in tensors.items()}
    assert "merged into ffn.s_emb" in odd(merged, tmp_path)
    hybrid = dict(random_model(variant="v8-hybrid").state_dict())
    assert "ln0 held but not applied" in odd(hybrid, tmp_path)
    without = {name: x for name, x in hybrid.items() if ".ln0." not in name}
    assert "ln0 absent" in odd(without, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_of_parameters_says_what_the_code_does(variant, monkeypatch):
    monkeypatch.setitem(heron.config.PRESETS, "small", dict(variant=variant, n_layer=2, n_embd=64))
    text = info.describe("small", params=True)
    _, table, legend = text.split("\n\n")
    header, *rows = [re.split(r"  +", line) for line in table.splitlines()]
    assert header == ["name", "shape", "group", "lr", "decay", "initial value", "source"]
    config = heron.ModelConfig.preset("small")
    with torch.device("meta"):
        parameters = dict(heron.RWKV(config).named_parameters())
    assert [row[0] for row in rows] == list(parameters)
    for name, shape, group, lr, decay, start, source in rows:
        expected, parameter = group_of(name, parameters[name]), parameters[name]
        assert shape == "x".join(map(str, parameter.shape))
        assert (group, lr, decay) == (expected.name, f"{expected.lr_scale:g}x", "0.1" if expected.decays else "0")
        assert start == rule(name, config).text
        assert source == ("ours" if rule(name, config).ours else "RWKV-LM")
        assert f"{group}  " in legend
    assert "--method lora: lr 0.0001 to 1e-05, no decay; weights are frozen; group an adapter: decay would" in legend
    assert ("ours  " in legend) == (variant != "v7")


def test_every_preset_is_listed_with_its_parameters(monkeypatch):
    names = ("rwkv7-0.1b", "rwkv7b-1.5b")
    monkeypatch.setattr(info, "PRESETS", {name: heron.config.PRESETS[name] for name in names})
    lines = [line.split() for line in info.presets().splitlines()]
    assert [(line[0], line[-1]) for line in lines[1:]] == [(names[0], "191,084,544"), (names[1], "6,951,481,344")]
