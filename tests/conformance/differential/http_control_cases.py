"""Every HTTP request but inference: health, metadata, config, statistics, repository, and what is no request at all."""

from __future__ import annotations

import base64
import json
from typing import Any

from .wire import HttpCase

CASES: list[HttpCase] = []  # explicit mode, in this order: some change what is loaded
MODE_CASES: list[HttpCase] = []  # model-control-mode=none and =poll, with the model `multi`


def _get(path: str, name: str = "", *headers: tuple[str, str], to: list[HttpCase] = CASES) -> None:
    to.append(HttpCase(name or f"GET {path}", "GET", path, headers))


def _post(path: str, body: Any = b"", name: str = "", *headers: tuple[str, str], to: list[HttpCase] = CASES) -> None:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    shown = payload.decode(errors="replace")[:60]
    to.append(HttpCase(name or f"POST {path} {shown}".strip(), "POST", path, headers, payload))


def _send(method: str, path: str) -> None:
    CASES.append(HttpCase(f"{method} {path}", method, path))


# --- reading ---
for _path in (
    "/v2",
    "/v2/",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/health",
    "/v2/health/live/",
    "/v2/health/live?x=1",
    "/v2/health/nope",
    "/",
    "/v1",
    "/v2/nope",
    "/V2",
    "//v2",
    "/base/v2",
    "/v2/models",
    "/v2/models/",
    "/v2/models/stats/",
    "/metrics",
):
    _get(_path)
for _model in (
    "add_sub",
    "multi",
    "scalar",
    "every_type",
    "classifier",
    "optional",
    "nope",
    "on_demand",
    "broken_code",
    "add%5Fsub",
    "a%2Fb",
):
    for _verb in ("", "/ready", "/config"):
        _get(f"/v2/models/{_model}{_verb}")
for _model in ("nope", "on_demand"):
    _get(f"/v2/models/{_model}/stats")
for _version in ("1", "2", "3", "0", "01", "-1", "x", "1.0", "", "99999999999999999999"):
    for _verb in ("", "/ready", "/config"):
        _get(f"/v2/models/multi/versions/{_version}{_verb}")
_get("/v2/models/multi/versions/2/stats")
_get("/v2/models/multi/versions/7/stats")
_get("/v2/models/multi/versions")
for _verb in (
    "/nope",
    "/infer",
    "/ready/",
    "/config/",
    "/ready/x",
    "/versions/1/ready/",
    "/generate",
    "/trace/setting/x",
):
    _get(f"/v2/models/add_sub{_verb}")
for _method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
    for _path in (
        "/v2",
        "/v2/health/live",
        "/v2/models/add_sub",
        "/v2/models/add_sub/config",
        "/v2/models/add_sub/ready",
        "/v2/nope",
    ):
        _send(_method, _path)
for _method in ("PUT", "DELETE", "HEAD"):
    _send(_method, "/v2/models/add_sub/infer")
CASES.append(HttpCase("an empty target", "GET", ""))
CASES.append(HttpCase("an asterisk as the target", "GET", "*"))
CASES.append(HttpCase("GET with a body", "GET", "/v2/health/live", (("Content-Length", "2"),), b"{}"))
CASES.append(HttpCase("two slashes in a path", "GET", "/v2//health/live"))
CASES.append(HttpCase("dots in a path", "GET", "/v2/models/../health/live"))
CASES.append(HttpCase("absolute form", "GET", "http://localhost/v2/health/live"))
CASES.append(HttpCase("percent-encoded route", "GET", "/v2/health/%6cive"))
_get("/v2", "metadata, accept encoding gzip", ("Accept-Encoding", "gzip"))
_get("/v2/models/add_sub/config", "config, accept encoding gzip", ("Accept-Encoding", "gzip"))

# --- statistics: three requests, one of them refused, and then the counts ---
_ROW = {"shape": [1, 4], "datatype": "INT32", "data": [1, 2, 3, 4]}
_PAIR = {"shape": [2, 4], "datatype": "INT32", "data": [1, 2, 3, 4, 5, 6, 7, 8]}
for _tensor, _outcome in ((_ROW, "answered"), (_PAIR, "answered, two rows"), ({**_ROW, "datatype": "FP32"}, "refused")):
    _inputs = [{"name": "INPUT0", **_tensor}, {"name": "INPUT1", **_tensor}]
    _post("/v2/models/counted/infer", {"inputs": _inputs}, f"a request that is counted: {_outcome}")
_get("/v2/models/counted/stats", "statistics")
_get("/v2/models/counted/versions/1/stats", "statistics of a version")
_get("/v2/models/untouched/stats", "statistics of several versions")

# --- repository ---
for _body in (
    b"",
    {},
    {"ready": True},
    {"ready": False},
    {"ready": 1},
    {"ready": "x"},
    {"ready": None},
    {"other": 1},
    b"[]",
    b"nope",
    b"null",
):
    _post("/v2/repository/index", _body)
_get("/v2/repository/index")
_post("/v2/repository/index/", {})
_post("/v2/repository/index", {}, "index, accept encoding gzip", ("Accept-Encoding", "gzip"))
_post("/v2/repository/some/index", {})
_post("/v2/repository/some/models/add_sub/load")
_post("/v2/repository/some/models/add_sub/unload")
_get("/v2/repository/models/on_demand/load")
for _model in (
    "nope",
    "..",
    "%2e%2e",
    "a%2Fb",
    "..%2Fadd_sub",
    "%20",
    "%00",
    "no_version",
    "bad_config",
    "other_name",
    "add_sub%20",
):
    _post(f"/v2/repository/models/{_model}/load")
_post("/v2/repository/models//load")
for _model in ("nope", "..%2Fadd_sub", "on_demand"):
    _post(f"/v2/repository/models/{_model}/unload", b"", f"unload {_model}, never loaded")
for _body in (
    b"nope",
    b"[]",
    b"null",
    {"parameters": 1},
    {"parameters": []},
    {"parameters": {"nope": 1}},
    {"parameters": {"config": 1}},
    {"parameters": {"config": "nope"}},
    {"parameters": {"file:1/model.py": base64.b64encode(b"x").decode()}},
):
    _post("/v2/repository/models/on_demand/load", _body)
_get("/v2/models/on_demand/ready", "on_demand is ready, or not, after those")
_post("/v2/repository/models/on_demand/load", b"", "load on_demand")
_get("/v2/models/on_demand/ready", "on_demand is ready")
_get("/v2/models/on_demand", "on_demand's metadata: the newest version only")
_post(
    "/v2/models/on_demand/infer",
    {"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [0]}]},
    "on_demand answers",
)
_post(
    "/v2/models/on_demand/versions/1/infer",
    {"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [0]}]},
    "on_demand version 1 is not served",
)
_post("/v2/repository/models/on_demand/load", {}, "load on_demand again")
_post("/v2/repository/index", {}, "index with on_demand")
for _body in (b"nope", {"parameters": {"unload_dependents": "x"}}, {"parameters": {"nope": 1}}):
    _post("/v2/repository/models/on_demand/unload", _body)
_post("/v2/repository/models/on_demand/unload", {"parameters": {"unload_dependents": False}}, "unload on_demand")
_post("/v2/repository/models/multi/unload", b"", "unload multi")
_get("/v2/models/multi/ready", "multi is not ready once unloaded")
_post(
    "/v2/models/multi/infer",
    {"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [0]}]},
    "multi does not answer once unloaded",
)
_get("/v2/models/multi", "multi's metadata once unloaded")
_get("/v2/models/multi/config", "multi's config once unloaded")
_get("/v2/models/multi/stats", "multi's statistics once unloaded")
_get("/v2/models/multi/versions/1/stats", "multi's statistics of a version once unloaded")
_post("/v2/repository/models/multi/load", b"", "load multi again")
_get("/v2/models/multi/ready", "multi is ready again")
_post("/v2/repository/models/broken_code/load", b"", "load a model whose code fails")
_get("/v2/models/broken_code/ready", "a model that failed to load is not ready")
_post("/v2/models/broken_code/infer", {"inputs": []}, "a model that failed to load does not answer")
_get("/v2/health/ready", "the server's readiness after a load failed")
_post("/v2/repository/models/broken_code/unload", b"", "unload a model that failed to load")
_get("/v2/health/ready", "the server's readiness after that")

# --- what other extensions offer ---
for _path in ("/v2/logging", "/v2/trace/setting", "/v2/models/add_sub/trace/setting", "/v2/models/nope/trace/setting"):
    _get(_path)
_post("/v2/logging", {"log_verbose_level": 0})
_post("/v2/trace/setting", {})
for _kind in ("system", "cuda"):
    _get(f"/v2/{_kind}sharedmemory/status")
    _get(f"/v2/{_kind}sharedmemory/region/nope/status")
    _post(f"/v2/{_kind}sharedmemory/region/nope/unregister")
    _post(f"/v2/{_kind}sharedmemory/unregister")
_post("/v2/systemsharedmemory/region/r/register", {"key": "/nope", "offset": 0, "byte_size": 4})
_post("/v2/cudasharedmemory/region/r/register", {"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": 4})
for _verb in ("generate", "generate_stream"):
    _post(f"/v2/models/identity_fp32/{_verb}", {"IN": [1.5]})

# --- bytes that are hardly HTTP ---
_UNLOAD = b"POST /v2/repository/models/nope/unload HTTP/1.1\r\nHost: x\r\n"
for _name, _raw in (
    ("no host header", b"GET /v2/health/live HTTP/1.1\r\n\r\n"),
    ("HTTP/1.0", b"GET /v2/health/live HTTP/1.0\r\n\r\n"),
    ("HTTP/2.0 in the request line", b"GET /v2/health/live HTTP/2.0\r\nHost: x\r\n\r\n"),
    ("HTTP/0.9", b"GET /v2/health/live\r\n\r\n"),
    ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    ("unknown method", b"BREW /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("lower-case method", b"get /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("header without a colon", b"GET /v2/health/live HTTP/1.1\r\nHost x\r\n\r\n"),
    ("space before the colon", b"GET /v2/health/live HTTP/1.1\r\nHost : x\r\n\r\n"),
    ("bare line feeds", b"GET /v2/health/live HTTP/1.1\nHost: x\n\n"),
    (
        "content-length of letters",
        _UNLOAD + b"Content-Length: ab\r\n\r\n",
    ),
    (
        "negative content-length",
        _UNLOAD + b"Content-Length: -1\r\n\r\n",
    ),
    (
        "two content-lengths that differ",
        _UNLOAD + b"Content-Length: 0\r\nContent-Length: 2\r\n\r\n{}",
    ),
    (
        "content-length and chunked",
        _UNLOAD + b"Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ),
    (
        "a chunk size of letters",
        _UNLOAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    ),
    (
        "an unknown transfer-encoding",
        _UNLOAD + b"Transfer-Encoding: brew\r\n\r\n",
    ),
    ("POST without a length", _UNLOAD + b"\r\n"),
    ("a header of 70 kB", b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"),
    (
        "300 headers",
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(300)) + b"\r\n",
    ),
    ("a path of 9 kB", b"GET /v2/models/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("connection: close", b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
):
    CASES.append(HttpCase(f"wire: {_name}", "GET", "", raw=_raw))
CASES.append(
    HttpCase(
        "wire: content-length beyond the limit",
        "POST",
        "/v2/models/add_sub/infer",
        (("Content-Length", str(65 * 1024 * 1024)),),
        b"{}",
    )
)

# --- the other control modes ---
_get("/v2/health/ready", to=MODE_CASES)
_post("/v2/repository/index", {}, to=MODE_CASES)
for _model in ("multi", "nope"):
    for _verb in ("load", "unload"):
        _post(f"/v2/repository/models/{_model}/{_verb}", to=MODE_CASES)
_get("/v2/models/multi", to=MODE_CASES)
