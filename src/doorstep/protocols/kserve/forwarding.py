"""Which headers of a client become parameters of its requests: --http-header-forward-pattern and gRPC's. Pure.

The pattern may match anywhere in a header's name (RE2's PartialMatch), whatever its case. Names are as the client
spells them, and so models see them, as in Triton; over HTTP/2 that is in lower case. Long names are never looked at,
and a name seen before is not matched again.
"""

from __future__ import annotations

import re
from binascii import Error as NotBase64
from binascii import a2b_base64
from collections.abc import Mapping

from doorstep.config.header_pattern import compile_pattern
from doorstep.errors import InvalidArgument
from doorstep.request import InferenceRequest, Parameter
from doorstep.wire.exchange import SpelledHeaders

# server, common.h: kReservedParameterKeys
RESERVED = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
LONGEST_NAME = 128  # bytes; no header that is meant for a model has a longer name
_KEPT = 1024  # names, in all

# What gRPC itself sends, and does not show to its servers as metadata.
_GRPCS_OWN = re.compile(r":.*|grpc-.*|te|content-type")


class HeaderForwarding:
    """Touched only from the event loop."""

    __slots__ = ("_known", "_pattern")

    def __init__(self, pattern: str) -> None:
        """Raises InvalidArgument for a pattern that cannot be used."""
        self._pattern = compile_pattern(pattern)
        self._known: dict[bytes, str | None] = {}  # a header's name → that of its parameter; None: not forwarded

    def apply(self, request: InferenceRequest, headers: Mapping[bytes, bytes], *, grpc: bool = False) -> None:
        """Adds the headers that match to the request's parameters. Raises InvalidArgument for reserved names."""
        known = self._known
        found: dict[str, Parameter] = {}
        spelled = headers.spelled if type(headers) is SpelledHeaders else None
        for name, value in headers.items():
            if spelled:
                name = spelled.get(name, name)
            try:
                key = known[name]
            except KeyError:
                key = self._look(name)
            if key is None or (grpc and _GRPCS_OWN.fullmatch(key)):
                continue
            if (lower := key.lower()) in RESERVED or lower.startswith("triton_"):
                raise InvalidArgument(f"Header '{key}' is reserved for Triton usage and cannot be forwarded.")
            found[key] = _text(value, binary=grpc and key.endswith("-bin"))
        if found:
            request.parameters = {**request.parameters, **found} if request.parameters else found

    def _look(self, name: bytes) -> str | None:
        if len(name) > LONGEST_NAME:
            return None
        text = name.decode("latin-1")
        key = text if self._pattern.search(text) else None
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[name] = key
        return key


def _text(value: bytes, *, binary: bool) -> str:
    if binary:
        try:
            value = a2b_base64(value + b"=" * (-len(value) % 4))
        except NotBase64:
            pass
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
