"""`heron merge`, and --adapter and --state of generate, chat and eval."""

from __future__ import annotations

import copy
import json
import shlex

import numpy as np
import pytest
import torch

import heron
from heron import cli, evaluate
from heron.checkpoint import adapters, save_tuned_state, tuned_state
from heron.commands import sources
from heron.config.finetune_adapter import KINDS, AdapterConfig
from heron.errors import CheckpointError
from heron.generation.decoder import ModelDecoder
from heron.model.adapters import add_adapter
from heron.model.tuned_state import TunedState
from heron.tokenizer import load as load_tokenizer

pytest.importorskip("peft", reason="needs the finetune extra: pip install 'heron-rwkv[finetune]'")

IDS = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
PROMPT = "--prompt 'A text.' --max_tokens 12 --temperature 0 --tokenizer bytes --device cpu"


@pytest.fixture
def heron_(capsys):
    """A function: the words after `heron` -> exit code, standard output, standard error."""

    def run(words):
        try:
            code = cli.main(shlex.split(words))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def tuned(random_model, tmp_path):
    """A function: kind, variant, dtype -> a base's file, an adapter's folder, and the logits with it."""

    def make(kind="lora", variant="v7", dtype=torch.float32, **settings):
        model = random_model(variant=variant, n_layer=2, vocab_size=256, **settings).to(dtype)
        heron.save(model, tmp_path / "base.pth")
        torch.manual_seed(0)
        adapter = add_adapter(model, AdapterConfig(kind, rank=4, targets="all,head"))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            logits = copy.deepcopy(model).double()(IDS)[0]
        adapters.save_adapter(adapter, tmp_path / "run" / "adapter")
        return tmp_path / "base.pth", tmp_path / "run", logits

    return make


def state_file(path, config, seed=3, base=None):
    """A tuned state in a file, of weights with the fingerprint `base`."""
    state, generator = TunedState(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_tuned_state(state, path, base)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["v7", "v8", "v8-hybrid"])
def test_a_merged_file_has_the_adapters_logits(heron_, tuned, tmp_path, kind, variant):
    base, run, logits = tuned(kind, variant)
    code, out, err = heron_(f"merge {base} {run} {tmp_path / 'out.pth'}")
    assert (code, err) == (0, "")
    assert out.endswith(f"wrote {tmp_path / 'out.pth'}: {variant} L2 C32 N16 V256, with {run} in its weights\n")
    assert (heron.load(tmp_path / "out.pth")(IDS)[0] - logits).abs().max() < 1e-5


@pytest.mark.parametrize("output", ["out.pth", "out.safetensors", "out.gguf", "folder", "folder --format hf"])
def test_a_merge_writes_every_format(heron_, tuned, tmp_path, output):
    base, run, logits = tuned(head_size=64, n_embd=128)
    code, _, err = heron_(f"merge {base} {run / 'adapter'} {tmp_path}/{output} --tokenizer bytes")
    assert code == 0
    assert err == "" or (output == "out.gguf" and "llama.cpp has no tokenizer like bytes" in err)
    assert (heron.load(tmp_path / output.split()[0])(IDS)[0] - logits).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_half_precision_is_as_good_as_rounding_the_weights(heron_, tuned, tmp_path, kind, dtype):
    in_half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    base, run, logits = tuned(kind)
    heron_(f"merge {base} {run} {tmp_path / 'exact.pth'}")
    alone = heron.load(tmp_path / "exact.pth").to(in_half).double()
    rounding = (alone(IDS)[0] - logits).abs().max()
    heron_(f"merge {base} {run} {tmp_path / 'half.pth'} --dtype {dtype}")
    merged = heron.load(tmp_path / "half.pth")
    assert merged.emb.weight.dtype == in_half
    assert (merged.double()(IDS)[0] - logits).abs().max() <= 1.01 * rounding


def test_a_base_in_bf16_may_be_widened_while_it_is_merged(heron_, tuned, tmp_path):
    base, run, logits = tuned(dtype=torch.bfloat16)
    heron_(f"merge {base} {run} {tmp_path / 'wide.pth'} --dtype fp32")
    assert (heron.load(tmp_path / "wide.pth")(IDS)[0] - logits).abs().max() < 1e-5


def test_another_base_and_a_second_merge_are_refused(heron_, tuned, random_model, tmp_path):
    base, run, _ = tuned()
    heron.save(random_model(variant="v7", n_layer=2, vocab_size=256, seed=1), tmp_path / "other.pth")
    heron_(f"merge {base} {run} {tmp_path / 'once.pth'}")
    for wrong in ("other.pth", "once.pth"):
        code, _, err = heron_(f"merge {tmp_path / wrong} {run} {tmp_path / 'out.pth'}")
        assert code == 1
        assert "it was trained on a base with fingerprint" in err
        assert "Weights that it was merged into already are others" in err
        assert not (tmp_path / "out.pth").exists()
        assert heron_(f"generate {tmp_path / wrong} --adapter {run} {PROMPT}")[0] == 1


def test_the_base_may_come_in_another_format_and_rounded_to_bf16(heron_, tuned, tmp_path):
    base, run, logits = tuned(head_size=64, n_embd=128)
    heron_(f"convert {base} {tmp_path / 'folder'} --format hf --tokenizer bytes")  # without block 0's v0, v1, v2
    heron_(f"convert {base} {tmp_path / 'half.pth'} --dtype bf16")
    for name in ("folder", "half.pth"):
        code, _, err = heron_(f"merge {tmp_path / name} {run} {tmp_path / name}.merged.pth")
        assert (code, err) == (0, "")
    assert (heron.load(tmp_path / "folder.merged.pth")(IDS)[0] - logits).abs().max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_generate_and_eval_with_an_adapter_run_the_merged_model(heron_, tuned, tmp_path, monkeypatch, kind):
    base, run, _ = tuned(kind)
    heron_(f"merge {base} {run} {tmp_path / 'merged.pth'}")
    engines, build = [], sources.Engine
    monkeypatch.setattr(
        sources, "Engine", lambda *args, **settings: engines.append(build(*args, **settings)) or engines[-1]
    )
    texts = [
        heron_(f"generate {model} {PROMPT}") for model in (f"{base} --adapter {run}", tmp_path / "merged.pth", base)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert not any(isinstance(engine._decoder, ModelDecoder) for engine in engines)
    (tmp_path / "text.txt").write_text("A text to be scored, with some words in it.")
    scores = []
    for model in (f"{base} --adapter {run}", tmp_path / "merged.pth"):
        for mode in evaluate.MODES:
            words = f"eval {model} --data {tmp_path / 'text.txt'} --tokenizer bytes --mode {mode} --device cpu"
            code, _, err = heron_(f"{words} --json {tmp_path / 's.json'}")
            assert (code, err) == (0, "")
            [result] = json.loads((tmp_path / "s.json").read_text())
            assert result.get("adapter") == (str(run) if "--adapter" in words else None)
            scores.append(result["loss"])
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)


def test_every_sequence_starts_from_a_tuned_state(heron_, random_model, tmp_path):
    model = random_model(variant="v8", n_layer=2, vocab_size=256)
    heron.save(model, tmp_path / "x.pth")
    file = state_file(tmp_path / "state.pth", model.config)
    state = tuned_state(file, model.config)
    engine = heron.Engine(model, load_tokenizer("bytes"), rows=2, start=state)
    for prompt in ("A", "A longer prompt of the text."):
        ids = load_tokenizer("bytes").encode(prompt)
        for _ in range(2):  # a place that was used before, too
            sequence = engine.open(ids)
            logits, after = model(torch.tensor([ids]), state)
            [(_, token)] = engine.step()
            assert token.logprob == pytest.approx(float(logits[0, -1].log_softmax(0)[token.id]), abs=1e-4)
            assert engine.likeliest(heron.generation.Snapshot(None, tuple(ids)), 1)[0][0] == int(logits[0, -1].argmax())
            read = engine.snapshot(sequence).state
            for one, other in zip(read.to_list(), after.to_list(), strict=True):
                assert torch.allclose(one, other, atol=1e-5)
            engine.close(sequence)
    out = [heron_(f"generate {tmp_path / 'x.pth'} {PROMPT} {more}") for more in ("", f"--state {file}")]
    assert out[0] != out[1]
    assert out[1] == heron_(f"generate {tmp_path / 'x.pth'} {PROMPT} --state {tmp_path}")
    trials = heron_(f"generate {tmp_path / 'x.pth'} {PROMPT} --state {file} --trials 2")[1]
    assert trials.count(out[1][1].strip("\n")) == 2


def test_a_tuned_state_fits_its_base_alone_also_where_that_is_quantized_or_served(heron_, random_model, tmp_path):
    for seed, name in enumerate(("base.pth", "other.pth")):
        model = random_model(seed, variant="v7", n_layer=2, n_embd=64, ffn_dim=128, vocab_size=256)
        heron.save(model, tmp_path / name)
    (tmp_path / "text.txt").write_text("A text.")
    file = state_file(
        tmp_path / "state.pth", model.config, base=adapters.base_fingerprint(heron.load(tmp_path / "base.pth"))
    )
    score = f"--data {tmp_path / 'text.txt'} --tokenizer bytes --device cpu"
    for verb, more in (("generate", PROMPT), ("eval", score)):
        code, _, err = heron_(f"{verb} {tmp_path / 'base.pth'} {more} --state {file} --weights int8")
        assert (code, err) == (0, "")
    serve = f"serve {tmp_path / 'other.pth'} --port 0 --with_state a={file}"
    for words in (f"generate {tmp_path / 'other.pth'} {PROMPT} --state {file}", serve, f"{serve} --weights int8"):
        code, _, err = heron_(words)
        assert code == 1
        assert "it was tuned on a base with fingerprint" in err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["v7", "v8", "v8-hybrid"])
def test_evaluation_starts_from_a_tuned_state_in_both_modes(random_model, tmp_path, variant, dtype):
    model = random_model(variant=variant, n_layer=2, vocab_size=256)
    file = state_file(tmp_path / "state.pth", model.config)
    tokens = IDS[0].repeat(2).numpy().astype(np.uint16)
    start = tuned_state(file, model.config)
    wanted = evaluate.evaluate(model, tokens, 6).loss
    losses = [evaluate.evaluate(model, tokens, 6, mode=mode, start=start).loss for mode in evaluate.MODES]
    with torch.no_grad():
        total = 0.0
        for i in range(0, 23, 6):
            x = torch.from_numpy(tokens[i : i + 7].astype(np.int64))
            logits = model(x[None, :-1], start)[0][0].log_softmax(-1)
            total -= float(logits.gather(1, x[1:, None]).sum())
    assert losses == pytest.approx([total / 23] * 2, abs=1e-5)
    assert abs(losses[0] - wanted) > 0.01
    if dtype == "bf16":
        half = tuned_state(file, model.config, torch.bfloat16)
        model.bfloat16()
        rough = [evaluate.evaluate(model, tokens, 6, mode=mode, start=half).loss for mode in evaluate.MODES]
        assert rough == pytest.approx(losses, abs=0.1)


def test_evaluation_with_rosa_memory_starts_from_a_tuned_state_in_both_modes(random_model, tmp_path):
    model = random_model(variant="v8", n_layer=2, vocab_size=256, memory=heron.config.RosaConfig.preset("memory"))
    start = tuned_state(state_file(tmp_path / "state.pth", model.config), model.config)
    tokens = IDS[0].repeat(3).numpy().astype(np.uint16)
    losses = [evaluate.evaluate(model, tokens, 9, mode=mode, start=start).loss for mode in evaluate.MODES]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - evaluate.evaluate(model, tokens, 9).loss) > 0.01
    engine = heron.Engine(model, load_tokenizer("bytes"), start=start)
    ids = tokens.tolist()
    engine.open(ids)
    [(_, token)] = engine.step()
    logits = model(torch.tensor([ids]), start)[0][0, -1]
    assert token.logprob == pytest.approx(float(logits.log_softmax(0)[token.id]), abs=1e-4)


def test_a_chat_starts_from_a_tuned_state_and_again_after_reset(random_model, tmp_path):
    model = random_model(variant="v7", n_layer=2, vocab_size=256)
    start = tuned_state(state_file(tmp_path / "state.pth", model.config), model.config)
    engine = heron.Engine(model, load_tokenizer("bytes"), start=start)
    plain = heron.Engine(model, load_tokenizer("bytes"))
    from heron.generation.chat import Chat

    first, other = (Chat(one, heron.generation.Sampling(0.0), max_tokens=8) for one in (engine, plain))
    answer = "".join(first.say("Hello"))
    assert answer != "".join(other.say("Hello"))
    first.reset()
    assert "".join(first.say("Hello")) == answer


def test_a_tuned_state_stays_beside_converted_weights_and_in_other_formats(heron_, random_model, tmp_path):
    model = random_model(variant="v7", n_layer=2, vocab_size=256)
    state_file(tmp_path / "state.pth", model.config)
    tensors = {**model.state_dict(), **torch.load(tmp_path / "state.pth")}
    torch.save(tensors, tmp_path / "both.pth")
    code, _, _ = heron_(f"convert {tmp_path / 'both.pth'} {tmp_path / 'both.safetensors'}")
    assert code == 0
    first, other = (tuned_state(tmp_path / name, model.config) for name in ("state.pth", "both.safetensors"))
    assert torch.equal(model(IDS, first)[0], heron.load(tmp_path / "both.safetensors")(IDS, other)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_info_describes_an_adapter(heron_, tuned, kind):
    base, run, _ = tuned(kind)
    code, out, _ = heron_(f"info {run}")
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["what"] == f"adapter {run / 'adapter'}"
    assert facts["kind"].split(",")[0] == kind
    assert facts["rank"] == ("4" if kind == "miss" else "4, alpha 4")
    assert facts["targets"] == "att.key, att.output, att.receptance, att.value, ffn.key, ffn.value, head"
    assert facts["base"] == adapters.base_fingerprint(heron.load(base))
    n = sum(part.numel() for part in adapters.read_adapter(run).tensors.values())
    assert facts["parameters"] == f"{n:,}"
    assert facts["group"].startswith("adapter: lr 0.0001 unless set, no decay: ")


def test_info_describes_a_tuned_state(heron_, random_model, tmp_path):
    state_file(tmp_path / "state.pth", random_model(variant="v7", n_layer=2).config)
    code, out, _ = heron_(f"info {tmp_path / 'state.pth'}")
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["what"] == f"tuned initial state {tmp_path / 'state.pth'}"
    assert facts["sizes"] == "n_layer 2, 2x16x16 of each layer (heads, values, keys)"
    assert facts["parameters"] == "1,024"
    assert facts["group"].startswith("state: lr 0.01 unless set, no decay: ")


def test_bad_adapters_are_one_line(heron_, tuned, tmp_path):
    base, run, _ = tuned()
    folder = run / "adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())

    def said(change=None, words=None):
        if change is not None:
            (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        code, _, err = heron_(words or f"merge {base} {run} {tmp_path / 'out.pth'}")
        assert code == 1
        assert err.count("\n") == 1
        assert not (tmp_path / "out.pth").exists()
        return err

    assert "base.pth: no adapter here; wanted a folder with adapter_config.json" in said(
        words=f"merge {base} {base} x.pth"
    )
    assert "peft_type 'OFT': heron reads LORA and MISS" in said({"peft_type": "OFT"})
    for start in ("eva", "pissa"):  # peft's own PiSSA has another base beside it
        assert f"init_lora_weights '{start}'" in said({"init_lora_weights": start})
    assert "it uses layer_replication" in said({"layer_replication": [[0, 1], [0, 1]]})
    assert "it uses megatron_config" in said({"megatron_config": {"a": 1}, "megatron_core": "antigravity"})
    assert "rank_pattern, alpha_pattern: wanted names of modules, got '(a+)+'" in said({"rank_pattern": {"(a+)+": 3}})
    assert "r: wanted a rank from 1 to 65536, got 'many'" in said({"r": "many"})
    assert "r: wanted a rank from 1 to 65536, got 1000000000000" in said({"r": 10**12})
    assert "not an adapter of this model" in said({"modules_to_save": 3})
    assert "lora_A.weight: wanted (5, 32) on this model, got (4, 32)" in said({"r": 5})
    assert "wanted nothing on this model, got" in said({"target_modules": ["key"]})
    assert "not an adapter of this model: " in said({"target_modules": ["q_proj"]})
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json: damaged" in said()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    assert "adapter_model.safetensors" in said()
    weights.unlink()
    assert "only adapters in safetensors are read" in said()
    weights.write_bytes(content)
    assert heron_(f"merge {base} {run} {base}")[0] == 1  # exists


def test_an_adapter_is_written_whole_or_not_at_all(random_model, tmp_path):
    model = random_model(variant="v7", n_layer=2)
    adapter = add_adapter(model, AdapterConfig(rank=4))
    adapters.save_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="exists already"):
        adapters.save_adapter(adapter, tmp_path / "adapter")
    model.blocks[0].att.key.lora_A["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="lora_A.weight holds NaN or infinity"):
        adapters.save_adapter(adapter, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
