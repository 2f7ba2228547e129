"""Which tokenizer weights belong to, and which papers lie with them: what a run, a folder or a GGUF file says."""

from __future__ import annotations

from pathlib import Path

from heron import tokenizer
from heron.checkpoint import card, run, vocabulary
from heron.checkpoint.formats import gguf_vocabulary, hf
from heron.checkpoint.vocabulary import Vocabulary
from heron.config import TrainConfig
from heron.tokenizer import Tokenizer

USUAL = {256: "bytes", 65536: "world"}  # what a model of so many ids usually has, where nothing tells


def vocabulary_of(path: str | Path) -> Vocabulary | None:
    """The tokenizer that weights were trained with; None: nothing beside them or in them tells.

    Args:
        path: what :func:`heron.load` takes.

    Raises:
        HeronError: a tokenizer, or the config.yaml of a run, that is damaged.
    """
    path = Path(path).resolve()
    if path.suffix == ".gguf" and path.is_file() and (found := gguf_vocabulary.read(path)) is not None:
        return found
    folder = home(path)
    eod = hf.end_of_document(folder) if (folder / hf.CONFIG).is_file() else None
    if (found := vocabulary.from_folder(folder, eod)) is not None:
        return found
    if not (folder / "run.lock").is_file():
        return None
    settings = TrainConfig.from_yaml(folder / "config.yaml")
    return Vocabulary.of(tokenizer.load(settings.tokenizer, settings.eod))


def tokenizer_of(path: str | Path, eod: str | None = None) -> Tokenizer | None:
    """:func:`vocabulary_of` as a tokenizer. `eod` as in :func:`heron.tokenizer.load`."""
    found = vocabulary_of(path)
    return None if found is None else found.load(eod)


def papers_of(path: str | Path) -> dict[str, bytes]:
    """The model card and the licence that lie with weights, by name; of a run, which holds none, nothing."""
    folder = home(Path(path).resolve())
    if not (folder / hf.CONFIG).is_file():
        return {}
    files = [path for path in sorted(folder.iterdir()) if card.goes_along(path.name) and path.is_file()]
    return {path.name: path.read_bytes() for path in files}


def home(path: Path) -> Path:
    """The folder that speaks for weights: the run of a checkpoint, the folder itself, or the one a file lies in."""
    if path.is_dir():
        return path.parents[1] if run.is_checkpoint(path) else path
    return path.parents[2] if run.is_checkpoint(path.parent) else path.parent
