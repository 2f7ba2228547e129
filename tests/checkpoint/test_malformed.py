"""Two hundred and more files that are no whole model: each is refused by one CheckpointError that names key and cause.

A case is a good file of one format with one damage. The damages to tensors are drawn for each format by a seeded
generator; those to bytes, names and configs are listed one by one.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import heron
from heron.checkpoint.formats import gguf as gguf_format
from heron.checkpoint.formats import hf as hf_format
from heron.errors import CheckpointError

Tensors = dict[str, Tensor]

SIZES = dict(n_layer=2, n_embd=128, head_size=64, vocab_size=19, ffn_dim=70)
# Shapes of these decide what the others must be, so a damage to them is told by the names of the others.
GIVES_SIZES = r"emb\.weight$|att\.[wavg]1$|att\.r_k$|ffn\.key\.weight$|blocks\.0\.att\.v"
CAUSE = {
    "missing": "is missing",
    "renamed": "Did you mean",
    "extra": "is not part of",
    "longer": "must be",
    "folded": "must (be|have)",
    "integer": "must be floating|only F32",
    "nan": "NaN or infinity",
    "infinity": "NaN or infinity",
}


def damage(kind: str, tensors: Tensors, name: str) -> str:
    """Do it in place; the name that the error must mention."""
    tensor = tensors[name]
    if kind == "missing":
        del tensors[name]
    elif kind == "renamed":
        tensors[name.replace("weight", "wieght") if "weight" in name else name + "0"] = tensors.pop(name)
    elif kind == "extra":
        name = name + "_old"
        tensors[name] = tensor.clone()
    elif kind == "longer":
        tensors[name] = torch.cat((tensor, tensor[..., -1:]), dim=-1)
    elif kind == "folded":
        tensors[name] = tensor.reshape(2, -1) if max(tensor.shape) == tensor.numel() else tensor.reshape(-1)
    elif kind == "integer":
        tensors[name] = tensor.int()
    else:
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[tensor.numel() // 2] = float(kind)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Formats: how a good file becomes a damaged one


def rewrite_pth(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def rewrite_safetensors(path: Path, change: Callable[[Tensors], object]) -> None:
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def rewrite_gguf(path: Path, change: Callable[[Tensors], object], fields: dict[str, object] | None = None) -> None:
    """As above, and with other metadata: a key to a number, a text, or None to leave it out."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    kept = {key: field for key, field in reader.fields.items() if not key.startswith(("GGUF.", "general.arch"))}
    values = {key: (field.contents(), field.types[0]) for key, field in kept.items()}
    tensors = {item.name: torch.from_numpy(item.data.copy()) for item in reader.tensors}
    of_bytes = {item.name: item.tensor_type for item in reader.tensors if item.tensor_type.name == "BF16"}
    change(tensors)
    writer = gguf.GGUFWriter(path, "rwkv7")
    for key, value in (fields or {}).items():
        values.pop(key, None)
        if value is not None:
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            values[key] = value, kind if not isinstance(value, float) else gguf.GGUFValueType.FLOAT32
    for key, (value, kind) in values.items():
        writer.add_key_value(key, value, kind)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy(), raw_dtype=of_bytes.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FORMS = {  # name of a good file: variant, `format` of heron.save, and how it is rewritten
    "v7.pth": ("v7", None, rewrite_pth),
    "v8.pth": ("v8", None, rewrite_pth),
    "v7a.safetensors": ("v7a", None, rewrite_safetensors),
    "v7b": ("v7b", "safetensors", rewrite_safetensors),
    "v7-hf": ("v7", "hf", rewrite_safetensors),
    "v7.gguf": ("v7", None, rewrite_gguf),
}


@pytest.fixture(scope="module")
def good(random_model, tmp_path_factory) -> Callable[[str], Path]:
    """The path of a good file, made once."""
    folder = tmp_path_factory.mktemp("good")

    def make(form: str) -> Path:
        variant, format, _ = FORMS[form]
        if form.endswith(".gguf"):
            pytest.importorskip("gguf")
        if not (folder / form).exists():
            heron.save(random_model(variant=variant, **SIZES), folder / form, format)
            heron.load(folder / form)
        return folder / form

    return make


@pytest.fixture
def copied(good, tmp_path) -> Callable[[str], Path]:
    """A copy of a good file, to be damaged."""

    def copy(form: str) -> Path:
        source = good(form)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / form)
        return tmp_path / form

    return copy


def refused(path: Path, *words: str) -> str:
    """Load it: one CheckpointError with the path and each of `words`, no warning before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError) as caught:
            heron.load(path)
    message = str(caught.value)
    assert str(path) in message, message
    assert "\n" not in message
    assert len(message) < 1200
    for word in words:
        assert re.search(word, message), (word, message)
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def upstream(name: str, form: str) -> str:
    """What upstream calls a tensor of a good file; x_r for the one in which GGUF keeps all six of these."""
    layout = {"v7-hf": hf_format.LAYOUT, "v7.gguf": gguf_format.LAYOUT}.get(form)
    if layout is None:
        return name
    for ours, theirs in layout.top.items():
        if name == theirs:
            return ours
    _, layer, part = re.fullmatch(rf"({re.escape(layout.layers)})\.(\d+)\.(.+)", name).groups()
    if part == "time_mix_lerp_fused.weight":
        return f"blocks.{layer}.att.x_"
    return f"blocks.{layer}." + next(ours for ours, place in layout.block.items() if place.theirs == part)


@pytest.mark.parametrize("i", range(2))
@pytest.mark.parametrize("kind", CAUSE)
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_tensor_is_named(copied, form, kind, i):
    path, rewrite = copied(form), FORMS[form][2]
    choice, names = random.Random(f"{form} {kind} {i}"), []

    def change(tensors: Tensors) -> None:
        whole = [name for name in sorted(tensors) if not re.search(GIVES_SIZES, upstream(name, form))]
        name = choice.choice(whole)
        names.extend((damage(kind, tensors, name), upstream(name, form)))

    rewrite(path, change)
    message = refused(path, CAUSE[kind])
    assert any(name in message for name in names), (names, message)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes: a copy that broke off, a page instead of a file, one format under another's name

FILES = ["v7.pth", "v7a.safetensors", "v7b", "v7-hf", "v7.gguf"]
STRANGERS = {
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"to be or not to be\n" * 300,
    "page": b"<!DOCTYPE html><html><title>404 Not Found</title></html>" * 40,
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4cac19622fc3ada9c0fdeadb33f88f367b541f38\nsize 9\n",
    "ones": b"\xff" * 4096,
}


def file_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


@pytest.mark.parametrize("kept", [0.02, 0.4, 0.97, -1])
@pytest.mark.parametrize("form", FILES)
def test_a_copy_that_broke_off(copied, form, kept):
    path = copied(form)
    content = file_of(path).read_bytes()
    file_of(path).write_bytes(content[: kept if kept < 0 else int(kept * len(content))])
    refused(path, "not a readable")


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("form", FILES)
def test_something_else_under_the_name_of_a_model(copied, form, stranger):
    path = copied(form)
    file_of(path).write_bytes(STRANGERS[stranger])
    refused(path, "empty|not a readable")


@pytest.mark.parametrize(("form", "name"), list(itertools.permutations(["v7.pth", "v7a.safetensors", "v7.gguf"], 2)))
def test_one_format_under_the_name_of_another(good, copied, form, name):
    path = copied(name)
    shutil.copy(good(form), path)
    refused(path, "not a readable")


# ---------------------------------------------------------------------------------------------------------------------
# Folders: a config that is damaged, or that speaks of another model than the tensors

CONFIGS = [
    (dict(model_type="llama"), "model_type must be rwkv7 or heron, got 'llama'"),
    (dict(model_type=None), "model_type must be"),
    (dict(model_type=["rwkv7"]), "model_type must be"),
    (dict(hidden_size=256), "hidden_size.* 256.*128"),
    (dict(num_hidden_layers=12), "num_hidden_layers.* 12.*2"),
    (dict(vocab_size=20), "vocab_size.* 20.*19"),
    (dict(head_dim=32), "head_dim 64 alone, and this one is 32"),
    (dict(head_dim="64"), "head_dim"),
    (dict(intermediate_size=512), "intermediate_size.* 512.*70"),
    (dict(decay_low_rank_dim=64), "decay_low_rank_dim.* 64.*5"),
    (dict(a_low_rank_dim=64), "a_low_rank_dim.* 64.*6"),
    (dict(v_low_rank_dim=64), "v_low_rank_dim.* 64.*7"),
    (dict(gate_low_rank_dim=64), "gate_low_rank_dim.* 64.*9"),
    (dict(norm_eps=1e-6), "norm_eps.* 1e-06.*1e-05"),
    (dict(norm_first=False), "norm_first.* False.*True"),
    (dict(hidden_act="relu"), "hidden_act.* 'relu'.*'sqrelu'"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings.* True.*False"),
]
OUR_CONFIGS = [
    (dict(variant="v8"), "variant.* 'v8'.*'v7b'"),
    (dict(variant="v9"), "variant: wanted one of"),
    (dict(n_layer=4), "n_layer.* 4.*2"),
    (dict(n_embd=64), "n_embd.* 64.*128"),
    (dict(vocab_size=20), "vocab_size.* 20.*19"),
    (dict(head_size=32), "head_size.* 32.*64"),
    (dict(ffn_dim=512), "ffn_dim.* 512.*70"),
    (dict(gate_rank=64), "gate_rank.* 64.*9"),
    (dict(n_layer="three"), "n_layer"),
    (dict(has_ln0=False), "has_ln0"),
]
DAMAGED_JSON = {
    "cut": b'{"model_type": "rwk',
    "list": b"[]",
    "empty": b"",
    "twice": b'{"model_type": "rwkv7", "model_type": "heron"}',
    "nan": b'{"model_type": "rwkv7", "norm_eps": NaN}',
    "latin-1": '{"model_type": "rwkv7", "name": "Käse"}'.encode("latin-1"),
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
}


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [*(("v7-hf", *case) for case in CONFIGS), *(("v7b", *case) for case in OUR_CONFIGS)],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else None,
)
def test_a_config_of_another_model(copied, form, changes, words):
    path = copied(form)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    refused(path, r"config\.json", words)


@pytest.mark.parametrize("damaged", DAMAGED_JSON)
@pytest.mark.parametrize("form", ["v7-hf", "v7b"])
def test_a_config_that_is_no_config(copied, form, damaged):
    path = copied(form)
    (path / "config.json").write_bytes(DAMAGED_JSON[damaged])
    refused(path, r"config\.json")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"\.\./x\.safetensors"),
        ({"weight_map": {"a": "missing.safetensors"}}, r"missing\.safetensors: no such file"),
        ({"weight_map": {"a": "model.safetensors", "b": "twice.safetensors"}}, "stands in another file"),
        ({"weight_map": {"a": "link.safetensors"}}, r"link\.safetensors.* link"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_an_index_that_leads_astray(copied, index, words):
    path = copied("v7-hf")
    shutil.copy(path / "model.safetensors", path / "twice.safetensors")
    shutil.copy(path / "model.safetensors", path.parent / "x.safetensors")
    (path / "link.safetensors").symlink_to(path.parent / "x.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, words)


def test_a_folder_without_weights(copied):
    path = copied("v7-hf")
    (path / "model.safetensors").unlink()
    refused(path, "wanted model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF: metadata that contradict the tensors, and a header that lies about lengths

FIELDS = [
    ({"rwkv7.block_count": 4}, r"block_count.* 4.*2"),
    ({"rwkv7.embedding_length": 64}, r"embedding_length.* 64.*128"),
    ({"rwkv7.feed_forward_length": 64}, r"feed_forward_length.* 64.*70"),
    ({"rwkv7.wkv.head_size": 48}, "head_size|r_k"),
    ({"rwkv7.wkv.head_size": 0}, "head_size|r_k"),
    ({"rwkv7.wkv.head_size": None}, "head_size|r_k"),
    ({"rwkv7.attention.layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"heron.dtypes": "{"}, "heron.dtypes|JSON"),
    ({"heron.dtypes": "[1]"}, "heron.dtypes"),
    ({"heron.dtypes": '{"emb.weight": ["float32"]}'}, "heron.dtypes"),
    ({"heron.dtypes": '{"emb.weight": "int8"}'}, "heron.dtypes"),
    ({"heron.dtypes": '{"nowhere": "float16"}'}, "heron.dtypes"),
    ({"heron.dtypes": '{"blocks.0.att.w0": "bfloat16"}'}, r"blocks\.0\.att\.w0.*heron\.dtypes"),
]


@pytest.mark.parametrize(("fields", "words"), FIELDS, ids=lambda value: str(value))
def test_gguf_metadata_of_another_model(copied, fields, words):
    path = copied("v7.gguf")
    rewrite_gguf(path, lambda tensors: None, fields)
    refused(path, words)


def test_gguf_of_another_architecture(copied):
    path = copied("v7.gguf")
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0rwkv7", b"\x05\0\0\0\0\0\0\0llama", 1))
    refused(path, "wanted architecture rwkv7, got 'llama'")


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63])
@pytest.mark.parametrize("at", ["tensors", "fields", "array", "name"])
def test_lengths_in_a_gguf_are_not_believed(good, tmp_path, at, value):
    """A reader that counts up to what the file says would not come back."""
    good("v7.gguf")
    huge, key = value.to_bytes(8, "little"), b"\x01\0\0\0\0\0\0\0a"
    uint8_array = (9).to_bytes(4, "little") + bytes(4)
    body = {
        "tensors": huge + bytes(8),
        "fields": bytes(8) + huge,
        "array": bytes(8) + (1).to_bytes(8, "little") + key + uint8_array + huge,
        "name": bytes(8) + (1).to_bytes(8, "little") + huge,
    }[at]
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + body + bytes(64))
    refused(tmp_path / "x.gguf", "not a readable .gguf")
