"""rosa_last: however the history came about, the last token's match is that of the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heron.errors import KernelError
from heron.ops.rosa import rosa, rosa_last


def streams(n_streams=12, n_tokens=40, alphabet=2):
    """q and k: random, equal, constant, periodic and nearly constant ones."""
    generator = torch.Generator().manual_seed(n_tokens + alphabet)
    q, k = torch.randint(alphabet, (2, n_streams, n_tokens), generator=generator)
    k[1::6] = q[1::6]
    q[2::6] = k[2::6] = alphabet - 1
    q[3::6] = k[3::6] = torch.arange(n_tokens) % 3 % alphabet
    q[4::6], k[4::6] = 0, (torch.rand(k[4::6].shape, generator=generator) < 0.1).long()
    return q, k


@pytest.mark.parametrize("max_match", [None, 1, 3])
@pytest.mark.parametrize("alphabet", [2, 16])
def test_the_last_token_alone_with_and_without_the_lengths_before(alphabet, max_match):
    q, k = streams(alphabet=alphabet)
    src, _ = rosa(q, k, max_match, "reference")
    lengths = None
    for n in range(1, q.shape[1] + 1):
        before = lengths
        last, lengths = rosa_last(q[:, :n], k[:, :n], before, max_match)
        alone, found = rosa_last(q[:, :n], k[:, :n], None, max_match)
        assert torch.equal(last, src[:, n - 1])
        assert torch.equal(alone, last)
        assert torch.equal(found, lengths)
        assert lengths.dtype == torch.int16
    for bad in (lengths, lengths[1:, 1:]):
        with pytest.raises(KernelError, match=r"at least 1 token and lengths of one less, got \(12, 40\) and \(1"):
            rosa_last(q, k, bad)
    with pytest.raises(KernelError, match=r"got \(12, 0\) and None"):
        rosa_last(q[:, :0], k[:, :0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(word=st.lists(st.integers(0, 2), min_size=1, max_size=6), times=st.integers(1, 12), cut=st.integers(0, 5))
def test_repeats_of_a_word(word, times, cut):
    x = torch.tensor([word * times + word[:cut]])
    src, _ = rosa(x, x, impl="dp")
    assert torch.equal(rosa(x, x)[0], src)
    lengths = None
    for n in range(1, x.shape[1] + 1):
        last, lengths = rosa_last(x[:, :n], x[:, :n], lengths)
        assert torch.equal(last, src[:, n - 1])


def test_thue_morse():
    x = torch.tensor([[bin(i).count("1") % 2 for i in range(256)]])
    whole = rosa(x, x, impl="dp")
    assert all(map(torch.equal, rosa(x, x), whole))
    assert torch.equal(rosa_last(x, x)[0], whole[0][:, -1])
