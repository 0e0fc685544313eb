"""One answer of llama.cpp, as its chunks come: deltas out of them, errors, and when to stop. Knows no server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from doorstep.backends.llm import tools
from doorstep.backends.llm.engine import Aborted, Send
from doorstep.backends.llm.job import Delta, Usage
from doorstep.backends.llm.openai_chunks import delta_of, split_calls, usage_of
from doorstep.backends.llm.tool_plan import Split
from doorstep.errors import DoorstepError


class Answer:
    """Belongs to the thread that waits for the answer. `tokens` is what of the cache it takes."""

    __slots__ = ("_aborted", "_error_of", "_finish", "_raised", "_send", "_split", "_usage", "tokens")

    def __init__(
        self, split: Split | None, aborted: Aborted, send: Send, error_of: Callable[[int, Any], DoorstepError]
    ) -> None:
        self._split = split
        self._aborted = aborted
        self._send = send
        self._error_of = error_of
        self._finish = ""
        self._usage = Usage()
        self._raised: BaseException | None = None
        self.tokens = 0

    def piece(self, chunk: bytes) -> bool:
        """Called by llama.cpp, which drops what this raises. True: no more of it."""
        if self._aborted():
            return True
        try:
            said = orjson.loads(chunk)
            if "error" in said:
                raise self._error_of(0, said)
            if (progress := said.get("prompt_progress")) is not None:
                if not self.tokens:
                    self.tokens = progress["total"]
                    self._send(Delta(usage=Usage(prompt=self.tokens, cached=progress["cache"])))
                return False
            if (told := said.get("usage")) is not None:
                timings = said.get("timings") or {}
                prefill_us, decode_us = (round(timings.get(key, 0) * 1000) for key in ("prompt_ms", "predicted_ms"))
                self._usage = usage_of(told, prefill_us=prefill_us, decode_us=decode_us)
            for choice in said["choices"]:
                self._choice(choice)
        except BaseException as error:
            self._raised = error
            return True
        return False

    def _choice(self, choice: dict[str, Any]) -> None:
        self._finish = choice.get("finish_reason") or self._finish
        delta = delta_of(choice)
        self.tokens += delta.tokens
        if self._split is not None and delta.text:
            for part in split_calls(self._split, delta):
                self._send(part)
        elif delta.tokens:
            self._send(delta)

    def end(self) -> None:
        """There are no more chunks. Raises what went wrong."""
        if self._raised is not None:
            raise self._raised
        if self._aborted():
            return
        split, finish = self._split, self._finish
        if isinstance(split, tools.CallsInText):
            for words, calls in split.finish():
                self._send(Delta(text=words, tool_calls=calls))
        if split is not None and split.count and finish == "stop":
            finish = "tool_calls"
        self._send(Delta(finish=finish or "stop", usage=self._usage))
