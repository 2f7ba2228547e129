"""The Python programs of README and the guides run as they are printed, each page's in its order, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import heron
from heron import tokenizer
from heron.data import token_index

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("heron.hf", "openai")  # programs that tests of their own run, with the packages that they need


def programs(page):
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [program for program in found if not any(name in program for name in ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory):
    """Where readers are: with the files that the programs name, of a model of World's ids or of bytes."""
    folder = tmp_path_factory.mktemp("reader")
    for run in ("first", "mine"):
        (folder / "runs" / run).mkdir(parents=True)
        heron.save(random_model(vocab_size=256, n_layer=1), folder / "runs" / run / "rwkv-final.pth")
    for name, size in (("rwkv.pth", 256), ("rwkv7.pth", 256), ("path.pth", 256), ("x.pth", 65536)):
        heron.save(random_model(variant="v7", vocab_size=size, n_layer=1), folder / name)
    (folder / "manual.txt").write_text("The keyword-only arguments. The keyword-only parameters.")
    return folder


@pytest.fixture
def names(folder, monkeypatch):
    """What a page has said before its programs."""
    monkeypatch.chdir(folder)
    world = tokenizer.load("world")
    if not Path("docs.memory").exists():
        token_index.build(Path("docs.memory"), ["manual.txt"], world)
    tokens = torch.arange(8).view(2, 4)
    r, w, k, v, a, b = (0.1 * torch.randn(1, 5, 2, 16) for _ in range(6))
    return dict(
        heron=heron, torch=torch, tokenizer=tokenizer, world=world, tokens=tokens, targets=tokens, more_tokens=tokens,
        ids=[1, 2, 3], token_id=1, batch_of_ids=tokens, r=r, w=w, k=k, v=v, a=a, b=b,
    )  # fmt: skip


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/pypi.md", "docs/rosa.md", "docs/running.md", "docs/start/generate.md", "docs/variants.md"],
)
def test_the_programs_of_a_page_run(page, names):
    found = programs(page)
    assert found
    for program in found:
        exec(compile(program, page, "exec"), names)


def test_the_program_of_the_drop_in_runs(names):
    program = programs("docs/drop-in.md")[0].replace("path/without/pth", "path")
    exec(compile(program, "docs/drop-in.md", "exec"), names)
    assert heron.load("tuned.pth").config.variant == "v7"
