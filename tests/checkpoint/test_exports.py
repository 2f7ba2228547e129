"""What goes along with weights: tokenizer, end of a document, chat template, generation config, card and licence."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import warnings
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import heron
from heron import cli, tokenizer
from heron.checkpoint import beside, card, vocabulary
from heron.commands.convert import convert
from heron.config import TrainConfig
from heron.errors import ConfigError
from heron.generation import chat

TEXT = "Hé llo  wörld,\n\n123 世界 <|endoftext|"
FOLDERS = ("hf", "safetensors")
FILES = {"README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def late_end(path):
    """A byte-level tokenizer.json whose end of a document is id 256, and id 0 the letter "!"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)} | {"<|endoftext|>": 256}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))


@pytest.fixture(scope="module")
def home(tmp_path_factory, random_model):
    """Tokenizers t.json (no merges, the end behind) and b.json (merges, the end before), w.pth of 300 ids."""
    home = tmp_path_factory.mktemp("exports")
    late_end(home / "t.json")
    (home / "b.json").write_text(tokenizer.learn_bpe(["the heron and the hen " * 9], 262))
    heron.save(random_model(variant="v7", n_layer=1, n_embd=64, head_size=64, vocab_size=300), home / "w.pth")
    return home


def a_run(folder, weights, spec):
    """A run folder, as training leaves it, with weights of another place."""
    folder.mkdir()
    shutil.copy(weights, folder / "rwkv-final.pth")
    (folder / "run.lock").touch()
    config = TrainConfig(data="x.txt", tokenizer=spec, max_steps=1, out=str(folder), model="rwkv8-tiny")
    (folder / "config.yaml").write_text(config.to_yaml())
    if spec.endswith(".json"):
        shutil.copy(spec, folder / "tokenizer.json")
    return folder


SPECS = {"late": "t.json", "bpe": "b.json", "bytes": "bytes", "integers": "integers:300:7", "no end": "integers:300"}


@pytest.fixture(scope="module", params=SPECS)
def exported(request, home):
    """A run with a tokenizer, converted to a folder of each kind, to a .gguf, and from these on."""
    spec = SPECS[request.param]
    spec = str(home / spec) if spec.endswith(".json") else spec
    place = home / request.param.replace(" ", "-")
    place.mkdir()
    source = a_run(place / "run", home / "w.pth", spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in FOLDERS:
            convert(source, place / kind, format=kind)
        convert(source, place / "x.gguf")
        convert(place / "hf", place / "again", format="safetensors")
        convert(place / "x.gguf", place / "from-gguf", format="hf")
        convert(place / "again", place / "again.gguf")
    return SimpleNamespace(place=place, tokenizer=tokenizer.load(spec), name=request.param)


@pytest.mark.parametrize("kind", [*FOLDERS, "again", "from-gguf"])
def test_a_folder_holds_the_tokenizer_of_the_run_and_says_its_end(exported, kind):
    folder, eod = exported.place / kind, exported.tokenizer.eod
    is_text = exported.tokenizer.is_text
    code = {"modeling_rwkv7.py"} if kind in ("hf", "from-gguf") else set()
    assert {path.name for path in folder.iterdir()} == FILES - (set() if is_text else {"chat_template.jinja"}) | code
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        assert [said[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [eod] * 3
    if exported.name in ("late", "bpe"):
        assert (folder / "tokenizer.json").read_text() == (exported.place / "run" / "tokenizer.json").read_text()


@pytest.mark.parametrize("kind", FOLDERS)
def test_auto_tokenizer_takes_a_folder_as_it_is(exported, kind, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known = transformers.AutoTokenizer.from_pretrained(exported.place / kind, trust_remote_code=True)
    ours = exported.tokenizer
    text = TEXT if ours.is_text else "4 325 259 7  70\n0".replace("325", "25")
    assert known(text)["input_ids"] == ours.encode(text)
    assert known.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert known.eos_token_id == known.pad_token_id == ours.eod
    if ours.is_text:
        turns = [{"role": "user", "content": " Hi\r\n\n\nthere "}]
        shown = known.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert shown == f"User: {chat.cleaned(turns[0]['content'])}\n\nAssistant:"
    else:
        assert known.chat_template is None


@pytest.mark.parametrize("kind", [*FOLDERS, "x.gguf", "again", "from-gguf", "again.gguf"])
def test_what_is_exported_brings_its_tokenizer_back(exported, kind):
    found = beside.tokenizer_of(exported.place / kind)
    assert (found.vocab_size, found.eod, found.is_text) == (
        exported.tokenizer.vocab_size, exported.tokenizer.eod, exported.tokenizer.is_text,
    )  # fmt: skip
    text = TEXT if found.is_text else "4 25 259"
    assert found.encode(text) == exported.tokenizer.encode(text)


def test_a_gguf_says_what_llama_cpp_can_use(exported):
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    told = {key: field.contents() for key, field in gguf.GGUFReader(exported.place / "again.gguf").fields.items()}
    eod = exported.tokenizer.eod
    assert told["general.name"] == "again"
    assert told["general.file_type"] == 0
    assert told.get("tokenizer.ggml.eos_token_id") == told.get("tokenizer.ggml.bos_token_id") == eod
    if exported.name in ("late", "bpe"):
        tokens, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
        assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
        assert len(tokens) == len(kinds) == 300
        assert (tokens[eod], kinds[eod]) == ("<|endoftext|>", gguf.TokenType.CONTROL)
        assert (tokens[299], kinds[299]) == ("[PAD299]", gguf.TokenType.UNUSED)
    else:
        assert told["tokenizer.ggml.model"] == "none"
        assert "tokenizer.ggml.tokens" not in told
    assert ("tokenizer.chat_template" in told) == exported.tokenizer.is_text


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content | {"normalizer": {"type": "NFC"}},
        lambda content: content | {"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}},
        lambda content: content | {"pre_tokenizer": content["pre_tokenizer"] | {"use_regex": False}},
        lambda content: content | {"pre_tokenizer": None},
        lambda content: content | {"model": content["model"] | {"ignore_merges": True}},
    ],
)
def test_what_llama_cpp_would_encode_otherwise_is_not_given_to_it(home, tmp_path, change):
    pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'heron-rwkv[gguf]'")
    (tmp_path / "t.json").write_text(json.dumps(change(json.loads((home / "b.json").read_text()))))
    with pytest.warns(UserWarning, match="llama.cpp has no tokenizer like .*t.json"):
        convert(home / "w.pth", tmp_path / "x.gguf", tokenizer=str(tmp_path / "t.json"))
    found, ours = beside.tokenizer_of(tmp_path / "x.gguf"), tokenizer.load(str(tmp_path / "t.json"))
    assert found.encode("the heron") == ours.encode("the heron")
    import gguf

    assert gguf.GGUFReader(tmp_path / "x.gguf").get_field("tokenizer.ggml.model").contents() == "none"


def test_generate_takes_the_tokenizer_of_what_it_runs(exported, capsys):
    prompt = "hen" if exported.tokenizer.is_text else "4 25"
    shown = set()
    for kind in ("run", *FOLDERS, "x.gguf", "again", "from-gguf"):
        command = [
            "generate",
            str(exported.place / kind),
            "--prompt",
            prompt,
            "--max_tokens",
            "4",
            "--temperature",
            "0",
        ]
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert "assuming" not in err
        shown.add(out)
    assert len(shown) == 1


# -- where nothing tells the tokenizer, and where there is no place for it --------------------------------------------


def test_a_file_that_nothing_tells_about_is_said_to_be_assumed(random_model, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("Some text.")
    for vocab_size, said in (
        (65536, "w.pth: nothing tells its tokenizer; assuming World (--tokenizer names another)"),
        (256, ""),
    ):
        model = random_model(variant="v7", n_layer=1, n_embd=32, head_size=32, vocab_size=vocab_size)
        heron.save(model, tmp_path / "w.pth")
        for command in (
            ["generate", str(tmp_path / "w.pth"), "--prompt", "a", "--max_tokens", "1"],
            ["eval", str(tmp_path / "w.pth"), "--data", str(tmp_path / "t.txt")],
        ):
            assert cli.main(command) == 0
            err = capsys.readouterr().err
            assert said in err
            assert err.count("\n") == bool(said)
            assert cli.main([*command, "--tokenizer", "bytes"]) == 0
            assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("kind", ["run", "hf", "x.gguf"])
def test_a_file_without_a_place_for_the_tokenizer_is_said(exported, tmp_path, capsys, kind, target):
    assert cli.main(["convert", str(exported.place / kind), str(tmp_path / target)]) == 0
    out, err = capsys.readouterr()
    assert f"{target}: this file has no place for the tokenizer" in out
    assert err == ""


def test_a_tokenizer_can_be_named(home, tmp_path, capsys):
    command = ["convert", str(home / "w.pth"), str(tmp_path / "f"), "--format", "hf"]
    assert cli.main([*command, "--tokenizer", str(home / "t.json")]) == 0
    assert capsys.readouterr().err == ""
    assert beside.vocabulary_of(tmp_path / "f").eod == 256
    command[2] = str(tmp_path / "g")
    assert cli.main(command) == 0
    assert "g: nothing tells the tokenizer, so none goes along" in capsys.readouterr().err
    assert not (tmp_path / "g" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "g" / "config.json").read_text())["eos_token_id"] == 0  # as upstream closes documents


@pytest.mark.parametrize("target", ["f", "x.gguf"])
def test_the_tokenizer_of_another_model_is_refused(home, tmp_path, target):
    with pytest.raises(ConfigError, match="the tokenizer integers:301 has 301 ids, the model only 300"):
        convert(home / "w.pth", tmp_path / target, format=None if "." in target else "hf", tokenizer="integers:301")
    assert list(tmp_path.iterdir()) == []
    heron.save(heron.load(home / "w.pth"), tmp_path / "f", "safetensors", tokenizer="integers:300")
    with pytest.warns(
        UserWarning, match="tokenizer integers:300 has 300 ids, the model only 200; it does not go along"
    ):
        convert(tmp_path / "f", tmp_path / "g", format="hf", vocab_size=200)
    assert beside.vocabulary_of(tmp_path / "g") is None


def test_a_tokenizer_of_a_class_of_ones_own_is_said_to_stay_behind(home, tmp_path):
    class Own:
        spec, vocab_size, eod, is_text = "own", 300, 0, True

    with pytest.warns(UserWarning, match="no file can hold a tokenizer of the class Own"):
        heron.save(heron.load(home / "w.pth"), tmp_path / "f", "hf", tokenizer=Own())


# -- folders of others -------------------------------------------------------------------------------------------------


def test_the_files_of_anothers_folder_go_along_as_they_are(home, tmp_path):
    """Its tokenizer's settings, its template, its generation config, its card and its licence."""
    heron.save(heron.load(home / "w.pth"), tmp_path / "theirs", "hf", tokenizer=str(home / "t.json"))
    theirs = {
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        ),
        "chat_template.jinja": "{{ messages[0]['content'] }}!",
        "generation_config.json": json.dumps({"eos_token_id": [256, 10], "temperature": 0.7}),
        "README.md": "---\nlicense: mit\n---\n# Theirs\n",
        "NOTICE": "of theirs",
        "LICENSE.txt": "MIT",
    }
    (tmp_path / "theirs" / "LICENSE").unlink()
    for name, content in theirs.items():
        (tmp_path / "theirs" / name).write_text(content)
    convert(tmp_path / "theirs", tmp_path / "f", format="safetensors")
    for name in theirs.keys() - {"tokenizer_config.json"}:
        assert (tmp_path / "f" / name).read_text() == theirs[name], name
    said = json.loads((tmp_path / "f" / "tokenizer_config.json").read_text())
    assert said | json.loads(theirs["tokenizer_config.json"]) == said
    assert "chat_template" not in said or said["chat_template"] == theirs["chat_template.jinja"]
    assert not (tmp_path / "f" / "LICENSE").exists()  # theirs is there
    assert json.loads((tmp_path / "f" / "config.json").read_text())["eos_token_id"] == 256
    convert(tmp_path / "theirs", tmp_path / "v8", format="safetensors", variant="v8")  # their card is of another model
    text = (tmp_path / "v8" / "README.md").read_text()
    assert "license: mit\n" in text
    assert "variant v8" in text
    assert (tmp_path / "v8" / "LICENSE.txt").read_text() == "MIT"


def test_a_template_of_its_own_stays_through_every_format(home, tmp_path):
    """From the files beside a tokenizer.json that is named, into a folder, a .gguf, and back."""
    (tmp_path / "t").mkdir()
    shutil.copy(home / "t.json", tmp_path / "t" / "tokenizer.json")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    convert(home / "w.pth", tmp_path / "f", format="hf", tokenizer=str(tmp_path / "t" / "tokenizer.json"))
    convert(tmp_path / "f", tmp_path / "x.gguf")
    convert(tmp_path / "x.gguf", tmp_path / "g", format="safetensors")
    for folder in ("f", "g"):
        assert (tmp_path / folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}?"


@pytest.mark.parametrize("spec", ["bytes", "integers:290:7"])
def test_a_folder_whose_tokenizer_got_more_tokens_is_not_read_as_before(home, tmp_path, spec):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    heron.save(heron.load(home / "w.pth"), tmp_path / "f", "safetensors", tokenizer=spec)
    known = transformers.AutoTokenizer.from_pretrained(tmp_path / "f")
    known.save_pretrained(tmp_path / "f")
    assert beside.vocabulary_of(tmp_path / "f").spec == spec
    known.add_tokens(["<tool>"])
    known.save_pretrained(tmp_path / "f")
    found = beside.tokenizer_of(tmp_path / "f")
    assert found.encode("7 <tool>") == known("7 <tool>")["input_ids"]
    assert found.vocab_size == len(known)


def test_the_card_says_what_the_model_is(exported):
    for kind, loads in (("hf", "trust_remote_code=True"), ("safetensors", "import heron.hf")):
        text = (exported.place / kind / "README.md").read_text()
        assert text.startswith("---\nlicense: apache-2.0\n")
        eod = exported.tokenizer.eod
        for words in (
            "variant v7",
            "| 1, 64, 1 heads of 64; ffn_dim 50 |",
            f"{'none' if eod is None else f'id {eod}'} |",
            loads,
        ):
            assert words in text, words
        assert "Apache License" in (exported.place / kind / "LICENSE").read_text()


def commands_of(text):
    """The Python program and the words of the command line on a model card."""
    python, shell = re.findall(r"```\w+\n(.*?)\n```", text, re.DOTALL)
    return python, shlex.split(shell)


@pytest.mark.parametrize("name", ["a folder", 'a"quote', "a'quote", "$HOME", "back\\slash", "über"])
def test_the_commands_on_the_card_name_the_folder_as_it_is(home, name):
    integers = vocabulary.Vocabulary.of(tokenizer.load("integers:300"))
    written = card.papers(heron.load(home / "w.pth").config, 1, integers, "heron", name, {})
    python, shell = commands_of(written["README.md"].decode())
    names = [node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)]
    assert [said for said in names if said is not True] == [name, name]
    assert shell == ["heron", "generate", name, "--prompt", "1"]


def test_a_card_is_written_for_a_name_that_is_not_utf8(home):
    written = card.papers(heron.load(home / "w.pth").config, 1, None, "heron", "caf\udce9", {})
    assert "\n# caf?\n" in written["README.md"].decode()


def test_a_card_of_weights_without_a_tokenizer_loads_none(home, tmp_path):
    with pytest.warns(UserWarning, match="nothing tells the tokenizer"):
        heron.save(heron.load(home / "w.pth"), tmp_path / "f", "hf")
    python, shell = commands_of((tmp_path / "f" / "README.md").read_text())
    assert "AutoTokenizer" not in python
    assert shell == ["heron", "generate", "f", "--tokenizer", "TOKENIZER", "--prompt", "The"]


@pytest.mark.parametrize(
    ("file", "line", "ours"),
    [
        ("License.md", "license: mit", False),
        ("LICENCE", "license: other", False),
        ("copying.txt", "", False),
        ("NOTICE.md", 'license: "Apache-2.0"', True),
        ("Notice", "license:\n- mit", False),
        ("NOTICE", "license: [mit, apache-2.0]", False),
    ],
)
def test_a_licence_under_another_name_or_in_another_form_counts(home, tmp_path, file, line, ours):
    heron.save(heron.load(home / "w.pth"), tmp_path / "theirs", "hf", tokenizer="integers:300")
    (tmp_path / "theirs" / "LICENSE").unlink()
    (tmp_path / "theirs" / file).write_text("text of theirs")
    (tmp_path / "theirs" / "README.md").write_text(f"---\n{line}\n---\n# Theirs\n")
    convert(tmp_path / "theirs", tmp_path / "f", format="safetensors")
    assert (tmp_path / "f" / file).read_text() == "text of theirs"
    assert (tmp_path / "f" / "LICENSE").exists() == ours


def test_an_existing_folder_is_left_alone(home, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="f exists already"):
        convert(home / "w.pth", tmp_path / "f", format="hf", tokenizer="integers:300")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["README.md"]


def test_a_damaged_tokenizer_is_named(home, tmp_path, capsys):
    heron.save(heron.load(home / "w.pth"), tmp_path / "f", "hf", tokenizer=str(home / "t.json"))
    (tmp_path / "f" / "tokenizer.json").write_text("{")
    assert cli.main(["generate", str(tmp_path / "f"), "--prompt", "a"]) == 1
    assert "tokenizer.json: not a tokenizer.json" in capsys.readouterr().err


def test_pipelines_take_a_folder(home, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: pip install 'heron-rwkv[hf]'")
    import heron.hf  # registers the model type

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = heron.load(home / "w.pth")
    heron.save(model, tmp_path / "f", "safetensors", tokenizer=str(home / "b.json"))
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "f"))
    assert pipe.tokenizer.eos_token_id == pipe.model.generation_config.eos_token_id == 0
    (out,) = pipe("the hen", max_new_tokens=4, do_sample=False)
    ours = heron.generate(model, tokenizer.load(str(home / "b.json")), "the hen", max_tokens=4, temperature=0)
    assert out["generated_text"] == "the hen" + ours


def test_the_template_is_that_of_a_conversation():
    jinja2 = pytest.importorskip("jinja2")
    render = jinja2.Environment().from_string(vocabulary.CHAT_TEMPLATE).render
    turns = [
        {"role": "system", "content": "Be brief.\n\nNow"},
        {"role": "user", "content": "One\n\n\ntwo "},
        {"role": "assistant", "content": " An answer.\n\nAnd more\n"},
        {"role": "user", "content": "three"},
    ]
    shown = "System: Be brief.\nNow\n\nUser: One\ntwo\n\nAssistant: An answer.\n\nAnd more\n\nUser: three\n\n"
    assert render(messages=turns, add_generation_prompt=True) == shown + "Assistant:"
    assert render(messages=turns) == shown
