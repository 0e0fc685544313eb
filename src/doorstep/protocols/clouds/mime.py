"""Inference where the vendor lets no header through but Content-Type: that says how long the JSON is. Knows no path.

`<MIME>;json-header-size=N` stands for the V2 protocol's Inference-Header-Content-Length, in requests and, with
SageMaker, in responses. Nothing is compressed, and an Inference-Header-Content-Length that did come through means
nothing (server, sagemaker_server.cc, vertex_ai_server.h).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from doorstep.errors import DoorstepError, InvalidArgument
from doorstep.protocols.kserve.errors import respond_error
from doorstep.protocols.kserve.http_infer import HttpSender, InferEndpoint
from doorstep.wire.answers import JSON
from doorstep.wire.exchange import Buffer, Exchange, Headers
from doorstep.wire.request_id import with_request_id

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

LENGTH = b"inference-header-content-length"
_NOT_THEIRS = (LENGTH, b"accept-encoding")
_LEADING_INTEGER = re.compile(rb"[ \t]*([+-]?[0-9]+)")


def json_size(content_type: bytes, mime: bytes, body_size: int) -> int | None:
    """How many bytes of the body are JSON; None where the content type does not say. Raises InvalidArgument."""
    position = content_type.find(mime)
    if position < 0:
        return None
    if position > 0:
        raise InvalidArgument(
            f"expect MIME type for binary data starts with '{mime.decode()}', got: {content_type.decode('latin-1')}"
        )
    value = content_type[len(mime) :]
    text = value.decode("latin-1")
    match = _LEADING_INTEGER.match(value)
    if match is None:
        raise InvalidArgument(f"Unable to parse inference header size, got: {text}")
    size = int(match[1][:20])
    if not -(2**31) <= size < 2**31:
        raise InvalidArgument(f"Unable to parse inference header size, value is out of range, got: {text}")
    if not 0 <= size <= body_size:
        raise InvalidArgument(f"inference header size should be in range (0, {body_size}), got: {text}")
    return size


class MimeInferEndpoint(InferEndpoint):
    """POST …/infer of one vendor."""

    __slots__ = ("_mime",)

    def __init__(
        self,
        server: InferenceServer,
        max_input_size: int,
        mime: bytes,
        say: Callable[[Exchange, DoorstepError], None] = respond_error,
        *,
        answers: bool = True,
    ) -> None:
        """`say` answers with an error; `answers`: the type is that of responses too, else they have the header."""
        super().__init__(server, max_input_size)
        self._mime = mime
        if answers:
            self.sender = mime_sender(mime, say)

    def infer(self, exchange: Exchange) -> None:
        headers = {name: value for name, value in exchange.headers.items() if name not in _NOT_THEIRS}
        try:
            size = json_size(headers.get(b"content-type", b""), self._mime, len(exchange.body))
        except DoorstepError as error:
            self.sender.say(exchange, error)
            return
        if size is not None:
            headers[LENGTH] = b"%d" % size
        exchange.headers = headers
        super().infer(exchange)

    def infer_model(self, exchange: Exchange, name: str) -> None:
        """The same for a model that the path does not name."""
        exchange.params = {"name": name}
        self.infer(exchange)


def mime_sender(mime: bytes, answer_error: Callable[[Exchange, DoorstepError], None]) -> type[HttpSender]:
    class MimeSender(HttpSender):
        """Answers in the vendor's type."""

        __slots__ = ()

        say = staticmethod(answer_error)  # type: ignore[assignment]

        def respond(self, exchange: Exchange, text: bytes, buffers: tuple[Buffer, ...]) -> None:
            headers: Headers = ((b"content-type", b"%b%d" % (mime, len(text))),) if buffers else JSON
            exchange.respond(200, with_request_id(exchange.headers, headers), text, *buffers)

    return MimeSender
