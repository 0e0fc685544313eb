"""POST …/generate and …/generate_stream as extension_generate.md and Triton's own tests of it have them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from doorstep.wire.limits import WireLimits

sys.path.insert(0, str(Path(__file__).parent))

from streaming_models import Served, serving, text

TIMEOUT_S = 20
NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(forward="my_header.*") as found:
        yield found


def post(served: Served, model: str, body: Any, verb: str = "generate", **rest: Any) -> requests.Response:
    data = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return requests.post(f"{served.url}/v2/models/{model}/{verb}", data=data, timeout=TIMEOUT_S, **rest)


def events(answer: requests.Response) -> list[Any]:
    """The objects of a stream, every byte of it accounted for."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = answer.content.split(b"\n\n")
    assert found.pop() == b""
    assert all(event.startswith(b"data: ") for event in found)
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


SAID = {"TEXT": "hello", "model_name": "repeat", "model_version": "1"}


@pytest.mark.parametrize("path", ["repeat", "repeat/versions/1"])
def test_one_response_is_one_object_sorted_by_key(served: Served, path: str) -> None:
    found = post(served, path, {"PROMPT": "hello", "COUNT": 1})
    assert (found.status_code, found.headers["content-type"]) == (200, "application/json")
    assert found.text == '{"TEXT":"hello","model_name":"repeat","model_version":"1"}'


@pytest.mark.parametrize(("id", "said"), [("42", {"id": "42"}), ("", {})])
def test_the_id_comes_back_unless_it_is_empty(served: Served, id: str, said: dict[str, str]) -> None:
    assert post(served, "repeat", {"PROMPT": ["hello"], "id": id}).json() == {**SAID, **said}
    assert events(post(served, "repeat", {"PROMPT": "hello", "id": id}, "generate_stream")) == [{**SAID, **said}]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stream_has_an_event_for_each_response(served: Served, count: int) -> None:
    found = post(served, "repeat", {"PROMPT": ["hello"], "COUNT": count}, "generate_stream")
    assert (found.status_code, events(found)) == (200, [SAID] * count)


@pytest.mark.parametrize("count", [0, 2])
def test_generate_wants_exactly_one_response(served: Served, count: int) -> None:
    found = post(served, "repeat", {"PROMPT": "hello", "COUNT": count})
    # Triton's status: that of the first response.
    assert (found.status_code, found.json()) == (200, {"error": NOT_ONE})
    assert found.headers["content-type"] == "application/json"


def test_an_error_first_is_the_status_and_an_error_later_an_event(served: Served) -> None:
    failing = {"PROMPT": "hello", "FAIL": True}
    found = post(served, "repeat", {**failing, "COUNT": 0}, "generate_stream")
    assert (found.status_code, events(found)) == (500, [{"error": "An Error Occurred"}])
    found = post(served, "repeat", {**failing, "COUNT": 1}, "generate_stream")
    assert (found.status_code, events(found)) == (200, [SAID, {"error": "An Error Occurred"}])
    found = post(served, "repeat", {**failing, "COUNT": 0})
    assert (found.status_code, found.json()) == (500, {"error": "An Error Occurred"})
    found = post(served, "repeat", {**failing, "COUNT": 1})
    assert (found.status_code, found.json()) == (200, {"error": NOT_ONE})


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_a_model_that_is_not_decoupled_generates_too(served: Served, verb: str) -> None:
    found = post(served, "words", {"IN": ["a", "é"]}, verb)
    said = found.json() if verb == "generate" else events(found)[0]
    assert said == {"OUT": ["a", "é"], "model_name": "words", "model_version": "1"}


@pytest.mark.parametrize(
    ("model", "value", "said"),
    [
        ("vector", 1.5, 1.5),
        ("vector", [1.5], 1.5),
        ("vector", [1, 2.5, 3], [1.0, 2.5, 3.0]),
        ("batched", 7, 7),
        ("batched", [7, 8, 9], [7, 8, 9]),  # one batch row: the innermost variable dimension takes all
        ("table", list(range(12)), list(range(12))),
        ("words", "alone", "alone"),
        ("vector", [], []),
        ("batched", [], []),  # one row of none, as Triton 2.51
        ("flag", True, True),
    ],
)
def test_values_are_shaped_by_the_models_config(served: Served, model: str, value: Any, said: Any) -> None:
    assert post(served, model, {"IN": value}).json()["OUT"] == said


def test_other_keys_are_parameters_and_so_are_those_of_the_parameters_object(served: Served) -> None:
    body = {"INPUT0": 1, "text": "é", "whole": 7, "yes": True, "parameters": {"part": 0.25, "large": 2**70}}
    found = post(served, "parameter", {**body, "id": "i"}, headers={"my_header_1": "v", "other": "w"}).json()
    assert found["id"] == "i"
    said = dict(zip(found["key"], found["value"], strict=True))
    assert said == {
        "text": "é",
        "whole": "7",
        "yes": "True",
        "part": "0.25",
        "large": str(float(2**70)),
        "id": "i",
        "my_header_1": "v",
    }
    assert (found["whole"], found["part"], found["my_header_1"]) == (7, 0.25, "v")


def test_an_input_may_be_in_the_parameters_object(served: Served) -> None:
    assert post(served, "vector", {"parameters": {"IN": 2}}).json()["OUT"] == 2.0


_NON_STRING = "attempt to access JSON non-string as string"
_UNKNOWN = "[request id: <id_unknown>] "
_SHAPE = "The schema can not convert input 'IN' to tensor with proper shape"
WRONG: list[tuple[str, Any, int, str]] = [
    ("nope", {"IN": 1}, 404, "Request for unknown model: 'nope' is not found"),
    ("vector/versions/9", {"IN": 1}, 404, "Request for unknown model: 'vector' version 9 is not found"),
    ("repeat", "", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),
    ("repeat", "{", 500, "failed to parse the request JSON buffer: Missing a name for object member. at 1"),
    ("repeat", "[]", 500, "attempt to get members for non-object"),
    ("repeat", {"PROMPT": "x", "id": 1}, 500, f"Unable to parse 'id': {_NON_STRING}"),
    ("repeat", {"PROMPT": 123}, 500, f"Unable to parse JSON bytes array: {_NON_STRING}"),
    ("repeat", {"PROMPT": None}, 500, f"Unable to parse JSON bytes array: {_NON_STRING}"),
    ("flag", {"IN": "false"}, 500, "Unable to parse 'data': attempt to access JSON non-boolean as boolean"),
    ("vector", {"IN": {}}, 500, "Unable to parse 'data': attempt to access JSON non-number as double"),
    ("vector", {"IN": [[1, 2]]}, 500, "Unable to parse 'data': Shape does not match true shape of 'data' field"),
    ("vector", {"IN": [[], [1]]}, 500, "Failed to parse 'data' field: shape does not match true shape"),
    ("half", {"IN": 1}, 400,
     "receiving FP16 data via JSON is not supported. Please use the binary data format for input IN"),
    ("table", {"IN": 1}, 400, _SHAPE),
    ("flag", {"IN": [True, False]}, 400, _SHAPE),
    ("repeat", {"PROMPT": "x", "odd": [1]}, 400,
     "parameter 'odd' has invalid type. It should be either 'int', 'bool', or 'string'."),
    ("repeat", {"PROMPT": "x", "odd": None}, 400,
     "parameter 'odd' has invalid type. It should be either 'int', 'bool', or 'string'."),
    ("repeat", {"PROMPT": "x", "parameters": 1}, 500,
     "Expected JSON object for keyword: 'parameters': attempt to access JSON non-object as object"),
    ("repeat", {"PROMPT": "x", "parameters": {"odd": []}}, 400,
     "Converting keyword: 'parameters': parameter 'odd' has invalid type. It should be either 'int', 'bool', or "
     "'string'."),
    ("repeat", {"PROMPT": "x", "parameters": {"PROMPT": "y"}}, 400,
     f"Converting keyword: 'parameters': {_UNKNOWN}input 'PROMPT' already exists in request"),
    ("repeat", '{"PROMPT":"x","PROMPT":"y"}', 400, f"{_UNKNOWN}input 'PROMPT' already exists in request"),
    ("repeat", {}, 400,
     f"{_UNKNOWN}expected number of inputs between 1 and 3 but got 0 inputs for model 'repeat'. Got input(s) [], but "
     "missing required input(s) ['PROMPT']. Please provide all required input(s)."),
]  # fmt: skip


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
@pytest.mark.parametrize(("model", "body", "status", "message"), WRONG)
def test_what_cannot_be_begun_is_refused_in_plain_json(
    served: Served, verb: str, model: str, body: Any, status: int, message: str
) -> None:
    found = post(served, model, body, verb)
    assert (found.status_code, found.json()) == (status, {"error": message})
    assert found.headers["content-type"] == "application/json"
    assert served.in_flight() == 0


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_only_identity_is_taken(served: Served, coding: str) -> None:
    found = post(served, "repeat", {"PROMPT": "x"}, headers={"content-encoding": coding})
    text = "Unsupported content-encoding, only 'identity' is supported."
    assert (found.status_code, found.json()) == (400, {"error": text})


def test_answers_are_not_compressed(served: Served) -> None:
    found = post(served, "repeat", {"PROMPT": "x" * 5000}, headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in found.headers


def test_an_input_larger_than_the_limit_is_refused() -> None:
    with serving(WireLimits(body_bytes=2000)) as served:
        found = post(served, "vector", {"IN": [1] * 600})
        assert (found.status_code, found.json()["error"]) == (
            400,
            "request size of 0 bytes with input 'IN' of size 2400 bytes exceeds the maximum allowed input size of "
            "2000. Use --http-max-input-size to increase the limit.",
        )


def test_a_megabyte_of_text_is_read_aside(served: Served) -> None:
    text = "é" * 700_000
    assert post(served, "repeat", json.dumps({"PROMPT": text}, ensure_ascii=False).encode()).json()["TEXT"] == text


@pytest.mark.parametrize("http", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_reads_events_as_they_come(served: Served, http: str) -> None:
    held = served.held
    served.wire.call(held.requests.clear)
    served.wire.call(held.arrived.clear)
    command = ["curl", "-sN", http, "-d", '{"PROMPT":"x"}', f"{served.url}/v2/models/held/generate_stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        served.wire.run(held.arrived.wait())
        for number in range(3):
            served.wire.call(lambda n=number: held.requests[0][1](text(str(n)), False))  # type: ignore[misc]
            line = curl.stdout.readline()  # it is here before the next is made
            assert json.loads(line.removeprefix(b"data: "))["TEXT"] == str(number)
            assert curl.stdout.readline() == b"\n"
        served.wire.call(lambda: held.requests[0][1](None, True))
        assert curl.stdout.read() == b""
        assert curl.wait(TIMEOUT_S) == 0


def test_a_client_that_leaves_cancels_its_request(served: Served) -> None:
    held = served.held
    served.wire.call(held.requests.clear)
    served.wire.call(held.arrived.clear)
    with served.wire.connect() as client:
        head = b"POST /v2/models/held/generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n"
        client.send(head + b'{"PROMPT":"x"}')
        served.wire.run(held.arrived.wait())
        served.wire.call(held.watch_cancel)
        served.wire.call(lambda: held.requests[0][1](text("0"), False))
        client.receive_until(b'"TEXT":"0"')
    served.wire.run(held.cancelled.wait())
    assert served.in_flight() == 0
