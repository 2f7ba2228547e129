"""What HTTP knows of the models: which name stands for which engine, and what a text becomes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from heron.errors import did_you_mean
from heron.generation import Request
from heron.generation.requests import check_marks, prompt_ids
from heron.serve.engines import Engines, Offer
from heron.serve.jobs import Desk
from heron.serve.link import Link
from heron.serve.orders import Drawn, Start
from heron.serve.refusals import Refusal
from heron.tokenizer import Tokenizer


class Served(NamedTuple):
    """One name in a request's `model`."""

    name: str
    offer: Offer
    desk: Desk

    @property
    def engine(self) -> str:
        """The name of the engine that writes."""
        return self.offer.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.offer.tokenizer

    @property
    def start(self) -> Start:
        """What its texts begin from."""
        return self.offer.start

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """As :meth:`heron.Engine.prompt_ids`."""
        return prompt_ids(prompt, None, self.tokenizer, self.offer.vocab_size)

    def check(self, request: Request) -> None:
        """Errors as of :meth:`heron.Engine.check`."""
        request.check(self.tokenizer, self.offer.vocab_size)
        check_marks(request.marks, len(self.prompt_ids(request.prompt)))


class Models:
    """All that a server offers, by name.

    Args:
        offers: the first of them is the model itself.
        queue: requests that may wait, for each engine.
        link: to the engines.
    """

    def __init__(self, offers: Mapping[str, Offer], queue: int, link: Link):
        self.link = link
        engines = {offer.engine: offer for offer in offers.values()}
        self.desks = {engine: Desk(engine, offer.rows, queue, link) for engine, offer in engines.items()}
        self._served = {name: Served(name, offer, self.desks[offer.engine]) for name, offer in offers.items()}

    @property
    def names(self) -> list[str]:
        return list(self._served)

    def get(self, name: str) -> Served:
        """What a request's `model` names; the model itself where it is empty.

        Raises:
            Refusal: there is none of this name.
        """
        served = self._served.get(name or self.names[0])
        if served is None:
            near = did_you_mean(name, self._served)
            why = f"there is no model {name[:200]!r}; this server has {', '.join(self.names)}.{near}"
            raise Refusal(404, why, "model", "model_not_found")
        return served

    @property
    def are_ready(self) -> bool:
        return all(desk.is_ready for desk in self.desks.values())

    @property
    def has_failed(self) -> bool:
        return any(desk.has_failed for desk in self.desks.values())

    def start(self) -> None:
        """Begin, in the event loop of HTTP."""
        self.link.start(self._take)
        for desk in self.desks.values():
            desk.open()

    async def stop(self, grace: float) -> None:
        """Take no more orders, and finish what runs within `grace` seconds."""
        for desk in self.desks.values():
            desk.close()
        await self.link.ask(Engines.stop, grace)

    def _take(self, engine: str, drawn: Sequence[Drawn]) -> None:
        self.desks[engine].take(drawn)
