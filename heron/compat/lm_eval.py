"""Heron models in EleutherAI's lm-evaluation-harness: ``pip install 'heron-rwkv[eval]'``.

    from lm_eval import simple_evaluate
    from heron.compat.lm_eval import HeronLM
    simple_evaluate(HeronLM(heron.load("x.pth"), heron.tokenizer.load("world")), tasks=["my_task"], task_manager=...)

Tasks of the harness come from the network; a local task is a YAML file with ``dataset_path: json`` in a folder that a
``TaskManager(include_path=folder)`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heron import ops
from heron.errors import ConfigError
from heron.evaluate import loglikelihoods
from heron.generation import Engine, Request, Sampling
from heron.model import RWKV
from heron.tokenizer import Tokenizer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ImportError as error:
    raise ConfigError(f"heron.compat.lm_eval needs lm-eval ({error}). Type: pip install 'heron-rwkv[eval]'") from None

_TOKENS_AT_ONCE = 1024


class HeronLM(LM):
    """A model for the harness. Every text starts from the end of a document, as in training.

    A context and its continuation are encoded apart, spaces at the border going to the continuation: the same ids on
    both sides whatever the continuation is.

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
        self._model, self._tokenizer, self._rows = model, tokenizer, rows

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding writes it) of each (context, continuation)."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            kept = context.rstrip()
            continuation = context[len(kept) :] + continuation
            pairs.append((self._ids(kept), self._tokenizer.encode(continuation)))
        return [tuple(score) for score in loglikelihoods(self._model, pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, read once from its start to its end however long it is."""
        return [self._whole(self._ids(request.args[0])) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context. Settings: until (stop texts), max_gen_toks, do_sample, temperature, top_p.

        Raises:
            ConfigError: another setting.
        """
        wanted = []
        for request in requests:
            context, settings = request.args
            settings = dict(settings)
            until = settings.pop("until", [])
            max_tokens = settings.pop("max_gen_toks", 256)
            temperature, top_p = settings.pop("temperature", 1.0), settings.pop("top_p", 1.0)
            if not settings.pop("do_sample", temperature not in (0, 1.0)):
                temperature = 0
            if settings:
                raise ConfigError(f"generate_until: {', '.join(settings)}: not a setting here; drop it from the task")
            stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
            wanted.append(Request(self._ids(context), max_tokens, Sampling(temperature, top_p), stop))
        texts = [""] * len(wanted)
        for piece in Engine(self._model, self._tokenizer, self._rows).run(wanted):
            texts[piece.request] += piece.text
        return texts

    def _ids(self, text: str) -> list[int]:
        return [self._tokenizer.eod, *self._tokenizer.encode(text)]

    @torch.inference_mode()
    def _whole(self, ids: Sequence[int]) -> float:
        total, state, weight = 0.0, None, self._model.head.weight
        for start in range(0, len(ids) - 1, _TOKENS_AT_ONCE):
            piece = torch.tensor([ids[start : start + _TOKENS_AT_ONCE + 1]], device=weight.device)
            hidden, state = self._model.hidden_states(piece[:, :-1], state)
            mean = ops.linear_cross_entropy(hidden, weight, piece[:, 1:])
            total -= float(mean.double()) * (piece.shape[1] - 1)
        return total
