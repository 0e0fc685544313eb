"""`doorstep serve MODELS/`: parses the options, sets up the log, runs the app. Knows no protocol."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from doorstep.config.options import EXIT_BAD_OPTIONS, parse_serve_args
from doorstep.errors import InvalidArgument


def run(argv: Sequence[str], prog: str = "doorstep serve") -> int:
    options = parse_serve_args(argv, prog)
    from doorstep.observability.logging import set_up_logging

    try:
        set_up_logging(options)
    except InvalidArgument as error:
        print(f"{prog}: {error.message}", file=sys.stderr)
        return EXIT_BAD_OPTIONS
    from doorstep import app

    return app.run(options, _say_ready)


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
