"""Hostile weights: none runs code, is loaded as something it is not, or takes much time or memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import re
import resource
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import heron
from heron.errors import CheckpointError
from tests.torture.result import Result

SECONDS = 2.0
MEGABYTES = 200
KINDS = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage"}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.complex64: "C64"}

Tensors = dict[str, Tensor]


# -- building files by hand -----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode("utf-8", errors="surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def together(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


NO_HOOKS = named("collections", "OrderedDict") + b")R"


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    return together(text("storage"), named("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    held: bytes, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, hooks: bytes = NO_HOOKS
) -> bytes:
    sizes, strides = (together(*map(number, values)) for values in (shape, stride))
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + together(held, number(offset), sizes, strides, b"\x89", hooks)
        + b"R"
    )


def pickled(items: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in items.items()) + b"u."


def entries(tensors: Tensors) -> dict[str, bytes]:
    """The pickled form of each tensor, in a storage of its own: 0, 1, 2, ..."""
    return {
        name: tensor(storage(str(i), value.numel(), KINDS[value.dtype]), tuple(value.shape), value.stride())
        for i, (name, value) in enumerate(tensors.items())
    }


def raw(value: Tensor) -> bytes:
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def archived(content: bytes, data: list[bytes], more: dict[str, bytes] | None = None, packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # about names that come twice
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/byteorder", b"little")
        for i, piece in enumerate(data):
            archive.writestr(f"x/data/{i}", piece)
        archive.writestr("x/version", b"3\n")
        for name, piece in (more or {}).items():
            archive.writestr(name, piece)
    return buffer.getvalue()


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safe(header: dict | bytes, data: bytes) -> bytes:
    raw_header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw_header)) + raw_header + data


def header_of(tensors: Tensors) -> tuple[dict, bytes]:
    header, data = {}, b""
    for name, value in tensors.items():
        piece = raw(value)
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += piece
    return header, data


class Payload:
    """Unpickles to a call."""

    def __init__(self, *call: object):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


# -- attacks: each gives the file's content and its suffix ------------------------------------------------------------


@dataclasses.dataclass
class Ground:
    """What attacks are built from: a good model's tensors, the good file, and what running code would leave behind."""

    rng: random.Random
    tensors: Tensors
    good: bytes
    canary: Path

    def command(self) -> str:
        return f"touch {self.canary}"

    def name(self) -> str:
        return self.rng.choice(list(self.tensors))

    def with_entry(self, value: bytes | Callable[[int, Tensor], bytes], more: dict[str, bytes] | None = None) -> bytes:
        """The good archive with one tensor described in another way."""
        items, name = entries(self.tensors), self.name()
        place = list(items).index(name)
        items[name] = value if isinstance(value, bytes) else value(place, self.tensors[name])
        return archived(pickled(items | (more or {})), [raw(value) for value in self.tensors.values()])


def code(ground: Ground) -> bytes:
    """A pickle that runs a command, in each place where one can stand."""
    touch = ground.command()
    program = f"__import__('os').system({touch!r})"
    call = ground.rng.choice(
        [
            Payload(os.system, touch),
            Payload(eval, program),
            Payload(exec, program),
            Payload(open, str(ground.canary), "w"),
        ]
    )
    by_hand = [
        b"(S" + repr(touch).encode() + b"\nios\nsystem\n.",  # INST
        b"(" + named("os", "system") + b"S" + repr(touch).encode() + b"\no.",  # OBJ
        named("os", "system") + together(text(touch)) + b"R.",
        b"\x80\x04" + b"\x8c\x02os\x8c\x06system\x93" + together(text(touch)) + b"R.",  # STACK_GLOBAL
        b"\x80\x02}(" + text("emb.weight") + named("os", "system") + together(text(touch)) + b"Ru.",
    ]
    where = ground.rng.randrange(6)
    if where == 0:
        return pickle.dumps(call, protocol=ground.rng.randrange(5))
    if where == 1:
        return saved(call)
    if where == 2:
        return saved({**ground.tensors, "x": call})
    if where == 3:
        return saved({**ground.tensors, "x": call}, _use_new_zipfile_serialization=False)
    if where == 4:
        return ground.rng.choice(by_hand)
    return archived(ground.rng.choice(by_hand), [raw(value) for value in ground.tensors.values()])


def hooks_with_code(ground: Ground) -> bytes:
    evil = named("os", "system") + together(text(ground.command())) + b"R"
    return ground.with_entry(lambda i, t: tensor(storage(str(i), t.numel()), tuple(t.shape), t.stride(), hooks=evil))


def compressed(ground: Ground) -> bytes:
    items = entries(ground.tensors) | {"bomb": tensor(storage(str(len(ground.tensors)), 1 << 22), (1 << 22,), (1,))}
    return archived(pickled(items), [*map(raw, ground.tensors.values()), bytes(1 << 24)], packed=True)


def repeated_elements(ground: Ground) -> bytes:
    size = ground.rng.choice((1000, 10**6, 2**31, 2**62, 2**63))
    stride = ground.rng.choice(((0, 0), (1, 0), (0, 1), (1, 1)))
    return ground.with_entry(lambda i, t: tensor(storage(str(i), t.numel()), (size, size), stride))


def out_of_bounds(ground: Ground) -> bytes:
    def change(i: int, t: Tensor) -> bytes:
        offset, numel, shape = ground.rng.choice(
            [(1, t.numel(), tuple(t.shape)), (-1, t.numel(), tuple(t.shape)), (2**40, t.numel(), tuple(t.shape)),
             (0, t.numel() + 1, tuple(t.shape)), (0, t.numel() - 1, tuple(t.shape)), (0, 2**40, tuple(t.shape)),
             (0, t.numel(), (t.numel() + 1,)), (0, t.numel(), (-1,)), (0, t.numel(), (2**63, 2**63))]
        )  # fmt: skip
        stride = t.stride() if shape == tuple(t.shape) else (1,) * len(shape)
        return tensor(storage(str(i), numel), shape, stride, offset)

    return ground.with_entry(change)


def odd_strides(ground: Ground) -> bytes:
    change = ground.rng.choice(((-1,), (2,), (1, 1), (), (2**62,)))
    return ground.with_entry(lambda i, t: tensor(storage(str(i), t.numel()), (t.numel(),), change))


def shared_memory(ground: Ground) -> bytes:
    count = ground.rng.choice((1, 50, 2000))
    numel = next(iter(ground.tensors.values())).numel()
    return ground.with_entry(
        tensor(storage("0", numel), (numel,), (1,)),
        {f"copy.{i}": tensor(storage("0", numel), (numel,), (1,)) for i in range(count)},
    )


def other_type(ground: Ground) -> bytes:
    kind = ground.rng.choice(("LongStorage", "ByteStorage", "ComplexFloatStorage", "QInt8Storage", "UntypedStorage"))
    return ground.with_entry(lambda i, t: tensor(storage(str(i), t.numel(), kind), tuple(t.shape), t.stride()))


def other_function(ground: Ground) -> bytes:
    module, name = ground.rng.choice(
        [("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_qtensor"), ("torch", "load"),
         ("torch._tensor", "_rebuild_from_type_v2"), ("builtins", "getattr"), ("torch.hub", "load"), ("os", "system")]
    )  # fmt: skip
    return ground.with_entry(named(module, name) + together(text(ground.command()), text("x")) + b"R")


def many_names(ground: Ground) -> bytes:
    empty = tensor(storage("0", 0), (0,), (1,))
    count = ground.rng.choice((5_001, 10_000))
    return archived(pickled({f"k{i}": empty for i in range(count)}), [b""])


def odd_names(ground: Ground) -> bytes:
    value = tensor(storage("0", 1), (1,), (1,))
    name = ground.rng.choice(
        [
            "a" * 300,
            "a" * 100_000,
            "\x1b[2J",
            "a\nb",
            "a\0b",
            "\ud800",
            "",
            "../../x",
            "blocks.99999999999.att.w1",
            "\u202e",
        ]
    )
    return (
        ground.with_entry(value, {name: value})
        if ground.rng.random() < 0.5
        else archived(pickled({name: value}), [bytes(4)])
    )


def name_twice(ground: Ground) -> bytes:
    items = entries(ground.tensors)
    body = b"".join(text(name) + value for name, value in items.items())
    again = text("emb.weight") + tensor(storage("1", ground.tensors["blocks.0.ln1.weight"].numel()), (1,), (1,))
    data = [raw(value) for value in ground.tensors.values()]
    if ground.rng.random() < 0.5:
        return archived(b"\x80\x02}(" + body + again + b"u.", data)
    prefixed = pickled(items | {"_forward_module.emb.weight": tensor(storage(str(len(data)), 1), (1,), (1,))})
    return archived(prefixed, [*data, bytes(4)])


def damaged_pickle(ground: Ground) -> bytes:
    deep = b"(" * 50_000 + b"t" * 50_000
    doubled = b")" + b"2\x86" * 40  # pairs of pairs: 2 ** 40 leaves
    content = ground.rng.choice(
        [b"\x80\x02" + deep + b".", b"\x80\x02}" + doubled + b"K\1s.", b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x02",
         b".", b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x02]q\0h\0a.", b"\x80\x02}q\0h\0h\0s.", b"\x80\x02h\7.",
         b"\x80\x02t.", b"\x80\x02(u.", b"\x80\x02I" + b"9" * 5000 + b"\n.", b"\x80\x02K\1Q.",
         b"\x80\x02" + b"K\1" * 500_000 + b".", b"\x80\x02" + text("a" * (1 << 20)) * 20 + b".", b"\x80\x09}.",
         ground.rng.randbytes(200), b"\x80\x02}" + b"2" * 9]
    )  # fmt: skip
    return archived(content, [bytes(4)])


def odd_members(ground: Ground) -> bytes:
    name = ground.rng.choice(
        ["../evil", "/etc/evil", "x/../../evil", "x\\evil", "y/data.pkl", "x/constants.pkl", "x/code/__torch__.py",
         "x/data.pkl", "x/data/0", "x/", "x/data/../0", "evil", "x/byteorder"]
    )  # fmt: skip
    items = pickled(entries(ground.tensors))
    return archived(items, [raw(value) for value in ground.tensors.values()], {name: b"big"})


def many_members(ground: Ground) -> bytes:
    return archived(pickled(entries(ground.tensors)), [b""] * ground.rng.choice((5_051, 10_000)))


def patched_directory(ground: Ground) -> bytes:
    """One field of the directory, of a header or of the end says something else."""
    data = bytearray(ground.good)
    signature, width, fields = ground.rng.choice(
        [(b"PK\1\2", 4, (20, 24, 42)), (b"PK\1\2", 2, (8, 10, 28, 30, 32)), (b"PK\3\4", 2, (6, 8, 26, 28)),
         (b"PK\5\6", 2, (4, 6, 8, 10, 20)), (b"PK\5\6", 4, (12, 16)),
         (b"PK\6\6", 4, (24, 32, 40, 48)), (b"PK\6\7", 4, (8,))]
    )  # fmt: skip
    places = [i for i in range(len(data)) if data.startswith(signature, i)]
    at = ground.rng.choice(places) + ground.rng.choice(fields)
    before = int.from_bytes(data[at : at + width], "little")
    value = ground.rng.choice((0, 1, before + 1, before - 1, before * 2, before ^ 8, 2 ** (8 * width) - 1)) % 2 ** (
        8 * width
    )
    data[at : at + width] = value.to_bytes(width, "little")
    return bytes(data)


def flipped(ground: Ground) -> bytes:
    data = bytearray(ground.good)
    data[ground.rng.randrange(len(data))] ^= 1 << ground.rng.randrange(8)
    return bytes(data)


def cut_or_extended(ground: Ground) -> bytes:
    size = ground.rng.randrange(1, len(ground.good))
    junk = ground.rng.randbytes(ground.rng.randint(1, 100))
    return ground.rng.choice((ground.good[:size], ground.good + junk, junk + ground.good, ground.good * 2))


def old_form(ground: Ground) -> bytes:
    """The form before PyTorch 1.6, with something changed in front of the numbers, or a length that lies."""
    data = bytearray(saved(ground.tensors, _use_new_zipfile_serialization=False))
    numbers = sum(value.nbytes + 8 for value in ground.tensors.values())
    begin = len(data) - numbers
    what = ground.rng.randrange(3)
    if what == 0:
        data[begin : begin + 8] = struct.pack("<q", ground.rng.choice((-1, 0, 2**40, 2**62)))
    elif what == 1:
        del data[ground.rng.randrange(begin, len(data)) :]
    else:
        data += b"more"
    return bytes(data)


def wrong_model(ground: Ground) -> tuple[bytes, str]:
    """A good file of tensors that are not this model's, in either format."""
    tensors, name = dict(ground.tensors), ground.name()
    change = ground.rng.randrange(6)
    if change == 0:
        tensors[name] = tensors[name].to(torch.int64)
    elif change == 1:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = ground.rng.choice((float("nan"), float("inf"), float("-inf")))
    elif change == 2:
        tensors[name] = tensors[name].reshape(-1)[:-1].clone()
    elif change == 3:
        tensors[f"{name}.more"] = torch.zeros(1)
    elif change == 4:
        tensors[name] = tensors[name].to(torch.complex64)
    else:
        del tensors["head.weight"]
    if ground.rng.random() < 0.5:
        return saved(tensors), ".pth"
    return safe(*header_of(tensors)), ".safetensors"


def odd_safetensors(ground: Ground) -> bytes:
    header, data = header_of(ground.tensors)
    name = ground.name()
    entry = header[name]
    begin, end = entry["data_offsets"]
    text_header = json.dumps(header).encode()
    change = ground.rng.choice(
        [{"shape": [2**40, 2**40]}, {"shape": [-1]}, {"shape": [2**63]}, {"shape": ["1"]}, {"shape": 1},
         {"shape": [1.0]}, {"shape": [True]}, {"dtype": "F32 "}, {"dtype": 7}, {"dtype": "U64"}, {"dtype": None},
         {"data_offsets": [begin]},
         {"data_offsets": [end, begin]}, {"data_offsets": [begin + 4, end + 4]}, {"data_offsets": [0, end - begin]},
         {"data_offsets": [-4, end - begin - 4]}, {"data_offsets": [2**62, 2**62 + end - begin]}, {"more": 1}]
    )  # fmt: skip
    if header | {name: entry | change} == header:
        change = {"more": 1}
    return ground.rng.choice(
        [
            *[lambda: safe(header | {name: entry | change}, data)] * 3,
            lambda: safe(header | {"alias": entry}, data),
            lambda: safe(header, data + b"more"),
            lambda: safe(header, data[:-1]),
            lambda: safe(header | {"__metadata__": {"a": 1}}, data),
            lambda: safe(header | {"\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data),
            lambda: safe(text_header[:-1] + b', "emb.weight": ' + json.dumps(entry).encode() + b"}", data),
            lambda: safe(text_header[:-1] + b', "x": ' + b"[" * 100_000 + b"}", data),
            lambda: safe(text_header[:-1] + b', "x": NaN}', data),
            lambda: safe(b"[]", data),
            lambda: safe(b"{" + b"x" * 100, data),
            lambda: safe(b"{}" + b" " * (1 << 23), data),
            lambda: struct.pack("<Q", ground.rng.choice((0, 1, 100 << 20, 2**63, 2**64 - 1))) + text_header + data,
            lambda: safe({f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}, b""),
        ]
    )()


def flipped_header(ground: Ground) -> bytes:
    """safetensors have no checksum: a flip in the numbers cannot be told; one before them must be."""
    header, data = header_of(ground.tensors)
    whole = bytearray(safe(header, data))
    whole[ground.rng.randrange(len(whole) - len(data))] ^= 1 << ground.rng.randrange(8)
    return bytes(whole)


PTH: list[Callable[[Ground], bytes]] = [
    code, code, hooks_with_code, compressed, repeated_elements, out_of_bounds, odd_strides, shared_memory, other_type,
    other_function, many_names, odd_names, name_twice, damaged_pickle, odd_members, many_members, patched_directory,
    flipped, flipped, cut_or_extended, old_form,
]  # fmt: skip
SAFETENSORS: list[Callable[[Ground], bytes]] = [odd_safetensors, odd_safetensors, flipped_header]
MAY_BE_HARMLESS = {"patched_directory", "flipped", "flipped_header"}  # a date in the archive says nothing


def sound_files(tensors: Tensors) -> list[tuple[bytes, str]]:
    """What torch.save and safetensors really write, all of it to be loaded."""
    flat = torch.cat([value.reshape(-1) for value in tensors.values()])  # one buffer for all, as DeepSpeed keeps them
    pieces = flat.split([value.numel() for value in tensors.values()])
    views = {name: piece.view(t.shape) for (name, t), piece in zip(tensors.items(), pieces, strict=True)}
    turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    parameters = {name: torch.nn.Parameter(t) for name, t in tensors.items()}
    return [
        (saved(tensors), ".pth"),
        (saved(tensors, _use_new_zipfile_serialization=False), ".pth"),
        (saved(views), ".pth"),
        (saved(turned), ".pth"),
        (saved(parameters), ".pth"),
        (archived(pickled(entries(tensors)), [raw(value) for value in tensors.values()]), ".pth"),
        (safe(*header_of(tensors)), ".safetensors"),
    ]


# -- trials -----------------------------------------------------------------------------------------------------------


def small_model() -> Tensors:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(n_layer=1, n_embd=32, vocab_size=11, head_size=16, ffn_dim=40)
        ranks = dict(decay_rank=5, iclr_rank=6, value_rank=7, gate_rank=9)
        model = heron.RWKV(heron.ModelConfig(variant="v8", **sizes, **ranks))
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def same(got: Tensors, wanted: Tensors) -> bool:
    return got.keys() == wanted.keys() and all(
        got[name].dtype == value.dtype and torch.equal(got[name], value) for name, value in wanted.items()
    )


@dataclasses.dataclass
class Tally:
    """What the trials of one process showed."""

    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    slowest_kind: str = ""
    grown_mb: int = 0
    caught: int = 0
    control_trials: int = 0


def attempt(ground: Ground, folder: Path, kind: str, content: bytes, suffix: str, tally: Tally) -> None:
    """Load one file and note everything that must not happen."""
    path = folder / f"hostile{suffix}"
    path.write_bytes(content)
    before, begin = fresh_peak_mb(), time.process_time()
    outcome = "refused"
    try:
        got = dict(heron.load(path).state_dict())
        outcome = "loaded right" if same(got, ground.tensors) else "loaded wrong"
    except CheckpointError as error:
        if str(path) not in str(error) or not str(error).isprintable():
            tally.failures.append(f"{kind}: the message does not name the file, or is not printable: {error!r}")
    except Exception as error:  # the promise is about one type
        outcome = type(error).__name__
        tally.failures.append(f"{kind}: {outcome}: {str(error)[:200]}")
    seconds, grown = time.process_time() - begin, peak_mb() - before
    if seconds > tally.slowest:
        tally.slowest, tally.slowest_kind = seconds, kind
    tally.grown_mb = max(tally.grown_mb, grown)
    tally.outcomes[outcome] = tally.outcomes.get(outcome, 0) + 1
    allowed = {"sound": {"loaded right"}}.get(
        kind, {"refused", "loaded right"} if kind in MAY_BE_HARMLESS else {"refused"}
    )
    if outcome not in allowed:
        tally.failures.append(f"{kind}: {outcome}")
    if ground.canary.exists():
        tally.failures.append(f"{kind}: it ran code")
        ground.canary.unlink()
    if seconds > SECONDS:
        tally.failures.append(f"{kind}: {seconds:.1f} CPU seconds")
    if grown > MEGABYTES + 1.2 * len(content) / 1e6:
        tally.failures.append(f"{kind}: {grown} MB more for a file of {len(content) / 1e6:.1f} MB")


def peak_mb() -> int:
    """The most memory that this process has held since its start, or since :func:`fresh_peak_mb`."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fresh_peak_mb() -> int:
    """What this process holds now, from where :func:`peak_mb` counts anew (where the kernel can)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def plain_reader_fails(ground: Ground, folder: Path, attack: Callable[[Ground], bytes]) -> bool:
    """Whether torch.load as most scripts call it runs the code of a file, or takes the file as it is."""
    path = folder / "control.pth"
    path.write_bytes(attack(ground))
    try:
        got = torch.load(path, map_location="cpu", weights_only=attack is not code)
    except Exception:  # whatever else it meets, code has run by then
        got = None
    ran = ground.canary.exists()
    ground.canary.unlink(missing_ok=True)
    return ran or (attack is not code and isinstance(got, dict))


def in_child(trials: int, seed: int, folder: Path) -> Tally:
    """All trials of a run, in this process."""
    rng = random.Random(seed)
    tensors = small_model()
    ground = Ground(rng, tensors, saved(tensors), folder / "canary")
    sound = sound_files(tensors)
    tally = Tally()
    attempt(ground, folder, "sound", *sound[0], Tally())  # what is loaded once is not counted as the file's memory
    for content, suffix in sound:
        attempt(ground, folder, "sound", content, suffix, tally)
    for trial in range(trials):
        pick = trial % (len(PTH) + len(SAFETENSORS) + 2)
        if pick < len(PTH):
            attempt(ground, folder, PTH[pick].__name__, PTH[pick](ground), ".pth", tally)
        elif pick < len(PTH) + len(SAFETENSORS):
            attack = SAFETENSORS[pick - len(PTH)]
            attempt(ground, folder, attack.__name__, attack(ground), ".safetensors", tally)
        else:
            attempt(ground, folder, "wrong_model", *wrong_model(ground), tally)
    for attack in (code, compressed, shared_memory, many_names):
        for _ in range(3 if trials >= 1000 else 1):
            tally.control_trials += 1
            tally.caught += plain_reader_fails(ground, folder, attack)
    return tally


def run(trials: int, seed: int) -> Result:
    """`trials` hostile files, beside every sound form of a file, in a process of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        child = os.fork()
        if child == 0:
            code_of_exit = 1
            try:
                torch.set_num_threads(1)  # the threads of the parent are not there after a fork
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tally = in_child(trials, seed, folder)
                (folder / "tally.json").write_text(json.dumps(dataclasses.asdict(tally)))
                code_of_exit = 0
            except Exception:  # os._exit would not print it
                traceback.print_exc()
            finally:
                os._exit(code_of_exit)
        _, status = os.waitpid(child, 0)
        if not (folder / "tally.json").exists():
            tally = Tally(failures=[f"the process died: {os.waitstatus_to_exitcode(status)}"])
        else:
            tally = Tally(**json.loads((folder / "tally.json").read_text()))
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(tally.outcomes.items()))
    return Result(
        promise="hostile weights: no code runs, nothing wrong is loaded, time and memory stay small",
        trials=trials,
        asked=2000,
        failures=tally.failures,
        control="torch.load: runs the code (weights_only=False), takes compressed, aliased and endless files",
        caught=tally.caught,
        control_trials=tally.control_trials,
        notes=f"{outcomes}; slowest {tally.slowest:.2f} CPU s ({tally.slowest_kind}), at most {tally.grown_mb} MB more",
    )
