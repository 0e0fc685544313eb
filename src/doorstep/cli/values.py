"""Inputs from a command line: `name=text`, `name=[1,2]`, `name=@file`. Knows no server, only a model's metadata."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from doorstep.client.tensors import describe_inputs
from doorstep.errors import InvalidArgument

HELP = (
    "name=value (text, a number, or JSON such as [[1,2],[3,4]]), name=@FILE (bytes; numbers from .npy or .json), "
    "name=@- (standard input); without name= where the model has one input"
)


def parse_inputs(items: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Input name → value. Raises InvalidArgument, with the inputs there are."""
    datatypes = {spec["name"]: str(spec["datatype"]) for spec in metadata["inputs"]}
    found: dict[str, Any] = {}
    for item in items:
        name, value = _split(item, datatypes, metadata)
        if name in found:
            raise InvalidArgument(f"input '{name}' is given twice")
        found[name] = _value(name, datatypes[name], value)
    missing = [spec["name"] for spec in metadata["inputs"] if spec["name"] not in found]
    if missing and not found:
        raise InvalidArgument(f"model '{metadata['name']}' wants inputs; {describe_inputs(metadata)}. Give {HELP}")
    return found


def _split(item: str, datatypes: Mapping[str, str], metadata: Mapping[str, Any]) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if equals and name in datatypes:
        return name, value
    if len(datatypes) == 1 and not (equals and name.isidentifier()):
        return next(iter(datatypes)), item
    if equals:
        raise InvalidArgument(f"model '{metadata['name']}' has no input '{name}'; {describe_inputs(metadata)}")
    raise InvalidArgument(f"'{item}' names no input: write name=value; {describe_inputs(metadata)}")


def _value(name: str, datatype: str, text: str) -> Any:
    if text.startswith("@@"):
        text = text[1:]  # a text that begins with @
    elif text.startswith("@"):
        return _from_file(name, datatype, text[1:])
    if datatype == "BYTES":
        return _text_or_list(text)
    return _numbers(name, datatype, text)


def _from_file(name: str, datatype: str, path: str) -> Any:
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InvalidArgument(f"input '{name}': cannot read {path}: {error.strerror}") from None
    if content.startswith(b"\x93NUMPY") and (datatype != "BYTES" or path.endswith(".npy")):
        return _from_npy(name, path)
    if datatype == "BYTES":
        return content
    try:
        return orjson.loads(content)
    except ValueError:
        raise InvalidArgument(
            f"input '{name}' takes {datatype}: {path} must be a .npy file (numpy.save) or hold JSON"
        ) from None


def _from_npy(name: str, path: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InvalidArgument(f"input '{name}': {path}: {error}") from None


def _text_or_list(text: str) -> Any:
    """A JSON list of strings is several elements; anything else is one."""
    if text.startswith("["):
        try:
            value = orjson.loads(text)
        except ValueError:
            return text
        if _only_strings(value):
            return value
    return text


def _only_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_only_strings, value)))


def _numbers(name: str, datatype: str, text: str) -> Any:
    for candidate in (text, f"[{text}]"):
        try:
            return orjson.loads(candidate)
        except ValueError:
            continue
    raise InvalidArgument(
        f"input '{name}' takes {datatype}: '{text:.40}' is neither a number nor JSON such as [[1,2],[3,4]]"
    )
