"""Models whose process runs in another Python than the server's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from doorstep.backends.base import PythonEnvironment
from doorstep.backends.python import PythonBackend
from doorstep.errors import DoorstepError
from doorstep.testing.python_models import PythonModel

SOURCE = """
import os, sys
import doorstep
class Model(doorstep.Model):
    def predict(self, what: str) -> str:
        return str(eval(what))
"""


def ask(served: PythonModel, what: str) -> str:
    array = np.empty(1, object)
    array[0] = what.encode()
    return served(what=array)["output"][0].decode()


@pytest.fixture
def environment(monkeypatch):
    """Says which Python every model of the test gets."""

    def set(python: PythonEnvironment) -> None:
        monkeypatch.setattr(PythonBackend, "environment", lambda *_: python)

    return set


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A virtual environment of the server's own Python in which nothing is installed."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (package,) = folder.glob("lib/python*/site-packages")
    (package / "only_here.py").write_text("where = 'in the environment'\n")
    (package / "orjson_like.py").write_text("")
    return folder


def test_an_environment_without_doorstep_runs_a_model(tmp_path, environment, bare):
    environment(PythonEnvironment(bare / "bin" / "python", variables={"DOORSTEP_TEST": "given"}))
    with PythonModel(tmp_path / "m", SOURCE) as served:
        assert ask(served, "sys.prefix") == str(bare)
        assert ask(served, "__import__('only_here').where") == "in the environment"
        assert ask(served, "os.environ['DOORSTEP_TEST']") == "given"
        assert ask(served, "__import__('google.protobuf').protobuf.__name__") == "google.protobuf"
        assert "workers" not in ask(served, "' '.join(sys.path)")
        os.kill(served.worker.pid, 9)
        assert ask(served, "sys.prefix") == str(bare)  # the next process too


def test_paths_of_an_environment_win_over_the_servers(tmp_path, environment):
    (tmp_path / "packages" / "rich").mkdir(parents=True)
    (tmp_path / "packages" / "rich" / "__init__.py").write_text("")
    environment(PythonEnvironment(paths=(str(tmp_path / "packages"),)))
    with PythonModel(tmp_path / "m", SOURCE) as served:
        assert ask(served, "__import__('rich').__file__").startswith(str(tmp_path))
        assert ask(served, "sys.prefix") == sys.prefix


def test_an_interpreter_that_is_not_there_is_named(tmp_path, environment):
    environment(PythonEnvironment(tmp_path / "no" / "python"))
    with pytest.raises(DoorstepError, match=r"cannot start a process for 'm.*no/python"):
        PythonModel(tmp_path / "m", SOURCE)


def _program(folder: Path, lines: str) -> Path:
    """A Python that says it is another one."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{lines}")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ((3, 9), "environment has Python 3.9; the server's is .*needs at least Python 3.11"),
        ((3, 99), "environment has Python 3.99; .*Install in it: pip install numpy ml_dtypes orjson protobuf"),
    ],
)
def test_an_environment_that_cannot_do_says_what_to_install(tmp_path, environment, bare, version, says):
    program = _program(
        tmp_path,
        "import runpy, sys\n"
        f"sys.version_info = type('V', (tuple,), {{'major': 3}})({version!r})\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n",
    )
    environment(PythonEnvironment(program))
    with pytest.raises(DoorstepError, match=says):
        PythonModel(tmp_path / "m", SOURCE)
