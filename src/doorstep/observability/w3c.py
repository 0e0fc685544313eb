"""W3C trace context: the headers by which a caller says which trace a request belongs to. Knows no span."""

from __future__ import annotations

import re
from collections.abc import Mapping

from doorstep.trace import SpanContext

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LONGEST_STATE = 512  # characters; the standard asks for as many to be passed on


def parse_context(headers: Mapping[bytes, bytes]) -> SpanContext | None:
    """None where there is none, or none that the standard allows."""
    found = headers.get(b"traceparent")
    if found is None:
        return None
    match = _TRACEPARENT.fullmatch(found.strip())
    if match is None:
        return None
    version, trace_id, span_id, _, rest = match.groups()
    if version == b"ff" or (version == b"00" and rest) or not trace_id.strip(b"0") or not span_id.strip(b"0"):
        return None
    state = headers.get(b"tracestate", b"").strip()
    if len(state) > _LONGEST_STATE or not state.isascii():
        state = b""
    return SpanContext(trace_id.decode(), span_id.decode(), tracestate=state.decode())
