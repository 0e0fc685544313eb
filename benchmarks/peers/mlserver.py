"""MLServer, as its documentation starts it: one process, models in it. Knows no model and no load."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from doorstep.testing.server import ManagedProcess, free_ports

ROOT = Path(__file__).resolve().parents[2]
VENV_VARIABLE = "DOORSTEP_MLSERVER_VENV"
DEFAULT_VENV = ROOT / ".cache" / "peers" / "mlserver"


def find_venv() -> Path | None:
    """The virtual environment that holds mlserver: $DOORSTEP_MLSERVER_VENV, or what `make peers` builds."""
    candidate = Path(os.environ.get(VENV_VARIABLE, DEFAULT_VENV))
    return candidate if (candidate / "bin" / "mlserver").exists() else None


class MlserverProcess(ManagedProcess):
    """`mlserver start` on three free ports of 127.0.0.1."""

    def __init__(self, venv: Path, folder: Path, *, start_timeout_s: float = 120.0) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        settings = {
            "host": "127.0.0.1",
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "metrics_port": self.metrics_port,
            "parallel_workers": 0,
            "debug": False,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        super().__init__(
            [str(venv / "bin" / "mlserver"), "start", str(folder)],
            ready_url=f"http://127.0.0.1:{self.http_port}/v2/models/mlp/ready",
            name="mlserver",
            cwd=folder,
            env={"PYTHONPATH": str(folder)},
            start_timeout_s=start_timeout_s,
        )


def version(venv: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('mlserver'))"
    found = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return f"MLServer {found.stdout.strip()}"
