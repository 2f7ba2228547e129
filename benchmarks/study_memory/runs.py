"""The runs of the study: models, with and without ROSA memory, on each text, and what each is asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study_memory.texts import Text
from heron.commands import demo
from heron.config import ModelConfig, TrainConfig
from heron.data.binidx import open_binidx

_WITHOUT: dict[str, dict[str, Any]] = {
    "v7": dict(variant="v7"),
    "v7a": dict(variant="v7a"),
    "v8": dict(variant="v8"),
    "v8-4x": dict(variant="v8", deep_embed_4x=True),
}
WITH_MEMORY = "+memory"
MODELS = {
    **_WITHOUT,
    **{f"{name}{WITH_MEMORY}": dict(rosa="memory", **model) for name, model in _WITHOUT.items()},
    "v8+rosa-qkv": dict(variant="v8", rosa="qkv-4bit"),
}
LARGE = "collected"  # the text of the large models
MODELS_OF_LARGE = ("v7", "v7+memory", "v8", "v8+memory")
AT_SIZE = TrainConfig(
    model=ModelConfig(variant="v7", n_layer=12, n_embd=768), ctx_len=512, micro_bsz=64, lr_init=6e-4, lr_final=6e-5,
    warmup_steps=20, max_steps=1,
)  # fmt: skip
VALIDATIONS = 5  # of a run; what is compared between two of them is on a straight line


class Case(NamedTuple):
    """A run of the study."""

    text: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.text}/{self.model}/{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What may be made smaller than it is in the study; None: as there.

    The study has the demo's model and batches for the small texts, and L12-D768, B64 T512 for the large one.
    """

    steps: int = 400
    n_layer: int | None = None
    n_embd: int | None = None
    ctx_len: int | None = None
    micro_bsz: int | None = None
    steps_of_large: int | None = None  # None: once over the text


def cases(texts: list[str], models: list[str] | None, seeds: list[int]) -> list[Case]:
    """All of them, so ordered that whatever has run when the study is stopped has all models in it."""
    found = []
    for seed in seeds:
        for text in texts:
            chosen = models or (MODELS_OF_LARGE if text == LARGE else MODELS)
            found += [Case(text, model, seed) for model in chosen]
    return found


def settings(case: Case, text: Text, sizes: Sizes) -> TrainConfig:
    """What a run is asked for: the demo's recipe, or at size a usual one."""
    recipe = AT_SIZE if case.text == LARGE else demo.config(Path("runs/demo"), memory=False)
    assert isinstance(recipe.model, ModelConfig)
    given = {name: value for name, value in dataclasses.asdict(sizes).items() if value is not None}
    of_model = {name: given[name] for name in ("n_layer", "n_embd") if name in given}
    of_batch = {name: given[name] for name in ("ctx_len", "micro_bsz") if name in given}
    config = dataclasses.replace(
        recipe, model=recipe.model.changed(**MODELS[case.model], **of_model), **of_batch, **text._asdict(),
        seed=case.seed, save_every=0, sample_every=0, threads=1,
    )  # fmt: skip
    steps = sizes.steps
    if case.text == LARGE:
        steps = sizes.steps_of_large or int(_n_tokens(text) * (1 - text.val_fraction)) // config.tokens_per_step
    return dataclasses.replace(config, max_steps=max(1, steps), eval_every=max(1, steps // VALIDATIONS))


def _n_tokens(text: Text) -> int:
    return len(open_binidx(text.data).tokens)


def is_done(log: Path, steps: int) -> bool:
    """Whether a log holds the validation behind the last step."""
    if not log.exists():
        return False
    records = [json.loads(line) for line in log.read_bytes().split(b"\n")[-4:] if line.endswith(b"}")]
    return any("val_loss" in record and record["step"] == steps for record in records)
