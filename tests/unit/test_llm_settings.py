"""What config.pbtxt says to an engine, as a table; and what is wrong with it, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from doorstep.backends.llm import FEW_CORES, _threads
from doorstep.backends.llm.settings import Adapter, Settings, adapter_names, read_settings
from doorstep.errors import ConfigError


def read(folder: Path, backend_config: dict[str, str] | None = None, /, **parameters: str) -> Settings:
    return read_settings("m", parameters, folder / "model.gguf", folder, backend_config)


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [("slots", "8", 8), ("slots", " 8 ", 8), ("context_size", "16", 16), ("task", "embed", "embed"),
     ("gpu_layers", "-1", -1), ("cache_type", "q8_0", "q8_0"), ("pooling", "", ""), ("batch_tokens", "0", 0)],
)  # fmt: skip
def test_a_parameter_is_read(tmp_path: Path, parameter: str, text: str, value: Any) -> None:
    assert getattr(read(tmp_path, **{parameter: text}), parameter) == value


@pytest.mark.parametrize(
    ("parameter", "text"),
    [("slots", "0"), ("slots", "many"), ("slots", "257"), ("context_size", "15"), ("task", "sing"),
     ("gpu_layers", "-2"), ("cache_type", "q3"), ("chat_template", "../../etc/passwd"),
     ("chat_template", "none.jinja"), ("draft_model", "x"), ("adapters", "a"), ("adapters", "a=../x"),
     ("adapters", "a=missing.gguf"), ("adapters", "a=x@heavy"), ("adapters", "/=model"), ("slot", "4"),
     ("contextsize", "4")],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, parameter: str, text: str) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **{parameter: text})
    [problem] = caught.value.problems
    assert problem.where == f'parameters["{parameter}"]'
    assert problem.fix


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, slots="0", task="sing", slotts="3")
    assert {problem.where for problem in caught.value.problems} == {
        'parameters["slots"]', 'parameters["task"]', 'parameters["slotts"]'
    }  # fmt: skip


def test_parameters_of_somebodys_own_are_left_alone(tmp_path: Path) -> None:
    assert read(tmp_path, team="search", execution="process", licence="MIT") == Settings("m", tmp_path / "model.gguf")


def test_the_models_own_parameter_wins_over_the_command_lines(tmp_path: Path) -> None:
    found = read(tmp_path, {"slots": "2", "context-size": "64"}, slots="3")
    assert (found.slots, found.context_size) == (3, 64)


def test_adapters_are_named_or_found_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    (folder / "french").mkdir(parents=True)
    for name in ("pirate.gguf", "notes.txt", ".hidden.gguf"):
        (folder / name).touch()
    assert read(tmp_path).adapters == {"french": Adapter(folder / "french"), "pirate": Adapter(folder / "pirate.gguf")}
    named = read(tmp_path, adapters="p=adapters/pirate.gguf@0.5, q=adapters/pirate.gguf").adapters
    assert named == {"p": Adapter(folder / "pirate.gguf", 0.5), "q": Adapter(folder / "pirate.gguf")}
    assert adapter_names({"adapters": "p=adapters/pirate.gguf@0.5, q=x"}) == ["p", "q"]


@pytest.mark.parametrize(("threads", "tokens"), [(1, 64), (2, 64), (4, 128), (32, 1024), (1000, 2048)])
def test_a_prompt_is_worked_off_in_pieces_that_take_about_as_long(threads: int, tokens: int) -> None:
    assert Settings("m", Path(), threads=threads).prompt_batch == tokens
    assert Settings("m", Path(), threads=threads, batch_tokens=8).prompt_batch == 8


def test_of_many_cores_one_is_left_to_the_server() -> None:
    assert [_threads(cores) for cores in (1, 2, FEW_CORES, FEW_CORES + 1, 64)] == [1, 2, FEW_CORES, FEW_CORES, 63]
