"""Which object answers for a name and a version, and the words of the errors (triton core, model_lifecycle.cc)."""

from __future__ import annotations

from pathlib import Path

import pytest

from doorstep.errors import DoorstepError, ErrorCode
from doorstep.repository.base import VersionSpec
from doorstep.repository.serving_map import ServingMap
from doorstep.testing.servables import FakeServable


def servable(name: str, version: int) -> FakeServable:
    return FakeServable(VersionSpec(name, str(version), Path(name), Path(name), None))


@pytest.fixture
def serving() -> ServingMap[FakeServable]:
    known = {"resnet": {1, 2, 10, 11}, "bert": {1}}
    serving: ServingMap[FakeServable] = ServingMap(known.get)
    serving.publish("resnet", {v: servable("resnet", v) for v in (1, 2, 10)})
    return serving


@pytest.mark.parametrize(
    ("version", "found"), [("", "10"), ("1", "1"), ("2", "2"), ("10", "10"), ("002", "2"), ("+1", "1")]
)
def test_a_version_is_found_and_the_newest_is_the_default(
    serving: ServingMap[FakeServable], version: str, found: str
) -> None:
    assert serving.find("resnet", version).spec.version == found


@pytest.mark.parametrize(
    ("name", "version", "code", "text"),
    [
        ("vgg", "", ErrorCode.NOT_FOUND, "Request for unknown model: 'vgg' is not found"),
        ("vgg", "3", ErrorCode.NOT_FOUND, "Request for unknown model: 'vgg' is not found"),
        ("resnet", "5", ErrorCode.NOT_FOUND, "Request for unknown model: 'resnet' version 5 is not found"),
        ("resnet", "11", ErrorCode.UNAVAILABLE, "Request for unknown model: 'resnet' version 11 is not at ready state"),
        ("bert", "", ErrorCode.NOT_FOUND, "Request for unknown model: 'bert' has no available versions"),
        ("bert", "1", ErrorCode.UNAVAILABLE, "Request for unknown model: 'bert' version 1 is not at ready state"),
        (
            "resnet",
            "latest",
            ErrorCode.INVALID_ARG,
            "failed to get model version from specified version string 'latest' (details: stol), "
            "version should be an integral value > 0",
        ),
        (
            "resnet",
            "99999999999999999999",
            ErrorCode.INVALID_ARG,
            "failed to get model version from specified version string '99999999999999999999' (details: stol), "
            "version should be an integral value > 0",
        ),
        (
            "resnet",
            "-1",
            ErrorCode.INVALID_ARG,
            "invalid model version specified '-1' , version should be an integral value > 0",
        ),
    ],
)
def test_what_is_not_served_is_refused_in_tritons_words(
    serving: ServingMap[FakeServable], name: str, version: str, code: ErrorCode, text: str
) -> None:
    with pytest.raises(DoorstepError) as raised:
        serving.find(name, version)
    assert (raised.value.code, raised.value.message) == (code, text)


def test_publishing_replaces_one_models_versions_and_leaves_the_others(serving: ServingMap[FakeServable]) -> None:
    serving.publish("bert", {1: servable("bert", 1)})
    taken = serving.find("resnet")
    serving.publish("resnet", {2: servable("resnet", 2)})
    assert serving.versions("resnet") == ["2"]
    assert serving.find("resnet").spec.version == "2"
    assert taken.spec.version == "10", "whoever took a version keeps it"
    assert [f"{s.spec.name}:{s.spec.version}" for s in serving.all()] == ["bert:1", "resnet:2"]
    serving.publish("resnet", {})
    assert serving.versions("resnet") == []
    assert repr(serving) == "<ServingMap bert:1>"
