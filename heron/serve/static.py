"""The page's files, read once: no request names a file."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.responses import Response

from heron.serve.refusals import Refusal

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"


class Page:
    """The files of FOLDER, by name."""

    def __init__(self) -> None:
        self._files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.is_file()}

    def response(self, name: str) -> Response:
        """A file of the page. Refusal where there is none of this name."""
        content = self._files.get(name)
        if content is None:
            raise Refusal(404, "there is no such page", code="not_found")
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(content, media_type=kind or "application/octet-stream")
