"""Losses and gradients of tiny models in spans on processes, for tests/context/test_context.py.

It starts `python -m tests.context.spans_of_a_model FOLDER PROCESSES`, which imports all once and becomes the processes.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import heron
from heron.context import Context
from tests.ranks import become


def do_jobs(folder: Path) -> None:
    """Do the jobs of folder/jobs.pt; rank 0 leaves [(loss, gradients by name)] in folder/answers.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    answers = []
    for n, config, weights, batch, options in torch.load(folder / "jobs.pt", weights_only=False):
        group = dist.new_group(range(n))
        if rank < n:
            context = Context(group)
            model = heron.RWKV(config)
            model.load_state_dict(weights)
            model.grad_checkpoint = options.get("grad_checkpoint", False)
            part = context.part(*batch, cuts=options.get("cuts"))
            loss = model.loss(part.tokens, part.targets, part.cu_seqlens, span=part.span) * part.share
            loss.backward()
            loss = loss.detach()
            gradients = {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}
            for tensor in (loss, *gradients.values()):
                dist.all_reduce(tensor, group=group)
            answers.append((loss, gradients))
            context.close()
    if rank == 0:
        torch.save(answers, folder / "answers.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    become(int(sys.argv[2]), partial(do_jobs, Path(sys.argv[1])))
