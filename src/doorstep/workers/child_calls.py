"""What model code in a worker process may ask of the server: frames over the side socket. Knows no model."""

from __future__ import annotations

import itertools
import os
import threading
from functools import partial
from typing import Any

from doorstep.backends.base import CallResponses, ModelCall
from doorstep.errors import BackendError, DoorstepError, Unavailable
from doorstep.request import InferenceRequest
from doorstep.workers.child_request import SEQUENCE_END, SEQUENCE_START, WorkerRequest
from doorstep.workers.child_side import ChildSide
from doorstep.workers.frames import WINDOW_BYTES, Kind, Layout
from doorstep.workers.outcome import described, read_error, read_result
from doorstep.workers.responses import Responses
from doorstep.workers.shared_memory import memory_of


class _Question:
    """A thread waits for the answer."""

    __slots__ = ("answer", "answered")

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.answer: Any = None


class ChildServer:
    """A `ServerAccess`: see backends/base.py."""

    def __init__(self, side: ChildSide) -> None:
        self._side = side
        self._numbers = itertools.count(1)
        self._calls: dict[int, Responses] = {}
        self._unread: dict[int, int] = {}  # bytes of a call's responses that were read and not told yet
        self._questions: dict[int, _Question] = {}
        self._gone = False
        self._pid = os.getpid()
        side.handlers[Kind.RESPONSE] = self._on_response
        side.handlers[Kind.ANSWER] = self._on_answer

    def call(self, call: ModelCall) -> CallResponses:
        self._refuse_forked()
        number = next(self._numbers)
        responses = self._calls[number] = Responses(partial(self._read, number), partial(self._cancel, number))
        try:
            layout = Layout()
            entries = layout.add(call.inputs)
            data, segment = self._side.place(layout)
            self._side.send(
                Kind.CALL,
                (
                    number,
                    segment.id if segment is not None else -1,
                    entries,
                    call.model_name,
                    call.model_version,
                    call.id,
                    list(call.requested_outputs),
                    call.parameters,
                    call.correlation_id,
                    SEQUENCE_START * call.sequence_start | SEQUENCE_END * call.sequence_end,
                    call.timeout_us,
                    call.priority,
                    _number(call.parent) or -_number(call.waiter),
                ),
                data,
            )
        except DoorstepError as error:
            self._fail(number, error)
        except OSError:
            self._fail(number, _gone())
        except Exception as error:  # an input no array of its datatype can hold
            self._fail(number, BackendError(f"the request cannot be sent: {described(error)}"))
        if self._gone:
            self._fail(number, _gone())
        return responses

    def ask(self, what: str, payload: Any, data: bytes = b"") -> Any:
        self._refuse_forked()
        number = next(self._numbers)
        question = self._questions[number] = _Question()
        try:
            self._side.send(Kind.ASK, (number, what, payload), data)
            if self._gone:
                raise _gone()
            question.answered.wait()
        except OSError:
            raise _gone() from None
        finally:
            del self._questions[number]
        if isinstance(question.answer, DoorstepError):
            raise question.answer
        return question.answer

    def tell(self, what: str, payload: Any) -> None:
        self._refuse_forked()
        self._side.send(Kind.TELL, (what, payload))

    def _refuse_forked(self) -> None:
        """Nothing reads the socket in a process that model code has forked, so what is asked there has no answer."""
        if os.getpid() != self._pid:
            raise BackendError("a process that the model has forked cannot ask the server; use threads, or async_exec")

    def end(self) -> None:
        """The server is gone: nobody waits any longer."""
        self._gone = True
        for number in list(self._calls):
            self._fail(number, _gone())
        for question in list(self._questions.values()):
            question.answer = _gone()
            question.answered.set()

    # In the thread that reads the socket

    def _on_response(self, meta: Any, data: bytearray) -> None:
        number, final, segment, what, cost = meta
        responses = self._calls.get(number)
        outputs: Any = None
        if what is not None:
            outputs = read_result(what, memory_of(self._side.inputs, segment, data))
        if final:
            self._calls.pop(number, None)
            self._unread.pop(number, None)
        if responses is not None:
            responses.put(outputs, final, cost)

    def _on_answer(self, meta: Any, _: bytearray) -> None:
        number, answer, error = meta
        question = self._questions.get(number)
        if question is not None:
            question.answer = answer if error is None else read_error(error)
            question.answered.set()

    # In the thread of the model

    def _read(self, number: int, cost: int) -> None:
        unread = self._unread.get(number, 0) + cost
        if unread * 2 < WINDOW_BYTES:
            self._unread[number] = unread
            return
        self._unread[number] = 0
        if number in self._calls:
            self._tell_server(Kind.READ, (number, unread))

    def _cancel(self, number: int, at_once: bool) -> None:
        if number in self._calls:
            self._tell_server(Kind.CANCEL_CALL, number if at_once else -number)

    def _tell_server(self, kind: Kind, meta: Any) -> None:
        try:
            self._side.send(kind, meta)
        except OSError:
            pass  # it is gone, and `end` says so

    def _fail(self, number: int, error: DoorstepError) -> None:
        responses = self._calls.pop(number, None)
        if responses is not None:
            responses.put(error, True)


def _gone() -> DoorstepError:
    return Unavailable("the server is gone")


def _number(request: InferenceRequest | None) -> int:
    return request.number if isinstance(request, WorkerRequest) and not request.ended else 0
