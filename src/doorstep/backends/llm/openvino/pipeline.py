"""Runs OpenVINO GenAI's continuous batching: one thread owns the pipeline, steps it, hands out tokens. Knows no text.

A step holds the interpreter's lock, so nothing else of the process runs meanwhile; the thread lets the others have it
between two steps.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from doorstep.errors import BackendError, DoorstepError

_YIELD_S = 0.0001  # what it takes for those who wait for the lock to get it
_WHERE = re.compile(r"^.*?\.(?:cc|cpp):\d+: (?:Check failed: .* is false: )?")
_FINISHES = {
    genai.GenerationFinishReason.NONE: "",
    genai.GenerationFinishReason.STOP: "stop",
    genai.GenerationFinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a step made of one request."""

    ids: list[int]
    logprobs: list[float]
    finish: str = ""  # stop, length; with it, the last


@dataclass(eq=False, slots=True)
class Stream:
    """One request. `answers` may be read by any thread; the rest is the owner's."""

    prompt: list[int]
    config: Any  # GenerationConfig, checked
    answers: SimpleQueue[Tokens | DoorstepError] = field(default_factory=SimpleQueue)
    handle: Any = None


class Pipeline:
    """`broken(error)` is called in the owner's thread when a step fails, after which no other step can succeed."""

    def __init__(self, pipeline: Any, broken: Callable[[Exception], None]) -> None:
        self._pipeline = pipeline  # touched only from the owner's thread
        self._broken = broken
        self._inbox: SimpleQueue[tuple[str, Stream | None]] = SimpleQueue()
        self._live: list[Stream] = []
        self._number = 0
        self.kv_usage = 0.0  # 0 to 1, at the last step
        self._thread = threading.Thread(target=self._run, name="doorstep-openvino", daemon=True)
        self._thread.start()

    # Of any thread

    def submit(self, stream: Stream) -> None:
        self._inbox.put(("add", stream))

    def cancel(self, stream: Stream) -> None:
        """Also of one that has ended."""
        self._inbox.put(("cancel", stream))

    def stop(self) -> None:
        """Ends those that run."""
        self._inbox.put(("stop", None))
        self._thread.join()

    # Of the owner's

    def _run(self) -> None:
        try:
            while self._take():
                if self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
                    if self._live:  # of none it would be the last one's
                        self.kv_usage = min(self._pipeline.get_metrics().cache_usage / 100.0, 1.0)
                if self._hand_out():
                    time.sleep(_YIELD_S)
                if not self._live:
                    self.kv_usage = 0.0
        except Exception as error:
            for stream in self._live:
                stream.answers.put(BackendError(f"OpenVINO failed: {last_line(error)}"))
            self._broken(error)
        finally:
            self._pipeline = None

    def _take(self) -> bool:
        """What was asked for since. Waits where there is nothing to do; False: to stop."""
        while True:
            idle = not self._live and not self._pipeline.has_non_finished_requests()
            if self._inbox.empty() and not idle:
                return True
            what, stream = self._inbox.get()
            if stream is None:
                return False
            if what == "add":
                self._add(stream)
            elif stream in self._live:
                self._live.remove(stream)
                stream.handle.cancel()

    def _add(self, stream: Stream) -> None:
        self._number += 1
        ids = openvino.Tensor(np.array([stream.prompt], np.int64))  # (1, tokens)
        try:
            stream.handle = self._pipeline.add_request(self._number, ids, stream.config)
        except RuntimeError as error:
            stream.answers.put(BackendError(f"OpenVINO does not take the request: {last_line(error)}"))
            return
        self._live.append(stream)

    def _hand_out(self) -> bool:
        """Whether there was something."""
        found = False
        for stream in self._live.copy():
            handle = stream.handle
            finish = ""
            while handle.can_read():
                for output in handle.read().values():
                    finish = _FINISHES.get(output.finish_reason, "stop")
                    stream.answers.put(Tokens(output.generated_ids, output.generated_log_probs, finish))
                    found = True
            if not finish and handle.get_status() != genai.GenerationStatus.RUNNING:
                stream.answers.put(
                    BackendError("the KV cache is too small for this request: the parameter 'cache_gb' gives it more")
                )
                finish, found = "error", True
            if finish:
                self._live.remove(stream)
        return found


def last_line(error: Exception) -> str:
    """OpenVINO's errors say first where in its sources they come from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _WHERE.sub("", lines[-1]) if lines else type(error).__name__
