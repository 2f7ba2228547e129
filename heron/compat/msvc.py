"""Find Microsoft's C++ compiler on Windows, so that CUDA extensions can be built without a developer prompt."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_VARIABLES = ("PATH", "INCLUDE", "LIB", "LIBPATH")


def environment_of_compiler() -> dict[str, str]:
    """PATH, INCLUDE, LIB and LIBPATH as Visual Studio's vcvars64.bat sets them; empty where there is none.

    Windows only. The newest installation with C++ tools is asked for through vswhere.exe.
    """
    program_files = os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)")
    vswhere = Path(program_files) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    if not vswhere.is_file():
        return {}
    query = [str(vswhere), "-latest", "-products", "*", "-property", "installationPath",
             "-requires", "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"]  # fmt: skip
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    script = Path(found) / "VC" / "Auxiliary" / "Build" / "vcvars64.bat"
    if not found or not script.is_file():
        return {}
    output = subprocess.run(["cmd", "/d", "/c", "call", str(script), ">nul", "&&", "set"],
                            capture_output=True, text=True, check=False).stdout  # fmt: skip
    return parse_environment(output)


def parse_environment(output: str) -> dict[str, str]:
    """The compiler's variables in the output of `set` (`NAME=value` lines, names in any case)."""
    pairs = (line.partition("=") for line in output.splitlines())
    return {name.upper(): value for name, equals, value in pairs if equals and name.upper() in _VARIABLES}
