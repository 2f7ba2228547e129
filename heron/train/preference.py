"""Direct preference optimization (DPO, arXiv:2305.18290): of two answers the chosen one is to become the likelier.

    margin = beta * ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)))
    loss   = -log sigmoid(margin), the mean over pairs

p_ref is what the run starts from. Its log-probabilities are computed once, and kept in the run folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heron import files
from heron.config import TrainConfig
from heron.context import Part
from heron.data.conversations import Conversations
from heron.data.packs import Packs
from heron.dist import Ranks
from heron.errors import CheckpointError
from heron.model import RWKV
from heron.train.passes import IGNORED, Means, Sample

FILE = "reference.json"
FIGURES = ("accuracy", "margin")  # of a step's pairs: the share with a margin above 0, and the mean margin


def losses_and_margins(logprobs: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss and the margin (n,) of each pair from the log-probabilities (2 n,) of chosen, rejected, chosen, ..."""
    gains = (logprobs - reference.to(logprobs)).unflatten(0, (-1, 2))
    margins = beta * (gains[:, 0] - gains[:, 1])
    return -F.logsigmoid(margins), margins


class References(NamedTuple):
    """The log-probability of each sample under what the run starts from: chosen, rejected, chosen, ...; fp64."""

    train: Tensor
    val: Tensor


class Pairs:
    """Makes a pass over each sample of pairs, in which two answers are compared.

    Attributes:
        references: what they are measured against; set before the first step.
    """

    references: References | None = None

    def __init__(self, means: Means, beta: float):
        self._means, self._beta = means, beta

    def on(self, model: RWKV, precision: Callable[[], AbstractContextManager]) -> Pairs:
        """The same with another model than the network that learns."""
        other = Pairs(self._means._replace(network=model, precision=precision), self._beta)
        other.references = self.references
        return other

    def count(self, samples: Sequence[Sample]) -> int:
        """How many passes a step of these makes."""
        return len(samples)

    def weight(self, sample: Sample) -> int:
        """What counts in the mean loss of a step: texts that are not empty."""
        numbers = sample[4]
        return 0 if numbers is None else int((numbers >= 0).sum())

    def log_likelihoods(self, sample: Sample) -> Tensor:
        """The log-probability (n,) of what is learned of each text of a sample, at least fp32."""
        tokens, targets, recalled, cu_seqlens = map(self._means.onto, sample[:4])
        assert tokens is not None
        assert targets is not None
        offsets = sample[3][: self.weight(sample) + 1].tolist()  # pyright: ignore[reportOptionalSubscript]
        network, found = self._means.network, []
        with self._means.precision():
            start = self._means.start(tokens, cu_seqlens)
            hidden, _ = network.hidden_states(tokens, start, cu_seqlens, keep_state=False, recalled=recalled)
            for begin, end in pairwise(offsets):
                of_text = targets[:, begin:end]
                here = None if recalled is None else recalled[:, begin:end]
                mean = network.head_loss(
                    hidden[:, begin:end], of_text, here, l2wrap=0.0
                )  # the likelihood's loss has it
                found.append(-mean * (of_text != IGNORED).sum())
        return torch.stack(found)

    def learn(self, sample: Sample, parts: float, passes: int = 0, part: Part | None = None) -> Tensor:
        """A sample's share of the loss of a step, and of :data:`FIGURES`; its gradients are where `passed` put them.

        `parts`: what its mean loss is divided by. `passes` and `part` are those of
        :meth:`heron.train.passes.WholePasses.learn`; pairs have no use for them.

        Returns:
            (3,) fp32, on the device.
        """
        assert self.references is not None
        assert sample[4] is not None
        logprobs = self.log_likelihoods(sample)
        reference = self._means.onto(self.references.train[sample[4][: len(logprobs)]])
        assert reference is not None
        losses, margins = losses_and_margins(logprobs, reference, self._beta)
        loss = losses.mean() / parts
        loss.backward()
        self._means.passed()
        margins = margins.detach()
        return torch.stack((loss.detach(), (margins > 0).float().mean() / parts, margins.mean() / parts))


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
    likelihoods: Callable[[], Callable[[Sample], Tensor]],
    ranks: Ranks,
) -> References:
    """Those of a run: computed, where it has none yet, and kept in its folder. All processes call this together.

    Args:
        base: fingerprint of the weights that it starts from; None: not known, which it may be of one that goes on.
        packs: for training and for validation.
        resume_from: the checkpoint that it goes on from, in the folder in which they are kept.
        likelihoods: gives, where references are computed: a sample -> the log-probability of each of its texts under
            what the run starts from. All processes call it together.
        ranks: the processes, among which samples are dealt.

    Raises:
        CheckpointError: the run goes on, and its references are missing, damaged, or of something else.
    """
    key = _Key(base, corpus.fingerprint, config.dtype, config.weights)
    kept = Path(config.out) / FILE
    read = kept if resume_from is None else resume_from.parents[1] / FILE
    found = ranks.first(lambda: _read(read, key))
    if found is None and resume_from is not None:
        raise CheckpointError(
            f"{read}: is missing, damaged or of another base, data or dtype, and only the weights that the run started "
            "from can make it anew; give them as they were, or name another --out"
        )
    if found is None:
        of_train, of_val = packs
        of_sample = likelihoods()
        n_val = 0 if corpus.val_samples is None else len(corpus.val_samples)
        found = References(
            _of(of_train, len(corpus.samples), config.micro_bsz, of_sample, ranks),
            _of(of_val, n_val, config.micro_bsz, of_sample, ranks),
        )
        ranks.add_(found)
    ranks.first(lambda: None if resume_from is not None and kept.exists() else _write(kept, key, found))
    return found


def _write(kept: Path, key: _Key, found: References) -> None:
    content = {**dataclasses.asdict(key), **{name: part.tolist() for name, part in found._asdict().items()}}
    files.write_text(kept, json.dumps(content))


def score(pairs: Pairs, packs: Packs, config: TrainConfig, share: tuple[int, int]) -> list[float]:
    """Sums over a share of the validation pairs: losses, margins above 0, margins, and the number of pairs.

    `share`: i, n: every n-th batch from number i on.
    """
    assert config.finetune is not None
    assert pairs.references is not None
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in islice(packs.each_once(config.micro_bsz), share[0], None, share[1]):
        with torch.no_grad():
            logprobs = pairs.log_likelihoods(batch).double().cpu()
        assert batch[4] is not None
        reference = pairs.references.val[batch[4][: len(logprobs)]]
        losses, margins = losses_and_margins(logprobs, reference, config.finetune.dpo_beta)
        sums += torch.stack((losses.sum(), (margins > 0).sum(), margins.sum(), torch.tensor(len(losses)))).double()
    return sums.tolist()


def _of(packs: Packs | None, n: int, count: int, likelihoods: Callable[[Sample], Tensor], ranks: Ranks) -> Tensor:
    """The log-probabilities of the texts that this process scores; 0 of those that others do."""
    found = torch.zeros(n, dtype=torch.float64)
    for batch in () if packs is None else islice(packs.each_once(count), ranks.rank, None, ranks.count):
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
