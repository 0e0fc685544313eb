"""POST /v1/embeddings: vectors of texts, by an engine, or by any model that takes texts and gives vectors.

Knows the server and its models; no engine."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson

from doorstep.backends.llm.job import Delta, Job
from doorstep.backends.llm.settings import task_of
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, Internal
from doorstep.model import Model
from doorstep.protocols.kserve.aside import ELEMENTS, aside
from doorstep.protocols.openai import fields
from doorstep.protocols.openai.answer import Choice
from doorstep.protocols.openai.call import Call
from doorstep.protocols.openai.completions import read_prompts
from doorstep.protocols.openai.errors import BadField, error_object
from doorstep.protocols.openai.front import Front, respond_body, respond_error
from doorstep.protocols.openai.identity import Caller, caller_of
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.scheduler.slots import SlotScheduler
from doorstep.types import BYTES, Array, Tensor, object_array
from doorstep.wire.exchange import Exchange

logger = logging.getLogger("doorstep.openai")

MOST_INPUTS = 2048


def read_inputs(value: Any, where: str) -> list[str | list[int]]:
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        if len(value) > MOST_INPUTS:
            raise BadField(f"'{where}' may have {MOST_INPUTS} texts at most", where, "array_above_max_length")
        inputs: list[str | list[int]] = value
    else:
        inputs = read_prompts(value, where)
    if any(not one for one in inputs):
        raise BadField(f"'{where}' has an empty text", where, "invalid_value")
    return inputs


CHECKS: Mapping[str, fields.Check] = {
    **fields.WITHOUT_EFFECT,
    "model": fields.text(512),
    "input": read_inputs,
    "encoding_format": fields.one_of("float", "base64"),
    "dimensions": fields.integer(1, 1_000_000),
    "priority": fields.integer(0, 2**31),
}


@dataclass(frozen=True, slots=True)
class TextToVector:
    """How a model that is no LLM is asked: one text per row, or one text per request."""

    input: str
    output: str
    batch: int  # rows at most; 0: the model has no batch dimension


def text_to_vector(config: ModelConfig) -> TextToVector | None:
    """None for a model that cannot be asked for vectors: it must take one text, and give one row of numbers."""
    required = [spec for spec in config.inputs.values() if not spec.optional]
    if config.decoupled or config.sequence is not None or len(required) != 1:
        return None
    spec = required[0]
    if spec.datatype is not BYTES or spec.dims not in ((1,), (-1,)):
        return None
    for output in config.outputs.values():
        if output.dims[-1:] == (1,):
            continue  # one number is no vector
        if output.datatype.numpy.kind == "f" and len(output.dims) == (1 if config.max_batch_size else 2):
            return TextToVector(spec.name, output.name, config.max_batch_size)
        if output.datatype.numpy.kind == "f" and not config.max_batch_size and len(output.dims) == 1:
            return TextToVector(spec.name, output.name, 0)
    return None


Document = Callable[[Sequence[Any], int], Any]  # (vectors, prompt tokens) → what is answered


class Embeddings:
    def __init__(self, front: Front) -> None:
        self._front = front

    def embed(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, partial(fields.read, checks=CHECKS), self._embed)

    def _embed(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        for name in ("model", "input"):
            if name not in body:
                raise BadField(f"'{name}' is missing", name, "missing")
        model, _ = self._front.resolve(body["model"])

        def document(vectors: Sequence[Any], tokens: int) -> Any:
            return _document(body, vectors, tokens)

        self.vectors_of(exchange, model, body["input"], caller_of(exchange, body), document)

    def vectors_of(
        self, exchange: Exchange, model: Model, inputs: Sequence[str | list[int]], caller: Caller,
        document: Document,
    ) -> None:  # fmt: skip
        """Answers with what `document(vectors, prompt tokens)` makes. Raises BadField for a model that has none."""
        if isinstance(model.scheduler, SlotScheduler):
            self._front.check_task(model, "embed")
            format = ValueFormat(lambda choice: document(choice.value, choice.usage.prompt))
            Call(self._front, exchange, model, [Job("embed", {"input": inputs})], format, caller, stream=False).begin()
            return
        how = text_to_vector(model.config)
        if how is None:
            raise BadField(f"'{model.name}' does not make vectors of texts", "model")
        if not all(isinstance(one, str) for one in inputs):
            raise BadField(f"'{model.name}' takes texts, no token ids", "input")
        _ByInference(self._front, exchange, model, how, inputs, document).begin()


class _ByInference:
    """One call of a model that is no LLM: as many requests as its batches need."""

    def __init__(
        self, front: Front, exchange: Exchange, model: Model, how: TextToVector, inputs: Sequence[Any],
        document: Document,
    ) -> None:  # fmt: skip
        self._server = front.server
        self._exchange: Exchange | None = exchange
        self._model = model
        self._how = how
        self._document = document
        size = how.batch or 1
        self._requests = [self._request(inputs[i : i + size], exchange) for i in range(0, len(inputs), size)]
        self._found: dict[InferenceRequest, Array] = {}

    def _request(self, texts: Sequence[str], exchange: Exchange) -> InferenceRequest:
        shape = (len(texts), 1) if self._how.batch else (1,)
        tensor = Tensor(self._how.input, BYTES, object_array([text.encode() for text in texts], shape))
        sender = _Part(self)
        request = InferenceRequest(
            self._model.name, {self._how.input: tensor}, sender, requested_outputs=(self._how.output,),
            received_ns=exchange.received_ns,
        )  # fmt: skip
        sender.request = request
        return request

    def begin(self) -> None:
        assert self._exchange is not None
        self._exchange.state = self._requests[0]  # for the access log
        self._exchange.on_disconnect = self._cancel
        for request in self._requests:
            try:
                self._server.infer(request, self._model)
            except DoorstepError as error:
                self.fail(error)
                return

    def receive(self, request: InferenceRequest, response: InferenceResponse) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if response.error is not None:
            self.fail(response.error)
            return
        name = self._how.output
        array = next((tensor.array for tensor in response.outputs if tensor.name == name), None)
        if array is None:
            self.fail(Internal(f"'{self._model.name}' gave no output '{name}'"))
            return
        self._found[request] = np.asarray(array, np.float32).reshape(-1 if self._how.batch else 1, array.shape[-1])
        if len(self._found) < len(self._requests):
            return
        if sum(found.size for found in self._found.values()) > ELEMENTS:
            aside(lambda done: self._answer(done.result), self._whole)
        else:
            self._answer(self._whole)

    def _whole(self) -> bytes:
        vectors = [row for one in self._requests for row in self._found[one]]
        return orjson.dumps(self._document(vectors, 0))

    def _answer(self, whole: Callable[[], bytes]) -> None:
        exchange = self._exchange
        try:
            body = whole()
        except DoorstepError as error:
            self.fail(error)
            return
        except Exception as error:
            logger.exception("vectors of '%s' cannot be written", self._model.name)
            self.fail(Internal(f"the answer cannot be written: {type(error).__name__}"))
            return
        if exchange is not None:
            self._exchange = exchange.on_disconnect = None
            respond_body(exchange, body)

    def fail(self, error: DoorstepError) -> None:
        exchange = self._exchange
        if exchange is not None:
            self._cancel()
            respond_error(exchange, error, self._model)

    def _cancel(self) -> None:
        self._exchange = None
        for request in self._requests:
            request.cancel()


class _Part:
    """Gives one request's response to its call."""

    __slots__ = ("_call", "request")

    request: InferenceRequest

    def __init__(self, call: _ByInference) -> None:
        self._call = call

    def send(self, response: InferenceResponse, final: bool) -> None:
        self._call.receive(self.request, response)


class ValueFormat:
    """Of calls whose answer is one value."""

    keeps = True
    ping = b""

    def __init__(self, document: Callable[[Choice], Any]) -> None:
        self._document = document

    def begin(self) -> bytes:
        return b""

    def events(self, index: int, delta: Delta) -> bytes:
        return b""

    def end(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def failed(self, error: DoorstepError) -> bytes:
        return b""

    def document(self, choices: Sequence[Choice]) -> Any:
        return self._document(choices[0])

    def error_document(self, error: DoorstepError) -> Any:
        return {"error": error_object(error)}


def _document(body: Mapping[str, Any], vectors: Sequence[Any], tokens: int) -> Any:
    rows = [np.asarray(vector, np.float32) for vector in vectors]
    wanted = body.get("dimensions")
    if wanted is not None and rows and len(rows[0]) != wanted:
        raise BadField(f"'dimensions' must be {len(rows[0])}: the model's vectors are not made to be cut", "dimensions")
    as_text = body.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist(),
        }
        for i, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body["model"], "usage": usage}


def can_embed(model: Model) -> bool:
    if isinstance(model.scheduler, SlotScheduler):
        return task_of(model.config.parameters) == "embed"
    return text_to_vector(model.config) is not None
