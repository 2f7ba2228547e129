"""Heron models for Hugging Face transformers: generate, Trainer, pipelines, for every variant. Needs the `hf` extra.

Importing this module registers `model_type` heron, so that ``AutoModelForCausalLM.from_pretrained(folder)`` loads what
``heron convert x.pth folder --format safetensors`` or ``save_pretrained`` wrote, without remote code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from heron import ops
from heron.config import ModelConfig
from heron.errors import CheckpointError, DataError
from heron.model import RWKV, State

_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


class HeronConfig(PretrainedConfig):
    """The fields of a :class:`heron.ModelConfig`, and those that transformers adds."""

    model_type = "heron"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}  # noqa: RUF012 - transformers' own form

    def __init__(self, **values: Any):
        config = ModelConfig.from_dict({name: values.pop(name) for name in _FIELDS & values.keys()})
        for name, value in config.to_dict().items():
            setattr(self, name, value)
        self.use_cache = values.pop("use_cache", True)
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        super().__init__(**{"tie_word_embeddings": False, **ids, **values})

    def to_model_config(self) -> ModelConfig:
        """The same as a ModelConfig."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _FIELDS})


@dataclasses.dataclass
class HeronOutput(ModelOutput):
    """What :class:`HeronForCausalLM` returns.

    Attributes:
        loss: mean cross entropy over the labels, a scalar; with labels alone.
        logits: (B, T, V); None in training mode with labels, where the loss needs no whole array of them.
        state: after the last token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class HeronForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`heron.RWKV`, its attribute `rwkv`, behind transformers' interface. What it carries on is a State."""

    config_class = HeronConfig
    base_model_prefix = "rwkv"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _is_stateful = True

    def __init__(self, config: HeronConfig):
        super().__init__(config)
        self.rwkv = RWKV(config.to_model_config())
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: str, *arguments: Any, output_loading_info: bool = False, **settings: Any) -> Any:
        """As everywhere in transformers, but strict: no tensor may be missing or be one too many (CheckpointError)."""
        model, info = super().from_pretrained(folder, *arguments, output_loading_info=True, **settings)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[kind])):
                raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {', '.join(names[:5])}")
        return (model, info) if output_loading_info else model

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass; `gradient_checkpointing_enable()` sets it."""
        return self.rwkv.grad_checkpoint

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Compute blocks again in the backward pass, in Heron's own way; transformers' arguments do not apply."""
        self.rwkv.grad_checkpoint = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self.rwkv.grad_checkpoint = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> HeronOutput:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, >= T). Padding may follow the tokens, where it does no harm; it can't precede them.
            labels: (B, T), the ids themselves, shifted here as everywhere in transformers; -100 is not counted.
            state: what to go on from.
            use_cache: whether to return the state; None: as the config says.
            logits_to_keep: only the logits of so many last tokens; 0: of all.

        Raises:
            DataError: tokens that follow padding, which would become part of what the model remembers.
        """
        if attention_mask is not None and attention_mask.shape[1] > 1 and (attention_mask.diff(dim=1) > 0).any():
            raise DataError(
                "attention_mask: padding stands before tokens, and the recurrent state would remember it; "
                "for a loss, set tokenizer.padding_side = 'right'"
            )
        hidden, new_state = self.rwkv.hidden_states(input_ids, state)
        loss = logits = None
        if labels is not None:
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = ops.linear_cross_entropy(hidden, self.rwkv.head.weight, targets)
        if labels is None or not self.training:
            logits = self.rwkv.head(hidden[:, -logits_to_keep:])
        keep = self.config.use_cache if use_cache is None else use_cache
        output = HeronOutput(loss, logits, new_state if keep else None)
        return output if return_dict is None or return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole prompt at first, then the newest token and the state. DataError for prompts with padding."""
        if state is None:
            if attention_mask is not None and not attention_mask.all():
                raise DataError(
                    "generate: the prompts have different lengths, and the recurrent state would remember the padding; "
                    "generate for one length at a time, or with heron.Engine"
                )
            return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True, "logits_to_keep": 1}
        return {"input_ids": input_ids[:, -1:], "state": state, "use_cache": True}

    def _reorder_cache(self, state: State, beams: Tensor) -> State:
        """The states of the beams that beam search goes on with."""
        return state.map(lambda part: part.index_select(0, beams))

    def _init_weights(self, module: nn.Module) -> None:
        """Heron's own initial values stay."""

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:
        """No cache of keys and values is made: the state is the cache."""


AutoConfig.register("heron", HeronConfig)
AutoModelForCausalLM.register(HeronConfig, HeronForCausalLM)
