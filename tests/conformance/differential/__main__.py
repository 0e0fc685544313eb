"""`python tests/conformance/differential record | differences | document`.

record: asks a real Triton everything and keeps its answers. differences: asks Doorstep, and prints what no row of the
table covers. document: writes docs/compatibility.md anew.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from differential import document, recording
from differential.compare import load_table, problems
from differential.runner import gather
from differential.servers import start_doorstep, start_triton


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        answers = gather(start_triton, Path(folder))
    recording.save(answers)
    print(f"{len(answers)} answers in {recording.FILE}")


def differences() -> None:
    with tempfile.TemporaryDirectory() as folder:
        answers = gather(start_doorstep, Path(folder))
    found = problems(answers, recording.load(), load_table())
    print("\n".join(found))
    print(f"{len(found)} problems")


def write() -> None:
    document.FILE.write_text(document.render(document.FILE.read_text()))


COMMANDS = {"record": record, "differences": differences, "document": write}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]]()
