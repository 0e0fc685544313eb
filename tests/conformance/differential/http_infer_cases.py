"""POST …/infer in JSON: inputs, outputs, data types, shapes and models, right and wrong. Knows no server."""

from __future__ import annotations

import json

from .http_request import DIFFERENCE, JSON_DATA, ONE, PLAIN, SUM, A, B, InferCases, X, body, floats, tensor
from .wire import HttpCase

BIG = 2**62
_table = InferCases()

# --- answers ---
_table.add("two inputs", "add_sub", body(A, B))
_table.add("inputs in the other order", "add_sub", body(B, A))
_table.add("nested data", "add_sub", body({**A, "data": [[1, 2, 3, 4]]}, B))
_table.add("oddly nested data", "add_sub", body({**A, "data": [[[1], [2]], 3, [4]]}, B))
_table.add(
    "a batch",
    "add_sub",
    body(tensor("INPUT0", [2, 4], "INT32", list(range(8))), tensor("INPUT1", [2, 4], "INT32", [1] * 8)),
)
_table.add("with a version", "add_sub", body(A, B), version="1")
_table.add("one output asked for", "add_sub", body(A, B, outputs=[DIFFERENCE]))
_table.add("outputs in the other order", "add_sub", body(A, B, outputs=[DIFFERENCE, SUM]))
_table.add("no outputs listed", "add_sub", body(A, B, outputs=[]))
_table.add("with an id", "add_sub", body(A, B, id="abc"))
_table.add("with an empty id", "add_sub", body(A, B, id=""))
_table.add("with a unicode id", "add_sub", body(A, B, id="é☃"))
_table.add("whitespace around the JSON", "add_sub", b"  \n" + json.dumps(body(A, B)).encode() + b"\r\n ")
_table.add("unknown fields", "add_sub", body({**A, "more": 1}, B, unknown={"x": [1]}))
_table.add("other content type", "add_sub", body(A, B), ("Content-Type", "text/plain"))
_table.add("form content type", "add_sub", body(A, B), ("Content-Type", "application/x-www-form-urlencoded"))
_table.cases.append(
    HttpCase("infer: with a query string", "POST", "/v2/models/add_sub/infer?x=1", (), json.dumps(body(A, B)).encode())
)
_table.add("chunked", "add_sub", b"", chunks=(PLAIN[:20], PLAIN[20:]))
_table.add("expect 100-continue", "add_sub", body(A, B), ("Expect", "100-continue"))
_table.add(
    "HTTP/1.0",
    "add_sub",
    b"",
    raw=b"POST /v2/models/add_sub/infer HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(json.dumps(body(A, B)))
    + json.dumps(body(A, B)).encode(),
)
_table.add("scalar shape", "scalar", body(tensor("IN", [2, 1], "INT64", [5, 6])))
_table.add("scalar shape without its dimension", "scalar", body(tensor("IN", [2], "INT64", [5, 6])))
_table.add("fixed shape", "matrix", body(tensor("IN", [2, 3], "FP64", [[1, 2, 3], [4, 5, 6.5]])))
_table.add(
    "optional input given", "optional", body(tensor("A", [2], "INT32", [1, 2]), tensor("B", [2], "INT32", [3, 4]))
)
_table.add("optional input left out", "optional", body(tensor("A", [2], "INT32", [1, 2])))
_table.add("required input left out", "optional", body(tensor("B", [2], "INT32", [1, 2])))
_table.add(
    "optional model with an unknown input",
    "optional",
    body(tensor("A", [2], "INT32", [1, 2]), tensor("C", [2], "INT32", [1, 2])),
)
_table.add("optional model with too many inputs", "optional", body(*(tensor(n, [1], "INT32", [1]) for n in "ABC")))
for _version in ("1", "3"):
    _table.add(f"version {_version} of several", "multi", body(ONE), version=_version)
_table.add("newest of several versions", "multi", body(ONE))

# --- data types ---
for _name, _data in JSON_DATA.items():
    _table.add(
        f"{_name} as JSON",
        "every_type",
        body(tensor(f"IN_{_name}", [2], _name, _data), outputs=[{"name": f"OUT_{_name}"}]),
    )
    _table.add(
        f"{_name} as JSON, answered in binary",
        "every_type",
        body(
            tensor(f"IN_{_name}", [2], _name, _data),
            outputs=[{"name": f"OUT_{_name}", "parameters": {"binary_data": True}}],
        ),
    )
_table.add(
    "BYTES as JSON",
    "every_type",
    body(tensor("IN_STRING", [4], "BYTES", ["", "é☃", 'quote " and \\', "\n\t\x00"]), outputs=[{"name": "OUT_STRING"}]),
)
for _name in ("FP16", "BF16"):
    _table.add(
        f"{_name} as JSON",
        "every_type",
        body(tensor(f"IN_{_name}", [2], _name, [1.0, 2.0]), outputs=[{"name": "OUT_FP32"}]),
    )
_table.add_binary(
    "FP16 in binary, answered in JSON",
    "every_type",
    body(tensor("IN_FP16", [2], "FP16", binary_data_size=4), outputs=[{"name": "OUT_FP16"}]),
    b"\x00\x3c\x00\x40",
)
_table.add_binary(
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
    _table.add(f"{_name} from {_literal}", "every_type", _text.replace('"data": [0]', f'"data": [{_literal}]').encode())
for _literal in ("NaN", "Infinity", "-Infinity", "nan", "inf"):
    _table.add(f"the literal {_literal}", "identity_fp32", json.dumps(body(X)).replace("-1.5", _literal).encode())
_table.add_binary(
    "NaN and infinities in binary, answered in JSON",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", binary_data_size=12)),
    floats(float("nan"), float("inf"), float("-inf")),
)
_table.add_binary(
    "NaN and infinities in binary, answered in binary",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", binary_data_size=12), parameters={"binary_data_output": True}),
    floats(float("nan"), float("inf"), float("-inf")),
)
_table.add(
    "negative zero and tiny numbers",
    "identity_fp32",
    json.dumps(body(X)).replace("-1.5", "-0.0").replace("2.0", "1e-45").encode(),
)
_table.add(
    "numbers needing all digits", "identity_fp32", body(tensor("IN", [4], "FP32", [0.1, 16777217, 1e10, 123456.789]))
)
_table.add(
    "FP64 needing all digits",
    "matrix",
    body(tensor("IN", [2, 3], "FP64", [0.1, 1 / 3, 1e22, 1e-7, 123456789.123456789, 5e-324])),
)

# --- datatypes, names and shapes that do not fit ---
for _type in ("FP64", "fp32", "FLOAT", "", "INT4", "STRING", "TYPE_FP32", 7, None, ["FP32"]):
    _table.add(f"datatype {_type!r} for FP32", "identity_fp32", body({**X, "datatype": _type}))
_table.add("no datatype", "identity_fp32", body({k: v for k, v in X.items() if k != "datatype"}))
_table.add("no name", "identity_fp32", body({k: v for k, v in X.items() if k != "name"}))
_table.add("no shape", "identity_fp32", body({k: v for k, v in X.items() if k != "shape"}))
_table.add("no data", "identity_fp32", body({k: v for k, v in X.items() if k != "data"}))
for _name in (1, None, "", "in", "IN ", "nope"):
    _table.add(f"input name {_name!r}", "identity_fp32", body({**X, "name": _name}))
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
    _table.add(f"shape {repr(_shape)[:60]}", "identity_fp32", body({**X, "shape": _shape}))
for _shape in ([2, 3], [3, 2], [6], [2, 3, 1], [1, 2, 3], []):
    _table.add(f"shape {_shape} for [2,3]", "matrix", body(tensor("IN", _shape, "FP64", [1, 2, 3, 4, 5, 6])))
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
    _table.add(
        f"shape {_shape} for a batch of [4]",
        "add_sub",
        body(tensor("INPUT0", _shape, "INT32", _values), tensor("INPUT1", _shape, "INT32", _values)),
    )
_table.add("batches that differ", "add_sub", body(A, tensor("INPUT1", [2, 4], "INT32", [1] * 8)))
_table.add(
    "the largest batch",
    "add_sub",
    body(tensor("INPUT0", [8, 4], "INT32", [1] * 32), tensor("INPUT1", [8, 4], "INT32", [2] * 32)),
)
_table.add("data longer than the shape", "identity_fp32", body({**X, "data": [1, 2, 3, 4]}))
_table.add("data shorter than the shape", "identity_fp32", body({**X, "data": [1, 2]}))
_table.add("empty data", "identity_fp32", body({**X, "data": []}))
for _data in (1, "abc", {}, True, None, [[1, 2], [3]], [[]], [None, None, None], [[1], [2], "x"]):
    _table.add(
        f"data {_data!r}", "identity_fp32", json.dumps(body(X)).replace("[0.5, -1.5, 2.0]", json.dumps(_data)).encode()
    )
_table.add("zero elements", "identity_fp32", body(tensor("IN", [0], "FP32", [])))
_table.add("zero elements of BYTES", "identity_bytes", body(tensor("IN", [1, 0], "BYTES", [])))
_table.add_binary("zero elements in binary", "identity_fp32", body(tensor("IN", [0], "FP32", binary_data_size=0)))
_table.add_binary(
    "zero elements in binary, answered in binary",
    "identity_fp32",
    body(tensor("IN", [0], "FP32", binary_data_size=0), parameters={"binary_data_output": True}),
)

# --- inputs and outputs that do not fit ---
_table.add("a missing input", "add_sub", body(A))
_table.add("an extra input", "add_sub", body(A, B, tensor("INPUT2", [1, 4], "INT32", [1] * 4)))
_table.add("an unknown input", "add_sub", body(A, tensor("INPUT2", [1, 4], "INT32", [1] * 4)))
_table.add("the same input twice", "add_sub", body(A, A))
_table.add("the same input twice and the other", "add_sub", body(A, A, B))
_table.add("no inputs", "add_sub", body())
_table.add("inputs left out", "add_sub", {"id": "1"})
for _value in (None, {}, "x", 3, [1], ["x"], [None], [[]]):
    _table.add(f"inputs {_value!r}", "add_sub", {"inputs": _value})
_table.add("an unknown output", "add_sub", body(A, B, outputs=[{"name": "NOPE"}]))
_table.add("a known and an unknown output", "add_sub", body(A, B, outputs=[SUM, {"name": "NOPE"}]))
_table.add("the same output twice", "add_sub", body(A, B, outputs=[SUM, SUM]))
for _value in (None, {}, "x", 3, [1], [{}], [None], [{"name": 3}], [{"name": ""}]):
    _table.add(
        f"outputs {_value!r}",
        "add_sub",
        body(A, B, outputs=_value) if _value is not None else {**body(A, B), "outputs": None},
    )
_table.add(
    "output with unknown parameters",
    "add_sub",
    body(A, B, outputs=[{"name": "OUTPUT0", "parameters": {"colour": "red"}}]),
)
_table.add("output parameters not an object", "add_sub", body(A, B, outputs=[{"name": "OUTPUT0", "parameters": [1]}]))
_table.add("input parameters not an object", "add_sub", body({**A, "parameters": [1]}, B))
_table.add("input with unknown parameters", "add_sub", body({**A, "parameters": {"colour": "red", "n": 1}}, B))

# --- models that fail, models that are not there ---
for _kind in range(16):
    _table.add(f"model error {_kind}", "raises", body(tensor("KIND", [1], "INT32", [_kind]), id="e"))
_table.add("model error without an id", "raises", body(tensor("KIND", [1], "INT32", [1])))
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
    _table.add(f"model {_name[:20]}", _name, body(A, B))
for _version in ("2", "0", "01", "-1", "abc", "1.0", "99999999999999999999", "", "1 ", "%31"):
    _table.cases.append(
        HttpCase(
            f"infer: version {_version!r}",
            "POST",
            f"/v2/models/add_sub/versions/{_version.replace(' ', '%20')}/infer",
            (),
            PLAIN,
        )
    )
_table.add("a version the policy leaves out", "multi", body(ONE), version="2")


CASES = tuple(_table.cases)
