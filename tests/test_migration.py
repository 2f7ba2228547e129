"""docs/migration.md: every command and every program in it is run, on a small model and a small corpus."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch

import heron
from heron import cli, train
from heron.data import sampling

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
SMALL = {  # instead of a flag's value in the page
    "--n_layer": "2", "--n_embd": "64", "--ctx_len": "32", "--micro_bsz": "2", "--my_exit_tokens": "128",
    "--max_steps": "2", "--accelerator": "cpu", "--precision": "fp32", "--tokenizer": "bytes",
}  # fmt: skip
VOCABULARIES = {"65536": "256", "65600": "300"}
WORDS = ["heron", "river", " the", "stands", "\n", "water", "1998", "über", "and"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    assert {line[0] for line in words} == {"heron"}
    return [line[1:] for line in words]


def shrunk(words: list[str]) -> list[str]:
    """The command with small values; the prime becomes that of the corpus."""
    small = dict(SMALL)
    if "--magic_prime" in words:
        texts = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
        n_tokens = sum(len(text.encode()) + 1 for text in texts)
        small["--magic_prime"] = str(sampling.magic_prime(n_tokens, int(SMALL["--ctx_len"])))
    quick = ["--sample_every", "0"] if words[0] == "train" else []
    pairs = zip(["", *words], words, strict=False)
    return [small.get(flag, VOCABULARIES.get(value, value)) for flag, value in pairs] + quick


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory) -> Path:
    """A v7, a text, and a jsonl."""
    folder = tmp_path_factory.mktemp("migration")
    model = random_model(variant="v7", n_layer=2, n_embd=64, head_size=64, vocab_size=256)
    heron.save(model.to(torch.bfloat16), folder / "rwkv7.pth")
    choice = random.Random(0)
    texts = [" ".join(choice.choices(WORDS, k=60)) for _ in range(30)]
    (folder / "text.txt").write_text(texts[0], encoding="utf-8")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_every_command_of_the_page_works_in_its_order(folder, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "plot", lambda *_: None)  # seconds, and tested elsewhere
    checks = []
    for words in commands():
        code = cli.main(shrunk(words))
        out, err = capsys.readouterr()
        assert code == 0, (words, err)
        if "--check" in words:
            checks.append((words[2], float(re.search(r"in fp32: (\S+)", out)[1])))
    assert [name for name, _ in checks] == [
        "rwkv8.pth", "larger.pth", "rwkv7-hf", "rwkv7.gguf", "rwkv8-folder", "from-gguf.pth",
    ]  # fmt: skip
    assert max(difference for _, difference in checks) == 0
    assert heron.load("runs/minipile").config.variant == "v7"
    assert heron.load("runs/v8").config.variant == "v8"
    for name in ("rwkv7.safetensors", "from-hf.pth", "from-gguf.pth"):
        tensors, old = heron.load(name).state_dict(), heron.load("rwkv7.pth").state_dict()
        for tensor in old.keys() - {f"blocks.0.att.v{i}" for i in range(3)}:
            assert tensors[tensor].dtype == torch.bfloat16
            assert torch.equal(tensors[tensor], old[tensor]), (name, tensor)


def test_the_programs_of_the_page_run(folder, monkeypatch):
    pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    monkeypatch.chdir(folder)
    if not Path("rwkv8-folder").exists():
        heron.save(heron.load("rwkv7.pth"), "rwkv8-folder", "safetensors")
    _, parts = heron.load("rwkv7.pth")(torch.tensor([[1, 2, 3]]))
    names = {"parts": parts.to_runtime()}
    for program in blocks("python"):
        exec(compile(program, "docs/migration.md", "exec"), names)
    assert names["model"](torch.tensor([[1, 2]])).logits.shape == (1, 2, 256)
    assert all(torch.equal(a, b) for a, b in zip(names["parts"], parts.to_runtime(), strict=True))


def test_the_table_of_flags_is_true():
    """What it calls the same is a setting, what it renames is renamed so, and what it calls checked is checked."""
    rows = [
        [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("| `") and not line.startswith("| `rwkv-") and "heron" not in line
    ]
    rows = [row for row in rows if "n_layer" in str(row) or "load_model" in str(row) or "grad_cp" in str(row)]
    same, renamed, translated = ([cell[0].split() for cell in row if cell] for row in rows)
    settings = set(heron.TrainConfig.__dataclass_fields__) | set(heron.ModelConfig.__dataclass_fields__)
    assert set(same[0]) <= settings
    assert dict(zip(*renamed, strict=True)) == cli._RENAMED
    assert set(translated[1]) <= settings
    checked = next(line for line in PAGE.splitlines() if line.startswith("| `my_testing"))
    assert set(re.findall(r"`([^`]+)`", checked)[0].split()) == set(cli._FIXED)
