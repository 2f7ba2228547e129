"""The tokenizer in a GGUF file: World's table and byte-level BPE as llama.cpp has them, others in a field of their own.

What is written for World is what llama.cpp's converter writes (`_set_vocab_rwkv_world`): bos and eos 0, and 261, two
line ends, as the end of a turn. `tokenizer.huggingface.json` holds a whole tokenizer.json, which llama.cpp passes over.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from heron.checkpoint.formats import gguf_header
from heron.checkpoint.vocabulary import CHAT_TEMPLATE, TEMPLATE, Vocabulary, world
from heron.errors import CheckpointError, HeronError
from heron.tokenizer import load

_END_OF_TURN = 261  # "\n\n" of the World vocabulary
_MODEL, _TOKENS, _EOS = "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"
_JSON, _SPEC, _TEMPLATE = "tokenizer.huggingface.json", "heron.tokenizer", "tokenizer.chat_template"
_NO_MERGE = "[PAD] [PAD]"  # llama.cpp wants at least one; this joins nothing that a text can be cut into
_OF_BYTES = {"type": "ByteLevel", "add_prefix_space": False}


def write(gguf: ModuleType, writer: Any, vocabulary: Vocabulary | None, vocab_size: int, path: Path) -> None:
    """Add the tokenizer of a model with `vocab_size` ids; warns where llama.cpp can't have it. `path`: for messages."""
    table = None
    if vocabulary is not None:
        if vocabulary.spec == "world":
            table = _world(gguf)
        elif vocabulary.json is not None:
            table = _bpe(gguf, json.loads(vocabulary.json))
            writer.add_string(_JSON, vocabulary.json)
        else:
            writer.add_string(_SPEC, vocabulary.spec)
        if table is None:
            warnings.warn(
                f"{path}: llama.cpp has no tokenizer like {vocabulary.spec}; the file holds none that it can use, only "
                "one for heron",
                stacklevel=2,
            )
    if table is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(vocab_size)
    else:
        model, tokens, kinds, merges = table
        tokens += [f"[PAD{i}]".encode() for i in range(len(tokens), vocab_size)]
        kinds += [gguf.TokenType.UNUSED] * (vocab_size - len(kinds))
        writer.add_tokenizer_model(model)
        if model == "gpt2":
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges(merges or [_NO_MERGE])
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
    if vocabulary is None:
        return
    if vocabulary.eod is not None:
        writer.add_bos_token_id(vocabulary.eod)
        writer.add_eos_token_id(vocabulary.eod)
        writer.add_add_bos_token(False)  # a prompt is read as it is; only an empty one starts from it
    if vocabulary.spec == "world":
        writer.add_eot_token_id(_END_OF_TURN)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def read(path: Path) -> Vocabulary | None:
    """The tokenizer that a file holds; None: none.

    Raises:
        CheckpointError: damaged, or a tokenizer that is not known here.
    """
    try:
        told = gguf_header.read(path, (_MODEL, _TOKENS, _EOS, _JSON, _SPEC, _TEMPLATE))
        template = told.get(_TEMPLATE)
        files = {TEMPLATE: template.encode()} if isinstance(template, str) and template != CHAT_TEMPLATE else {}
        if isinstance(spec := told.get(_SPEC), str):
            return Vocabulary.of(load(spec), files)
        if isinstance(content := told.get(_JSON), str):
            eos = told.get(_EOS)
            return Vocabulary.from_json(content, eos if type(eos) is int else None, files, f"{path} ({_JSON})")
    except (OSError, ValueError, HeronError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be read: {error}") from None
    tokens = told.get(_TOKENS)
    if not isinstance(tokens, list):
        return None
    table = [_escaped(token) for token in world().table[1:]]
    if told.get(_MODEL) == "rwkv" and tokens[1 : 1 + len(table)] == table:
        return Vocabulary.of(load("world"), files)
    raise CheckpointError(
        f"{path}: its tokenizer ({str(told.get(_MODEL))[:40]!r}, {len(tokens):,} ids) is not known here; name one "
        "(--tokenizer)"
    )


def _escaped(token: bytes) -> str:
    """Bytes as llama.cpp takes them apart: a Python literal without its quotes."""
    return repr(token)[2:-1]


_Table = tuple[str, list[bytes], list[int], list[str]]  # model, tokens, their kinds, merges


def _world(gguf: ModuleType) -> _Table:
    tokens = [b"<s>", *(_escaped(token).encode() for token in world().table[1:])]
    return "rwkv", tokens, [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)], []


def _bpe(gguf: ModuleType, content: dict[str, Any]) -> _Table | None:
    """A byte-level BPE that cuts text as GPT-2's does, from a tokenizer.json; None for every other kind."""
    model, before = content["model"], content["pre_tokenizer"] or {}
    is_gpt2 = (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
        and not model.get("ignore_merges")
        and content["normalizer"] is None
        and before | _OF_BYTES == before
        and before.get("use_regex", True)
    )
    if not is_gpt2:
        return None
    added = {token["id"]: token for token in content["added_tokens"]}
    names = {index: token for token, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens, kinds = [], []
    for i in range(max(names) + 1):
        if i not in names:
            kind = gguf.TokenType.UNUSED
        elif i not in added:
            kind = gguf.TokenType.NORMAL
        else:
            kind = gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
        tokens.append(names.get(i, f"[PAD{i}]").encode())
        kinds.append(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return "gpt2", tokens, kinds, merges
