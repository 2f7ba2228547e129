"""heron.load, heron.save and the checkpoints of a run: bit-equal round trips, and one clear error for each damage."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import heron
from heron import files
from heron.checkpoint import run, writer
from heron.errors import CheckpointError

SUFFIXES = ["pth", "safetensors"]
NEVER_USED = [f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")]


def assert_equal(model, tensors):
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, value in tensors.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name


def mixed(model):
    """bf16 weights, tables and decay biases in fp32."""
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("enn.weight", "w0")):
            parameter.data = parameter.data.float()
    return model


DTYPES = {
    "fp32": lambda model: model,
    "bf16": lambda model: model.to(torch.bfloat16),
    "fp16": lambda model: model.to(torch.float16),
    "fp64": lambda model: model.to(torch.float64),
    "mixed": mixed,
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["v7", "v8"])
def test_what_is_saved_is_what_is_loaded(random_model, tmp_path, variant, dtype, suffix):
    model = DTYPES[dtype](random_model(variant=variant))
    heron.save(model, tmp_path / f"x.{suffix}")
    again = heron.load(tmp_path / f"x.{suffix}")
    assert again.config == model.config  # odd ranks, head size and FFN width, all from the tensors
    assert_equal(again, model.state_dict())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert [path.name for path in tmp_path.iterdir()] == [f"x.{suffix}"]


def test_a_pth_is_a_flat_dict_of_tensors(random_model, tmp_path):
    model = random_model()
    heron.save(model, str(tmp_path / "x.pth"))
    tensors = torch.load(tmp_path / "x.pth", weights_only=True)
    assert type(tensors) is dict
    assert {type(value) for value in tensors.values()} == {torch.Tensor}
    assert_equal(model, tensors)


@pytest.mark.parametrize("n_layer", [1, 2])
def test_small_models_keep_their_sizes(random_model, tmp_path, n_layer):
    model = random_model(n_layer=n_layer, n_embd=16, vocab_size=3)
    heron.save(model, tmp_path / "x.pth")
    assert heron.load(tmp_path / "x.pth").config == model.config


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_dtype_converts(random_model, tmp_path, suffix):
    model = random_model()
    heron.save(model, tmp_path / f"x.{suffix}")
    again = heron.load(tmp_path / f"x.{suffix}", dtype=torch.bfloat16)
    assert_equal(again, {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})


def test_names_that_zero3_left_are_cleaned(random_model, tmp_path):
    model = random_model()
    torch.save({f"_forward_module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "x.pth")
    assert_equal(heron.load(tmp_path / "x.pth"), model.state_dict())


def test_layer_0_may_come_without_its_value_mixing(random_model, tmp_path):
    model = random_model().to(torch.bfloat16)
    tensors = {name: value for name, value in model.state_dict().items() if name not in NEVER_USED}
    torch.save(tensors, tmp_path / "x.pth")
    rng = torch.get_rng_state()
    again = heron.load(tmp_path / "x.pth")
    assert torch.equal(torch.get_rng_state(), rng)
    assert_equal(again, {**tensors, **{name: torch.zeros_like(model.state_dict()[name]) for name in NEVER_USED}})
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    heron.save(again, tmp_path / "again.pth")
    assert set(NEVER_USED) <= torch.load(tmp_path / "again.pth").keys()


def test_an_old_style_pth_loads(random_model, tmp_path):
    model = random_model()
    torch.save(model.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_equal(heron.load(tmp_path / "x.pth"), model.state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_model_outlives_its_file(random_model, tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    heron.save(random_model(), path)
    model = heron.load(path)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with open(path, "r+b") as file:  # in place, as `cp` does it
        file.write(bytes(path.stat().st_size))
    assert_equal(model, kept)
    path.unlink()
    assert_equal(model, kept)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no model


def without(name):
    return lambda tensors: tensors.pop(name)


def reshaped(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("emb.weight"), r"tensor emb\.weight is missing"),
        (without("head.weight"), r"head\.weight is missing"),
        (without("blocks.0.ln0.bias"), r"blocks\.0\.ln0\.bias is missing"),
        (without("blocks.2.att.x_g"), r"blocks\.2\.att\.x_g is missing"),
        (without("blocks.1.att.v1"), r"blocks\.1\.att\.v1 is missing"),
        (without("blocks.1.ffn.enn.weight"), r"variant v8.*blocks\.1\.ffn\.enn\.weight is missing"),
        (without("blocks.0.ffn.enn.weight"), r"variant v8.*blocks\.0\.ffn\.enn\.weight is missing"),
        (without("blocks.0.att.w1"), r"blocks\.0\.att\.w1 is missing"),
        (reshaped("blocks.1.att.extra", 1), r"blocks\.1\.att\.extra is not part of a v8 model"),
        (reshaped("blocks.4.att.k_k", 1, 1, 32), r"blocks\.4\.att\.k_k is not part|blocks\.3\..* is missing"),
        (reshaped("blocks.1.att.w2", 4, 32), r"blocks\.1\.att\.w2 must be \(5, 32\), got \(4, 32\)"),
        (reshaped("blocks.0.att.x_r", 32), r"blocks\.0\.att\.x_r must be \(1, 1, 32\), got \(32,\)"),
        (reshaped("blocks.2.ffn.enn.weight", 37, 128), r"enn\.weight must be \(37, 32\), got \(37, 128\)"),
        (reshaped("emb.weight", 37), r"emb\.weight must have 2 dimensions, got \(37,\)"),
        (reshaped("emb.weight", 37, 0), r"n_embd: wanted at least 1, got 0"),
        (reshaped("blocks.0.att.r_k", 4, 8), r"head_size: wanted 16 to 128, got 8"),
        (reshaped("blocks.0.att.r_k", 2, 17), r"n_embd 32 is not a multiple of head_size 17"),
        (reshaped("head.weight", 37, 32, dtype=torch.int32), r"head\.weight must be floating, got torch\.int32"),
        (reshaped("blocks.0.ffn.s_emb.weight", 3), r"variant v7a.*blocks\.0\.ffn\.s_emb_x\.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(random_model, tmp_path, damage, words):
    tensors = dict(random_model().state_dict())
    damage(tensors)
    path = tmp_path / "x.pth"
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=rf"^{path}: .*{words}"):
        heron.load(path)


def test_a_renamed_tensor_is_guessed_and_many_problems_are_counted(random_model, tmp_path):
    tensors = dict(random_model().state_dict())
    tensors["blocks.1.att.recptance.weight"] = tensors.pop("blocks.1.att.receptance.weight")
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"receptance\.weight is missing \(Did you mean '.*recptance"):
        heron.load(tmp_path / "x.pth")
    for name in [name for name in tensors if ".ln1." in name]:
        del tensors[name]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"\(and 3 more\)$"):
        heron.load(tmp_path / "x.pth")


class Bomb:
    """Calls print when it is unpickled by a reader that runs code."""

    def __reduce__(self):
        return print, ("this code must not run",)


def pickled(thing, **options):
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"this is a text\n" * 50, "not a readable .pth"),
        (b"PK\x03\x04 and no archive", "not a readable .pth"),
        (pickled({"emb.weight": torch.zeros(99, 99)})[:9000], "not a readable .pth"),
        (pickle.dumps(Bomb(), protocol=2), "not a readable .pth"),
        (pickled(Bomb()), "not a readable .pth"),
        (pickled([torch.zeros(2)]), "wanted a dict of named tensors, got list"),
        (pickled({"emb.weight": 3}), "wanted named tensors only, got 'emb.weight': int"),
        (pickled({7: torch.zeros(2)}), "wanted named tensors only, got 7: Tensor"),
        (pickled({}), "no RWKV-7 or RWKV-8 weights.*first keys are none"),
        (pickled({"wte.weight": torch.zeros(2)}), "no RWKV-7 or RWKV-8 weights.*first keys are wte.weight"),
    ],
    ids=["empty", "text", "no zip", "cut", "pickle", "pth with code", "list", "int", "number key", "no keys", "gpt"],
)
def test_a_file_that_is_no_pth_of_weights(tmp_path, capsys, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: .*{words}"):
        heron.load(path)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_a_file_that_is_no_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        heron.load(path)


def test_a_truncated_safetensors(random_model, tmp_path):
    path = tmp_path / "x.safetensors"
    heron.save(random_model(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"^{path}: not a readable .safetensors"):
        heron.load(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.pth", "no such file$"),
        ("fodler", "no such file. Did you mean 'folder'"),
        ("file/x.pth", "no such file$"),
        ("file", "wanted a file name ending in .pth, .safetensors, .gguf, got ''"),
        ("x.bin", "wanted a file name ending in .pth, .safetensors, .gguf, got '.bin'"),
        ("folder", "no weights here.*checkpoints/step"),
    ],
)
def test_paths_that_hold_no_weights(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    for file in ("file", "x.bin"):
        (tmp_path / file).write_text("x")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: {words}"):
        heron.load(tmp_path / name)


def test_a_preset_is_not_taken_for_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^rwkv8-0.1b: no such file; it is a preset, which has sizes and no weight"
    ):
        heron.load("rwkv8-0.1b")
    with pytest.raises(CheckpointError, match=r"^rwkv9-0.1b: no such file. Did you mean 'rwkv8-0.1b'?"):
        heron.load("rwkv9-0.1b")


# ---------------------------------------------------------------------------------------------------------------------
# Places that cannot be written


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 5000 bytes while inside, which is how a full disk looks to a writer."""
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_old_file_whole(random_model, tmp_path, suffix):
    path, model = tmp_path / f"x.{suffix}", random_model()
    heron.save(model, path)
    with full_disk(), pytest.raises(CheckpointError, match=f"^{path}: cannot be written: .*File too large"):
        heron.save(random_model(seed=1), path)
    assert_equal(heron.load(path), model.state_dict())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/x.pth", "cannot be written: .*file is not a folder"),
        ("file/sub/x.safetensors", "cannot be written: Not a directory"),
        ("folder.pth", "cannot be written: Is a directory"),
        ("new/x.bin", "wanted a file name ending in .pth, .safetensors, .gguf, got '.bin'"),
        ("new/x", "wanted a file name ending in .pth, .safetensors, .gguf, got ''"),
    ],
)
def test_paths_that_cannot_be_written(random_model, tmp_path, name, words):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: {words}"):
        heron.save(random_model(), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.pth"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_keeps_its_place(random_model, tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="cannot be written: it is a device or a pipe; wanted the name of a file"):
        heron.save(random_model(), tmp_path / "pipe.pth")
    assert (tmp_path / "pipe.pth").is_fifo()


def test_folders_on_the_way_are_made(random_model, tmp_path):
    heron.save(random_model(), tmp_path / "a" / "b" / "x.pth")
    assert heron.load(tmp_path / "a" / "b" / "x.pth").config.n_embd == 32


def test_new_file_and_new_folder_appear_whole_or_not_at_all(tmp_path):
    def half(make, name, part):
        with make(tmp_path / name) as temporary:
            (temporary / part).write_text("half")
            raise KeyError

    for make, name, part in [(files.new_file, "file", ""), (files.new_folder, "folder", "part")]:
        with pytest.raises(KeyError):
            half(make, name, part)
        assert list(tmp_path.iterdir()) == []
    with files.new_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("whole")
    assert (tmp_path / "folder" / "part").read_text() == "whole"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run


def step(model, optimizer):
    """One step on tokens that the random generators draw; returns what they gave."""
    drawn = [random.random(), float(np.random.rand()), float(np.random.randn()), random.gauss(0, 1)]
    tokens = torch.randint(37, (2, 6))
    optimizer.zero_grad()
    model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
    optimizer.step()
    return drawn


def save_step(folder, n, model, optimizer, keep=9, **record):
    return run.save(folder, n, model, optimizer, {"step": n, **record}, f"seed: {n}\n", keep)


@pytest.fixture
def trained(random_model):
    """A model and its optimizer after two steps."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = random_model(n_layer=2)
    optimizer = heron.build_optimizer(model)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def test_what_is_restored_goes_on_bit_for_bit(trained, random_model, tmp_path):
    model, optimizer = trained
    folder = save_step(tmp_path, 2, model, optimizer, seconds=1.5)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json",
    ]  # fmt: skip
    assert (folder / "config.yaml").read_text() == "seed: 2\n"
    drawn = [step(model, optimizer) for _ in range(3)]

    other = random_model(n_layer=2, seed=5)
    other_optimizer = heron.build_optimizer(other)
    step(other, other_optimizer)
    run.verify(folder)
    assert run.restore(folder, other, other_optimizer) == run.trainer_of(folder) == {"step": 2, "seconds": 1.5}
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:  # what was restored is no view of the file
            file.write(bytes(path.stat().st_size))
    assert [step(other, other_optimizer) for _ in range(3)] == drawn
    assert_equal(other, model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        state, other_state = optimizer.state[a], other_optimizer.state[b]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[part], other_state[part]) for part in state)


def test_the_optimizer_of_another_model_is_refused(trained, random_model, tmp_path):
    folder = save_step(tmp_path, 2, *trained)
    tensors = load_file(folder / run.OPTIMIZER)
    tensors["exp_avg.blocks.7.att.w0"] = tensors.pop("exp_avg.blocks.1.att.w0")
    save_file(tensors, folder / run.OPTIMIZER)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: .*exp_avg\.blocks\.7\.att\.w0 is not known"):
        run.restore(folder, *trained)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flip": (flip, "sha256"),
    "truncate": (truncate, r"wanted \d+ bytes, got \d+"),
    "unlink": (lambda path: path.unlink(), "missing"),
}
FILES = [run.MODEL, run.OPTIMIZER, run.RNG, run.TRAINER, "config.yaml"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_taken(trained, tmp_path, damage, file):
    older, newer = save_step(tmp_path, 5, *trained), save_step(tmp_path, 10, *trained)
    assert run.newest(tmp_path) == newer
    act, words = DAMAGES[damage]
    act(newer / file)
    with pytest.raises(CheckpointError, match=f"^{newer / file}: .*{words}"):
        run.verify(newer)
    said = []
    assert run.newest(tmp_path, said.append) == older
    assert len(said) == 1
    assert str(newer / file) in said[0]
    with pytest.warns(UserWarning, match=f"damaged.*{newer / file}") as warned:
        assert_equal(heron.load(tmp_path), trained[0].state_dict())
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "manifest.json: missing or damaged"),
        ("{", "manifest.json: missing or damaged"),
        ("[]", "manifest.json: missing or damaged"),
        ('{"format": 2}', "manifest.json: missing or damaged"),
        ('{"format": 2, "seq": 1, "files": {}}', "its own sha256 does not confirm it"),
        ('{"format": 1, "seq": 1, "files": {}}', "wanted checkpoint format 2, got 1"),
        (run._sealed({"format": 2, "seq": 1, "files": {}}).decode(), r"config\.yaml is missing; model\.safetensors is"),
    ],
)
def test_a_folder_whose_manifest_does_not_fit_is_no_checkpoint(trained, tmp_path, manifest, words):
    folder = save_step(tmp_path, 5, *trained)
    (folder / run.MANIFEST).unlink()
    if manifest is not None:
        (folder / run.MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=words):
        run.verify(folder)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: no checkpoint is whole: .*{words}"):
        run.newest(tmp_path)
    with pytest.warns(UserWarning, match=words), pytest.raises(CheckpointError, match="no checkpoint is whole"):
        heron.load(tmp_path)


def test_the_newest_are_kept(trained, tmp_path):
    folders = [save_step(tmp_path, n, *trained, keep=2) for n in (9, 10, 100, 1000)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == folders[2:]
    assert run.newest(tmp_path) == folders[3]


def test_what_a_killed_process_left_is_swept(trained, tmp_path):
    for name in (".tmp-0123-step-00000005", ".trash-step-00000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model.safetensors").write_text("half")
    folder = save_step(tmp_path, 10, *trained)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_a_checkpoint_is_never_overwritten_and_the_last_that_was_written_is_the_newest(trained, tmp_path):
    first = save_step(tmp_path, 5, *trained)
    later = save_step(tmp_path, 10, *trained)
    flip(later / run.MODEL)
    assert run.newest(tmp_path) == first
    again = save_step(tmp_path, 5, *trained)
    flip(later / run.MODEL)  # whole once more, as after a reading error
    assert re.fullmatch(r"step-00000005-[0-9a-f]{8}", again.name)
    assert run.newest(tmp_path) == again  # though there is a higher step
    assert json.loads((again / run.MANIFEST).read_text())["seq"] == 3
    assert sorted((tmp_path / "checkpoints").iterdir()) == [first, again, later]


def test_a_damaged_checkpoint_takes_no_place_of_the_whole_ones_that_are_kept(trained, tmp_path):
    folders = [save_step(tmp_path, n, *trained, keep=2) for n in (5, 10)]
    flip(folders[1] / run.OPTIMIZER)
    last = save_step(tmp_path, 15, *trained, keep=2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == [*folders, last]
    flip(last / run.MODEL)
    said = []
    assert run.newest(tmp_path, said.append) == folders[0]
    assert [str(last / run.MODEL) in said[0], str(folders[1] / run.OPTIMIZER) in said[1]] == [True, True]
    again = [save_step(tmp_path, n, *trained, keep=2) for n in (20, 25)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == again


def test_what_was_verified_is_not_read_again_until_it_changes(trained, tmp_path, monkeypatch):
    save_step(tmp_path, 5, *trained, keep=2)
    monkeypatch.setattr(run.files, "sha256", None)
    save_step(tmp_path, 10, *trained, keep=2)
    touched = save_step(tmp_path, 15, *trained, keep=3)
    (touched / run.TRAINER).touch()
    with pytest.raises(TypeError):
        save_step(tmp_path, 20, *trained, keep=2)


def test_the_files_are_what_the_safetensors_package_writes(trained, tmp_path):
    model, optimizer = trained
    folder = save_step(tmp_path, 5, model, optimizer)
    mine = load_file(folder / run.MODEL)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "theirs")
    assert_equal(model, mine)
    assert (folder / run.MODEL).stat().st_size == pytest.approx((tmp_path / "theirs").stat().st_size, abs=64)
    moments = load_file(folder / run.OPTIMIZER)
    assert moments["unused.blocks.0.att.v0"].shape == (0,)
    assert torch.equal(moments["exp_avg.head.weight"], optimizer.state[model.head.weight]["exp_avg"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_dtype_is_serialized(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.arange(7), "c": torch.zeros(0), "d": torch.tensor(2.5)}
    (tmp_path / "x").write_bytes(b"".join(writer.serialized(tensors)))
    read = load_file(tmp_path / "x")
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


@pytest.mark.parametrize("name", ["exp_avg.head.weight", "unused.blocks.0.att.v1", "step.emb.weight"])
def test_a_moment_that_is_missing_is_named(trained, tmp_path, name):
    folder = save_step(tmp_path, 2, *trained)
    tensors = load_file(folder / run.OPTIMIZER)
    del tensors[name]
    save_file(tensors, folder / run.OPTIMIZER)
    with pytest.raises(CheckpointError, match=rf"{name.removeprefix('unused.')} is missing"):
        run.restore(folder, *trained)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written(trained, tmp_path):
    folders = [save_step(tmp_path, n, *trained) for n in (5, 10)]
    truncate(folders[1] / run.MODEL)
    assert run.newest(tmp_path) == folders[0]
    written = save_step(tmp_path, 7, *trained, keep=1)
    assert run.newest(tmp_path) == written


def test_a_failed_save_leaves_the_older_checkpoints(trained, tmp_path):
    older = save_step(tmp_path, 5, *trained, keep=1)
    with (
        full_disk(),
        pytest.raises(
            CheckpointError,
            match=r"step-00000010: cannot be written: .*File too large.* needs [\d,]+ bytes, [\d,]+ are free",
        ),
    ):
        save_step(tmp_path, 10, *trained, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    run.verify(older)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="step-00000010: cannot be written"):
        save_step(tmp_path / "file", 10, *trained)


def test_load_takes_a_run_a_checkpoint_or_the_final_weights(trained, random_model, tmp_path):
    model, optimizer = trained
    final = random_model(seed=7)
    heron.save(final, tmp_path / "rwkv-final.pth")
    assert_equal(heron.load(tmp_path), final.state_dict())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    older = save_step(tmp_path, 2, model, optimizer)
    step(model, optimizer)
    save_step(tmp_path, 3, model, optimizer)
    assert_equal(heron.load(tmp_path), model.state_dict())
    assert_equal(heron.load(str(older)), old)
    assert_equal(heron.load(older / "model.safetensors", dtype=torch.float64), {n: v.double() for n, v in old.items()})
    flip(older / run.MODEL)
    with pytest.raises(CheckpointError, match=f"^{older / run.MODEL}: .*sha256"):
        heron.load(older)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_equal(heron.load(tmp_path), final.state_dict())


def test_a_run_folder_belongs_to_one_process(tmp_path):
    pytest.importorskip("fcntl")
    with (
        run.lock(tmp_path),
        pytest.raises(CheckpointError, match=f"^{tmp_path}: another process"),
        run.lock(tmp_path),
    ):
        pass
    with run.lock(tmp_path):
        pass


def test_the_manifest_lists_every_other_file(trained, tmp_path):
    folder = save_step(tmp_path, 5, *trained)
    manifest = json.loads((folder / run.MANIFEST).read_text())
    assert manifest["step"] == 5
    assert sorted(manifest["files"]) == sorted(FILES)


@pytest.mark.parametrize(("name", "format"), [("folder", "safetensors"), ("folder", "hf"), ("x.gguf", None)])
def test_what_is_no_rwkv_goes_into_no_folder_and_no_gguf(tmp_path, name, format):
    with pytest.raises(CheckpointError, match=r"holds an RWKV alone; any other module goes into .pth or .safetensors"):
        heron.save(torch.nn.Linear(2, 2), tmp_path / name, format=format)
    assert list(tmp_path.iterdir()) == []
