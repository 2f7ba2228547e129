"""Who may ask, and how large a question may be: checked before any route sees the request."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Mapping
from typing import Any

from heron import strict_json
from heron.config.serve import ServeConfig
from heron.serve.metrics import Metrics
from heron.serve.refusals import Refusal
from heron.serve.turns import Turns

SECONDS_FOR_BODY = 10.0
MOST_FIELDS = 256
OPEN_PATHS = ("/", "/health", "/ready")  # and the page's files: without a key
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
]


class Guard:
    """An ASGI application around another one, which sees what passes alone, its body whole.

    A server that listens on this machine alone answers to its own names alone, and to no page of another origin: the
    browser of the one who sits here would carry such questions.
    """

    def __init__(self, app: Any, config: ServeConfig, metrics: Metrics):
        self._app, self._key, self._origins, self._metrics = app, config.api_key, config.origins, metrics
        self._most_bytes = config.max_body
        self._turns = Turns()
        self._hosts = {"localhost", "127.0.0.1", "::1", config.host} if config.is_local else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            else:
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in given)]
                self._metrics.count(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_origin(headers)
            if scope["method"] != "OPTIONS" and not _is_open(scope["path"]):
                self._check_key(headers)
            if scope["method"] == "POST":
                await self._turns.wait()
                receive = _replayed(await self._body(headers, receive), receive)
        except Refusal as refusal:
            origin = headers.get(b"origin")
            await _refuse(refusal, send_guarded, origin if origin in self._origins else None)
        except _GoneError:
            return
        else:
            await self._app(scope, receive, send_guarded)

    def _check_origin(self, headers: Mapping[bytes, str]) -> None:
        if self._hosts is None:
            return
        host = _hostname(headers.get(b"host", ""))
        if host not in self._hosts:
            raise Refusal(403, "this server answers to localhost alone", code="wrong_host")
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._origins and _hostname(origin) not in self._hosts:
            raise Refusal(403, "pages of this origin may not ask; see --cors", code="wrong_origin")

    def _check_key(self, headers: Mapping[bytes, str]) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(401, "wanted the server's key, as in Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, headers: Mapping[bytes, str], receive: Any) -> bytes:
        """The whole body, JSON that every reader takes for the same."""
        if headers.get(b"content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "wanted the header Content-Type: application/json")
        body, is_whole = bytearray(), False
        try:
            async with asyncio.timeout(SECONDS_FOR_BODY):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    body += message.get("body", b"")
                    if len(body) > self._most_bytes:
                        raise Refusal(413, f"the body may have {self._most_bytes} bytes")
                    is_whole = not message.get("more_body", False)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {SECONDS_FOR_BODY:g} seconds") from None
        try:
            value = strict_json.loads(bytes(body))
        except ValueError as error:
            raise Refusal(400, f"the body is {error}") from None
        if isinstance(value, dict) and len(value) > MOST_FIELDS:  # each that is unknown would be an error of its own
            raise Refusal(400, f"the body may have {MOST_FIELDS} fields, it has {len(value)}")
        return bytes(body)


class _GoneError(Exception):
    """The client has left."""


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/page/")


def _hostname(place: str) -> str:
    """The name in `name:port`, with or without a scheme in front."""
    found = re.fullmatch(r"(?:\w+://)?\[?([^\[\]/]*?)\]?(?::\d+)?", place)
    return found[1].lower() if found else ""


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body, then what comes behind it."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(refusal: Refusal, send: Any, origin: str | None) -> None:
    """Answer with a refusal; `origin`: that of a page that may ask, and so may read it."""
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if origin is not None:
        headers |= {"access-control-allow-origin": origin, "vary": "Origin"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in {**headers, **refusal.headers}.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
