"""The texts of the study: two that every Python carries, prose, and what a Linux machine has of its packages."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from heron import tokenizer
from heron.data.binidx import open_binidx
from heron.data.corpora import read_documents
from heron.data.files import opened, suffix_of
from heron.data.loader import load_corpus, training_text
from heron.data.prepare import prepare as write_binidx
from heron.data.recalled import Rules, answers
from heron.data.recalled import read as read_recalled
from heron.errors import DataError
from heron.files import new_file, write_text
from heron.tokenizer import learned

LEARNED_IDS = 512  # as the demo's vocabulary
PROSE_BYTES = 450_000  # as much as the Python manual has
SOURCES = {"python-docs": "builtin:python-docs", "python-stdlib": "builtin:python-stdlib"}
VAL_FRACTION = {"python-docs": 0.1, "python-stdlib": 0.05, "prose": 0.1, "collected": 0.02}
DESCRIBED = "texts.md"

_SUFFIXES = {  # of sources and documentation
    ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".md", ".pl", ".pm", ".py", ".pyi", ".rst", ".sh", ".tex", ".txt",
}  # fmt: skip
_ALL_OF = {"doc", "man"}  # folders in which every text counts, whatever it is called
_SHORTEST, _LONGEST = 200, 500_000  # bytes of a document; what is longer was mostly written by programs


class Text(NamedTuple):
    """What a run reads, as settings of a TrainConfig."""

    data: str
    tokenizer: str
    val_fraction: float


def prepare(
    folder: Path, prose: Path | None, collected: Sequence[Path], n_bytes: int, say: Callable[[str], None]
) -> None:
    """Write what :func:`prepared` finds: the vocabularies of the small texts, the prose, and the collection as binidx.

    What is there already is left as it is.

    Args:
        prose: a text or jsonl, of which the first PROSE_BYTES are taken; None: the study does without.
        collected: folders to collect documents from.
        n_bytes: of these, at most; 0: the study does without.

    Raises:
        DataError: no prose there, or nothing to collect.
    """
    if prose is not None and not (folder / "prose.jsonl").exists():
        texts = list(_first(prose, PROSE_BYTES))
        write_text(folder / "prose.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
        say(f"prose: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes of {prose.name}")
    for name, source in _small(folder).items():
        if not (folder / f"{name}.json").exists():
            vocabulary = learned.learn(training_text(source, None, VAL_FRACTION[name]), LEARNED_IDS, say)
            write_text(folder / f"{name}.json", vocabulary)
            say(f"{name}: learned {LEARNED_IDS} ids")
    if n_bytes and not (folder / "collected.idx").exists():
        say(collect(collected, folder / "collected.jsonl", n_bytes))
        source = str(folder / "collected.jsonl")
        say(str(write_binidx([source], str(folder / "collected"), "world", overwrite=True, memory=Rules())))
    table = described(prepared(folder))
    write_text(folder / DESCRIBED, f"{table}\n")
    say(table)


def prepared(folder: Path) -> dict[str, Text]:
    """The texts that :func:`prepare` has made ready in a folder, by name."""
    found = {
        name: Text(source, str(folder / f"{name}.json"), VAL_FRACTION[name])
        for name, source in _small(folder).items()
        if (folder / f"{name}.json").exists()
    }
    if (folder / "collected.idx").exists():
        found["collected"] = Text(str(folder / "collected"), "world", VAL_FRACTION["collected"])
    return found


def described(texts: Mapping[str, Text]) -> str:
    """A table in Markdown: how large each text is, and how often what is validated on repeats what stands before it."""
    rows = [
        "| text | tokens | validated on | in a match of 8 or more | predicted by the longest |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, text in texts.items():
        known = tokenizer.load(text.tokenizer)
        corpus = load_corpus(text.data, known, None, text.val_fraction, known.vocab_size)
        assert corpus.val is not None
        n_tokens = len(corpus.train) + len(corpus.val)
        if corpus.kind == "binidx":
            found = read_recalled(text.data, open_binidx(text.data).tokens, Rules())
        else:
            found = answers(np.concatenate([corpus.train, corpus.val]), Rules())
        longest = found.records[len(corpus.train) : -1, 0]
        repeated = float((longest["length"] >= 8).mean())
        right = float(((longest["length"] > 0) & (longest["id"] == corpus.val[1:])).mean())
        rows.append(f"| {name} | {n_tokens:,} | {len(corpus.val):,} | {repeated:.1%} | {right:.1%} |")
    return "\n".join(rows)


def collect(folders: Sequence[Path], out: Path, n_bytes: int) -> str:
    """Write documents of some folders as jsonl, and describe them: their number, bytes and sha256, in a line.

    A document is a file of UTF-8, unpacked where it is packed, of sources or documentation. Each content is taken once,
    in the order of the contents' sha256 until there are `n_bytes`: the same files give the same text wherever they lie,
    and its end, on which runs are validated, is made of the same kinds of documents as the rest.

    Raises:
        DataError: no document.
    """
    places: dict[str, tuple[Path, int]] = {}
    for path in _files(folders):
        if (text := _text(path)) is not None:
            places.setdefault(hashlib.sha256(text.encode()).hexdigest(), (path, len(text.encode())))
    total, n_documents, digest = 0, 0, hashlib.sha256()
    with new_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for key in sorted(places):
            path, size = places[key]
            if total + size > n_bytes or (text := _text(path)) is None:
                continue
            file.write(json.dumps({"text": text, "file": str(path)}) + "\n")
            digest.update(text.encode())
            total, n_documents = total + size, n_documents + 1
        if not n_documents:
            raise DataError(f"{', '.join(map(str, folders))}: wanted sources or documentation in UTF-8, found none")
    return f"collected: {n_documents:,} documents of {len(places):,}, {total:,} bytes, sha256 {digest.hexdigest()}"


def _small(folder: Path) -> dict[str, str]:
    prose = folder / "prose.jsonl"
    return SOURCES | ({"prose": str(prose)} if prose.exists() else {})


def _first(source: Path, n_bytes: int) -> Iterator[str]:
    """The documents of a source up to that many bytes; of one that goes beyond, what fits."""
    for _, text in read_documents(str(source)):
        head = text.encode()[:n_bytes].decode(errors="ignore")
        n_bytes -= len(head.encode())
        if head:
            yield head
        if n_bytes <= 0:
            return


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            everything = not _ALL_OF.isdisjoint(Path(place).parts)
            paths = (Path(place, name) for name in sorted(names))
            yield from (path for path in paths if everything or suffix_of(path) in _SUFFIXES)


def _text(path: Path) -> str | None:
    """The text of a file; None for what is no document."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with opened(path) as file:
            text = file.read(_LONGEST + 1).decode("utf-8")
    except (DataError, UnicodeDecodeError):
        return None
    return text if _SHORTEST <= len(text.encode()) <= _LONGEST and "\0" not in text else None
