"""Files of other tools: bit-equal round trips, the same logits elsewhere, one clear refusal of what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import heron
from heron import cli
from heron.checkpoint import FORMATS, put_right, read_tensors, save, tuned_state
from heron.checkpoint.formats import gguf as our_gguf
from heron.checkpoint.formats import hf
from heron.commands.convert import convert, largest_difference
from heron.errors import CheckpointError, ConfigError
from heron.model import State

UNUSED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
TARGETS = {"pth": "x.pth", "safetensors": "x.safetensors", "folder": "folder", "hf": "hf", "gguf": "x.gguf"}
V7 = dict(variant="v7", n_layer=2, n_embd=128, head_size=64, vocab_size=65, ffn_dim=200)
NEEDS_V7 = ("hf", "gguf")


def written(model, folder, target):
    path = folder / TARGETS[target]
    save(model, path, "safetensors" if target == "folder" else target)
    return path


def in_dtype(model, dtype):
    if dtype == "mixed":
        model.to(torch.bfloat16)
        for i, parameter in enumerate(model.parameters()):
            parameter.data = parameter.data.to((torch.float32, torch.bfloat16, torch.float16, torch.float64)[i % 4])
        return model
    return model.to(getattr(torch, dtype))


def assert_same(model, other, but=()):
    assert model.config == other.config
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - but:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_v7_comes_back_from_every_format_bit_for_bit(random_model, tmp_path, target, dtype):
    model = in_dtype(random_model(**V7), dtype)
    heron.save(model, tmp_path / "first.pth")
    there = written(heron.load(tmp_path / "first.pth"), tmp_path, target)
    heron.save(heron.load(there), tmp_path / "last.pth")
    assert_same(model, heron.load(tmp_path / "last.pth"), but=UNUSED if target in NEEDS_V7 else set())


@pytest.mark.parametrize("target", NEEDS_V7)
def test_a_single_layer_needs_no_value_rank(random_model, tmp_path, target):
    model = random_model(**{**V7, "n_layer": 1})
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(heron.load(written(model, tmp_path, target))(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("variant", ["v7a", "v7b", "v8", "v8-hybrid"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_format_cannot_hold_is_refused_in_a_sentence(random_model, tmp_path, target, variant):
    model = random_model(variant=variant, n_layer=1)
    if target in NEEDS_V7:
        with pytest.raises(CheckpointError, match=f"what a {variant} adds to a v7"):
            written(model, tmp_path, target)
        assert list(tmp_path.iterdir()) == []
    else:
        assert_same(model, heron.load(written(model, tmp_path, target)))


def test_a_folder_says_what_tensors_cannot(random_model, tmp_path):
    model = random_model(variant="v8-hybrid", has_ln0=True)
    assert heron.load(written(model, tmp_path, "folder")).config.has_ln0


def test_heads_that_the_hugging_face_layout_would_normalise_otherwise_are_refused(random_model, tmp_path):
    model = random_model(variant="v7", head_size=32, n_embd=64)
    with pytest.raises(CheckpointError, match="head_dim 64 alone, and this one is 32; take --format safetensors"):
        written(model, tmp_path, "hf")
    folder = written(random_model(**V7), tmp_path, "hf")
    rewrite(folder / hf.CONFIG, head_dim=32)
    with pytest.raises(CheckpointError, match="head_dim 64 alone, and this one is 32"):
        heron.load(folder)


# -- Hugging Face --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_layer=2, n_embd=64),
        dict(n_layer=3, n_embd=256),
        dict(n_layer=2, n_embd=128, decay_rank=96, iclr_rank=96, value_rank=64, gate_rank=256),  # of the 1.5b
        dict(n_layer=2, n_embd=128, decay_rank=192, iclr_rank=192, value_rank=128, gate_rank=384),  # of the 13.3b
    ],
)
def test_rwkv7_hf_computes_our_logits_from_an_exported_folder(random_model, tmp_path, sizes):
    rwkv7_hf = pytest.importorskip("rwkv7_hf", reason="rwkv7-hf is not installed: pip install rwkv7-hf==0.9.0")
    model = random_model(**{**V7, **sizes, "ffn_dim": None})
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(written(model, tmp_path, "hf"))
    tokens = torch.randint(model.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)[0]).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "back")
    assert_same(model, heron.load(tmp_path / "back"), but=UNUSED)


def test_every_field_that_flash_linear_attention_would_guess_is_written(random_model, tmp_path):
    model = random_model(**V7)
    config = json.loads((written(model, tmp_path, "hf") / hf.CONFIG).read_text())
    c = model.config
    wanted = {
        "model_type": "rwkv7", "vocab_size": 65, "hidden_size": 128, "num_hidden_layers": 2, "head_dim": 64,
        "num_heads": 2, "intermediate_size": 200, "value_dim": [128, 128], "decay_low_rank_dim": c.decay_rank,
        "a_low_rank_dim": c.iclr_rank, "v_low_rank_dim": c.value_rank, "gate_low_rank_dim": c.gate_rank,
        "norm_eps": 1e-5, "norm_first": True, "norm_bias": True, "hidden_act": "sqrelu", "eos_token_id": 0,
    }  # fmt: skip
    assert config | wanted == config


def test_the_shapes_of_the_hugging_face_layout(random_model, tmp_path):
    model = random_model(**V7)
    tensors = load_file(written(model, tmp_path, "hf") / hf.WEIGHTS)
    C, c = 128, model.config
    assert tensors["model.layers.1.attn.w_lora.lora.0.weight"].shape == (c.decay_rank, C)
    assert tensors["model.layers.1.attn.v_lora.lora.2.weight"].shape == (C, c.value_rank)
    assert tensors["model.layers.0.attn.a_lora.lora.2.bias"].shape == (C,)
    assert tensors["model.layers.0.attn.x_r"].shape == (1, 1, C)
    assert tensors["model.layers.0.ffn.x_k"].shape == tensors["model.layers.0.attn.k_k"].shape == (C,)
    assert not any("layers.0.attn.v_lora" in name or "g_lora.lora.2.bias" in name for name in tensors)


def test_shards_and_the_fused_lerp_of_early_files_are_read(random_model, tmp_path):
    model = random_model(**V7)
    folder = written(model, tmp_path, "hf")
    tensors = load_file(folder / hf.WEIGHTS)
    for layer in "01":
        names = [f"model.layers.{layer}.attn.x_{letter}" for letter in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = torch.stack([tensors.pop(name).view(-1) for name in names])
    parts = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / hf.WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / hf.INDEX).write_text(json.dumps(index))
    assert_same(model, heron.load(folder), but=UNUSED)
    assert "x_r to x_g are fused" in put_right(folder)[0]


@pytest.mark.parametrize("variant", ["v7", "v7a", "v7b", "v8", "v8-hybrid"])
def test_transformers_generates_with_and_keeps_every_variant(random_model, tmp_path, variant):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    import heron.hf

    model = random_model(variant=variant, n_layer=2, vocab_size=65)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(written(model, tmp_path, "folder"))
    tokens = torch.randint(65, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(wrapped(tokens).logits, model(tokens)[0])
        generated = wrapped.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
        expected = tokens
        for _ in range(6):
            expected = torch.cat((expected, model(expected)[0][:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generated, expected)
    wrapped.save_pretrained(tmp_path / "again")
    assert_same(model, heron.load(tmp_path / "again"))
    assert_same(model, heron.hf.HeronForCausalLM.from_pretrained(tmp_path / "again").rwkv)


@pytest.mark.parametrize("variant", ["v7", "v7b"])
def test_beam_search_goes_on_from_the_states_of_its_beams(random_model, tmp_path, monkeypatch, variant):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    from heron.hf import HeronForCausalLM

    folder = written(random_model(variant=variant, n_layer=1, vocab_size=17), tmp_path, "folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(1, 17, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        found = model.generate(tokens, **settings)
        whole = lambda self, input_ids, **_: {"input_ids": input_ids, "use_cache": False}  # noqa: E731
        monkeypatch.setattr(HeronForCausalLM, "prepare_inputs_for_generation", whole)
        assert torch.equal(found, model.generate(tokens, **settings))


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_transformers_may_not_fill_in_or_drop_tensors(random_model, tmp_path, damage):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    import heron.hf  # noqa: F401 - registers the model type

    folder = written(random_model(variant="v8", n_layer=2), tmp_path, "folder")
    tensors = load_file(folder / hf.WEIGHTS)
    if damage == "missing":
        del tensors["blocks.1.ffn.enn.weight"]
    else:
        tensors["blocks.1.ffn.other.weight"] = torch.zeros(3)
    save_file(tensors, folder / hf.WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{damage} keys: .*blocks\.1\.ffn"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_trains_a_heron(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    pytest.importorskip("accelerate", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    from heron.hf import HeronConfig, HeronForCausalLM

    torch.manual_seed(0)
    model = HeronForCausalLM(HeronConfig(variant="v8", n_layer=1, n_embd=64, vocab_size=17))
    ids = torch.arange(12) % 5
    rows = [{"input_ids": ids, "labels": ids}] * 32
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert losses[0] > 2.5
    assert losses[-1] < 0.5


# -- GGUF ----------------------------------------------------------------------------------------------------------


def test_gguf_reads_back_every_name_shape_and_value(random_model, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    model = random_model(**V7).to(torch.bfloat16)
    reader = gguf.GGUFReader(written(model, tmp_path, "gguf"))
    tensors = {item.name: item for item in reader.tensors}
    names = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.RWKV7]
    bases = {gguf.TENSOR_NAMES[name].format(bid=bid) for name in names for bid in (0, 1)}
    assert {name.rsplit(".", 1)[0] for name in tensors} == bases
    weights, c = model.state_dict(), model.config

    def values(name):
        return torch.from_numpy(np.array(tensors[name].data)).float()

    assert torch.equal(values("blk.1.time_mix_w1.weight"), weights["blocks.1.att.w1"].t().float())
    assert torch.equal(values("blk.0.time_mix_v2.weight"), weights["blocks.0.att.a2"].t().float())
    assert torch.equal(values("blk.1.time_mix_v0.weight"), weights["blocks.1.att.v0"].flatten().float())
    assert torch.equal(values("blk.1.time_mix_r_k.weight"), weights["blocks.1.att.r_k"].flatten().float())
    fused = values("blk.1.time_mix_lerp_fused.weight")
    assert fused.shape == (6, 1, 1, 128)
    for i, letter in enumerate("rwkvag"):
        assert torch.equal(fused[i], weights[f"blocks.1.att.x_{letter}"].float()), letter
    matrix = tensors["blk.1.channel_mix_key.weight"]
    assert matrix.tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.1.time_mix_w1.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    facts = {
        "general.architecture": "rwkv7", "rwkv7.context_length": 1048576, "rwkv7.embedding_length": 128,
        "rwkv7.block_count": 2, "rwkv7.feed_forward_length": 200, "rwkv7.attention.head_count": 0,
        "rwkv7.wkv.head_size": 64, "rwkv7.attention.decay_lora_rank": c.decay_rank,
        "rwkv7.attention.iclr_lora_rank": c.iclr_rank, "rwkv7.attention.gate_lora_rank": c.gate_rank,
        "rwkv7.attention.value_residual_mix_lora_rank": c.value_rank, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {key: reader.get_field(key).contents() for key in facts} == facts


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_quantised_gguf_is_refused_by_name(tmp_path, quantised):
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    kind = gguf.GGMLQuantizationType[quantised]
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "rwkv7")
    writer.add_tensor(
        "token_embd.weight", gguf.quants.quantize(np.ones((4, 64), dtype=np.float32), kind), raw_dtype=kind
    )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(
        CheckpointError, match=rf"q.gguf: token_embd.weight is quantised \({quantised}\); only F32, F16"
    ):
        heron.load(tmp_path / "q.gguf")


def test_without_the_gguf_package_the_command_to_type_is_said(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(our_gguf.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'heron-rwkv\[gguf\]'"):
        written(random_model(**V7), tmp_path, "gguf")


# -- old files, tuned states, the runtime's state ------------------------------------------------------------------


def test_prefixed_names_and_absent_block_0_values_load(random_model, tmp_path):
    model = random_model(**V7)
    tensors = {f"_forward_module.{name}": value for name, value in model.state_dict().items() if name not in UNUSED}
    torch.save(tensors, tmp_path / "zero3.pth")
    assert_same(model, heron.load(tmp_path / "zero3.pth"), but=UNUSED)


def test_a_tuned_state_is_said_and_read_apart(random_model, tmp_path):
    model = random_model(**V7)
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}  # not symmetric
    torch.save({**model.state_dict(), **states}, tmp_path / "both.pth")
    torch.save(states, tmp_path / "alone.pth")
    with pytest.warns(UserWarning, match="tuned_state"):
        assert_same(model, heron.load(tmp_path / "both.pth"))
    with pytest.raises(CheckpointError, match="alone.pth: a tuned initial state without weights"):
        heron.load(tmp_path / "alone.pth")
    tokens = torch.randint(65, (1, 5), generator=torch.Generator().manual_seed(0))
    start = State.zeros(model.config, 1, torch.device("cpu"), torch.float32)
    layers = [
        layer._replace(wkv=states[f"blocks.{i}.att.time_state"].unsqueeze(0)) for i, layer in enumerate(start.layers)
    ]
    expected = model(tokens, State(tuple(layers)))[0]
    for name in ("both", "alone"):
        assert torch.equal(model(tokens, tuned_state(tmp_path / f"{name}.pth", model.config))[0], expected)
    with pytest.raises(CheckpointError, match=r"blocks.2.att.time_state is missing"):
        tuned_state(tmp_path / "alone.pth", model.config.changed(n_layer=3))
    with pytest.raises(CheckpointError, match=r"blocks.0.att.time_state must be \(4, 32, 32\)"):
        tuned_state(tmp_path / "alone.pth", model.config.changed(head_size=32))
    with pytest.raises(CheckpointError, match=r"blocks.1.att.time_state: more layers than the 1"):
        tuned_state(tmp_path / "alone.pth", model.config.changed(n_layer=1))
    states["blocks.1.att.time_state"][0, 1, 2] = float("nan")
    torch.save(states, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="blocks.1.att.time_state holds NaN"):
        tuned_state(tmp_path / "nan.pth", model.config)


def test_a_tuned_state_goes_along_where_there_is_a_place_for_it(random_model, tmp_path):
    model = random_model(**V7)
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}
    torch.save({**model.state_dict(), **states}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "half.pth", variant="v8", dtype="bf16")
    for name, dtype in (("x.safetensors", torch.float32), ("half.pth", torch.bfloat16)):
        written = read_tensors(tmp_path / name)
        assert all(torch.equal(written[key], state.to(dtype)) for key, state in states.items())
    for target, format in (("folder", "hf"), ("x.gguf", None)):
        with pytest.raises(CheckpointError, match="no place for the tuned initial state"):
            convert(tmp_path / "x.pth", tmp_path / target, format=format)
        assert not (tmp_path / target).exists()


def test_a_hybrid_that_applies_its_ln0_goes_into_a_folder_that_says_so(random_model, tmp_path):
    model = random_model(variant="v8-hybrid", has_ln0=True)
    heron.save(model, tmp_path / "folder", "safetensors")
    for target in ("x.pth", "x.safetensors"):
        with pytest.raises(CheckpointError, match="one file cannot say.*--format safetensors"):
            convert(tmp_path / "folder", tmp_path / target)
        assert not (tmp_path / target).exists()
    assert convert(tmp_path / "folder", tmp_path / "other", format="safetensors")[1].config.has_ln0
    assert largest_difference(model, tmp_path / "other") == 0


def test_a_number_that_a_dtype_cannot_hold_is_refused(random_model, tmp_path):
    model = random_model(**V7)
    with torch.no_grad():
        model.head.weight[3, 4] = 1e5
    heron.save(model, tmp_path / "x.pth")
    assert heron.load(tmp_path / "x.pth", dtype=torch.bfloat16).head.weight.isfinite().all()
    with pytest.raises(CheckpointError, match="x.pth: head.weight holds numbers that float16 cannot; take bf16"):
        heron.load(tmp_path / "x.pth", dtype=torch.float16)
    with pytest.raises(ConfigError, match="dtype: wanted .*got torch.int32"):
        heron.load(tmp_path / "x.pth", dtype=torch.int32)


def test_a_yaml_that_happens_to_lie_there_is_in_nobodys_way(random_model, tmp_path):
    heron.save(random_model(**V7), tmp_path / "rwkv-final.pth")
    (tmp_path / "config.yaml").write_text("foo: 1\n")
    assert_same(random_model(**V7), heron.load(tmp_path / "rwkv-final.pth"))
    heron.save(random_model(variant="v8-hybrid"), tmp_path / "rwkv-init.pth")
    with pytest.raises(CheckpointError, match="config.yaml, which lies beside rwkv-init.pth: .*'foo'"):
        heron.load(tmp_path / "rwkv-init.pth")


@pytest.mark.parametrize("index", [False, True])
def test_a_folder_may_not_reach_out_of_itself(random_model, tmp_path, index):
    heron.save(random_model(**V7), tmp_path / "folder", "hf")
    (tmp_path / "elsewhere").mkdir()
    weights = tmp_path / "folder" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere" / "model.safetensors")
    weights.symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    if index:
        names = dict.fromkeys(read_tensors(tmp_path / "elsewhere" / "model.safetensors"), "model.safetensors")
        (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        heron.load(tmp_path / "folder")


def test_the_state_list_of_the_rwkv_package_goes_on_in_ours_and_back(random_model, rwkv_package, tmp_path):
    model = random_model(**V7)
    heron.save(model, tmp_path / "x.pth")
    tokens = torch.randint(65, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    [(_, theirs)] = rwkv_package([(tmp_path / "x", tokens[:7], [7])])
    with torch.no_grad():
        whole = model(torch.tensor([tokens]))[0][0]
        ours = model(torch.tensor([tokens[:7]]))[1]
        logits, _ = model(torch.tensor([tokens[7:]]), State.from_runtime([part.float() for part in theirs]))
    assert (logits[0] - whole[7:]).abs().max() < 1e-4
    for mine, its in zip(ours.to_runtime(), theirs, strict=True):
        assert mine.shape == its.shape
        assert torch.allclose(mine, its.float(), atol=1e-4)
    again = State.from_runtime(ours.to_runtime()).to_list()
    assert all(torch.equal(a, b) for a, b in zip(again, ours.to_list(), strict=True))
    with pytest.raises(ConfigError, match="one sequence, this state has 2"):
        model(torch.tensor([tokens, tokens]))[1].to_runtime()


# -- heron convert -------------------------------------------------------------------------------------------------


def test_convert_upcycles_and_checks(random_model, tmp_path, capsys):
    heron.save(random_model(**V7), tmp_path / "old.pth")
    assert (
        cli.main(["convert", str(tmp_path / "old.pth"), str(tmp_path / "new.pth"), "--variant", "v8", "--check"]) == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    assert "v8" in out
    assert "largest difference of a logit, before and after, in fp32: 0\n" in out
    assert heron.load(tmp_path / "new.pth").config.variant == "v8"


def test_a_check_can_fail(random_model, tmp_path):
    before, after = random_model(**V7), random_model(**V7, seed=1)
    heron.save(after, tmp_path / "other.pth")
    assert largest_difference(before, tmp_path / "other.pth") > 0.1


def test_a_check_that_finds_a_difference_fails(random_model, tmp_path, capsys, monkeypatch):
    heron.save(random_model(**V7), tmp_path / "old.pth")
    monkeypatch.setattr("heron.commands.convert.largest_difference", lambda *_, **__: 1e-6)
    command = ["convert", str(tmp_path / "old.pth")]
    assert cli.main([*command, str(tmp_path / "new.pth"), "--check"]) == 1
    assert "new.pth: the same numbers were to give the same logits" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "half.pth"), "--check", "--dtype", "bf16"]) == 0


@pytest.mark.parametrize("variant", ["v7a", "v7b", "v8", "v8-hybrid"])
def test_convert_is_neutral_and_the_same_each_time(random_model, tmp_path, variant):
    heron.save(random_model(**V7), tmp_path / "old.pth")
    before, one = convert(tmp_path / "old.pth", tmp_path / "one.pth", variant)
    _, two = convert(tmp_path / "old.pth", tmp_path / "two.pth", variant)
    assert_same(one, two)
    tokens = torch.randint(65, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(before(tokens)[0], one(tokens)[0])
    assert largest_difference(before, tmp_path / "one.pth") == 0
    if variant != "v8-hybrid":  # whose embedding has been normalised
        assert_same(before, convert(tmp_path / "one.pth", tmp_path / "back.pth", "v7")[1])


def test_convert_changes_dtype_and_vocabulary(random_model, tmp_path):
    heron.save(random_model(**V7), tmp_path / "old.pth")
    _, after = convert(tmp_path / "old.pth", tmp_path / "new.pth", dtype="bf16", vocab_size=70)
    again = heron.load(tmp_path / "new.pth")
    assert_same(after, again)
    assert again.config.vocab_size == 70
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    model = random_model(**V7)
    model.blocks[0].ffn.key.weight.data[0, 0] = 1e5
    heron.save(model, tmp_path / "large.pth")
    with pytest.raises(CheckpointError, match="blocks.0.ffn.key.weight holds numbers that float16 cannot; take bf16"):
        convert(tmp_path / "large.pth", tmp_path / "small.pth", dtype="fp16")
    assert not (tmp_path / "small.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new.zip"], "wanted a file name ending in .pth, .safetensors, .gguf, got '.zip'"),
        (["new.pth", "--format", "gguf"], "wanted a file name ending in .gguf, got '.pth'"),
        (["new.pth", "--format", "onnx"], f"format must be {', '.join(FORMATS)}, got 'onnx'"),
        (["new.pth", "--dtype", "int8"], "dtype: wanted fp32, bf16, fp16, got 'int8'"),
        (["new.pth", "--variant", "v9"], "variant: wanted one of"),
        (["new.pth", "--vocab_size", "80", "--new_rows", "zero"], "new_rows: wanted mean or initial, got 'zero'"),
        (["old.pth"], "exists already; name another file"),
    ],
)
def test_convert_says_what_is_wrong(random_model, tmp_path, arguments, message, capsys, monkeypatch):
    heron.save(random_model(**V7), tmp_path / "old.pth")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "old.pth", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.pth"]


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
