"""The files of a folder that are data: not a run's own, not hidden ones, and not what nobody named."""

from __future__ import annotations

import collections
import fnmatch
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from heron.data.files import UNPACK_FIRST, suffix_of
from heron.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson")  # read wherever they are
ROW_SUFFIXES = (".json", ".csv", ".tsv", ".parquet")  # read where their first row has the column

_RUN = (("run.lock",), ("config.yaml", "log.jsonl"), ("train_log.txt", "rwkv-init.pth"))  # any of these: it is a run
_OF_A_RUN = {
    "log.jsonl", "train_log.txt", "samples", "checkpoints", "bad", "tensorboard", "wandb", "config.yaml",
    "run_status.json", "run.lock", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
_OF_PREPARE = (".part", ".bin", ".idx", ".checks.json", ".skipped.log", ".recalled")


def files_in(root: Path, glob: str | None, fault: Callable[[Path], str | None]) -> tuple[list[Path], str]:
    """The data files below the folder `root`, in the order of their paths, and what was passed over, as a clause.

    Left out are: Heron's runs and official ones, folders of a model's weights, virtual environments and installed
    packages, hidden files and folders, what `heron prepare` wrote, and files whose suffix (in either case, also behind
    it .gz, .bz2, .xz) is not of TEXT_SUFFIXES or ROW_SUFFIXES. If `root` is a run itself, the run's own files are.
    Links to folders are followed, to each folder once.

    Args:
        glob: patterns between commas, such as ``"*.py,docs/**/*.rst"``: read these files instead, whatever they hold.
        fault: why a file does not hold what its suffixes say, or None.

    Raises:
        ConfigError: a pattern with braces.
        DataError: there is no such file; it says what was passed over.
    """
    patterns = _patterns(glob)
    passed: collections.Counter[str] = collections.Counter()
    suffixes: collections.Counter[str] = collections.Counter()
    reasons: list[str] = []
    found = []
    for path in _walk(root, passed):
        suffix = suffix_of(path)
        if patterns is not None and not path.name.endswith(_OF_PREPARE):
            wanted = _matches(path.relative_to(root).as_posix(), patterns)
        else:
            wanted = suffix in (*TEXT_SUFFIXES, *ROW_SUFFIXES) and not path.name.endswith(_OF_PREPARE)
            wanted = wanted and patterns is None
            if wanted and (reason := fault(path)):
                passed["not what their names say"] += 1
                reasons.append(reason)
                continue
        if wanted:
            found.append(path)
        else:
            suffixes[path.suffix.lower() or "without suffix"] += 1
    clause = _clause(passed, suffixes, reasons, glob)
    if not found:
        wanted = f"files that match {glob}" if glob else f"{', '.join((*TEXT_SUFFIXES, *ROW_SUFFIXES))} files"
        unpack = [suffix for suffix in suffixes if suffix in UNPACK_FIRST]
        hint = f"; unpack {', '.join(unpack)} first, or pack as .gz" if unpack else ""
        raise DataError(f"{root}: wanted a folder with {wanted}, found none{clause and f'; {clause}'}{hint}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix()), clause


def _walk(root: Path, passed: collections.Counter[str]) -> Iterator[Path]:
    """Every file below `root` that may be data; what else is there is counted."""
    seen = {_identity(root)}
    own = _OF_A_RUN if _is_run(root) else frozenset()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError:
            passed["folders that cannot be opened"] += 1
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                passed["hidden ones"] += 1
            elif folder == root and entry.name in own:
                passed["the run's own"] += 1
            elif entry.is_file():
                yield path
            elif not entry.is_dir():
                passed["neither files nor folders"] += 1
            elif _is_run(path):
                passed["runs"] += 1
            elif _is_model(path):
                passed["models"] += 1
            elif _is_of_tools(path):
                passed["virtual environments and packages"] += 1
            elif (identity := _identity(path)) in seen:
                passed["folders that are read under another name"] += 1
            else:
                seen.add(identity)
                waiting.append(path)


def _identity(folder: Path) -> tuple[int, int] | str:
    status = folder.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else str(folder.resolve())


def _is_run(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _RUN)


def _is_model(folder: Path) -> bool:
    """Whether weights and their config lie there: the .txt and .md beside them are a vocabulary and a model card."""
    has_config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return has_config and any(folder.glob("*.safetensors"))


def _is_of_tools(folder: Path) -> bool:
    return folder.name in ("node_modules", "site-packages", "__pycache__") or (folder / "pyvenv.cfg").is_file()


def _patterns(glob: str | None) -> list[str] | None:
    if glob is None:
        return None
    if "{" in glob:
        raise ConfigError(f'glob {glob!r}: braces are not known; write the patterns between commas, "*.py,*.md"')
    return [pattern.strip().removeprefix("./").replace("**/", "*") for pattern in glob.split(",") if pattern.strip()]


def _matches(path: str, patterns: list[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)


def _clause(
    passed: collections.Counter[str], suffixes: collections.Counter[str], reasons: list[str], glob: str | None
) -> str:
    common = suffixes.most_common(8)
    counts = [*sorted(passed.items()), *common, ("other suffixes", sum(suffixes.values()) - sum(dict(common).values()))]
    parts = [f"{what} ({count:,})" for what, count in counts if count]
    if not parts:
        return ""
    hint = '; --glob "*.py,*.txt" would choose by name' if glob is None and common else ""
    return f"passed over: {', '.join(parts)}{hint}{''.join(f'; {reason}' for reason in reasons[:3])}"
