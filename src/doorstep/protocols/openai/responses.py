"""POST /v1/responses, as far as it needs nothing stored: each request is whole. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doorstep.protocols.openai.call import llm_of
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.front import Front
from doorstep.protocols.openai.responses_format import ResponseFormat
from doorstep.protocols.openai.responses_in import read_response, response_job
from doorstep.wire.exchange import Exchange


class Responses:
    def __init__(self, front: Front) -> None:
        self._front = front

    def create(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, lambda said: (said, read_response(said)), self._create)

    def _create(self, read: tuple[Mapping[str, Any], Mapping[str, Any]], exchange: Exchange) -> None:
        said, body = read
        model, adapter = self._front.generator(body["model"])
        most, context = body.get("max_output_tokens", 0), llm_of(model).llm.context_size
        if most > context:
            why = f"'max_output_tokens' is {most}, and the model's context has {context} tokens"
            raise BadField(why, "max_output_tokens", "invalid_value")
        self._front.start(exchange, model, body, [response_job(body, adapter)], ResponseFormat(said, body))
