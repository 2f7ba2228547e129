"""How well a model predicts: loss, perplexity and bits per byte of a text; LAMBADA; multiple choice.

Everything can be computed in GPT mode (sequences at once, what training runs) and in RNN mode (token by token through
the decoder, what generation runs); the numbers are the same but for rounding.
"""

from heron.evaluate.likelihood import (
    MODES,
    Evaluation,
    Likelihood,
    evaluate,
    evaluate_batches,
    loglikelihoods,
    together,
)
from heron.evaluate.tasks import Lambada, MultipleChoice, lambada, multiple_choice

__all__ = [
    "MODES", "Evaluation", "Lambada", "Likelihood", "MultipleChoice", "evaluate", "evaluate_batches", "lambada",
    "loglikelihoods", "multiple_choice", "together",
]  # fmt: skip
