"""What tests of several operators share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def gpu():
    """Of a test that needs one."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"
