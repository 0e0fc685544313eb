"""What a newcomer is told who names the wrong folder, or lays one out wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from doorstep.repository.layout import mistaken, without_models, without_versions


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("models/resnet/1/model.onnx", ["is a file", "/models)"]),
        ("resnet50.onnx", ["is a file", "mkdir -p models/resnet50/1", "doorstep serve models"]),
        ("notes.txt", ["is a file", "name a folder of models"]),
        ("modles", ["there is no such folder", "did you mean models?"]),
        ("elsewhere", ["there is no such folder", "name a folder of models"]),
        ("models/resnet", ["is a model, not a folder of models", "name models)"]),
        ("models/resnet/1", ["is a version of a model", "name models)"]),
    ],
)
def test_a_path_that_is_no_repository_says_what_to_name_instead(here: Path, named: str, words: list[str]) -> None:
    for path in ("models/resnet/1/model.onnx", "resnet50.onnx", "notes.txt"):
        file(path)
    problem = mistaken(Path(named))
    assert problem is not None
    for word in words:
        assert word in str(problem)


def test_a_model_may_have_a_number_for_a_name(here: Path) -> None:
    file("models/1/1/model.onnx")
    file("models/7/3/model.onnx")
    assert mistaken(Path("models")) is None
    assert mistaken(Path("models/7")) is not None


def test_the_current_folder_can_be_a_model_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file("models/resnet/1/model.onnx")
    monkeypatch.chdir("models/resnet")
    assert f"name {here / 'models'}" in str(mistaken(Path()))


def test_a_model_file_that_lies_in_the_repository_itself_is_told_its_place(here: Path) -> None:
    file("models/shout.py")
    assert "move models/shout.py to models/shout/1/model.py" in str(without_models(Path("models")))
    file("models/shout/1/model.py")
    assert without_models(Path("models")) is None


@pytest.mark.parametrize(
    ("made", "fix"),
    [
        ("resnet/model.onnx", "move resnet/model.onnx to resnet/1/model.onnx"),
        ("resnet/net.onnx", "move resnet/net.onnx to resnet/1/model.onnx"),
        ("resnet/v1/model.onnx", "rename resnet/v1 to resnet/1: a version is a number"),
        ("resnet/config.pbtxt", "put the model's file in resnet/1/"),
    ],
)
def test_a_model_without_versions_is_told_how_to_get_one(here: Path, made: str, fix: str) -> None:
    file(made)
    assert without_versions(Path("resnet")) == fix
