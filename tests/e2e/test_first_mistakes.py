"""What somebody sees who serves the wrong thing: one line that says what to do, and no server that serves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """\
import doorstep

class Model(doorstep.Model):
    def predict({arguments}) -> {returns}:
        return 1.0
"""


def serve(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys, doorstep.cli; sys.exit(doorstep.cli.main())", "serve", *arguments]
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    return subprocess.run(command + ports, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("models/half/1/model.py", "is a file, not a folder of models"),
        ("models/half", "models/half: is a model, not a folder of models (name models)"),
        ("model", "model: there is no such folder (did you mean models?)"),
    ],
)
def test_what_is_no_folder_of_models_is_refused_with_what_to_name(tmp_path: Path, named: str, told: str) -> None:
    write(tmp_path / "models/half/1/model.py", MODEL.format(arguments="self, x: float", returns="float"))
    done = serve(named, folder=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_models_that_do_not_load_are_each_told_of_once_with_the_fix(tmp_path: Path) -> None:
    write(tmp_path / "models/flat/model.py", MODEL.format(arguments="self, x: float", returns="float"))
    write(tmp_path / "models/selfless/1/model.py", MODEL.format(arguments="x: float", returns="float"))
    done = serve("models", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("move flat/model.py to flat/1/model.py") == 1
    assert done.stderr.count("predict lacks `self`; write `def predict(self, …)`") == 1
    assert "not starting, because of 'flat', 'selfless'" in done.stderr
    assert "Traceback" not in done.stderr
