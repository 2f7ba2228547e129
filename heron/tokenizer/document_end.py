"""Which token ends a document under a `tokenizer.json`: what files beside it say, else how its tokens are called."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from heron import strict_json
from heron.errors import ConfigError, did_you_mean

CONFIG = "tokenizer_config.json"
# In this order, each with what it calls the end: a token, or an id or a list of ids.
_BESIDE = (
    (CONFIG, "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)
NAMES = ("<|endoftext|>", "</s>", "<eos>", "[EOS]")  # of ends, the likeliest first, whether marked as special or not
_LETTERS = ("endoftext", "eos", "eostoken", "endofdocument", "eod", "endofsentence", "endofsequence", "endofstring")
_LARGEST = 1 << 26  # bytes of a file that is looked into


class End(NamedTuple):
    """The end of a document: its id and token, or None, and the reason as a clause."""

    id: int | None
    token: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.token!r} (id {self.id}), {self.reason}"


def find(path: Path, id_of: Mapping[str, int], special: Mapping[str, int], named: str | None = None) -> End:
    """The end of a document under the tokenizer in `path`.

    1. `named`, where it is given.
    2. What a file beside `path` says, the first of: `tokenizer_config.json` and `special_tokens_map.json`, `eos_token`
       (a text, or an object with its "content"); `generation_config.json` and `config.json`, `eos_token_id` (a number,
       or a list, of which the first counts). A file that says nothing, or names no token of this vocabulary, is passed
       over. Where a later file says another end, a warning tells which one was taken.
    3. A token called like one of NAMES, the first of them that there is.
    4. A special token whose name has the letters of an end, such as ``<|end_of_text|>``.

    Args:
        path: of the tokenizer.json; it need not have this name.
        id_of: every token and its id.
        special: the special ones of these.
        named: a token, or the digits of an id.

    Raises:
        ConfigError: `named` is not in the vocabulary.
    """
    if named is not None:
        return _named(path, id_of, special, named)
    said = [(name, ids) for name, key in _BESIDE if (ids := _ids(path.with_name(name), key, id_of))]
    if said:
        name, (end, *_) = said[0]
        others = [f"{other} says {_shown(ids[0], id_of)}" for other, ids in said[1:] if end not in ids]
        if others:
            warnings.warn(
                f"{path}: a document ends with {_shown(end, id_of)}, as {name} says; {', '.join(others)}. "
                "--eod names another",
                stacklevel=3,
            )
        usual = NAMES[0] in id_of and id_of[NAMES[0]] != end
        hint = f"; --eod '{NAMES[0]}' would be the other end that it has" if usual else ""
        return End(end, _token(end, id_of), f"as {name} beside the tokenizer says{hint}")
    for token in NAMES:
        if token in id_of:
            return End(id_of[token], token, "by its name")
    letters = {"".join(filter(str.isalnum, token)).lower(): token for token in special}
    for name in _LETTERS:
        if name in letters:
            return End(special[letters[name]], letters[name], "by its name")
    return End(None, None, f"its special tokens: {', '.join(map(repr, special)) or 'none'}"[:300])


def _named(path: Path, id_of: Mapping[str, int], special: Mapping[str, int], named: str) -> End:
    if named in id_of and not (named.isdecimal() and named not in special):
        return End(id_of[named], named, "as --eod says")
    if named.isdecimal():
        if int(named) in id_of.values():
            return End(int(named), _token(int(named), id_of), "as --eod says")
        raise ConfigError(f"eod {named}: {path} has no such id; wanted one of 0 to {max(id_of.values())}")
    tokens = ", ".join(map(repr, special))[:300] or "none"
    raise ConfigError(
        f"eod {named!r}: {path} has no such token.{did_you_mean(named, id_of)} Its special tokens: {tokens}"
    )


def _ids(path: Path, key: str, id_of: Mapping[str, int]) -> list[int]:
    """The ids that a file names as the end and the vocabulary has."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return []
        fields = strict_json.lenient(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: cannot be read, and tells no end of a document: {error}", stacklevel=4)
        return []
    said: Any = fields.get(key) if isinstance(fields, dict) else None
    if isinstance(said, dict):
        said = said.get("content")
    if isinstance(said, str):
        said = id_of.get(said)
    known = set(id_of.values())
    return [item for item in (said if isinstance(said, list) else [said]) if type(item) is int and item in known]


def _token(index: int, id_of: Mapping[str, int]) -> str:
    return next(token for token, other in id_of.items() if other == index)


def _shown(index: int, id_of: Mapping[str, int]) -> str:
    return f"{_token(index, id_of)!r} (id {index})"
