"""`doorstep infer MODEL [name=value …]`: one request from a terminal. Knows no protocol; the client does."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from doorstep.cli.remote import add_server_options, make_client, reporting_errors
from doorstep.cli.values import HELP, parse_inputs
from doorstep.client.sync import Client
from doorstep.errors import DoorstepError, InvalidArgument, NotFound
from doorstep.types import Array, datatype_of

_EXAMPLES = """\
examples:
  doorstep infer minilm text="A cat sat on the mat."
  doorstep infer magika file=@photo.png
  doorstep infer mlp input=[[1,2,3,4]] --json
  echo "some text" | doorstep infer magika @-
"""


def run(argv: Sequence[str], prog: str = "doorstep infer") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run one inference on a running server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the model's name, or name:version")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help=HELP.replace("%", "%%"))
    parser.add_argument("--output", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object: output name → nested lists")
    shown.add_argument("--raw", action="store_true", help="write the one output's bytes as they are")
    parser.add_argument("--full", action="store_true", help="print arrays whole, however large")
    parser.add_argument("--id", default="", help="the request's id")
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the request: priority=1, sequence_id=7, sequence_start=true …; repeatable",
    )
    add_server_options(parser)
    given = parser.parse_intermixed_args(argv)
    return reporting_errors(prog, lambda: _infer(given))


def _infer(given: argparse.Namespace) -> int:
    name, _, version = given.model.partition(":")
    with make_client(given) as client:
        metadata = _metadata(client, name, version)
        values = parse_inputs(given.inputs, metadata)
        began = time.perf_counter()
        try:
            outputs = client.infer_all(
                name,
                values,
                model_version=version,
                requested=given.output,
                request_id=given.id,
                parameters=parse_parameters(given.parameter),
            )
        except DoorstepError as error:
            advice = _advice(error.message, f"{given.url}/v2/models/{given.model.replace(':', '/versions/')}")
            raise DoorstepError(error.message + advice) from None
        took_ms = (time.perf_counter() - began) * 1e3
    if given.json:
        sys.stdout.write(as_json(outputs) + "\n")
    elif given.raw:
        sys.stdout.buffer.write(as_raw(outputs))
    else:
        print(as_text(outputs, full=given.full))
        if sys.stdout.isatty():
            print(f"\n{took_ms:.1f} ms")
    sys.stdout.flush()
    return 0


def parse_parameters(given: Sequence[str]) -> dict[str, bool | int | float | str]:
    """A value that is a number, true or false in JSON is that; any other is a text."""
    parameters: dict[str, bool | int | float | str] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise InvalidArgument(f"--parameter {item}: write NAME=VALUE")
        try:
            value = orjson.loads(text)
        except ValueError:
            value = text
        parameters[name] = value if isinstance(value, bool | int | float) else text
    return parameters


def _advice(message: str, model_url: str) -> str:
    """What to do from a terminal about two kinds of model that one call is not enough for."""
    if "decoupled transaction policy" in message:
        return f" (its responses come one by one: curl -sN {model_url}/generate_stream -d '{{\"<input>\": …}}')"
    if "correlation ID" in message or "must specify the START flag" in message:
        return " (--parameter sequence_id=7 --parameter sequence_start=true begins one)"
    return ""


def _metadata(client: Client, name: str, version: str) -> Any:
    try:
        return client.metadata(name, version)
    except NotFound as error:
        entries = client.models()
        for entry in entries:
            if entry["name"] == name and entry.get("reason") and version in ("", entry.get("version")):
                raise NotFound(f"model '{name}' is not served: {entry['reason']}") from None
        versions = [entry["version"] for entry in entries if entry["name"] == name and entry.get("state") == "READY"]
        if versions:
            raise NotFound(f"{error} (there are versions {', '.join(versions)})") from None
        names = sorted({entry["name"] for entry in entries})
        raise NotFound(f"{error} (there are: {', '.join(names) or 'none'})") from None


def as_json(outputs: Mapping[str, Array]) -> str:
    """Bytes that are no text become {"base64": …}."""
    plain = {name: _plain(array.tolist()) for name, array in outputs.items()}
    return orjson.dumps(plain, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            from base64 import b64encode

            return {"base64": b64encode(value).decode()}
    return value


def as_raw(outputs: Mapping[str, Array]) -> bytes:
    if len(outputs) != 1:
        raise InvalidArgument(f"--raw wants one output; choose with --output: {', '.join(outputs)}")
    (array,) = outputs.values()
    if array.dtype.hasobject:
        return b"".join(array.ravel().tolist())
    return array.tobytes()


def as_text(outputs: Mapping[str, Array], *, full: bool = False) -> str:
    return "\n".join(_output(name, array, full) for name, array in outputs.items())


def _output(name: str, array: Array, full: bool) -> str:
    head = f"{name}  {datatype_of(array)} {list(array.shape)}"
    if array.dtype.hasobject:
        shown = np.array([_quoted(item, full) for item in array.ravel().tolist()], dtype=object).reshape(array.shape)
        if array.size == 1:
            return f"{head}  {shown.reshape(-1)[0]}"
        body = np.array2string(shown, threshold=sys.maxsize if full else 20, formatter={"all": str}, max_line_width=100)
        return f"{head}\n{body}"
    if array.size == 1:
        return f"{head}  {array.reshape(-1)[0]}"
    numbers = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16
    body = np.array2string(numbers, threshold=sys.maxsize if full else 60, edgeitems=4, max_line_width=100, precision=6)
    return f"{head}\n{body}"


def _quoted(item: bytes, full: bool) -> str:
    """As text where it is text, cut where it is long."""
    limit = None if full else 200
    text = item[:limit].decode(errors="replace") if _is_text(item) else str(item[:limit])
    cut = "" if limit is None or len(item) <= limit else f"… ({len(item)} bytes)"
    return (orjson.dumps(text).decode() if _is_text(item) else text) + cut


def _is_text(item: bytes) -> bool:
    try:
        item.decode()
    except UnicodeDecodeError:
        return False
    return True
