"""The two dataclasses: what they accept, what they fill in, what they refuse, and that YAML gives them back."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

import pytest

from heron.config import (
    MINI_EPOCH,
    PRESETS,
    FinetuneConfig,
    ModelConfig,
    RosaConfig,
    TrainConfig,
    rank_rule,
    read_yaml,
    setting_type,
)
from heron.errors import ConfigError, HeronError, UnknownKeyError

SMALL = dict(n_layer=2, n_embd=32, head_size=16, vocab_size=256)


@pytest.mark.parametrize(
    ("factor", "width", "rank"),
    [(2.5, 768, 64), (1.7, 768, 32), (5.0, 768, 128), (2.5, 2048, 128), (5.0, 4096, 320), (1.7, 64, 32), (1.7, 1, 32)],
)
def test_rank_rule(factor, width, rank):
    assert rank_rule(factor, width) == rank


def test_sizes_that_are_not_given_follow_from_the_width():
    config = ModelConfig(n_embd=1024)
    ranks = (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank)
    assert (config.ffn_dim, *ranks, config.n_head) == (4096, 64, 64, 64, 160, 16)
    assert ModelConfig(n_embd=1024, ffn_dim=100, gate_rank=7).gate_rank == 7


def test_changed_sizes_follow_a_new_width_unless_they_are_special():
    config = ModelConfig(n_embd=128, value_rank=5)
    wider = config.changed(n_embd=1024)
    assert wider == ModelConfig(n_embd=1024, value_rank=5)
    assert wider.ffn_dim == 4096
    assert config.changed(n_layer=3) == dataclasses.replace(config, n_layer=3)
    assert config.changed(n_embd=1024, ffn_dim=512).ffn_dim == 512
    with pytest.raises(UnknownKeyError, match="n_layer"):
        config.changed(n_layers=3)


def test_whether_ln0_is_applied_follows_the_variant_unless_it_was_said():
    assert [ModelConfig(variant=variant).has_ln0 for variant in ("v7", "v7a", "v7b", "v8")] == [True] * 4
    assert ModelConfig(variant="v8-hybrid").has_ln0 is False
    assert ModelConfig(variant="v7").changed(variant="v8-hybrid").has_ln0 is False
    assert ModelConfig(variant="v8-hybrid").changed(variant="v8").has_ln0 is True
    assert ModelConfig(variant="v8-hybrid", has_ln0=True).changed(n_layer=3).has_ln0 is True


@pytest.mark.parametrize(
    ("changes", "deep_embed", "has_attention"),
    [
        (dict(variant="v7"), None, False),
        (dict(variant="v7a"), "low-rank", False),
        (dict(variant="v7b"), "low-rank", True),
        (dict(variant="v8"), "output", False),
        (dict(variant="v8", deep_embed_4x=True), "hidden", False),
        (dict(variant="v8-hybrid"), "output", True),
        (dict(variant="v8-hybrid", deep_embed_4x=True), "hidden", True),
    ],
)
def test_the_variant_decides_the_parts(changes, deep_embed, has_attention):
    config = ModelConfig(**changes)
    assert (config.deep_embed, config.has_attention) == (deep_embed, has_attention)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name):
    config = ModelConfig.preset(name)
    assert config.variant == name.removeprefix("rwk").rpartition("-")[0]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.preset(name, n_layer=1).n_layer == 1


def test_released_ranks_are_those_of_the_files():
    config = ModelConfig.preset("rwkv7-2.9b")
    ranks = (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank)
    assert (config.n_layer, config.n_embd, *ranks) == (32, 2560, 96, 96, 64, 320)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(variant="v9"), ["variant", "v7, v7a, v7b, v8, v8-hybrid", "'v9'"]),
        (dict(variant="v7a", deep_embed_4x=True), ["deep_embed_4x", "v8 and v8-hybrid", "v7a"]),
        (dict(variant="v7", has_ln0=False), ["has_ln0 False", "v8-hybrid", "v7"]),
        (dict(deep_embed_4x=1), ["deep_embed_4x", "bool", "1"]),
        (dict(n_layer=0), ["n_layer", "at least 1", "0"]),
        (dict(n_layer="4"), ["n_layer", "int", "'4'"]),
        (dict(n_layer=True), ["n_layer", "True"]),
        (dict(n_layer=2.5), ["n_layer", "2.5"]),
        (dict(n_embd=-64), ["-64"]),
        (dict(vocab_size=0), ["vocab_size"]),
        (dict(head_size=8), ["head_size", "16 to 128", "8"]),
        (dict(head_size=256), ["head_size", "256"]),
        (dict(n_embd=100, head_size=64), ["n_embd 100", "head_size 64"]),
        (dict(gate_rank=0), ["gate_rank"]),
    ],
)
def test_a_bad_model_is_refused_by_name(values, words):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_preset_or_key_suggests_the_near_one():
    with pytest.raises(ConfigError, match="Did you mean 'rwkv8-0.1b'"):
        ModelConfig.preset("rwkv8-0.1")
    with pytest.raises(UnknownKeyError, match="model: unknown key 'n_layers'. Did you mean 'n_layer'"):
        ModelConfig.from_dict({"n_layers": 3})
    with pytest.raises(UnknownKeyError, match="config: unknown key 'ctx_length'. Did you mean 'ctx_len'"):
        TrainConfig.from_dict({"max_steps": 3, "ctx_length": 3})
    with pytest.raises(UnknownKeyError, match="model: unknown key 'n_layers'"):
        TrainConfig.from_dict({"max_steps": 3, "model": {"n_layers": 3}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(), ["max_steps", "max_tokens"]),
        (dict(max_steps=1, max_tokens=1), ["exactly one"]),
        (dict(max_steps=0), ["max_steps", "at least 1"]),
        (dict(max_steps=1, micro_bsz=0), ["micro_bsz", "0"]),
        (dict(max_steps=1, ctx_len=0), ["ctx_len"]),
        (dict(max_steps=1, lr_init=-1e-3), ["lr_init", "-0.001"]),
        (dict(max_steps=1, lr_init=float("nan")), ["lr_init", "nan"]),
        (dict(max_steps=1, lr_final="inf"), ["lr_final", "inf"]),
        (dict(max_steps=1, lr_init="fast"), ["lr_init", "'fast'"]),
        (dict(max_steps=1, beta2=1.0), ["beta2", "< 1"]),
        (dict(max_steps=1, val_fraction=1), ["val_fraction"]),
        (dict(max_steps=1, adam_eps=0), ["adam_eps"]),
        (dict(max_steps=1, dtype="fp16"), ["dtype", "fp32, bf16", "'fp16'"]),
        (dict(max_steps=1, tables="disk"), ["tables", "device, host", "'disk'"]),
        (dict(max_steps=1, tables_state="fp16", tables="host"), ["tables_state", "fp32, bf16", "'fp16'"]),
        (dict(max_steps=1, tables_state="bf16"), ["tables_state bf16", "tables is device"]),
        (dict(max_steps=1, val_data="a.txt", val_fraction=0.1), ["val_data", "val_fraction"]),
        (dict(max_steps=1, seed=-1), ["seed", "-1"]),
        (dict(max_steps=1, seed=2**63), ["seed", str(2**63)]),
        (dict(max_steps=1, tensorboard="yes"), ["tensorboard", "'yes'"]),
        (dict(max_steps=1, model=7), ["model", "7"]),
        (dict(max_steps=1, keep=None), ["keep", "None"]),
    ],
)
def test_a_bad_training_setting_is_refused_by_name(values, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert all(word in str(caught.value) for word in words)


def test_numbers_take_their_type_where_nothing_is_lost():
    config = TrainConfig(max_steps=3.0, lr_init="6e-4", grad_clip=1)
    assert (config.max_steps, config.lr_init, config.grad_clip) == (3, 6e-4, 1.0)
    assert type(config.max_steps) is int
    assert type(config.grad_clip) is float


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (96, 1), (97, 2), (960, 10)])
def test_tokens_become_whole_steps(tokens, steps):
    config = TrainConfig(max_tokens=tokens, micro_bsz=2, accumulate=3, ctx_len=16)
    assert config.tokens_per_step == 96
    assert config.total_steps == steps


def test_steps_of_a_mini_epoch():
    assert TrainConfig(max_steps=1, micro_bsz=16, accumulate=2).steps_per_mini_epoch == MINI_EPOCH // 32 == 1260
    assert TrainConfig(max_steps=1, micro_bsz=50000).steps_per_mini_epoch == 1


def test_yaml_gives_an_equal_config(tmp_path):
    config = TrainConfig(
        model=ModelConfig(**SMALL, ffn_dim=50), data="a: b #.txt", max_tokens=10**12, adam_eps=1e-18, lr_init=3e-7,
        sample_prompt="'quoted'\nü", seed=2**62, tensorboard=True,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_a_memory_may_be_given_as_a_rosa_and_comes_back_from_yaml(tmp_path):
    preset = RosaConfig.preset("memory")
    wide = dataclasses.replace(preset, window=1000, end=0)
    for given, memory in (
        (dict(memory="memory"), preset),
        (dict(rosa="memory"), preset),
        (dict(rosa="memory", memory="memory"), preset),
        (dict(memory=dict(window=1000, end=0)), wide),  # what is not said is as in the preset
        (dict(rosa=wide), wide),
        (dict(rosa=dict(source="token", scope="stream", no_match="zero", grad="none", max_match=64)), preset),
    ):
        config = ModelConfig(**SMALL, **given)
        assert (config.memory, config.rosa) == (memory, None)
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert config.changed(n_embd=64).memory == memory
        training = TrainConfig(model=config, max_steps=1)
        (tmp_path / "c.yaml").write_text(training.to_yaml())
        assert TrainConfig.from_yaml(tmp_path / "c.yaml") == training
    (tmp_path / "c.yaml").write_text("max_steps: 1\nmodel: {variant: v8, memory: {window: 1000, end: 0}}\n")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml").model.memory == wide
    lm = ModelConfig(**SMALL, variant="rosa-lm", rosa="memory")
    assert (lm.rosa, lm.memory) == (RosaConfig.preset("qkv-1bit"), preset)
    both = ModelConfig(**SMALL, rosa="qkv-4bit", memory="memory")
    assert (both.rosa, both.memory) == (RosaConfig.preset("qkv-4bit"), preset)
    assert ModelConfig(**SMALL).memory is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(rosa="memory", memory=dict(window=5)), "rosa and memory are both a ROSA memory, and not the same one"),
        (dict(memory="qkv-1bit"), "memory: wanted a ROSA of scope stream, got scope sample; give memory"),
        (dict(memory="memori"), "no ROSA preset 'memori'.*Did you mean 'memory'"),
        (dict(memory=5), "memory: wanted RosaConfig or nothing, got 5"),
        (dict(memory=dict(windows=5)), "rosa: unknown key 'windows'.*window"),
        (dict(memory=dict(source="qkv")), "rosa, scope: a stream is one of token ids; source is qkv"),
        (dict(memory=dict(scope="documents")), "rosa, scope: wanted one of sample, stream, got 'documents'"),
        (dict(memory=dict(max_match=None)), "rosa, max_match: of a stream wanted 1 to 255, got None"),
        (dict(memory=dict(max_match=256)), "rosa, max_match: of a stream wanted 1 to 255, got 256"),
        (dict(memory=dict(n_matches=0)), "rosa, n_matches: of a stream wanted 1 to 8, got 0"),
        (dict(memory=dict(n_matches=9)), "rosa, n_matches: of a stream wanted 1 to 8, got 9"),
        (dict(memory=dict(n_matches=True)), "n_matches: wanted int, got True"),
        (dict(memory=dict(window=0)), "rosa, window: of a stream wanted 1 to 2147483647, got 0"),
        (dict(memory=dict(end=-1)), "rosa, end: of a stream wanted 0 to 2147483647, got -1"),
        (dict(rosa=dict(no_match="zero", window=5)), "rosa, window: only a ROSA of scope stream has one"),
        (dict(rosa=dict(no_match="zero", end=5)), "rosa, end: only a ROSA of scope stream has one"),
    ],
)
def test_a_memory_that_cannot_be_is_refused_by_field(values, words):
    with pytest.raises(ConfigError, match=f"^[^\n]*{words}[^\n]*$"):
        ModelConfig(**SMALL, **values)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1\n- 2\n",
        b"model: [1, 2",
        b"\xff\xfe",
        b"a: 2026-13-40",
        b"a: !!python/object:os.system x",
        b"just text",
    ],
    ids=["empty", "list", "cut", "encoding", "date", "object", "text"],
)
def test_a_file_that_is_no_config_is_refused_by_path(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="x.yaml"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="missing.yaml"):
        read_yaml(tmp_path / "missing.yaml")


def test_on_and_off_in_yaml_are_what_they_say(tmp_path):
    lines = "max_steps: 1\ncompile: off\ngrad_checkpoint: on\nmodel: {variant: v8, deep_embed_4x: yes}\n"
    (tmp_path / "c.yaml").write_text(lines)
    config = TrainConfig.from_yaml(tmp_path / "c.yaml")
    assert (config.compile, config.grad_checkpoint, config.model.deep_embed_4x) == ("off", True, True)
    assert TrainConfig.from_yaml(tmp_path / "c.yaml").to_yaml() == config.to_yaml()
    (tmp_path / "c.yaml").write_text("max_steps: 1\ncompile: no\n")
    with pytest.raises(ConfigError, match="compile: wanted str, got False"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")


def test_configs_are_frozen_and_every_field_is_documented():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layer = 3
    for cls in (ModelConfig, RosaConfig, FinetuneConfig, TrainConfig):
        for field in dataclasses.fields(cls):
            assert 10 < len(field.metadata["doc"]) < 100
            assert setting_type(cls, field.name)[0]


def test_every_error_is_a_heron_error():
    assert issubclass(UnknownKeyError, ConfigError)
    assert issubclass(ConfigError, HeronError)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(method="state", adapter=dict(rank=4)), "adapter: belongs to method lora, got method state"),
        (dict(method="ful"), "Did you mean 'full'"),
        (dict(loss="answers"), "loss: wanted one of assistant, all"),
        (dict(pack="yes"), "pack: wanted one of on, off"),
        (dict(template="chatml"), "wanted rwkv or a FILE.jinja"),
        (dict(mix="old.txt"), "wanted FILE:SHARE"),
        (dict(mix="old.txt:1"), "wanted FILE:SHARE"),
        (dict(mix=":0.1"), "wanted FILE:SHARE"),
        (dict(epochs=0), "epochs: wanted at least 1"),
        (dict(show=-1), "show: wanted at least 0"),
        (dict(metod="full"), "Did you mean 'method'"),
    ],
)
def test_bad_settings_of_fine_tuning_say_what_was_wanted(values, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        TrainConfig(finetune=values)


def test_settings_of_fine_tuning_survive_a_file(tmp_path):
    config = TrainConfig(finetune=FinetuneConfig(mix="a:b.txt:0.1", pack="off", epochs=2))
    assert (config.finetune.mix_data, config.finetune.mix_share) == ("a:b.txt", Fraction(1, 10))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    (tmp_path / "c.yaml").write_text("finetune: {pack: on}\nmax_steps: 3\n")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml").finetune == FinetuneConfig()
    with pytest.raises(ConfigError, match="keeps the base's vocabulary"):
        TrainConfig(finetune=FinetuneConfig(), tokenizer="bpe:300")
    with pytest.raises(ConfigError, match="exactly one of max_steps and max_tokens"):
        TrainConfig(finetune=FinetuneConfig(), max_steps=1, max_tokens=1)
