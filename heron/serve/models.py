"""What a server offers under which name: the model, its adapters, its memories, its tuned states."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

from heron.errors import ConfigError, did_you_mean
from heron.generation import Engine, Snapshot
from heron.model import State
from heron.serve.grammar import Grammars
from heron.serve.refusals import Refusal
from heron.serve.scheduler import Scheduler
from heron.serve.sessions import PrefixCache

SEPARATOR = ":"  # between the model's name and that of a variant


class Served(NamedTuple):
    """One name in a request's `model`."""

    name: str
    scheduler: Scheduler
    grammars: Grammars
    start: Snapshot | None = None  # what its texts begin from; None: nothing

    @property
    def engine(self) -> Engine:
        return self.scheduler.engine


class Models:
    """All that a server offers.

    Args:
        name: of the model.
        engine: of the model.
        engines: others, of adapters and memories, by name; each writes in a batch of its own.
        states: tuned states of the model by name; they share its batch.
        queue: requests that may wait, for each engine.
        cache: of states of prompts; None: none.

    Raises:
        ConfigError: a state of another model.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        engines: Mapping[str, Engine],
        states: Mapping[str, State],
        queue: int,
        cache: PrefixCache | None,
    ):
        self._served: dict[str, Served] = {}
        self.name = name
        self.schedulers: dict[str, Scheduler] = {}
        for variant, one in {"": engine, **engines}.items():
            full = f"{name}{SEPARATOR}{variant}" if variant else name
            self.schedulers[full] = Scheduler(one, queue, cache)
            self._served[full] = Served(full, self.schedulers[full], Grammars(one.tokenizer))
        base = self._served[name]
        for variant, state in states.items():
            full = f"{name}{SEPARATOR}{variant}"
            if full in self._served:
                raise ConfigError(f"{variant}: two variants of the model have this name; give another one")
            state.check(engine.model.config, 1)
            self._served[full] = base._replace(name=full, start=Snapshot(state))

    @property
    def names(self) -> list[str]:
        return list(self._served)

    def get(self, name: str) -> Served:
        """What a request's `model` names; the model itself where it is empty.

        Raises:
            Refusal: there is none of this name.
        """
        served = self._served.get(name or self.name)
        if served is None:
            near = did_you_mean(name, self._served)
            raise Refusal(404, f"there is no model {name[:200]!r}.{near}", "model", "model_not_found")
        return served

    @property
    def are_ready(self) -> bool:
        return all(scheduler.is_ready for scheduler in self.schedulers.values())

    @property
    def has_failed(self) -> bool:
        return any(scheduler.failure is not None for scheduler in self.schedulers.values())

    def start(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.start()

    async def stop(self, grace: float) -> None:
        """Finish what runs, within `grace` seconds."""
        await asyncio.gather(*(asyncio.to_thread(one.stop, grace) for one in self.schedulers.values()))
