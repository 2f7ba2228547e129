"""What may come next in a text: a grammar, or any other rule that is asked token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from heron.errors import ConfigError, HeronError


class Constraint(Protocol):
    """The rule of one text. It belongs to one sequence, which moves it on; a snapshot does not hold it.

    A :class:`heron.errors.HeronError` that it raises ends its sequence, and no other.
    """

    @property
    def is_over(self) -> bool:
        """Whether the text may end here."""
        ...

    def allowed(self) -> Tensor:
        """(V,) bool on the host, V ids of the tokenizer: the tokens that may come next."""
        ...

    def accept(self, token: int) -> None:
        """Move on by a token that :meth:`allowed` held."""
        ...


def may_follow(constraint: Constraint, ends: Sequence[int], n_ids: int) -> Tensor:
    """(V,) bool on the host: what `constraint` allows. Ids that end the text are allowed where it is over, else not.

    Args:
        ends: ids that end the text, below `n_ids`.
        n_ids: V, of the tokenizer.

    Raises:
        ConfigError: the constraint gives something else than (V,) bool.
        HeronError: nothing may follow, or what the constraint raises.
    """
    allowed = constraint.allowed()
    if tuple(allowed.shape) != (n_ids,) or allowed.dtype != torch.bool:
        raise ConfigError(f"constraint: wanted ({n_ids},) torch.bool, got {tuple(allowed.shape)} {allowed.dtype}")
    allowed = allowed.clone()
    allowed[list(ends)] = constraint.is_over
    if not allowed.any():
        raise HeronError(
            "constraint: no token may come next, and no id ends the text here; let the constraint allow one, or "
            "give a tokenizer with an end of document, or stop_ids"
        )
    return allowed
