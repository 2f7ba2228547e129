"""A music copilot, in four commands: prepare, train, continue, evaluate. README.md says what each does."""

import sys
from importlib.util import find_spec

from heron.train import threads

_missing = [package for package in ("miditok", "symusic", "music21") if find_spec(package) is None]
if _missing:  # every file here needs one of them
    _names = ", ".join(_missing)
    sys.exit(f"examples.music needs {_names}: pip install --constraint constraints.txt --editable '.[music]'")

threads.wait_briefly()  # before PyTorch is loaded
