"""Answers of POST /v1/responses: pieces become items of an output, and what happens to them events. Pure.

Items come one after the other: what the model thinks, what it says, each call of a function. One is open at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from doorstep.backends.llm.job import Delta
from doorstep.errors import DoorstepError
from doorstep.protocols.openai.answer import PING, Choice, named_event, new_id, now_s
from doorstep.protocols.openai.chat import logprob_entry
from doorstep.protocols.openai.errors import error_object, status_of
from doorstep.protocols.openai.responses_in import wanted_logprobs

Event = dict[str, Any]  # without its number

# type of item → prefix of ids, prefix of the events of its text
_ITEMS = {
    "reasoning": ("rs_", "response.reasoning_text"),
    "message": ("msg_", "response.output_text"),
    "function_call": ("fc_", "response.function_call_arguments"),
}


class Output:
    """The items of one answer. An event is to be written before the next is asked for: it shows an item as it is."""

    def __init__(self, tops: int | None) -> None:
        self.items: list[dict[str, Any]] = []
        self._tops = tops  # see wanted_logprobs
        self._open = ""  # the type of the last item, until it is done
        self._pieces: list[str] = []  # of its text
        self._logprobs: list[dict[str, Any]] = []  # of its text
        self._untold = 0  # of them, how many went out with no event yet

    def add(self, delta: Delta) -> Iterator[Event]:
        if delta.reasoning:
            yield from self._say("reasoning", delta.reasoning)
        elif delta.logprobs and self._tops is not None and not delta.tool_calls:
            # A token that is part of a character has no text yet: it is told with the next that has.
            self._logprobs += [logprob_entry(entry, self._tops) for entry in delta.logprobs]
            self._untold += len(delta.logprobs)
        if delta.text:
            yield from self._say("message", delta.text)
        for call in delta.tool_calls:
            if "id" in call:
                yield from self.close()
                yield self._begin("function_call", call_id=call["id"], name=call["name"], arguments="")
            if call["arguments"] and self._open == "function_call":
                self._pieces.append(call["arguments"])
                yield self._event(".delta", delta=call["arguments"])

    def close(self, status: str = "completed") -> Iterator[Event]:
        """The open item is done."""
        if not self._open:
            return
        item, text = self.items[-1], "".join(self._pieces)
        if self._open == "function_call":
            item["arguments"] = text
            yield self._event(".done", arguments=text)
        else:
            part = self._part(text, self._logprobs)
            item["content"] = [part]
            logprobs = {"logprobs": self._logprobs} if self._open == "message" else {}
            yield self._event(".done", content_index=0, text=text, **logprobs)
            yield self._about("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        self._open = ""

    def _say(self, kind: str, text: str) -> Iterator[Event]:
        if self._open != kind:
            logprobs, untold = self._logprobs[-self._untold :] if self._untold else [], self._untold
            yield from self.close()
            content: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            yield self._begin(kind, **content, content=[])
            self._logprobs, self._untold = logprobs, untold
            yield self._about("response.content_part.added", content_index=0, part=self._part("", []))
        self._pieces.append(text)
        if kind == "reasoning":
            yield self._event(".delta", content_index=0, delta=text)
            return
        told = self._logprobs[len(self._logprobs) - self._untold :]
        self._untold = 0
        yield self._event(".delta", content_index=0, delta=text, logprobs=told)

    def _begin(self, kind: str, **fields: Any) -> Event:
        self._open = kind
        self._pieces, self._logprobs, self._untold = [], [], 0
        item = {"id": new_id(_ITEMS[kind][0]), "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}

    def _event(self, verb: str, **fields: Any) -> Event:
        return self._about(_ITEMS[self._open][1] + verb, **fields)

    def _about(self, type: str, **fields: Any) -> Event:
        return {"type": type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


class ResponseFormat:
    keeps = False
    ping = PING

    def __init__(self, said: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        """`said` is the client's body, which an answer repeats; `body` what was read of it."""
        self._output = Output(wanted_logprobs(body))
        self._sequence = 0
        self._begun = False
        self._common = {"id": new_id("resp_"), "object": "response", "created_at": now_s(), **_repeated(said, body)}

    # Events

    def begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        response = self._response("in_progress")
        return self._write({"type": f"response.{what}", "response": response} for what in ("created", "in_progress"))

    def events(self, index: int, delta: Delta) -> bytes:
        # The first piece is asked about before the beginning is; events are numbered as they are sent.
        return self.begin() + self._write(self._output.add(delta))

    def end(self, choices: Sequence[Choice]) -> bytes:
        choice = choices[0]
        status = _status(choice)
        closing = self.begin() + self._write(self._output.close(status))
        return closing + self._write([{"type": f"response.{status}", "response": self._response(status, choice)}])

    def failed(self, error: DoorstepError) -> bytes:
        for _ in self._output.close("incomplete"):
            pass
        said = response_error(error)
        response = self._response("failed")
        response["error"] = {
            "code": "server_error" if status_of(error) >= 500 else "invalid_prompt",
            "message": error.message,
        }
        return self.begin() + self._write(
            [
                {"type": "error", **{name: said[name] for name in ("code", "message", "param")}},
                {"type": "response.failed", "response": response},
            ]
        )

    def _write(self, events: Iterable[Event]) -> bytes:
        written = []
        for event in events:
            written.append(named_event({**event, "sequence_number": self._sequence}))
            self._sequence += 1
        return b"".join(written)

    # Documents

    def document(self, choices: Sequence[Choice]) -> Any:
        choice = choices[0]
        calls = [{**call, "arguments": "".join(call["arguments"])} for call in choice.calls]
        whole = (
            Delta(reasoning="".join(choice.reasoning)),
            Delta(text=choice.text, logprobs=choice.logprobs),
            Delta(tool_calls=calls),
        )
        status = _status(choice)
        for delta in whole:
            for _ in self._output.add(delta):
                pass
        for _ in self._output.close(status):
            pass
        return self._response(status, choice)

    def error_document(self, error: DoorstepError) -> Any:
        return {"error": response_error(error)}

    def _response(self, status: str, choice: Choice | None = None) -> dict[str, Any]:
        made = {**self._common, "status": status, "output": self._output.items}
        if status == "completed":
            made["completed_at"] = now_s()
        elif status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        if choice is not None:
            made["usage"] = _usage(choice)
        return made


def _repeated(said: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer says of its question, and what there is not yet."""
    text, reasoning = said.get("text") or {}, said.get("reasoning") or {}
    return {
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": body.get("metadata", {}),
        "model": body["model"],
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": said.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": said.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": body.get("temperature"),
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "tool_choice": said.get("tool_choice") or "auto",
        "tools": [_repeated_tool(tool) for tool in said.get("tools") or ()],
        "top_logprobs": body.get("top_logprobs", 0),
        "top_p": body.get("top_p"),
        "truncation": "disabled",  # whatever was asked: nothing is left out
        "usage": None,
        "user": said.get("user"),
    }


def _repeated_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", **{name: tool.get(name) for name in ("name", "description", "parameters", "strict")}}


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish == "length" else "completed"


def _usage(choice: Choice) -> dict[str, Any]:
    usage = choice.usage
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
        "total_tokens": usage.prompt + usage.completion,
    }


def response_error(error: DoorstepError) -> dict[str, Any]:
    """As in every API of OpenAI's, but that the prompt is called otherwise."""
    made = error_object(error)
    if made["param"] == "messages":
        made["param"] = "input"
    return made
