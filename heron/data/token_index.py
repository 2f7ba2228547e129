"""Documents in one file that ROSA looks into while a model runs: their tokens, the trees over these, their names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from heron.data import mapped
from heron.data.binidx import check_ids, is_binidx, open_binidx
from heron.data.corpora import PLAIN, Reading, read_documents
from heron.data.encode import encode_document, warn_of_no_end
from heron.data.recalled import PIECE, Rules, end_of
from heron.errors import DataError
from heron.files import new_file
from heron.ops.rosa.memory import MOST_TOKENS, TokenIndex, TokenStream
from heron.progress import progress
from heron.tokenizer import Tokenizer, fingerprint

KIND = mapped.Kind(b"heron.memory", 1, "memory of documents", "type heron memory build DATA --out FILE to make one")


class DocumentIndex:
    """A file that :func:`build` wrote, memory-mapped.

    Attributes:
        index: finds matches, as a :class:`heron.ops.rosa.memory.TokenIndex`. A position in it counts the tokens of all
            documents, one after another.
        max_match: tokens of a match that count.
        n_tokens, n_documents: what it holds.
    """

    def __init__(self, file: mapped.Mapped) -> None:
        fields, parts = file.fields, file.parts
        self.max_match: int = fields["max_match"]
        self.n_tokens: int = fields["n_tokens"]
        self.n_documents: int = fields["n_documents"]
        self._starts, self._names = parts["starts"].view("<i8"), parts["names"]
        tokens, roots = parts["tokens"].view(fields["dtype"]), parts["roots"].view("<u4")
        nodes = torch.from_numpy(parts["nodes"].view("<u4").reshape(-1, 2))
        self.index = TokenIndex(torch.from_numpy(tokens), nodes, torch.from_numpy(roots), self.max_match, fields["end"])

    def document_of(self, position: int) -> tuple[str, int]:
        """The name of the document that holds a token of the index, and the token's place in it, from 0."""
        if not 0 <= position < self.n_tokens:
            raise IndexError(f"position {position} of {self.n_tokens} tokens")
        document = int(self._starts.searchsorted(position, side="right")) - 1
        begin = 0 if document == 0 else int(self._ends[document - 1]) + 1
        name = self._names[begin : int(self._ends[document])].tobytes().decode("utf-8", errors="surrogateescape")
        return name, position - int(self._starts[document])

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where each name ends in the bytes of all."""
        return np.flatnonzero(self._names == 0)


def build(
    path: Path,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    max_match: int = 64,
    across_documents: bool = True,
    reading: Reading = PLAIN,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the index of the documents of `sources` as one file, whole or not at all; an older one is replaced.

    It takes some 25 bytes of memory a token. The file has 10, or 12 beyond 65,536 ids, and the names.

    Args:
        sources: binidx pairs, and what :func:`heron.data.corpora.read_documents` reads.
        max_match: tokens of a match that count, 1 to 65535.
        across_documents: whether a match may begin in one document and end in the next.
        reading: how text becomes documents.
        say: takes lines about what was passed over.

    Raises:
        ConfigError: an unknown built-in corpus; no end of a document, and `across_documents` off; a `max_match` out of
            its range.
        DataError: as :func:`heron.data.corpora.read_documents` and :func:`heron.data.encode.encode_document`; no
            token at all, or more than 2^31.
        CheckpointError: `path` is there and is no such file, or cannot be written.
        KernelError: no C++ compiler, memory that ran out.
    """
    mapped.refuse_foreign(path, KIND)
    rules = Rules(max_match, end=end_of(tokenizer, across_documents))
    stream = TokenStream(rules.max_match, end=rules.end, impl="cpu")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    names, documents = [], []
    with progress("reading documents"):
        for source in sources:
            for name, ids in _read(source, tokenizer, reading, say):
                names.append(name.replace("\0", "").encode("utf-8", errors="surrogateescape") + b"\0")
                documents.append(ids.astype(dtype))
    if not documents:
        raise DataError(f"{', '.join(sources)}: no text is in it")
    if len(documents) > 1 and tokenizer.eod is None:
        warn_of_no_end(tokenizer)
    sizes = np.array([len(ids) for ids in documents])
    tokens = np.concatenate(documents)
    documents.clear()
    if len(tokens) > MOST_TOKENS:
        raise DataError(f"{', '.join(sources)}: an index holds at most {MOST_TOKENS:,} tokens, got {len(tokens):,}")
    with progress("indexing tokens") as advance:
        for first in range(0, len(tokens) - 1, PIECE):  # what follows the last token is not known
            advance(f"{first / 1e6:.0f} of {len(tokens) / 1e6:.0f} million")
            piece = tokens[first : min(first + PIECE, len(tokens) - 1)]
            stream.read(torch.from_numpy(piece.astype(np.int64)))
    nodes, roots = stream.trees()
    fields = {
        "n_tokens": len(tokens),
        "n_documents": len(names),
        "max_match": max_match,
        "end": rules.end,
        "dtype": dtype.str,
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": fingerprint(tokenizer),
    }
    arrays = {
        "tokens": tokens,
        "nodes": nodes.numpy(),
        "roots": roots.numpy(),
        "starts": np.cumsum(sizes) - sizes,
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
    }
    with new_file(path) as temporary:
        mapped.write_to(temporary, KIND, fields, {name: [array] for name, array in arrays.items()})


def read(path: str | Path, tokenizer: Tokenizer) -> DocumentIndex:
    """Map a file that :func:`build` wrote.

    Raises:
        DataError: it is missing, no such file, of another version, cut short, damaged, or of another tokenizer.
        KernelError: no C++ compiler.
    """
    file = mapped.read(Path(path), KIND)
    _check_tokenizer(file, tokenizer)
    return DocumentIndex(file)


def describe(path: str | Path, tokenizer: Tokenizer | None = None, verify: bool = False) -> str:
    """A file in words.

    Raises:
        DataError: as :func:`read`, with a `tokenizer`; with `verify`, arrays that are not what their hash says.
    """
    file = mapped.read(Path(path), KIND)
    fields = file.fields
    if tokenizer is not None:
        _check_tokenizer(file, tokenizer)
    if verify:
        file.verify()
    names = file.parts["names"].nbytes + file.parts["starts"].nbytes
    bytes_a_token = (file.path.stat().st_size - names) / fields["n_tokens"]
    across = "" if fields["end"] is None else f", within documents, which end with id {fields['end']}"
    return (
        f"what        {file.path}\n"
        f"tokens      {fields['n_tokens']:,}, {bytes_a_token:.2f} bytes each\n"
        f"documents   {fields['n_documents']:,}, {names:,} bytes of names and places\n"
        f"matches     of up to {fields['max_match']} tokens{across}\n"
        f"tokenizer   {fields['tokenizer']}, {fields['vocab_size']:,} ids ({fields['fingerprint']})\n"
        f"hash        {'compared, all right' if verify else 'not compared; --verify does'}"
    )


def _read(
    source: str, tokenizer: Tokenizer, reading: Reading, say: Callable[[str], None] | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The documents that have a token, by name, as ids."""
    if is_binidx(source):
        pair = open_binidx(source)
        check_ids(pair, tokenizer.vocab_size)
        ends = np.cumsum(pair.sizes, dtype=np.int64)
        for number, (first, end) in enumerate(zip(ends - pair.sizes, ends, strict=True), start=1):
            if end > first:
                yield f"{source}, document {number}", pair.tokens[first:end]
        return
    for name, text in read_documents(source, None, reading, say):
        ids = encode_document(tokenizer, name, text, tokenizer.vocab_size, reading.allow_normalized)
        if len(ids):
            yield name, ids


def _check_tokenizer(file: mapped.Mapped, tokenizer: Tokenizer) -> None:
    made, wanted = file.fields, {"vocab_size": tokenizer.vocab_size, "fingerprint": fingerprint(tokenizer)}
    if any(made[name] != value for name, value in wanted.items()):
        raise DataError(
            f"{file.path}: was built with the tokenizer {made['tokenizer']} ({made['vocab_size']:,} ids, "
            f"{made['fingerprint']}), not with {tokenizer.spec} ({tokenizer.vocab_size:,} ids, "
            f"{wanted['fingerprint']}); type heron memory build DATA --out {file.path} --tokenizer {tokenizer.spec}"
        )
