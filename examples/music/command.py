"""How a command begins and ends: what its numbers may be, and an error in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from heron.errors import HeronError


def parser(page: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of the command."""
    return argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"wanted a whole number, {lowest} or more, got {text!r}")
        return int(text)

    return whole


def run(main: Callable[[], None]) -> None:
    """Call `main`. An error that the user can correct becomes one line on standard error, and exit code 1."""
    try:
        main()
    except (HeronError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
