"""One HTTP exchange as an endpoint sees it, the same over HTTP/1.1 and HTTP/2. Knows no model, nothing above HTTP.

An endpoint is a plain function of an `Exchange`. It answers at once or later, exactly once: with `respond`, or with
`start`, any number of `write`, and `end`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Buffer = bytes | bytearray | memoryview
Headers = Iterable[tuple[bytes, bytes]]  # names in lower case


class SpelledHeaders(dict[bytes, bytes]):
    """Headers by their names in lower case, that also know how names with capitals were spelled."""

    __slots__ = ("spelled",)

    def __init__(self) -> None:
        super().__init__()
        self.spelled: dict[bytes, bytes] = {}  # the name in lower case → as it was first sent


class Exchange(ABC):
    """Touched only from the event loop."""

    __slots__ = (
        "body",
        "connection",
        "ended",
        "headers",
        "method",
        "on_body",
        "on_disconnect",
        "on_drain",
        "params",
        "path",
        "query",
        "received_ns",
        "route",
        "started",
        "state",
    )

    method: str  # GET, POST …
    path: str  # as sent, percent-encoded, without the query
    query: str  # as sent, without the '?'
    headers: Mapping[bytes, bytes]  # names in lower case; repeated fields joined with ", "
    params: Mapping[str, str]  # what the router found in the path, decoded; shared between requests: not to be changed
    route: str  # the pattern that matched, "/v2/models/{name}/infer"; "" where none did. For gates, logs and metrics
    body: Buffer  # whole and decompressed; b"" for a streaming endpoint
    received_ns: int  # monotonic; when the head of the request was complete
    state: Any  # the endpoint's own; the wire never looks at it
    started: bool  # the answer has begun: `respond` or `start` was called
    ended: bool  # the answer is complete, or never will be
    connection: ConnectionInfo
    on_disconnect: Callable[[], None] | None  # the client is gone before the answer was complete; called at most once
    on_drain: Callable[[], None] | None  # after `write` returned False: there is room again
    on_body: Callable[[Buffer, bool], None] | None  # streaming endpoints: (chunk, last) as it arrives

    @property
    @abstractmethod
    def disconnected(self) -> bool:
        """The client is gone: whatever is sent goes nowhere, silently."""

    @abstractmethod
    def respond(self, status: int, headers: Headers, *body: Buffer) -> None:
        """The whole answer. Adds content-length (and date-less framing) itself; body buffers are not copied where the
        transport can avoid it and must not change afterwards."""

    @abstractmethod
    def start(self, status: int, headers: Headers) -> None:
        """Begins a streamed answer (chunked over HTTP/1.1)."""

    @abstractmethod
    def write(self, data: Buffer) -> bool:
        """Sends a piece. False: the client reads too slowly; wait for `on_drain` before more."""

    @abstractmethod
    def end(self, trailers: Headers = ()) -> None:
        """Ends a streamed answer. Trailers are sent over HTTP/2 (gRPC's status) and dropped over HTTP/1.1."""

    @abstractmethod
    def reset(self) -> None:
        """Breaks off: resets the HTTP/2 stream, closes the HTTP/1.1 connection."""

    @abstractmethod
    def consume(self, size: int) -> None:
        """Streaming endpoints: `size` bytes of the body have been dealt with; lets the client send as many more."""


class ConnectionInfo:
    """What is known of the connection an exchange came on."""

    __slots__ = ("client_certificate", "http_version", "listener", "peer", "secure")

    def __init__(
        self,
        listener: str,
        peer: str,
        *,
        http_version: str = "1.1",
        secure: bool = False,
        client_certificate: Mapping[str, Any] | None = None,
    ) -> None:
        self.listener = listener  # "http", "grpc", "metrics"
        self.peer = peer  # host:port
        self.http_version = http_version
        self.secure = secure
        self.client_certificate = client_certificate  # ssl.getpeercert(), where the client showed one


Endpoint = Callable[[Exchange], Any]  # a coroutine function gets a Task of its own
Gate = Callable[[Exchange], "Refusal | None"]  # pure check before the endpoint; None lets it pass


class Refusal:
    """A gate's no: the answer to send instead."""

    __slots__ = ("body", "grpc_message", "grpc_status", "headers", "status")

    def __init__(
        self, status: int, body: bytes, headers: Headers = (), *, grpc_status: int = 14, grpc_message: str = ""
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.grpc_status = grpc_status
        self.grpc_message = grpc_message
