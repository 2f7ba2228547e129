"""One column of a table as documents: csv by the standard library, parquet by pyarrow."""

from __future__ import annotations

import csv
import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from heron.data import jsonl
from heron.data.files import opened, suffix_of
from heron.errors import ConfigError, DataError, did_you_mean

_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
_BATCH = 1024  # rows of a parquet held at a time

OnBad = Callable[[DataError], None]


def read_csv(path: Path, column: str, on_bad_row: OnBad | None) -> Iterator[tuple[str, str]]:
    """The fields of `column` in a csv whose first row names the columns, with the file and line where each row ends.

    A .csv is separated by the one of , ; tab | under which its first row has the column; quotes are those of RFC 4180.

    Args:
        on_bad_row: as `on_bad_line` of :func:`heron.data.jsonl.read`.

    Raises:
        DataError: a file that cannot be read, no such column, a row with more or fewer fields than the first; in any
            case a quote that is not closed, behind which nothing can be told apart, and bytes that are not UTF-8.
    """
    csv.field_size_limit(max(csv.field_size_limit(), jsonl.LONGEST_LINE))
    with opened(path) as file:
        lines = _decoded(path, file)
        blank, first = next(((n, line) for n, line in enumerate(lines) if line.strip()), (0, ""))
        headers = {sign: next(csv.reader([first], delimiter=sign), []) for sign in _DELIMITERS[suffix_of(path)]}
        best = max(headers, key=lambda sign: (headers[sign].count(column) == 1, len(headers[sign])))
        rows = csv.reader(itertools.chain([first], lines), delimiter=best, strict=True)
        try:
            header = next(rows)
            place = _place(path, header, column)
            for row in rows:
                where = f"{path}, line {blank + rows.line_num}"
                if not row:
                    continue
                if len(row) == len(header):
                    yield where, row[place]
                    continue
                refusal = DataError(f"{where}: wanted {len(header)} fields, as the first row has, got {len(row)}")
                if on_bad_row is None:
                    raise refusal
                on_bad_row(refusal)
        except csv.Error as error:
            raise DataError(f"{path}, line {blank + rows.line_num}: not csv: {error}") from None


def _decoded(path: Path, file: Any) -> Iterator[str]:
    for number, _, line in jsonl.lines(file):
        if line is None:
            raise DataError(f"{path}, line {number}: wanted at most {jsonl.LONGEST_LINE:,} bytes in a line, got more")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = f"byte 0x{line[error.start]:02x} at position {error.start} of the line"
            raise DataError(f"{path}, line {number}: not UTF-8: {at}: {error.reason}") from None


def read_parquet(path: Path, column: str, on_bad_row: OnBad | None) -> Iterator[tuple[str, str]]:
    """The texts of `column` in a parquet, with the file and row (from 1) of each; a few rows are held at a time.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a file that is damaged, no such column, one that is no text, a row without a value.
    """
    try:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"{path}: a parquet needs pyarrow ({error}). Type: pip install 'heron-rwkv[parquet]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kind = schema.field(_place(path, schema.names, column)).type
            kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view"):
                raise DataError(f"{path}: wanted text in column {column!r}, got {kind}; --column names another")
            for batch in file.iter_batches(_BATCH, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if value is None:
                        refusal = DataError(f"{path}, row {number}: wanted a text under {column!r}, got nothing there")
                        if on_bad_row is None:
                            raise refusal
                        on_bad_row(refusal)
                        continue
                    yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}, behind row {number}: cannot be read as parquet: {error}") from None


def _place(path: Path, names: list[str], column: str) -> int:
    if names.count(column) != 1:
        have = ", ".join(map(repr, names))[:200] or "none"
        if column in names:
            raise DataError(f"{path}: column {column!r} comes twice; the first row names {have}. Rename one")
        raise DataError(
            f"{path}: column {column!r} is not there; the first row names {have}. --column NAME says which is the text."
            f"{did_you_mean(column, names)}"
        )
    return names.index(column)
