"""Settings from a YAML file, read more strictly than PyYAML does.

It would take the last of two equal keys without a word; here they are refused. And it would take ``on`` and ``off`` for
true and false, which several settings have as values of their own; here they are text, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from heron.errors import ConfigError


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError when it is unreadable or something else, or a key stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: dict[Any, Any] = {}
            for key_node, _ in node.value:
                mark = key_node.start_mark
                if key_node.tag == "tag:yaml.org,2002:merge":  # `<<` takes in another mapping, which keys may override
                    continue
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and seen.setdefault(key, mark) is not mark:
                    first = seen[key].line + 1
                    raise ConfigError(f"{path}: {key!r} stands in line {first} and in line {mark.line + 1}; keep one")
            return super().construct_mapping(node, deep)

    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag != boolean]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(boolean, re.compile("(?i:true|false|yes|no)$"), list("tTfFyYnN"))

    try:
        loader = Loader(Path(path).read_text(encoding="utf-8-sig"))
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or 2026-13-40
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        got = "none" if values is None else type(values).__name__
        raise ConfigError(f"{path}: wanted `name: value` lines, got {got}")
    return values
