"""What is found in repository directories, and when a model counts as changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from doorstep.errors import DoorstepError, Internal, NotFound
from doorstep.repository.source import DuplicateModel, Source
from doorstep.testing.servables import write_version


def test_versions_are_directories_with_a_number_for_a_name(tmp_path: Path) -> None:
    for version in ("1", "20", "0", "007", "v3", "-4", "1.5", "٣", ".5"):
        write_version(tmp_path, "resnet", version)
    (tmp_path / "resnet" / "9").write_text("a file, not a version")
    found = Source([tmp_path]).find("resnet")
    assert list(found.versions) == [0, 1, 20]
    assert found.ignored == ("007",)
    assert found.directory == tmp_path / "resnet"


def test_models_are_directories_that_are_not_hidden(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1)
    write_version(tmp_path, ".git", 1)
    (tmp_path / "README.md").write_text("not a model")
    (tmp_path / "empty").mkdir()
    listing = Source([tmp_path]).scan()
    assert set(listing.models) == listing.names == {"resnet", "empty"}
    with pytest.raises(NotFound):
        Source([tmp_path]).find(".git")


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    real = write_version(tmp_path / "elsewhere", "resnet", 1, "weights").parent
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "resnet").symlink_to(real)
    (real / "1" / "loop").symlink_to(real)
    (real / "1" / "nowhere").symlink_to(tmp_path / "missing")
    assert list(Source([tmp_path / "repo"]).find("resnet").versions) == [1]


def test_the_same_model_in_two_repositories_is_told_apart_from_none(tmp_path: Path) -> None:
    write_version(tmp_path / "a", "resnet", 1)
    write_version(tmp_path / "b", "resnet", 1)
    write_version(tmp_path / "b", "bert", 1)
    source = Source([tmp_path / "a", tmp_path / "b"])
    listing = source.scan()
    assert set(listing.models) == {"bert"}
    assert isinstance(listing.problems["resnet"], DuplicateModel)
    with pytest.raises(DoorstepError, match="failed to poll model 'resnet': not unique across all model repositories"):
        source.find("resnet")


def test_the_same_repository_twice_is_one(tmp_path: Path) -> None:
    write_version(tmp_path, "resnet", 1)
    assert set(Source([tmp_path, f"{tmp_path}/"]).scan().models) == {"resnet"}


@pytest.mark.parametrize("name", ["missing", "..", "a\0b", "x" * 5000, "lost+found"])
def test_a_model_that_is_not_there_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "repo").mkdir()
    if name != "..":
        with pytest.raises(NotFound):
            Source([tmp_path / "repo"]).find(name)


def test_a_repository_that_cannot_be_listed_does_not_hide_the_others(tmp_path: Path) -> None:
    write_version(tmp_path / "good", "resnet", 1)
    listing = Source([tmp_path / "good", tmp_path / "gone"]).scan()
    assert set(listing.models) == {"resnet"}
    assert listing.unlisted == {tmp_path / "gone": "No such file or directory"}


def test_a_model_that_cannot_be_read_is_a_problem_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version(tmp_path, "bert", 1)
    write_version(tmp_path, "resnet", 1)
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if str(path).endswith("resnet/1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = Source([tmp_path]).scan()
    assert set(listing.models) == {"bert"}
    problem = listing.problems["resnet"]
    assert isinstance(problem, Internal)
    assert problem.message == "failed to poll model 'resnet': cannot read resnet/1: Permission denied"


def touch_later(path: Path) -> None:
    at = path.stat()
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns + 1))


def same_size_and_time(path: Path) -> None:
    at = path.stat()
    other = path.with_name("other")
    other.write_text(path.read_text()[::-1])
    os.utime(other, ns=(at.st_atime_ns, at.st_mtime_ns))
    other.replace(path)


def write_what_is_beside_a_model(model: Path) -> None:
    for path in ("1/card.yaml", "deployment.yaml", "history.jsonl"):
        (model / path).write_text("x")


CHANGES: list[tuple[str, Callable[[Path], object], set[str]]] = [
    ("nothing", lambda m: None, set()),
    ("artefact touched", lambda m: touch_later(m / "1" / "model"), {"1"}),
    ("artefact replaced, same size and time", lambda m: same_size_and_time(m / "1" / "model"), {"1"}),
    ("artefact removed", lambda m: (m / "1" / "model").unlink(), {"1"}),
    ("file added in a folder of the artefact", lambda m: write_version(m / "1", "variables", 0), {"1"}),
    ("config written", lambda m: (m / "config.pbtxt").write_text("max_batch_size: 4"), {"common"}),
    ("labels written", lambda m: (m / "labels.txt").write_text("cat"), {"common"}),
    ("warm-up sample written", lambda m: write_version(m, "warmup", "sample"), {"common"}),
    ("version added", lambda m: write_version(m.parent, m.name, 2), {"2"}),
    ("bytecode cache written by a Python model", lambda m: write_version(m / "1", "__pycache__", 0), set()),
    ("card, deployment and history written", write_what_is_beside_a_model, set()),
    ("editor's hidden file", lambda m: (m / "1" / ".model.swp").write_text(""), set()),
]  # fmt: skip


@pytest.mark.parametrize(("change", "changed"), [(c, w) for _, c, w in CHANGES], ids=[name for name, _, _ in CHANGES])
def test_a_change_is_seen_in_what_it_concerns(
    tmp_path: Path, change: Callable[[Path], object], changed: set[str]
) -> None:
    write_version(tmp_path, "resnet", 1, "weights")
    source = Source([tmp_path])
    before = source.find("resnet")
    change(tmp_path / "resnet")
    after = source.find("resnet")
    stamps = [{"common": f.common} | {str(v): s for v, s in f.versions.items()} for f in (before, after)]
    assert {key for key in stamps[0].keys() | stamps[1].keys() if stamps[0].get(key) != stamps[1].get(key)} == changed
    assert (before == after) is (not changed)
