"""The readers of .pth and .safetensors: what upstream writes loads, what no file can mean is refused by name."""

import struct
import zipfile

import pytest
import torch

from heron.checkpoint.formats import archive, pickle_plan, pth, safetensors
from heron.errors import CheckpointError
from tests.torture import foreign

TENSORS = {
    "emb.weight": torch.arange(12.0).view(4, 3),
    "blocks.0.ln1.weight": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
    "ids": torch.arange(4),
    "half": torch.ones(2, 2).half(),
}


def equal(got, wanted):
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value.detach()), name
        assert got[name].is_contiguous()
        assert got[name].untyped_storage().nbytes() == got[name].nbytes
        assert not got[name].requires_grad


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pth"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_every_dtype_comes_back(path, zipped, dtype):
    tensors = {"a": torch.tensor([[0.0, 1.0], [1.0, 3.0]]).to(dtype), "b": torch.zeros(3, dtype=dtype)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    equal(pth.read(path), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_parameters_and_their_metadata(path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    for content in (module.state_dict(), dict(module.named_parameters()), TENSORS):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        equal(pth.read(path), content)


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_buffer_come_apart(path, zipped):
    """DeepSpeed keeps all parameters of a rank in one buffer, and torch.save writes that whole."""
    flat = torch.arange(100.0)
    views = {"a": flat[3:15].view(3, 4), "b": flat[20:26].view(2, 3).t(), "c": flat[90:]}
    torch.save(views, path, _use_new_zipfile_serialization=zipped)
    equal(pth.read(path), views)


def test_a_file_without_checksums_loads_and_one_with_them_is_held_to_them(path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, path)
    finally:
        torch.serialization.set_crc32_options(True)
    equal(pth.read(path), TENSORS)
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as file:
        member = file.getinfo("x/data/0")
    data = bytearray(path.read_bytes())
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, member.header_offset + 26)
    data[member.header_offset + 30 + name_bytes + extra_bytes + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x.pth: 'emb.weight': its checksum in the file is another one"):
        pth.read(path)
    assert not torch.equal(torch.load(path, weights_only=True)["emb.weight"], TENSORS["emb.weight"])


def entry(name="a", shape=(2, 3), stride=(3, 1), offset=0, numel=6, kind="FloatStorage"):
    return {name: foreign.tensor(foreign.storage("0", numel, kind), shape, stride, offset)}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (entry(shape=(4, 3)), r"'a': shape \(4, 3\) needs 12 elements of storage, got 6"),
        (entry(shape=(10**6, 10**6), stride=(0, 0)), r"'a': shape \(1000000, 1000000\) with strides .* repeats"),
        (entry(stride=(1, 1)), "'a': .* repeats elements"),
        (entry(offset=1), "'a': shape .* needs 7 elements of storage, got 6"),
        (entry(offset=-1), "a size, stride or offset of -1"),
        (entry(shape=(2**60,), stride=(1,)), "a size, stride or offset of 1152921504606846976"),
        (entry(shape=(1,) * 9, stride=(1,) * 9), "a tensor with 9 sizes and 9 strides"),
        (entry(numel=7), "'a': wanted 28 bytes of storage, got 24"),
        (entry(kind="DoubleStorage"), "'a': wanted 48 bytes of storage, got 24"),
        (entry(kind="ComplexFloatStorage"), "it names 'torch ComplexFloatStorage'"),
        (entry() | entry("b"), "'a' and 'b' share memory; save copies"),
        (entry(shape=(4,), stride=(1,)) | entry("b", (3,), (1,), 3), "'a' and 'b' share memory"),
        (entry() | entry("b", (1,), (1,), kind="IntStorage"), "'b': its storage '0' is of another type"),
        (entry("x" * 257), "names of at most 256 printable characters"),
        (entry("a\x1b[2J"), r"names of at most 256 printable characters, got 'a\\x1b\[2J'"),
        (entry("_forward_module.a", (1,), (1,)) | entry("a", (1,), (1,), 1), "'_forward_module.a' comes twice"),
        ({"a": foreign.named("os", "system")}, "it names 'os system', which no dict of tensors needs"),
        ({"a": foreign.NO_HOOKS}, "wanted named tensors only, got 'a': dict"),
    ],
)
def test_what_a_pickle_may_not_say(path, items, message):
    path.write_bytes(foreign.archived(foreign.pickled(items), [bytes(24)]))
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        pth.read(path)


def test_neighbours_in_one_storage_are_not_shared_memory(path):
    items = entry(shape=(2,), stride=(2,)) | entry("b", (3,), (1,), 3)
    path.write_bytes(foreign.archived(foreign.pickled(items), [struct.pack("<6f", *range(6))]))
    equal(pth.read(path), {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([3.0, 4.0, 5.0])})


def test_limits(path, monkeypatch):
    torch.save(TENSORS, path)
    for module, name, limit, message in [
        (pth, "MOST_TENSORS", 5, "wanted at most 5 tensors, got 6"),
        (archive, "MOST_MEMBERS", 5, "members in a directory of"),
        (pickle_plan, "MOST_OPCODES", 50, "more than 50 opcodes"),
        (pickle_plan, "LARGEST_PICKLE", 100, "its pickle has .* bytes, too many"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            with pytest.raises(CheckpointError, match=message):
                pth.read(path)
    pth.read(path)


def test_pytorch_must_build_what_was_announced(path, monkeypatch):
    torch.save(TENSORS, path)
    load = torch.load
    for change, message in [
        ({"emb.weight": torch.zeros(3, 4)}, "'emb.weight': PyTorch reads another tensor"),
        ({"emb.weight": torch.arange(12.0).view(4, 3) + 1}, "'emb.weight': its checksum"),
        ({"more": torch.zeros(1)}, "PyTorch finds other names"),
    ]:
        monkeypatch.setattr(torch, "load", lambda *a, change=change, **k: load(*a, **k) | change)
        with pytest.raises(CheckpointError, match=message):
            pth.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [4, 4]}, r"'a': F32 \[4, 4\] needs 64 bytes, got 24"),
        ({"shape": [2**40, 2**40]}, "'a': F32 .* needs"),
        ({"shape": [-2, -3]}, r"'a': shape \[-2, -3\]"),
        ({"shape": [True, 6]}, "'a': shape"),
        ({"dtype": "F8_E4M3"}, "'a': wanted a dtype of F64, .*, got 'F8_E4M3'"),
        ({"data_offsets": [4, 28]}, "'a': wanted it at byte 0 of the data, got 4"),
        ({"more": 0}, "'a': wanted dtype, shape and data_offsets"),
    ],
)
def test_what_a_safetensors_header_may_not_say(tmp_path, change, message):
    sound = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(foreign.safe({"a": sound}, bytes(24)))
    assert safetensors.read(path)["a"].shape == (2, 3)
    path.write_bytes(foreign.safe({"a": sound | change}, bytes(24)))
    with pytest.raises(CheckpointError, match=f"^{path}: not a readable .safetensors file: {message}"):
        safetensors.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (foreign.safe({}, b"x"), "wanted 0 bytes of data, got 1"),
        (foreign.safe(b'{"__metadata__": {"a": 1}}', b""), "'__metadata__': wanted texts by name"),
        (foreign.safe(b'{"a": 1, "a": 1}', b""), "the key 'a' comes twice"),
        (foreign.safe(b"[1]", b""), "does not begin with '{'"),
        (struct.pack("<Q", 100 << 20) + bytes(50), "a header of 104,857,600 bytes in a file of 58"),
    ],
)
def test_headers_of_another_kind(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        safetensors.read(path)


def patched(signature, offset, value):
    """A sound archive in which one number of the first record with `signature` is another."""
    data = bytearray(foreign.archived(foreign.pickled(entry()), [bytes(24)]))
    at = data.index(signature) + offset
    data[at : at + len(value)] = value
    return bytes(data)


SOUND = foreign.archived(foreign.pickled(entry()), [bytes(24)])
TWICE = b"\x80\x02}(" + (foreign.text("a") + entry()["a"]) * 2 + b"u."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (foreign.archived(foreign.pickled(entry()), [bytes(24)], packed=True), "is compressed or encrypted"),
        (patched(b"PK\1\2", 10, b"\x08"), "'x/data.pkl' is compressed"),
        (patched(b"PK\1\2", 8, b"\x01"), "'x/data.pkl' is compressed or encrypted"),
        (patched(b"PK\1\2", 24, b"\xff\xff\xff\x7f"), r"'x/data.pkl' would grow from \d+ to 2,147,483,647 bytes"),
        (patched(b"PK\3\4", 8, b"\x08"), "'x/data.pkl': the header before its data says something else"),
        (patched(b"PK\3\4", 30, b"y"), "'x/data.pkl': the header before its data says something else"),
        (foreign.archived(foreign.pickled(entry()), [bytes(24)], {"x/data/0": b"twice"}), "'x/data/0' comes twice"),
        (foreign.archived(foreign.pickled(entry()), [bytes(24)], {"../x": b"up"}), "a member is named '../x'"),
        (foreign.archived(foreign.pickled(entry()), [bytes(24)], {"y/z": b"other"}), "below one folder, got 2"),
        (foreign.archived(foreign.pickled(entry()), [bytes(24)], {"x/code/a.py": b"1"}), "'code/a.py' is not part"),
        (foreign.archived(TWICE, [bytes(24)]), "the name 'a' comes twice"),
        (SOUND[:-1], "the end of the archive is missing or odd: cut short"),
        (SOUND + b"x", "the end of the archive is missing or odd"),
        (b"PK\3\4" + SOUND, "should end at byte"),
    ],
)
def test_what_an_archive_may_not_be(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: not a readable .pth of weights: .*{message}"):
        pth.read(path)
