"""The whole of Triton's Python API, over HTTP and gRPC: the same models and questions, the answers of a real Triton.

`python tests/conformance/python_api record` writes triton.json; questions that kill Triton 2.51 have "crash" there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from doorstep.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parent))

from python_api.models import MODELS, write_models
from python_api.questions import CRASH, all_questions, ask_all

pytestmark = [pytest.mark.timeout(180), pytest.mark.xdist_group("python-api")]

RECORDED = json.loads((Path(__file__).parent / "python_api" / "triton.json").read_text())

# Where Triton 2.51 dies, does not have it yet, or says something else than its successors: what their source says.
_RUNNING = "Error when running inference:"
INSTEAD: dict[str, Any] = {
    "bls: an unknown model": f"Model nope - {_RUNNING} Request for unknown model: 'nope' is not found",
    "bls: an unknown version": f"Model add - {_RUNNING} Request for unknown model: 'add' version 7 is not found",
    "bls: a model that is not loaded": f"Model late - {_RUNNING} Request for unknown model: 'late' is not found",
    "async: an unknown model": f"Model nope - {_RUNNING} Request for unknown model: 'nope' is not found",
    "bls: decoupled of an unknown model": [f"Model nope - {_RUNNING} Request for unknown model: 'nope' is not found"],
    "bls: dlpack from numpy": [0, 1, 2],
    "bls: a request of its own has no sender": [
        "TritonModelException",
        "Unable to send response. Response sender has no reference to the decoupled state of the model.",
    ],
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = ("--model-control-mode=explicit", *(f"--load-model={name}" for name in MODELS))
    answers: dict[str, Any] = {}
    with ServerProcess(write_models(tmp_path_factory.mktemp("python-api")), *options) as server:
        assert ask_all(server.http_port, server.grpc, answers)
    return answers


def test_every_question_has_an_answer_on_record() -> None:
    assert all_questions().keys() == RECORDED.keys()


@pytest.mark.parametrize("question", list(all_questions()))
def test_a_model_sees_what_it_sees_in_triton(said: dict[str, Any], question: str) -> None:
    expected = INSTEAD.get(question, RECORDED[question])
    assert expected != CRASH, "say in INSTEAD what the source says"
    assert said[question] == expected
