"""A real Triton without a container: the binary inside the nvidia-pytriton wheel. Knows no model and no load.

The wheel carries the HTTP and gRPC fronts, the core scheduler, the local cache and the Python backend; no ONNX backend.
Its Python backend wants a stub that fits the interpreter, so each process gets a scratch backend folder with that stub.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from doorstep.testing.server import ManagedProcess, free_ports

ROOT = Path(__file__).resolve().parents[2]
VENV_VARIABLE = "DOORSTEP_TRITON_VENV"
DEFAULT_VENV = ROOT / ".cache" / "peers" / "triton"


def find_venv() -> Path | None:
    """The virtual environment that holds nvidia-pytriton: $DOORSTEP_TRITON_VENV, or what `make peers` builds."""
    candidate = Path(os.environ.get(VENV_VARIABLE, DEFAULT_VENV))
    return candidate if _package(candidate) is not None else None


def _package(venv: Path) -> Path | None:
    return next(venv.glob("lib/python3.*/site-packages/pytriton/tritonserver"), None)


class TritonProcess(ManagedProcess):
    """tritonserver on three free ports of 127.0.0.1; `options` are appended to its command line."""

    def __init__(
        self,
        venv: Path,
        models: Path | Iterable[Path],
        *options: str,
        ready: str = "ready",
        start_timeout_s: float = 120.0,
    ) -> None:
        package = _package(venv)
        if package is None:
            raise FileNotFoundError(f"no nvidia-pytriton in {venv}: run `make peers`, or set {VENV_VARIABLE}")
        self._scratch = Path(tempfile.mkdtemp(prefix="triton-backends-"))
        python = package.parents[2].name.removeprefix("python")  # lib/python3.11/site-packages/… → 3.11
        shutil.copytree(package / "backends", self._scratch, dirs_exist_ok=True)
        stub = package / "python_backend_stubs" / python / "triton_python_backend_stub"
        shutil.copy2(stub, self._scratch / "python" / stub.name)
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        repositories = [models] if isinstance(models, Path) else list(models)
        super().__init__(
            [
                str(package / "bin" / "tritonserver"),
                *(f"--model-repository={path}" for path in repositories),
                f"--backend-directory={self._scratch}",
                f"--cache-directory={package / 'caches'}",
                "--http-address=127.0.0.1",
                "--grpc-address=127.0.0.1",
                "--metrics-address=127.0.0.1",
                f"--http-port={self.http_port}",
                f"--grpc-port={self.grpc_port}",
                f"--metrics-port={self.metrics_port}",
                *options,
            ],
            ready_url=f"http://127.0.0.1:{self.http_port}/v2/health/{ready}",
            name="triton",
            env={
                "LD_LIBRARY_PATH": str(package.parents[1] / "nvidia_pytriton.libs"),
                "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": "",
            },
            start_timeout_s=start_timeout_s,
        )

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)


def version(venv: Path) -> str:
    """What this Triton is, for the head of a table."""
    python = venv / "bin" / "python"
    code = "import importlib.metadata as m; print(m.version('nvidia-pytriton'))"
    wheel = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return f"Triton 2.51.0 (nvidia-pytriton {wheel})"
