"""JSON as Triton's reader takes it (protobuf's, with its legacy syntax): names without quotes, texts in single ones,
and a comma after the last item. Knows no config.
"""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN = re.compile(
    r"""
      (?P<string>"(?:[^"\\]|\\.)*")
    | '(?P<single>(?:[^'\\]|\\.)*)'
    | (?P<name>[A-Za-z_$][\w$]*)(?=\s*:)
    | (?<![\[{,])(?P<comma>,)(?=\s*[}\]])
    """,
    re.VERBOSE | re.DOTALL,
)


def parse(text: str | bytes) -> Any:
    """Raises ValueError, with json's words about `text` as it is, where it cannot be read either way."""
    if isinstance(text, bytes):
        text = text.decode()
    try:
        return json.loads(text)
    except ValueError:
        strict = _TOKEN.sub(_strict, text)
        if strict == text:
            raise
        try:
            return json.loads(strict)
        except ValueError:
            pass
        raise


def _strict(found: re.Match[str]) -> str:
    if found["name"]:
        return f'"{found["name"]}"'
    if found["comma"]:
        return ""
    if found["single"] is not None:
        return '"' + re.sub(r'\\\'|(?<!\\)"', lambda m: "'" if m[0] == "\\'" else '\\"', found["single"]) + '"'
    return found[0]
