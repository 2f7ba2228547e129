"""The house rules that a machine can check: which way imports point, what an import loads, docstrings."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FILES = sorted((REPOSITORY / "heron").rglob("*.py"))

# A part may import the parts on earlier lines, and those on its own line as long as that makes no circle.
LINES = [
    ["errors", "config", "progress", "locks"],
    ["machine", "strict_json", "files"],
    ["tokenizer", "ops"],
    ["model", "data"],
    ["tables", "context", "dist", "gathering", "reduction"],
    ["optim", "checkpoint"],
    ["generation"],
    ["evaluate", "report", "serve"],
    ["train"],
    ["commands"],
    ["cli", "__main__", "hf", "compat"],
]
LINE_OF = {part: line for line, parts in enumerate(LINES) for part in parts}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; `from heron import ops` is heron.ops."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of heron that a dotted name belongs to; None: not one of ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "heron" and len(parts) > 1 else None


def test_every_part_has_its_place():
    assert {part_of(module_name(file)) for file in FILES} - {None} <= LINE_OF.keys()


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_module_has_a_docstring_and_imports_only_what_stands_before_it(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    part = part_of(module_name(file))
    ours = {part_of(module) for module in imports(file)} - {None, part, "__version__"}
    if part is None:  # heron/__init__.py itself is lazy
        assert not ours
    else:
        assert all(LINE_OF[other] <= LINE_OF[part] for other in ours), ours
    assert not any(module.split(".")[0] in ("core", "tests") for module in imports(file))


def circle_in(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when everything that leads nowhere has been taken away, again and again: nothing, or circles."""
    left = dict(edges)
    while leaves := {name for name, targets in left.items() if not targets & left.keys()}:
        for name in leaves:
            del left[name]
    return left


def test_no_two_parts_import_each_other_by_any_road():
    edges: dict[str, set[str]] = {}
    for file in FILES:
        part = part_of(module_name(file))
        targets = {part_of(module) for module in imports(file)} - {None, part, "__version__"}
        edges.setdefault(part, set()).update(targets)
    assert circle_in(edges) == {}


def file_edges(folder: Path) -> dict[str, set[str]]:
    """Which modules each module below `folder` imports, at its top or inside a function.

    `from package import name` is an import of ``package.name`` where that is a module, else of the package's own file.
    """
    files = sorted(folder.rglob("*.py"))
    names = {
        ".".join(file.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__") for file in files
    }
    edges = {}
    for file in files:
        name = ".".join(file.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        found = {module if module in names else module.rpartition(".")[0] for module in imports(file)}
        edges[name] = (found & names) - {name, folder.name}
    return edges


def test_no_two_files_import_each_other_by_any_road():
    assert circle_in(file_edges(REPOSITORY / "heron")) == {}


def test_a_circle_between_files_is_seen_inside_functions_and_packages(tmp_path):
    package = tmp_path / "pack"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "one.py": "from pack.inner import thing",
        "two.py": "import pack.three",
        "three.py": "",
        "inner/__init__.py": "from pack import two\nthing = 1",
    }.items():
        (package / name).write_text(text)
    assert circle_in(file_edges(package)) == {}
    (package / "three.py").write_text("def f():\n    from pack.inner import thing\n    return thing")
    assert circle_in(file_edges(package)).keys() >= {"pack.two", "pack.three", "pack.inner"}


def test_ops_stand_on_torch_our_errors_our_progress_and_our_locks_alone():
    for file in (REPOSITORY / "heron" / "ops").rglob("*.py"):
        for module in imports(file):
            if part := part_of(module):
                assert part in ("ops", "errors", "progress", "locks"), (file, module)
            else:
                assert module.split(".")[0] in {"torch", *sys.stdlib_module_names}, (file, module)


def test_config_errors_progress_and_locks_need_the_standard_library_alone():
    package = REPOSITORY / "heron"
    alone = (package / f"{name}.py" for name in ("errors", "progress", "locks"))
    for file in (*(package / "config").glob("*.py"), *alone):
        for module in imports(file):
            assert part_of(module) or module.split(".")[0] in {"yaml", *sys.stdlib_module_names}, module


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_heron_loads_nothing_but_itself():
    code = """
import os, sys
environment, modules = dict(os.environ), set(sys.modules)
import heron
assert os.environ == environment
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert new - sys.stdlib_module_names == {"heron"}, new
assert "torch" not in sys.modules
heron.ModelConfig
assert "torch" not in sys.modules
for name in heron.__all__:
    assert name in dir(heron)
"""
    assert python(code) == ""


def test_every_public_name_is_there_and_an_unknown_one_is_not():
    import heron

    for name in heron.__all__:
        assert getattr(heron, name) is not None
    with pytest.raises(AttributeError, match="'heron' has no attribute 'generat'"):
        heron.generat  # noqa: B018


def test_training_needs_torch_numpy_and_safetensors_alone():
    code = """
import sys

OURS, NEEDED = {"heron"}, {"torch", "torchgen", "numpy", "safetensors", "packaging"}
OPTIONAL = {"rich", "yaml", "matplotlib", "tokenizers", "pyrwkv_tokenizer", "tensorboard", "wandb", "rwkv"}


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"{name} is not installed here")


import torch, numpy, safetensors.torch
sys.meta_path.insert(0, Blocked())
before = set(sys.modules)
import heron.ops, heron.model, heron.train
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not OPTIONAL & {name.split(".")[0] for name in sys.modules}
assert new <= OURS | NEEDED | sys.stdlib_module_names, new
"""
    assert python(code) == ""
