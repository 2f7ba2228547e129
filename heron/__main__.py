"""`python -m heron VERB`, and where the command `heron` begins: Ctrl-C is one line even while modules are imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Run the command line; returns the exit code."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # else it is ignored, as in a shell's background job, and stays so
        signal.signal(signal.SIGINT, _leave)
    from heron import cli

    return cli.main(before_work=lambda: signal.signal(signal.SIGINT, usual))


def _leave(*_: object) -> NoReturn:
    """Nothing was begun yet; an exception out of the middle of an import would be shown, or swallowed."""
    os.write(2, b"heron: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
