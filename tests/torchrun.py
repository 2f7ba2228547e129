"""torchrun's engine with processes that are forked, which find imported what an import of this file imports."""

from __future__ import annotations

import sys
import traceback
import uuid
from collections.abc import Callable

from torch import _dynamo as _dynamo  # by ddp, by fsdp and by the optimizer, at a second each time
from torch.distributed import checkpoint as checkpoint
from torch.distributed import fsdp as fsdp
from torch.distributed import tensor as tensor
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def torchrun(work: Callable[[], int], processes: int, restarts: int = 0) -> int:
    """Do `work`, which gives an exit code, in that many processes; 1 where one has failed, 0 otherwise.

    Args:
        restarts: how often all processes start anew after one has died.
    """
    config = LaunchConfig(
        1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        max_restarts=restarts, monitor_interval=0.05, start_method="fork", local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    try:
        elastic_launch(config, lambda: sys.exit(code_of(work)))()
    except ChildFailedError:
        return 1
    return 0


def code_of(work: Callable[[], int]) -> int:
    """What `work` gives; 1, with the traceback printed, where it raises."""
    try:
        return work()
    except Exception:
        traceback.print_exc()
        return 1
