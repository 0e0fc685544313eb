"""`python tests/conformance/differential record`: asks a real Triton everything and keeps its answers."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from differential import recording
from differential.runner import gather
from differential.servers import start_triton


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        answers = gather(start_triton, Path(folder))
    recording.save(answers)
    print(f"{len(answers)} answers in {recording.FILE}")


{"record": record}[sys.argv[1]]()
