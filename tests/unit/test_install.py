"""What `pip install doorstep` brings with it: few packages, as many as the README says, none that only tests need."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement


def needed_by(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """The names of `name` and of all that it needs here, whatever needs it in turn."""
    found = {name}
    waiting = [(name, extras)]
    while waiting:
        package, wanted = waiting.pop()
        for line in requires(package) or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                continue
            other = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if other not in found:
                found.add(other)
                waiting.append((other, frozenset(requirement.extras)))
    return found


def test_the_core_install_is_at_most_20_packages() -> None:
    packages = needed_by("doorstep")
    assert {"numpy", "onnxruntime", "protobuf"} < packages
    assert len(packages) <= 20, sorted(packages)


def test_the_readme_counts_them_right() -> None:
    said = re.search(r"(\d+) packages", (Path(__file__).parents[2] / "README.md").read_text())
    assert said is not None
    assert int(said[1]) == len(needed_by("doorstep"))


def test_grpcio_and_tritonclient_are_for_tests_only() -> None:
    assert not {"grpcio", "tritonclient", "onnx", "typer"} & needed_by("doorstep")
