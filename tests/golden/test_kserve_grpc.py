"""The V2 protocol over gRPC with the clients people use: tritonclient, its asyncio twin, plain grpcio, on a socket."""

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
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from doorstep.types import DTYPES

sys.path.insert(0, str(Path(__file__).parent))

from kserve_models import DATATYPES, Served, serving

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.address) as found:
        yield found


@pytest.fixture(scope="module")
def stub(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(served.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, array: Any, datatype: str) -> triton.InferInput:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array)
    return found


def sample(datatype: str) -> Any:
    if datatype == "BYTES":
        return np.array([["é☃".encode(), b""], [b"a" * 300, b"z"]], np.object_)
    return np.array([[0, 1], [1, 0]]).astype(DTYPES[datatype].numpy)


def mlp_input() -> triton.InferInput:
    return tensor("input", np.arange(16, dtype=np.float32)[None], "FP32")


def held_message(id: str) -> Any:
    message = service_pb2.ModelInferRequest(model_name="held", id=id)
    message.inputs.add(name="X", datatype="FP32", shape=[1])
    message.raw_input_contents.append(np.array([int(id)], np.float32).tobytes())
    return message


def mlp_message(id: str = "", model: str = "mlp", **fields: Any) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model, id=id, **fields)
    message.inputs.add(name="input", datatype="FP32", shape=[1, 16])
    message.raw_input_contents.append(bytes(64))
    return message


# Health, metadata, repository


def test_tritonclient_sees_a_live_and_ready_server_and_its_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mlp")
    assert client.is_model_ready("versions", "3")
    assert not client.is_model_ready("versions", "2")
    assert not client.is_model_ready("nope")


def test_metadata_and_config_are_those_of_http(client: triton.InferenceServerClient) -> None:
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "doorstep"
    assert "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("mlp")
    assert (model.name, list(model.versions), model.platform) == ("mlp", ["1"], "python")
    assert (model.inputs[0].name, model.inputs[0].datatype, list(model.inputs[0].shape)) == ("input", "FP32", [-1, 16])
    config = client.get_model_config("mlp").config
    assert (config.name, config.max_batch_size, list(config.input[0].dims)) == ("mlp", 8, [16])


def test_statistics_count_what_was_answered(client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("sums").model_stats[0]
    client.infer("sums", [tensor(n, np.zeros((2, 4), np.int32), "INT32") for n in "AB"])
    found = client.get_inference_statistics("sums", "1").model_stats[0]
    assert found.inference_count == before.inference_count + 2
    assert found.inference_stats.success.count == before.inference_stats.success.count + 1
    assert [s.batch_size for s in found.batch_stats] == [2]
    assert {"mlp", "sums"} <= {s.name for s in client.get_inference_statistics().model_stats}


def test_tritonclient_lists_loads_and_unloads(served: Served, client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index()
    assert ("mlp", "1", "READY") in [(m.name, m.version, m.state) for m in index.models]
    client.load_model("mlp", config='{"max_batch_size": 2}', files={"file:1/model.onnx": b"\x00\xff"})
    client.unload_model("mlp", unload_dependents=True)
    name, load = served.repository.loaded[-1]
    assert (name, load.config, dict(load.files)) == ("mlp", '{"max_batch_size": 2}', {"1/model.onnx": b"\x00\xff"})
    assert served.repository.unloaded[-1] == ("mlp", True)


# Inference


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_comes_back_as_it_went(client: triton.InferenceServerClient, datatype: str) -> None:
    array = sample(datatype)
    result = client.infer(f"same_{datatype}", [tensor(f"IN_{datatype}", array, datatype)], request_id="r")
    assert result.get_response().id == "r"
    np.testing.assert_array_equal(result.as_numpy(f"OUT_{datatype}"), array)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_large_tensors_come_back_whole(client: triton.InferenceServerClient, compression: str | None) -> None:
    array = np.random.default_rng(0).random((600, 1000), np.float32)
    inputs = [tensor("IN_FP32", array, "FP32")]
    result = client.infer("same_FP32", inputs, compression_algorithm=compression)
    np.testing.assert_array_equal(result.as_numpy("OUT_FP32"), array)


def test_plain_grpcio_may_send_typed_contents(stub: Any) -> None:
    message = service_pb2.ModelInferRequest(model_name="mlp", id="7")
    message.inputs.add(name="input", datatype="FP32", shape=[1, 16]).contents.fp32_contents.extend(range(16))
    found = stub.ModelInfer(message, timeout=TIMEOUT_S)
    assert (found.id, found.model_name, found.model_version) == ("7", "mlp", "1")
    assert np.frombuffer(found.raw_output_contents[0], np.float32).tolist() == [0.0, 2.0, 4.0]
    assert not found.outputs[0].HasField("contents")


def test_classification_gives_values_indices_and_labels(client: triton.InferenceServerClient) -> None:
    array = np.array([[0.1, 0.4, 0.3, 0.2]], np.float32)
    output = triton.InferRequestedOutput("OUT_P", class_count=2)
    found = client.infer("classes", [tensor("IN_P", array, "FP32")], outputs=[output]).as_numpy("OUT_P")
    assert found.tolist() == [[b"0.400000:1:bee", b"0.300000:2:cat"]]


def test_the_asyncio_client_gets_the_same_answers(served: Served) -> None:
    async def ask() -> Any:
        async with triton_aio.InferenceServerClient(served.address) as client:
            results = await asyncio.gather(*(client.infer("mlp", [mlp_input()]) for _ in range(8)))
            return [r.as_numpy("output").tolist() for r in results]

    assert asyncio.run(ask()) == [[[0.0, 2.0, 4.0]]] * 8


# Errors


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("UNKNOWN", "UNKNOWN"),
        ("INTERNAL", "INTERNAL"),
        ("NOT_FOUND", "NOT_FOUND"),
        ("INVALID_ARG", "INVALID_ARGUMENT"),
        ("UNAVAILABLE", "UNAVAILABLE"),
        ("UNSUPPORTED", "UNIMPLEMENTED"),
        ("ALREADY_EXISTS", "ALREADY_EXISTS"),
        ("CANCELLED", "CANCELLED"),
    ],
)
def test_each_error_code_has_its_grpc_status(client: triton.InferenceServerClient, code: str, status: str) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client.infer("raises", [tensor("CODE", np.array([code.encode()], np.object_), "BYTES")])
    assert (raised.value.status(), raised.value.message()) == (f"StatusCode.{status}", "no luck today")


SHARED_MEMORY = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
WRONG: list[tuple[str, Any, str, str]] = [
    ("ModelInfer", mlp_message(model="nope"), "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
    (
        "ModelInfer",
        mlp_message(model_version="x"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'x' (details: stol), version should be an integral "
        "value > 0",
    ),
    (
        "ModelInfer",
        mlp_message(model="decoupled"),
        "UNIMPLEMENTED",
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    ),
    (
        "ModelInfer",
        mlp_message("8", model="sums"),
        "INVALID_ARGUMENT",
        "[request id: 8] expected 2 inputs but got 1 inputs for model 'sums'. Got input(s) ['input'], but missing "
        "required input(s) ['A','B']. Please provide all required input(s).",
    ),
    (
        "ModelStatistics",
        service_pb2.ModelStatisticsRequest(name="nope"),
        "INVALID_ARGUMENT",
        "requested model 'nope' is not available",
    ),
    (
        "ModelMetadata",
        service_pb2.ModelMetadataRequest(name="nope"),
        "NOT_FOUND",
        "Request for unknown model: 'nope' is not found",
    ),
    (
        "RepositoryIndex",
        service_pb2.RepositoryIndexRequest(repository_name="r"),
        "UNIMPLEMENTED",
        "'repository_name' specification is not supported",
    ),
    (
        "RepositoryModelLoad",
        service_pb2.RepositoryModelLoadRequest(
            model_name="mlp", parameters={"nope": service_pb2.ModelRepositoryParameter(string_param="")}
        ),
        "INVALID_ARGUMENT",
        "unrecognized load parameter 'nope'.",
    ),
    (
        "RepositoryModelLoad",
        service_pb2.RepositoryModelLoadRequest(
            model_name="mlp", parameters={"config": service_pb2.ModelRepositoryParameter(int64_param=1)}
        ),
        "INVALID_ARGUMENT",
        "invalid value type for load parameter 'config', expected string_param.",
    ),
    ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(), "UNIMPLEMENTED", SHARED_MEMORY),
    ("CudaSharedMemoryUnregister", service_pb2.CudaSharedMemoryUnregisterRequest(), "UNIMPLEMENTED", SHARED_MEMORY),
    (
        "SystemSharedMemoryStatus",
        service_pb2.SystemSharedMemoryStatusRequest(name="a"),
        "NOT_FOUND",
        "Unable to find system shared memory region: 'a'",
    ),
]


@pytest.mark.parametrize(("rpc", "message", "status", "text"), WRONG)
def test_what_cannot_be_is_answered_in_tritons_words(stub: Any, rpc: str, message: Any, status: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        getattr(stub, rpc)(message, timeout=TIMEOUT_S)
    assert (raised.value.code().name, raised.value.details()) == (status, text)


def test_regions_of_shared_memory_are_none(stub: Any) -> None:
    assert not stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest()).regions
    assert not stub.CudaSharedMemoryStatus(service_pb2.CudaSharedMemoryStatusRequest()).regions


@pytest.mark.parametrize("size", [3, 100_000])
def test_bytes_that_are_no_message_are_an_internal_error(served: Served, size: int) -> None:
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff" * size, timeout=TIMEOUT_S)
    assert (raised.value.code().name, raised.value.details()) == ("INTERNAL", "Unable to parse request")


def test_every_rpc_of_the_service_has_a_handler(served: Served) -> None:
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    with grpc.insecure_channel(served.address) as channel:
        for method in service.methods:
            path = f"/inference.GRPCInferenceService/{method.name}"
            try:
                if method.server_streaming:
                    list(channel.stream_stream(path)(iter(()), timeout=TIMEOUT_S))
                else:
                    channel.unary_unary(path)(b"", timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                assert "unknown method" not in error.details(), method.name  # noqa: PT017


# Clients that leave


def test_a_client_that_cancels_cancels_its_request(served: Served, stub: Any) -> None:
    future = stub.ModelInfer.future(held_message("1"))
    served.wait_until_held()
    cancelled = served.wire.call(served.held.watch_cancel)
    future.cancel()
    served.wire.run(cancelled.wait())
    served.wire.call(served.held.finish)


def test_a_deadline_that_passes_cancels_the_request(served: Served, stub: Any) -> None:
    future = stub.ModelInfer.future(held_message("1"), timeout=0.3)
    served.wait_until_held()
    cancelled = served.wire.call(served.held.watch_cancel)
    assert future.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    served.wire.run(cancelled.wait())
    served.wire.call(served.held.finish)


# Streams


def stream(stub: Any, *messages: Any, metadata: Any = ()) -> list[Any]:
    return list(stub.ModelStreamInfer(iter(messages), timeout=TIMEOUT_S, metadata=metadata))


def test_responses_of_a_stream_come_in_the_order_of_its_requests(stub: Any) -> None:
    answers = stream(stub, *(mlp_message(str(i)) for i in range(200)))
    assert [a.infer_response.id for a in answers] == [str(i) for i in range(200)]
    assert all(a.infer_response.parameters["triton_final_response"].bool_param for a in answers)


def test_a_fast_model_waits_for_a_slow_one_before_it_on_the_stream(served: Served, stub: Any) -> None:
    requests: queue.Queue[Any] = queue.Queue()
    call = stub.ModelStreamInfer(iter(requests.get, None), timeout=TIMEOUT_S)
    requests.put(held_message("1"))
    requests.put(mlp_message("2"))
    served.wait_until_held()
    served.wire.call(served.held.finish)
    assert next(call).infer_response.id == "1"
    assert next(call).infer_response.id == "2"
    requests.put(None)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK


def test_an_error_stays_inside_the_stream_and_ends_only_its_request(stub: Any) -> None:
    wrong = mlp_message("2", model="nope")
    first, second, third = stream(stub, mlp_message("1"), wrong, mlp_message("3"))
    assert (first.infer_response.id, third.infer_response.id) == ("1", "3")
    assert second.error_message == "Request for unknown model: 'nope' is not found"
    assert second.infer_response == service_pb2.ModelInferResponse(id="2")


def failing_message(id: str) -> Any:
    message = service_pb2.ModelInferRequest(model_name="raises", id=id)
    message.inputs.add(name="CODE", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"NOT_FOUND")
    return message


def test_a_model_that_fails_says_whose_request_it_was(stub: Any) -> None:
    (found,) = stream(stub, failing_message("4"))
    assert found.error_message == "no luck today"
    assert (found.infer_response.id, found.infer_response.model_name) == ("4", "raises")
    assert found.infer_response.parameters["triton_final_response"].bool_param


def test_a_client_may_have_the_stream_end_with_the_errors_status(stub: Any) -> None:
    call = stub.ModelStreamInfer(
        iter([mlp_message("1"), failing_message("2"), mlp_message("3")]),
        timeout=TIMEOUT_S,
        metadata=(("triton_grpc_error", "true"),),
    )
    assert next(call).infer_response.id == "1"
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert (raised.value.code().name, raised.value.details()) == ("NOT_FOUND", "no luck today")


@pytest.mark.parametrize("wants_empty_final", [True, False])
def test_a_decoupled_model_is_called_on_a_stream(stub: Any, wants_empty_final: bool) -> None:
    message = service_pb2.ModelInferRequest(model_name="decoupled", id="1")
    message.inputs.add(name="IN", datatype="FP32", shape=[1])
    message.raw_input_contents.append(bytes(4))
    message.parameters["triton_enable_empty_final_response"].bool_param = wants_empty_final
    (found,) = stream(stub, message)
    assert (found.error_message, found.infer_response.id) == ("", "1")


def test_a_stream_that_is_cancelled_cancels_what_runs_on_it(served: Served, stub: Any) -> None:
    requests: queue.Queue[Any] = queue.Queue()
    call = stub.ModelStreamInfer(iter(requests.get, None))
    requests.put(held_message("1"))
    served.wait_until_held()
    cancelled = served.wire.call(served.held.watch_cancel)
    call.cancel()
    requests.put(None)
    served.wire.run(cancelled.wait())
    served.wire.call(served.held.finish)


def test_a_message_that_is_none_ends_the_stream(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as raised:
        list(
            channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
                iter([b"\xff"]), timeout=TIMEOUT_S
            )
        )
    assert raised.value.details() == "Unable to parse request"


def test_more_requests_than_may_be_open_are_all_answered(stub: Any) -> None:
    answers = stream(stub, *(mlp_message(str(i)) for i in range(3000)))
    assert [int(a.infer_response.id) for a in answers] == list(range(3000))


def test_tritonclient_streams(served: Served) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(served.address) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for i in range(5):
            client.async_stream_infer("mlp", [mlp_input()], request_id=str(i))
        found = [answers.get(timeout=TIMEOUT_S) for _ in range(5)]
        client.stop_stream()
    assert [error for _, error in found] == [None] * 5
    assert [result.get_response().id for result, _ in found] == ["0", "1", "2", "3", "4"]
