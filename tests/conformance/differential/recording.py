"""What a real Triton answered, kept in a file, so that Doorstep is compared with it where there is no Triton."""

from __future__ import annotations

import json
from pathlib import Path

from .wire import Answer

FILE = Path(__file__).with_name("triton_answers.jsonl")  # a line a case: [identifier, answer]


def load() -> dict[str, Answer]:
    return dict(json.loads(line) for line in FILE.read_text().splitlines())


def save(answers: dict[str, Answer]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) for row in answers.items())
    FILE.write_text("\n".join(lines) + "\n")
