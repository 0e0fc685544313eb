"""The V2 protocol over HTTP with the clients people use: tritonclient, requests and curl, on a real socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from doorstep.types import DTYPES

sys.path.insert(0, str(Path(__file__).parent))

from kserve_models import DATATYPES, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.address) as found:
        yield found


def sample(datatype: str) -> Any:
    if datatype == "BYTES":
        return np.array([["é☃".encode(), b""], [b"a" * 300, b"z"]], np.object_)
    return np.array([[0, 1], [1, 0]]).astype(DTYPES[datatype].numpy)


def tensor(name: str, array: Any, datatype: str, binary: bool = True) -> triton.InferInput:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def mlp_input(binary: bool = True) -> triton.InferInput:
    return tensor("input", np.arange(16, dtype=np.float32)[None], "FP32", binary)


# Health and metadata


def test_tritonclient_sees_a_live_and_ready_server_and_its_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mlp")
    assert client.is_model_ready("versions", "3")
    assert not client.is_model_ready("versions", "2")
    assert not client.is_model_ready("nope")


def test_server_metadata_lists_tritons_extensions(client: triton.InferenceServerClient) -> None:
    found = client.get_server_metadata()
    assert found["name"] == "doorstep"
    assert found["extensions"][:5] == [
        "classification",
        "sequence",
        "model_repository",
        "model_repository(unload_dependents)",
        "schedule_policy",
    ]


def test_model_metadata_shows_the_batch_dimension(client: triton.InferenceServerClient) -> None:
    assert client.get_model_metadata("mlp") == {
        "name": "mlp",
        "versions": ["1"],
        "platform": "python",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}],
    }


def test_model_metadata_lists_all_ready_versions_or_the_one_asked_for(client: triton.InferenceServerClient) -> None:
    assert client.get_model_metadata("versions")["versions"] == ["1", "3"]
    assert client.get_model_metadata("versions", "1")["versions"] == ["1"]


def test_the_config_is_the_protobuf_message_as_json(client: triton.InferenceServerClient) -> None:
    found = client.get_model_config("mlp")
    assert (found["name"], found["max_batch_size"], found["input"][0]["dims"]) == ("mlp", 8, [16])


def test_statistics_count_what_was_answered(served: Served, client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("sums")["model_stats"][0]
    pair = [tensor(n, np.zeros((2, 4), np.int32), "INT32") for n in "AB"]
    client.infer("sums", pair)
    found = client.get_inference_statistics("sums", "1")["model_stats"][0]
    assert (found["name"], found["version"]) == ("sums", "1")
    assert found["inference_count"] == before["inference_count"] + 2
    assert found["execution_count"] == before["execution_count"] + 1
    assert found["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert found["inference_stats"]["queue"].keys() == {"count", "ns"}
    assert {s["batch_size"] for s in found["batch_stats"]} == {2}
    names = [s["name"] for s in client.get_inference_statistics()["model_stats"]]
    assert "mlp" in names
    assert names.count("versions") == 2


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v2/models/nope/stats", "requested model 'nope' is not available"),
        ("/v2/models/versions/versions/2/stats", "requested model version is not available for model 'versions'"),
    ],
)
def test_statistics_of_what_is_not_there_are_refused(served: Served, path: str, text: str) -> None:
    found = requests.get(served.url + path, timeout=10)
    assert (found.status_code, found.json()) == (400, {"error": text})


# Inference


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_comes_back_as_it_went(
    client: triton.InferenceServerClient, datatype: str, binary_in: bool, binary_out: bool
) -> None:
    half = datatype in ("FP16", "BF16")
    if half and not (binary_in and binary_out):
        pytest.skip("half precision does not travel in JSON")
    array = sample(datatype)
    inputs = [tensor(f"IN_{datatype}", array, datatype, binary_in)]
    output = triton.InferRequestedOutput(f"OUT_{datatype}", binary_data=binary_out)
    result = client.infer(f"same_{datatype}", inputs, outputs=[output], request_id="r")
    assert result.get_response()["id"] == "r"
    found = result.as_numpy(f"OUT_{datatype}")
    if datatype == "BYTES" and not binary_out:
        found = np.array([[text.encode() for text in row] for row in found], np.object_)
    np.testing.assert_array_equal(found, array)


def test_a_version_is_chosen_or_the_newest_answers(client: triton.InferenceServerClient) -> None:
    inputs = [tensor("IN", np.zeros(1, np.float32), "FP32")]
    assert client.infer("versions", inputs).as_numpy("VERSION").tolist() == [3]
    assert client.infer("versions", inputs, model_version="1").as_numpy("VERSION").tolist() == [1]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_travel_compressed_both_ways(client: triton.InferenceServerClient, algorithm: str) -> None:
    array = np.zeros((300, 300), np.float32)
    result = client.infer(
        "same_FP32",
        [tensor("IN_FP32", array, "FP32")],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(result.as_numpy("OUT_FP32"), array)


def test_classification_gives_values_indices_and_labels(client: triton.InferenceServerClient) -> None:
    array = np.array([[0.1, 0.4, 0.3, 0.2], [4, 3, 2, 1]], np.float32)
    output = triton.InferRequestedOutput("OUT_P", class_count=2)
    found = client.infer("classes", [tensor("IN_P", array, "FP32")], outputs=[output]).as_numpy("OUT_P")
    assert found.tolist() == [[b"0.400000:1:bee", b"0.300000:2:cat"], [b"4.000000:0:ant", b"3.000000:1:bee"]]


def test_only_the_outputs_asked_for_come_back(client: triton.InferenceServerClient) -> None:
    pair = [tensor(n, np.ones((1, 4), np.int32), "INT32") for n in "AB"]
    found = client.infer("sums", pair, outputs=[triton.InferRequestedOutput("SUM")]).get_response()
    assert [o["name"] for o in found["outputs"]] == ["SUM"]


def test_the_asyncio_client_gets_the_same_answers(served: Served) -> None:
    async def ask() -> Any:
        async with triton_aio.InferenceServerClient(served.address) as client:
            assert await client.is_server_live()
            results = await asyncio.gather(*(client.infer("mlp", [mlp_input()]) for _ in range(8)))
            return [r.as_numpy("output").tolist() for r in results]

    assert asyncio.run(ask()) == [[[0.0, 2.0, 4.0]]] * 8


def test_requests_sends_plain_json_and_reads_plain_json(served: Served) -> None:
    body = {"id": "1", "inputs": [{"name": "input", "shape": [1, 16], "datatype": "FP32", "data": [[0.5] * 16]}]}
    found = requests.post(served.url + "/v2/models/mlp/infer", json=body, timeout=10)
    assert found.status_code == 200
    assert found.headers["content-type"] == "application/json"
    assert found.json() == {
        "id": "1",
        "model_name": "mlp",
        "model_version": "1",
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 1.0, 1.0]}],
    }


def test_curl_gets_binary_outputs_with_the_length_of_the_json(served: Served, tmp_path: Path) -> None:
    body = tmp_path / "body"
    inputs = [{"name": "input", "shape": [1, 16], "datatype": "FP32", "data": [0] * 16}]
    body.write_text(json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}))
    head = tmp_path / "head"
    argv = ["curl", "-sS", "-D", str(head), "--data-binary", f"@{body}", f"{served.url}/v2/models/mlp/infer"]
    answer = subprocess.run(argv, check=True, capture_output=True).stdout
    lines = [line.split(": ", 1) for line in head.read_text().lower().strip().split("\n")[1:]]
    headers = {name: value.strip() for name, value in lines}
    assert headers["content-type"] == "application/octet-stream"
    size = int(headers["inference-header-content-length"])
    assert json.loads(answer[:size])["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert answer[size:] == bytes(12)


def test_a_raw_body_is_the_one_input_and_the_answer_is_binary(served: Served) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    data = np.ones(16, np.float32).tobytes()
    found = requests.post(served.url + "/v2/models/mlp/infer", data=data, headers=headers, timeout=10)
    size = int(found.headers["Inference-Header-Content-Length"])
    np.testing.assert_array_equal(np.frombuffer(found.content[size:], np.float32), np.full(3, 2, np.float32))


def test_nan_and_infinity_come_back_as_pythons_json_reads_them(served: Served) -> None:
    body = '{"inputs":[{"name":"IN_FP32","shape":[1,3],"datatype":"FP32","data":[NaN,Infinity,-Infinity]}]}'
    found = requests.post(served.url + "/v2/models/same_FP32/infer", data=body, timeout=10)
    assert '"data":[NaN,Infinity,-Infinity]' in found.text
    assert np.isnan(found.json()["outputs"][0]["data"][0])


# Errors


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("UNKNOWN", 400),
        ("INTERNAL", 500),
        ("NOT_FOUND", 404),
        ("INVALID_ARG", 400),
        ("UNAVAILABLE", 503),
        ("UNSUPPORTED", 501),
        ("ALREADY_EXISTS", 400),
        ("CANCELLED", 400),
    ],
)
def test_each_error_code_has_tritons_status(served: Served, code: str, status: int) -> None:
    body = {"inputs": [{"name": "CODE", "shape": [1], "datatype": "BYTES", "data": [code]}]}
    found = requests.post(served.url + "/v2/models/raises/infer", json=body, timeout=10)
    assert (found.status_code, found.json()) == (status, {"error": "no luck today"})
    assert found.headers["content-type"] == "application/json"


MLP = {"name": "input", "shape": [1, 16], "datatype": "FP32", "data": [0] * 16}
WRONG: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/v2/models/nope/infer", {}, 404, "Request for unknown model: 'nope' is not found"),
    ("POST", "/v2/models/mlp/versions/7/infer", {}, 404, "Request for unknown model: 'mlp' version 7 is not found"),
    (
        "POST",
        "/v2/models/decoupled/infer",
        {},
        501,
        "HTTP end point doesn't support models with decoupled transaction policy",
    ),
    (
        "POST",
        "/v2/models/mlp/infer",
        {"id": "4", "inputs": [{**MLP, "datatype": "FP64"}]},
        400,
        "[request id: 4] inference input 'input' data-type is 'FP64', but model 'mlp' expects 'FP32'",
    ),
    (
        "POST",
        "/v2/models/mlp/infer",
        {"inputs": [MLP], "outputs": [{"name": "nope"}]},
        400,
        "unexpected inference output 'nope' for model 'mlp'",
    ),
    ("GET", "/v2/models/mlp/infer", None, 405, "Method Not Allowed"),
    ("GET", "/v2/nope", None, 404, "Not Found"),
    ("GET", "/base/v2/health/live", None, 404, "Not Found"),
    ("GET", "/v2/models/mlp/ready/more", None, 404, "Not Found"),
    ("GET", "/v2/models/nope/ready", None, 400, "Model version not ready"),
    ("GET", "/v2/models/nope/config", None, 404, "Request for unknown model: 'nope' is not found"),
    ("POST", "/v2/repository/some/models/mlp/load", {}, 501, "'repository_name' specification is not supported"),
    ("POST", "/v2/repository/index", {"ready": 1}, 400, "Invalid value for 'ready': expected a boolean"),
    (
        "POST",
        "/v2/systemsharedmemory/region/a/register",
        {},
        501,
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
    ),
    (
        "GET",
        "/v2/cudasharedmemory/region/a/status",
        None,
        404,
        "Unable to find cuda shared memory region: 'a'",
    ),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "text"), WRONG)
def test_what_cannot_be_is_answered_in_tritons_words(
    served: Served, method: str, path: str, body: Any, status: int, text: str
) -> None:
    found = requests.request(method, served.url + path, json=body, timeout=10)
    assert (found.status_code, found.json()) == (status, {"error": text})


@pytest.mark.parametrize(
    ("method", "path"),
    [],
)
def test_what_is_not_built_yet_says_so(served: Served, method: str, path: str) -> None:
    found = requests.request(method, served.url + path, timeout=10)
    assert found.status_code == 501
    assert "is not supported by this version of Doorstep" in found.json()["error"]


def test_tritonclient_raises_with_the_text(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found") as raised:
        client.infer("nope", [mlp_input()])
    assert raised.value.status() == "404"


def test_a_compressed_body_that_is_none_is_refused(served: Served) -> None:
    found = requests.post(
        served.url + "/v2/models/mlp/infer", data=b"nope", headers={"Content-Encoding": "gzip"}, timeout=10
    )
    assert found.status_code == 400
    found = requests.post(
        served.url + "/v2/models/mlp/infer", data=b"nope", headers={"Content-Encoding": "br"}, timeout=10
    )
    assert (found.status_code, found.json()) == (501, {"error": "Unsupported compression type"})
    assert found.headers["accept-encoding"] == "gzip, deflate"


def test_a_compressed_request_may_carry_binary_tensors(served: Served) -> None:
    body, size = triton.InferenceServerClient.generate_request_body([mlp_input()])
    headers = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": str(size), "Accept-Encoding": "identity"}
    found = requests.post(served.url + "/v2/models/mlp/infer", data=gzip.compress(body), headers=headers, timeout=10)
    length = int(found.headers["Inference-Header-Content-Length"])
    assert np.frombuffer(found.content[length:], np.float32).tolist() == [0.0, 2.0, 4.0]


# Repository


def test_tritonclient_lists_loads_and_unloads(served: Served, client: triton.InferenceServerClient) -> None:
    assert {"name": "mlp", "version": "1", "state": "READY"} in client.get_model_repository_index()
    client.load_model("mlp", config='{"max_batch_size": 2}', files={"file:1/model.onnx": b"\x00\xff"})
    client.unload_model("mlp", unload_dependents=True)
    name, load = served.repository.loaded[-1]
    assert (name, load.config, dict(load.files)) == ("mlp", '{"max_batch_size": 2}', {"1/model.onnx": b"\x00\xff"})
    assert served.repository.unloaded[-1] == ("mlp", True)


@pytest.mark.parametrize(
    ("parameters", "status"),
    [({"nope": "x"}, 500), ({"config": 1}, 500), ({"file:1/a": "not base64!"}, 400), ([], 500)],
)
def test_a_load_with_wrong_parameters_is_refused(served: Served, parameters: Any, status: int) -> None:
    before = len(served.repository.loaded)
    found = requests.post(served.url + "/v2/repository/models/mlp/load", json={"parameters": parameters}, timeout=10)
    assert found.status_code == status
    assert len(served.repository.loaded) == before


# Clients that leave


def test_a_client_that_goes_cancels_its_request(served: Served) -> None:
    body = json.dumps({"inputs": [{"name": "X", "shape": [1], "datatype": "FP32", "data": [1]}]}).encode()
    head = b"POST /v2/models/held/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with served.wire.connect() as raw:
        raw.send(head + body)
        served.wait_until_held()
        cancelled = served.wire.call(served.held.watch_cancel)
    served.wire.run(cancelled.wait())
    served.wire.call(served.held.finish)
