"""Tokenizers of the kinds that Heron reads, small, and a text that all of them can write."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import heron.tokenizer

SENTENCES = [
    "the grey heron waits at the river",
    "the water is still. the heron waits, and 12 herons wait",
    "User: is it there?\n\nAssistant: it is\n\nUser: where?",
]
WORDS = sorted({word.strip(".,:?") for sentence in SENTENCES for word in sentence.split()})


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([*SENTENCES * 3, "it is\n\n", "there\n\n"], trainer)
    return tokenizer


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    """As of GPT-2 and GPT-NeoX; `add_prefix_space`: as of RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )


def llama() -> Tokenizer:
    """As of Llama 2: the normalizer puts a space in front, bytes stand for what the words lack."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz.",
        "he",
        "▁the",
        "th",
        "er",
    ]:
        vocab[piece] = len(vocab)
    vocab["the"] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("h", "e"), ("e", "r")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """As of T5 and newer SentencePiece files: the pre-tokenizer puts the space in front."""
    vocab = {"<s>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁w", "▁t", "▁th"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "w"), ("▁", "t"), ("▁t", "h")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<s>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    """As of mT5 or XGLM: the likeliest cut, and a space in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = list("abcdefghijklmnopqrstuvwxyzAU0123456789.,:?\n")
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=90, special_tokens=["<eos>"], initial_alphabet=alphabet, unk_token="<eos>", show_progress=False
        ),
    )


def word_piece() -> Tokenizer:
    """As of BERT: lower case, spaces are not kept, pieces inside a word are marked."""
    vocab = {"[UNK]": 0, "[EOS]": 1}
    for piece in [
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz0123456789.,:?",
        *(f"##{letter}" for letter in "abcdefghiklmnoprstvwxyz"),
    ]:
        vocab.setdefault(piece.lower(), len(vocab))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


FILES = {
    "byte level": byte_level,
    "byte level, space in front": functools.partial(byte_level, add_prefix_space=True),
    "llama": llama,
    "metaspace": metaspace,
    "unigram": unigram,
    "word piece": word_piece,
}
KINDS = ("world", "bytes", *FILES)
KEEP_ALL = ("world", "bytes", "byte level", "llama", "metaspace")  # decode(encode(text)) == text


@functools.cache
def load(kind: str) -> heron.tokenizer.Tokenizer:
    """The tokenizer of a kind, or of any name that `heron.tokenizer.load` takes."""
    if kind not in FILES:
        return heron.tokenizer.load(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        FILES[kind]().save(str(path))
        return heron.tokenizer.load(str(path))
