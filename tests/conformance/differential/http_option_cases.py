"""POST …/infer: bodies that are no request, ids, parameters and classification. Knows no server."""

from __future__ import annotations

import json
from typing import Any

from .http_request import JSON_DATA, ONE, A, B, InferCases, Json, body, tensor

NESTED = 120  # deeper than any server should follow
_table = InferCases()

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
    _table.add(f"body {_name}", "add_sub", _text)
for _id in (1, 1.5, True, None, [], {}, "x" * 300):
    _table.add(f"id {repr(_id)[:20]}", "add_sub", body(A, B, id=_id))

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
    _table.add(f"parameters {_name}", "params", body(ONE, parameters=_parameters))
for _value in (None, [], "x", 1, [{"a": 1}]):
    _table.add(f"parameters {_value!r}", "params", {**body(ONE), "parameters": _value})
_table.add("id reaches the model", "params", body(ONE, id="seven"))

# --- classification ---
SCORES = tensor("SCORES", [2, 5], "FP32", [0.1, 0.5, 0.25, -1, 3, 9, 8, 7, 6, 5.5])


def _classes(output: str, **parameters: Any) -> Json:
    return body(SCORES, outputs=[{"name": output, "parameters": parameters}])


for _n in (1, 2, 5, 6, 1000000, 1000001, 0, -1, 2**32, "2", 1.5, True, None):
    _table.add(f"classification {_n!r}", "classifier", _classes("PROB", classification=_n))
_table.add("classification without labels", "classifier", _classes("RANK", classification=2))
_table.add("classification of BYTES", "classifier", _classes("NAME", classification=2))
_table.add("classification in binary", "classifier", _classes("PROB", classification=2, binary_data=True))
_table.add(
    "classification and shared memory",
    "classifier",
    _classes("PROB", classification=2, shared_memory_region="r", shared_memory_byte_size=8),
)
_table.add(
    "classification beside a plain output",
    "classifier",
    body(SCORES, outputs=[{"name": "PROB", "parameters": {"classification": 1}}, {"name": "RANK"}]),
)
_table.add(
    "classification of equal scores",
    "classifier",
    body(
        tensor("SCORES", [1, 5], "FP32", [1, 1, 1, 1, 1]),
        outputs=[{"name": "PROB", "parameters": {"classification": 3}}],
    ),
)
_table.add(
    "classification with no batch dimension",
    "matrix",
    body(
        tensor("IN", [2, 3], "FP64", [1, 2, 3, 4, 5, 6]), outputs=[{"name": "OUT", "parameters": {"classification": 4}}]
    ),
)
for _type in ("UINT8", "UINT64", "INT8", "INT64", "FP64", "BOOL", "FP32"):
    _table.add(
        f"classification of {_type}",
        "every_type",
        body(
            tensor(f"IN_{_type}", [2], _type, JSON_DATA[_type]),
            outputs=[{"name": f"OUT_{_type}", "parameters": {"classification": 2}}],
        ),
    )
_table.add_binary(
    "classification of FP16",
    "every_type",
    body(
        tensor("IN_FP16", [2], "FP16", binary_data_size=4),
        outputs=[{"name": "OUT_FP16", "parameters": {"classification": 2}}],
    ),
    b"\x00\x3c\x00\x40",
)
_table.add(
    "classification of nothing",
    "identity_fp32",
    body(tensor("IN", [0], "FP32", []), outputs=[{"name": "OUT", "parameters": {"classification": 2}}]),
)


CASES = tuple(_table.cases)
