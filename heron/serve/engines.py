"""What writes: the engines of a server, their states, and what HTTP may ask of them from whichever process."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from heron import __version__
from heron.config.serve import ServeConfig
from heron.errors import CheckpointError, ConfigError
from heron.generation import Engine, Request, Snapshot
from heron.generation.snapshot import hash_of
from heron.model import State
from heron.serve.fetches import Fetches
from heron.serve.grammar import Grammars
from heron.serve.orders import Drawn, Order, Start
from heron.serve.prefix_cache import Level, PrefixCache
from heron.serve.prefix_files import Origin, PrefixFiles
from heron.serve.scheduler import Scheduler
from heron.serve.sessions import NoSuchState, StateStore
from heron.tokenizer import Tokenizer

SEPARATOR = ":"  # between the model's name and that of a variant
SECONDS_TO_KEEP = 5.0  # states for the next start
PREFIXES = "prefixes"  # in the folder of saved states, that of the prefix cache
_MIB = 1 << 20

_log = logging.getLogger("heron.serve")


class Offer(NamedTuple):
    """What HTTP must know about a name in a request's `model`."""

    engine: str  # the name of the one that writes
    tokenizer: Tokenizer
    vocab_size: int
    rows: int
    start: Start  # what its texts begin from


class Engines:
    """All that a server offers. Its methods may be called from any thread.

    Args:
        engine: of the model.
        engines: others, of adapters and memories, by name; each writes in a batch of its own.
        tuned: states of the model by name; they share its batch.

    Raises:
        ConfigError: two variants with one name, or a state of another model.
        CheckpointError: `config.state_dir` cannot be written into.
    """

    def __init__(self, config: ServeConfig, engine: Engine, engines: Mapping[str, Engine], tuned: Mapping[str, State]):
        name = config.name or "heron"
        folder = None if config.state_dir is None else Path(config.state_dir)
        self._states = StateStore(folder, config.cache_host * _MIB)
        is_cached = config.cache_device or config.cache_host
        self._files = self._files_of(folder, config.cache_disk * _MIB) if is_cached else None
        sizes = config.cache_device * _MIB, config.cache_host * _MIB
        self._cache = PrefixCache(*sizes, self._files) if is_cached else None
        self._fetches = Fetches(self._cache)
        self._origins: dict[str, Origin] = {}  # by the names of offers
        self._schedulers: dict[str, Scheduler] = {}
        self._grammars: dict[str, Grammars] = {}
        self._tuned: dict[str, Snapshot] = {}
        self.offers: dict[str, Offer] = {}
        for variant, one in {"": engine, **engines}.items():
            full = f"{name}{SEPARATOR}{variant}" if variant else name
            self._schedulers[full] = Scheduler(one, self._cache, self._states)
            self._grammars[full] = Grammars(one.tokenizer)
            self.offers[full] = Offer(full, one.tokenizer, one.vocab_size, one.n_free, Start(full))
        for variant, state in tuned.items():
            full = f"{name}{SEPARATOR}{variant}"
            if full in self.offers:
                raise ConfigError(f"{variant}: two variants of the model have this name; give another one")
            state.check(engine.model.config, 1)
            self._tuned[full] = Snapshot(state)
            self.offers[full] = self.offers[name]._replace(start=Start(full, pending=()))

    def warm_up(self) -> None:
        """Build kernels and record graphs before anyone waits for them. Call it before :meth:`start`."""
        for scheduler in self._schedulers.values():
            list(scheduler.engine.run([Request((0,), max_tokens=2)]))

    def start(self, deliver: Callable[[str, list[Drawn]], None]) -> None:
        """Begin. `deliver` gets the name of an engine and what it has drawn, in that engine's thread."""
        for name in self.offers if self._files is not None else ():
            self._origin_of(name)  # later somebody would wait until all is hashed
        if self._cache is not None:
            self._cache.start()
        for name, scheduler in self._schedulers.items():
            scheduler.start(functools.partial(deliver, name))

    def stop(self, grace: float) -> None:
        """Finish what runs, within `grace` seconds, keep states for the next start while they last, and end."""
        until = time.monotonic() + grace
        with ThreadPoolExecutor(len(self._schedulers)) as pool:
            list(pool.map(lambda scheduler: scheduler.stop(grace), self._schedulers.values()))
        self._fetches.close()
        if self._cache is not None:
            self._cache.close(min(until, time.monotonic() + SECONDS_TO_KEEP))

    def _files_of(self, folder: Path | None, max_bytes: int) -> PrefixFiles | None:
        """The files of the prefix cache, where they are wanted and can be had."""
        if folder is None or not max_bytes:
            return None
        try:
            return PrefixFiles(folder / PREFIXES, max_bytes, self._origin_of)
        except CheckpointError as error:
            _log.error("states of prompts are not kept in files: %s", error)
            return None

    def _origin_of(self, start_key: str) -> Origin:
        """What a start stands for: weights, documents and states by their content, so that names may change."""
        name, _, saved = start_key.partition("\n")
        origin = self._origins.get(name)
        if origin is None:
            engine = self._schedulers[self.offers[name].engine].engine
            begins = self._tuned.get(name) or Snapshot(engine.prefill([]))
            looked_into = "" if engine.documents is None else engine.documents.hash
            device = next(engine.model.parameters()).device.type
            parts = (__version__, device, engine.fingerprint, looked_into, hash_of(begins))
            origin = self._origins[name] = Origin("\n".join(parts), engine)
        return origin._replace(identity=f"{origin.identity}\n{saved}")

    # -- texts ----------------------------------------------------------------------------------------------------

    def submit(self, engine: str, orders: Sequence[Order]) -> None:
        """Have texts written. Refusal, or another HeronError, for a form or a state that cannot be."""
        complete = []
        for order in orders:
            before = self._before(engine, order.start)
            after = None if before is None else Snapshot(before.state)  # ids pending there are the prompt's
            constraint = None if order.form is None else order.form(self._grammars[engine])
            request = dataclasses.replace(order.request, after=after, constraint=constraint)
            complete.append(dataclasses.replace(order, request=request))
        self._fetches.submit(self._schedulers[engine], complete)

    def cancel(self, engine: str, number: int) -> None:
        """End a text before the next token is drawn."""
        self._fetches.cancel(self._schedulers[engine], number)

    def embed(self, engine: str, ids: Sequence[int]) -> np.ndarray:
        """(C,) fp32 of length 1: the mean of the last hidden states. HeronError as :meth:`Engine.embed`."""
        return self._schedulers[engine].engine.embed(ids).numpy()

    def cache_levels(self) -> Mapping[str, Level]:
        """As :meth:`PrefixCache.levels`; nothing where there is no cache."""
        return {} if self._cache is None else self._cache.levels()

    # -- states ---------------------------------------------------------------------------------------------------

    def start_at(self, engine: str, key: str, state: str) -> Start:
        """What a text that begins from a saved state begins from.

        Args:
            key: of the model's own start.

        Raises:
            HeronError: there is no such state, or it is another model's.
        """
        start = Start(f"{key}\n{state}\n{self._states.version(state)}", state)
        snapshot = self._states.load(state, self._schedulers[engine].engine)
        self._states.keep(start.key, snapshot)
        is_something = snapshot.state is not None or snapshot.pending
        return dataclasses.replace(start, pending=snapshot.pending if is_something else None)

    def _before(self, engine: str, start: Start) -> Snapshot | None:
        """What a start stands for; None: nothing. NoSuchState where it was saved anew by now."""
        if start.state is None:
            return self._tuned.get(start.key)
        if (found := self._states.find(start.key)) is not None:
            return found
        if not start.key.endswith(self._states.version(start.state)):
            raise NoSuchState(f"state {start.state!r}: another one has just taken its place; ask again")
        return self._states.load(start.state, self._schedulers[engine].engine)

    def save_text(self, name: str, engine: str, ids: Sequence[int], start: Start) -> None:
        """Save the state behind a text under a name. HeronError where it cannot be."""
        writes, before, n = self._schedulers[engine].engine, self._before(engine, start), 0
        if self._cache is not None:
            if (prefix := self._cache.only_in_file(ids, start.key)) is not None:
                self._cache.fetch(prefix)
            if (found := self._cache.find(ids, start.key)) is not None:
                before, n = found
        state = writes.prefill(ids[n:], None if before is None else before.state)
        self._states.save(name, Snapshot(state), writes)

    def save_session(self, name: str, engine: str, session: str) -> bool:
        """Save the state that a session is at under a name; False: it was forgotten. HeronError where it cannot be."""
        snapshot = self._states.find(session)
        if snapshot is not None:
            self._states.save(name, snapshot, self._schedulers[engine].engine)
        return snapshot is not None

    def begin_session(self, session: str, engine: str, start: Start) -> None:
        """Let a session begin from a state."""
        if (snapshot := self._before(engine, start)) is not None:
            self._states.keep(session, snapshot)

    def fork_state(self, source: str, name: str) -> None:
        """As :meth:`StateStore.fork`."""
        self._states.fork(source, name)

    def delete_state(self, name: str) -> None:
        """As :meth:`StateStore.delete`."""
        self._states.delete(name)

    def saved_states(self) -> Sequence[str]:
        """The names of saved states, in order."""
        return self._states.list()
