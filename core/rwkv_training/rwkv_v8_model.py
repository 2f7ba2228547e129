"""`RWKV_x070`: run and train RWKV-7 and RWKV-8 weights behind the interface of the RWKV demos."""

from __future__ import annotations

from typing import Any

from core import env_hijack  # sets the environment before torch is imported
from heron.compat import x070


class RWKV_x070(x070.RWKV_x070):
    """:class:`heron.compat.x070.RWKV_x070`, which also obeys the RWKV_* environment variables."""

    def __init__(self, args: Any):
        super().__init__(args)
        env_hijack.check_environment(self.head_size)
