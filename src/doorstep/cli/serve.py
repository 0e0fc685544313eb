"""`doorstep serve MODELS/`: parses the options, sets up the log, runs the app. Knows no protocol."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from doorstep.config.options import EXIT_BAD_OPTIONS, ServerOptions, parse_serve_args
from doorstep.errors import InvalidArgument
from doorstep.repository.layout import mistaken, without_models

logger = logging.getLogger("doorstep")
EXIT_FAILED = 1


def run(argv: Sequence[str], prog: str = "doorstep serve") -> int:
    options = parse_serve_args(argv, prog)
    from doorstep.observability.logging import set_up_logging

    try:
        set_up_logging(options)
    except InvalidArgument as error:
        print(f"{prog}: {error.message}", file=sys.stderr)
        return EXIT_BAD_OPTIONS
    for note in options.notes:
        logger.warning("%s", note)
    if not _are_repositories(options):
        return EXIT_FAILED
    from doorstep import app

    return app.run(options, _say_ready)


def _are_repositories(options: ServerOptions) -> bool:
    """False where a path is none, which is an error; a repository without models may get them later."""
    paths = [Path(path) for path in options.model_repositories]
    errors = [what for path in paths if (what := mistaken(path)) is not None]
    for what in errors:
        logger.error("%s", what)
    if not errors and options.model_control_mode == "none":
        for what in filter(None, map(without_models, paths)):
            logger.warning("%s", what)
    return not errors


def _say_ready(app: object) -> None:
    """The last lines a person sees before the first request: where, and what to try."""
    from doorstep.app import App
    from doorstep.demo import curl_lines

    assert isinstance(app, App)
    http = next((listener for listener in app.listeners if listener.address.name == "http"), None)
    if http is None:
        return
    lines = [line for path in app.options.model_repositories for line in curl_lines(http.url, path)]
    if lines:
        print("\nTry it:\n", *(f"  {line}\n" for line in lines), sep="\n", flush=True)
