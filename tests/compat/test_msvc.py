"""Reading the environment that Visual Studio's script leaves behind."""

from __future__ import annotations

import subprocess
import types

import pytest

from heron.compat import msvc


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("", {}),
        ("Path=C:\\VC\\bin;C:\\Windows\r\n", {"PATH": "C:\\VC\\bin;C:\\Windows"}),
        ("INCLUDE=a;b\nLIB=c\nLIBPATH=d\nPATH=e\n", {"INCLUDE": "a;b", "LIB": "c", "LIBPATH": "d", "PATH": "e"}),
        ("PROMPT=$P$G\nLIBRARY=x\nOLDPATH=y\n", {}),
        ("PATH=C:\\a=b\\bin\n", {"PATH": "C:\\a=b\\bin"}),
        ("LIB=\n", {"LIB": ""}),
        ("PATH\nThe system cannot find the path specified.\n", {}),
        ("include=first\nINCLUDE=second\n", {"INCLUDE": "second"}),
    ],
)
def test_parse_environment(output, wanted):
    assert msvc.parse_environment(output) == wanted


def test_without_vswhere_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PROGRAMFILES(X86)", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is there to be run"))
    assert msvc.environment_of_compiler() == {}


@pytest.mark.parametrize("has_tools", [True, False])
def test_vswhere_is_asked_and_its_script_run_without_a_shell(monkeypatch, tmp_path, has_tools):
    vswhere = tmp_path / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    script = tmp_path / "VS 2022" / "VC" / "Auxiliary" / "Build" / "vcvars64.bat"
    for path in (vswhere, script) if has_tools else (vswhere,):
        path.parent.mkdir(parents=True)
        path.touch()
    calls = []

    def run(command, **options):
        assert isinstance(command, list)
        assert not options.get("shell")
        calls.append(command)
        answer = f"{tmp_path / 'VS 2022'}\n" if command[0] == str(vswhere) else "Path=C:\\VC\nTEMP=x\n"
        return types.SimpleNamespace(stdout=answer)

    monkeypatch.setenv("PROGRAMFILES(X86)", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    found = msvc.environment_of_compiler()
    assert found == ({"PATH": "C:\\VC"} if has_tools else {})
    assert len(calls) == (2 if has_tools else 1)
    assert "-latest" in calls[0]
    if has_tools:
        assert calls[1][0] == "cmd"
        assert str(script) in calls[1]
