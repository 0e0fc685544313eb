"""/metrics and the access log over real connections: requests, curl over HTTP/1.1 and HTTP/2, a gRPC-less listener."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import requests
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from doorstep import proto
from doorstep.observability.access import AccessLine, access_hook
from doorstep.observability.logging import ACCESS_LOGGER
from doorstep.observability.metrics import MetricsEndpoint
from doorstep.repository.base import IndexEntry
from doorstep.stats import ModelStatistics
from doorstep.testing.wire import WireServer
from doorstep.wire.router import Router


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[AccessLine] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.msg, AccessLine)
        self.lines.append(record.msg)


@pytest.fixture
def server() -> Iterator[WireServer]:
    model = SimpleNamespace(
        name="resnet", version="1", config=SimpleNamespace(proto=proto.ModelConfig()), stats=ModelStatistics(),
        scheduler=SimpleNamespace(queued_count=0), inflight_count=0, saturation=0.0,
    )  # fmt: skip
    model.stats.record_batch(2, 1, 1, 1)
    router = Router()
    with WireServer(router) as server:
        index = [IndexEntry("resnet", "1", "READY", "")]
        MetricsEndpoint(lambda: [model], [server.context], lambda: index).register(router)
        yield server


@pytest.fixture
def access(server: WireServer) -> Iterator[list[AccessLine]]:
    handler = Lines()
    logger = logging.getLogger(ACCESS_LOGGER)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    server.context.on_access = access_hook()
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_scrape_without_wishes_gets_the_text_format(server: WireServer) -> None:
    response = requests.get(f"{server.url}/metrics", timeout=20)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert {"nv_inference_exec_count", "doorstep_batch_size", "process_cpu_seconds"} <= names
    assert 'nv_inference_count{model="resnet",version="1"} 2.0\n' in response.text
    assert 'doorstep_connections{listener="http"} 1.0\n' in response.text


def test_prometheus_own_wishes_are_met(server: WireServer) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    headers = {"accept": accept, "accept-encoding": "gzip"}
    response = requests.get(f"{server.url}/metrics", headers=headers, timeout=20)
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.headers["content-encoding"] == "gzip"
    assert list(openmetrics.text_string_to_metric_families(response.text))


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_an_answer_is_one_access_line(server: WireServer, access: list[AccessLine], version: str) -> None:
    got = subprocess.run(
        ["curl", "-sS", version, "-H", "x-request-id: from-curl", f"{server.url}/metrics?x=1"],
        capture_output=True, timeout=20, check=True,
    )  # fmt: skip
    subprocess.run(["curl", "-sS", version, f"{server.url}/v2/nowhere"], capture_output=True, timeout=20, check=True)
    server.wait_until_empty()
    first, second = access
    assert (first.method, first.path, first.status, first.id) == ("GET", "/metrics", 200, "from-curl")
    assert first.bytes_out == len(got.stdout)
    assert first.http_version == ("1.1" if version == "--http1.1" else "2")
    assert first.peer.startswith("127.0.0.1:")
    assert first.seconds > 0
    assert (second.path, second.status, second.id) == ("/v2/nowhere", 404, "")
