"""What ROSA recalls at each token of a corpus, of all that stands before it: found once, kept beside the binidx."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heron.config import RosaConfig
from heron.data import mapped
from heron.data.binidx import bin_path, idx_path, open_binidx
from heron.data.fingerprint import fingerprint
from heron.errors import ConfigError, DataError
from heron.files import new_file
from heron.ops.rosa.memory import LONGEST_MATCH, MOST_TOKENS, TokenStream
from heron.progress import progress
from heron.tokenizer import Tokenizer

PIECE = 1 << 20  # tokens read between two chances to be interrupted
MOST_MATCHES = 255

KIND = mapped.Kind(b"heron.recall", 1, "file of recalled tokens", "type heron prepare PREFIX --memory --overwrite")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What counts as a match; the fields of a RosaConfig of these names, and `end`.

    Attributes:
        max_match: tokens of a match that count, 1 to 65535.
        n_matches: matches of each token; what followed them differs. 1 to 255.
        window: tokens that a match may lie back, from 1 on; None: any number.
        end: the id that ends a document, across which nothing matches; None: across documents, too.

    Raises:
        ConfigError: a number out of its range.
    """

    max_match: int = 64
    n_matches: int = 2
    window: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        for name, most in (("max_match", LONGEST_MATCH), ("n_matches", MOST_MATCHES), ("window", MOST_TOKENS - 1)):
            value = getattr(self, name)
            if not (value is None and name == "window") and (type(value) is not int or not 1 <= value <= most):
                raise ConfigError(f"{name}: wanted a whole number from 1 to {most}, got {value!r}")

    @classmethod
    def of(cls, rosa: RosaConfig) -> Rules:
        """Those of a model's memory."""
        return cls(rosa.max_match or 1, rosa.n_matches, rosa.window, rosa.end)

    def stream(self) -> TokenStream:
        """A stream by these rules, of no token yet."""
        return TokenStream(self.max_match, self.window, self.end)

    def __str__(self) -> str:
        """As flags of `heron prepare`."""
        window = "" if self.window is None else f" --window {self.window}"
        across = "" if self.end is None else " --across_documents off"
        return f"--n_matches {self.n_matches} --max_match {self.max_match}{window}{across}"


class Recalled:
    """What was recalled at each of n tokens; a slice of it is that of the same slice of the tokens.

    Args:
        records: (n, K), each an `id`, what followed the match, and its `length`; 0 and 0: there is none. In memory
            or memory-mapped. The K matches of a token predict different ids; the longest is first.
    """

    def __init__(self, records: np.ndarray) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, part: slice) -> Recalled:
        return Recalled(self.records[part])

    def at(self, starts: np.ndarray, ctx_len: int) -> Tensor:
        """Of B windows of T = `ctx_len` tokens, which begin at `starts` (B,): (B, T, K, 2) int64, ids and lengths."""
        records = self.records[np.asarray(starts)[:, None] + np.arange(ctx_len)]
        return torch.from_numpy(np.stack((records["id"], records["length"]), axis=-1, dtype=np.int64))


def end_of(tokenizer: Tokenizer, across_documents: bool) -> int | None:
    """The `end` of :class:`Rules`; ConfigError where a document is to end the matches and no id ends a document."""
    if across_documents:
        return None
    if tokenizer.eod is None:
        raise ConfigError(
            f"across_documents off: under the tokenizer {tokenizer.spec} no id ends a document; --eod names one"
        )
    return tokenizer.eod


def answers(tokens: np.ndarray, rules: Rules) -> Recalled:
    """What the stream of `tokens`, (n,) integers from 0 on, recalls at each of them: it depends on it and those before.

    Of tokens that come after others, validation after training for instance, give both and take the slice.
    It takes 12 to 24 bytes of memory a token while it works, and 3 to 6 for each match and token of the result.

    Raises:
        KernelError: an id below 0 or beyond 2^31 - 1, memory that ran out.
    """
    records = np.empty((len(tokens), rules.n_matches), _dtype(tokens, rules))
    first = 0
    for piece in _found(tokens, rules):
        records[first : first + len(piece)] = piece
        first += len(piece)
    return Recalled(records)


def answers_each(streams: Iterable[np.ndarray], rules: Rules) -> Recalled:
    """:func:`answers` of several streams that know nothing of each other, one behind the other."""
    with progress("reading tokens into the memory"):
        found = [_records(rules.stream(), tokens, 0, len(tokens), rules) for tokens in streams]
    return Recalled(np.concatenate(found))


def path_of(prefix: str | Path) -> Path:
    """The `.recalled` of a binidx."""
    return idx_path(prefix).with_suffix(".recalled")


def write_to(path: Path, tokens: np.ndarray, rules: Rules) -> None:
    """Write the :func:`answers` as `path`, and force them onto the disk; KernelError as there."""
    fields = {**dataclasses.asdict(rules), "n_tokens": len(tokens), "tokens": fingerprint(tokens)}
    mapped.write_to(path, KIND, fields, {"records": _found(tokens, rules)})


def write(prefix: str | Path, rules: Rules, overwrite: bool = False) -> Path:
    """Find what the tokens of a binidx recall, and keep it beside them as ``prefix.recalled``; returns that path.

    Raises:
        DataError: a pair that is missing or damaged, a file that is there already.
        CheckpointError: the disk or the folder refuses.
        KernelError: as :func:`answers`.
    """
    path, tokens = path_of(prefix), open_binidx(prefix).tokens
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; allow overwriting (--overwrite)")
    mapped.refuse_foreign(path, KIND)
    with new_file(path) as temporary:
        write_to(temporary, tokens, rules)
    return path


def read(prefix: str | Path, tokens: np.ndarray, rules: Rules) -> Recalled:
    """Map ``prefix.recalled``.

    Args:
        tokens: all of the binidx, memory-mapped as :func:`heron.data.binidx.open_binidx` does.

    Raises:
        DataError: it is missing, cut short or damaged, or was made of other tokens, or with other rules.
    """
    path = path_of(prefix)
    remedy = f"type heron prepare {bin_path(prefix).with_suffix('')} --memory --overwrite {rules}"
    file = mapped.read(path, KIND._replace(remedy=remedy))
    made = _rules(file)
    if made != rules:
        ends = "" if made.end == rules.end else f" (id {made.end} ending a document, not {rules.end})"
        raise DataError(f"{path}: was made with {made}{ends}, wanted {rules}; {remedy}")
    if (file.fields["n_tokens"], file.fields["tokens"]) != (len(tokens), fingerprint(tokens)):
        raise DataError(f"{path}: was made of other tokens than those in {bin_path(prefix)}; {remedy}")
    return Recalled(file.parts["records"].view(_dtype(tokens, rules)).reshape(len(tokens), rules.n_matches))


def describe(prefix: str | Path, verify: bool = False) -> str:
    """The file beside a binidx in words; DataError as :func:`read`, and where `verify` finds it damaged."""
    file = mapped.read(path_of(prefix), KIND)
    if verify:
        file.verify()
    n_bytes = file.parts["records"].nbytes / file.fields["n_tokens"]
    return f"{file.path}: {file.fields['n_tokens']:,} tokens, {n_bytes:g} bytes a token; {_rules(file)}"


def _rules(file: mapped.Mapped) -> Rules:
    return Rules(**{field.name: file.fields[field.name] for field in dataclasses.fields(Rules)})


def _dtype(tokens: np.ndarray, rules: Rules) -> np.dtype:
    """Of a record: 3 bytes where ids fit uint16 and lengths uint8."""
    id_dtype = "<u2" if tokens.dtype.kind in "bu" and tokens.dtype.itemsize <= 2 else "<u4"
    return np.dtype([("id", id_dtype), ("length", "u1" if rules.max_match < 2**8 else "<u2")])


def _found(tokens: np.ndarray, rules: Rules) -> Iterator[np.ndarray]:
    """The records of `tokens`, (n, K), in pieces."""
    stream = rules.stream()
    step = PIECE if stream.impl == "cpu" else max(len(tokens), 1)  # the other form begins anew with each piece
    with progress("reading tokens into the memory") as advance:
        for first in range(0, len(tokens), step):
            advance(f"{first / 1e6:.0f} of {len(tokens) / 1e6:.0f} million")
            yield _records(stream, tokens, first, first + step, rules)


def _records(stream: TokenStream, tokens: np.ndarray, first: int, end: int, rules: Rules) -> np.ndarray:
    """The records of ``tokens[first:end]``, (n, K), which `stream` reads now; it has read those before them."""
    piece = torch.from_numpy(tokens[first:end].astype(np.int64))
    followers, length, _ = (part.numpy() for part in stream.recall(piece, rules.n_matches))
    records = np.empty(length.shape, _dtype(tokens, rules))
    records["id"], records["length"] = followers, length
    return records
