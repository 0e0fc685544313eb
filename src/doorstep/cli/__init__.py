"""`doorstep`: finds the subcommand and hands over. Imports nothing but the module of the one that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from doorstep._version import __version__

# command → (module, what it does)
COMMANDS = {
    "serve": ("doorstep.cli.serve", "serve a folder of models over HTTP and gRPC"),
    "check": ("doorstep.cli.check", "say what is wrong with a folder of models, without loading any"),
    "models": ("doorstep.cli.models", "list the models of a running server"),
    "infer": ("doorstep.cli.infer", "run one request, from a terminal"),
    "chat": ("doorstep.cli.chat", "talk with a language model of a running server"),
    "bench": ("doorstep.cli.bench", "measure a running server's rate and latency"),
    "demo": ("doorstep.cli.demo", "write a repository with real models to try"),
    "tritonserver": ("doorstep.cli.serve", "serve, for scripts that were written for tritonserver"),
}

_HELP = """\
usage: doorstep COMMAND [OPTIONS]

Turns a folder of models into a service. A first try, in three commands:

  doorstep demo demo-models          # fetch a few small models
  doorstep serve demo-models         # serve them; leave it running
  doorstep infer minilm text="Hello" # in another terminal; or: doorstep chat

A language model needs no folder: doorstep serve model.gguf

commands:
{commands}

`doorstep COMMAND --help` says more. `doorstep --version` says which this is.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 2 where the command line makes no sense."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[1] in COMMANDS:
            return main([arguments[1], "--help"])
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(f"doorstep {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        print(f"doorstep: {unknown(command)}", file=sys.stderr)
        return 2
    return _run(command, arguments[1:])


def help_text() -> str:
    width = max(map(len, COMMANDS))
    return _HELP.format(commands="\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()))


def unknown(command: str) -> str:
    """What to tell somebody who mistyped, or who left out the command."""
    import difflib

    if command.startswith("-"):
        return f"{command} must come after a command, as in `doorstep serve {command}`; see `doorstep --help`"
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f" Did you mean `doorstep {close[0]}`?" if close else f" There are: {', '.join(COMMANDS)}."
    return f"no command '{command}'.{hint}"


def _run(command: str, arguments: Sequence[str]) -> int:
    import importlib

    run = importlib.import_module(COMMANDS[command][0]).run
    try:
        return int(run(arguments, prog=f"doorstep {command}"))
    except KeyboardInterrupt:
        return 130  # as a shell reports a program that was interrupted
    except BrokenPipeError:
        return _closed_pipe()


def _closed_pipe() -> int:
    """Whoever read our output has seen enough (`doorstep models | head`). Nothing more is written, not even at exit."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
