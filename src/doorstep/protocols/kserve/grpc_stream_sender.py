"""One request of a stream: what becomes of its responses. Knows no order and no connection.

A model that gives one response gives it as anywhere else. One that is decoupled gives any number, each sent as it
comes; that no more comes is said with the last, or by itself to a client that asked for it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from doorstep.client_memory import Loan
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, Internal
from doorstep.protocols.kserve.grpc_encode import (
    Buffers,
    encode_infer,
    encode_stream,
    encode_stream_error,
    final_flag,
    named,
)
from doorstep.protocols.kserve.grpc_stream_templates import ResponseTemplate
from doorstep.protocols.kserve.single import Early, gather
from doorstep.protocols.kserve.wanted import ALL_BINARY
from doorstep.request import InferenceResponse

if TYPE_CHECKING:
    from doorstep.protocols.kserve.grpc_stream import InferStream

logger = logging.getLogger("doorstep.kserve")


class StreamSender:
    """Touched only from the event loop."""

    __slots__ = (
        "_early",
        "_message",
        "_stream",
        "_template",
        "config",
        "decoupled",
        "loan",
        "ready",
        "wanted",
        "wants_empty_final",
    )

    def __init__(self, stream: InferStream, message: Any) -> None:
        self._stream = stream
        self._message = message
        self._early: Early | None = None  # of a model that is not decoupled, before its final response
        self._template: ResponseTemplate | None = None
        self.config: ModelConfig | None = None  # unknown until the model is found
        self.decoupled = False
        self.loan: Loan | None = None  # the regions of shared memory that it names
        self.ready: Buffers | None = None  # the encoded response, waiting for its turn
        self.wanted = ALL_BINARY
        self.wants_empty_final = False

    def refuse(self, error: DoorstepError) -> None:
        """The request was not taken."""
        self._stream.deliver(self, (encode_stream_error(error.message, named(self._message.id)),), True)

    def send(self, response: InferenceResponse, final: bool) -> None:
        if self.decoupled:
            template = self._template
            if template is not None and not final:
                framed = template.frame(response)
                if framed is not None:
                    self._stream.deliver_framed(framed)
                    return
            if response.flag_only:
                self._stream.deliver(self, self._empty_final() if self.wants_empty_final else (), True)
                return
        elif not final or response.flag_only or self._early is not None:
            early = self._early = self._early or Early()
            found = gather(early, response, final)
            if found is None:
                return
            response = found
        error = response.error
        if error is None:
            try:
                assert self.config is not None
                message = encode_infer(response, self.wanted, self.config, final_flag(final))
            except DoorstepError as found_error:
                error = found_error
            except Exception as found_error:
                logger.exception("%r cannot be encoded", response)
                error = Internal(f"the response cannot be encoded: {found_error}")
            else:
                if not final and self._template is None and self.decoupled and not self.wanted.forms:
                    self._template = ResponseTemplate(response) if self._stream.takes_framed else None
                self._stream.deliver(self, encode_stream(message), final)
                return
        inner = self._named() + final_flag(final)
        self._stream.fail(self, error, (encode_stream_error(error.message, inner),), final)

    def _named(self) -> bytes:
        """The request, as the client called it."""
        asked = self._message
        return named(asked.id, asked.model_name, asked.model_version)

    def _empty_final(self) -> Buffers:
        return encode_stream((self._named() + final_flag(True),))
