"""The header `x-request-id`: by it a caller finds its request in our log, and the log's line finds the caller's.

Pure. What is supported: a request may carry `x-request-id` (1 to 128 visible ASCII characters; anything else is as if
it were not there). It is in the access log, unless the V2 request itself has an `id`, and answers made with
`with_request_id` echo it. None is made up for a request that has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from doorstep.wire.exchange import Headers

HEADER = b"x-request-id"
_VALID = re.compile(rb"[\x21-\x7e]{1,128}").fullmatch


def request_id(headers: Mapping[bytes, bytes]) -> bytes:
    """The caller's id, b"" without a usable one."""
    value = headers.get(HEADER)
    return value if value is not None and _VALID(value) else b""


def with_request_id(request_headers: Mapping[bytes, bytes], headers: Headers) -> Headers:
    """An answer's headers, with the request's id where it has one. Costs a look-up where it has none."""
    if HEADER not in request_headers:
        return headers
    value = request_id(request_headers)
    # A list, because the heads of answers whose headers are a tuple are kept for the next one.
    return [*headers, (HEADER, value)] if value else headers
