"""What fails in one of many processes before they are joined is told to the others, which would wait for it in vain."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tell the other processes of a run what fails inside."""
    try:
        yield
    except Exception as error:
        if "RANK" in os.environ:
            from heron.dist import Ranks  # which loads PyTorch

            Ranks.of_environment().tell(error)
        raise
