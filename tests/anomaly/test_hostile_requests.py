"""Requests made to harm, sent to a real server over HTTP and gRPC: each is refused, and nobody else is harmed."""

from __future__ import annotations

import base64
import gzip
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from harm import (
    MIB,
    Victim,
    add_message,
    attacked,
    check_text,
    grpc_error,
    infer_stub,
    raw_stub,
    row,
    save_texts,
    tensor,
)

from doorstep import proto
from doorstep.testing.onnx_models import save_adder, save_identity

INT64_MAX = 2**63 - 1
HUGE = 2**40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("hostile")
    models = folder / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_identity(models / "any" / "1" / "model.onnx", shape=["N", "M"])
    save_texts(models)
    save_adder(folder / "outside" / "1" / "model.onnx", 5)
    (folder / "outside" / "labels.txt").write_text("secret\n")
    save_adder(models / "spare" / "1" / "model.onnx", 3)
    with Victim(models, "--model-control-mode=explicit", "--load-model=*") as victim:
        yield victim
        victim.assert_sound()


# Documents

DEEP = 100_000


def nested(depth: int) -> bytes:
    return b'{"inputs":' + b"[" * depth + b"]" * depth + b"}"


DOCUMENTS: dict[str, tuple[bytes, set[int]]] = {
    "arrays that nest without end": (nested(DEEP), {400}),
    "arrays that open and never close": (b'{"inputs":' + b"[" * 1_000_000, {400}),
    "objects that nest without end": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, {400}),
    "depth hidden behind brackets in strings": (
        b'{"a":"' + b"[" * 500 + b'","inputs":' + b"[" * 150 + b"]" * 150 + b"}", {400}),
    "a number of a million digits": (b'{"inputs":[],"parameters":{"p":' + b"9" * 1_000_000 + b"}}", {400, 500}),
    "a million digits as data": (
        b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[' + b"7" * 1_000_000 + b"]}]}", {400, 500}),
    "NaN before a million digits": (
        b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[NaN,' + b"7" * 1_000_000 + b"]}]}",
        {400, 500}),
    "an exponent beyond every double": (
        b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1e400]}]}', {400, 500}),
    "an exponent of a million digits": (
        b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1e' + b"9" * 1_000_000 + b"]}]}", {400, 500}),
    "a megabyte of white space": (b" " * MIB, {400, 500}),
    "a megabyte of commas": (b"," * MIB, {400, 500}),
    "half a surrogate pair": (b'{"id":"\\ud800","inputs":[]}', {400, 500}),
    "bytes that are no UTF-8": (b'{"id":"\xff\xfe","inputs":[]}', {400, 500}),
    "NUL bytes": (b"\0" * 1000, {400, 500}),
    "the same key a hundred thousand times": (b"{" + b'"inputs":[],' * 100_000 + b'"inputs":[]}', {400, 500}),
    "a string of escaped quotes that never ends": (b"[" * 150 + b'"' + b'\\"' * 1_000_000, {400, 500}),
    "one deep list beside a million numbers": (
        b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[' + b"[" * 90 + b"1" + b"]" * 90
        + b",0" * 2_000_000 + b"]}]}", {400, 500}),
    "a million dimensions": (
        b'{"inputs":[{"name":"x","shape":[' + b"4611686018427387904," * 500_000 + b'1],"datatype":"FP32","data":[1]}]}',
        {400, 500}),
    "a list": (b"[]", {400, 500}),
    "null": (b"null", {400, 500}),
    "inputs that are null": (b'{"inputs":[null,null]}', {400, 500}),
    "inputs that are numbers": (b'{"inputs":[1,2,3]}', {400, 500}),
    "an id that is an object": (b'{"id":{},"inputs":[]}', {400, 500}),
    "parameters that are a list": (b'{"parameters":[],"inputs":[]}', {400, 500}),
    "outputs that are a number": (b'{"outputs":7,"inputs":[]}', {400, 500}),
}  # fmt: skip


@pytest.mark.parametrize("what", DOCUMENTS)
def test_a_document_that_is_none_is_refused(server: Victim, what: str) -> None:
    body, statuses = DOCUMENTS[what]
    with attacked(server):
        for path in ("/v2/models/add/infer", "/v2/repository/models/spare/load", "/v2/repository/index"):
            status, _ = server.call("POST", path, body)
            if path.endswith("/infer"):
                assert status in statuses
            else:
                assert status in {200, 400, 500}


# Inputs and outputs, without number and without measure

SHAPES: dict[str, list[int]] = {
    "a product beyond 64 bits": [2**32, 2**32],
    "a product that wraps to 1": [2**32, 2**31, 2],
    "the largest dimension": [INT64_MAX],
    "a dimension beyond 64 bits signed": [2**63],
    "a negative dimension": [-1, 1],
    "a more negative dimension": [1, -5],
    "a terabyte": [1, HUGE],
    "a thousand dimensions": [1] * 1000,
    "no dimension": [],
    "zero rows": [0, 1],
    "zero columns": [1, 0],
    "zero times infinity": [0, INT64_MAX],
}


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BOOL"])
def test_a_shape_that_lies_is_refused_and_takes_no_memory(server: Victim, what: str, datatype: str) -> None:
    shape = SHAPES[what]
    with attacked(server, grown=24 * MIB):
        for model in ("add", "any", "texts"):
            status, answer = server.infer(model, tensor("x", shape, datatype, []))
            assert status in {400, 500} or (status == 200 and 0 in shape), answer
            for size in (0, 4):
                document = json.dumps(
                    {
                        "inputs": [
                            {
                                "name": "x",
                                "shape": shape,
                                "datatype": datatype,
                                "parameters": {"binary_data_size": size},
                            }
                        ]
                    }
                ).encode()
                status, _ = server.call(
                    "POST",
                    f"/v2/models/{model}/infer",
                    document + bytes(size),
                    {"Inference-Header-Content-Length": str(len(document))},
                )
                assert status in {400, 500} or (status == 200 and 0 in shape)
        if max(shape, default=0) <= INT64_MAX:
            with server.channel() as channel:
                for model in ("add", "any", "texts"):
                    for raw in ([], [b""], [bytes(4)]):
                        message = proto.ModelInferRequest(model_name=model, raw_input_contents=raw)
                        message.inputs.add(name="x", datatype=datatype, shape=shape)
                        code, text = grpc_error(lambda message=message: infer_stub(channel)(message))
                        assert code in {"INVALID_ARGUMENT", "INTERNAL"} or (code == "OK" and 0 in shape), text


def test_an_empty_batch_gets_an_empty_answer_or_a_refusal_and_no_harm(server: Victim) -> None:
    with attacked(server):
        status, answer = server.infer("add", tensor("x", [0, 1], "FP32", []), row())
        assert status == 400
        status, answer = server.infer("any", tensor("x", [1, 0], "FP32", []))
        assert (status, answer["outputs"]) == (200, [{"name": "y", "datatype": "FP32", "shape": [1, 0], "data": []}])


def many_inputs(count: int) -> bytes:
    return json.dumps({"inputs": [tensor(f"x{i}", [1, 1], "FP32", [1]) for i in range(count)]}).encode()


def test_a_hundred_thousand_inputs_are_refused(server: Victim) -> None:
    with attacked(server, grown=128 * MIB):
        status, text = server.error("/v2/models/add/infer", many_inputs(100_000))
        assert status == 400
        assert "expected 1 inputs but got 100000 inputs" in text
        assert len(text) < 4 * MIB
        message = add_message(1)
        for i in range(50_000):
            message.inputs.add(name=f"x{i}", datatype="FP32", shape=[1, 1])
            message.raw_input_contents.append(bytes(4))
        with server.channel() as channel:
            code, _ = grpc_error(lambda: infer_stub(channel)(message))
        assert code in {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}


def test_a_million_outputs_are_refused(server: Victim) -> None:
    """CVE-2026-24146: each output asked for must not cost an allocation."""
    with attacked(server, grown=192 * MIB):
        names = ",".join(f'{{"name":"y{i}"}}' for i in range(1_000_000))
        body = f'{{"inputs":[{json.dumps(row())}],"outputs":[{names}]}}'.encode()
        status, text = server.error("/v2/models/add/infer", body)
        assert (status, "unexpected inference output" in text) == (400, True)
        message = add_message(1)
        for i in range(100_000):
            message.outputs.add(name=f"y{i}")
        with server.channel() as channel:
            assert grpc_error(lambda: infer_stub(channel)(message))[0] == "INVALID_ARGUMENT"


def test_a_name_that_comes_twice_is_refused(server: Victim) -> None:
    with attacked(server):
        assert server.infer("add", row(), row())[0] == 400
        assert server.infer("add", row(), outputs=[{"name": "y"}, {"name": "y"}])[0] == 400
        message = add_message(1)
        message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
        message.raw_input_contents.append(bytes(4))
        twice = add_message(1)
        twice.outputs.add(name="y")
        twice.outputs.add(name="y")
        with server.channel() as channel:
            assert grpc_error(lambda: infer_stub(channel)(message))[0] == "INVALID_ARGUMENT"
            assert grpc_error(lambda: infer_stub(channel)(twice))[0] in {"INVALID_ARGUMENT", "OK"}


def test_a_hundred_thousand_outputs_of_which_the_last_comes_twice_are_refused(server: Victim) -> None:
    with attacked(server, grown=128 * MIB), server.channel() as channel:
        message = add_message(1)
        for i in range(100_000):
            message.outputs.add(name=f"y{i}")
        message.outputs.add(name="y99999")
        code, text = grpc_error(lambda: infer_stub(channel)(message))
        assert code == "INVALID_ARGUMENT"
        assert "output 'y99999' already exists" in text


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_a_million_dimensions_are_refused_without_multiplying_them(server: Victim, datatype: str) -> None:
    shape = [2**62] * 500_000
    given = {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": 4}}
    document = json.dumps({"inputs": [given]}).encode()
    message = proto.ModelInferRequest(model_name="add", raw_input_contents=[bytes(4)])
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    typed = proto.ModelInferRequest(model_name="add")
    contents = typed.inputs.add(name="x", datatype=datatype, shape=shape).contents
    contents.fp32_contents.append(1) if datatype == "FP32" else contents.bytes_contents.append(b"")
    with attacked(server, grown=160 * MIB), server.channel() as channel:
        headers = {"Inference-Header-Content-Length": str(len(document))}
        assert server.error("/v2/models/add/infer", document + bytes(4), headers)[0] == 400
        assert grpc_error(lambda: infer_stub(channel)(message))[0] == "INVALID_ARGUMENT"
        assert grpc_error(lambda: infer_stub(channel)(typed))[0] == "INVALID_ARGUMENT"


def test_all_values_of_a_large_output_as_classes_are_refused(server: Victim) -> None:
    """Texts made of millions of numbers would hold up everybody."""
    rows, columns = 4, 500_000
    given = {"name": "x", "shape": [rows, columns], "datatype": "FP32", "parameters": {"binary_data_size": 8_000_000}}
    wanted = [{"name": "y", "parameters": {"classification": columns}}]
    document = json.dumps({"inputs": [given], "outputs": wanted}).encode()
    with attacked(server, grown=160 * MIB):
        headers = {"Inference-Header-Content-Length": str(len(document))}
        status, text = server.error("/v2/models/any/infer", document + bytes(8_000_000), headers)
        assert (status, text) == (400, "classification output tensor too large")


LIES: dict[str, Any] = {
    "more than there is": 5,
    "less than there is": 3,
    "nothing": 0,
    "beyond 32 bits": 2**32 + 4,
    "beyond 63 bits": 2**63,
    "beyond 64 bits": 2**64 + 4,
    "negative": -4,
    "a text": "4",
    "a fraction": 4.5,
    "a list": [4],
    "true": True,
}


@pytest.mark.parametrize("what", LIES)
def test_a_size_that_lies_about_the_binary_data_is_refused(server: Victim, what: str) -> None:
    given = {"name": "x", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": LIES[what]}}
    document = json.dumps({"inputs": [given]}).encode()
    with attacked(server):
        status, _ = server.error(
            "/v2/models/add/infer", document + bytes(4), {"Inference-Header-Content-Length": str(len(document))}
        )
        assert status in {400, 500}


@pytest.mark.parametrize("length", ["-1", "99999999999999999999", "1000000", "abc", "", "0x10", "1e3", "\u0661"])
def test_a_header_that_lies_about_the_length_of_the_json_is_refused(server: Victim, length: str) -> None:
    with attacked(server), server.raw() as client:
        body = json.dumps({"inputs": [row()]}).encode()
        client.send(
            b"POST /v2/models/add/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n"
            b"Inference-Header-Content-Length: %b\r\n\r\n%b" % (len(body), length.encode(), body)
        )
        status, _, answer = client.receive_answer()
        assert status in {400, 500}  # 500: "1e3" is 1, as for Triton, and one byte of JSON does not parse
        check_text(answer)


def length_prefixed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(e)) + e for e in elements)


TEXT_LIES: dict[str, tuple[list[int], bytes]] = {
    "a length beyond the end": ([1, 1], struct.pack("<I", 0xFFFFFFFF) + b"abc"),
    "a length cut off": ([1, 1], b"\1\0"),
    "a length with nothing behind it": ([1, 1], struct.pack("<I", 10)),
    "too many elements": ([1, 1], length_prefixed(b"a", b"b")),
    "too few elements": ([1, 3], length_prefixed(b"a", b"b")),
    "a million elements and none of them": ([1, 1_000_000], b""),
}


@pytest.mark.parametrize("what", TEXT_LIES)
def test_lengths_that_lie_inside_a_bytes_tensor_are_refused(server: Victim, what: str) -> None:
    shape, data = TEXT_LIES[what]
    given = {"name": "x", "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    document = json.dumps({"inputs": [given]}).encode()
    message = proto.ModelInferRequest(model_name="texts", raw_input_contents=[data])
    message.inputs.add(name="x", datatype="BYTES", shape=shape)
    with attacked(server), server.channel() as channel:
        headers = {"Inference-Header-Content-Length": str(len(document))}
        assert server.error("/v2/models/texts/infer", document + data, headers)[0] == 400
        assert grpc_error(lambda: infer_stub(channel)(message))[0] == "INVALID_ARGUMENT"


def test_two_million_tiny_texts_cost_memory_only_while_they_are_there(server: Victim) -> None:
    """Eight megabytes of empty elements: objects in Python are larger than four bytes, and must all go again."""
    count = 2_000_000
    data = bytes(4 * count)
    given = {"name": "x", "shape": [1, count], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    wanted = [{"name": "y", "parameters": {"binary_data": True}}]
    document = json.dumps({"inputs": [given], "outputs": wanted}).encode()
    headers = {"Inference-Header-Content-Length": str(len(document))}
    with attacked(server, grown=256 * MIB):
        status, answer = server.call("POST", "/v2/models/texts/infer", document + data, headers)
        assert status == 200
        assert answer.endswith(data)


@pytest.mark.parametrize("count", [10**9, INT64_MAX, 2**64 - 1])
def test_more_classes_than_there_are_values_are_all_of_them(server: Victim, count: int) -> None:
    with attacked(server):
        wanted = [{"name": "y", "parameters": {"classification": count}}]
        status, answer = server.infer("any", tensor("x", [1, 3], "FP32", [1, 3, 2]), outputs=wanted)
        assert status == 200
        assert answer["outputs"][0]["data"] == ["3.000000:1", "2.000000:2", "1.000000:0"]


@pytest.mark.parametrize("count", [-1, 2**64, 1.5, "3", None, [], True])
def test_a_number_of_classes_that_is_none_is_refused(server: Victim, count: Any) -> None:
    with attacked(server):
        wanted = [{"name": "y", "parameters": {"classification": count}}]
        assert server.infer("any", tensor("x", [1, 3], "FP32", [1, 3, 2]), outputs=wanted)[0] in {400, 500}


def test_a_long_id_comes_back_and_strange_parameters_change_nothing(server: Victim) -> None:
    strange: dict[str, Any] = {f"p{i}": i for i in range(20_000)}
    strange |= {"a": "x" * MIB, "é\0\n": "\u2028", "priority": 3, "timeout": 2**64 - 1, "__class__": "x", "": True}
    with attacked(server):
        status, answer = server.infer("add", row(41), id="i" * MIB, parameters=strange)
        assert (status, answer["id"], answer["outputs"][0]["data"]) == (200, "i" * MIB, [42])
        for bad in ({"a": {}}, {"a": [1]}, {"a": None}, {"triton_x": 1}, {"priority": -1}, {"timeout": "x"}):
            assert server.infer("add", row(), parameters=bad)[0] in {400, 500}


# Names, versions and paths

NAMES = (
    "../outside", "..", ".", "add/../../outside", "add/..", "a\0b", "add\n", "add\r\nX-Evil: 1", "\u202eadd", "é" * 100,
    "x" * 5000, "C:\\windows", "add%00", "%2e%2e", "~root", "-rf", " add", "add ", "*", "{}", "${HOME}", "<script>",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[repr(n)[:20] for n in NAMES])
def test_a_name_of_no_model_is_not_found_whatever_it_looks_like(server: Victim, name: str) -> None:
    path = quote(name, safe="")
    with attacked(server), server.channel() as channel:
        for verb, call in (("infer", "POST"), ("ready", "GET"), ("config", "GET"), ("stats", "GET"), ("", "GET")):
            status, _ = server.call(call, f"/v2/models/{path}/{verb}".rstrip("/"), b"{}" if call == "POST" else None)
            assert status in {400, 404}
        status, _ = server.call("POST", f"/v2/repository/models/{path}/load", b"")
        assert status in {400, 500}
        message = proto.RepositoryModelLoadRequest(model_name=name)
        assert grpc_error(lambda: raw_stub(channel, "RepositoryModelLoad")(message.SerializeToString()))[0] in {
            "INVALID_ARGUMENT",
            "INTERNAL",
        }
        assert grpc_error(lambda: infer_stub(channel)(add_message(1, name)))[0] in {"INVALID_ARGUMENT", "NOT_FOUND"}
        index = server.post("/v2/repository/index")[1]
        assert {entry["name"] for entry in index} == {"add", "any", "texts", "spare"}


@pytest.mark.parametrize(
    "version", ["0", "2", "99999999999999999999", "9" * 5000, "-1", "1.0", "1e0", "\u0661", "1/../1"]
)
def test_a_version_that_is_not_there_is_refused(server: Victim, version: str) -> None:
    with attacked(server), server.channel() as channel:
        body = {"inputs": [row()]}
        status, _ = server.call("POST", f"/v2/models/add/versions/{quote(version, safe='')}/infer", body)
        assert status in {400, 404}
        message = add_message(1)
        message.model_version = version
        code, _ = grpc_error(lambda: infer_stub(channel)(message))
        assert code in {"INVALID_ARGUMENT", "NOT_FOUND"}


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/add/../add/infer", "/v2//models/add/infer", "//v2/models/add/infer", "/v2/models/add//infer",
        "/v2/models/add/infer/", "/v2/models/add/infer/..", "/V2/models/add/infer", "/v2/models/add/INFER",
        "/v2/models/add/infer%00", "/v2/models/add/infer;x=1", "/v2/models/add/infer%2f", "/v2/models%2fadd/infer",
        "/../../etc/passwd", "/v2/models/add/%2e%2e/%2e%2e/etc/passwd", "/%", "/v2/%zz", "/" + "a/" * 5000, "*",
    ],
)  # fmt: skip
def test_a_path_that_is_no_route_is_none(server: Victim, path: str) -> None:
    with attacked(server), server.raw() as client:
        client.send(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" % path.encode())
        status, _, answer = client.receive_answer()
        assert status in {400, 404, 405}
        check_text(answer, path)


@pytest.mark.parametrize(
    "override",
    [
        {"default_model_filename": "../../../outside/1/model.onnx"},
        {"default_model_filename": "/etc/passwd"},
        {"output": [{
            "name": "y", "data_type": "TYPE_FP32", "dims": [1], "label_filename": "../../outside/labels.txt"}]},
        {"output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [1], "label_filename": "/etc/passwd"}]},
        {"model_warmup": [{"name": "w", "batch_size": 1, "inputs": {"x": {
            "data_type": "TYPE_FP32", "dims": [1], "input_data_file": "../../../outside/labels.txt"}}}]},
        {"model_warmup": [{"name": "w", "batch_size": 4_000_000_000, "inputs": {"x": {
            "data_type": "TYPE_FP32", "dims": [1], "zero_data": True}}}]},
        {"model_warmup": [{"name": "w", "batch_size": 1, "count": 4_000_000_000, "inputs": {"x": {
            "data_type": "TYPE_FP32", "dims": [1], "zero_data": True}}}]},
        {"instance_group": [{"count": 2_000_000_000, "kind": "KIND_CPU"}]},
        {"instance_group": [{"count": -1, "kind": "KIND_CPU"}]},
        {"backend": "../evil"},
        {"backend": "os"},
        {"name": "../evil"},
        {"max_batch_size": -5},
        {"no_such_field": 1},
        {"parameters": {"intra_op_thread_count": {"string_value": "1000000000"}}},
        {"version_policy": {"specific": {"versions": [99]}}},
        [],
        "x",
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_leads_outside_or_beyond_measure_is_refused_and_the_model_goes_on(
    server: Victim, override: Any
) -> None:
    base = {"backend": "onnxruntime", "max_batch_size": 4}
    config = {**base, **override} if isinstance(override, dict) else override
    with attacked(server):
        path = "/v2/repository/models/spare/load"
        status, text = server.error(path, {"parameters": {"config": json.dumps(config)}})
        assert status in {400, 500}, text
        assert "root:" not in text
        assert "secret" not in text
        status, answer = server.infer("spare", row(1))
        assert (status, answer["outputs"][0]["data"]) == (200, [4])


def test_a_largest_batch_without_measure_takes_no_memory(server: Victim) -> None:
    config = json.dumps({"backend": "onnxruntime", "max_batch_size": 2**31 - 1})
    with attacked(server):
        path = "/v2/repository/models/spare/load"
        assert server.post(path, {"parameters": {"config": config}})[0] == 200
        assert server.infer("spare", row(1))[1]["outputs"][0]["data"] == [4]
        assert server.post(path)[0] == 200


@pytest.mark.parametrize(
    "path",
    ["../x", "1/../../x", "/etc/x", "1/a/../../../x", "..", "", "1/\0", "1/" + "a" * 300, "1/" + "a/" * 3000 + "x"],
    ids=lambda path: path[:12],
)
def test_a_file_that_leads_outside_is_not_written(server: Victim, path: str) -> None:
    parameters = {"config": '{"backend":"onnxruntime"}', f"file:{path}": base64.b64encode(b"x").decode()}
    with attacked(server), server.channel() as channel:
        status, text = server.error("/v2/repository/models/spare/load", {"parameters": parameters})
        assert status in {400, 500}
        check_text(text.replace(path, "") if path else text)
        message = proto.RepositoryModelLoadRequest(model_name="spare")
        message.parameters["config"].string_param = parameters["config"]
        message.parameters[f"file:{path}"].bytes_param = b"x"
        code, _ = _code(lambda: raw_stub(channel, "RepositoryModelLoad")(message.SerializeToString()))
        assert code in {"INVALID_ARGUMENT", "INTERNAL"}
        assert server.infer("spare", row(1))[1]["outputs"][0]["data"] == [4]


def _code(call: Any) -> tuple[str, str]:
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


# Compression

GZIP_BOMB = gzip.compress(bytes(512 * MIB), 9)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compression_bomb_in_a_request_is_refused(server: Victim, coding: str) -> None:
    bomb = GZIP_BOMB if coding == "gzip" else zlib.compress(bytes(512 * MIB), 9)
    with attacked(server, grown=160 * MIB):
        status, _ = server.error("/v2/models/add/infer", bomb, {"Content-Encoding": coding})
        assert status in {400, 413}


def grpc_frame(payload: bytes, compressed: bool) -> bytes:
    return struct.pack(">BI", compressed, len(payload)) + payload


def test_a_compression_bomb_in_a_grpc_message_is_refused(tmp_path: Path) -> None:
    """With the message's largest size set to 64 MiB; what is beyond it is never unpacked."""
    save_adder(tmp_path / "models" / "add" / "1" / "model.onnx", 1)
    from doorstep.testing.http2_client import Http2Client, block, frame

    with Victim(tmp_path / "models", f"--grpc-max-message-bytes={64 * MIB}") as server:
        body = grpc_frame(GZIP_BOMB, True)
        with attacked(server, grown=160 * MIB), server.raw(server.grpc_port) as raw:
            client = Http2Client(raw)
            headers = block(
                b"POST",
                b"/inference.GRPCInferenceService/ModelInfer",
                [(b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-encoding", b"gzip")],
            )
            client.send(frame(1, 4, 1, headers))
            for at in range(0, len(body), 16_384):
                piece = body[at : at + 16_384]
                client.send(frame(0, int(at + 16_384 >= len(body)), 1, piece))
            seen = b""
            while True:
                found = client.receive()
                seen += found.payload
                if found.kind in (1, 3) and found.stream_id == 1 and found.ends:
                    break
            assert server.metric("nv_inference_request_success", model="add") >= 1
        assert server.running


# Protobuf


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def groups(depth: int) -> bytes:
    return varint(1000 << 3 | 3) * depth + varint(1000 << 3 | 4) * depth


GOOD = add_message(1).SerializeToString()

MESSAGES: dict[str, tuple[bytes, set[str]]] = {
    "an unknown field of a megabyte": (GOOD + field(999, bytes(MIB)), {"OK"}),
    "a hundred thousand unknown fields": (GOOD + field(999, b"") * 100_000, {"OK"}),
    "groups that nest without end": (GOOD + groups(50_000), {"INTERNAL"}),
    "groups that never end": (GOOD + varint(1000 << 3 | 3) * 50_000, {"INTERNAL"}),
    "the name a hundred thousand times": (field(1, b"nobody") * 100_000 + GOOD, {"OK"}),
    "a length beyond the end": (GOOD + varint(1 << 3 | 2) + varint(2**31), {"INTERNAL"}),
    "a length beyond 64 bits": (GOOD + varint(1 << 3 | 2) + b"\xff" * 9 + b"\1", {"INTERNAL"}),
    "a varint without end": (GOOD + b"\xff" * 100, {"INTERNAL"}),
    "field number 0": (GOOD + b"\0\0", {"INTERNAL"}),
    "a wire type that does not exist": (GOOD + b"\x07", {"INTERNAL"}),
    "a name that is no UTF-8": (field(1, b"\xff\xfe"), {"INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND"}),
    "a name with a NUL": (field(1, b"add\0"), {"INVALID_ARGUMENT", "NOT_FOUND"}),
    "random bytes": (bytes(range(256)) * 100, {"INTERNAL"}),
    "nothing": (b"", {"INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL"}),
    "contents and raw contents": (
        GOOD + field(5, field(1, b"x") + field(5, field(6, bytes(4)))), {"INVALID_ARGUMENT"}),
}  # fmt: skip


@pytest.mark.parametrize("what", MESSAGES)
def test_a_message_no_client_library_would_send_is_parsed_or_refused(server: Victim, what: str) -> None:
    message, codes = MESSAGES[what]
    with attacked(server), server.channel() as channel:
        call = raw_stub(channel)
        code, text = grpc_error(lambda: call(message, timeout=20))
        assert code in codes, text


@pytest.mark.parametrize("method", ["", "NoSuch", "ModelInfer/", "modelinfer", "../x", "%2e", "A" * 5000])
def test_a_method_that_is_not_there_is_unimplemented(server: Victim, method: str) -> None:
    with attacked(server), server.channel() as channel:
        assert grpc_error(lambda: raw_stub(channel, method)(b""))[0] == "UNIMPLEMENTED"


def test_http_and_grpc_work_on_each_others_ports_and_nonsense_on_none(server: Victim) -> None:
    with attacked(server):
        with grpc.insecure_channel(server.http) as channel:
            assert infer_stub(channel)(add_message(1)).model_name == "add"
        with server.raw(server.grpc_port) as client:
            body = json.dumps({"inputs": [row(1)]}).encode()
            client.send(
                b"POST /v2/models/add/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert client.receive_answer()[0] == 200
        for port in (server.http_port, server.grpc_port, server.metrics_port):
            for nonsense in (
                os.urandom(4096),
                b"\x16\x03\x01\x02\x00" + bytes(512),
                b"\0" * 4096,
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
            ):
                with server.raw(port) as client:
                    client.send_until_refused(nonsense)
                    client.sock.shutdown(1)
                    check_text(client.receive_all())


def test_headers_and_urls_beyond_measure_are_refused(server: Victim) -> None:
    for head in (
        b"GET /" + b"a" * 10 * MIB + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10 * MIB + b"\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 200_000 + b"\r\n",
        b"G" * 10 * MIB,
    ):
        with attacked(server), server.raw() as client:
            client.send_until_refused(head)
            answer = client.receive_all()
            assert not answer or answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 414", b"HTTP/1.1 431", b"HTTP/1.1 501")
            check_text(answer)


def test_a_body_over_the_limit_is_refused_before_it_is_sent(server: Victim) -> None:
    with attacked(server), server.raw() as client:
        client.send(b"POST /v2/models/add/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n{")
        assert client.receive_answer()[0] in {400, 413}
