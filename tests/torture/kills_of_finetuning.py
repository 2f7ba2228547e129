"""kill -9 at random instants of fine-tuning beside a frozen base, packed: an adapter, alone and with rows of tables, a
state, preferences (DPO)."""

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

METHODS = ("lora", "state", "dpo", "rows")


def run(trials: int, seed: int) -> Result:
    """`trials` kills, as many of each."""
    with tempfile.TemporaryDirectory(prefix="heron-kills-") as name:
        parts = [
            kills.run(max(1, trials // len(METHODS)), seed + number, **settings(Path(name), method))
            for number, method in enumerate(METHODS)
        ]
    first, *others = parts
    return dataclasses.replace(
        first,
        promise="kill -9 while an adapter, table rows or a state train, packed, pairs too: curve and result bit-equal",
        trials=sum(part.trials for part in parts),
        failures=[failure for part in parts for failure in part.failures],
        caught=sum(part.caught for part in parts),
        control_trials=sum(part.control_trials for part in parts),
        notes="; ".join(f"{method}: {part.notes}" for method, part in zip(METHODS, parts, strict=True)),
    )


def settings(folder: Path, method: str) -> dict[str, object]:
    """Changes of the settings of :mod:`tests.torture.minute` with which such a run trains on conversations."""
    base, data = folder / "base.pth", folder / "chat.jsonl"
    talks = [(f"What is {n} and {n % 3}?", f"It is {n + n % 3}.") for n in range(30)]
    if not base.exists():
        torch.manual_seed(5)
        model = heron.RWKV(minute.MODEL)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        heron.save(model, base)
        rows = [{"prompt": question, "completion": answer} for question, answer in talks]
        data.write_text("\n".join(map(json.dumps, rows)))
    if method == "dpo":
        pairs = [{"prompt": question, "chosen": answer, "rejected": "I can't say."} for question, answer in talks]
        data = folder / "pairs.jsonl"
        data.write_text("\n".join(map(json.dumps, pairs)))
    tables = "rows" if method == "rows" else "frozen"
    adapter = AdapterConfig(rank=4, dropout=0.1, tables=tables) if method != "state" else None
    objective = "dpo" if method == "dpo" else "likelihood"
    finetune = heron.FinetuneConfig(method="state" if adapter is None else "lora", adapter=adapter, objective=objective)
    return dict(model=str(base), data=str(data), ctx_len=96, finetune=finetune, spike=0.0)
