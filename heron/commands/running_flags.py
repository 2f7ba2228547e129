"""The flags of verbs that run a model: which one, what is done to its weights, where it runs and how it draws."""

from __future__ import annotations

import argparse

from heron.commands import flag_values

MEMORY = "documents that ROSA memory looks into, which heron memory build wrote; default: none"
TOKENIZERS = "world, bytes, integers:V[:E] (E ends a document), a tokenizer.json"


def add_running(parser: argparse.ArgumentParser, max_tokens: int, top_p: float, penalty: float) -> None:
    """What generate and chat have in common, with the defaults that differ."""
    add_source(parser)
    parser.add_argument("--max_tokens", type=int, default=max_tokens, help="stop after this many tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="randomness; 0: always the likeliest token")
    parser.add_argument(
        "--top_p", type=float, default=top_p, help="keep the likeliest tokens, up to this much probability"
    )
    parser.add_argument("--top_k", type=int, default=0, help="keep this many tokens; 0: all")
    parser.add_argument("--presence_penalty", type=float, default=penalty, help="taken off the logit of written tokens")
    parser.add_argument("--frequency_penalty", type=float, default=penalty, help="the same, each time it was written")
    parser.add_argument("--penalty_decay", type=float, default=0.996, help="both fade by this factor with each token")
    digits_help = "let the frequency penalty count space, tab and digits, which it leaves out otherwise"
    parser.add_argument("--count_digits", action="store_true", help=digits_help)
    parser.add_argument("--seed", type=flag_values.seed, default=0, help="same seed, same text")


def add_source(parser: argparse._ActionsContainer) -> None:
    """What generate, chat and serve have in common: the model and where it runs."""
    parser.add_argument("--tokenizer", help=f"{TOKENIZERS}; default: the run's own")
    parser.add_argument("--eod", help="token or id that ends a document; default: as the tokenizer's files say")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto")
    parser.add_argument("--dtype", help="run in fp32, bf16 or fp16; default: as in the file")
    parser.add_argument("--tables", default="device", help="where DeepEmbed tables are: device, host or disk")
    parser.add_argument("--tables_file", help="of --tables disk; written where missing; default: beside the weights")
    states_help = "bf16: what a sequence remembers takes half, rounded at random; on a GPU"
    parser.add_argument("--states", choices=("fp32", "bf16"), default="fp32", help=states_help)
    parser.add_argument("--memory", metavar="FILE", help=MEMORY)
    add_weights(parser)


def add_weights(parser: argparse._ActionsContainer) -> None:
    """What is done to the weights of a file before they run, and what fine-tuning left beside them."""
    parser.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="the large matrices in 8 or 4 bits, a scale for 64 weights; v7 and v8; default: as in the file",
    )
    adapter_help = "a fine-tuning run, or the folder of an adapter, to add to the weights in memory; default: none"
    parser.add_argument("--adapter", metavar="DIR", help=adapter_help)
    state_help = "a tuned initial state, which every sequence starts from, or the run that made it; default: zeros"
    parser.add_argument("--state", metavar="FILE", help=state_help)
    add_rosa(parser)


def add_rosa(parser: argparse._ActionsContainer) -> None:
    """What a bare file of weights cannot say."""
    names = "qkv-1bit, qkv-4bit, memory"
    parser.add_argument(
        "--rosa", type=flag_values.rosa, help=f"how the ROSA in a bare file works: {names}; default: as its run"
    )
