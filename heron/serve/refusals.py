"""What the server answers instead of a result: a status, a sentence, and OpenAI's words for the kind of error."""

from __future__ import annotations

from typing import Any

from heron.errors import HeronError
from heron.serve.sessions import NoSuchState

ENGINE_FAILED = "engine_failed"  # the code of that refusal
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(HeronError):
    """A request that is not served.

    Args:
        status: of HTTP.
        param: the field that is wrong.
        code: OpenAI's word for it, which programs look at.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def __reduce__(self) -> tuple[type[Refusal], tuple[Any, ...]]:  # it goes from process to process
        return Refusal, (self.status, str(self), self.param, self.code, self.retry_after)

    @property
    def headers(self) -> dict[str, str]:
        """Those that go with the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        """The answer, in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def forgotten(what: str, param: str | None = None, code: str = "not_found") -> Refusal:
    """A conversation that the server knows nothing of, or nothing any more: `what` says which was wanted."""
    kept = "the messages of conversations are kept in the server's memory alone, until it ends or they are too many"
    return Refusal(404, f"{what}: there is none (any more); {kept}. Send all messages of the conversation", param, code)


def too_busy(message: str) -> Refusal:
    """One more request than the server takes; the client shall try again."""
    return Refusal(429, message, code="rate_limit_exceeded", retry_after=1)


def too_slow() -> Refusal:
    """The time of a request is over."""
    return Refusal(408, "the request took longer than the server allows", code="timeout")


def stopping() -> Refusal:
    """The server ends, and another may take its place."""
    return Refusal(503, "the server is stopping", code="server_stopping", retry_after=5)


def engine_failed(status: int = 500) -> Refusal:
    """The device or Heron has a fault: no text can be written any more."""
    return Refusal(status, "the engine has failed; the server's log says why", code=ENGINE_FAILED)


def of_error(error: HeronError) -> Refusal:
    """An error of ours that a request has caused. Its message names no file: no request does."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NoSuchState):
        return Refusal(404, str(error), "state", "state_not_found")
    return Refusal(400, str(error))
