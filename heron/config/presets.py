"""The presets: the sizes of released models, and upstream's ROSA layers, by name."""

from __future__ import annotations

from typing import Any

ROSA_PRESETS: dict[str, dict[str, Any]] = {
    "token": {"source": "token", "no_match": "zero", "grad": "none"},
    "memory": {"source": "token", "scope": "stream", "no_match": "zero", "grad": "none", "max_match": 64},
    "self-1bit": {"source": "self", "bits": 1, "no_match": "zero", "grad": "bitflip"},
    "self-4bit": {"source": "self", "bits": 4, "no_match": "bit0", "grad": "bitflip"},
    "qkv-1bit": {"source": "qkv", "bits": 1, "no_match": "bit0"},
    "qkv-4bit": {"source": "qkv", "bits": 4, "no_match": "zero"},
}


def _released(n_layer: int, n_embd: int, ranks: tuple[int, int, int, int]) -> dict[str, Any]:
    """Sizes of a released RWKV-7 World model; ranks are those of w, a, v, g (no formula gives them)."""
    names = ("decay_rank", "iclr_rank", "value_rank", "gate_rank")
    return {"n_layer": n_layer, "n_embd": n_embd, **dict(zip(names, ranks, strict=True))}


_RELEASED = {
    "0.1b": _released(12, 768, (64, 64, 32, 128)),
    "0.4b": _released(24, 1024, (64, 64, 32, 128)),
    "1.5b": _released(24, 2048, (96, 96, 64, 256)),
    "2.9b": _released(32, 2560, (96, 96, 64, 320)),
    "7.2b": _released(32, 4096, (128, 128, 96, 480)),
    "13.3b": _released(61, 4096, (192, 192, 128, 384)),
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"rwkv7-{size}": {"variant": "v7", **sizes} for size, sizes in _RELEASED.items()},
    **{f"rwkv8-{size}": {"variant": "v8", **sizes} for size, sizes in _RELEASED.items()},
    **{
        f"{name}-{size}": {"variant": variant, **_RELEASED[size]}
        for name, variant in (("rwkv7a", "v7a"), ("rwkv7b", "v7b"), ("rwkv8-hybrid", "v8-hybrid"))
        for size in ("0.1b", "1.5b")
    },
    **{
        f"rosa-lm-{bits}bit": {"variant": "rosa-lm", "n_layer": 12, "n_embd": 768, "rosa": f"qkv-{bits}bit"}
        for bits in (1, 4)
    },
    "rwkv8-tiny": {"variant": "v8", "n_layer": 4, "n_embd": 128, "vocab_size": 256},
}
