"""Tables with a row per token: growing and shrinking them together, and telling ids from embeddings."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from heron.errors import ConfigError, DataError
from heron.model import RWKV
from heron.model.deep_embed import tables_of
from heron.model.init import initial_value


def rows_of(model: RWKV) -> int:
    """How many tokens the embedding has a row for; ConfigError where an adapter is on one of the tables."""
    for name, table in {"emb": model.emb, "head": model.head, **tables_of(model)}.items():
        is_inside = name.endswith((".base_layer", ".original_module")) or ".modules_to_save." in name
        if is_inside or not isinstance(table, nn.Embedding | nn.Linear | nn.Identity):
            raise ConfigError(f"resize_token_embeddings: an adapter is on {name}; resize first, then add the adapter")
    return model.emb.weight.shape[0]


def resize(model: RWKV, n_old: int, n: int, by_mean: bool) -> None:
    """Bring DeepEmbed's tables and the config from `n_old` tokens to `n`, as the embedding and the head are by now.

    New rows are the mean of the old ones. Without `by_mean` they start as in a fresh model, in embedding and head too.
    """
    config = model.config = dataclasses.replace(model.config, vocab_size=n)
    if n == n_old:
        return
    tables = tables_of(model)
    for table in tables.values():
        old = table.weight.detach()
        new = old.mean(dim=0, dtype=torch.promote_types(old.dtype, torch.float32)).to(old.dtype).repeat(n, 1)
        new[:n_old] = old[:n]
        table.weight = nn.Parameter(new, requires_grad=table.weight.requires_grad)
        table.num_embeddings = n
    if n > n_old and not by_mean:
        ends = {"emb": model.emb, "head": model.head}
        for name, table in {**{k: end for k, end in ends.items() if hasattr(end, "weight")}, **tables}.items():
            start = initial_value(f"{name}.weight", table.weight.shape, config)
            table.weight.data[n_old:] = start[n_old:].to(table.weight)


@torch.no_grad()
def ids_of(model: RWKV, embeddings: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, T) ids for `embeddings` (B, T, C): those that were given, else those whose rows they are, bit for bit.

    Zeros where nothing is looked up by them, and at padding. A v7b computes with the rows of ids that it remembers, so
    there both must agree.

    Raises:
        DataError: an embedding that is the row of no token, or of several.
    """
    config = model.config
    if config.deep_embed is None and not config.has_attention and config.memory is None:
        return embeddings.new_zeros(embeddings.shape[:2], dtype=torch.int64)
    if ids is not None and config.variant != "v7b":
        return ids
    is_token = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device) if mask is None else mask
    table = model.emb(torch.arange(config.vocab_size, device=embeddings.device))
    V = len(table)
    rows = torch.cat((table, embeddings[is_token].to(table.dtype)))
    kinds, kind = torch.unique(rows, dim=0, return_inverse=True)  # equal rows are of one kind
    ids_of_kind = torch.bincount(kind[:V], minlength=len(kinds))
    id_of_kind = kind.new_zeros(len(kinds)).index_copy(0, kind[:V], torch.arange(V, device=kind.device))
    found = ids_of_kind.new_zeros(is_token.shape).masked_scatter(is_token, id_of_kind[kind[V:]])
    is_told = (ids_of_kind[kind[V:]] == 1).all()
    if not is_told or (ids is not None and not torch.equal(found[is_token], ids[is_token])):
        what = "the embeddings of one token each" if ids is None else "the embeddings of these input_ids"
        cure = "give input_ids instead" if config.variant == "v7b" else "give input_ids, too"
        name = config.variant if config.memory is None else f"{config.variant} with ROSA memory"
        raise DataError(f"inputs_embeds: a {name} looks up by token id, and they are not {what}; {cure}")
    return found
