"""Removes what wrappers add to the names of a state dict: `module.`, `_orig_mod.`, `model.` and stacks of them."""

from __future__ import annotations

import os
from collections.abc import Iterable

# DataParallel, torch.compile, DeepSpeed ZeRO-3, FSDP and activation checkpointing insert these into a name.
_WRAPPERS = frozenset(("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_COUNTERS = frozenset(("n_averaged",))  # of torch.optim.swa_utils.AveragedModel: a wrapper's own tensor
_ANCHORS = ("emb.weight", "model.embeddings.weight")  # every model has one of these, upstream's name or Hugging Face's


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """A dictionary from each name as it is to the name without what wrappers added.

    Parts of a name that only wrappers have go wherever they stand. What stands before *every* name (`model.`, or the
    attribute of a module of one's own) goes where a model remains. Tensors of the wrappers themselves are left out.

    Raises:
        ValueError: two names become one.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    plain = {name: rest for name, rest in plain.items() if rest not in _COUNTERS}
    prefix = common_prefix(plain.values())
    while prefix and not any(prefix + anchor in plain.values() for anchor in _ANCHORS):
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    plain = {name: rest.removeprefix(prefix) for name, rest in plain.items()}
    taken: dict[str, str] = {}
    for name, rest in plain.items():
        if rest in taken:
            raise ValueError(f"{taken[rest]!r} comes twice, the other time as {name!r}; keep one of them")
        taken[rest] = name
    return plain


def described(names: Iterable[str]) -> list[str]:
    """What :func:`unwrapped` takes off, in words."""
    plain = unwrapped(names)
    prefixes = {name.removesuffix(rest) for name, rest in plain.items() if name != rest and name.endswith(rest)}
    words = [f"names begin with {prefix!r}, as a wrapper saves them; read without it" for prefix in sorted(prefixes)]
    if any(not name.endswith(rest) for name, rest in plain.items()):
        words.append(f"names hold parts of wrappers ({', '.join(sorted(_WRAPPERS))}); read without them")
    return words


def common_prefix(names: Iterable[str]) -> str:
    """What every name begins with, up to and with a dot; "" for no name or nothing."""
    first = os.path.commonprefix(list(names))
    return first[: first.rfind(".") + 1]
