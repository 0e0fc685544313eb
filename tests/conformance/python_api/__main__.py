"""`python tests/conformance/python_api record | differences`: Triton's answers on record, or how Doorstep's differ."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from differential.servers import start_doorstep, start_triton

from python_api.models import MODELS, write_models
from python_api.questions import ask_all

FILE = Path(__file__).with_name("triton.json")
OPTIONS = ("--model-control-mode=explicit", "--exit-timeout-secs=2", *(f"--load-model={name}" for name in MODELS))


def answers(start) -> dict[str, Any]:
    """A server that died of a question is started again for the next."""
    found: dict[str, Any] = {}
    whole = False
    while not whole:
        with tempfile.TemporaryDirectory() as folder, start(write_models(Path(folder)), OPTIONS) as server:
            whole = ask_all(server.http_port, server.grpc, found)
            print(len(found), flush=True)
    return found


def record() -> None:
    FILE.write_text(json.dumps(answers(start_triton), indent=1, ensure_ascii=False) + "\n")


def differences() -> None:
    expected = json.loads(FILE.read_text())
    for name, said in answers(start_doorstep).items():
        if said != expected.get(name):
            print(f"{name}\n    Doorstep: {said!r}\n    Triton:   {expected.get(name)!r}")


if __name__ == "__main__":
    {"record": record, "differences": differences}[sys.argv[1]]()
