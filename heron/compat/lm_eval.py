"""Heron models in EleutherAI's lm-evaluation-harness: ``pip install 'heron-rwkv[eval]'``.

    import heron.compat.lm_eval, lm_eval                                    # registers the model type "heron"
    lm_eval.simple_evaluate("heron", model_args="pretrained=x.pth", tasks=["my_task"], task_manager=...)

or, with a model that is loaded, ``simple_evaluate(HeronLM(model, tokenizer), ...)``. The harness finds types of models
of other packages only after they are imported; its command line, with this one, is

    python -m heron.compat.lm_eval run --model heron --model_args pretrained=x.pth,tokenizer=world --tasks my_task

Tasks of the harness come from the network; a local task is a YAML file with ``dataset_path: json`` in a folder that a
``TaskManager(include_path=folder)`` or ``--include_path`` is given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch

from heron import machine
from heron.checkpoint import load
from heron.data.template import Message, RwkvTemplate
from heron.errors import ConfigError, HeronError, did_you_mean
from heron.evaluate import loglikelihoods
from heron.generation import Engine, Request, Sampling
from heron.model import RWKV
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_pair

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ConfigError(f"heron.compat.lm_eval needs lm-eval ({error}). Type: pip install 'heron-rwkv[eval]'") from None

_TOKENS_AT_ONCE = 1024
_ARGUMENTS = ("pretrained", "tokenizer", "dtype", "device", "rosa", "batch_size", "max_batch_size")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's order
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "min_p": 0, "use_cache": True}
_ROLES = ("system", "user", "assistant")


@register_model("heron")
class HeronLM(LM):
    """A model for the harness. Every text starts from the end of a document, as in training.

    A context and its continuation are encoded as a whole and cut as
    :func:`heron.tokenizer.continuation.encode_pair` says; spaces at the border go to the continuation before that,
    as in the harness's own models.

    Args:
        model: an RWKV, on the device to run on.
        tokenizer: its tokenizer.
        rows: sequences that `generate_until` writes at a time.

    Raises:
        ConfigError: a tokenizer without end of document.
    """

    def __init__(self, model: RWKV, tokenizer: Tokenizer, rows: int = 8):
        super().__init__()
        if tokenizer.eod is None:
            raise ConfigError(f"tokenizer {tokenizer.spec}: has no end-of-document token, from which every text starts")
        self._model, self._tokenizer, self._rows, self._eod = model, tokenizer, rows, tokenizer.eod
        self._device = model.emb.weight.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> HeronLM:
        """The model that `model_args` name.

        Args:
            arg_dict: pretrained (a weights file, a checkpoint or a run folder), and perhaps tokenizer, dtype (fp32,
                bf16, fp16), device (cpu, cuda, cuda:N, auto), rosa (qkv-1bit, qkv-4bit).
            additional_config: batch_size: sequences that `generate_until` writes at a time; "auto": 8; and a device.

        Raises:
            ConfigError: another argument, or a value that cannot be.
            HeronError: what `heron.load` raises.
        """
        from heron.commands.sources import tokenizer_of  # which knows where the tokenizer of a run lies
        from heron.config import RosaConfig

        settings = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if not torch.cuda.is_available() and settings.get("device") == "cuda:0":
            del settings["device"]  # what the harness's command line gives where nobody asked for a device
        settings |= arg_dict
        for name in settings:
            if name not in _ARGUMENTS:
                near = did_you_mean(name, _ARGUMENTS)
                raise ConfigError(f"model_args: no {name!r}.{near} There are {', '.join(_ARGUMENTS)}")
        if "pretrained" not in settings:
            raise ConfigError("model_args: wanted pretrained=FILE, a weights file, a checkpoint or a run folder")
        dtype = settings.get("dtype", "auto")
        if dtype != "auto" and dtype not in machine.DTYPES:
            raise ConfigError(f"dtype: wanted {', '.join(machine.DTYPES)}, got {dtype!r}")
        rows = settings.get("batch_size", "auto")
        if not str(rows).startswith("auto") and not (str(rows).isdecimal() and int(rows)):
            raise ConfigError(f"batch_size: wanted a whole number from 1 on, or auto, got {rows!r}")
        path, rosa = str(settings["pretrained"]), settings.get("rosa")
        model = load(path, machine.DTYPES.get(dtype), rosa=rosa and RosaConfig.preset(rosa))
        tokenizer = tokenizer_of(path, settings.get("tokenizer"), model.config.vocab_size)
        device = machine.choose_device(settings.get("device", "auto")).value
        return cls(model.to(device), tokenizer, 8 if str(rows).startswith("auto") else int(rows))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HeronLM:
        """The same from ``"pretrained=x.pth,tokenizer=world"``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding writes it) of each (context, continuation).

        A continuation that is no text at all has probability 1.
        """
        pairs = []
        for request in requests:
            context, continuation = cast(tuple[str, str], request.args)
            kept = context.rstrip()
            before, ids = encode_pair(self._tokenizer, kept, context[len(kept) :] + continuation)
            pairs.append(([self._eod, *before], ids))
        scores = iter(loglikelihoods(self._model, [pair for pair in pairs if pair[1]]))
        return [next(scores)[:] if ids else (0.0, True) for _, ids in pairs]  # plain tuples

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, read once from its start to its end however long it is."""
        return [self._whole(self._ids(request.args[0])) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context.

        Settings: until (stop texts; null: none), max_gen_toks (256) or one of its other names, do_sample, temperature,
        top_p, top_k, presence_penalty, frequency_penalty. As in the harness, tokens are drawn where do_sample is true,
        or where it is not given and the temperature is above 0; else the likeliest is taken.

        Raises:
            ConfigError: another setting, unless its value changes nothing.
        """
        wanted = []
        for request in requests:
            context, given = cast(tuple[str, dict[str, Any]], request.args)
            settings = {name: value for name, value in given.items() if value is not None}
            until = settings.pop("until", [])
            lengths = [settings.pop(name, None) for name in _LENGTHS]
            max_tokens = next((int(length) for length in lengths if length is not None), 256)
            is_random = settings.pop("do_sample", settings.get("temperature", 0) > 0)
            sampling = {name: type(usual)(settings.pop(name, usual)) for name, usual in _SAMPLING.items()}
            unknown = [name for name, value in settings.items() if _NEUTRAL.get(name) != value]
            if unknown:
                raise ConfigError(f"generate_until: {', '.join(unknown)}: not a setting here; drop it from the task")
            stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
            if not is_random:
                sampling["temperature"] = 0.0
            wanted.append(Request(self._ids(context), max_tokens, Sampling(**sampling), stop))
        texts = [""] * len(wanted)
        for piece in Engine(self._model, self._tokenizer, self._rows).run(wanted):
            texts[piece.request] += piece.text
        return texts

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches of requests apart by."""
        return f"heron-{self._tokenizer.spec}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template of `apply_chat_template`, for the harness's records.

        Raises:
            ConfigError: a template by name; there is one.
        """
        if isinstance(chat_template, str):
            raise ConfigError(f"apply_chat_template: no template {chat_template!r}; there is one, so give no name")
        return self.apply_chat_template([{"role": role, "content": f"{{{role}}}"} for role in _ROLES])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text, in the template that RWKV models are trained with (see :mod:`heron.data.template`).

        Args:
            chat_history: of roles system, user and assistant.
            add_generation_prompt: end with ``Assistant:``; else the last message goes on, nothing behind it.

        Raises:
            ConfigError: another role, or an answer with text in it that ends a turn.
        """
        for message in chat_history:
            if message["role"] not in _ROLES:
                raise ConfigError(f"apply_chat_template: wanted a role of {', '.join(_ROLES)}, got {message['role']!r}")
        try:
            spans = RwkvTemplate().spans([Message(one["role"], one["content"]) for one in chat_history])
        except ValueError as error:
            raise ConfigError(f"apply_chat_template: {error}") from None
        text = "".join(span.text for span in spans)
        return f"{text}Assistant:" if add_generation_prompt else text.removesuffix("\n\n")

    def _ids(self, text: str) -> list[int]:
        return [self._eod, *self._tokenizer.encode(text)]

    @torch.inference_mode()
    def _whole(self, ids: Sequence[int]) -> float:
        total, state, device = 0.0, None, next(self._model.parameters()).device
        for start in range(0, len(ids) - 1, _TOKENS_AT_ONCE):
            piece = torch.tensor([ids[start : start + _TOKENS_AT_ONCE + 1]], device=device)
            hidden, state, recalled = self._model.read(piece[:, :-1], state)
            mean = self._model.head_loss(hidden, piece[:, 1:], recalled)
            total -= float(mean.double()) * (piece.shape[1] - 1)
        return total


def main() -> None:
    """The harness's command line, where ``--model heron`` is known. Errors of ours are one line and exit code 1."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except HeronError as error:
        sys.exit(f"heron: {error}")


if __name__ == "__main__":
    main()
