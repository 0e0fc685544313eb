"""What a real Triton answered, kept in a file, so that Doorstep is compared with it where there is no Triton."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from .wire import Answer

FILE = Path(__file__).with_name("triton_answers.json.gz")


def load() -> dict[str, Answer]:
    return dict(json.loads(gzip.decompress(FILE.read_bytes())))


def save(answers: dict[str, Answer]) -> None:
    text = json.dumps(answers, ensure_ascii=False, sort_keys=True, indent=0)
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))
