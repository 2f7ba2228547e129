"""/v1/embeddings: texts become vectors, one after another."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np

from heron.serve.openai import EmbeddingsRequest
from heron.serve.refusals import Refusal, too_slow
from heron.serve.service import Service
from heron.serve.threads import worked


class Embeddings:
    """What a request wants.

    Raises:
        Refusal: there is no such model.
    """

    def __init__(self, service: Service, body: EmbeddingsRequest):
        self._service, self._body = service, body
        self._served = service.models.get(body.model)
        self._deadline = time.monotonic() + service.config.timeout

    def cancel(self) -> None:
        """Read no more texts."""
        self._deadline = 0.0

    async def whole(self) -> dict[str, Any]:
        """The answer.

        Raises:
            HeronError: what cannot be read, takes too long, or waits behind too many.
        """
        body, data, n_tokens = self._body, [], 0
        for number, text in enumerate(body.texts):
            ids = await worked(len(text), self._served.prompt_ids, text)
            self._service.check_length(ids)
            n_tokens += len(ids)
            vector = await self._service.embedded(self._served, ids)
            if time.monotonic() > self._deadline:
                raise too_slow()
            if body.dimensions not in (None, len(vector)):
                raise Refusal(400, f"dimensions: this model's vectors have {len(vector)}", "dimensions")
            shown: Any = vector.tolist()
            if body.encoding_format == "base64":
                shown = base64.b64encode(vector.astype(np.float32).tobytes()).decode()
            data.append({"object": "embedding", "index": number, "embedding": shown})
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "model": self._served.name, "data": data, "usage": usage}
