"""`doorstep serve MODELS/` or `doorstep serve model.gguf`: parses the options, sets up the log, runs the app. Knows no
protocol."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from doorstep.cli.bare_model import BareModel, recognise, repository_of, same_names
from doorstep.config.options import EXIT_BAD_OPTIONS, ServerOptions, parse_serve_args
from doorstep.errors import DoorstepError, InvalidArgument, Problem
from doorstep.repository.layout import mistaken, without_models

if TYPE_CHECKING:
    from doorstep.app import App

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
    bare, options = _bare_models(options)
    if bare is None or not _are_repositories(options):
        return EXIT_FAILED
    if not bare:
        return _serve(options, bare)
    with repository_of(bare) as folder:
        paths = (*options.model_repositories, str(folder))
        return _serve(replace(options, model_repositories=paths), bare, folder)


def _serve(options: ServerOptions, bare: Sequence[BareModel], temporary: Path | None = None) -> int:
    from doorstep import app

    def leave() -> None:  # where the process ends at once, as after a second Ctrl-C
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)

    return app.run(options, partial(_say_ready, bare=bare), leave)


def _bare_models(options: ServerOptions) -> tuple[list[BareModel] | None, ServerOptions]:
    """The models that are named as they are, and the options without them; None where something is wrong with one."""
    bare: list[BareModel] = []
    problems: list[Problem] = []
    repositories: list[str] = []
    for path in options.model_repositories:
        match recognise(Path(path)):
            case BareModel() as model:
                bare.append(model)
            case Problem() as problem:
                problems.append(problem)
            case None:
                repositories.append(path)
    if twice := same_names(bare):
        problems.append(twice)
    for problem in problems:
        logger.error("%s", problem)
    wanted = options.load_models
    if options.model_control_mode == "explicit" and wanted != ("*",):
        wanted = (*wanted, *(model.name for model in bare))  # whoever names a file wants it loaded
    return None if problems else bare, replace(options, model_repositories=tuple(repositories), load_models=wanted)


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


def _say_ready(app: object, bare: Sequence[BareModel]) -> None:
    """The last lines a person sees before the first request: where, and what to try."""
    from doorstep.app import App
    from doorstep.demo import CHAT, curl_lines, is_demo, language_model_line

    assert isinstance(app, App)
    http = next((listener for listener in app.listeners if listener.address.name == "http"), None)
    if http is None:
        return
    lines = [line for path in app.options.model_repositories for line in curl_lines(http.url, path)]
    chats = [CHAT for path in app.options.model_repositories if is_demo(path)]
    for model in bare:
        task = _task(app, model.name)
        if task:
            lines.append(language_model_line(http.url, model.name, task))
        if task == "generate":
            chats.append(model.name)
    if not app.options.allow_openai:
        lines = [line for line in lines if "/v1/" not in line]
    elif chats:
        lines.append(_chat_command(http.url, chats[0] if len(chats) > 1 else ""))
    if lines:
        print("\nTry it:\n", *(f"  {line}\n" for line in lines), sep="\n", flush=True)


def _task(app: App, name: str) -> str:
    """What a language model is for; "" where it is none that is ready."""
    from doorstep.backends.llm.settings import task_of
    from doorstep.scheduler.slots import SlotScheduler

    try:
        model = app.server.model(name)
    except DoorstepError:
        return ""
    return task_of(model.config.parameters) if isinstance(model.scheduler, SlotScheduler) else ""


def _chat_command(url: str, model: str) -> str:
    """As it can be typed here: a virtual environment that is not active is not on the PATH."""
    from doorstep.cli.remote import DEFAULT_URL

    own = Path(sys.argv[0])
    found = shutil.which("doorstep")
    known = found is not None and own.exists() and Path(found).samefile(own)
    command = "doorstep" if known or own.name != "doorstep" else str(own)
    return " ".join(filter(None, (command, "chat", model, "" if url == DEFAULT_URL else f"--url {url}")))
