"""Token streams on a device find what those of the host do, bit for bit: on a GPU and, emulated, without one."""

from __future__ import annotations

import pytest
import torch

from heron.errors import KernelError
from heron.ops.rosa import device_stream
from heron.ops.rosa.device_stream import DeviceStream, device_stream_choice
from heron.ops.rosa.memory import CSRC, TREES, TokenStream
from tests.ops.emulated_stream import emulate
from tests.ops.kernels import ARCHITECTURES, check_that_none_spills, needs_nvcc

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RULES = {
    "preset": dict(max_match=64),
    "short": dict(max_match=1),
    "long": dict(max_match=1000),
    "window": dict(max_match=40, window=50),
    "small window": dict(max_match=3, window=1),
    "documents end": dict(max_match=64, end=1),
    "both": dict(max_match=7, window=33, end=0),
}


def drawn(n, kinds, seed=0):
    return torch.randint(kinds, (n,), generator=torch.Generator().manual_seed(seed))


def texts(n):
    """Random, repeated, periodic, constant and large ids."""
    few, part = drawn(n, 3), drawn(n // 4, 300, seed=1)
    yield from (few, part.repeat(4), torch.arange(n) % 7, torch.zeros(n, dtype=torch.int64))
    yield torch.cat((part, few[: n // 4], part)) * 7_000_001


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Where streams are read one by one, the CPU with the kernel's source or a GPU; and the number of tokens for it."""
    if request.param == "cuda":
        return torch.device("cuda"), 2_000
    emulate(monkeypatch)
    return torch.device("cpu"), 240


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n_found", [1, 2, 5])
def test_what_is_found_on_a_device_is_what_the_host_finds(device, name, n_found, monkeypatch):
    device, n = device
    monkeypatch.setattr(device_stream, "_LEAST_ROOM", 16)
    for text in texts(n):
        stream = TokenStream(**RULES[name], impl="cpu")
        stream.read(text[: n // 4])
        there, on_device = DeviceStream(stream, device), text.to(device)
        found = torch.full((n, n_found, 2), -7, device=device)
        read = torch.full((1,), -7, device=device)
        for at in range(n // 4, len(text)):
            if there.is_full:
                there = DeviceStream(stream, device)
            there.read_one_(on_device[at : at + 1], read, found[at])
            stream.read(text[at : at + 1])
        assert int(read) == int(text[-1])
        followers, length, _ = TokenStream(**RULES[name]).recall(text, n_found)
        wanted = torch.stack((followers, length), dim=-1)
        assert torch.equal(found[n // 4 : len(text)].cpu(), wanted[n // 4 :])


def test_an_id_below_zero_is_read_as_zero_and_a_stream_of_nothing_goes_on(device):
    device, _ = device
    there = DeviceStream(TokenStream(impl="cpu"), device)
    read, found = torch.full((1,), -7, device=device), torch.full((3, 2), -7, device=device)
    for token, wanted in ((5, [0, 0]), (-1, [0, 0]), (5, [0, 1]), (0, [5, 2])):
        there.read_one_(torch.tensor([token], device=device), read, found)
        assert int(read) == max(token, 0)
        assert found.tolist() == [wanted, [0, 0], [0, 0]]


def test_the_stream_on_the_host_stays_as_it_is(device):
    device, n = device
    text = drawn(n, 4)
    stream = TokenStream(impl="cpu")
    stream.read(text)
    there, read, found = DeviceStream(stream, device), *torch.zeros(2, 1, dtype=torch.int64, device=device)
    for token in drawn(20, 4, seed=2).to(device).split(1):
        there.read_one_(token, read, found.new_zeros(1, 2))
    again = TokenStream(impl="cpu")
    again.read(torch.cat((text, text)))
    stream.read(text)
    assert all(torch.equal(one, other) for one, other in zip(stream.arrays(), again.arrays(), strict=True))


def test_where_there_is_no_gpu_the_host_reads():
    assert device_stream_choice(torch.device("cpu")).impl == "host"
    with pytest.raises(KernelError, match="it needs tensors on a CUDA device, got cpu"):
        DeviceStream(TokenStream(impl="cpu"), torch.device("cpu"))


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_compiles_without_spilling(tmp_path, arch):
    check_that_none_spills(tmp_path, CSRC / "memory.cu", ["read_one"], arch, [TREES])
