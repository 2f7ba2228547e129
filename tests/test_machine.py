"""What is decided about a machine, on machines that are made up; and what `doctor` and `info` say."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import heron
from heron import machine
from heron.commands import doctor, info
from heron.config import PRESETS
from heron.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes PyTorch see GPUs of the given compute capability."""

    def pretend(capability, count=2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Made-up GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return pretend


def test_a_device_has_the_name_that_its_tensors_give(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    names = {"cpu": "cpu", "cuda": "cuda:1", "cuda:0": "cuda:0"}
    assert {name: str(machine.numbered(name)) for name in names} == names


@pytest.mark.parametrize(
    ("flags", "dtype"), [({"amx_bf16"}, "bf16"), ({"avx2", "avx512_bf16"}, "fp32"), (set(), "fp32")]
)
def test_precision_follows_the_cpu_flags(monkeypatch, flags, dtype):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    choice = machine.choose_dtype("auto", CPU)
    assert choice.value == dtype
    assert "AMX" in choice.reason


@pytest.mark.parametrize(
    ("wanted", "flags", "slow"),
    [("fp32", set(), False), ("bf16", {"amx_bf16"}, False), ("bf16", {"avx512_bf16"}, False), ("bf16", {"avx2"}, True)],
)
def test_precision_as_asked_with_a_warning_where_it_is_slow(monkeypatch, wanted, flags, slow):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    choice = machine.choose_dtype(wanted, CPU)
    assert choice.value == wanted
    assert choice.reason.startswith("as set")
    assert ("no bf16 units" in choice.reason) == slow


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_precision_follows_the_gpu(gpu, capability, dtype):
    gpu(capability)
    choice = machine.choose_dtype("auto", torch.device("cuda"))
    assert choice.value == dtype
    assert "tensor cores" in choice.reason


def test_devices(gpu):
    gpu((9, 0))
    assert machine.choose_device("auto") == ("cuda", "found Made-up GPU")
    assert [machine.choose_device(name).value for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    with pytest.raises(ConfigError, match="cuda:2 is not there; PyTorch sees 2"):
        machine.choose_device("cuda:2")


def test_devices_without_a_gpu(gpu):
    gpu(None, count=0)
    assert machine.choose_device("auto").value == "cpu"
    with pytest.raises(ConfigError, match="cuda is not there; PyTorch sees 0"):
        machine.choose_device("cuda")


@pytest.mark.parametrize("wanted", ["", "gpu", "tpu:0", "meta", "mps", "cuda:x", "cuda:-1"])
def test_a_device_of_another_kind_is_refused(wanted):
    with pytest.raises(ConfigError, match="device: wanted auto, cpu, cuda or cuda:N, got " + repr(wanted)):
        machine.choose_device(wanted)


def test_cpu_flags_come_from_the_system_or_are_not_known(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "Path", lambda _: path)
    assert machine.cpu_flags() == frozenset()
    path.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t: none\n\nflags\t\t: fpu avx2\n")
    assert machine.cpu_flags() == {"fpu", "avx2", "amx_bf16"}


@pytest.mark.parametrize(("dtype", "product"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_context(dtype, product):
    with machine.autocast(dtype, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product


# -- doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_path(monkeypatch):
    """A function: where `doctor` finds every program. No one else does: builds that fail are remembered."""

    def pretend(place):
        monkeypatch.setattr(doctor, "shutil", SimpleNamespace(which=lambda _: place))

    return pretend


def test_doctor_says_what_is_here_and_what_would_be_used(monkeypatch, on_the_path):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2", "amx_bf16"}))
    on_the_path(None)
    report = doctor.report()
    values = dict(re.findall(r"^  (\S.{0,15}?) {2,}(\S.*)$", report, re.MULTILINE))
    assert values["heron"] == heron.__version__
    assert values["torch"].startswith(torch.__version__)
    assert values["cpu flags"] == "avx2, amx_bf16"
    assert values["precision"] == "bf16: this CPU has bf16 matrix units (AMX)"
    assert values["wkv7"].startswith("chunked: ")
    assert values["wkv7, T=1"].startswith("reference: ")
    assert values["nvcc"].startswith("not on the path")
    assert {"numpy", "safetensors", "matplotlib", "wandb"} < values.keys()


@pytest.mark.parametrize("flags", [set(), {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}])
def test_doctor_fits_80_columns(monkeypatch, on_the_path, flags):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor.sys, "executable", "/usr/bin/python3")
    on_the_path("/usr/local/cuda/bin/nvcc")
    assert max(map(len, doctor.report().splitlines())) <= 80


def test_doctor_names_what_is_missing_and_how_to_install_it(monkeypatch):
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in ("rich", "wandb") else known(package))
    monkeypatch.setattr(doctor.sys, "executable", "/somewhere/python3")
    report = doctor.report()
    assert "MISSING: python3 -m pip install 'rich'" in report
    assert "not installed: python3 -m pip install 'wandb'" in report
    assert "MISSING: python3 -m pip install 'numpy'" not in report


# -- info -----------------------------------------------------------------------------------------------------------


def test_info_on_presets_fits_80_columns():
    table = info.presets().splitlines()
    assert len(table) == 1 + len(PRESETS)
    assert max(map(len, table)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert rows["rwkv8-tiny"] == ["v8", "4", "128", "256", "1,157,120"]
    assert rows["rwkv7-0.1b"][:4] == ["v7", "12", "768", "65536"]


@pytest.mark.parametrize("name", ["rwkv9", "missing.pth"])
def test_info_on_nothing_names_the_presets(name):
    with pytest.raises(CheckpointError, match=f"{name}: no such file, folder or preset; presets: rwkv7-0.1b"):
        info.describe(name, params=False)
