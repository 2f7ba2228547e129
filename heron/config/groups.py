"""The groups in which help lists the settings of a training run."""

from __future__ import annotations

# group: the settings that `heron train --help` shows, and those that `--help all` adds
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "data": (
        ("data", "val_data", "val_fraction", "tokenizer"),
        ("column", "glob", "split_at", "allow_normalized", "eod", "magic_prime"),
    ),
    "model": (
        ("model", "model.variant", "model.n_layer", "model.n_embd"),
        (
            *("init_from", "init_dtype", "model.vocab_size", "model.head_size", "model.ffn_dim", "model.decay_rank"),
            *("model.iclr_rank", "model.value_rank", "model.gate_rank", "model.deep_embed_4x", "model.has_ln0"),
            *("model.rosa", "model.memory"),
        ),
    ),
    "optimizer and schedule": (
        (
            *("ctx_len", "micro_bsz", "accumulate", "max_steps", "max_tokens", "lr_init", "lr_final", "warmup_steps"),
            "seed",
        ),
        ("beta1", "beta2", "adam_eps", "weight_decay", "grad_clip"),
    ),
    "speed and memory": (
        ("grad_checkpoint", "dtype", "device"),
        (
            *("tbptt", "weights", "compile", "tables", "tables_state", "threads", "num_workers"),
            *("parallel", "context_parallel", "processes"),
        ),
    ),
    "safety and saving": (
        ("save_every", "resume"),
        ("keep", "background_save", "on_nonfinite", "spike", "max_hours", "dist_timeout"),
    ),
    "output": (
        ("out", "eval_every"),
        ("sample_every", "sample_prompt", "sample_tokens", "log_every", "tensorboard", "wandb"),
    ),
}
GROUP_OF = {name: group for group, parts in GROUPS.items() for part in parts for name in part}
FIRST = frozenset(name for first, _ in GROUPS.values() for name in first)
