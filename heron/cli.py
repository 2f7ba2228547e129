"""The command line: `heron VERB`. Reads it, calls the verb, and prints what failed."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from heron.commands import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE, flags, streams
from heron.commands.streams import one_line
from heron.errors import HeronError, UnknownKeyError
from heron.train import threads
from heron.train.stop import Stopped, left_behind


def main(arguments: Sequence[str] | None = None, before_work: Callable[[], object] = lambda: None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (usage), 75 (stopped by a signal after saving).

    `before_work` is called once the command line has been read.
    """
    of_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    threads.wait_briefly()
    streams.open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _flushed(_run(arguments, before_work))
        except SystemExit as stop:  # of argparse, which has shown a help text or what is wrong
            raise SystemExit(_flushed(int(stop.code or 0))) from None
    if of_process and left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a library's call goes on in a thread, which the end of Python may not disturb
    return code


def _flushed(code: int) -> int:
    """`code`, or that of a failure where what was printed can't be written."""
    try:
        streams.flush()
    except OSError as error:
        return code or _fail(f"standard output: {error.strerror}", EXIT_FAILED)
    return code


_PRINTING = ("generate", "chat", "estimate", "eval", "bench", "info", "doctor")


def _goes_on(options: argparse.Namespace) -> bool:
    """Whether a verb has more to do than to print: files to write, kernels to build, requests to answer."""
    return options.verb not in _PRINTING or any(getattr(options, name, None) for name in ("json", "plot", "build"))


def _run(arguments: list[str], before_work: Callable[[], object]) -> int:
    try:
        options = flags.parser().parse_args(arguments)
        if options.verb not in ("train", "finetune", "demo"):  # which answer a signal in a way of their own
            import torch  # noqa: F401 - while Ctrl-C ends the process: an exception would leave half of it
        verb = options.module()
        before_work()
        with streams.lasting(("stdout", "stderr") if _goes_on(options) else ("stderr",)):
            return verb.run(options) or 0
    except UnknownKeyError as error:
        return _fail(error, EXIT_USAGE)
    except HeronError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Stopped:  # before a run had begun
        return EXIT_PREEMPTED
    except OSError as error:  # a folder that cannot be written, a disk that is full
        if isinstance(error, BrokenPipeError) and not _goes_on(options):
            return 0  # the reader of what it prints, `head` for instance, has gone
        return _fail(f"{error.filename or 'disk'}: {error.strerror or error}", EXIT_FAILED)
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        return _fail("the name of a file holds a null byte; no file can have that name", EXIT_FAILED)
    except (MemoryError, RuntimeError, TypeError, OverflowError) as error:
        if "can't start new thread" in str(error):
            return _fail(f"{error}: the system allows no more processes (see ulimit -u)", EXIT_FAILED)
        if (shortage := _shortage(error)) is None:
            raise
        return _fail(f"not enough memory: {shortage}; choose smaller sizes", EXIT_FAILED)


def _shortage(error: BaseException) -> str | None:
    if "torch" not in sys.modules:
        return None
    from heron.train import memory

    return memory.shortage(error)


def _fail(message: object, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads it
        streams.note(str(message))
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"heron: warning: {one_line(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
