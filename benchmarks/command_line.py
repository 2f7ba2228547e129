"""How a command of several actions ends."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from heron.commands import EXIT_FAILED, EXIT_PREEMPTED
from heron.errors import HeronError


def exit_code(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Do the action that was chosen. An error is one line; Ctrl-C says nothing."""
    try:
        return options.action(options)
    except HeronError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program to its end. SIGTERM leaves as an exception does, so that processes which it has begun are ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))
    sys.exit(main())
