"""Doorstep and a real Triton give the same answers, but for differences that are meant, each listed with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.peers.triton import find_venv
from differential import document, recording
from differential.compare import load_table, problems
from differential.runner import RUNS, gather, identifier
from differential.servers import NO_TRITON, start_doorstep, start_triton
from differential.wire import Answer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("differential")]


@pytest.fixture(scope="module")
def doorstep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return gather(start_doorstep, tmp_path_factory.mktemp("doorstep"))


def test_every_case_has_a_name_of_its_own_and_an_answer_on_record() -> None:
    names = [identifier(run, case) for run in RUNS for case in run.cases]
    assert len(set(names)) == len(names)
    assert set(names) == recording.load().keys()


def test_doorstep_answers_as_the_recorded_triton_but_for_the_listed_differences(doorstep: dict[str, Answer]) -> None:
    found = problems(doorstep, recording.load(), load_table())
    assert not found, f"{len(found)} problems\n" + "\n".join(found)


@pytest.mark.skipif(find_venv() is None, reason=NO_TRITON)
def test_doorstep_answers_as_a_running_triton_but_for_the_listed_differences(
    doorstep: dict[str, Answer], tmp_path: Path
) -> None:
    on_record = recording.load()
    fatal = {case: answer for case, answer in on_record.items() if "crash" in answer}  # not worth killing it again
    triton = {**gather(start_triton, tmp_path, skip=fatal), **fatal}
    found = problems(doorstep, triton, load_table())
    assert not found, f"{len(found)} problems\n" + "\n".join(found)


def test_the_documentation_lists_the_differences_of_the_table() -> None:
    assert document.FILE.read_text() == document.render(document.FILE.read_text()), (
        "docs/compatibility.md is not what differences.toml says: python tests/conformance/differential document"
    )
