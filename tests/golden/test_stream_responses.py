"""Models that answer one by one over ModelStreamInfer, with grpcio and tritonclient; and where one answer is due."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from doorstep.wire.limits import WireLimits

sys.path.insert(0, str(Path(__file__).parent))

from streaming_models import Served, serving, text

TIMEOUT_S = 20
EMPTY_FINAL = "triton_enable_empty_final_response"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def stub(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.address) as found:
        yield found


def message(model: str, id: str = "", *, version: str = "", **inputs: Any) -> Any:
    found = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, value in inputs.items():
        kind = {"PROMPT": "BYTES", "COUNT": "INT32", "FAIL": "BOOL"}[name]
        tensor = found.inputs.add(name=name, datatype=kind, shape=[1])
        if kind == "BYTES":
            tensor.contents.bytes_contents.append(value.encode())
        elif kind == "BOOL":
            tensor.contents.bool_contents.append(value)
        else:
            tensor.contents.int_contents.append(value)
    return found


def wanting_empty_final(request: Any) -> Any:
    request.parameters[EMPTY_FINAL].bool_param = True
    return request


def stream(stub: Any, *messages: Any, metadata: Any = ()) -> list[Any]:
    return list(stub.ModelStreamInfer(iter(messages), timeout=TIMEOUT_S, metadata=metadata))


def final_of(answer: Any) -> bool:
    parameter = answer.infer_response.parameters["triton_final_response"]
    assert parameter.WhichOneof("parameter_choice") == "bool_param"
    return bool(parameter.bool_param)


def said(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode()


@pytest.mark.parametrize("count", [0, 1, 2, 400])
def test_every_response_says_whether_it_is_the_last(stub: Any, count: int) -> None:
    answers = stream(stub, message("numbers", "7", COUNT=count) if count else message("repeat", PROMPT="x", COUNT=0))
    assert len(answers) == count
    for number, answer in enumerate(answers):
        inner = answer.infer_response
        assert not answer.error_message
        assert (inner.model_name, inner.model_version, inner.id) == ("numbers", "1", "7")
        assert (inner.outputs[0].name, inner.outputs[0].datatype, inner.outputs[0].shape) == ("N", "INT32", [1])
        assert list(inner.raw_output_contents) == [number.to_bytes(4, "little")]
        assert final_of(answer) == (number == count - 1)


def test_parameters_of_a_response_keep_their_types(stub: Any) -> None:
    found = stream(stub, message("numbers", COUNT=3))
    parameters = found[1].infer_response.parameters
    assert parameters["second"].bool_param is True
    assert parameters["score"].double_param == 0.5
    assert parameters["name"].string_param == "é"
    assert parameters["big"].int64_param == 2**62
    assert set(found[2].infer_response.parameters) == {"triton_final_response"}


@pytest.mark.parametrize("wanted", [True, False])
def test_the_news_that_no_more_comes_is_sent_to_those_who_asked(stub: Any, wanted: bool) -> None:
    request = message("repeat", "9", PROMPT="x", COUNT=2)
    answers = stream(stub, wanting_empty_final(request) if wanted else request)
    assert [final_of(a) for a in answers] == [False, False, *([True] if wanted else [])]
    if wanted:
        last = answers[-1].infer_response
        # As the client called it: Triton repeats the request's version, which was not given.
        assert (last.model_name, last.model_version, last.id) == ("repeat", "", "9")
        assert not last.outputs
        assert not last.raw_output_contents
        assert set(last.parameters) == {"triton_final_response"}


def test_responses_of_lengths_that_differ_are_whole(stub: Any) -> None:
    for prompt in ("", "a", "x" * 127, "y" * 128, "z" * 5000, "é☃"):
        answers = stream(stub, message("repeat", "i" * 200, PROMPT=prompt, COUNT=3))
        assert len(answers) == 3
        for answer in answers:
            data = prompt.encode()
            assert list(answer.infer_response.raw_output_contents) == [len(data).to_bytes(4, "little") + data]
            assert answer.infer_response.id == "i" * 200
            assert not final_of(answer)


def test_requests_of_decoupled_models_answer_as_they_please(served: Served, stub: Any) -> None:
    held = served.held
    served.wire.call(held.requests.clear)
    served.wire.call(held.arrived.clear)
    asked: queue.Queue[Any] = queue.Queue()
    call = stub.ModelStreamInfer(iter(asked.get, None), timeout=TIMEOUT_S)
    asked.put(message("held", "slow", PROMPT="x"))
    served.wire.run(held.arrived.wait())
    asked.put(message("repeat", "quick", PROMPT="x", COUNT=2))
    assert [next(call).infer_response.id for _ in range(2)] == ["quick", "quick"]
    asked.put(None)
    served.wire.call(lambda: held.requests[0][1](text("late"), True))
    (last,) = list(call)
    assert (last.infer_response.id, final_of(last)) == ("slow", True)


def test_an_error_after_responses_is_in_the_stream_with_its_id(stub: Any) -> None:
    first, error, other = stream(
        stub, message("repeat", "a", PROMPT="x", COUNT=1, FAIL=True), message("repeat", "b", PROMPT="y", COUNT=1)
    )
    assert (first.error_message, first.infer_response.id) == ("", "a")
    assert (error.error_message, error.infer_response.id, final_of(error)) == ("An Error Occurred", "a", True)
    assert (other.error_message, other.infer_response.id) == ("", "b")


def test_the_first_error_ends_the_stream_for_those_who_asked(served: Served, stub: Any) -> None:
    call = stub.ModelStreamInfer(
        iter([message("repeat", "a", PROMPT="x", COUNT=2, FAIL=True)]),
        timeout=TIMEOUT_S,
        metadata=(("triton_grpc_error", "true"),),
    )
    got = []
    with pytest.raises(grpc.RpcError) as error:
        got.extend(answer.infer_response.id for answer in call)
    assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INTERNAL, "An Error Occurred")
    assert served.in_flight() == 0


def test_a_request_that_is_refused_says_so_in_the_stream(stub: Any) -> None:
    unknown, wrong = stream(stub, message("nope", "1"), message("repeat", "2"))
    assert unknown.error_message == "Request for unknown model: 'nope' is not found"
    assert unknown.infer_response.id == "1"
    assert wrong.error_message.startswith("[request id: 2] expected number of inputs between 1 and 3 but got 0 inputs")


@pytest.mark.parametrize("key", ["triton_x", "triton_final_response"])
def test_reserved_parameters_are_refused(stub: Any, key: str) -> None:
    request = message("repeat", PROMPT="x")
    request.parameters[key].bool_param = True
    (found,) = stream(stub, request)
    assert found.error_message == (
        "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
        f"'triton_' are allowed: {EMPTY_FINAL}"
    )


# Where exactly one response is due


def one_response(served: Served, stub: Any, how: str, count: int) -> tuple[str, str]:
    """(text of the output, text of the error) of a model that answers through a response sender."""
    if how == "http":
        body = {"inputs": [{"name": "COUNT", "datatype": "INT32", "shape": [1], "data": [count]}]}
        found = requests.post(f"{served.url}/v2/models/sender/infer", json=body, timeout=TIMEOUT_S)
        if found.status_code == 200:
            return found.json()["outputs"][0]["data"][0], ""
        return "", f"{found.status_code}: {found.json()['error']}"
    if how == "grpc":
        try:
            answer = stub.ModelInfer(message("sender", COUNT=count), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return "", f"{error.code().name}: {error.details()}"
        return answer.raw_output_contents[0][4:].decode(), ""
    (answer,) = stream(stub, message("sender", COUNT=count))
    assert final_of(answer)
    raw = answer.infer_response.raw_output_contents
    return raw[0][4:].decode() if raw else "", answer.error_message


@pytest.mark.parametrize("how", ["http", "grpc", "stream"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_sender_of_a_model_that_is_not_decoupled_must_send_one_response(
    served: Served, stub: Any, how: str, count: int
) -> None:
    code = {"http": "500: ", "grpc": "INTERNAL: ", "stream": ""}[how]
    expected = ("once", "") if count == 1 else ("", f"{code}expected a single response, got {count}")
    assert one_response(served, stub, how, count) == expected
    assert served.in_flight() == 0


def test_unary_calls_of_decoupled_models_are_refused(served: Served, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(message("repeat", PROMPT="x"), timeout=TIMEOUT_S)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.value.details() == "ModelInfer RPC doesn't support models with decoupled transaction policy"
    found = requests.post(f"{served.url}/v2/models/repeat/infer", data="{}", timeout=TIMEOUT_S)
    text = "HTTP end point doesn't support models with decoupled transaction policy"
    assert (found.status_code, found.json()) == (501, {"error": text})


# Cancellation


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_a_stream_that_ends_early_cancels_what_runs_on_it(served: Served, stub: Any, way: str) -> None:
    held = served.held
    served.wire.call(held.requests.clear)
    served.wire.call(held.arrived.clear)
    served.wire.call(held.cancelled.clear)
    asked: queue.Queue[Any] = queue.Queue()
    call = stub.ModelStreamInfer(iter(asked.get, None), timeout=TIMEOUT_S if way == "cancel" else 1.0)
    asked.put(message("held", PROMPT="x"))
    served.wire.run(held.arrived.wait())
    served.wire.call(held.watch_cancel)
    served.wire.call(lambda: held.requests[0][1](text("0"), False))
    assert next(call).infer_response.raw_output_contents
    if way == "cancel":
        call.cancel()
    served.wire.run(held.cancelled.wait())
    with pytest.raises(grpc.RpcError) as error:
        next(call)
    asked.put(None)
    assert error.value.code().name == ("CANCELLED" if way == "cancel" else "DEADLINE_EXCEEDED")
    served.wire.call(lambda: held.requests[0][1](text("1"), True))  # goes nowhere
    assert served.in_flight() == 0


def test_a_client_that_does_not_read_loses_its_stream_and_memory_is_given_back() -> None:
    with serving(WireLimits(stream_bytes=4 << 20)) as served:
        held = served.held
        with grpc.insecure_channel(served.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            asked: queue.Queue[Any] = queue.Queue()
            call = stub.ModelStreamInfer(iter(asked.get, None), timeout=TIMEOUT_S)
            asked.put(message("held", PROMPT="x"))
            served.wire.run(held.arrived.wait())
            request, emit = served.wire.call(lambda: held.requests[0])
            block = "x" * 100_000
            pushed = 0
            while not request.cancelled:
                assert pushed < 64 << 20, "nothing stops it"
                served.wire.call(lambda: emit(text(block), False))
                pushed += len(block)
            assert request.stalled  # the model has been told, long before
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            asked.put(None)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "--max-stream-bytes" in error.value.details()
        served.wire.wait_until_empty()
        assert served.in_flight() == 0


def test_two_hundred_streams_at_once(served: Served) -> None:
    async def one(client: triton_aio.InferenceServerClient, number: int) -> list[str]:
        async def requests() -> Any:
            prompt = triton_aio.InferInput("PROMPT", [1], "BYTES")
            prompt.set_data_from_numpy(np.array([str(number)], np.object_))
            count = triton_aio.InferInput("COUNT", [1], "INT32")
            count.set_data_from_numpy(np.array([5], np.int32))
            yield {"model_name": "repeat", "inputs": [prompt, count], "request_id": str(number)}

        found = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found.append(result.as_numpy("TEXT")[0].decode())
        return found

    async def main() -> None:
        async with triton_aio.InferenceServerClient(served.address) as client:
            for number, found in enumerate(await asyncio.gather(*(one(client, n) for n in range(200)))):
                assert found == [str(number)] * 5

    asyncio.run(main())
    assert served.in_flight() == 0


def test_tritonclient_asks_for_the_empty_final_response(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    prompt = triton.InferInput("PROMPT", [1], "BYTES")
    prompt.set_data_from_numpy(np.array(["x"], np.object_))
    client.async_stream_infer("repeat", [prompt], enable_empty_final_response=True)
    finals = []
    for _ in range(2):
        result, error = answers.get(timeout=TIMEOUT_S)
        assert error is None
        finals.append(result.get_response().parameters["triton_final_response"].bool_param)
    client.stop_stream()
    assert finals == [False, True]


# Statistics of responses


def test_statistics_count_responses_by_their_number(served: Served, stub: Any) -> None:
    def over_http() -> dict[str, Any]:
        with triton_http.InferenceServerClient(served.address) as http:
            found: dict[str, Any] = http.get_inference_statistics("batched_repeat")["model_stats"][0]
            return found

    def request(count: int, fail: bool) -> Any:
        found = message("batched_repeat", PROMPT="x", COUNT=count, FAIL=fail)
        for tensor in found.inputs:
            tensor.shape[:] = [1, 1]
        return found

    assert over_http()["response_stats"] == {}
    stream(stub, request(2, False), request(1, True))
    found = over_http()["response_stats"]
    assert list(found) == ["0", "1", "2"]
    kinds = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")
    assert all(tuple(numbers) == kinds and set(numbers["fail"]) == {"count", "ns"} for numbers in found.values())
    counts = {key: {kind: numbers[kind]["count"] for kind in kinds} for key, numbers in found.items()}
    assert (counts["0"]["success"], counts["0"]["fail"]) == (2, 0)
    assert (counts["1"]["success"], counts["1"]["fail"]) == (1, 1)
    assert (counts["2"]["empty_response"], counts["2"]["success"]) == (1, 0)
    (over_grpc,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="batched_repeat")).model_stats
    assert {k: v.success.count for k, v in over_grpc.response_stats.items()} == {"0": 2, "1": 1, "2": 0}


def test_tritonclient_raises_what_a_decoupled_model_says(client: triton.InferenceServerClient) -> None:
    prompt = triton.InferInput("PROMPT", [1], "BYTES")
    prompt.set_data_from_numpy(np.array(["x"], np.object_))
    with pytest.raises(InferenceServerException, match="decoupled transaction policy"):
        client.infer("repeat", [prompt])
