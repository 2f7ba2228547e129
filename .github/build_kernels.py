"""Build every CUDA kernel into heron/ops/_built, for a wheel. Usage: build_kernels.py [CAPABILITY ...], such as 8.0 9.0

It needs nvcc and PyTorch (of any kind), and no GPU. Without arguments: 8.0, 9.0, 10.0 and 12.0, where nvcc knows them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from heron.ops import _build, ahead

USUAL = ((8, 0), (9, 0), (10, 0), (12, 0))


def known() -> set[str]:
    """What nvcc can build for: 80, 90, ..."""
    listing = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return {line.strip().removeprefix("sm_") for line in listing.splitlines()}


def main(wanted: list[str]) -> None:
    """Build as many libraries at a time as there are processors."""
    asked = [tuple(map(int, each.split("."))) for each in wanted]
    targets = asked or [each for each in USUAL if "".join(map(str, each)) in known()]
    with _build.bundling():
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            builds = [threads.submit(form.load, target) for target in targets for form in ahead.ALL]
            for build in builds:
                build.result()
        for lock in _build.BUNDLED.glob("*.lock"):
            lock.unlink()
    libraries = sorted(_build.BUNDLED.glob("*/*.so"))
    size = sum(library.stat().st_size for library in libraries)
    print(f"{len(libraries)} libraries for {len(targets)} kinds of GPU, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
