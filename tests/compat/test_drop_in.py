"""`core/`: the interface of the RWKV demos over heron.RWKV, as applications written for it use it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import heron
from core.rwkv_training.rwkv_v8_model import RWKV_x070
from heron.compat import x070
from heron.errors import CheckpointError, ConfigError, DataError
from heron.ops import _build, _choice
from heron.ops.wkv7 import wkv7_choice
from tests import warm

REPOSITORY = Path(__file__).parents[2]
NEVER_USED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
NO_LN0 = {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}  # in a v8-hybrid file, not used either
IDS = [5, 1, 36, 0, 5, 5, 12, 30, 7, 7, 2, 19, 20, 21, 22, 3, 9, 14]


def args_for(path=None, **settings):
    name = None if path is None else str(path).removesuffix(".pth")
    return types.SimpleNamespace(MODEL_NAME=name, **settings)


@pytest.fixture(scope="module", params=["v7", "v7a", "v7b", "v8", "v8-hybrid"])
def file(request, random_model, tmp_path_factory):
    """A file of random fp32 weights: 3 layers, C 32, head size 16, V 37."""
    path = tmp_path_factory.mktemp("drop-in") / "weights.pth"
    heron.save(random_model(variant=request.param), path)
    return path


@pytest.fixture
def model(file):
    return RWKV_x070(args_for(file))


def never_used(model):
    return NEVER_USED if model.config.has_ln0 else NEVER_USED | NO_LN0


def one_by_one(model, ids, state=None):
    logits = []
    for token in ids:
        out, state = model.forward_one(token, state)
        logits.append(out)
    return torch.stack(logits), state


def max_error(a, b):
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


def test_it_is_herons_model(model, file):
    plain = heron.load(file)
    assert isinstance(model, nn.Module)
    assert max_error(model.state_dict().values(), plain.state_dict().values()) == 0
    with torch.no_grad():
        logits, state = model.forward_seq(IDS, None, full_output=True)
        want, want_state = plain(torch.tensor([IDS]))
    assert torch.equal(logits, want[0])
    assert max_error(state, [part[0] for part in want_state.to_list()]) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp64", 1e-12)])
def test_a_sequence_is_its_tokens_one_by_one(file, dtype, tolerance):
    model = RWKV_x070(args_for(file, dtype=dtype))
    with torch.no_grad():
        logits, state = model.forward_seq(IDS, None, full_output=True)
        singles, single_state = one_by_one(model, IDS)
        assert logits.shape == (len(IDS), 37)
        tolerance *= max(1.0, *(float(part.abs().max()) for part in (logits, *state) if part.is_floating_point()))
        assert max_error([logits, *state], [singles, *single_state]) < tolerance
        for split in (1, 9, 17):  # prefill, then decode
            last, middle = model.forward_seq(IDS[:split])
            assert last.shape == (37,)
            assert max_error([last], [logits[split - 1]]) < tolerance
            rest, end = one_by_one(model, IDS[split:], middle)
            assert max_error([rest, *end], [logits[split:], *state]) < tolerance


@pytest.mark.parametrize("variant", ["v8", "v7b"])
def test_what_a_text_has_said_before_is_in_the_logits_and_in_the_list(random_model, tmp_path, variant):
    heron.save(random_model(variant=variant, memory="memory"), tmp_path / "x.pth")
    args, ids = args_for(tmp_path / "x.pth", dtype="fp64"), [token % 5 for token in IDS]
    model, other = RWKV_x070(args), heron.load(tmp_path / "x.pth", dtype=torch.float64)
    want, after = other(torch.tensor([ids]))
    logits, state = model.forward_seq(ids, None, full_output=True)
    single, end = one_by_one(model, ids)
    assert max_error((logits, single, model.forward_seq(ids)[0]), (want[0], want[0], want[0, -1])) < 1e-9
    for got in (state, end):
        assert max_error(got, after.to_runtime()) < 1e-9
        assert got[-1].tolist() == ids
    assert max_error([model.forward(ids, end)[0]], [other(torch.tensor([ids]), after)[0][0, -1]]) < 1e-9
    fresh = args_for(variant=variant, n_layer=1, n_embd=32, vocab_size=37, head_size=16, memory=args.memory)
    assert RWKV_x070(fresh).config.memory == model.config.memory
    assert model.z["memory.copy"].data_ptr() == model.memory.copy.data_ptr()


def test_forward_dispatches_as_upstream(model):
    with torch.no_grad():
        one, seq = model.forward_one(5), model.forward_seq(IDS)
        for ids in (5, [5], torch.tensor(5), torch.tensor([5]), np.array([5])):
            for got in (model.forward(ids, None), model(ids, None, True)):
                assert max_error([got[0], *got[1]], [one[0], *one[1]]) == 0
        for ids in (IDS, tuple(IDS), torch.tensor(IDS), np.array(IDS, dtype=np.uint16), [torch.tensor(i) for i in IDS]):
            got = model.forward(ids, None)
            assert max_error([got[0], *got[1]], [seq[0], *seq[1]]) == 0
        assert model(IDS, None, full_output=True)[0].shape == (len(IDS), 37)


def test_the_state_is_upstreams_list_and_stays_as_it_was(model):
    with torch.no_grad():
        _, state = model.forward_seq(IDS)
        assert type(state) is list
        n, codes = len(IDS), [(len(IDS), 32)] * 6
        context = {"v7b": [(n,), *codes, *[(256,)] * 3], "v8-hybrid": [(n,), *codes]}
        want = [(32,), (2, 16, 16), (32,)] * 3 + context.get(model.config.variant, [])
        assert [tuple(part.shape) for part in state] == want
        kept = [part.clone() for part in state]
        parts = list(state)
        for call in (lambda: model.forward_one(3, state), lambda: model.forward_seq(IDS, state)):
            _, new = call()
            for part in new:
                part.zero_()
            assert all(a is b for a, b in zip(state, parts, strict=True))
            assert max_error(state, kept) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_wkv_state_is_fp32_in_half_precision(file, dtype):
    model = RWKV_x070(args_for(file, dtype=dtype))
    with torch.no_grad():
        _, state = model.forward_one(3)
    assert [part.dtype for part in state[:9]] == [dtype, torch.float32, dtype] * 3
    assert [part.dtype for part in state[9:]] == [torch.int64, *[dtype] * len(state[10:])][: len(state[9:])]


def test_hidden_states_is_the_batched_form(model):
    tokens = torch.tensor([IDS, IDS[::-1]])
    hidden, _ = model.hidden_states(tokens)
    assert hidden.shape == (2, len(IDS), 32)
    for row, ids in enumerate((IDS, IDS[::-1])):
        logits, _ = model.forward_seq(ids, full_output=True)
        assert max_error([hidden[row] @ model.z["head.weight"].t()], [logits]) < 1e-4
    hidden.sum().backward()
    assert model.emb.weight.grad.any()


@pytest.mark.parametrize("file", ["v8"], indirect=True)
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "at least one"),
        ([[1, 2]], r"one sequence \(T,\), got \(1, 2\)"),
        ([1.0, 2.0], "wanted integers, got torch.float32"),
        (torch.tensor([True]), "wanted integers, got torch.bool"),
        ([1, 37], "0 to 36"),
        (-1, "0 to 36"),
    ],
)
def test_ids_that_are_none_are_refused(model, ids, words):
    for call in (model.forward, model.forward_seq):
        with pytest.raises(DataError, match=words):
            call(ids, None)


def test_forward_one_takes_one(model):
    with pytest.raises(DataError, match="forward_one: wanted one token id, got 2"):
        model.forward_one([1, 2])


def test_a_foreign_state_is_refused(model, random_model):
    with torch.no_grad():
        _, state = model.forward_one(1)
    for bad in (state[:4], state[:6], [part[None] for part in state], []):
        with pytest.raises(ConfigError, match="state"):
            model.forward_one(1, bad)


# ---------------------------------------------------------------------------------------------------------------------
# Where its sizes and weights come from


def test_the_file_decides_and_args_are_told(file, random_model):
    config = heron.load(file).config
    args = args_for(file, n_layer=99, n_embd=1024, vocab_size=65536)
    model = RWKV_x070(args)
    assert model.config == config
    assert (model.n_layer, model.n_head, model.head_size, model.n_embd) == (3, 2, 16, 32)
    assert (args.n_layer, args.n_embd, args.vocab_size, args.head_size, args.variant) == (3, 32, 37, 16, config.variant)
    assert model.args is args


def test_the_number_of_parameters_is_that_of_the_file(model, file):
    tensors = torch.load(file, weights_only=True)
    assert len(list(model.parameters())) == len(tensors)
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in tensors.values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dtypes_are_the_files_unless_args_say_otherwise(random_model, tmp_path):
    path = tmp_path / "x.pth"
    heron.save(random_model().to(torch.bfloat16), path)
    for dtype, wanted in [(None, torch.bfloat16), ("fp32", torch.float32), ("float64", torch.float64),
                          (torch.float16, torch.float16)]:  # fmt: skip
        model = RWKV_x070(args_for(path, dtype=dtype))
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert RWKV_x070(args_for(path)).emb.weight.dtype == torch.bfloat16
    for bad in ("int8", torch.int64, 16):
        with pytest.raises(ConfigError, match=f"args.dtype: wanted a torch dtype or one of .*fp32.*got {bad!r}"):
            RWKV_x070(args_for(path, dtype=bad))


def test_no_name_is_a_fresh_model_of_the_sizes_asked_for():
    args = args_for(None, variant="v8", n_layer=2, n_embd=64, vocab_size=50, head_size=32, dtype="fp64")
    torch.manual_seed(0)
    model = RWKV_x070(args)
    torch.manual_seed(0)
    plain = heron.RWKV(heron.ModelConfig(variant="v8", n_layer=2, n_embd=64, vocab_size=50, head_size=32)).double()
    assert model.config == plain.config
    assert max_error(model.state_dict().values(), plain.state_dict().values()) == 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    with pytest.raises(ConfigError, match="variant"):
        RWKV_x070(args_for(None, variant="v6"))


@pytest.mark.parametrize("name", ["nowhere", "folder"])
def test_a_named_file_must_exist(tmp_path, name):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name}.pth: no such file; MODEL_NAME is the path without"):
        RWKV_x070(args_for(tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# It trains


def loss_of(model, ids):
    logits, _ = model.forward_seq(ids[:-1], None, full_output=True)
    return F.cross_entropy(logits, torch.tensor(ids[1:]))


def test_every_parameter_gets_a_gradient_and_moves(model):
    loss_of(model, IDS).backward()
    for name, parameter in model.named_parameters():
        if name in never_used(model):
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heron.build_optimizer(model).step()
    assert {name for name, value in model.state_dict().items() if torch.equal(value, before[name])} == never_used(model)


def test_the_loss_of_a_file_falls_over_20_steps(model):
    optimizer = heron.build_optimizer(model, lr=2e-3)
    losses = []
    for _ in range(20):
        loss = loss_of(model, IDS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]
    assert np.mean(losses[10:]) < np.mean(losses[:10])


def test_gradients_flow_through_the_state_and_into_the_first_one(file):
    model = RWKV_x070(args_for(file, dtype="fp64"))
    used = {name: parameter for name, parameter in model.named_parameters() if name not in never_used(model)}
    _, zeros = model.forward_one(3)

    def floats(state):
        return [part for part in state if part.is_floating_point()]

    def grads(*pieces):
        state = start = [
            (0.1 + torch.zeros_like(part)).requires_grad_() if part.is_floating_point() else part for part in zeros
        ]
        logits = []
        for piece in pieces:
            if isinstance(piece, int):
                out, state = model.forward_one(piece, state)
            else:
                out, state = model.forward_seq(piece, state, full_output=True)
            logits.append(out.view(-1, 37))
        return torch.autograd.grad(torch.cat(logits).square().sum(), [*used.values(), *floats(start)])

    whole = grads(IDS)
    assert all(grad.any() for grad in whole)
    for pieces in ((IDS[:1], IDS[1:]), (IDS[:16], IDS[16:]), tuple(IDS)):
        for got, want in zip(grads(*pieces), whole, strict=True):
            assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_deep_layers_can_be_recomputed(model):
    loss_of(model, IDS).backward()
    plain = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.grad_checkpoint = True
    loss_of(model, IDS).backward()
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        assert grad is parameter.grad is None or torch.equal(parameter.grad, grad)


def test_an_application_with_a_small_vocabulary_of_its_own(tmp_path):
    """A MIDI-like event stream: (bar, pitch, duration) events over 24 ids, learned, saved, loaded and continued."""
    bar = [1, 10, 20, 12, 21, 14, 20, 17, 22]
    song = bar * 4
    torch.manual_seed(0)
    model = RWKV_x070(args_for(None, variant="v8", n_layer=2, n_embd=32, vocab_size=24, head_size=16))
    optimizer = heron.build_optimizer(model, lr=1e-2)
    for _ in range(40):
        tokens = torch.tensor([song[shift : shift + 18] for shift in range(0, 9, 3)])
        hidden, _ = model.hidden_states(tokens[:, :-1])
        loss = F.cross_entropy((hidden @ model.z["head.weight"].t()).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save(tmp_path / "song.pth")
    model = RWKV_x070(args_for(tmp_path / "song"))
    with torch.no_grad():
        out, state = model.forward_seq(song[:6], None)
        played = song[:6]
        for _ in range(18):
            played.append(int(out.argmax()))
            out, state = model.forward_one(played[-1], state)
    assert played == song[:24]


# ---------------------------------------------------------------------------------------------------------------------
# The view of the weights


def test_z_serves_every_weight_in_the_layout_that_is_computed_with(model):
    tensors = dict(model.named_parameters())
    assert len(model.z) == len(tensors)
    assert list(model.z) == list(tensors)
    for name, parameter in tensors.items():
        got = model.z[name]
        assert got.grad_fn is not None or got is parameter
        parts = name.split(".")
        if name == "emb.weight":
            ln0 = tensors["blocks.0.ln0.weight"], tensors["blocks.0.ln0.bias"]
            want = F.layer_norm(parameter, (32,), *ln0) if model.config.has_ln0 else parameter
        elif parts[-2] in ("receptance", "key", "value", "output"):
            want = parameter.t()
        elif parts[-1] == "r_k":
            want = parameter.flatten()
        else:
            want = parameter.squeeze()
        assert torch.equal(got, want), name
        if name != "emb.weight" or not model.config.has_ln0:
            assert got.data_ptr() == parameter.data_ptr(), name
        for key in (name, name.replace(".", "_")):
            assert key in model.z
            assert torch.equal(model.z[key], got)
            assert torch.equal(model._z(key), got)
    for key in ("blocks.9.att.w0", "w0", "", 3, None):
        assert key not in model.z
    with pytest.raises(KeyError):
        model.z["blocks_9_att_w0"]


def test_z_has_the_shapes_that_applications_expect(model):
    shapes = {
        "emb.weight": (37, 32), "head_weight": (37, 32), "ln_out_weight": (32,), "blocks_0_ln0_bias": (32,),
        "blocks_1_att_key_weight": (32, 32), "blocks_1_ffn_key_weight": (32, 50), "blocks_1_ffn_value_weight": (50, 32),
        "blocks_1_att_r_k": (32,), "blocks_1_att_x_r": (32,), "blocks_1_att_w0": (32,), "blocks_1_att_w1": (32, 5),
        "blocks_1_att_w2": (5, 32), "blocks_1_ffn_x_k": (32,),
    }  # fmt: skip
    if model.config.variant == "v8":
        shapes["blocks_2_ffn_enn_weight"] = (37, 32)
    assert {key: tuple(model.z[key].shape) for key in shapes} == shapes


def test_z_shows_the_weights_as_they_are_now_and_carries_gradients(model, random_model):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    emb = model.z["emb.weight"]
    (x @ model.z["blocks.1.att.key.weight"] + emb[:4]).square().sum().backward()
    for name in {"blocks.1.att.key.weight", "emb.weight", *NO_LN0} - (never_used(model) - NEVER_USED):
        assert model.get_parameter(name).grad.any(), name
    before = {name: value.detach().clone() for name, value in model.z.items()}
    heron.build_optimizer(model).step()
    assert not torch.equal(model.z["blocks.1.att.key.weight"], before["blocks.1.att.key.weight"])
    assert not torch.equal(model.z["emb.weight"], before["emb.weight"])
    model.double()
    assert model.z["head.weight"].dtype == torch.float64
    other = random_model(variant=model.config.variant, seed=9)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model.z["blocks.1.att.key.weight"], other.blocks[1].att.key.weight.t())


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_saved_file_is_bit_equal(model, file, tmp_path):
    model.save(tmp_path / "again.pth")
    first, again = torch.load(file, weights_only=True), torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(first) == list(again)
    assert max_error(first.values(), again.values()) == 0


def test_a_trained_v7_file_runs_in_the_rwkv_package(random_model, rwkv_package, tmp_path):
    heron.save(random_model(variant="v7", n_embd=128, head_size=64), tmp_path / "start.pth")
    model = RWKV_x070(args_for(tmp_path / "start"))
    optimizer = heron.build_optimizer(model)
    for _ in range(2):
        loss_of(model, IDS).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save(tmp_path / "trained.pth")
    with torch.no_grad():
        logits, state = model.forward_seq(IDS, None, full_output=True)
    ((want, want_state),) = rwkv_package([(tmp_path / "trained", IDS, [7, 1, 10])])
    assert max_error([logits, *state], [want, *want_state]) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The environment

NAMES = ("RWKV_JIT_ON", "RWKV_HEAD_SIZE", "RWKV_MY_TESTING", "RWKV_CUDA_ON")


def fresh_env_hijack(monkeypatch, **settings):
    """core.env_hijack as a process sees it whose environment holds `settings`."""
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    monkeypatch.setattr(os, "environ", {**others, **settings})
    spec = importlib.util.spec_from_file_location("fresh_env_hijack", REPOSITORY / "core" / "env_hijack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_defaults_are_set_and_what_is_set_stays(monkeypatch):
    fresh_env_hijack(monkeypatch)
    assert [os.environ[name] for name in NAMES] == ["1", "64", "x070", "1"]
    fresh_env_hijack(monkeypatch, RWKV_JIT_ON="0", RWKV_HEAD_SIZE="32")
    assert [os.environ[name] for name in NAMES] == ["0", "32", "x070", "1"]


@pytest.mark.parametrize(
    ("settings", "head_size", "words"),
    [
        (dict(RWKV_MY_TESTING="x060"), 64, "RWKV_MY_TESTING is 'x060'; this model is x070"),
        (dict(RWKV_HEAD_SIZE="64"), 32, "RWKV_HEAD_SIZE is '64', but the weights have head size 32"),
        (dict(RWKV_HEAD_SIZE="many"), 64, "RWKV_HEAD_SIZE is 'many', but the weights have head size 64"),
        (dict(RWKV_CUDA_ON="yes"), 64, "RWKV_CUDA_ON is 'yes'; wanted 0 or 1"),
        (dict(RWKV_JIT_ON=""), 64, "RWKV_JIT_ON is ''; wanted 0 or 1"),
        (dict(), 16, None),
        (dict(RWKV_HEAD_SIZE="16", RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_MY_TESTING="x070"), 16, None),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(monkeypatch, settings, head_size, words):
    monkeypatch.setattr(_build, "_forbidden", None)
    monkeypatch.setattr(_choice, "_no_kernels", None)
    module = fresh_env_hijack(monkeypatch, **settings)
    if words is None:
        module.check_environment(head_size)
    else:
        with pytest.raises(ConfigError, match=words):
            module.check_environment(head_size)


def test_jit_off_forbids_every_build(monkeypatch):
    monkeypatch.setattr(_build, "_forbidden", None)
    fresh_env_hijack(monkeypatch).check_environment(64)
    assert _build._forbidden is None
    fresh_env_hijack(monkeypatch, RWKV_JIT_ON="0").check_environment(64)
    assert _build._forbidden == "RWKV_JIT_ON is 0"


def test_cuda_off_keeps_to_pytorch(monkeypatch):
    monkeypatch.setattr(_choice, "_no_kernels", None)
    fresh_env_hijack(monkeypatch).check_environment(64)
    assert _choice._no_kernels is None
    fresh_env_hijack(monkeypatch, RWKV_CUDA_ON="0").check_environment(64)
    choice = wkv7_choice(torch.device("cuda"), 512)
    assert (choice.impl, "RWKV_CUDA_ON is 0" in choice.reason) == ("chunked", True)


def test_the_model_obeys_the_environment(monkeypatch, file):
    module = fresh_env_hijack(monkeypatch, RWKV_HEAD_SIZE="64")
    monkeypatch.setattr("core.rwkv_training.rwkv_v8_model.env_hijack", module)
    with pytest.raises(ConfigError, match="RWKV_HEAD_SIZE is '64', but the weights have head size 16"):
        RWKV_x070(args_for(file))
    x070.RWKV_x070(args_for(file))  # the library's own class reads no environment


def test_off_windows_nothing_is_changed(monkeypatch, capsys):
    module = fresh_env_hijack(monkeypatch)
    before = dict(os.environ)
    if os.name != "nt":
        module.hijack_windows_cuda_env()
        assert os.environ == before
        assert capsys.readouterr().out == "env_hijack: not Windows, nothing to change\n"
    assert module.verify_cuda_setup() is torch.cuda.is_available()
    assert f"PyTorch {torch.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("found", [{}, {"PATH": r"C:\VC\bin", "INCLUDE": r"C:\VC\include"}])
def test_on_windows_the_compilers_variables_are_taken_over(monkeypatch, capsys, found):
    from heron.compat import msvc

    module = fresh_env_hijack(monkeypatch, INCLUDE=r"C:\VC\include", PATH="before")
    monkeypatch.setattr(module.os, "name", "nt")
    monkeypatch.setattr(msvc, "environment_of_compiler", lambda: found)
    module.hijack_windows_cuda_env()
    said = capsys.readouterr().out
    monkeypatch.undo()  # before pytest meets a `nt` of ours
    assert said.count("\n") == 1
    assert ("changed PATH\n" in said) if found else ("no Visual Studio C++ tools found" in said)


# ---------------------------------------------------------------------------------------------------------------------
# Beside and inside an application


def environment_of(**changes):
    return {name: value for name, value in os.environ.items() if name not in NAMES} | changes


def python(code, *path, cwd):
    environment = environment_of(PYTHONPATH=os.pathsep.join(map(str, path)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_env_hijack_loads_no_torch_and_says_nothing(tmp_path):
    code = "import sys; from core import env_hijack; assert 'torch' not in sys.modules and 'heron' not in sys.modules"
    assert python(code, REPOSITORY, cwd=tmp_path) == ""


EXTENDS = "import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n"


@pytest.mark.parametrize(
    ("application_first", "init"),
    [(False, ""), (False, None), (True, None), (True, EXTENDS)],
    ids=["second", "second, no init", "first, no init", "first, extends"],
)
def test_an_application_with_a_core_of_its_own_finds_both(tmp_path, application_first, init):
    application, elsewhere = tmp_path / "application", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder, module in [("core", "settings"), ("core/rwkv_training", "data_set")]:
        (application / folder).mkdir(parents=True)
        (application / folder / f"{module}.py").write_text(f"name = {module!r}\n")
        if init is not None:
            (application / folder / "__init__.py").write_text(init)
    code = (
        "import importlib.util\n"
        "import core.settings, core.rwkv_training.data_set, core.env_hijack\n"
        "assert (core.settings.name, core.rwkv_training.data_set.name) == ('settings', 'data_set')\n"
        "print(importlib.util.find_spec('core.rwkv_training.rwkv_v8_model').origin)\n"
    )
    path = (application, REPOSITORY) if application_first else (REPOSITORY, application)
    found = python(code, *path, cwd=elsewhere)
    assert Path(found.strip()) == REPOSITORY / "core" / "rwkv_training" / "rwkv_v8_model.py"


def test_the_folder_works_when_it_is_copied_into_an_application(tmp_path):
    shutil.copytree(REPOSITORY / "core", tmp_path / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "core" / "settings.py").write_text("layers = 2\n")
    code = (
        "import os, sys, types\n"
        "os.environ['RWKV_HEAD_SIZE'] = '32'\n"
        "from core import settings\n"
        "from core.rwkv_training.rwkv_v8_model import RWKV_x070\n"
        "from heron.errors import ConfigError\n"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('core')), sep=';')\n"
        "args = types.SimpleNamespace(n_layer=settings.layers, n_embd=32, vocab_size=9, head_size=32)\n"
        "output, state = RWKV_x070(args).forward_seq([1, 2, 3], None, full_output=True)\n"
        "output.sum().backward()\n"
        "import torch\n"
        "switches = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32\n"
        "print(tuple(output.shape), len(state), *switches)\n"
        "for name, value in [('head_size', 16), ('RWKV_MY_TESTING', 'x060')]:\n"
        "    setattr(args, name, value) if hasattr(args, name) else os.environ.update({name: value})\n"
        "    try:\n"
        "        RWKV_x070(args)\n"
        "    except ConfigError as error:\n"
        "        print(error)\n"
    )
    with warm.start(["-c", code], env=environment_of(), cwd=tmp_path) as process:
        out, errors = process.communicate(60)
    lines = out.splitlines()
    assert process.returncode == 0, errors
    copied = ["__init__", "env_hijack", "rwkv_training/__init__", "rwkv_training/rwkv_v8_model", "settings"]
    assert sorted(lines[0].split(";")) == [str(tmp_path / "core" / f"{name}.py") for name in copied]
    assert lines[1] == "(3, 9) 6 False False"  # no global switch was moved
    assert lines[2].startswith("RWKV_HEAD_SIZE is '32', but the weights have head size 16")
    assert lines[3].startswith("RWKV_MY_TESTING is 'x060'")
