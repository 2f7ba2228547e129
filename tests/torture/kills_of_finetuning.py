"""kill -9 at random instants of fine-tuning beside a frozen base, packed: an adapter, and an initial state."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import torch

import heron
from heron.config import AdapterConfig
from tests.torture import kills, minute
from tests.torture.result import Result

METHODS = ("lora", "state")


def run(trials: int, seed: int) -> Result:
    """`trials` kills, half of them of each method."""
    with tempfile.TemporaryDirectory(prefix="heron-kills-") as name:
        parts = [
            kills.run(max(1, trials // len(METHODS)), seed + number, **settings(Path(name), method))
            for number, method in enumerate(METHODS)
        ]
    first, *others = parts
    return dataclasses.replace(
        first,
        promise="kill -9 while an adapter or a state trains, packed: the curve and the result are bit-equal",
        trials=sum(part.trials for part in parts),
        failures=[failure for part in parts for failure in part.failures],
        caught=sum(part.caught for part in parts),
        control_trials=sum(part.control_trials for part in parts),
        notes="; ".join(f"{method}: {part.notes}" for method, part in zip(METHODS, parts, strict=True)),
    )


def settings(folder: Path, method: str) -> dict[str, object]:
    """Changes of the settings of :mod:`tests.torture.minute` with which such a run trains on conversations."""
    base, data = folder / "base.pth", folder / "chat.jsonl"
    if not base.exists():
        torch.manual_seed(5)
        model = heron.RWKV(minute.MODEL)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        heron.save(model, base)
        talks = [(f"What is {n} and {n % 3}?", f"It is {n + n % 3}.") for n in range(30)]
        rows = [{"prompt": question, "completion": answer} for question, answer in talks]
        data.write_text("\n".join(map(json.dumps, rows)))
    adapter = AdapterConfig(rank=4, dropout=0.1) if method == "lora" else None
    finetune = heron.FinetuneConfig(method=method, adapter=adapter)
    return dict(model=str(base), data=str(data), ctx_len=96, finetune=finetune, spike=0.0)
