"""What bars are worth that follow others."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import numpy as np

from examples.music.keys import key_of, pitch_classes, share_in
from examples.music.vocabulary import Vocabulary


class Measures(NamedTuple):
    """Of bars that follow others, in per cent."""

    in_key: float  # notes in the key of the bars before
    distance: float  # of their pitch classes to those of the bars before: half the sum of the differences of shares
    repeated: float  # bars that are the same as an earlier one
    in_training: float  # bars that a piece of the training data has


def measured(
    vocabulary: Vocabulary, given: list[list[int]], new: list[list[int]], trained_on: Set[tuple[int, ...]]
) -> Measures:
    """Of the bars `new` behind the bars `given`, by a model that was trained on the bars `trained_on`."""
    before, score = vocabulary.score(given), vocabulary.score(new)
    distance = np.abs(pitch_classes(score) - pitch_classes(before)).sum() / 2
    bars = [tuple(bar) for bar in given + new]
    repeated = [bar in bars[:place] for place, bar in enumerate(bars)][len(given) :]
    in_training = [bar in trained_on for bar in bars[len(given) :]]
    shares = (share_in(key_of(before), score), distance, np.mean(repeated), np.mean(in_training))
    return Measures(*(100 * float(share) for share in shares))
