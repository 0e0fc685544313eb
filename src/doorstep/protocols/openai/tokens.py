"""POST /tokenize and /detokenize, as vLLM has them: how a model sees a text. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from doorstep.backends.llm.job import Job, Operation
from doorstep.model import Model
from doorstep.protocols.openai import fields
from doorstep.protocols.openai.answer import Choice
from doorstep.protocols.openai.call import Call, llm_of
from doorstep.protocols.openai.embeddings import ValueFormat
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.front import Front, check_size
from doorstep.protocols.openai.identity import caller_of
from doorstep.protocols.openai.messages_in import read_messages
from doorstep.wire.exchange import Exchange

LONGEST_TEXT = 4 << 20
MOST_TOKENS = 1_000_000


def read_tokens(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(t) is int and 0 <= t < 2**31 for t in value):
        raise BadField(f"'{where}' must be a list of token ids", where, "invalid_type")
    if len(value) > MOST_TOKENS:
        raise BadField(f"'{where}' may have {MOST_TOKENS} tokens at most", where, "array_above_max_length")
    return value


TOKENIZE: Mapping[str, fields.Check] = {
    "model": fields.text(512),
    "prompt": fields.text(LONGEST_TEXT),
    "messages": read_messages,
    "tools": fields.tools,
    "add_generation_prompt": fields.unless_harmless(
        lambda v: v is True, "a chat's prompt always ends where the answer begins"
    ),
}
DETOKENIZE: Mapping[str, fields.Check] = {"model": fields.text(512), "tokens": read_tokens}


class Tokens:
    def __init__(self, front: Front) -> None:
        self._front = front

    def tokenize(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, partial(fields.read, checks=TOKENIZE), self._tokenize)

    def _tokenize(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        if ("prompt" in body) == ("messages" in body):
            raise BadField("either 'prompt' or 'messages' is needed", "prompt", "missing")
        model = self._model(body)
        asked: dict[str, Any] = {name: body[name] for name in ("messages", "tools") if name in body}
        if "prompt" in body:
            asked = {"text": body["prompt"]}
        length = llm_of(model).llm.context_size

        def document(choice: Choice) -> Any:
            return {"count": len(choice.value), "max_model_len": length, "tokens": choice.value}

        self._ask(exchange, model, "tokenize", asked, document)

    def detokenize(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, partial(fields.read, checks=DETOKENIZE), self._detokenize)

    def _detokenize(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        if "tokens" not in body:
            raise BadField("'tokens' is missing", "tokens", "missing")
        self._ask(exchange, self._model(body), "detokenize", {"tokens": body["tokens"]}, lambda c: {"prompt": c.value})

    def _model(self, body: Mapping[str, Any]) -> Model:
        if "model" not in body:
            raise BadField("'model' is missing", "model", "missing")
        model, _ = self._front.resolve(body["model"])
        llm_of(model)
        return model

    def _ask(
        self, exchange: Exchange, model: Model, operation: Operation, body: dict[str, Any],
        document: Callable[[Choice], Any],
    ) -> None:  # fmt: skip
        check_size(exchange, model)
        Call(
            self._front, exchange, model, [Job(operation, body)], ValueFormat(document), caller_of(exchange, {}),
            stream=False,
        ).begin()  # fmt: skip
