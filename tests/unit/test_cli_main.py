"""The front door of the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from doorstep._version import __version__
from doorstep.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_no_command_shows_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: doorstep COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"doorstep {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("serv", "serve"), ("chek", "check"), ("benchmark", "bench"), ("infr", "infer")]
)
def test_a_mistyped_command_is_guessed(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    assert f"Did you mean `doorstep {meant}`?" in capsys.readouterr().err


def test_an_option_in_place_of_a_command_says_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--http-port", "1"]) == 2
    assert "must come after a command" in capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("serve", "tritonserver")])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: doorstep {command}" in capsys.readouterr().out


def test_the_front_door_imports_no_library() -> None:
    """What it imports, every start of the server pays for."""
    code = "import sys, doorstep.cli; print({'numpy', 'orjson', 'rich', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
