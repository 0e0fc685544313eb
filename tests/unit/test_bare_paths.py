"""What a path named to `doorstep serve` is taken for, and the folder of links that a bare model becomes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from doorstep.cli.bare_model import BareModel, recognise, repository_of, same_names
from doorstep.errors import Problem
from doorstep.repository.layout import mistaken, without_versions


def gguf(path: Path) -> Path:
    """The smallest file that says it is a model (version 3: no tensors, one entry)."""
    key, value = b"general.architecture", b"llama"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def model_at(path: Path) -> BareModel:
    found = recognise(path)
    assert isinstance(found, BareModel), found
    return found


def problem_at(path: Path) -> str:
    found = recognise(path)
    assert isinstance(found, Problem), found
    return str(found)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("my model (2).GGUF", "my-model-2"),
        ("größe.gguf", "gr-e"),
        ("….gguf", "model"),
        ("sha256-ab12", "sha256-ab12"),  # no suffix: by its first bytes
        ("chat/1/model.gguf", "chat"),
        ("model.gguf", "model"),
    ],
)
def test_a_file_is_called_as_it_is_named(tmp_path: Path, file: str, name: str) -> None:
    path = gguf(tmp_path / file)
    assert model_at(path) == BareModel(name, {"model.gguf": path})


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf(tmp_path / "a.gguf")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (target,) = model_at(Path("../a.gguf")).files.values()
    assert target.is_absolute()
    assert target.samefile(path)


def test_every_part_of_a_model_is_linked_under_its_own_name(tmp_path: Path) -> None:
    parts = [gguf(tmp_path / f"big-0000{number}-of-00003.gguf") for number in (1, 2, 3)]
    for part in parts:
        assert model_at(part) == BareModel("big", {path.name: path for path in parts})
    parts[1].unlink()
    told = problem_at(parts[0])
    assert "is one of 3 parts, and 1 are not there: big-00002-of-00003.gguf" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "x.gguf: is empty (fetch it again)"),
        (b"<html>", "x.gguf: is no GGUF file: it does not begin with 'GGUF' (fetch the file itself"),
        (b"GGUF\x03\0\0\0", "x.gguf: is damaged: it ends too early"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not say its architecture"),
    ],
    ids=["empty", "a web page", "cut off", "no model"],
)
def test_what_is_no_gguf_model_is_told_with_what_to_do(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert told in problem_at(tmp_path / "x.gguf")


def test_a_file_that_is_not_there_is_missed_by_its_name(tmp_path: Path) -> None:
    assert "there is no such file (name a .gguf file, or a folder of models)" in problem_at(tmp_path / "x.gguf")
    near = gguf(tmp_path / "smollm2.gguf")
    assert f"there is no such file (did you mean {near}?)" in problem_at(tmp_path / "smolm2.gguf")


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "model.safetensors", "tokenizer.json"),
        (
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "1_Pooling/config.json",
        ),
        ("openvino_model.xml", "openvino_model.bin", "config.json"),
    ],
    ids=["Hugging Face", "in parts, with folders", "OpenVINO"],
)
def test_a_folder_that_is_a_model_is_linked_whole(tmp_path: Path, files: tuple[str, ...]) -> None:
    folder = touch(tmp_path / "my model", *files)
    found = model_at(folder)
    assert found.name == "my-model"
    assert found.files == {name: folder / name for name in {Path(file).parts[0] for file in files}}


def test_the_same_model_in_another_format_is_left_out(tmp_path: Path) -> None:
    folder = touch(tmp_path / "tiny", "config.json", "model.safetensors", "model.onnx")
    assert model_at(folder).files.keys() == {"config.json", "model.safetensors"}


def test_a_snapshot_of_the_hubs_cache_is_called_after_its_model(tmp_path: Path) -> None:
    folder = touch(tmp_path / "models--org--Tiny-1B/snapshots/0a1b2c", "config.json", "model.safetensors")
    assert model_at(folder).name == "Tiny-1B"


def test_a_folder_named_by_a_dot_is_called_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path / "tiny", "config.json", "model.safetensors"))
    assert model_at(Path()).name == "tiny"


def test_a_folder_with_one_gguf_model_in_it_is_that_model(tmp_path: Path) -> None:
    path = gguf(tmp_path / "download/a.gguf")
    touch(tmp_path / "download", "README.md")
    assert model_at(path.parent) == BareModel("a", {"model.gguf": path})
    gguf(tmp_path / "download/b.gguf")
    told = problem_at(path.parent)
    assert f"holds 2 GGUF files, and no folder of a model (name one of them, as in doorstep serve {path})" in told


def test_weights_that_are_not_safetensors_are_told(tmp_path: Path) -> None:
    told = problem_at(touch(tmp_path / "old", "config.json", "pytorch_model.bin"))
    assert "has a model's config.json, but no weights that can be served" in told


@pytest.mark.parametrize(
    "files",
    [
        ("chat/1/model.gguf",),
        ("resnet/1/model.onnx", "stray.gguf"),
        ("README.md",),
        ("1/config.json", "1/model.safetensors"),
    ],
    ids=["repository", "repository with a stray file", "no model", "model's folder"],
)
def test_what_may_be_a_repository_is_left_to_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    assert recognise(touch(tmp_path / "models", *files)) is None
    assert recognise(tmp_path / "models" / files[0]) is None or files[0].endswith(".gguf")
    assert recognise(tmp_path / "nothing") is None


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    models = [model_at(gguf(tmp_path / folder / "a.gguf")) for folder in ("x", "y")]
    problem = same_names(models)
    assert problem is not None
    assert "would both be called 'a' (rename one, or lay out a repository)" in str(problem)
    assert same_names(models[:1]) is None


def test_the_repository_is_links_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = gguf(tmp_path / "a.gguf")
    folder = touch(tmp_path / "tiny", "config.json", "model.safetensors")
    with repository_of([model_at(path), model_at(folder)]) as laid:
        assert (laid / "a/1/model.gguf").readlink() == path
        assert (laid / "tiny/1/config.json").readlink() == folder / "config.json"
        assert mistaken(laid) is None
    assert not laid.exists()
    assert path.exists()


def test_a_gguf_file_in_a_models_folder_without_a_version_is_told_where_to_move(tmp_path: Path) -> None:
    gguf(tmp_path / "models/chat/a.gguf")
    assert without_versions(tmp_path / "models/chat") == "move chat/a.gguf to chat/1/model.gguf"
