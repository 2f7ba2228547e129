"""In which numbers a run computes and keeps what it trains: the choices, and which of them go together."""

from __future__ import annotations

from heron.errors import ConfigError

DTYPES = ("auto", "fp32", "bf16", "fp8")
INIT_DTYPES = ("fp32", "bf16")
TABLES_STATE = ("fp32", "bf16")
WEIGHTS = ("auto", "fp32", "bf16")


def check_precision(dtype: str, weights: str, base: str | None, tables: str, tables_state: str) -> None:
    """ConfigError where these settings of a TrainConfig contradict each other; `base`: of weights that are frozen."""
    if weights == "bf16" and dtype == "fp32":
        named = f"weights {weights}" if base in (None, "auto") else f"base {base}"
        raise ConfigError(f"{named} needs dtype bf16; dtype is fp32")
    if weights == "fp32" and dtype == "fp8":
        raise ConfigError("weights fp32: dtype fp8 rounds a copy of them in bf16; drop it, or use dtype bf16")
    if base is not None and dtype == "fp8":
        raise ConfigError("dtype fp8 is for runs in which every weight trains; beside a frozen base use dtype bf16")
    if tables_state != "fp32" and tables != "host":
        raise ConfigError(f"tables_state {tables_state} needs tables host; tables is {tables}")
