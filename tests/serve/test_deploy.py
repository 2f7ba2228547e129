"""The container files and the unit: linted, and what they run is a command that exists."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from heron.commands import flags

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(file):
    """(instruction, the rest) of each, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", file.read_text(encoding="utf-8")).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_built_as_it_should_be(file):
    found = instructions(file)
    names = [name for name, _ in found]
    assert set(names) <= KNOWN
    assert names[0] == "FROM"
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", found[0][1]), "a version, not latest"
    assert names.index("USER") > max(number for number, name in enumerate(names) if name == "RUN")
    assert dict(found)["USER"] != "root"
    for name, rest in found:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if name == "RUN" and "apt-get install" in rest:
            assert {"--yes", "--no-install-recommends"} <= set(shlex.split(rest))
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if name == "RUN" and "pip install" in rest:
            assert "--no-cache-dir --constraint constraints.txt" in rest
            [extra] = re.findall(r"\.\[(\w+)\]", rest)
            assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list), "so that signals reach the server"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_runs_a_command_that_exists(file):
    found = dict(instructions(file))
    program, *words = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
    assert program == "heron"
    options = flags.parser().parse_args(words)
    assert options.host == "0.0.0.0"
    assert options.api_key_file
    assert found["EXPOSE"] == "8000"


def test_the_unit_runs_a_command_that_exists():
    text = (ROOT / "deploy/heron.service").read_text(encoding="utf-8")
    assert re.findall(r"^\[(\w+)\]$", text, re.MULTILINE) == ["Unit", "Service", "Install"]
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    program, *words = shlex.split(settings["ExecStart"])
    assert program.endswith("/heron")
    options = flags.parser().parse_args(words)
    assert int(settings["TimeoutStopSec"]) > options.grace
