"""A server that speaks as much of the OpenAI interface as the page uses, and answers what a test has written down."""

from __future__ import annotations

import contextlib
import json
import math
import mimetypes
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "heron/serve/page"
FILES = {file.name: file for file in PAGE.iterdir()}


class ScriptedServer(ThreadingHTTPServer):
    """Answers `script[last user message]`, else an echo. Listens on 127.0.0.1 at a free port.

    Attributes:
        script: message -> its answer; the tokens are the words with the space before them.
        endless: messages to which the answer goes on until the client leaves.
        requests: bodies of the chat requests, as they came.
        left: is set when a client has left an answer before its end.
        key: the API key that is wanted; "": none.
        states: names of the kept states, each with its session.
        failure: what is said in the middle of every answer, which ends there; "": nothing. Then `ended` is set.
        refusal: status and headers of the answer to every chat request; None: they are answered.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models = ["heron-tiny"]
        self.pause = 0.0  # seconds between two tokens
        self.script: dict[str, str] = {}
        self.endless: set[str] = set()
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.key = ""
        self.states: dict[str, str] = {}
        self.failure, self.ended = "", threading.Event()
        self.refusal: tuple[int, dict[str, str]] | None = None

    def answer(self, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The tokens of an answer, each with the field of the delta that it belongs to."""
        asked = body["messages"][-1]["content"]
        if body.get("think") in ("on", "short", "long"):
            yield from (("reasoning_content", word) for word in ("Let", " me", " see", "."))
        text = self.script.get(asked, f"You said: {asked}")
        yield from (("content", word) for word in re.findall(r"\s*\S+|\s+$", text))
        while asked in self.endless:
            time.sleep(0.01)
            yield "content", " more"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/v1/"):
            if self._is_allowed():
                ids = {"/v1/models": self.server.models, "/v1/states": list(self.server.states)}[self.path]
                self._json(200, {"object": "list", "data": [{"id": name} for name in ids]})
            return
        file = FILES.get("index.html" if self.path == "/" else self.path.removeprefix("/page/"))
        if file is None:
            self._json(404, {"error": {"message": "not found"}})
            return
        self._send(200, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        if self.path == "/v1/states":
            self.server.states[body["name"]] = body["session_id"]
            self._json(200, {"id": body["name"]})
        elif self.server.refusal:
            status, headers = self.server.refusal
            self._json(status, {"error": {"message": "refused as the test says"}}, headers)
        else:
            self.server.requests.append(body)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._stream(body)
                return
            self.server.left.set()

    def do_DELETE(self) -> None:
        del self.server.states[self.path.rsplit("/", 1)[1]]
        self._json(200, {"deleted": True})

    def _is_allowed(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._json(401, {"error": {"message": "wanted an API key"}})
            return False
        return True

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = 0
        for field, word in self.server.answer(body):
            time.sleep(self.server.pause)
            if self.server.failure:
                self._event({"error": {"message": self.server.failure}})
                self.server.ended.set()
                return
            choice = {"index": 0, "delta": {field: word}, "finish_reason": None}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [_logprobs(word, body["top_logprobs"], count)]}
            self._event({"choices": [choice]})
            count += 1
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        prompt = sum(len(one["content"].split()) for one in body["messages"])
        details = {"cached_tokens": prompt - len(body["messages"][-1]["content"].split())}
        usage = {"completion_tokens": count, "prompt_tokens": prompt, "prompt_tokens_details": details}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _logprobs(word: str, count: int, place: int) -> dict[str, Any]:
    """A token whose probability goes down and up again along the text, and `count` others."""
    shares = [0.5 / 2**rank for rank in range(count)]
    rank = (0, 0, 1, 0, 3, 0, 0, 2)[place % 8] if count else 0
    others = [word if at == rank else f" other{at}" for at in range(count)]
    return {
        **_entry(word, shares[rank] if count else 0.5),
        "top_logprobs": [_entry(text, share) for text, share in zip(others, shares, strict=True)],
    }


def _entry(text: str, share: float) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(share), "bytes": list(text.encode())}
