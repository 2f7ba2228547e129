"""The `RWKV_x070` interface of the RWKV-7 demos and of applications built on them, over :class:`heron.RWKV`.

Interface: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py. Unlike there, everything here carries gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heron import checkpoint
from heron.checkpoint.architecture import in_one_dtype
from heron.config import ModelConfig, RosaConfig
from heron.errors import CheckpointError, ConfigError, DataError
from heron.model import RWKV, State

_SIZES = ("variant", "n_layer", "n_embd", "vocab_size", "head_size", "rosa", "memory")
_DTYPES = {
    "fp64": torch.float64, "float64": torch.float64, "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


class RWKV_x070(RWKV):
    """An RWKV that reads `args`, takes one sequence at a time and keeps its state in upstream's list.

    Args:
        args: any object with attributes. `MODEL_NAME`: path of the weights without ".pth" (all sizes come from the
            file, and `args`' own sizes are updated), or None for fresh initial values of `args`' sizes (variant,
            n_layer, n_embd, vocab_size, head_size, rosa, memory; ModelConfig's defaults where absent). `dtype`: a torch
            dtype or its name; absent or None: as in the file. `rosa`: "qkv-1bit", "qkv-4bit" or a RosaConfig, of a file
            that has ROSA (a .pth cannot say).

    Raises:
        CheckpointError: the named file does not exist or is no RWKV-7 or RWKV-8 model that this version knows.
        ConfigError: sizes or a dtype that do not exist.

    `state` in all forwards is None (zeros) or a list of 3 * n_layer tensors: att shift (C,), wkv (H, N_value, N_key)
    in fp32, ffn shift (C,) of each layer. In v7b and v8-hybrid follow the token ids (t,), then key and value codes
    (t, 32) of each layer, and in v7b the last query (256,) of each layer; with ROSA, last, of each layer the symbols
    (3, G, t), the shift (C,) and after a step the match lengths (G, t). There a step takes time and memory that grow
    with t. ROSA memory adds the ids (t,), int32, which each call reads again. The list handed in is never changed.
    `hidden_states`, inherited, is the batched form: (B, T) ids -> (B, T, C).
    """

    def __init__(self, args: Any):
        dtype = _dtype(getattr(args, "dtype", None))
        name = getattr(args, "MODEL_NAME", None)
        if name is None:
            config = ModelConfig.from_dict({key: getattr(args, key) for key in _SIZES if hasattr(args, key)})
            super().__init__(config)
            if dtype is not None:
                self.to(dtype)
        else:
            path = Path(str(name) + ".pth")
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: no such file; MODEL_NAME is the path without .pth, or None to start fresh"
                )
            rosa = getattr(args, "rosa", None)
            loaded = checkpoint.load(path, dtype, rosa=RosaConfig.preset(rosa) if isinstance(rosa, str) else rosa)
            loaded = in_one_dtype(loaded)
            with torch.device("meta"):
                super().__init__(loaded.config)
            self.load_state_dict(loaded.state_dict(), assign=True)
            self.requires_grad_(True)
        for key in _SIZES:
            setattr(args, key, getattr(self.config, key))
        self.args = args
        self.n_layer, self.n_embd = self.config.n_layer, self.config.n_embd
        self.n_head, self.head_size = self.config.n_head, self.config.head_size
        self.z = WeightView(self)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, idx: int | Sequence[int] | Tensor, state: list[Tensor] | None = None, full_output: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """One id, or a list of them: as `forward_one` for a single id, else as `forward_seq`."""
        ids = _ids(idx)
        if len(ids) == 1:
            return self.forward_one(ids, state)
        return self.forward_seq(ids, state, full_output)

    def forward_one(self, token_id: int | Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """RNN mode: logits (V,) after one token, and the new state; constant time and memory without attention."""
        ids = _ids(token_id)
        if len(ids) != 1:
            raise DataError(f"forward_one: wanted one token id, got {len(ids)}; forward_seq takes several")
        logits, state = self._sequence(ids, state)
        return logits[0], state

    def forward_seq(
        self, token_ids: Sequence[int] | Tensor, state: list[Tensor] | None = None, full_output: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """GPT mode: a whole sequence at once. Logits (T, V) with `full_output`, else (V,) after the last token."""
        logits, state = self._sequence(_ids(token_ids), state, None if full_output else 1)
        return (logits if full_output else logits[-1]), state

    def save(self, path: str | Path) -> None:
        """Write the weights; a .pth loads in upstream's own loaders."""
        checkpoint.save(self, path)

    def _sequence(
        self, ids: Tensor, state: list[Tensor] | None, last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of the `last` tokens (None: of all), and the new state list."""
        tokens = ids.unsqueeze(0).to(self.emb.weight.device)
        batched = None if state is None else State.from_runtime(state)
        new: Any
        hidden, new, recalled = self.read(tokens, batched)
        if last is not None:
            hidden, recalled = hidden[:, -last:], None if recalled is None else recalled[:, -last:]
        return self.logits(hidden, recalled).squeeze(0), new.to_runtime()

    def _z(self, name: str) -> Tensor:
        return self.z[name]


class WeightView(Mapping[str, Tensor]):
    """The weights under their names, with dots or underscores, in the layout that applications compute with.

    Matrices of att and ffn are transposed to (in, out), vectors are flat, `r_k` is (C,), the rest is as in the file:
    `head.weight` (V, C), tables, all of qkv. All are views of the live parameters; only `emb.weight` is put through
    ln0 at each access, where the model does so. Gradients flow through all.
    """

    def __init__(self, model: RWKV):
        self._model = model
        self._names = {name.replace(".", "_"): name for name, _ in model.named_parameters()}

    def __getitem__(self, key: str) -> Tensor:
        name = self._names[key.replace(".", "_")]
        value = self._model.get_parameter(name)
        if name == "emb.weight":
            return self._model.get_submodule("blocks.0.ln0")(value) if self._model.config.has_ln0 else value
        if name.endswith(("receptance.weight", "key.weight", "value.weight", "output.weight")):
            return value.t()
        if name.endswith("r_k"):
            return value.flatten()
        return value.squeeze()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.replace(".", "_") in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.values())

    def __len__(self) -> int:
        return len(self._names)


def _ids(tokens: int | Sequence[int] | Tensor) -> Tensor:
    """One id, a list, an array or a tensor of them as an int64 tensor (T,)."""
    ids = torch.as_tensor(tokens)
    if ids.dim() > 1:
        raise DataError(f"token ids: wanted one sequence (T,), got {tuple(ids.shape)}; hidden_states takes batches")
    if ids.numel() == 0:
        raise DataError("token ids: wanted at least one, got none")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"token ids: wanted integers, got {ids.dtype}")
    return ids.reshape(-1).long()


def _dtype(wanted: Any) -> torch.dtype | None:
    if wanted is None or wanted in _DTYPES.values():
        return wanted
    if wanted not in _DTYPES:
        raise ConfigError(f"args.dtype: wanted a torch dtype or one of {', '.join(_DTYPES)}, got {wanted!r}")
    return _DTYPES[wanted]
