"""Where each field of a config.pbtxt stands, and every name in it that does not exist. Knows no meaning of any field.

protobuf's own parser stops at its first error and keeps no positions; this walk finds the rest. It is asked only after
protobuf refused a text, or to say at which line a checked field stands, so it may be lenient but must not invent.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from doorstep.proto import is_repeated

_TOKEN = re.compile(
    r"""(?P<space>(?:\s+|\#[^\n]*)+)
      | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<word>-?\s*[A-Za-z0-9_.][A-Za-z0-9_.+]*(?:(?<=[eE])-[0-9]+)?)
      | (?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
_CLOSES = {"{": "}", "<": ">"}
_DEEPEST = 64

# What people write, and what they mean.
_MEANT = {
    "inputs": "input",
    "outputs": "output",
    "datatype": "data_type",
    "dtype": "data_type",
    "shape": "dims",
    "dim": "dims",
    "batching": "dynamic_batching",
    "instances": "instance_group",
    "labels": "label_filename",
    "decoupled": "model_transaction_policy { decoupled: true }",
    "TYPE_FLOAT": "TYPE_FP32",
    "TYPE_FLOAT16": "TYPE_FP16",
    "TYPE_FLOAT32": "TYPE_FP32",
    "TYPE_FLOAT64": "TYPE_FP64",
    "TYPE_HALF": "TYPE_FP16",
    "TYPE_DOUBLE": "TYPE_FP64",
    "TYPE_BFLOAT16": "TYPE_BF16",
    "TYPE_BYTES": "TYPE_STRING",
    "TYPE_INT": "TYPE_INT32",
    "TYPE_LONG": "TYPE_INT64",
    "FLOAT": "TYPE_FP32",
    "BYTES": "TYPE_STRING",
    "STRING": "TYPE_STRING",
    "KIND_CUDA": "KIND_GPU",
}

_STRING, _INTEGER, _NUMBER, _BOOL = ("text in double quotes", "a whole number", "a number", "true or false")
_SCALARS: dict[int, tuple[str, re.Pattern[str]]] = {
    FieldDescriptor.CPPTYPE_STRING: (_STRING, re.compile(r"[\"'].*", re.DOTALL)),
    FieldDescriptor.CPPTYPE_INT32: (_INTEGER, re.compile(r"-?\s*(\d+|0[xX][0-9a-fA-F]+)")),
    FieldDescriptor.CPPTYPE_INT64: (_INTEGER, re.compile(r"-?\s*(\d+|0[xX][0-9a-fA-F]+)")),
    FieldDescriptor.CPPTYPE_UINT32: (_INTEGER + ", not negative", re.compile(r"\d+|0[xX][0-9a-fA-F]+")),
    FieldDescriptor.CPPTYPE_UINT64: (_INTEGER + ", not negative", re.compile(r"\d+|0[xX][0-9a-fA-F]+")),
    FieldDescriptor.CPPTYPE_BOOL: (_BOOL, re.compile(r"true|True|t|1|false|False|f|0")),
    FieldDescriptor.CPPTYPE_FLOAT: (_NUMBER, re.compile(r"-?\s*([\d.].*|inf.*|nan.*)", re.IGNORECASE)),
    FieldDescriptor.CPPTYPE_DOUBLE: (_NUMBER, re.compile(r"-?\s*([\d.].*|inf.*|nan.*)", re.IGNORECASE)),
}


@dataclass(frozen=True, slots=True)
class Fault:
    line: int
    column: int
    what: str
    fix: str


@dataclass(slots=True)
class Survey:
    """Paths look like `input[0].dims` and `parameters["execution"]`; lines and columns count from 1."""

    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def position(self, path: str) -> tuple[int, int] | None:
        """Where `path` stands, or the nearest thing around it that is written down."""
        while path:
            found = self.positions.get(path)
            if found is not None:
                return found
            path = re.sub(r"(\[[^\[\]]*\]|\.?[^.\[\]]+)$", "", path)
        return None


def survey(text: str, descriptor: Any) -> Survey:
    """Walks `text` as the text format of the message that `descriptor` describes. Never raises."""
    walk = _Walk(text)
    try:
        walk.fields("", descriptor, "", (1, 1), 0)
    except (_Lost, StopIteration):
        pass  # the syntax itself is broken; protobuf says where
    return walk.found


def suggest(wrong: str, known: list[str]) -> str:
    """`did you mean 'x'?`, or "" where nothing is near."""
    if wrong in _MEANT:
        return f"did you mean {_MEANT[wrong]}?"
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


class _Lost(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int
    column: int


class _Walk:
    def __init__(self, text: str) -> None:
        self.found = Survey()
        self._tokens = _tokens(text)
        self._next = next(self._tokens, None)

    def _take(self) -> _Token:
        token = self._next
        if token is None:
            raise _Lost
        self._next = next(self._tokens, None)
        return token

    def _peek(self, *texts: str) -> bool:
        return self._next is not None and self._next.text in texts

    def _fault(self, token: _Token, what: str, fix: str = "") -> None:
        self.found.faults.append(Fault(token.line, token.column, what, fix))

    def fields(self, prefix: str, message: Any, closes: str, opened: tuple[int, int], depth: int) -> str:
        """The fields up to `closes` ("" is the end of the text). Returns the value of a field called `key`."""
        seen: dict[str, int] = {}
        key = ""
        while True:
            if self._next is None:
                if closes:
                    self.found.faults.append(Fault(*opened, "this bracket is never closed", f"add a '{closes}'"))
                return key
            if self._peek(closes):
                self._take()
                return key
            name = self._take()
            if name.kind != "word" or depth > _DEEPEST:
                raise _Lost
            known = None if message is None else message.fields_by_name.get(name.text)
            if message is not None and known is None:
                self._fault(name, *_unknown_field(name.text, message))
            value = self.field(prefix, name, known, seen, depth)
            if name.text == "key":
                key = value
            if self._peek(",", ";"):
                self._take()

    def field(self, prefix: str, name: _Token, known: Any, seen: dict[str, int], depth: int) -> str:
        path = f"{prefix}.{name.text}" if prefix else name.text
        here = (name.line, name.column)
        self.found.positions.setdefault(path, here)
        colon = self._peek(":")
        if colon:
            self._take()
        repeated = known is not None and is_repeated(known)
        if known is not None and not repeated and name.text in seen:
            self._fault(name, f"'{name.text}' is given twice", "keep one of them")
        listed = colon and self._peek("[")
        if listed or self._peek("["):
            self._take()
            while not self._peek("]"):
                index = seen[name.text] = seen.get(name.text, -1) + 1
                token = self._next
                if token is None:
                    raise _Lost
                self.value(f"{path}[{index}]", (token.line, token.column), known, depth)
                if self._peek(","):
                    self._take()
                elif not self._peek("]"):
                    token = self._next
                    if token is not None:
                        self._fault(token, "expected ',' or ']' here", "separate the items of a list with commas")
            self._take()
            return ""
        index = seen[name.text] = seen.get(name.text, -1) + 1
        return self.value(f"{path}[{index}]" if repeated else path, here, known, depth)

    def value(self, path: str, here: tuple[int, int], known: Any, depth: int) -> str:
        self.found.positions.setdefault(path, here)
        token = self._take()
        message = None if known is None else known.message_type
        if token.text in _CLOSES:
            if known is not None and message is None:
                self._fault(token, f"'{known.name}' is not a message", f"write {known.name}: value")
            key = self.fields(path, message, _CLOSES[token.text], (token.line, token.column), depth + 1)
            if message is not None and message.GetOptions().map_entry:
                self._name_entry(path, key)
            return ""
        if token.kind == "mark":
            raise _Lost
        text = token.text
        while token.kind == "string" and self._next is not None and self._next.kind == "string":
            text = text[:-1] + self._take().text[1:]
        if message is not None:
            self._fault(token, f"'{known.name}' needs fields in braces", f"write {known.name} {{ … }}")
        elif known is not None:
            self._scalar(token, known)
        return text[1:-1] if token.kind == "string" else text

    def _scalar(self, token: _Token, known: Any) -> None:
        if known.enum_type is not None:
            if token.text not in known.enum_type.values_by_name and not token.text.lstrip("-").isdigit():
                names = [v.name for v in known.enum_type.values]
                fix = suggest(token.text.strip("\"'"), names) or f"one of {', '.join(names)}"
                if token.kind == "string" and token.text[1:-1] in names:
                    fix = f"write {token.text[1:-1]} without quotes"
                self._fault(token, f"'{known.name}' has no value named {token.text}", fix)
            return
        expected, pattern = _SCALARS[known.cpp_type]
        if not pattern.fullmatch(token.text):
            self._fault(token, f"'{known.name}' is {token.text}", f"expected {expected}")

    def _name_entry(self, path: str, key: str) -> None:
        """`parameters[0].value…` is `parameters["<key>"]…` as well."""
        named = f'{path.rsplit("[", 1)[0]}["{key}"]'
        value = f"{path}.value"
        for old, at in list(self.found.positions.items()):
            if old == path:
                self.found.positions.setdefault(named, at)
            elif old.startswith(value):
                self.found.positions.setdefault(named + old[len(value) :], at)


def _tokens(text: str) -> Iterator[_Token]:
    line, start = 1, 0  # of the current line
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "space":
            yield _Token(match.lastgroup or "", match.group(), line, match.start() - start + 1)
        newlines = match.group().count("\n")
        if newlines:
            line += newlines
            start = match.start() + match.group().rindex("\n") + 1


def _unknown_field(name: str, message: Any) -> tuple[str, str]:
    known = [f.name for f in message.fields]
    fix = suggest(name, known)
    if not fix:
        messages = list(message.file.message_types_by_name.values())
        homes = [m for m in messages if name in m.fields_by_name]
        where = sorted({f.name for m in messages for f in m.fields if f.message_type in homes})
        fix = f"it belongs inside {' or '.join(where)}" if where else f"its fields are {', '.join(sorted(known))}"
    return f"{message.name} has no field '{name}'", fix
