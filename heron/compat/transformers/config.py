"""The configuration of a Heron in transformers, and what its models return."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from heron.config import ModelConfig
from heron.model.state import States

_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


class HeronConfig(PretrainedConfig):
    """The fields of a :class:`heron.ModelConfig`, and those that transformers adds."""

    model_type = "heron"
    keys_to_ignore_at_inference = ["state", "hidden_states", "recalled"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "ffn_dim",
        "head_dim": "head_size",
    }

    def __init__(self, **values: Any):
        values.pop("num_attention_heads", None)  # of to_dict; n_embd and head_size decide
        names = {theirs: ours for theirs, ours in self.attribute_map.items() if theirs in values}
        values |= {ours: values.pop(theirs) for theirs, ours in names.items()}
        config = ModelConfig.from_dict({name: values.pop(name) for name in _FIELDS & values.keys()})
        for name, value in config.to_dict().items():
            setattr(self, name, value)
        self.use_cache = values.pop("use_cache", True)
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        super().__init__(**{"tie_word_embeddings": False, **ids, **values})

    @property
    def num_attention_heads(self) -> int:
        """Heads of the time mix (H)."""
        return self.n_embd // self.head_size

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, and the number of heads, which peft's prompt learning looks for there."""
        return super().to_dict() | {"num_attention_heads": self.num_attention_heads}

    def to_model_config(self) -> ModelConfig:
        """The same as a ModelConfig."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _FIELDS})


@dataclasses.dataclass
class HeronModelOutput(ModelOutput):
    """What :class:`HeronModel` returns.

    Attributes:
        last_hidden_state: (B, T, C), the outputs of ln_out; 0 at padding.
        state: after the last token. One for the batch, or where contexts grow (v7b, v8-hybrid, ROSA) and differ in
            length, a tuple of one a row.
        hidden_states: n_layer + 1 of (B, T, C), the input of each block and last_hidden_state; where asked for.
        recalled: (B, T, K, 2) int64, what ROSA memory recalled, which the logits need, too; 0 at padding.
    """

    last_hidden_state: Tensor | None = None
    state: States | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    recalled: Tensor | None = None


@dataclasses.dataclass
class HeronOutput(ModelOutput):
    """What :class:`HeronForCausalLM` returns.

    Attributes:
        loss: mean cross entropy over the labels, a scalar; with labels alone.
        logits: (B, T, V); None in training mode with labels, where the loss needs no whole array of them.
        state: as in :class:`HeronModelOutput`.
        hidden_states: too.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: States | None = None
    hidden_states: tuple[Tensor, ...] | None = None
