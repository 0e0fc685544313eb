"""`make peers`: a virtual environment for each peer under .cache/peers, with what it needs. Starts nothing."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers import mlserver, triton

PACKAGES: dict[Path, tuple[str, ...]] = {
    triton.DEFAULT_VENV: ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime"),
    mlserver.DEFAULT_VENV: ("mlserver==1.7.1", "onnxruntime"),
}


def main() -> int:
    failed = 0
    for folder, packages in PACKAGES.items():
        print(f"{folder}: {', '.join(packages)}", flush=True)
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        failed += subprocess.run([*pip, *packages], check=False).returncode != 0
    if failed:
        print("some peers could not be installed; `make bench` leaves them out", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
