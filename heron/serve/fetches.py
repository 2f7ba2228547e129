"""Orders whose texts begin like one whose state a file alone holds: it is read before an engine gets them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from heron.serve.orders import Order
from heron.serve.prefix_cache import PrefixCache
from heron.serve.prefixes import Prefix
from heron.serve.scheduler import Scheduler

AT_ONCE = 2  # files that are read

_log = logging.getLogger("heron.serve")


class Fetches:
    """Takes orders for schedulers. No engine, and no order that wants no file, waits for the disk.

    Args:
        cache: of which the schedulers find states; None: of none.
    """

    def __init__(self, cache: PrefixCache | None):
        self._cache = cache
        self._pool = ThreadPoolExecutor(AT_ONCE, "heron-fetch")
        self._is_cancelled: dict[int, bool] = {}  # of the orders that wait for a file
        self._is_over = False
        self._lock = threading.Lock()  # of these two

    def submit(self, scheduler: Scheduler, orders: Sequence[Order]) -> None:
        """As :meth:`Scheduler.submit`, at once or after the files that the orders want."""
        cache = self._cache
        wanted = set() if cache is None else self._wanted(cache, orders)
        with self._lock:
            if cache is not None and wanted and not self._is_over:
                self._is_cancelled |= {order.number: False for order in orders}
                self._pool.submit(self._fetch, cache, scheduler, orders, wanted)
                return
        scheduler.submit(*orders)

    def cancel(self, scheduler: Scheduler, number: int) -> None:
        """As :meth:`Scheduler.cancel`."""
        with self._lock:
            if number in self._is_cancelled:
                self._is_cancelled[number] = True
                return
        scheduler.cancel(number)

    def close(self) -> None:
        """Wait for what is being read; orders that come later are passed on at once."""
        with self._lock:
            self._is_over = True
        self._pool.shutdown()

    def _wanted(self, cache: PrefixCache, orders: Sequence[Order]) -> set[Prefix]:
        """What files alone hold of the prompts."""
        found = set()
        firsts = {(id(order.request.prompt), order.start.key): order for order in orders}  # n texts share a prompt
        for order in firsts.values():
            ids = order.request.prompt
            if not isinstance(ids, str) and (prefix := cache.only_in_file(ids[:-1], order.start.key)):
                found.add(prefix)
        return found

    def _fetch(self, cache: PrefixCache, scheduler: Scheduler, orders: Sequence[Order], wanted: set[Prefix]) -> None:
        try:
            for prefix in wanted:
                cache.fetch(prefix)
        except Exception:  # the texts can be written without
            _log.exception("a state could not be read from its file")
        scheduler.submit(*orders)
        with self._lock:
            gone = [order.number for order in orders if self._is_cancelled.pop(order.number)]
        for number in gone:
            scheduler.cancel(number)
