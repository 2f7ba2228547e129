"""What the config dataclasses have in common: documented fields, their types, how they are made of plain values."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Union

from heron.errors import ConfigError, UnknownKeyError, did_you_mean


def setting(default: Any, doc: str, short_flag: bool = True) -> Any:
    """A dataclass field whose one line of documentation is also the help text of its command-line flag.

    `short_flag`: whether the flag of a model's field also goes without ``model.``.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "short_flag": short_flag})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def setting_type(cls: type, name: str) -> tuple[tuple[type, ...], bool]:
    """The plain types that field `name` of config class `cls` takes, and whether None is one of its values."""
    hint = _hints(cls)[name]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not type(None)), type(None) in kinds


def from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A config of class `cls` from plain values; an unknown key is an UnknownKeyError that suggests the near name."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: wanted a mapping of names to values, got {type(values).__name__}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise UnknownKeyError(f"{where}: unknown key {key!r}.{hint} Known: {', '.join(known)}")
    return cls(**values)


def plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as Python has it, and a path as a string; anything else as it is."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "shape", None) == ():
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_types(config: Any) -> None:
    """Bring each field to its declared type where nothing is lost (8.0 to an int, "6e-4" to a float), else refuse."""
    for field in dataclasses.fields(config):
        value = plain(getattr(config, field.name))
        kinds, optional = setting_type(type(config), field.name)
        if value is None and optional:
            continue
        if isinstance(value, bool) and bool not in kinds:
            fits = False
        elif kinds == (bool,) and value in ("on", "off"):
            value, fits = value == "on", True
        elif int in kinds and isinstance(value, float) and value.is_integer():
            value, fits = int(value), True
        elif float in kinds and isinstance(value, (int, str)):
            try:
                value, fits = float(value), True
            except ValueError:
                fits = False
        else:
            fits = isinstance(value, kinds)
        if fits and isinstance(value, float) and not math.isfinite(value):
            fits = False
        if not fits:
            wanted = " or ".join(kind.__name__ for kind in kinds) + (" or nothing" if optional else "")
            raise ConfigError(f"{field.name}: wanted {wanted}, got {value!r}")
        object.__setattr__(config, field.name, value)
