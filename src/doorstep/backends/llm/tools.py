"""Calls of tools, for engines or chat templates that know none: the prompt, the schema, and the calls in the answer.

A call that must come (`tool_choice` required, or a tool by name) is enforced by a JSON schema, which every engine can
do; one that may come (auto) is asked for in Hermes' form, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, which
most small models have seen. Pure: knows no engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_LITERAL = frozenset(("const", "enum", "default", "examples"))  # of a schema: values, which refer to nothing
_MOST_CALLS = 8  # at once, of a model that is forced to call


def forced_tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The functions one of which must be called; empty where none must."""
    tools = [tool["function"] for tool in body.get("tools") or ()]
    choice = body.get("tool_choice", "auto")
    if choice == "required":
        return tools
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        return [tool for tool in tools if tool["name"] == name]
    return []


def call_schema(tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """The schema of one call, or with `parallel` of a list of calls."""
    root = "#/items" if parallel else "#"
    calls = []
    for i, tool in enumerate(tools):
        at = f"{root}/properties/arguments" if len(tools) == 1 else f"{root}/anyOf/{i}/properties/arguments"
        arguments = _moved(tool.get("parameters") or {"type": "object"}, at)
        calls.append({
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": one, "minItems": 1, "maxItems": _MOST_CALLS} if parallel else one


def _moved(schema: Any, at: str) -> Any:
    """A schema that becomes the part `at` (a JSON pointer) of another: what it refers to in itself is there now."""
    if isinstance(schema, list):
        return [_moved(one, at) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: value if key in _LITERAL else _moved(value, at) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = at + reference[1:]
    return moved


def with_tools_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, forced: bool
) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools: what there is to call in the system's words, earlier calls and
    their results as text."""
    told = "\n".join(orjson.dumps({"type": "function", "function": tool}).decode() for tool in tools)
    how = (
        "Answer with nothing but JSON that calls the tool that fits."
        if forced
        else f'To call one, answer with {OPEN}{{"name": <its name>, "arguments": <an object>}}{CLOSE} '
        "and nothing else. If none fits, answer in words."
    )
    words = f"These tools can be called, one JSON description each:\n{told}\n{how}"
    plain = [_in_words(message) for message in messages]
    if plain and plain[0]["role"] == "system":
        plain[0] = {"role": "system", "content": f"{plain[0]['content']}\n\n{words}"}
    else:
        plain.insert(0, {"role": "system", "content": words})
    return plain


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message.get("content") or ""
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        content += (
            f'{OPEN}{{"name": {orjson.dumps(function["name"]).decode()}, "arguments": {function["arguments"]}}}{CLOSE}'
        )
    return {"role": role, "content": content}


def calls_in_words(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with earlier calls and their results as text."""
    return [_in_words(message) for message in messages]


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class CallStream:
    """Pieces of JSON that is a call, or a list of calls, become pieces of calls as they arrive: the id and name as soon
    as the name is whole, then the arguments as they come. What is not JSON of that kind gives nothing."""

    def __init__(self) -> None:
        self.count = 0  # calls begun
        self._depth = 0  # of brackets; a call is at `_base`
        self._base = 0
        self._in_string = False
        self._escaped = False
        self._key = ""
        self._text = ""  # of the string, or the arguments, being read
        self._name = ""
        self._in_arguments = False
        self._expects_value = False
        self._pending = ""  # arguments that came before the name

    def feed(self, text: str) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        self._text_out = ""
        for char in text:
            self._char(char, deltas)
        if self._text_out:
            self._emit_arguments(deltas)
        return deltas

    def _char(self, char: str, deltas: list[dict[str, Any]]) -> None:
        at_call = self._depth == self._base and self._base > 0
        if self._in_arguments:
            self._argument_char(char, deltas)
            return
        if self._in_string:
            self._string_char(char, deltas, at_call=at_call)
            return
        if char == '"':
            self._in_string, self._text = True, ""
        elif char in "{[":
            if char == "{" and not self._base:
                self._base = self._depth + 1
            if at_call and self._expects_value and self._key == "arguments":
                self._begin_arguments(char)
                return
            self._depth += 1
        elif char in "}]":
            if char == "}" and at_call:
                self._name, self._key, self._expects_value = "", "", False
            self._depth -= 1
        elif char == ":" and at_call:
            self._expects_value = True
        elif char == "," and at_call:
            self._expects_value = False

    def _string_char(self, char: str, deltas: list[dict[str, Any]], *, at_call: bool) -> None:
        if self._escaped:
            self._escaped = False
            self._text += char
        elif char == "\\":
            self._escaped = True
            self._text += char
        elif char == '"':
            self._in_string = False
            if not at_call:
                return
            if not self._expects_value:
                self._key = self._text
            elif self._key == "name":
                self._name = _unescaped(self._text)
                deltas.append({"index": self.count, "id": new_call_id(), "name": self._name, "arguments": ""})
                self.count += 1
                if self._pending:
                    deltas.append({"index": self.count - 1, "arguments": self._pending})
                    self._pending = ""
        else:
            self._text += char

    def _begin_arguments(self, char: str) -> None:
        self._in_arguments = True
        self._inner = 1
        self._in_string = False
        self._text_out = char

    def _argument_char(self, char: str, deltas: list[dict[str, Any]]) -> None:
        self._text_out += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._inner += 1
        elif char in "}]":
            self._inner -= 1
            if not self._inner:
                self._in_arguments = False
                self._emit_arguments(deltas)

    def _emit_arguments(self, deltas: list[dict[str, Any]]) -> None:
        text, self._text_out = self._text_out, ""
        if not self._name:
            self._pending += text
        else:
            deltas.append({"index": self.count - 1, "arguments": text})


def _unescaped(text: str) -> str:
    """What stands between two quotes of JSON; as it is, where it is none."""
    try:
        return str(orjson.loads(f'"{text}"'))
    except orjson.JSONDecodeError:
        return text


class CallsInText:
    """Splits an answer that comes in pieces into words and calls in Hermes' form. What may be the beginning of a mark
    is held back until it is clear; what is between marks and is no call is given out as it was written. Space between
    calls, and after the last, is nobody's."""

    def __init__(self) -> None:
        self.count = 0
        self._held = ""
        self._space = ""  # after a call: words may follow
        self._inside = False

    def feed(self, text: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(words, pieces of calls), one of them empty."""
        self._held += text
        while True:
            mark = CLOSE if self._inside else OPEN
            at = self._held.find(mark)
            if at >= 0:
                before, self._held = self._held[:at], self._held[at + len(mark) :]
                yield from self._call(before) if self._inside else self._words(before)
                self._inside = not self._inside
                continue
            if not self._inside:
                keep = begins(self._held, mark)
                yield from self._words(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
            return

    def finish(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """A call whose end mark never came counts if it is whole."""
        held, self._held = self._held, ""
        if self._inside:
            self._inside = False
            yield from self._call(held, OPEN + held)
        else:
            yield from self._words(held)

    def _words(self, text: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        if self.count:
            text = self._space + text
            words = text.rstrip()
            self._space = text[len(words) :]
            text = words
        if text:
            yield text, []

    def _call(self, text: str, written: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
        try:
            said = orjson.loads(text)
            name, arguments = said["name"], said.get("arguments", {})
            if not isinstance(name, str):
                raise TypeError
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            yield from self._words(written or f"{OPEN}{text}{CLOSE}")
            return
        self._space = ""
        if not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        yield "", [{"index": self.count, "id": new_call_id(), "name": name, "arguments": arguments}]
        self.count += 1


def begins(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
