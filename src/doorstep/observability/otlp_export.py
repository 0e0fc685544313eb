"""Posts spans to a collector (OTLP over HTTP), in batches, from a thread. Knows no request.

Whatever the collector does, nobody waits for it: a bounded queue takes the spans, those that do not fit are dropped and
counted, and a batch that cannot be delivered is given up. The batch span processor's rules are OpenTelemetry's
(specification, trace/sdk.md).
"""

from __future__ import annotations

import http.client
import logging
import os
import ssl
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson

from doorstep._version import __version__
from doorstep.errors import InvalidArgument
from doorstep.observability.otlp import export_request, spans_of
from doorstep.trace import Record

logger = logging.getLogger("doorstep.trace")

DEFAULT_URL = "http://localhost:4318/v1/traces"
TIMEOUT_S = 10.0  # for one batch; OTEL_EXPORTER_OTLP_TIMEOUT says it in milliseconds
_SAY_AGAIN_S = 60.0  # between two lines of the log about the same trouble


class SpanExporter:
    """A sink for records (trace_settings.Sink). Its methods are called on the event loop; the rest is the thread's."""

    def __init__(self, settings: Sequence[tuple[str, str]], environment: Mapping[str, str] = os.environ) -> None:
        """`settings`: those of --trace-config=opentelemetry. Raises InvalidArgument for an address that is none."""
        given = dict(settings)
        self.url = given.get("url") or _environment_url(environment)
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            parts, self._host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not self._host:
            raise InvalidArgument(f"--trace-config=opentelemetry,url={self.url}: expected http(s)://host[:port]/path")
        self._secure = parts.scheme == "https"
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.resource = _resource(settings, environment)
        self._headers = {"content-type": "application/json", **_environment_headers(environment)}
        self._timeout_s = _environment_timeout(environment)
        self._most = int(given["bsp_max_queue_size"])
        self._delay_s = int(given["bsp_schedule_delay"]) / 1000
        self._batch = min(int(given["bsp_max_export_batch_size"]), self._most)
        self._queue: deque[Record] = deque()  # not yet made into spans: that is the thread's work
        self._waiting = 0  # spans in the queue, about; under the lock
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._said_at = -_SAY_AGAIN_S

    # On the event loop

    def write(self, record: Record, ends_file: bool) -> None:
        count = 1 + 2 * len(record.traces)
        with self._lock:
            if self._waiting + count > self._most and self._waiting:
                self._dropped += count
                return
            self._waiting += count
            full = self._waiting >= self._batch
        self._queue.append(record)
        if full:
            self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="doorstep-spans", daemon=True)
            self._thread.start()

    def settle(self, setting: Any) -> None:
        """Nothing is gathered by setting."""

    def close(self, timeout_s: float) -> bool:
        """Sends what is there. False: it did not come to that, after `timeout_s`."""
        if self._thread is None:
            return True
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # In the thread

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._delay_s)
            self._wake.clear()
            self._export()
        self._export()

    def _export(self) -> None:
        spans: list[dict[str, Any]] = []
        while self._queue:
            record = self._queue.popleft()
            try:
                spans.extend(spans_of(record))
            except Exception:
                logger.exception("a trace cannot be made into spans")
            with self._lock:
                self._waiting -= 1 + 2 * len(record.traces)
            while len(spans) >= self._batch:
                self._post(spans[: self._batch])
                del spans[: self._batch]
        if spans:
            self._post(spans)
        if self._dropped:
            count, self._dropped = self._dropped, 0
            self._say(f"{count} spans were dropped: they come faster than {self.url} takes them")

    def _post(self, spans: Sequence[dict[str, Any]]) -> None:
        try:
            status, text = self._send(orjson.dumps(export_request(spans, self.resource)))
        except (OSError, http.client.HTTPException) as error:
            self._say(f"{len(spans)} spans were lost: {self.url} cannot be reached: {error or type(error).__name__}")
            return
        if status >= 300:
            self._say(f"{len(spans)} spans were lost: {self.url} answers {status}: {text[:200]!r}")

    def _send(self, body: bytes) -> tuple[int, bytes]:
        connection = (
            http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout_s, context=ssl.create_default_context()
            )
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        )
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read(1024)
        finally:
            connection.close()

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            logger.warning("%s", text)


def _resource(settings: Sequence[tuple[str, str]], environment: Mapping[str, str]) -> dict[str, str]:
    """Triton's default for the name of the service; then the environment, then what was given."""
    resource = {
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "doorstep",
        "telemetry.sdk.version": __version__,
        "service.name": "triton-inference-server",
    }
    for pair in environment.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, equals, value = pair.partition("=")
        if equals:
            resource[key.strip()] = unquote(value.strip())
    if environment.get("OTEL_SERVICE_NAME"):
        resource["service.name"] = environment["OTEL_SERVICE_NAME"]
    for name, pair in settings:
        if name == "resource":
            key, _, value = pair.partition("=")
            resource[key] = value
    return resource


def _environment_url(environment: Mapping[str, str]) -> str:
    if url := environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return url
    if url := environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return url.rstrip("/") + "/v1/traces"
    return DEFAULT_URL


def _environment_headers(environment: Mapping[str, str]) -> dict[str, str]:
    text = environment.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or environment.get("OTEL_EXPORTER_OTLP_HEADERS") or ""
    pairs = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {key.strip().lower(): unquote(value.strip()) for key, _, value in pairs}


def _environment_timeout(environment: Mapping[str, str]) -> float:
    try:
        return max(float(environment["OTEL_EXPORTER_OTLP_TIMEOUT"]) / 1000, 0.001)
    except (KeyError, ValueError):
        return TIMEOUT_S
