"""What was measured, kept in a file, and how it is measured where it is not known."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from benchmarks.many_gpus.launch import Launcher
from benchmarks.many_gpus.rows import Figures, Part
from heron.errors import HeronError


class Results:
    """The figures of parts. Those that the file has of the same circumstances are known.

    Args:
        of: the circumstances: commit, device, version of PyTorch.
        trusted: whether they tell all; else nothing is known.
    """

    def __init__(self, path: Path, of: dict[str, str], trusted: bool):
        self._path, self._of = path, of
        lines = path.read_text(encoding="utf-8").splitlines() if trusted and path.exists() else []
        same = [record for record in map(json.loads, lines) if record.items() >= of.items()]
        self._known: dict[str, Figures] = {r["part"]: r["figures"] for r in same if "figures" in r}

    def measured(self, part: Part, launcher: Launcher) -> Figures | str:
        """The figures of a part, or in a line why there are none. It is begun only if it would end in time."""
        if part.name in self._known:
            return self._known[part.name]
        if part.seconds > launcher.left:
            return f"no time: takes {part.seconds:.0f} s, {launcher.left:.0f} s were left"
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="heron-many-", ignore_cleanup_errors=True) as folder:
            try:
                found = part.measure(launcher, Path(folder))
            except HeronError as error:
                found = f"failed: {error}"
        record = {**self._of, "part": part.name, "seconds": round(time.monotonic() - begun, 1)}
        record["failed" if isinstance(found, str) else "figures"] = found
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return found
