"""POST …/infer: the binary extension, raw tensors, compression, shared memory. Knows no server."""

from __future__ import annotations

import gzip
import json
import struct
import zlib

from .http_request import PLAIN, SUM, A, B, InferCases, X, body, floats, ints, strings, tensor

_table = InferCases()

# --- the binary extension ---
A_BIN = tensor("INPUT0", [1, 4], "INT32", binary_data_size=16)
B_BIN = tensor("INPUT1", [1, 4], "INT32", binary_data_size=16)
_a, _b = ints(1, 2, 3, 4), ints(10, 20, 30, 40)
_table.add_binary("both inputs in binary", "add_sub", body(A_BIN, B_BIN), _a, _b)
_table.add_binary("one in binary, one in JSON", "add_sub", body(A, B_BIN), _b)
_table.add_binary(
    "one in JSON, one in binary, asked back in binary",
    "add_sub",
    body(A_BIN, B, outputs=[{"name": "OUTPUT1", "parameters": {"binary_data": True}}, SUM]),
    _a,
)
_table.add_binary(
    "everything in binary", "add_sub", body(A_BIN, B_BIN, parameters={"binary_data_output": True}), _a, _b
)
_table.add_binary(
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
_table.add(
    "JSON in, binary out, no header",
    "add_sub",
    body(A, B, outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}]),
)
_table.add_binary("JSON in, header given", "add_sub", body(A, B))
_table.add_binary("too few bytes", "add_sub", body(A_BIN, B_BIN), _a, _b[:-1])
_table.add_binary("too many bytes", "add_sub", body(A_BIN, B_BIN), _a, _b, b"x")
_table.add_binary("no bytes", "add_sub", body(A_BIN, B_BIN))
_table.add_binary(
    "size smaller than the shape",
    "add_sub",
    body({**A_BIN, "parameters": {"binary_data_size": 12}}, B_BIN),
    _a[:12],
    _b,
)
_table.add_binary(
    "size larger than the shape",
    "add_sub",
    body({**A_BIN, "parameters": {"binary_data_size": 20}}, B_BIN),
    _a + b"xxxx",
    _b,
)
_table.add_binary("size and data", "add_sub", body({**A, "parameters": {"binary_data_size": 16}}, B_BIN), _a, _b)
for _size in (0, -1, "16", 1.5, True, None, 2**63, 2**64):
    _table.add_binary(
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
    _table.add(f"header length {_shown!r}", "add_sub", _json + _a + _b, ("Inference-Header-Content-Length", _length))
for _flag in (1, "true", None, [], 0):
    _table.add(
        f"binary_data {_flag!r}",
        "add_sub",
        body(A, B, outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": _flag}}]),
    )
_table.add_binary(
    "BYTES in binary",
    "identity_bytes",
    body(tensor("IN", [1, 3], "BYTES", binary_data_size=15)),
    strings(b"abc", b"", b""),
)
_table.add_binary(
    "BYTES with any bytes, answered in binary",
    "identity_bytes",
    body(
        tensor("IN", [1, 2], "BYTES", binary_data_size=12),
        outputs=[{"name": "OUT", "parameters": {"binary_data": True}}],
    ),
    strings(b"\xff\x00", b"\x80\x81"),
)
_table.add_binary(
    "BYTES that are not UTF-8, answered in JSON",
    "identity_bytes",
    body(tensor("IN", [1, 2], "BYTES", binary_data_size=12)),
    strings(b"\xff\x00", b"\x80\x81"),
)
_table.add_binary(
    "BYTES too few elements",
    "identity_bytes",
    body(tensor("IN", [1, 3], "BYTES", binary_data_size=8)),
    strings(b"", b""),
)
_table.add_binary(
    "BYTES too many elements",
    "identity_bytes",
    body(tensor("IN", [1, 1], "BYTES", binary_data_size=8)),
    strings(b"", b""),
)
_table.add_binary(
    "BYTES with a length past the end",
    "identity_bytes",
    body(tensor("IN", [1, 1], "BYTES", binary_data_size=8)),
    struct.pack("<I", 100) + b"abcd",
)
_table.add_binary(
    "BYTES with half a length",
    "identity_bytes",
    body(tensor("IN", [1, 2], "BYTES", binary_data_size=6)),
    struct.pack("<I", 0) + b"ab",
)
_table.add_binary(
    "BYTES with a huge length",
    "identity_bytes",
    body(tensor("IN", [1, 1], "BYTES", binary_data_size=5)),
    b"\xff\xff\xff\xffa",
)
_table.add_binary(
    "BOOL bytes other than 0 and 1",
    "every_type",
    body(tensor("IN_BOOL", [2], "BOOL", binary_data_size=2), outputs=[{"name": "OUT_BOOL"}]),
    b"\x02\xff",
)
_table.add_binary(
    "BF16 in binary",
    "every_type",
    body(tensor("IN_BF16", [1], "BF16", binary_data_size=2), outputs=[{"name": "OUT_FP32"}]),
    b"\x80\x3f",
)

# --- one raw tensor ---
RAW = (("Inference-Header-Content-Length", "0"),)
_table.add("raw tensor", "identity_fp32", floats(1, 2, 3), *RAW)
_table.add("raw tensor, empty", "identity_fp32", b"", *RAW)
_table.add("raw tensor of an odd size", "identity_fp32", b"12345", *RAW)
_table.add("raw tensor for two inputs", "add_sub", _a, *RAW)
_table.add("raw tensor of fixed shape", "matrix", struct.pack("<6d", 1, 2, 3, 4, 5, 6), *RAW)
_table.add("raw tensor of fixed shape, too short", "matrix", struct.pack("<5d", 1, 2, 3, 4, 5), *RAW)
_table.add("raw tensor of BYTES", "identity_bytes", b"hello", *RAW)
_table.add("raw tensor of a batching model", "classifier", floats(1, 2, 3, 4, 5), *RAW)
_table.add(
    "raw tensor with content type",
    "identity_fp32",
    floats(1, 2, 3),
    *RAW,
    ("Content-Type", "application/octet-stream"),
)
_table.add("raw tensor for optional inputs", "optional", ints(1, 2), *RAW)
_table.add("raw scalar", "scalar", struct.pack("<q", 9), *RAW)

# --- compression ---
_deflate = zlib.compressobj(wbits=-15)
_raw_deflate = _deflate.compress(PLAIN) + _deflate.flush()
for _name, _payload, _encoding in (
    ("gzip", gzip.compress(PLAIN, mtime=0), "gzip"),
    ("deflate", zlib.compress(PLAIN), "deflate"),
    ("identity", PLAIN, "identity"),
    ("GZIP in capitals", gzip.compress(PLAIN, mtime=0), "GZIP"),
    ("empty encoding", PLAIN, ""),
    ("brotli", PLAIN, "br"),
    ("two encodings", gzip.compress(PLAIN, mtime=0), "gzip, identity"),
    ("bare deflate", _raw_deflate, "deflate"),
    ("not gzip at all", PLAIN, "gzip"),
    ("gzip cut short", gzip.compress(PLAIN, mtime=0)[:-12], "gzip"),
    ("gzip with rubbish after it", gzip.compress(PLAIN, mtime=0) + b"xyz", "gzip"),
    ("empty gzip body", b"", "gzip"),
    ("gzip of nothing", gzip.compress(b"", mtime=0), "gzip"),
):
    _table.add(f"request encoding {_name}", "add_sub", _payload, ("Content-Encoding", _encoding))
_head = json.dumps(body(A_BIN, B_BIN)).encode()
_table.add(
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
    _table.add(f"accept encoding {_accept!r}", "add_sub", body(A, B), ("Accept-Encoding", _accept))
_table.add("accept encoding gzip for an error", "add_sub", body(A), ("Accept-Encoding", "gzip"))
_table.add(
    "accept encoding gzip with binary output",
    "add_sub",
    body(A, B, parameters={"binary_data_output": True}),
    ("Accept-Encoding", "gzip"),
)

# --- shared memory, off ---
_table.add(
    "input from shared memory",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", shared_memory_region="r", shared_memory_byte_size=12)),
)
_table.add(
    "input from shared memory without a size",
    "identity_fp32",
    body(tensor("IN", [3], "FP32", shared_memory_region="r")),
)
_table.add(
    "input from shared memory and data",
    "identity_fp32",
    body({**X, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12}}),
)
_table.add_binary(
    "input from shared memory, binary and data",
    "identity_fp32",
    body({**X, "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12, "binary_data_size": 12}}),
    floats(1, 2, 3),
)
_table.add(
    "output to shared memory",
    "identity_fp32",
    body(X, outputs=[{"name": "OUT", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12}}]),
)
_table.add(
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

CASES = tuple(_table.cases)
