"""One thread runs an engine: orders join in order of arrival and leave when they end; what is drawn is delivered."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable

from heron.errors import HeronError
from heron.generation import Constraint, Engine, OpenSequence, Request, Snapshot
from heron.serve.grammar import Grammar
from heron.serve.orders import Drawn, Order
from heron.serve.prefix_cache import PrefixCache
from heron.serve.refusals import Refusal, engine_failed, stopping, too_slow
from heron.serve.sessions import StateStore

_log = logging.getLogger("heron.serve")
_SECONDS_BETWEEN_LOOKS = 0.25  # at the clock, for orders whose time is over


class _Text:
    """An order that has come, and how far it is."""

    def __init__(self, order: Order):
        self.order, self.deadline = order, time.monotonic() + order.seconds
        self.ids = [int(token) for token in order.request.prompt]  # then also those drawn
        self.n_cached = 0


class Scheduler:
    """Runs an engine in a thread of its own for any number of orders.

    Args:
        engine: that nobody else opens sequences in.
        cache: where states of read prompts are kept; None: nowhere.
        states: where those behind the texts of sessions are kept; None: nowhere.
    """

    def __init__(self, engine: Engine, cache: PrefixCache | None = None, states: StateStore | None = None):
        self.engine, self._cache, self._states = engine, cache, states
        self._waiting: collections.deque[_Text] = collections.deque()
        self._writing: dict[OpenSequence, _Text] = {}
        self._cancelled: set[int] = set()
        self._drawn: list[Drawn] = []
        self._deliver: Callable[[list[Drawn]], None] | None = None
        self._has_failed = self._is_over = False
        self._stops_at: float | None = None  # once it stops: when orders that still run are ended
        self._changed = threading.Condition()  # of `_waiting`, `_cancelled`, `_stops_at` and `_is_over`
        self._last_look = 0.0
        self._thread = threading.Thread(target=self._run, name="heron-engine", daemon=True)

    def start(self, deliver: Callable[[list[Drawn]], None]) -> None:
        """Begin. `deliver` gets what each step has drawn, in the engine's thread, which it must not hold up."""
        self._deliver = deliver
        self._thread.start()

    def submit(self, *orders: Order) -> None:
        """Take orders whose requests are complete; those that come after a failure or the end fail."""
        with self._changed:
            is_over = self._is_over
            if not is_over:
                self._waiting.extend(map(_Text, orders))
                self._changed.notify()
        if is_over and self._deliver is not None:
            self._deliver([Drawn(order.number, error=stopping()) for order in orders])

    def cancel(self, number: int) -> None:
        """End an order whose text nobody wants any more, before the next token is drawn."""
        with self._changed:
            self._cancelled.add(number)
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """Take no more orders, finish those that are there within `grace` seconds, fail the others, and end the thread.

        This waits for the thread. Of several calls the shortest grace counts.
        """
        with self._changed:
            self._stops_at = min(time.monotonic() + grace, math.inf if self._stops_at is None else self._stops_at)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                if self._has_failed:
                    self._end_all(engine_failed())
                else:
                    self._drop()
                    self._admit()
                    if self._writing:
                        self._draw()
            except Exception as error:  # a fault of the device or of ours: no later step can be trusted
                _log.critical("the engine has failed", exc_info=error)
                self._has_failed = True
                self._end_all(engine_failed())
            drawn, self._drawn = self._drawn, []
            if drawn and self._deliver is not None:
                self._deliver(drawn)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False: all is done, and more will not come."""
        with self._changed:
            while not (self._waiting or self._writing):
                self._cancelled.clear()
                if self._stops_at is not None:
                    self._is_over = True
                    return False
                self._changed.wait()
        return True

    def _drop(self) -> None:
        """End the orders that are cancelled or whose time is over."""
        now = time.monotonic()
        is_over = self._stops_at is not None and now > self._stops_at
        looks = is_over or now - self._last_look > _SECONDS_BETWEEN_LOOKS
        if not looks and not self._cancelled:
            return
        self._last_look = now if looks else self._last_look
        late = stopping() if is_over else too_slow()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()

            def ends(text: _Text) -> bool:
                return text.order.number in cancelled or (looks and (is_over or now > text.deadline))

            for text in [text for text in self._waiting if ends(text)]:
                self._waiting.remove(text)
                self._fail(text, late)
        for sequence, text in [(sequence, text) for sequence, text in self._writing.items() if ends(text)]:
            self._leave(sequence, text)
            self._fail(text, late)

    def _admit(self) -> None:
        """Take places for the orders that came first."""
        while self.engine.n_free:
            with self._changed:
                if not self._waiting:
                    return
                text = self._waiting[0]  # until it has a place: a fault of the device fails it with the others
            try:
                sequence = self.engine.add(self._behind_cache(text))
            except HeronError as error:
                self._fail(text, error)
            else:
                self._writing[sequence] = text
            with self._changed:
                self._waiting.popleft()

    def _behind_cache(self, text: _Text) -> Request:
        """The order's request, less what of its prompt the cache has read."""
        request = text.order.request
        found = None if self._cache is None else self._cache.find(text.ids[:-1], text.order.start.key)
        if found is None:
            return request
        snapshot, n = found
        text.n_cached = n
        marks = tuple(mark - n for mark in request.marks if mark > n)
        return dataclasses.replace(request, prompt=text.ids[n:], after=Snapshot(snapshot.state), marks=marks)

    def _draw(self) -> None:
        """Let the engine make a step, and note what it has drawn."""
        for sequence, token in self.engine.step():
            text = self._writing[sequence]
            request = text.order.request
            if isinstance(token, HeronError):
                self._leave(sequence, text)
                is_ours = request.constraint is None  # else the grammar that was asked for leads nowhere
                self._fail(text, Refusal(500 if is_ours else 400, str(token)))
                continue
            text.ids.append(token.id)
            new, finish = sequence.text.push(token.id), sequence.text.finish
            if finish is None and _is_complete(request.constraint):
                new, finish = new + sequence.text.flush(), "stop"
            if finish is not None:
                self._leave(sequence, text, has_ended=True)
            tokens = () if request.logprobs is None else (token,)
            self._drawn.append(Drawn(text.order.number, new, 1, tokens, finish, None, text.n_cached))

    def _leave(self, sequence: OpenSequence, text: _Text, has_ended: bool = False) -> None:
        """Free a sequence's place, and keep what it has read."""
        if sequence.is_open:
            self._keep(sequence, text, has_ended)
            self.engine.close(sequence)
        del self._writing[sequence]  # not before: a fault on the way fails the text with the others

    def _keep(self, sequence: OpenSequence, text: _Text, has_ended: bool) -> None:
        """Give what a sequence has read to the cache, and to its session once its text has ended."""
        cache, key = self._cache, text.order.start.key
        session = text.order.session if has_ended else None
        if cache is not None:
            for mark, snapshot in sequence.snapshots.items():
                cache.keep(text.ids[: text.n_cached + mark], snapshot, key)
        if sequence.is_read and (session is not None or (text.order.keeps and cache is not None)):
            behind = self.engine.snapshot(sequence)
            if cache is not None:  # the last token drawn is pending, and not read
                cache.keep(text.ids[: -len(behind.pending)], behind, key)
            if session is not None and self._states is not None:
                self._states.keep(session, behind)

    def _fail(self, text: _Text, error: Exception) -> None:
        self._drawn.append(Drawn(text.order.number, error=error, n_cached=text.n_cached))

    def _end_all(self, error: Exception) -> None:
        """Have every order fail."""
        with self._changed:
            texts = [*self._writing.values(), *self._waiting]
            self._writing.clear()
            self._waiting.clear()
        for text in texts:
            self._fail(text, error)


def _is_complete(constraint: Constraint | None) -> bool:
    return isinstance(constraint, Grammar) and constraint.is_complete
