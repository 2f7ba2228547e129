"""The model card of an exported folder, and the licence beside it."""

from __future__ import annotations

import json
import re
import shlex
from importlib import metadata
from pathlib import Path

import heron
from heron.checkpoint.vocabulary import WORLD_FILE, Vocabulary
from heron.config import ModelConfig

CARD, LICENSE = "README.md", "LICENSE"
_TEXTS = ("LICENSE", "LICENCE", "UNLICENSE", "COPYING")  # how files begin that hold a licence, in any case
_LICENSE_NAME = "apache-2.0"
_HEAD = b"---\n---\n"  # of a card that says nothing
_WHOSE = """, that of Heron and of the released RWKV-7 weights. If the data or the weights that this model was made
from ask for another one, name it here and put its text into LICENSE"""
_LOAD = {
    "heron": """import heron.hf  # registers the model type; pip install 'heron-rwkv[hf]'
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained({folder}, local_files_only=True)""",
    "rwkv7": """# The model's class is that of flash-linear-attention or of rwkv7-hf: pip install rwkv7-hf
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True, local_files_only=True)""",
}
_LOAD_TOKENIZER = "\ntokenizer = AutoTokenizer.from_pretrained({folder}, local_files_only=True)"


def goes_along(name: str) -> bool:
    """Whether a file of this name goes along from folder to folder: the card, a licence, a notice."""
    return name == CARD or _is_licence(name) or name.upper().startswith("NOTICE")


def _is_licence(name: str) -> bool:
    return name.upper().startswith(_TEXTS)


def papers(
    config: ModelConfig,
    n_parameters: int,
    vocabulary: Vocabulary | None,
    model_type: str,
    name: str,
    theirs: dict[str, bytes],
) -> dict[str, bytes]:
    """The model card and the licence by name: those of the source, `theirs`, as they are, and what is missing new.

    Args:
        config: of the model, and `n_parameters` its parameters.
        vocabulary: its tokenizer; None: unknown.
        model_type: "heron" or "rwkv7", the kind of the folder.
        name: of the folder.
    """
    name = name.encode(errors="replace").decode()  # one that is not UTF-8
    licence = _licence_of(theirs.get(CARD, b""))
    out = dict(theirs)
    if theirs.get(CARD, _HEAD) == licence_alone(theirs.get(CARD, _HEAD)):
        out[CARD] = _card(config, n_parameters, vocabulary, model_type, name, licence or _LICENSE_NAME).encode()
    lacks_text = not any(map(_is_licence, out))
    if lacks_text and licence in (None, _LICENSE_NAME) and (text := _license_text()) is not None:
        out[LICENSE] = text
    return out


def licence_alone(theirs: bytes) -> bytes:
    """Nothing but the licence of a card, for a model that has become another; :func:`papers` writes the rest anew."""
    licence = _licence_of(theirs)
    return _HEAD if licence is None else f"---\nlicense: {licence}\n---\n".encode()


def _licence_of(card: bytes) -> str | None:
    """The licence that a card names, in quotes or as a list too: of several, the first."""
    found = re.search(rb"^license:(?:[ \t]*\n[ \t]*-)?[ \t]*\[?[\"']?([^\s\"',\]]+)", card, re.MULTILINE)
    return found[1].decode("utf-8", errors="replace").lower() if found else None


def _card(
    config: ModelConfig, n_parameters: int, vocabulary: Vocabulary | None, model_type: str, name: str, license_name: str
) -> str:
    heads = f", {config.n_head} heads of {config.head_size}" if config.has_time_mix else ""
    rows = [
        ("architecture", f"RWKV, variant {config.variant}" + (", with ROSA" if config.rosa or config.memory else "")),
        ("layers, width", f"{config.n_layer}, {config.n_embd}{heads}; ffn_dim {config.ffn_dim}"),
        ("parameters", f"{n_parameters:,}"),
        ("token ids", f"{config.vocab_size:,}"),
        ("tokenizer", _tokenizer(vocabulary)),
        ("end of a document", _end(vocabulary)),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
license: {license_name}
library_name: {"heron-rwkv" if model_type == "heron" else "transformers"}
pipeline_tag: text-generation
tags: [rwkv, rwkv-{config.variant}]
---
# {name}

Written by Heron {heron.__version__}. What it was trained on, and what it is good for, is for its author to say here.

| | |
|---|---|
{table}

```python
{_load(vocabulary, model_type, name)}
```

```bash
{_generate(vocabulary, name)}
```

License: {license_name}{_WHOSE if license_name == _LICENSE_NAME else ""}.
"""


def _load(vocabulary: Vocabulary | None, model_type: str, name: str) -> str:
    text = _LOAD[model_type] + (_LOAD_TOKENIZER if vocabulary else "")
    classes = "AutoModelForCausalLM" + (", AutoTokenizer" if vocabulary else "")
    return text.format(folder=json.dumps(name, ensure_ascii=False), classes=classes)


def _generate(vocabulary: Vocabulary | None, name: str) -> str:
    if vocabulary is None:
        return f"heron generate {shlex.quote(name)} --tokenizer TOKENIZER --prompt The"
    integers = vocabulary.spec.startswith("integers:")
    return f"heron generate {shlex.quote(name)} --prompt {'1' if integers else 'The'}"


def _tokenizer(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return "unknown: none lies here"
    if vocabulary.json is not None:
        return f"tokenizer.json, {vocabulary.vocab_size:,} ids"
    return {"world": f"RWKV World ({WORLD_FILE})", "bytes": "UTF-8 bytes"}.get(vocabulary.spec, vocabulary.spec)


def _end(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return "unknown"
    return "none" if vocabulary.eod is None else f"id {vocabulary.eod}"


def _license_text() -> bytes | None:
    """Heron's licence as it was installed, or from a checkout; None: neither is there."""
    try:
        installed = metadata.distribution("heron-rwkv").read_text(f"licenses/{LICENSE}")
    except metadata.PackageNotFoundError:
        installed = None
    path = Path(heron.__file__).parents[1] / LICENSE
    return installed.encode() if installed else path.read_bytes() if path.is_file() else None
