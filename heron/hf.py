"""Heron models for Hugging Face transformers: generate, Trainer, pipelines, for every variant. Needs the `hf` extra.

Importing this module registers `model_type` heron, so that ``AutoModelForCausalLM.from_pretrained(folder)`` loads what
``heron convert x.pth folder --format safetensors`` or ``save_pretrained`` wrote, without remote code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heron.compat.transformers import sequences, vocabulary
from heron.compat.transformers.config import HeronConfig, HeronModelOutput, HeronOutput
from heron.errors import CheckpointError, ConfigError, DataError
from heron.model import RWKV
from heron.model.state import States

_UNUSED = {  # what transformers and its tools give to every model, and what says nothing to this one
    "cache_position", "token_type_ids", "max_length_q", "max_length_k", "is_causal", "output_router_logits",
}  # fmt: skip
_REFUSED = {
    "output_attentions": "there are no attention weights in a Heron; leave it out",
    "past_key_values": "a Heron has no cache of keys and values; give what it returns as state",
}


class HeronPreTrainedModel(PreTrainedModel):
    """What both classes of models share: an attribute `rwkv`, which is a :class:`heron.RWKV`."""

    config_class = HeronConfig
    base_model_prefix = "rwkv"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _checkpoint_conversion_mapping = {r"^(?!rwkv\.)": "rwkv."}  # by which peft reads the adapters of a heron.RWKV
    _supports_context_parallel = False
    _no_split_modules = ["Block"]
    rwkv: RWKV

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *arguments: Any, output_loading_info: bool = False, **settings: Any
    ) -> Any:
        """As everywhere in transformers, but strict: no tensor may be missing or be one too many (CheckpointError)."""
        source = pretrained_model_name_or_path
        loaded: Any = super().from_pretrained(source, *arguments, output_loading_info=True, **settings)
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[kind])):
                raise CheckpointError(f"{source}: {kind.replace('_', ' ')}: {', '.join(names[:5])}")
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.rwkv.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put `value` in its place."""
        self.rwkv.emb = value  # pyright: ignore[reportAttributeAccessIssue]

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Every table with a row per token, DeepEmbed's too: new rows are the mean of the old, or initial values."""
        n_old = vocabulary.rows_of(self.rwkv)
        embeddings: Any = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        vocabulary.resize(self.rwkv, n_old, embeddings.weight.shape[0], mean_resizing)
        return embeddings

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.rwkv.grad_checkpoint

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute every block again in the backward pass, without reentrance whatever `use_reentrant` says.

        Raises:
            ConfigError: not every layer, activations on the host, or another of torch.utils.checkpoint's settings.
        """
        others = sorted((activation_checkpointing_kwargs or {}).keys() - {"use_reentrant", "preserve_rng_state"})
        if every_n_layers != 1 or offload or others:
            what = ", ".join(others) or ("offload" if offload else f"every_n_layers={every_n_layers}")
            raise ConfigError(f"gradient checkpointing: {what}: a Heron computes every block again; leave it out")
        self.rwkv.grad_checkpoint = True

    def activation_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self.rwkv.grad_checkpoint = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        """Another name of :meth:`activation_checkpointing_enable`."""
        HeronPreTrainedModel.activation_checkpointing_enable(self, gradient_checkpointing_kwargs, **settings)

    gradient_checkpointing_disable = activation_checkpointing_disable

    def _init_weights(self, module: nn.Module) -> None:
        """Heron's own initial values stay."""


class HeronModel(HeronPreTrainedModel):
    """The network up to ln_out, without the head. Of a :class:`HeronForCausalLM` it is `base_model`."""

    _keys_to_ignore_on_load_unexpected = [r"^(rwkv\.)?head\.weight$"]

    def __init__(self, config: HeronConfig, rwkv: RWKV | None = None):
        """`rwkv`: the network of another model, to share; None: one of its own."""
        super().__init__(config)
        self.rwkv = RWKV(config.to_model_config()) if rwkv is None else rwkv
        if rwkv is None:
            self.rwkv.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()

    @property
    def base_model(self) -> HeronModel:
        """Itself."""
        return self

    def get_output_embeddings(self) -> None:
        """It has no head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: States | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> HeronModelOutput | tuple:
        """The outputs of ln_out.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), or with a state (B, >= T), of which the last T count: 0 for padding, which may stand
                anywhere and is not read.
            state: what to go on from.
            use_cache: whether to return the state; None: as the config says, but not in training mode.
            inputs_embeds: (B, T, C) instead of the rows of the embedding. Models with tables look those up by
                `input_ids`; without, the embeddings must be rows of the embedding, which tell the ids.
            position_ids: (B, T) or (1, T). Where they do not grow from one token to the next, another document begins,
                from a zero state; they mean nothing else.
            output_hidden_states: whether to return the input of every block.
            cu_seq_lens_q, seq_idx: where documents begin in a batch of one row, as (n + 1,) bounds; the number of each
                token's document, (B, T).

        Raises:
            DataError: inputs that do not fit together, or something that only other models have.
        """
        for name, value in others.items():
            if name in _REFUSED and value is not None and value is not False:
                raise DataError(f"{name}: {_REFUSED[name]}")
            if name not in _REFUSED and name not in _UNUSED:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise DataError("forward: wanted input_ids or inputs_embeds, got neither")
        shape = given.shape[:2]
        if inputs_embeds is not None and inputs_embeds.shape != (*shape, self.config.n_embd):
            wanted = (*shape, self.config.n_embd)
            raise DataError(f"inputs_embeds: wanted {tuple(wanted)}, got {tuple(inputs_embeds.shape)}")
        mask = _mask(attention_mask, shape, state is not None)
        ids = given if inputs_embeds is None else vocabulary.ids_of(self.rwkv, inputs_embeds, input_ids, mask)
        found = None
        bounds = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
        if any(x is not None for x in (mask, position_ids, bounds, seq_idx)):
            documents = None if seq_idx is None else seq_idx.expand(shape)
            if bounds is not None:
                if shape[0] != 1:
                    raise DataError(f"cu_seq_lens_q: wanted documents in a batch of one row, got {shape[0]} rows")
                at = torch.arange(shape[1], device=bounds.device)
                documents = torch.bucketize(at, bounds[1:].contiguous(), right=True).unsqueeze(0)
            positions = None if position_ids is None else _positions(position_ids, shape)
            found = sequences.find(shape, mask, positions, documents)
        keep = use_cache if use_cache is not None else self.config.use_cache and not self.rwkv.training
        every = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        layers, state, recalled = sequences.read(self.rwkv, ids, inputs_embeds, state, found, keep, every)
        output = HeronModelOutput(layers[-1], state, tuple(layers) if every else None, recalled)
        return output if return_dict or return_dict is None else output.to_tuple()


class HeronForCausalLM(HeronPreTrainedModel, GenerationMixin):
    """A :class:`heron.RWKV`, its attribute `rwkv`, behind transformers' interface. What it carries on is a State."""

    _body: HeronModel
    accepts_loss_kwargs = True
    _tied_weights_keys = {"rwkv.head.weight": "rwkv.emb.weight"}

    def __init__(self, config: HeronConfig):
        super().__init__(config)
        self.rwkv = RWKV(config.to_model_config())
        # Not a submodule: its parameters are those of rwkv, and no name may stand for them twice.
        self.__dict__["_body"] = HeronModel(config, self.rwkv)
        self.post_init()

    @property
    def base_model(self) -> HeronModel:
        """The same network without its head."""
        return self._body

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.rwkv.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put `new_embeddings` in its place."""
        self.rwkv.head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: States | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> HeronOutput | tuple:
        """Logits, and the loss where there are labels.

        Args:
            input_ids, attention_mask, state, inputs_embeds, position_ids, output_hidden_states: as for
                :meth:`HeronModel.forward`.
            labels: (B, T), the ids themselves, shifted here as everywhere in transformers; not counted are -100 and
                what stands behind padding.
            use_cache: as there, but None is False with labels.
            logits_to_keep: only the logits of so many last tokens; 0: of all. Or places: (n,) for every row, (B, n) for
                each, or (B, T) bool, whose logits are (places, V).
            token_type_ids: some tokenizers make them; they mean nothing here.
            num_items_in_batch: what the sum over the labels is divided by; None: their number.
            others: as there; also shift_labels (B, T), labels that are shifted already.
        """
        # By its name in the signature, Trainer would take it for labels that every batch must have.
        targets = others.pop("shift_labels", None)
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if use_cache is None and targets is not None:
            use_cache = False
        body = self.base_model(
            input_ids, attention_mask, state, use_cache, True, inputs_embeds, position_ids, output_hidden_states,
            **others,
        )  # fmt: skip
        hidden = body.last_hidden_state
        loss = logits = None
        if targets is not None:
            if attention_mask is not None:  # padding predicts nothing
                targets = targets.masked_fill(attention_mask[:, -targets.shape[1] :] == 0, -100)
            loss = self.rwkv.head_loss(hidden, targets.to(hidden.device), body.recalled)
            if num_items_in_batch is not None:
                loss = loss * (targets != -100).sum() / num_items_in_batch
        if targets is None or not self.training:
            recalled = None if body.recalled is None else _kept(body.recalled, logits_to_keep)
            logits = self.rwkv.logits(_kept(hidden, logits_to_keep), recalled)
        output = HeronOutput(loss, logits, body.state, body.hidden_states)
        return output if return_dict or return_dict is None else output.to_tuple()

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        state: States | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        **others: Any,
    ) -> dict[str, Any]:
        """The whole prompt at first, then the newest token and the state. Padding may follow a prompt, too."""
        kept = {
            name: others[name]
            for name in ("logits_to_keep", "output_hidden_states", "output_attentions")
            if others.get(name) is not None
        }
        if state is not None and not is_first_iteration:
            return {"input_ids": input_ids[:, -1:], "state": state, "use_cache": True, **kept}
        prompt = {**kept, "attention_mask": attention_mask, "state": state, "use_cache": use_cache, "logits_to_keep": 1}
        if attention_mask is not None:  # the logits of each row's last token, behind which padding may stand
            T = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            at = torch.arange(T, device=attention_mask.device)
            prompt["logits_to_keep"] = (at * (attention_mask[:, -T:] != 0)).argmax(dim=1, keepdim=True)
        if inputs_embeds is None:
            return {"input_ids": input_ids, **prompt}
        whole = input_ids.shape == inputs_embeds.shape[:2]
        return {"input_ids": input_ids if whole else None, "inputs_embeds": inputs_embeds, **prompt}

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, expand_size: int = 1, **given: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """As everywhere, and a state that was given is there for every copy."""
        expand: Any = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        input_ids, given = expand(expand_size, **given)
        state = given.get("state")
        if state is not None and expand_size > 1:
            n = len(state) if isinstance(state, tuple) else state.batch_size
            given["state"] = self._reorder_cache(state, torch.arange(n).repeat_interleave(expand_size))
        return input_ids, given

    def _reorder_cache(self, state: States, beams: Tensor) -> States:
        """The states of the beams that beam search goes on with."""
        return sequences.map_rows(state, beams)

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """No cache of keys and values is made: the state is the cache."""


def _mask(attention_mask: Tensor | None, shape: torch.Size, has_state: bool) -> Tensor | None:
    """(B, T) bool, True for tokens; None where there is no padding."""
    if attention_mask is None:
        return None
    B, T = shape
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == B
    if not fits or not (attention_mask.shape[1] == T or (has_state and attention_mask.shape[1] > T)):
        raise DataError(f"attention_mask: wanted {(B, T)}, got {tuple(attention_mask.shape)}")
    mask = attention_mask[:, -T:] != 0
    return None if mask.all() else mask


def _kept(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Of x (B, T, ...) the places whose logits are wanted."""
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:]
    places = logits_to_keep.to(x.device)
    if places.dim() == 1:
        return x[:, places]
    return x[places] if places.dtype == torch.bool else x[torch.arange(len(x), device=x.device).unsqueeze(1), places]


def _positions(position_ids: Tensor, shape: torch.Size) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        raise DataError(f"position_ids: wanted {tuple(shape)}, got {tuple(position_ids.shape)}")
    return position_ids.expand(shape)


AutoConfig.register("heron", HeronConfig)
AutoModel.register(HeronConfig, HeronModel)
AutoModelForCausalLM.register(HeronConfig, HeronForCausalLM)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["heron"] = "HeronForCausalLM"  # by which Trainer knows that labels are to be shifted
