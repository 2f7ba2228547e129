"""`heron train`: begin a run, or go on with it; a signal is answered from the start, while PyTorch is loaded too."""

from __future__ import annotations

import argparse

from heron.commands import EXIT_PREEMPTED, rwkv_lm_flags
from heron.commands.settings import train_config
from heron.commands.telling import telling
from heron.train.stop import Preemption


def run(options: argparse.Namespace) -> int:
    with Preemption(), telling():  # PyTorch, and weights whose sizes are compared, take seconds to load
        config = train_config(options)
        if options.stage == 1 and not options.dry_run:
            print(rwkv_lm_flags.write_initial_weights(config))
            return 0
        from heron.train import Trainer

        trainer = Trainer(config)
    if options.dry_run:
        print(trainer.config.to_yaml(), end="")
        return 0
    return EXIT_PREEMPTED if trainer.fit() == "preempted" else 0
