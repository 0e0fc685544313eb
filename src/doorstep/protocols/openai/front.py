"""Endpoints of OpenAI's API for generated text, and what they share: which model a name means, who may ask what.

Knows the server and its models; formats are in a file per API. Touched only from the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import orjson

from doorstep.backends.llm.engine import LONGEST_TOKEN_BYTES, too_long
from doorstep.backends.llm.job import Job
from doorstep.backends.llm.settings import adapter_names, task_of
from doorstep.errors import DoorstepError, ErrorCode, Unavailable
from doorstep.model import Model
from doorstep.protocols.kserve.aside import aside
from doorstep.protocols.openai.answer import Format
from doorstep.protocols.openai.call import JSON_TYPE, Call, llm_of, retry_after_s
from doorstep.protocols.openai.chat import ChatFormat, chat_jobs, read_chat
from doorstep.protocols.openai.completions import CompletionFormat, completion_jobs, read_completion
from doorstep.protocols.openai.errors import BadField, UnknownModel, error_body, status_of
from doorstep.protocols.openai.fields import document
from doorstep.protocols.openai.identity import caller_of, id_headers, id_of
from doorstep.repository.base import ModelState
from doorstep.wire.answers import fail
from doorstep.wire.exchange import Exchange
from doorstep.wire.limits import WireLimits

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

LONG_BYTES = 16 * 1024  # of a body: reading a longer one may take the event loop milliseconds, or seconds
MOST_BESIDE_BYTES = 5 << 20  # of a body: tools, schemas, a text to be counted, and what is passed over
_PROMPTS = {"generate": "chat and completions", "embed": "/v1/embeddings", "rerank": "/v1/rerank"}

B = TypeVar("B")  # a body as it was read


class Front:
    def __init__(self, server: InferenceServer, limits: WireLimits, *, ping_s: float) -> None:
        self.server = server
        self.limits = limits
        self.ping_s = ping_s  # 0: streams stay silent while nothing comes

    # Endpoints

    def chat(self, exchange: Exchange) -> None:
        self.with_document(exchange, read_chat, self._chat)

    def _chat(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        model, adapter = self.generator(body["model"])
        self.start(exchange, model, body, chat_jobs(body, adapter), ChatFormat(body, fingerprint(model)))

    def completions(self, exchange: Exchange) -> None:
        self.with_document(exchange, read_completion, self._completions)

    def _completions(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        model, adapter = self.generator(body["model"])
        self.start(exchange, model, body, completion_jobs(body, adapter), CompletionFormat(body, fingerprint(model)))

    # What every API shares

    def with_document(
        self,
        exchange: Exchange,
        read: Callable[[dict[str, Any]], B],
        answer: Callable[[B, Exchange], None],
        refuse: Callable[[Exchange, DoorstepError], None] | None = None,
    ) -> None:
        """Lets `answer` begin with what `read` makes of the body's JSON, in a thread where that is long; `refuse` says
        the errors of both."""
        refuse = refuse or respond_error

        def begin(made: Callable[[], B]) -> None:
            try:
                body = made()
                if not exchange.disconnected:
                    answer(body, exchange)
            except DoorstepError as error:
                refuse(exchange, error)
            except Exception as error:
                fail(exchange, error)

        def whole() -> B:
            return read(document(exchange.body))

        if len(exchange.body) > LONG_BYTES:
            aside(lambda done: begin(done.result), whole)
        else:
            begin(whole)

    def start(
        self, exchange: Exchange, model: Model, body: Mapping[str, Any], jobs: Sequence[Job], format: Format
    ) -> None:
        """Begins a call. Raises DoorstepError for what cannot fit, before any work."""
        context = llm_of(model).llm.context_size
        for job in jobs:
            most = job.body.get("max_tokens", 0)
            if most > context:
                raise BadField(f"'max_tokens' is {most}, and the model's context has {context} tokens", "max_tokens")
            size = _size_of(job)
            if size > context * LONGEST_TOKEN_BYTES:
                raise too_long(context, size // LONGEST_TOKEN_BYTES)
        check_size(exchange, model, len(body["prompt"]) if "prompt" in body else 1)
        Call(self, exchange, model, jobs, format, caller_of(exchange, body), stream=body.get("stream", False)).begin()

    def resolve(self, name: str) -> tuple[Model, str]:
        """The model that a name means, and the adapter: that name, or `model:adapter`. Raises UnknownModel or
        Unavailable."""
        try:
            return self.server.model(name), ""
        except DoorstepError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
        base, _, adapter = name.rpartition(":")
        for model in reversed(self.server.models()):  # the newest version first
            adapters = adapter_names(model.config.parameters)
            if name in adapters:
                return model, name
            if base == model.name and adapter in adapters:
                return model, adapter
        if any(entry.name == name and entry.state == ModelState.LOADING.value for entry in self.server.index()):
            raise Unavailable(f"The model '{name}' is loading; try again soon.")
        raise UnknownModel(name)

    def generator(self, name: str) -> tuple[Model, str]:
        """As `resolve`, for one that generates text. Raises BadField for another."""
        model, adapter = self.resolve(name)
        self.check_task(model, "generate")
        return model, adapter

    def check_task(self, model: Model, task: str) -> None:
        llm_of(model)
        its = task_of(model.config.parameters)
        if its != task:
            raise BadField(f"'{model.name}' is for {_PROMPTS[its]}, not for {_PROMPTS[task]}", "model")

    def load_header(self, form: bytes, model: Model) -> tuple[bytes, bytes]:
        """How busy the model is, in ORCA's words, for load balancers that asked."""
        llm = llm_of(model).llm
        named = {"kv_cache_utilization": round(llm.kv_usage, 4), "max_token_capacity": llm.context_size * llm.slots}
        if form == b"json":
            return (b"endpoint-load-metrics", b"JSON " + orjson.dumps({"named_metrics": named}))
        text = ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())
        return (b"endpoint-load-metrics", b"TEXT " + text.encode())


def check_size(exchange: Exchange, model: Model, prompts: int = 1) -> None:
    """Requests that wait are kept as they came. Raises BadField for one that has more than any prompt, or prompts, that
    fit, and all there may be beside."""
    most = prompts * llm_of(model).llm.context_size * LONGEST_TOKEN_BYTES + MOST_BESIDE_BYTES
    if len(exchange.body) > most:
        why = f"the body has {len(exchange.body)} bytes; one that fits into the model's context has {most} at most"
        raise BadField(why, None, "request_too_large")


def respond_error(
    exchange: Exchange,
    error: DoorstepError,
    model: Model | None = None,
    body_of: Callable[[DoorstepError], bytes] = error_body,
) -> None:
    """Before an answer has begun."""
    exchange.on_disconnect = None
    headers = [JSON_TYPE, *id_headers(exchange, id_of(exchange))]
    if status_of(error) == 503:
        headers.append((b"retry-after", str(retry_after_s(model) if model is not None else 1).encode()))
    exchange.respond(status_of(error), headers, body_of(error))


def respond_json(exchange: Exchange, document: Any) -> None:
    respond_body(exchange, orjson.dumps(document))


def respond_body(exchange: Exchange, body: bytes) -> None:
    exchange.respond(200, [JSON_TYPE, *id_headers(exchange, id_of(exchange))], body)


def fingerprint(model: Model) -> str:
    """Another one where the model, or how it runs, is another."""
    text = f"{model.name}:{model.version}:{sorted(model.config.parameters.items())}"
    return f"fp_{crc32(text.encode()):08x}"


def _size_of(job: Job) -> int:
    """Of what is asked, in bytes; token ids count as long ones."""
    if "messages" in job.body:
        return sum(len(message["content"]) for message in job.body["messages"])
    prompt = job.body.get("prompt", "")
    return len(prompt) if isinstance(prompt, str) else len(prompt) * LONGEST_TOKEN_BYTES
