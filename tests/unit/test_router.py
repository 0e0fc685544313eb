"""Routing is a table: method and raw path in, endpoint and decoded parameters out."""

from __future__ import annotations

from typing import Any

import pytest

from doorstep.wire.compression import IDENTITY_ONLY
from doorstep.wire.router import Router

INFER = "/v2/models/{name}/infer"
VERSION_INFER = "/v2/models/{name}/versions/{version}/infer"


def endpoint(exchange: Any) -> None: ...


def other(exchange: Any) -> None: ...


class Recorder:
    """Stands where an exchange would: keeps the answer."""

    answer: tuple[int, dict[bytes, bytes], bytes] | None = None

    def respond(self, status: int, headers: Any, *body: bytes) -> None:
        self.answer = (status, dict(headers), b"".join(body))


@pytest.fixture
def router() -> Router:
    router = Router()
    router.add("GET", "/v2", endpoint)
    router.add("GET", "/v2/models/{name}", endpoint)
    router.add("GET", "/v2/models/stats", other)
    router.add("POST", INFER, endpoint)
    router.add("POST", VERSION_INFER, endpoint)
    router.add("GET", "/v2/logging", endpoint)
    router.add("POST", "/v2/logging", other)
    return router


def answer(router: Router, method: str, path: str) -> tuple[int, dict[bytes, bytes], bytes]:
    recorder = Recorder()
    router.find(method, path).endpoint(recorder)  # type: ignore[arg-type]
    assert recorder.answer is not None
    return recorder.answer


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v2/models/resnet/infer", "resnet"),
        ("/v2/models/a%20b/infer", "a b"),
        ("/v2/models/%E2%82%AC/infer", "€"),
        ("/v2/models/..%2F..%2Fetc/infer", "../../etc"),
        ("/v2/models/%2e%2e/infer", ".."),
        ("/v2/models/../infer", ".."),
        ("/v2/models/a%2fversions%2f1/infer", "a/versions/1"),
        ("/v2/models/%/infer", "%"),
        ("/v2/models/%zz/infer", "%zz"),
        ("/v2/models/%FF/infer", "\ufffd"),
        ("/v2/models/%00/infer", "\0"),
        ("/v2/models/a+b/infer", "a+b"),
        ("/v2/models/a;b=c/infer", "a;b=c"),
    ],
)
def test_a_name_is_one_segment_decoded_after_matching(router: Router, path: str, name: str) -> None:
    match = router.find("POST", path)
    assert match.route == INFER
    assert match.params == {"name": name}


def test_versions_are_digits(router: Router) -> None:
    assert router.find("POST", "/v2/models/m/versions/12/infer").params == {"name": "m", "version": "12"}
    for version in ("", "a", "1a", "-1", "1.0", "%31", "\uff11", "1/2"):
        assert router.find("POST", f"/v2/models/m/versions/{version}/infer").route == ""


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/v2/", "/V2", "/v2x", "//v2", "/v2//", "/v2/models", "/v2/models/", "/v2/models//infer",
        "/v2/models/m/infer/", "/v2/models/m/infer/x", "/v2/models/m/INFER", "/v2/models/m/infer%20",
        "/v2/models/m/%69nfer", "/v2/%6dodels/m/infer", "/base/v2", "/v2/models/a/b/infer",
        "/v2/models/m/infer\n", "/v2/./models/m/infer", "/v2/models/x/../m/infer",
    ],
)  # fmt: skip
def test_any_other_spelling_of_a_path_is_not_found(router: Router, path: str) -> None:
    assert router.find("POST", path).route == ""
    assert answer(router, "POST", path) == (404, {b"content-type": b"application/json"}, b'{"error":"Not Found"}')


def test_a_fixed_path_comes_before_a_pattern(router: Router) -> None:
    assert router.find("GET", "/v2/models/stats").endpoint is other
    assert router.find("GET", "/v2/models/status").endpoint is endpoint


def test_the_wrong_method_is_not_allowed_and_the_right_ones_are_named(router: Router) -> None:
    status, headers, body = answer(router, "DELETE", "/v2/logging")
    assert (status, body) == (405, b'{"error":"Method Not Allowed"}')
    assert headers[b"allow"] == b"GET, POST"
    assert answer(router, "GET", "/v2/models/m/infer")[0] == 405


def test_head_is_answered_by_the_endpoint_of_get(router: Router) -> None:
    assert router.find("HEAD", "/v2").endpoint is endpoint
    assert answer(router, "HEAD", "/v2/models/m/infer")[0] == 405


def test_matches_are_remembered_and_misses_are_not(router: Router) -> None:
    assert router.find("POST", "/v2/models/m/infer") is router.find("POST", "/v2/models/m/infer")
    assert router.find("POST", "/v2/none") is not router.find("POST", "/v2/none")


def test_the_memory_of_matches_is_bounded(router: Router) -> None:
    for number in range(10_000):
        router.find("GET", f"/v2/models/m{number}")
    assert len(router._cache) <= 4096
    router._cache.clear()
    router.find("GET", "/v2/models/" + "x" * 10_000)
    assert not router._cache


def test_a_second_endpoint_for_a_method_and_pattern_is_a_mistake(router: Router) -> None:
    with pytest.raises(ValueError, match="has an endpoint already"):
        router.add("GET", "/v2", other)


def test_a_route_says_how_its_body_is_taken(router: Router) -> None:
    router.add("POST", "/stream", endpoint, streaming=True)
    router.add("POST", "/plain", endpoint, codings=IDENTITY_ONLY)
    assert router.find("POST", "/stream").streaming
    assert not router.find("POST", "/plain").streaming
    assert router.find("POST", "/plain").codings is IDENTITY_ONLY


def test_the_fallback_can_be_replaced() -> None:
    router = Router()

    def empty(status: int, allowed: tuple[str, ...], exchange: Any) -> None:
        exchange.respond(200, ())

    router.fallback = empty  # type: ignore[method-assign]
    assert answer(router, "GET", "/anything") == (200, {}, b"")
