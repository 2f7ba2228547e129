"""What belongs to weights beside tensors: the tokenizer, the end of a document, and the files that say so elsewhere.

A folder for Hugging Face's tools needs no code of ours: :func:`world_json` writes the World vocabulary as a
`tokenizer.json`, which `AutoTokenizer` reads as it reads any other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heron import tokenizer
from heron.errors import DataError, HeronError
from heron.tokenizer import Tokenizer, WorldTokenizer
from heron.tokenizer.json_file import byte_alphabet
from heron.tokenizer.world import WORLD_FILE, world_file

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
# What a Hugging Face folder may hold beside its tokenizer.json, and what goes along with it.
BESIDE = (TOKENIZER_CONFIG, GENERATION, TEMPLATE, "special_tokens_map.json", "added_tokens.json")
SPEC = "heron_tokenizer"  # in a tokenizer_config.json: what heron.tokenizer.load takes
WORLD_END = "<|rwkv_tokenizer_end_of_text|>"  # of id 0, as the released Hugging Face folders call it
WORLD_SIZE = 65536
_END = "<|endoftext|>"  # of bytes

# heron.data.template in Jinja. llama.cpp knows a template that names rwkv-world by itself, without Jinja.
CHAT_TEMPLATE = r"""{#- rwkv-world -#}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant: ' + message['content'].strip() + '\n\n' -}}
{%- else -%}
{{- ('System: ' if message['role'] == 'system' else 'User: ') -}}
{%- for line in message['content'].replace('\r\n', '\n').strip().split('\n') if line -%}
{{- line + '\n' -}}
{%- endfor -%}
{{- '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that weights were trained with.

    Attributes:
        spec: what :func:`heron.tokenizer.load` takes.
        vocab_size: every id is below it.
        eod: the id that ends a document; None: there is none.
        json: the content of the tokenizer.json; None: World, bytes or integers.
        files: other files of the Hugging Face folder that it comes from, by name.
    """

    spec: str
    vocab_size: int
    eod: int | None
    json: str | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, known: Tokenizer, files: Mapping[str, bytes] | None = None) -> Vocabulary | None:
        """That of a tokenizer; None: it is of a user's own class, which no file can hold.

        `files` go along; None: what lies beside a file that is called tokenizer.json.
        """
        content, path = None, Path(known.spec)
        if not _is_built_in(known.spec):
            if not isinstance(known, tokenizer.JsonTokenizer) or not path.is_file():
                return None
            content = path.read_text(encoding="utf-8")
            if files is None and path.name == TOKENIZER:
                files = beside(path.parent)
        return cls(known.spec, known.vocab_size, known.eod, content, files or {})

    @classmethod
    def from_json(cls, content: str, eod: int | None, files: Mapping[str, bytes], name: str) -> Vocabulary:
        """That of the content of a tokenizer.json which is no file of its own; `name` stands for it in messages.

        `eod` is the end of a document; None: as the tokenizer.json says. `files` go along.

        Raises:
            DataError: it is no tokenizer.json.
        """
        if eod is not None:
            files = {GENERATION: generation_config(eod), **files}
        known = _from_text(content, files, name)
        return cls(name, known.vocab_size, known.eod if eod is None else eod, content, files)

    def load(self, eod: str | None = None) -> Tokenizer:
        """The tokenizer. `eod`, DataError and ConfigError as in :func:`heron.tokenizer.load`."""
        if self.json is None or Path(self.spec).is_file():
            return tokenizer.load(self.spec, eod)
        return _from_text(self.json, self.files, self.spec, eod)

    @property
    def is_text(self) -> bool:
        """Whether ids stand for text."""
        return not self.spec.startswith("integers")

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation: its own, else heron.generation.chat's; None: ids stand for no text."""
        if TEMPLATE in self.files:
            return self.files[TEMPLATE].decode("utf-8", errors="replace")
        own = _object(self.files.get(TOKENIZER_CONFIG)).get("chat_template")
        if isinstance(own, str):
            return own
        return CHAT_TEMPLATE if self.is_text else None

    def folder(self) -> dict[str, bytes]:
        """A Hugging Face folder's files by name: the tokenizer's own, and new ones for those that it lacks."""
        content = self.json
        if content is None:
            content = {"world": world_json, "bytes": bytes_json}.get(self.spec, lambda: integers_json(self))()
        out = {TOKENIZER: content.encode(), **self.files}
        if self.spec == "world":
            out[WORLD_FILE] = world_file().read_bytes()
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.eod is not None:
            config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), token_of(content, self.eod))
        if self.json is None:
            config[SPEC] = self.spec
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            out.setdefault(TEMPLATE, self.chat_template.encode())
        out[TOKENIZER_CONFIG] = _text(config | _object(self.files.get(TOKENIZER_CONFIG)))
        return out


def ids(eod: int | None) -> dict[str, int | None]:
    """The special ids of a config.json and a generation_config.json: every one is the end of a document."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eod)


def generation_config(eod: int | None) -> bytes:
    """The content of a generation_config.json."""
    return _text(ids(eod))


def from_folder(folder: Path, eod: object = None) -> Vocabulary | None:
    """What a Hugging Face folder (or a run's) holds; None: no tokenizer that is known here.

    Args:
        folder: with a tokenizer.json or World's vocabulary file.
        eod: the end of a document, where the tokenizer's own files don't tell it.

    Raises:
        DataError: a tokenizer.json that is none, or another RWKV table than World's alone.
    """
    files = beside(folder)
    spec = _object(files.get(TOKENIZER_CONFIG)).get(SPEC)
    has_grown = _has_grown(folder / TOKENIZER)
    if isinstance(spec, str) and _is_built_in(spec) and not has_grown:
        return Vocabulary.of(tokenizer.load(spec), files)
    tables = sorted(folder.glob("rwkv_vocab_v*.txt"))
    if not has_grown and any(
        table.read_bytes().replace(b"\r\n", b"\n") == world_file().read_bytes() for table in tables
    ):
        return Vocabulary.of(tokenizer.load("world"), _without_code(files))
    if not (folder / TOKENIZER).is_file():
        if tables:
            raise DataError(f"{tables[0]}: another table than {WORLD_FILE}, the only one that is known here")
        return None
    found = Vocabulary.of(tokenizer.load(str(folder / TOKENIZER)), files)
    if found is not None and found.eod is None and type(eod) is int and 0 <= eod < found.vocab_size:
        found = dataclasses.replace(found, eod=eod)
    return found


def beside(folder: Path) -> dict[str, bytes]:
    """The files that a Hugging Face folder holds beside its tokenizer.json, by name."""
    return {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}


def world() -> WorldTokenizer:
    """The one World tokenizer of this process."""
    known = tokenizer.load("world")
    if not isinstance(known, WorldTokenizer):
        raise TypeError(type(known).__name__)
    return known


@functools.cache
def world_json() -> str:
    """World as a tokenizer.json: its greedy longest match is a regular expression in the shape of a trie.

    Text becomes bytes, each spelled by one character; the expression cuts them into tokens, trying at each place the
    longest first; a table gives the ids. Same ids as :class:`heron.tokenizer.WorldTokenizer` for every text, in linear
    time.
    """
    from tokenizers import Regex, models, pre_tokenizers

    spelled = [_spelled(token) for token in world().table[1:]]
    table = {WORLD_END: 0} | {token: index for index, token in enumerate(spelled, start=1)}
    cut = pre_tokenizers.Split(Regex(_longest_first(spelled)), "isolated")
    return _of_bytes(models.WordLevel(table, unk_token=WORLD_END), WORLD_END, cut)


def bytes_json() -> str:
    """:class:`heron.tokenizer.ByteTokenizer` as a tokenizer.json; id 0 is its end of a document."""
    from tokenizers import models

    table = {_END: 0} | {_spelled(bytes([byte])): byte for byte in range(1, 256)}
    return _of_bytes(models.BPE(table, []), _END)


def integers_json(vocabulary: Vocabulary) -> str:
    """Integers between whitespace as a tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary.vocab_size)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if vocabulary.eod is not None:
        made.add_special_tokens([AddedToken(str(vocabulary.eod), single_word=True, normalized=False)])
    return made.to_str()


def token_of(content: str, index: int) -> str | None:
    """The token of an id in a tokenizer.json, spelled as there."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(content).id_to_token(index)


def _of_bytes(model: Any, end: str, cut: Any = None) -> str:
    """A tokenizer.json that spells each byte by one character, and `cut`s these before the model sees them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    made = Tokenizer(model)
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = spell if cut is None else pre_tokenizers.Sequence([spell, cut])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([end])
    return made.to_str()


def _spelled(token: bytes) -> str:
    return "".join(_characters()[byte] for byte in token)


@functools.cache
def _characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level files."""
    return {byte: character for character, byte in byte_alphabet().items()}


def _longest_first(tokens: list[str]) -> str:
    """A regular expression that matches the longest of `tokens` that begins at a position."""
    trie: dict = {}
    for token in tokens:
        node = trie
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}  # a token ends here
    return _expression(trie)


def _expression(node: dict) -> str:
    leaves = [_escaped(character) for character, below in node.items() if character and below.keys() == {""}]
    more = [
        _escaped(character) + _expression(below)
        for character, below in node.items()
        if character and below.keys() != {""}
    ]
    alternatives = [*more, *([f"[{''.join(leaves)}]"] if leaves else [])]
    return f"(?:{'|'.join(alternatives)}){'?' if '' in node else ''}"


def _escaped(character: str) -> str:
    return "\\" + character if character in r"\^$.|?*+()[]{}-&~#/" else character


def _from_text(content: str, files: Mapping[str, bytes], name: str, eod: str | None = None) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for file, data in {**files, TOKENIZER: content.encode()}.items():
            (Path(folder) / file).write_bytes(data)
        path = str(Path(folder) / TOKENIZER)
        try:
            known = tokenizer.load(path, eod)
        except HeronError as error:
            raise type(error)(str(error).replace(path, name)) from None
    known.spec = name
    return known


def _has_grown(path: Path) -> bool:
    """Whether a tokenizer.json has added tokens; that of World, bytes or integers has one at most."""
    added = _object(path.read_bytes() if path.is_file() else None).get("added_tokens")
    return isinstance(added, list) and len(added) > 1


def _is_built_in(spec: str) -> bool:
    return spec.split(":")[0] in ("world", "bytes", "integers")


def _without_code(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A released World folder's files without those that ask for Python code which does not go along."""
    return {name: data for name, data in files.items() if name in (GENERATION, TEMPLATE)}


def _object(data: bytes | None) -> dict[str, Any]:
    """A JSON object; {} for anything else: such a file decides nothing here."""
    try:
        content = json.loads(data or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
