"""POST …/infer over HTTP: what is asked for, in every right and wrong way. Knows no server."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from typing import Any

from .wire import HttpCase

Json = dict[str, Any]
NESTED = 120  # deeper than any server should follow


def tensor(name: str, shape: Any, datatype: Any, data: Any = None, **parameters: Any) -> Json:
    """An input as JSON; leaves out what is None."""
    found: Json = {"name": name, "shape": shape, "datatype": datatype, "parameters": parameters or None, "data": data}
    return {key: value for key, value in found.items() if value is not None}


def body(*inputs: Any, outputs: Any = None, **top: Any) -> Json:
    return {**top, "inputs": list(inputs), **({} if outputs is None else {"outputs": outputs})}


def binary(request: Json, *blobs: bytes) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    head = json.dumps(request).encode()
    return head + b"".join(blobs), (("Inference-Header-Content-Length", str(len(head))),)


def _ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _strings(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(v)) + v for v in values)


A = tensor("INPUT0", [1, 4], "INT32", [1, 2, 3, 4])
B = tensor("INPUT1", [1, 4], "INT32", [10, 20, 30, 40])
SUM: Json = {"name": "OUTPUT0"}
DIFFERENCE: Json = {"name": "OUTPUT1"}
X = tensor("IN", [3], "FP32", [0.5, -1.5, 2.0])
ONE = tensor("IN", [1], "INT32", [7])
S = tensor("IN", [1, 2], "BYTES", ["a", "bc"])
BIG = 2**62

CASES: list[HttpCase] = []


def _add(name: str, model: str, request: Any, *headers: tuple[str, str], version: str = "", **extra: Any) -> None:
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    payload = request if isinstance(request, bytes) else json.dumps(request).encode()
    CASES.append(HttpCase(f"infer: {name}", "POST", path, headers, payload, **extra))


def _add_binary(name: str, model: str, request: Json, *blobs: bytes) -> None:
    payload, headers = binary(request, *blobs)
    _add(name, model, payload, *headers)


# --- answers ---
_add("two inputs", "add_sub", body(A, B))
_add("inputs in the other order", "add_sub", body(B, A))
_add("nested data", "add_sub", body({**A, "data": [[1, 2, 3, 4]]}, B))
_add("oddly nested data", "add_sub", body({**A, "data": [[[1], [2]], 3, [4]]}, B))
_add(
    "a batch",
    "add_sub",
    body(tensor("INPUT0", [2, 4], "INT32", list(range(8))), tensor("INPUT1", [2, 4], "INT32", [1] * 8)),
)
_add("with a version", "add_sub", body(A, B), version="1")
_add("one output asked for", "add_sub", body(A, B, outputs=[DIFFERENCE]))
_add("outputs in the other order", "add_sub", body(A, B, outputs=[DIFFERENCE, SUM]))
_add("no outputs listed", "add_sub", body(A, B, outputs=[]))
_add("with an id", "add_sub", body(A, B, id="abc"))
_add("with an empty id", "add_sub", body(A, B, id=""))
_add("with a unicode id", "add_sub", body(A, B, id="é☃"))
_add("whitespace around the JSON", "add_sub", b"  \n" + json.dumps(body(A, B)).encode() + b"\r\n ")
_add("unknown fields", "add_sub", body({**A, "more": 1}, B, unknown={"x": [1]}))
_add("other content type", "add_sub", body(A, B), ("Content-Type", "text/plain"))
_add("form content type", "add_sub", body(A, B), ("Content-Type", "application/x-www-form-urlencoded"))
CASES.append(
    HttpCase("infer: with a query string", "POST", "/v2/models/add_sub/infer?x=1", (), json.dumps(body(A, B)).encode())
)
_add("chunked", "add_sub", b"", chunks=(json.dumps(body(A, B)).encode()[:20], json.dumps(body(A, B)).encode()[20:]))
_add("expect 100-continue", "add_sub", body(A, B), ("Expect", "100-continue"))
_add(
    "HTTP/1.0",
    "add_sub",
    b"",
    raw=b"POST /v2/models/add_sub/infer HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(json.dumps(body(A, B)))
    + json.dumps(body(A, B)).encode(),
)
_add("scalar shape", "scalar", body(tensor("IN", [2, 1], "INT64", [5, 6])))
_add("scalar shape without its dimension", "scalar", body(tensor("IN", [2], "INT64", [5, 6])))
_add("fixed shape", "matrix", body(tensor("IN", [2, 3], "FP64", [[1, 2, 3], [4, 5, 6.5]])))
_add("optional input given", "optional", body(tensor("A", [2], "INT32", [1, 2]), tensor("B", [2], "INT32", [3, 4])))
_add("optional input left out", "optional", body(tensor("A", [2], "INT32", [1, 2])))
_add("required input left out", "optional", body(tensor("B", [2], "INT32", [1, 2])))
_add(
    "optional model with an unknown input",
    "optional",
    body(tensor("A", [2], "INT32", [1, 2]), tensor("C", [2], "INT32", [1, 2])),
)
_add("optional model with too many inputs", "optional", body(*(tensor(n, [1], "INT32", [1]) for n in "ABC")))
for _version in ("1", "3"):
    _add(f"version {_version} of several", "multi", body(ONE), version=_version)
_add("newest of several versions", "multi", body(ONE))

# --- data types ---
_JSON_DATA: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-(2**15), 2**15 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP32": [0.1, -3.4e38],
    "FP64": [0.1, 1.7e308],
}
for _name, _data in _JSON_DATA.items():
    _add(
        f"{_name} as JSON",
        "every_type",
        body(tensor(f"IN_{_name}", [2], _name, _data), outputs=[{"name": f"OUT_{_name}"}]),
    )
    _add(
        f"{_name} as JSON, answered in binary",
        "every_type",
        body(
            tensor(f"IN_{_name}", [2], _name, _data),
            outputs=[{"name": f"OUT_{_name}", "parameters": {"binary_data": True}}],
        ),
    )
_add(
    "BYTES as JSON",
    "every_type",
    body(tensor("IN_STRING", [4], "BYTES", ["", "é☃", 'quote " and \\', "\n\t\x00"]), outputs=[{"name": "OUT_STRING"}]),
)
for _name in ("FP16", "BF16"):
    _add(
        f"{_name} as JSON",
        "every_type",
        body(tensor(f"IN_{_name}", [2], _name, [1.0, 2.0]), outputs=[{"name": "OUT_FP32"}]),
    )
_add_binary(
    "FP16 in binary, answered in JSON",
    "every_type",
    body(tensor("IN_FP16", [2], "FP16", binary_data_size=4), outputs=[{"name": "OUT_FP16"}]),
    b"\x00\x3c\x00\x40",
)
_add_binary(
    "FP16 in binary, answered in binary",
    "every_type",
    body(
        tensor("IN_FP16", [2], "FP16", binary_data_size=4),
        outputs=[{"name": "OUT_FP16", "parameters": {"binary_data": True}}],
    ),
    b"\x00\x3c\x00\x40",
)
for _name, _value in (
    ("BOOL", 1),
    ("BOOL", "true"),
    ("UINT8", 256),
    ("UINT8", -1),
    ("INT8", 128),
    ("INT8", -129),
    ("UINT16", 65536),
    ("INT16", 32768),
    ("UINT32", 2**32),
    ("INT32", 2**31),
    ("INT32", 1.5),
    ("INT32", 1.0),
    ("INT32", "1"),
    ("INT32", True),
    ("INT32", None),
    ("INT32", {}),
    ("UINT64", 2**64),
    ("INT64", 2**63),
    ("FP32", 1),
    ("FP32", "1.0"),
    ("FP32", 1e39),
    ("FP32", True),
    ("FP64", 1e400),
    ("BYTES", 1),
    ("BYTES", None),
    ("BYTES", ["x"]),
):
    _input = "STRING" if _name == "BYTES" else _name
    _text = json.dumps(body(tensor(f"IN_{_input}", [1], _name, [0]), outputs=[{"name": f"OUT_{_input}"}]))
    _literal = "1e400" if _value == 1e400 else json.dumps(_value)
    _add(f"{_name} from {_literal}", "every_type", _text.replace('"data": [0]', f'"data": [{_literal}]').encode())
for _literal in ("NaN", "Infinity", "-Infinity", "nan", "inf"):
    _add(f"the literal {_literal}", "identity_fp32", json.dumps(body(X)).replace("-1.5", _literal).encode())
_add_binary(
    "NaN and infinities in binary, answered in JSON",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", binary_data_size=12)),
    _floats(float("nan"), float("inf"), float("-inf")),
)
_add_binary(
    "NaN and infinities in binary, answered in binary",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", binary_data_size=12), parameters={"binary_data_output": True}),
    _floats(float("nan"), float("inf"), float("-inf")),
)
_add(
    "negative zero and tiny numbers",
    "identity_fp32",
    json.dumps(body(X)).replace("-1.5", "-0.0").replace("2.0", "1e-45").encode(),
)
_add("numbers needing all digits", "identity_fp32", body(tensor("IN", [4], "FP32", [0.1, 16777217, 1e10, 123456.789])))
_add(
    "FP64 needing all digits",
    "matrix",
    body(tensor("IN", [2, 3], "FP64", [0.1, 1 / 3, 1e22, 1e-7, 123456789.123456789, 5e-324])),
)

# --- datatypes, names and shapes that do not fit ---
for _type in ("FP64", "fp32", "FLOAT", "", "INT4", "STRING", "TYPE_FP32", 7, None, ["FP32"]):
    _add(f"datatype {_type!r} for FP32", "identity_fp32", body({**X, "datatype": _type}))
_add("no datatype", "identity_fp32", body({k: v for k, v in X.items() if k != "datatype"}))
_add("no name", "identity_fp32", body({k: v for k, v in X.items() if k != "name"}))
_add("no shape", "identity_fp32", body({k: v for k, v in X.items() if k != "shape"}))
_add("no data", "identity_fp32", body({k: v for k, v in X.items() if k != "data"}))
for _name in (1, None, "", "in", "IN ", "nope"):
    _add(f"input name {_name!r}", "identity_fp32", body({**X, "name": _name}))
for _shape in (
    [2],
    [4],
    [],
    [0],
    [-1],
    [1, 3],
    [3, 1],
    [1.5],
    ["3"],
    [None],
    "3",
    3,
    None,
    {},
    [[3]],
    [True],
    [2**31],
    [BIG, 8],
    [2**63 - 1],
    [2**63],
    [2**64],
    [-(2**63)],
    [0, BIG],
    [1] * 40,
):
    _add(f"shape {repr(_shape)[:60]}", "identity_fp32", body({**X, "shape": _shape}))
for _shape in ([2, 3], [3, 2], [6], [2, 3, 1], [1, 2, 3], []):
    _add(f"shape {_shape} for [2,3]", "matrix", body(tensor("IN", _shape, "FP64", [1, 2, 3, 4, 5, 6])))
for _shape, _count in (
    ([4], 4),
    ([1, 3], 3),
    ([1, 5], 5),
    ([0, 4], 0),
    ([9, 4], 36),
    ([1, 1, 4], 4),
    ([], 1),
    ([-1, 4], 4),
):
    _values = list(range(_count))
    _add(
        f"shape {_shape} for a batch of [4]",
        "add_sub",
        body(tensor("INPUT0", _shape, "INT32", _values), tensor("INPUT1", _shape, "INT32", _values)),
    )
_add("batches that differ", "add_sub", body(A, tensor("INPUT1", [2, 4], "INT32", [1] * 8)))
_add(
    "the largest batch",
    "add_sub",
    body(tensor("INPUT0", [8, 4], "INT32", [1] * 32), tensor("INPUT1", [8, 4], "INT32", [2] * 32)),
)
_add("data longer than the shape", "identity_fp32", body({**X, "data": [1, 2, 3, 4]}))
_add("data shorter than the shape", "identity_fp32", body({**X, "data": [1, 2]}))
_add("empty data", "identity_fp32", body({**X, "data": []}))
for _data in (1, "abc", {}, True, None, [[1, 2], [3]], [[]], [None, None, None], [[1], [2], "x"]):
    _add(
        f"data {_data!r}", "identity_fp32", json.dumps(body(X)).replace("[0.5, -1.5, 2.0]", json.dumps(_data)).encode()
    )
_add("zero elements", "identity_fp32", body(tensor("IN", [0], "FP32", [])))
_add("zero elements of BYTES", "identity_bytes", body(tensor("IN", [1, 0], "BYTES", [])))
_add_binary("zero elements in binary", "identity_fp32", body(tensor("IN", [0], "FP32", binary_data_size=0)))
_add_binary(
    "zero elements in binary, answered in binary",
    "identity_fp32",
    body(tensor("IN", [0], "FP32", binary_data_size=0), parameters={"binary_data_output": True}),
)

# --- inputs and outputs that do not fit ---
_add("a missing input", "add_sub", body(A))
_add("an extra input", "add_sub", body(A, B, tensor("INPUT2", [1, 4], "INT32", [1] * 4)))
_add("an unknown input", "add_sub", body(A, tensor("INPUT2", [1, 4], "INT32", [1] * 4)))
_add("the same input twice", "add_sub", body(A, A))
_add("the same input twice and the other", "add_sub", body(A, A, B))
_add("no inputs", "add_sub", body())
_add("inputs left out", "add_sub", {"id": "1"})
for _value in (None, {}, "x", 3, [1], ["x"], [None], [[]]):
    _add(f"inputs {_value!r}", "add_sub", {"inputs": _value})
_add("an unknown output", "add_sub", body(A, B, outputs=[{"name": "NOPE"}]))
_add("a known and an unknown output", "add_sub", body(A, B, outputs=[SUM, {"name": "NOPE"}]))
_add("the same output twice", "add_sub", body(A, B, outputs=[SUM, SUM]))
for _value in (None, {}, "x", 3, [1], [{}], [None], [{"name": 3}], [{"name": ""}]):
    _add(
        f"outputs {_value!r}",
        "add_sub",
        body(A, B, outputs=_value) if _value is not None else {**body(A, B), "outputs": None},
    )
_add(
    "output with unknown parameters",
    "add_sub",
    body(A, B, outputs=[{"name": "OUTPUT0", "parameters": {"colour": "red"}}]),
)
_add("output parameters not an object", "add_sub", body(A, B, outputs=[{"name": "OUTPUT0", "parameters": [1]}]))
_add("input parameters not an object", "add_sub", body({**A, "parameters": [1]}, B))
_add("input with unknown parameters", "add_sub", body({**A, "parameters": {"colour": "red", "n": 1}}, B))

# --- bodies that are not requests ---
for _name, _text in (
    ("empty", b""),
    ("blank", b"   "),
    ("not JSON", b"hello"),
    ("cut short", json.dumps(body(A, B)).encode()[:-5]),
    ("two documents", b"{} {}"),
    ("trailing comma", b'{"inputs": [],}'),
    ("single quotes", b"{'inputs': []}"),
    ("comment", b'{"inputs": [] /* x */}'),
    ("array", b"[]"),
    ("null", b"null"),
    ("number", b"42"),
    ("string", b'"x"'),
    ("invalid UTF-8", b'{"id":"\xff\xfe","inputs":[]}'),
    ("a lone surrogate", b'{"id":"\\ud800","inputs":[]}'),
    ("NUL byte", b'{"id":"a\x00b","inputs":[]}'),
    ("byte-order mark", b"\xef\xbb\xbf" + json.dumps(body(A, B)).encode()),
    ("key twice", b'{"inputs":[],"inputs":[]}'),
    ("nested too deep", b'{"inputs":' + b"[" * NESTED + b"]" * NESTED + b"}"),
    ("nested too deep in a parameter", b'{"parameters":{"x":' + b"[" * NESTED + b"]" * NESTED + b'},"inputs":[]}'),
):
    _add(f"body {_name}", "add_sub", _text)
for _id in (1, 1.5, True, None, [], {}, "x" * 300):
    _add(f"id {repr(_id)[:20]}", "add_sub", body(A, B, id=_id))

# --- parameters ---
for _name, _parameters in (
    ("of each kind", {"i": 1, "b": True, "s": "x", "d": 1.5}),
    ("none", {}),
    ("negative", {"i": -5}),
    ("large", {"i": 2**63 - 1}),
    ("beyond int64", {"i": 2**63}),
    ("null", {"n": None}),
    ("array", {"a": [1]}),
    ("object", {"o": {}}),
    ("reserved prefix", {"triton_x": 1}),
    ("reserved prefix, enable final", {"triton_enable_empty_final_response": True}),
    ("named headers", {"headers": "x"}),
    ("priority 1", {"priority": 1}),
    ("priority 0", {"priority": 0}),
    ("priority -1", {"priority": -1}),
    ("priority '1'", {"priority": "1"}),
    ("priority 1.5", {"priority": 1.5}),
    ("priority true", {"priority": True}),
    ("priority 2^64", {"priority": 2**64}),
    ("timeout 1000000", {"timeout": 1000000}),
    ("timeout 0", {"timeout": 0}),
    ("timeout -1", {"timeout": -1}),
    ("timeout 'x'", {"timeout": "x"}),
    ("timeout 1.5", {"timeout": 1.5}),
    ("sequence_id 5", {"sequence_id": 5, "sequence_start": True}),
    ("sequence_id 'a'", {"sequence_id": "a", "sequence_end": True}),
    ("sequence_id 0", {"sequence_id": 0}),
    ("sequence_id ''", {"sequence_id": ""}),
    ("sequence_id -1", {"sequence_id": -1}),
    ("sequence_id true", {"sequence_id": True}),
    ("sequence_id 1.5", {"sequence_id": 1.5}),
    ("sequence_start 'x'", {"sequence_start": "x"}),
    ("sequence_start 1", {"sequence_start": 1}),
    ("sequence_end null", {"sequence_end": None}),
    ("binary_data_output true", {"binary_data_output": True}),
    ("binary_data_output false", {"binary_data_output": False}),
    ("binary_data_output 1", {"binary_data_output": 1}),
    ("binary_data_output 'true'", {"binary_data_output": "true"}),
    ("empty name", {"": 1}),
):
    _add(f"parameters {_name}", "params", body(ONE, parameters=_parameters))
for _value in (None, [], "x", 1, [{"a": 1}]):
    _add(f"parameters {_value!r}", "params", {**body(ONE), "parameters": _value})
_add("id reaches the model", "params", body(ONE, id="seven"))

# --- classification ---
SCORES = tensor("SCORES", [2, 5], "FP32", [0.1, 0.5, 0.25, -1, 3, 9, 8, 7, 6, 5.5])


def _classes(output: str, **parameters: Any) -> Json:
    return body(SCORES, outputs=[{"name": output, "parameters": parameters}])


for _n in (1, 2, 5, 6, 1000000, 1000001, 0, -1, 2**32, "2", 1.5, True, None):
    _add(f"classification {_n!r}", "classifier", _classes("PROB", classification=_n))
_add("classification without labels", "classifier", _classes("RANK", classification=2))
_add("classification of BYTES", "classifier", _classes("NAME", classification=2))
_add("classification in binary", "classifier", _classes("PROB", classification=2, binary_data=True))
_add(
    "classification and shared memory",
    "classifier",
    _classes("PROB", classification=2, shared_memory_region="r", shared_memory_byte_size=8),
)
_add(
    "classification beside a plain output",
    "classifier",
    body(SCORES, outputs=[{"name": "PROB", "parameters": {"classification": 1}}, {"name": "RANK"}]),
)
_add(
    "classification of equal scores",
    "classifier",
    body(
        tensor("SCORES", [1, 5], "FP32", [1, 1, 1, 1, 1]),
        outputs=[{"name": "PROB", "parameters": {"classification": 3}}],
    ),
)
_add(
    "classification with no batch dimension",
    "matrix",
    body(
        tensor("IN", [2, 3], "FP64", [1, 2, 3, 4, 5, 6]), outputs=[{"name": "OUT", "parameters": {"classification": 4}}]
    ),
)
for _type in ("UINT8", "UINT64", "INT8", "INT64", "FP64", "BOOL", "FP32"):
    _add(
        f"classification of {_type}",
        "every_type",
        body(
            tensor(f"IN_{_type}", [2], _type, _JSON_DATA[_type]),
            outputs=[{"name": f"OUT_{_type}", "parameters": {"classification": 2}}],
        ),
    )
_add_binary(
    "classification of FP16",
    "every_type",
    body(
        tensor("IN_FP16", [2], "FP16", binary_data_size=4),
        outputs=[{"name": "OUT_FP16", "parameters": {"classification": 2}}],
    ),
    b"\x00\x3c\x00\x40",
)
_add(
    "classification of nothing",
    "identity_fp32",
    body(tensor("IN", [0], "FP32", []), outputs=[{"name": "OUT", "parameters": {"classification": 2}}]),
)

# --- the binary extension ---
A_BIN = tensor("INPUT0", [1, 4], "INT32", binary_data_size=16)
B_BIN = tensor("INPUT1", [1, 4], "INT32", binary_data_size=16)
_a, _b = _ints(1, 2, 3, 4), _ints(10, 20, 30, 40)
_add_binary("both inputs in binary", "add_sub", body(A_BIN, B_BIN), _a, _b)
_add_binary("one in binary, one in JSON", "add_sub", body(A, B_BIN), _b)
_add_binary(
    "one in JSON, one in binary, asked back in binary",
    "add_sub",
    body(A_BIN, B, outputs=[{"name": "OUTPUT1", "parameters": {"binary_data": True}}, SUM]),
    _a,
)
_add_binary("everything in binary", "add_sub", body(A_BIN, B_BIN, parameters={"binary_data_output": True}), _a, _b)
_add_binary(
    "binary by default, one output in JSON",
    "add_sub",
    body(
        A_BIN,
        B_BIN,
        parameters={"binary_data_output": True},
        outputs=[SUM, {"name": "OUTPUT1", "parameters": {"binary_data": False}}],
    ),
    _a,
    _b,
)
_add(
    "JSON in, binary out, no header",
    "add_sub",
    body(A, B, outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}]),
)
_add_binary("JSON in, header given", "add_sub", body(A, B))
_add_binary("too few bytes", "add_sub", body(A_BIN, B_BIN), _a, _b[:-1])
_add_binary("too many bytes", "add_sub", body(A_BIN, B_BIN), _a, _b, b"x")
_add_binary("no bytes", "add_sub", body(A_BIN, B_BIN))
_add_binary(
    "size smaller than the shape",
    "add_sub",
    body({**A_BIN, "parameters": {"binary_data_size": 12}}, B_BIN),
    _a[:12],
    _b,
)
_add_binary(
    "size larger than the shape",
    "add_sub",
    body({**A_BIN, "parameters": {"binary_data_size": 20}}, B_BIN),
    _a + b"xxxx",
    _b,
)
_add_binary("size and data", "add_sub", body({**A, "parameters": {"binary_data_size": 16}}, B_BIN), _a, _b)
for _size in (0, -1, "16", 1.5, True, None, 2**63, 2**64):
    _add_binary(
        f"binary_data_size {_size!r}",
        "add_sub",
        body({**A_BIN, "parameters": {"binary_data_size": _size}}, B_BIN),
        _a,
        _b,
    )
_json = json.dumps(body(A_BIN, B_BIN)).encode()
for _length in (
    "-1",
    "abc",
    "",
    " ",
    "1.5",
    "0x10",
    "99999999",
    str(len(_json) - 1),
    str(len(_json) + 1),
    str(len(_json) + 32),
    str(len(_json) + 33),
    "18446744073709551616",
    f"+{len(_json)}",
    f"{len(_json)}x",
    f" {len(_json)} ",
):
    _shown = _length.replace(str(len(_json)), "right")
    _add(f"header length {_shown!r}", "add_sub", _json + _a + _b, ("Inference-Header-Content-Length", _length))
for _flag in (1, "true", None, [], 0):
    _add(
        f"binary_data {_flag!r}",
        "add_sub",
        body(A, B, outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": _flag}}]),
    )
_add_binary(
    "BYTES in binary",
    "identity_bytes",
    body(tensor("IN", [1, 3], "BYTES", binary_data_size=15)),
    _strings(b"abc", b"", b""),
)
_add_binary(
    "BYTES with any bytes, answered in binary",
    "identity_bytes",
    body(
        tensor("IN", [1, 2], "BYTES", binary_data_size=12),
        outputs=[{"name": "OUT", "parameters": {"binary_data": True}}],
    ),
    _strings(b"\xff\x00", b"\x80\x81"),
)
_add_binary(
    "BYTES that are not UTF-8, answered in JSON",
    "identity_bytes",
    body(tensor("IN", [1, 2], "BYTES", binary_data_size=12)),
    _strings(b"\xff\x00", b"\x80\x81"),
)
_add_binary(
    "BYTES too few elements",
    "identity_bytes",
    body(tensor("IN", [1, 3], "BYTES", binary_data_size=8)),
    _strings(b"", b""),
)
_add_binary(
    "BYTES too many elements",
    "identity_bytes",
    body(tensor("IN", [1, 1], "BYTES", binary_data_size=8)),
    _strings(b"", b""),
)
_add_binary(
    "BYTES with a length past the end",
    "identity_bytes",
    body(tensor("IN", [1, 1], "BYTES", binary_data_size=8)),
    struct.pack("<I", 100) + b"abcd",
)
_add_binary(
    "BYTES with half a length",
    "identity_bytes",
    body(tensor("IN", [1, 2], "BYTES", binary_data_size=6)),
    struct.pack("<I", 0) + b"ab",
)
_add_binary(
    "BYTES with a huge length",
    "identity_bytes",
    body(tensor("IN", [1, 1], "BYTES", binary_data_size=5)),
    b"\xff\xff\xff\xffa",
)
_add_binary(
    "BOOL bytes other than 0 and 1",
    "every_type",
    body(tensor("IN_BOOL", [2], "BOOL", binary_data_size=2), outputs=[{"name": "OUT_BOOL"}]),
    b"\x02\xff",
)
_add_binary(
    "BF16 in binary",
    "every_type",
    body(tensor("IN_BF16", [1], "BF16", binary_data_size=2), outputs=[{"name": "OUT_FP32"}]),
    b"\x80\x3f",
)

# --- one raw tensor ---
RAW = (("Inference-Header-Content-Length", "0"),)
_add("raw tensor", "identity_fp32", _floats(1, 2, 3), *RAW)
_add("raw tensor, empty", "identity_fp32", b"", *RAW)
_add("raw tensor of an odd size", "identity_fp32", b"12345", *RAW)
_add("raw tensor for two inputs", "add_sub", _a, *RAW)
_add("raw tensor of fixed shape", "matrix", struct.pack("<6d", 1, 2, 3, 4, 5, 6), *RAW)
_add("raw tensor of fixed shape, too short", "matrix", struct.pack("<5d", 1, 2, 3, 4, 5), *RAW)
_add("raw tensor of BYTES", "identity_bytes", b"hello", *RAW)
_add("raw tensor of a batching model", "classifier", _floats(1, 2, 3, 4, 5), *RAW)
_add(
    "raw tensor with content type",
    "identity_fp32",
    _floats(1, 2, 3),
    *RAW,
    ("Content-Type", "application/octet-stream"),
)
_add("raw tensor for optional inputs", "optional", _ints(1, 2), *RAW)
_add("raw scalar", "scalar", struct.pack("<q", 9), *RAW)

# --- compression ---
_plain = json.dumps(body(A, B)).encode()
_deflate = zlib.compressobj(wbits=-15)
_raw_deflate = _deflate.compress(_plain) + _deflate.flush()
for _name, _payload, _encoding in (
    ("gzip", gzip.compress(_plain, mtime=0), "gzip"),
    ("deflate", zlib.compress(_plain), "deflate"),
    ("identity", _plain, "identity"),
    ("GZIP in capitals", gzip.compress(_plain, mtime=0), "GZIP"),
    ("empty encoding", _plain, ""),
    ("brotli", _plain, "br"),
    ("two encodings", gzip.compress(_plain, mtime=0), "gzip, identity"),
    ("bare deflate", _raw_deflate, "deflate"),
    ("not gzip at all", _plain, "gzip"),
    ("gzip cut short", gzip.compress(_plain, mtime=0)[:-12], "gzip"),
    ("gzip with rubbish after it", gzip.compress(_plain, mtime=0) + b"xyz", "gzip"),
    ("empty gzip body", b"", "gzip"),
    ("gzip of nothing", gzip.compress(b"", mtime=0), "gzip"),
):
    _add(f"request encoding {_name}", "add_sub", _payload, ("Content-Encoding", _encoding))
_head = json.dumps(body(A_BIN, B_BIN)).encode()
_add(
    "gzip with binary tensors",
    "add_sub",
    gzip.compress(_head + _a + _b, mtime=0),
    ("Content-Encoding", "gzip"),
    ("Inference-Header-Content-Length", str(len(_head))),
)
for _accept in (
    "gzip",
    "deflate",
    "identity",
    "gzip, deflate",
    "deflate, gzip",
    "gzip;q=0.1, deflate;q=0.9",
    "gzip;q=0",
    "*",
    "br",
    "gzip;q=abc",
    "identity;q=0.5, gzip;q=0.5",
    "",
    "GZIP",
    "br, gzip",
    "gzip;q=0.5, identity",
    "gzip ; q=1",
):
    _add(f"accept encoding {_accept!r}", "add_sub", body(A, B), ("Accept-Encoding", _accept))
_add("accept encoding gzip for an error", "add_sub", body(A), ("Accept-Encoding", "gzip"))
_add(
    "accept encoding gzip with binary output",
    "add_sub",
    body(A, B, parameters={"binary_data_output": True}),
    ("Accept-Encoding", "gzip"),
)

# --- models that fail, models that are not there ---
for _kind in range(16):
    _add(f"model error {_kind}", "raises", body(tensor("KIND", [1], "INT32", [_kind]), id="e"))
_add("model error without an id", "raises", body(tensor("KIND", [1], "INT32", [1])))
for _name in (
    "nope",
    "ADD_SUB",
    "add_sub%20",
    "add%5Fsub",
    "..%2Fadd_sub",
    "on_demand",
    "%00",
    "%F0%9F%98%80",
    "%zz",
    "a" * 300,
):
    _add(f"model {_name[:20]}", _name, body(A, B))
for _version in ("2", "0", "01", "-1", "abc", "1.0", "99999999999999999999", "", "1 ", "%31"):
    CASES.append(
        HttpCase(
            f"infer: version {_version!r}",
            "POST",
            f"/v2/models/add_sub/versions/{_version.replace(' ', '%20')}/infer",
            (),
            _plain,
        )
    )
_add("a version the policy leaves out", "multi", body(ONE), version="2")

# --- shared memory, off ---
_add(
    "input from shared memory",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", shared_memory_region="r", shared_memory_byte_size=12)),
)
_add(
    "input from shared memory without a size",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", shared_memory_region="r")),
)
_add(
    "input from shared memory and data",
    "identity_fp32",
    body({**X, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12}}),
)
_add_binary(
    "input from shared memory, binary and data",
    "identity_fp32",
    body({**X, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12, "binary_data_size": 12}}),
    _floats(1, 2, 3),
)
_add(
    "output to shared memory",
    "identity_fp32",
    body(X, outputs=[{"name": "OUT", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12}}]),
)
_add(
    "output to shared memory and binary",
    "identity_fp32",
    body(
        X,
        outputs=[
            {
                "name": "OUT",
                "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12, "binary_data": True},
            }
        ],
    ),
)
