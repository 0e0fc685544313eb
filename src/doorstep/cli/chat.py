"""`doorstep chat [MODEL]`: a conversation with a language model, in a terminal or through a pipe. Knows no protocol;
chat_stream.py does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from doorstep.cli.chat_stream import ChatServer, Figures, Piece
from doorstep.cli.remote import add_server_options, headers_of, reporting_errors, tls_of
from doorstep.errors import DoorstepError, InvalidArgument, NotFound

if TYPE_CHECKING:
    from rich.console import Console

_EXAMPLES = """\
examples:
  doorstep chat
  doorstep chat --system "Answer in one sentence." -m "Why is the sky blue?"
  git diff | doorstep chat --system "Write a commit message for this."

In a conversation: /reset begins anew, /exit or Ctrl-D ends it, Ctrl-C stops the answer.
"""
# What would steer the terminal instead of being read; line breaks and tabs are text.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def run(argv: Sequence[str], prog: str = "doorstep chat") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Chat with a language model of a running server. With -m, or where text is piped in, it answers "
        "once: the answer on standard output, its figures on standard error.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="", help="its name (default: the only one that generates text)")
    parser.add_argument("-m", "--message", metavar="TEXT", help="ask this and end")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of one answer at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest word")
    add_server_options(parser)
    given = parser.parse_args(argv)
    return reporting_errors(prog, lambda: _chat(given, prog))


def _chat(given: argparse.Namespace, prog: str) -> int:
    server = ChatServer(given.url, timeout=given.timeout, headers=headers_of(given), tls=tls_of(given))
    talks = given.message is None and sys.stdin.isatty() and sys.stdout.isatty()
    message = "" if talks else _message(given.message)
    options = {"max_tokens": given.max_tokens, "temperature": given.temperature}
    conversation = Conversation(
        server,
        choose_model(server.models(), given.model, server.url),
        given.system,
        {name: value for name, value in options.items() if value is not None},
    )
    return _talk(conversation, prog) if talks else _answer_once(conversation, message)


def _message(given: str | None) -> str:
    text = sys.stdin.read() if given is None else given
    if not text.strip():
        raise InvalidArgument('there is nothing to answer; give -m "some text", or pipe it in')
    return text


def choose_model(listed: Sequence[Mapping[str, Any]], wanted: str, url: str) -> str:
    """`wanted`, or without it the only model that generates text. Raises NotFound, with what there is."""
    # Other servers of this API do not say a task; adapters are their models' children.
    tasks = {str(entry.get("id")): str(entry.get("task", "generate")) for entry in listed if not entry.get("parent")}
    known = {str(entry.get("id")) for entry in listed}
    if wanted in known or wanted.rpartition(":")[0] in known:  # model:adapter is a name, too
        return wanted
    names = [name for name, task in tasks.items() if task == "generate"]
    others = [f"{name} ({task})" for name, task in tasks.items() if task != "generate"]
    there = f"; there are: {', '.join([*names, *others])}" if listed else ""
    if wanted:
        raise NotFound(f"{url} has no model '{wanted}'{there}")
    if not names:
        raise NotFound(f"{url} has no model that generates text{there}")
    if len(names) > 1:
        raise NotFound(f"{url} has several models that generate text; name one: {', '.join(names)}")
    return names[0]


@dataclass(slots=True)
class Conversation:
    """What was said so far, and how to go on."""

    server: ChatServer
    model: str
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    said: list[dict[str, str]] = field(default_factory=list)

    def ask(self, message: str, show: Callable[[Piece], None]) -> tuple[Figures, str]:
        """Gives each piece to `show`; returns the figures, and why the answer ended: stop, length, or stopped after
        a Ctrl-C. What was answered until then is remembered; a question without an answer is not.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.said, {"role": "user", "content": message}]
        body = {"model": self.model, "messages": [*system, *asked], **self.options}
        figures = Figures(self.server.clock())
        answer, finish = "", ""
        try:
            with closing(self.server.ask(body)) as pieces:
                for piece in pieces:
                    figures.note(piece, self.server.clock())
                    answer += piece.text
                    finish = piece.finish or finish
                    show(piece)
        except KeyboardInterrupt:
            finish = "stopped"
        if answer:
            self.said = [*asked, {"role": "assistant", "content": answer}]
        return figures, finish


# Once


def _answer_once(conversation: Conversation, message: str) -> int:
    clean = sys.stdout.isatty()
    begun = False

    def show(piece: Piece) -> None:
        nonlocal begun
        begun = begun or bool(piece.text)
        sys.stdout.write(piece.text.translate(_CONTROL) if clean else piece.text)
        sys.stdout.flush()

    try:
        figures, finish = conversation.ask(message, show)
    finally:
        if begun:
            print(flush=True)
    if finish == "stopped":
        raise KeyboardInterrupt
    print(_closing(figures, finish), file=sys.stderr)
    return 0


def _closing(figures: Figures, finish: str) -> str:
    notes = {"length": "; cut off by its limit of tokens", "stopped": "; stopped"}
    return f"{figures}{notes.get(finish, '')}"


# In a terminal


def _talk(conversation: Conversation, prog: str) -> int:
    from rich.console import Console

    _edit_lines()
    console = Console(highlight=False)
    console.print(f"[bold]{_escaped(conversation.model)}[/] [dim]at {conversation.server.url}[/]")
    console.print("[dim]/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer[/]")
    code = 0
    while True:
        console.print()
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return code
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /exit ends[/]")
            continue
        if line in ("/exit", "/quit"):
            return code
        if line == "/reset":
            conversation.said = []
            console.print("[dim]begun anew[/]")
        elif line.startswith("/") and " " not in line:
            console.print(f"[dim]there is no {_escaped(line)}; there are /reset and /exit[/]")
        elif line:
            code = _turn(conversation, line, console, prog)


def _turn(conversation: Conversation, message: str, console: Console, prog: str) -> int:
    """One question and its answer. An error is told, and the conversation may go on."""
    column = 0

    def show(piece: Piece) -> None:
        nonlocal column
        for text, style in ((piece.reasoning, "dim italic"), (piece.text, "")):
            if text:
                console.print(text.translate(_CONTROL), end="", style=style, markup=False, emoji=False, soft_wrap=True)
                column = 0 if text.endswith("\n") else 1

    try:
        figures, finish = conversation.ask(message, show)
    except DoorstepError as error:
        console.print("\n" * column + f"[red]{prog}: {_escaped(str(error))}[/]")
        return 1
    console.print("\n" * column + f"[dim]{_closing(figures, finish)}[/]")
    return 0


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text.translate(_CONTROL))


def _edit_lines() -> None:
    """Arrow keys and a history, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        pass
