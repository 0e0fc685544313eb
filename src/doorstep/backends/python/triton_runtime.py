"""What the calls of model code need to know of the process they are in: server, log, folder, and how far its life is.

One Triton model per process, so this is a module. Knows no tensor and no batch.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from typing import Any

from doorstep.backends.base import ServerAccess
from doorstep.backends.python.triton_errors import TritonModelException
from doorstep.request import InferenceRequest


class Phase(Enum):
    """Other models can be called while this one serves, and only then."""

    LOADING = 1
    SERVING = 2
    ENDING = 3


model_directory = ""
phase = Phase.LOADING
# What `execute` runs, where it is one request alone: what it waits for is not wanted without it.
running: ContextVar[InferenceRequest | None] = ContextVar("running", default=None)
_log: Callable[[str, str], None] | None = None
_server: ServerAccess | None = None


def set_up(directory: str, log: Callable[[str, str], None] | None, server: ServerAccess | None = None) -> None:
    """Called before model code is."""
    global model_directory, _log, _server, phase  # noqa: PLW0603 (one model per process)
    model_directory = directory
    _log = log
    _server = server
    phase = Phase.LOADING


def become(new: Phase) -> None:
    global phase  # noqa: PLW0603 (one model per process)
    phase = new


def log(level: str, message: str) -> None:
    if _log is not None:
        _log(level, message)


def server() -> ServerAccess:
    """Raises TritonModelException where there is none: the model is only looked at, by `doorstep check` say."""
    if _server is None:
        raise TritonModelException("the model does not run in a server, so it has none to ask")
    return _server


# What the garbage collector starts. It comes in any thread at any moment, maybe inside a send that holds a lock; so
# what it has to say goes through a queue that may be entered anywhere, to a thread of its own.

_left: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
_started = False


def start_cleaning() -> None:
    """From now on `later` works. Not from a destructor."""
    global _started  # noqa: PLW0603 (one per process)
    if not _started:
        _started = True
        threading.Thread(target=_clean, name="doorstep-cleaning", daemon=True).start()


def later(call: Callable[..., Any], *args: Any) -> None:
    """Runs `call` soon, in another thread. For destructors."""
    _left.put((call, args))


def _clean() -> None:
    while True:
        call, args = _left.get()
        with contextlib.suppress(Exception):  # the server may be gone
            call(*args)
        del call, args
