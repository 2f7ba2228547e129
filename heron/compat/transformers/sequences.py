"""Batches as other tools make them, with padding and with packed documents, read as the sequences that they hold.

A recurrent state remembers whatever is read, so padding is never read, and no document goes on from another one's
state: the tokens of each sequence are gathered and run without the others, and what comes out is put back in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heron.errors import DataError
from heron.model import RWKV, State
from heron.model.state import States


class Sequence(NamedTuple):
    """Tokens that belong together, in their order."""

    row: int
    places: Tensor  # (n,) int64 in the flattened batch of B * T, n >= 1
    is_first: bool  # of its row: it goes on from the row's state
    is_last: bool  # of its row: its state is the row's new one


class Read(NamedTuple):
    """What :func:`read` gives."""

    layers: list[Tensor]  # (B, T, C) each, 0 at padding: where wanted the input of each block; the outputs of ln_out
    state: States | None
    recalled: Tensor | None  # (B, T, K, 2), what ROSA memory recalled; 0 at padding; None without


def find(
    shape: torch.Size, mask: Tensor | None, positions: Tensor | None, documents: Tensor | None
) -> list[Sequence] | None:
    """The sequences of a batch; None where every row is one.

    Args:
        shape: (B, T).
        mask: (B, T), 0 for padding, which may stand anywhere; None: there is none.
        positions: (B, T); a document begins where they do not grow from one token to the next. None: don't look.
        documents: (B, T), the number of each token's document. None: don't look.

    Raises:
        DataError: nothing but padding.
    """
    B, T = shape
    mask, positions, documents = (None if x is None else x.cpu() for x in (mask, positions, documents))
    found = []
    for row in range(B):
        at = torch.arange(T) if mask is None else mask[row].nonzero().flatten()
        if len(at) == 0:
            continue
        begins = torch.zeros(len(at) - 1, dtype=torch.bool)
        if positions is not None:
            begins |= positions[row, at].diff() <= 0
        if documents is not None:
            begins |= documents[row, at].diff() != 0
        parts = at.tensor_split((begins.nonzero().flatten() + 1).tolist())
        found += [Sequence(row, row * T + part, i == 0, i == len(parts) - 1) for i, part in enumerate(parts)]
    if not found:
        raise DataError("attention_mask: wanted at least one token, got padding alone")
    whole = len(found) == B and all(len(sequence.places) == T for sequence in found)
    return None if whole else found


def read(
    model: RWKV,
    ids: Tensor,
    embeddings: Tensor | None,
    state: States | None,
    sequences: list[Sequence] | None,
    keep_state: bool,
    every_layer: bool,
) -> Read:
    """The outputs of ln_out for a batch, equal to those of each sequence alone but for rounding.

    Args:
        ids: (B, T) int64.
        embeddings: (B, T, C) instead of the rows of emb; None: those.
        state: what the rows left off with; None: zeros.
        sequences: from :func:`find`.
        keep_state: whether the rows' new states are wanted. Then sequences of one length share a pass, else all that
            waste no more than half of it.
        every_layer: whether the input of every block is wanted, too.
    """
    B, T = ids.shape
    if sequences is None:
        if not isinstance(state, tuple):
            layers, state, recalled = _run(model, ids, embeddings, state, every_layer)
            return Read(layers, state if keep_state else None, recalled)
        sequences = [Sequence(row, row * T + torch.arange(T), True, True) for row in range(B)]

    places_read, outputs, found = [], [], []
    new: list[State | None] = [None] * B
    for group in _groups(sequences, keep_state, state):
        lengths = torch.tensor([len(sequence.places) for sequence in group])
        is_token = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (n, longest)
        places = nn.utils.rnn.pad_sequence([sequence.places for sequence in group], batch_first=True)
        places, is_token = places.to(ids.device), is_token.to(ids.device)
        some = None if embeddings is None else embeddings.flatten(0, 1)[places]
        before = None
        if state is not None and group[0].is_first:
            before = State.joined([_of_row(state, sequence.row) for sequence in group])
        layers, after, recalled = _run(model, ids.flatten()[places], some, before, every_layer)
        places_read.append(places[is_token])
        outputs.append([layer[is_token] for layer in layers])
        found += [] if recalled is None else [recalled[is_token]]
        for i, sequence in enumerate(group):
            if keep_state and sequence.is_last:
                new[sequence.row] = after if len(group) == 1 else _of_row(after, i)

    at = torch.cat(places_read)

    def placed(parts: Iterable[Tensor]) -> Tensor:
        values = torch.cat(tuple(parts))
        return values.new_zeros(B * T, *values.shape[1:]).index_copy(0, at, values).unflatten(0, (B, T))

    layers = [placed(parts) for parts in zip(*outputs, strict=True)]
    new_state = _of_rows(model, new, state, ids, layers[0].dtype) if keep_state else None
    return Read(layers, new_state, placed(found) if found else None)


def map_rows(state: States, rows: Tensor) -> States:
    """The states of `rows` (n,) int64, each as often as it stands there."""
    if isinstance(state, tuple):
        which = rows.tolist()  # as in State.of
        return tuple(state[row] if which.index(row) == i else state[row].clone() for i, row in enumerate(which))
    return state.of(rows.tolist())


def _groups(sequences: list[Sequence], keep_state: bool, state: States | None) -> Iterator[list[Sequence]]:
    """The sequences that share a pass, all of which start alike: from their rows' states or from nothing."""

    def key(sequence: Sequence) -> tuple[int, int, int]:
        goes_on = state is not None and sequence.is_first
        alone = sequence.row if goes_on and isinstance(state, tuple) else -1
        return goes_on, alone, len(sequence.places)

    group: list[Sequence] = []
    total = 0
    for sequence in sorted(sequences, key=key, reverse=True):
        length = len(sequence.places)
        if group:
            alike = key(sequence)[:2] == key(group[0])[:2]
            longest = len(group[0].places)
            fits = length == longest if keep_state else (len(group) + 1) * longest <= 2 * (total + length)
            if not (alike and fits):
                yield group
                group, total = [], 0
        group.append(sequence)
        total += length
    yield group


def _run(
    model: RWKV, ids: Tensor, embeddings: Tensor | None, state: State | None, every_layer: bool
) -> tuple[list[Tensor], State, Tensor | None]:
    with _inputs(model.blocks if every_layer else ()) as inputs:
        hidden, after, recalled = model.read(ids, state, embeddings=embeddings)
    return [*inputs, hidden], after, recalled  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _inputs(blocks: nn.ModuleList | tuple[()]) -> Iterator[list[Tensor]]:
    """A list that gets the residual stream before each of `blocks`: its two parts are added up here."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, given: tuple) -> tuple:
        x, branch, *others = given
        inputs.append(x if branch is None else x + branch)
        return inputs[-1], None, *others

    hooks = [block.register_forward_pre_hook(keep) for block in blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _of_row(state: States, row: int) -> State:
    return state[row] if isinstance(state, tuple) else state.of([row])


def _of_rows(model: RWKV, new: list[State | None], old: States | None, ids: Tensor, dtype: torch.dtype) -> States:
    """The states of all rows; one that read nothing keeps what it had."""
    states: list[State] = []
    for row, state in enumerate(new):
        if state is None:
            state = State.zeros(model.config, 1, ids.device, dtype) if old is None else _of_row(old, row)
        states.append(state)
    return tuple(states) if model.config.state_grows else State.joined(states)
