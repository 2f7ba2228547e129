"""The upstream format: a `.pth` with a flat dict of named tensors.

Read too is what trainers put around one: `{"state_dict": ...}` and its like, and the prefixes of wrappers.
"""

from __future__ import annotations

import concurrent.futures
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from heron.checkpoint.formats import LONGEST_NAME, MOST_TENSORS, archive, pickle_plan, wrappers
from heron.errors import CheckpointError

_AROUND = ("state_dict", "model_state_dict", "model", "module", "weights")  # under which trainers keep the weights
_SMALL_MEMBERS = ("version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
_CHECKSUM_THREADS = 4
_OLD_MAGIC, _OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization, files of PyTorch before 1.6

_Checksums = dict[str, int]  # CRC-32 by storage key


def read(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .pth, each in memory of its own: the file may change while they live.

    Everything the file says is checked against its own bytes first: its layout, the opcodes and names in its pickle,
    every shape and stride. Then PyTorch reads it with `weights_only=True`, and the result is compared with what was
    announced and with the checksums in the file.

    Raises:
        CheckpointError: the file is damaged, holds anything but named tensors, or tensors that share memory.
    """
    try:
        with open(path, "rb") as file:
            content, checksums = _announced(file)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable .pth of weights: {error}") from None
    key, plan = _checked(path, content)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a foreign file can fail anywhere in the reader; every failure means the same
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable .pth of weights: {first_line}") from error
    loaded = loaded if key is None or not isinstance(loaded, dict) else loaded.get(key)
    _compare(path, plan, loaded, checksums)
    plain = wrappers.unwrapped(loaded)
    return {rest: _of_its_own(loaded[name].detach()) for name, rest in plain.items()}


def put_right(path: Path) -> list[str]:
    """What :func:`read` changes about a readable file, in words."""
    with open(path, "rb") as file:
        content, _ = _announced(file)
    key, plan = _checked(path, content)
    return [*([] if key is None else [f"the weights lie in a dict under {key!r}"]), *wrappers.described(plan)]


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as upstream's tools expect them; OSError when the disk refuses."""
    try:
        with open(path, "wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # PyTorch's writer covers the disk's error with one of its own
            raise error.__context__ from None
        raise


def _announced(file: BinaryIO) -> tuple[Any, _Checksums]:
    """What a file says it holds, each storage as long as its bytes; ValueError when it does not add up."""
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(4)
    file.seek(0)
    if start == b"PK\3\4":
        return _announced_by_archive(file, file_bytes)
    if start[:1] == b"\x80":
        return _announced_by_old_file(file, file_bytes), {}
    raise ValueError(f"it begins with {start!r}, as no file of torch.save does")


def _announced_by_archive(file: BinaryIO, file_bytes: int) -> tuple[Any, _Checksums]:
    members = archive.read(file, file_bytes)
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1:
        raise ValueError(f"wanted members below one folder, got {len(roots)}")
    members = {name.partition("/")[2]: member for name, member in members.items()}
    for name in members:
        if name != "data.pkl" and not name.startswith("data/") and name not in _SMALL_MEMBERS:
            raise ValueError(f"member {name!r} is not part of a dict of tensors (TorchScript programs are not read)")
    if "data.pkl" not in members:
        raise ValueError("member 'data.pkl' is missing")
    if "byteorder" in members and _member(file, members["byteorder"]) != b"little":
        raise ValueError("wanted little-endian numbers")
    checksummed = any(member.crc for member in members.values())  # torch.serialization.set_crc32_options(False)
    if members["data.pkl"].size > pickle_plan.LARGEST_PICKLE:
        raise ValueError(f"its pickle has {members['data.pkl'].size:,} bytes, too many for names and shapes")
    pickled = _member(file, members["data.pkl"])
    if checksummed and zlib.crc32(pickled) != members["data.pkl"].crc:
        raise ValueError("the checksum of its list of tensors is wrong: the file is damaged")
    content, length = pickle_plan.read(pickled)
    if length != len(pickled):
        raise ValueError(f"its pickle of {len(pickled):,} bytes ends at byte {length:,}")

    def size_of(key: str) -> int:
        if f"data/{key}" not in members:
            raise ValueError(f"member 'data/{key[:80]}' is missing")
        return members[f"data/{key}"].size

    _check_storages(content, size_of)
    stored = {name.removeprefix("data/"): member.crc for name, member in members.items() if name.startswith("data/")}
    return content, stored if checksummed else {}


def _announced_by_old_file(file: BinaryIO, file_bytes: int) -> object:
    """The form before PyTorch 1.6: five pickles in a row, then each storage after its length."""
    if _next_pickle(file) != _OLD_MAGIC or _next_pickle(file) != _OLD_PROTOCOL:
        raise ValueError("it is a pickle, but none of torch.save")
    system = _next_pickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("wanted little-endian numbers")
    content, keys = _next_pickle(file), _next_pickle(file)
    storages = {tensor.storage.key: tensor.storage for tensor in _tensors(content)}
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages) or len(keys) != len(storages):
        raise ValueError("the storages it lists are not those of its tensors")
    at = file.tell()
    for key in keys:
        file.seek(at)
        if int.from_bytes(file.read(8), "little") != storages[key].numel:
            raise ValueError(f"storage {key[:80]!r} has another length than its tensors say")
        at += 8 + storages[key].nbytes
    if at != file_bytes:
        raise ValueError(f"wanted {at:,} bytes, got {file_bytes:,}")
    _check_storages(content, lambda key: storages[key].nbytes)
    return content


def _member(file: BinaryIO, member: archive.Member) -> bytes:
    file.seek(member.start)
    return file.read(min(member.size, pickle_plan.LARGEST_PICKLE))


def _next_pickle(file: BinaryIO) -> object:
    begin = file.tell()
    content, length = pickle_plan.read(file.read(pickle_plan.LARGEST_PICKLE))
    file.seek(begin + length)
    return content


def _tensors(content: Any) -> list[pickle_plan.Tensor]:
    return [value for _, value in _entries(content) if isinstance(value, pickle_plan.Tensor)]


def _entries(content: Any) -> list[tuple[Any, Any]]:
    """Names and values of a dict and of the dicts in it."""
    entries: list[tuple[Any, Any]] = []
    for name, value in content.items() if isinstance(content, dict) else ():
        entries += value.items() if isinstance(value, dict) else [(name, value)]
    return entries


def _check_storages(content: Any, size_of: Callable[[str], int]) -> None:
    """Each storage has one type and the bytes it needs; each tensor lies inside, and no two share an element."""
    known: dict[str, pickle_plan.Storage] = {}
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in _entries(content):
        if not isinstance(tensor, pickle_plan.Tensor):
            continue  # refused by _checked, with words of its own
        storage = tensor.storage
        if known.setdefault(storage.key, storage) != storage:
            raise ValueError(f"{name!r}: its storage {storage.key[:80]!r} is of another type or size elsewhere")
        if size_of(storage.key) != storage.nbytes:
            raise ValueError(f"{name!r}: wanted {storage.nbytes:,} bytes of storage, got {size_of(storage.key):,}")
        if not _is_injective(tensor):
            raise ValueError(f"{name!r}: shape {tensor.shape} with strides {tensor.stride} repeats elements")
        begin, end = tensor.span
        if end > storage.numel:
            raise ValueError(f"{name!r}: shape {tensor.shape} needs {end:,} elements of storage, got {storage.numel:,}")
        if begin < end:
            spans.setdefault(storage.key, []).append((begin, end, name))
    for regions in spans.values():
        regions.sort(key=lambda region: region[:2])
        for (_, end, name), (begin, _, other) in zip(regions, regions[1:], strict=False):
            if begin < end:
                raise ValueError(f"{name!r} and {other!r} share memory; save copies (.clone()) of them")


def _is_injective(tensor: pickle_plan.Tensor) -> bool:
    """Whether every index reaches an element of its own."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride, tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return 0 in tensor.shape
            reach += (size - 1) * stride
    return True


def _checked(path: Path, content: Any) -> tuple[str | None, dict[str, pickle_plan.Tensor]]:
    """The announced tensors by name, and the name of the dict around them; CheckpointError for anything else."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: wanted a dict of named tensors, got {type(content).__name__}")
    key = next((key for key in _AROUND if isinstance(content.get(key), dict) and content[key]), None)
    if key is not None:
        besides = [
            name
            for name, value in content.items()
            if name != key and isinstance(value, (pickle_plan.Tensor, dict, list))
        ]
        if besides:
            raise CheckpointError(
                f"{path}: beside the weights under {key!r} it holds {', '.join(map(repr, besides[:5]))[:200]}; save "
                f"the weights alone: torch.save(torch.load(file, weights_only=True)[{key!r}], 'weights.pth')"
            )
        content = content[key]
    if len(content) > MOST_TENSORS:
        raise CheckpointError(f"{path}: wanted at most {MOST_TENSORS:,} tensors, got {len(content):,}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, pickle_plan.Tensor):
            raise CheckpointError(f"{path}: wanted named tensors only, got {name!r}: {type(value).__name__}")
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise CheckpointError(
                f"{path}: wanted names of at most {LONGEST_NAME} printable characters, got {name[:80]!r}"
            )
    try:
        wrappers.unwrapped(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return key, content


def _compare(path: Path, plan: dict[str, pickle_plan.Tensor], loaded: Any, checksums: _Checksums) -> None:
    """CheckpointError unless PyTorch built what was announced, from bytes whose checksums are right."""
    if not isinstance(loaded, dict) or list(loaded) != list(plan):
        raise CheckpointError(f"{path}: PyTorch finds other names in it than its layout says: it is damaged")
    storages: dict[str, tuple[str, Tensor]] = {}
    for name, wanted in plan.items():
        got = loaded[name]
        if (
            not isinstance(got, Tensor)
            or (got.dtype, tuple(got.shape)) != (wanted.storage.dtype, wanted.shape)
            or (got.stride(), got.storage_offset()) != (wanted.stride, wanted.offset)
        ):
            raise CheckpointError(f"{path}: {name!r}: PyTorch reads another tensor than the file announces")
        storages[wanted.storage.key] = name, got
    found = _checksums([tensor for _, tensor in storages.values()])
    for (key, (name, _)), checksum in zip(storages.items(), found, strict=True):
        if checksum != checksums.get(key, checksum):
            raise CheckpointError(f"{path}: {name!r}: its checksum in the file is another one: the file is damaged")


def _checksums(tensors: list[Tensor]) -> list[int]:
    """That of each tensor, by several threads where the system gives any."""
    try:
        with concurrent.futures.ThreadPoolExecutor(_CHECKSUM_THREADS) as threads:
            return list(threads.map(_checksum, tensors))
    except RuntimeError:  # "can't start new thread": a limit on processes (ulimit -u), which one thread satisfies
        return list(map(_checksum, tensors))


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the whole storage of a tensor."""
    return zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data)


def _of_its_own(tensor: Tensor) -> Tensor:
    """A contiguous tensor that is all of its storage."""
    alone = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
