"""One HTTP request for generated text: its jobs on their way, and their pieces on the way back. Knows no API's format.

Several answers (`n`, several prompts) are several jobs, each with a slot of its own. The status is decided by the first
piece; what fails later says so in the stream. A client that leaves cancels all jobs; one that does not read is waited
for, up to a limit of bytes (and, by the wire, of time). Touched only from the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import orjson

from doorstep.backends.llm.job import JOB, LIGHT, Delta, Job
from doorstep.errors import DoorstepError, Internal
from doorstep.model import Model
from doorstep.protocols.kserve.aside import Outcome, aside
from doorstep.protocols.openai.answer import Choice, Format
from doorstep.protocols.openai.errors import BadField, Deadline, status_of
from doorstep.protocols.openai.identity import Caller, id_headers
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.scheduler.slots import SlotScheduler
from doorstep.trace import HTTP
from doorstep.types import BYTES, Tensor, object_array
from doorstep.wire.exchange import Exchange, Headers

if TYPE_CHECKING:
    from doorstep.protocols.openai.front import Front

logger = logging.getLogger("doorstep.openai")

LONG_PIECE = 128 * 1024  # bytes: reading it takes about a millisecond, and writing it in another form as much
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
NO_BUFFERING = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))  # for proxies on the way
_OPERATIONS = {"chat": "chat", "complete": "text_completion", "embed": "embeddings"}  # OpenTelemetry's words
JSON_TYPE = (b"content-type", b"application/json")


class Call:
    def __init__(
        self, front: Front, exchange: Exchange, model: Model, jobs: Sequence[Job], format: Format, caller: Caller,
        *, stream: bool,
    ) -> None:  # fmt: skip
        self._front = front
        self._exchange: Exchange | None = exchange
        self._model = model
        self._format = format
        self._caller = caller
        self._stream = stream
        self._keeps = format.keeps or not stream
        self._choices = [Choice() for _ in jobs]
        self._open = set(range(len(jobs)))  # those whose last piece has not come
        self._behind = 0  # bytes sent since the client ceased to read
        self._wrote = False  # since the last look
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._job = jobs[0]
        self._requests = [self._request(i, job) for i, job in enumerate(jobs)]

    def _request(self, index: int, job: Job) -> InferenceRequest:
        tensor = Tensor(JOB, BYTES, object_array([job.to_json()], (1,)))
        received_ns = self._exchange.received_ns if self._exchange is not None else 0
        request = InferenceRequest(
            self._model.name, {JOB: tensor}, _Sender(self, index), id=self._caller.request_id, received_ns=received_ns
        )
        if job.operation in LIGHT:
            request.rows = 0  # needs no slot
        request.batch_key = job.adapter or None
        request.tenant = self._caller.tenant
        request.priority = self._caller.priority
        request.deadline_ns = self._caller.deadline_ns
        return request

    def begin(self) -> None:
        """Queues the jobs. Raises DoorstepError where the first is refused."""
        exchange = self._exchange
        assert exchange is not None
        server, loop = self._front.server, asyncio.get_running_loop()
        exchange.state = self._requests[0]  # for the access log
        exchange.on_disconnect = self._disconnected
        if server.tracer is not None:
            server.tracer.begin(self._requests[0], HTTP, exchange.headers)
            if self._requests[0].trace is not None and self._job.operation in _OPERATIONS:
                self._requests[0].trace.asked(_OPERATIONS[self._job.operation], self._model.name, self._job.body)
        if self._caller.deadline_ns:
            left_s = (self._caller.deadline_ns - time.monotonic_ns()) / 1e9
            self._deadline = loop.call_later(max(left_s, 0), self._fail, Deadline())
        if self._stream and self._front.ping_s:
            self._timer = loop.call_later(self._front.ping_s, self._look)
        for request in self._requests:
            try:
                server.enqueue(request, self._model)
            except DoorstepError as error:
                release = getattr(request.sender, "release", None)  # a traced request's, whose trace ends with it
                if release is not None:
                    release()
                self._fail(error)
                return
            if self._exchange is None:
                return

    # Pieces

    def receive(self, index: int, response: InferenceResponse, final: bool) -> None:
        if final:
            self._open.discard(index)
        if self._exchange is None:
            return
        if response.error is not None:
            self._fail(response.error)
            return
        if response.outputs:
            piece = response.outputs[0].array.ravel()[0]
            if len(piece) > LONG_PIECE and not self._open and not self._stream and len(self._choices) == 1:
                aside(self._was_written, partial(self._whole, piece))  # which has the choice to itself from now on
                return
            delta = Delta.from_json(piece)
            self._choices[index].add(delta, keep=self._keeps)
            if self._stream:
                self._send(self._format.events(index, delta))
        if not self._open and self._exchange is not None:
            self._finish()

    def _send(self, data: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        if not exchange.started:
            exchange.start(200, self._headers(EVENT_STREAM, *NO_BUFFERING))
            exchange.on_drain = self._drained
            data = self._format.begin() + data
        if not data:
            return
        self._wrote = True
        if exchange.write(data):
            return
        self._behind += len(data)
        for request in self._requests:
            request.stalled = True
        if self._behind > self._front.limits.stream_bytes:
            self._give_up(f"{self._behind} bytes of its answer wait to be read, which is more than --max-stream-bytes")

    def _finish(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        if self._stream:
            self._send(self._format.end(self._choices))
            if self._exchange is not None:
                self._let_go()
                exchange.end()
            return
        try:
            body = orjson.dumps(self._format.document(self._choices))
        except DoorstepError as error:  # the answer is not what was asked for: vectors of another size
            self._fail(error)
        else:
            self._respond(body)

    def _whole(self, piece: bytes) -> bytes:
        """In a thread: the body of an answer that came in one long piece, as many vectors do."""
        self._choices[0].add(Delta.from_json(piece), keep=True)
        return orjson.dumps(self._format.document(self._choices))

    def _was_written(self, done: Outcome) -> None:
        try:
            body = done.result()
        except DoorstepError as error:
            self._fail(error)
        except Exception as error:
            self.broken(error)
        else:
            if self._exchange is not None:
                self._respond(body)

    def _respond(self, body: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        headers = self._headers(JSON_TYPE)
        self._let_go()
        exchange.respond(200, headers, body)

    def _fail(self, error: DoorstepError) -> None:
        """The whole call; the jobs that are left are cancelled."""
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.started:
            exchange.write(self._format.failed(error))
            self._let_go()
            exchange.end()
        else:
            headers = [JSON_TYPE]
            if status_of(error) == 503:
                headers.append((b"retry-after", str(retry_after_s(self._model)).encode()))
            body = orjson.dumps(self._format.error_document(error))
            sent = self._headers(*headers)
            self._let_go()
            exchange.respond(status_of(error), sent, body)
        self._cancel()

    def broken(self, error: BaseException) -> None:
        """A piece that cannot be put into words: our mistake, and no reason to keep anybody's slot."""
        logger.error("an answer of '%s' cannot be written", self._model.name, exc_info=error)
        self._fail(Internal(f"the answer cannot be written: {type(error).__name__}"))

    # The client

    def _headers(self, *headers: tuple[bytes, bytes]) -> Headers:
        assert self._exchange is not None
        found = [*headers, *id_headers(self._exchange, self._caller.request_id)]
        if self._caller.wants_load:
            found.append(self._front.load_header(self._caller.wants_load, self._model))
        return found

    def _disconnected(self) -> None:
        self._let_go()
        self._cancel()

    def _drained(self) -> None:
        self._behind = 0
        for request in self._requests:
            request.room()

    def _look(self) -> None:
        """Every so often: says that somebody is there, where nothing else was said."""
        if self._exchange is None:
            return
        self._timer = asyncio.get_running_loop().call_later(self._front.ping_s, self._look)
        if not self._wrote and not self._behind:
            self._send(self._format.ping)
        self._wrote = False

    def _give_up(self, why: str) -> None:
        exchange = self._exchange
        assert exchange is not None
        logger.warning("%r: %s: cancelled", self._requests[0], why)
        self._let_go()
        exchange.reset()
        self._cancel()

    def _cancel(self) -> None:
        for index in tuple(self._open):
            self._requests[index].cancel()

    def _let_go(self) -> None:
        """Of the exchange, which holds the requests that hold this."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.on_disconnect = exchange.on_drain = None
        for timer in (self._timer, self._deadline):
            if timer is not None:
                timer.cancel()


class _Sender:
    """Gives one job's responses to its call."""

    __slots__ = ("_broken", "_receive")

    def __init__(self, call: Call, index: int) -> None:
        self._receive = partial(call.receive, index)
        self._broken = call.broken

    def send(self, response: InferenceResponse, final: bool) -> None:
        try:
            self._receive(response, final)
        except Exception as error:
            self._broken(error)


def retry_after_s(model: Model) -> int:
    scheduler = model.scheduler
    return scheduler.retry_after_s() if isinstance(scheduler, SlotScheduler) else 1


def llm_of(model: Model) -> SlotScheduler:
    """Raises BadField for a model that is no language model."""
    if not isinstance(model.scheduler, SlotScheduler):
        raise BadField(f"'{model.name}' is no language model; call it by /v2/models/{model.name}/infer", "model")
    return model.scheduler
