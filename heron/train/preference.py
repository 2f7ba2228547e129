"""Direct preference optimization (DPO, arXiv:2305.18290): of two answers the chosen one is to become the likelier.

    margin = beta * ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)))
    loss   = -log sigmoid(margin), the mean over pairs

p_ref is what the run starts from. Its log-probabilities are computed once, and kept in the run folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heron import files
from heron.config import TrainConfig
from heron.data.conversations import Conversations
from heron.data.packs import Packs
from heron.errors import CheckpointError
from heron.model import RWKV
from heron.model.state import States

FILE = "reference.json"
FIGURES = ("accuracy", "margin")  # of a step's pairs: the share with a margin above 0, and the mean margin
_IGNORED = -100


def losses_and_margins(logprobs: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss and the margin (n,) of each pair from the log-probabilities (2 n,) of chosen, rejected, chosen, ..."""
    gains = (logprobs - reference.to(logprobs)).unflatten(0, (-1, 2))
    margins = beta * (gains[:, 0] - gains[:, 1])
    return -F.logsigmoid(margins), margins


def log_likelihoods(
    network: RWKV, sample: Sequence[Tensor | None], offsets: Sequence[int], start: States | None
) -> Tensor:
    """The log-probability (n,) of what is learned of each packed text, at least fp32.

    Args:
        sample: tokens, targets, recalled and cu_seqlens, on the device of `network`.
        offsets: of the n texts, on the host: the first n + 1 numbers of cu_seqlens.
        start: the state that the texts begin from.
    """
    tokens, targets, recalled, cu_seqlens = sample
    assert tokens is not None
    assert targets is not None
    hidden, _ = network.hidden_states(tokens, start, cu_seqlens, keep_state=False, recalled=recalled)
    found = []
    for begin, end in pairwise(offsets):
        of_text = targets[:, begin:end]
        here = None if recalled is None else recalled[:, begin:end]
        mean = network.head_loss(hidden[:, begin:end], of_text, here, l2wrap=0.0)  # which is of the likelihood's loss
        found.append(-mean * (of_text != _IGNORED).sum())
    return torch.stack(found)


def n_texts(sample: Sequence[Tensor | None]) -> int:
    """Of a sample of pairs on the host, the number of texts that are not empty."""
    numbers = sample[4]
    return 0 if numbers is None else int((numbers >= 0).sum())


class References(NamedTuple):
    """The log-probability of each sample under what the run starts from: chosen, rejected, chosen, ...; fp64."""

    train: Tensor
    val: Tensor


@dataclasses.dataclass(frozen=True)
class _Key:
    """What references depend on."""

    base: str | None  # fingerprint of the weights; None where only the run folder tells
    data: str
    dtype: str
    weights: str


def references(
    config: TrainConfig,
    base: str | None,
    corpus: Conversations,
    packs: tuple[Packs, Packs | None],
    resume_from: Path | None,
    likelihoods: Callable[[tuple[Tensor | None, ...]], Tensor],
) -> References:
    """Those of a run: computed, where it has none yet, and kept in its folder.

    Args:
        base: fingerprint of the weights that it starts from; None: not known, which it may be of one that goes on.
        packs: for training and for validation.
        resume_from: the checkpoint that it goes on from, in the folder in which they are kept.
        likelihoods: a sample -> the log-probability of each of its texts under what the run starts from.

    Raises:
        CheckpointError: the run goes on, and its references are missing, damaged, or of something else.
    """
    key = _Key(base, corpus.fingerprint, config.dtype, config.weights)
    kept = Path(config.out) / FILE
    if resume_from is not None:
        found = _read(resume_from.parents[1] / FILE, key)
        if found is None:
            raise CheckpointError(
                f"{resume_from.parents[1] / FILE}: is missing, damaged or of another base, data or dtype, and only "
                "the weights that the run started from can make it anew; give them as they were, or name another --out"
            )
    else:
        found = _read(kept, key)
    if found is None:
        of_train, of_val = packs
        n_val = 0 if corpus.val_samples is None else len(corpus.val_samples)
        found = References(
            _of(of_train, len(corpus.samples), config.micro_bsz, likelihoods),
            _of(of_val, n_val, config.micro_bsz, likelihoods),
        )
    content = {**dataclasses.asdict(key), **{name: part.tolist() for name, part in found._asdict().items()}}
    if not kept.exists() or resume_from is None:
        files.write_text(kept, json.dumps(content))
    return found


def score(
    packs: Packs, reference: Tensor, config: TrainConfig, share: tuple[int, int],
    likelihoods: Callable[[tuple[Tensor | None, ...]], Tensor],
) -> list[float]:  # fmt: skip
    """Sums over a share of the validation pairs: losses, margins above 0, margins, and the number of pairs.

    `share`: i, n: every n-th batch from number i on.
    """
    assert config.finetune is not None
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in islice(packs.each_once(config.micro_bsz), share[0], None, share[1]):
        with torch.no_grad():
            logprobs = likelihoods(batch).double().cpu()
        assert batch[4] is not None
        losses, margins = losses_and_margins(logprobs, reference[batch[4][: len(logprobs)]], config.finetune.dpo_beta)
        sums += torch.stack((losses.sum(), (margins > 0).sum(), margins.sum(), torch.tensor(len(losses)))).double()
    return sums.tolist()


def _of(packs: Packs | None, n: int, count: int, likelihoods: Callable[[tuple[Tensor | None, ...]], Tensor]) -> Tensor:
    found = torch.zeros(n, dtype=torch.float64)
    for batch in () if packs is None else packs.each_once(count):
        with torch.no_grad():
            logprobs = likelihoods(batch).double().cpu()
        assert batch[4] is not None
        found[batch[4][: len(logprobs)]] = logprobs
    return found


def _read(path: Path, key: _Key) -> References | None:
    """None where there are none of this key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base = key.base or content["base"]
        if {**dataclasses.asdict(key), "base": base} != {name: content[name] for name in dataclasses.asdict(key)}:
            return None
        return References(*(torch.tensor(content[name], dtype=torch.float64) for name in References._fields))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
