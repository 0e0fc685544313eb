"""What README.md and docs/ show is what happens, and the reference tables are the program's own.

How a document is run, top to bottom, in an empty folder of its own:

- A block whose first line is a comment with a path (`# models/shout/1/model.py`) is that file.
- Lines that begin with `$ ` are commands; what follows each, up to the next, is its output. `…` stands for anything.
- `doorstep serve` starts the document's server (and stops the one before); its lines are the beginning of its log.
- Any other block of Python is a client program and must run. Fragments are marked `py`, not `python`.

Ports 8000, 8001 and 8002 stand for free ones.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.app import Exit
from doorstep.config.option_table import OPTIONS, RESTRICTED_CATEGORIES, Status
from doorstep.config.support import WITHOUT_EFFECT
from doorstep.testing.server import ManagedProcess, doorstep_command, free_ports
from doorstep.wire.limits import WireLimits

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md", "docs/models.md", "docs/python-models.md", "docs/adding-a-backend.md", "docs/operations.md",
    "docs/configuration.md", "docs/response-cache.md", "docs/shared-memory.md", "docs/streaming.md",
    "docs/sequences.md", "docs/migrating-from-triton.md", "docs/ensembles.md",
    "docs/observability.md", "docs/language-models.md",
)  # fmt: skip
SECONDS = 60
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH_COMMENT = re.compile(r"# ([\w./-]+\.(?:py|pbtxt|txt|json|toml))\n")


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCE.findall((ROOT / document).read_text())


class Run:
    """One document's folder and server. `files` lie in the folder, as what a reader would have downloaded."""

    def __init__(self, folder: Path, *files: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(("8000", "8001", "8002"), map(str, free_ports(3)), strict=True))
        self.server: ManagedProcess | None = None
        self.wanted: list[str] = []  # the command line of a server not started yet
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DOORSTEP_URL": f"http://127.0.0.1:{self.ports['8000']}",
            "COLUMNS": "120",
            "NO_PROXY": "*",
            # What a document installs goes into the test's folder, built with what is here.
            "PIP_TARGET": str(folder / "site"),
            "PYTHONPATH": str(folder / "site"),
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's word for "without"
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }
        for path in (ROOT / "examples", ROOT / "README.md", *files):
            (folder / path.name).symlink_to(path)

    def real(self, text: str) -> str:
        return re.sub(r"\b800[012]\b", lambda m: self.ports[m[0]], text)

    def shown(self, text: str) -> str:
        for told, real in self.ports.items():
            text = re.sub(rf"\b{real}\b", told, text)
        return text

    def write(self, path: str, text: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def serve(self, command: str) -> str:
        """Starts the server; gives its log up to the last line of its start, or all it said if it would not."""
        self.stop()
        arguments = shlex.split(self.real(command).replace("\\\n", " "))[1:]
        for option, port in zip(("http", "grpc", "metrics"), self.ports.values(), strict=True):
            if not any(a.startswith(f"--{option}-port") for a in arguments):
                arguments.append(f"--{option}-port={port}")
        self.server = ManagedProcess([*doorstep_command(), *arguments], ready_url="", cwd=self.folder, env=self.env)
        self.server.launch()
        turn = threading.Event()
        for _ in range(SECONDS * 50):
            if "metrics on" in self.server.logs() or not self.server.running:
                break
            turn.wait(0.02)
        if not self.server.running:
            said = self.server.logs()
            self.server.log_path.unlink()
            self.server = None
            return said
        return self.server.logs()

    def started(self) -> None:
        if self.wanted:
            command, self.wanted = self.wanted[0], []
            self.serve(command)
            assert self.server is not None, f"{command} did not start"

    def command(self, command: str) -> str:
        if serves(command):
            return self.shown(self.serve(command))
        self.started()
        done = subprocess.run(
            ["bash", "-c", self.real(command)], cwd=self.folder, env=self.env, text=True, timeout=SECONDS, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return self.shown(done.stdout)

    def python(self, text: str) -> None:
        self.started()
        done = subprocess.run(
            [sys.executable, "-c", self.real(text)], cwd=self.folder, env=self.env, text=True, timeout=SECONDS,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stderr}"

    def stop(self) -> None:
        if self.server is not None:
            with self.server_to_stop() as server:
                assert server.stop() == 0, server.logs()

    def server_to_stop(self) -> Any:
        server, self.server = self.server, None

        class Stopping:
            def __enter__(self) -> ManagedProcess:
                assert server is not None
                return server

            def __exit__(self, *_: object) -> None:
                assert server is not None
                server.kill()
                server.log_path.unlink(missing_ok=True)

        return Stopping()


def commands(block: str) -> Iterator[tuple[str, str]]:
    """(command, expected output) of a block of `$ ` lines; a command may go on behind a backslash."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.split("\n")
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield "\n".join(lines[:count]), "\n".join(lines[count:]).strip()


def serves(command: str) -> bool:
    return command.startswith("doorstep serve") and ";" not in command  # `…; echo $?` is one that ends


def matches(expected: str, found: str, *, beginning: bool = False) -> bool:
    pattern = ".*?".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern + (".*" if beginning else r"\s*"), found.strip(), re.DOTALL) is not None


@pytest.fixture
def folder(tmp_path: Path, smollm2: Path) -> Iterator[Run]:
    run = Run(tmp_path, smollm2)
    try:
        yield run
    finally:
        if run.server is not None:
            run.server.kill()
            run.server.log_path.unlink(missing_ok=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_shows_is_what_happens(folder: Run, document: str) -> None:
    needed = {word for _, text in blocks(document) for word in ("curl", "openssl") if f"$ {word}" in text}
    if missing := {program for program in needed if shutil.which(program) is None}:
        pytest.skip(f"not installed: {', '.join(missing)}")
    ran = 0
    for language, text in blocks(document):
        path = PATH_COMMENT.match(text)
        if path:
            folder.write(path[1], text)
        elif text.startswith("$ "):
            for command, expected in commands(text):
                found = folder.command(command)
                serving = serves(command) and folder.server is not None
                assert matches(expected, found, beginning=serving), f"$ {command}\n{found}\n--- expected\n{expected}"
                ran += 1
        elif text.startswith("doorstep serve") and text.count("\n") == 1:
            folder.wanted = [text.strip()]
        elif language == "python":
            folder.python(text)
            ran += 1
    folder.stop()
    assert ran or document == "docs/configuration.md"


@pytest.mark.parametrize("document", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
def test_every_fragment_is_at_least_well_formed(document: str) -> None:
    for language, text in blocks(document):
        if language in ("python", "py"):
            compile(text, document, "exec")
        elif language == "pbtxt":
            text_format.Parse(text, proto.ModelConfig())
        assert language in ("", "python", "py", "pbtxt", "console", "sh", "json", "text"), language


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        "examples/README.md",
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
    ],
)
def test_every_link_leads_somewhere(document: str) -> None:
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", (ROOT / document).read_text()):
        if "://" in target:
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), target
        assert not heading or heading in anchors(path), f"{target}#{heading}"


def anchors(path: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The reference tables of docs/configuration.md

REFERENCE = (ROOT / "docs/configuration.md").read_text() if (ROOT / "docs/configuration.md").exists() else ""


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables under a heading of the second order, without their heads."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    lines = [line for line in section[1].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def config_fields(descriptor: Any = proto.ModelConfig.DESCRIPTOR, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, status, why) of every field a config.pbtxt can have; not looked into where it has none."""
    without = {missing.path: missing.why for missing in WITHOUT_EFFECT}
    for field in descriptor.fields:
        path = prefix + field.name
        nested = field.message_type
        if path in without:
            yield path, "no effect", without[path]
        elif nested is not None and not nested.GetOptions().map_entry:
            yield from config_fields(nested, f"{path}.")
        else:
            yield path, "", ""


def test_every_field_of_config_pbtxt_has_its_row_and_the_row_is_true() -> None:
    found = {cells[0].strip("`"): cells[1:] for cells in rows("Fields of config.pbtxt")}
    expected = {path: (status, why) for path, status, why in config_fields()}
    assert sorted(found) == sorted(expected)
    for path, (status, why) in expected.items():
        assert found[path][0] == status, path
        assert why in found[path][1], path


def option_row(option: Any) -> list[str]:
    """What the row of an option says."""
    default = option.default
    shown = (
        str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
    )
    says = option.help
    if option.status is Status.WITHOUT_EFFECT:
        says = f"no effect: {option.why}"
    if option.instead:
        says += f" Write `{option.instead}`."
    return [f"`--{option.name}`", "" if shown is None else str(shown), says]


GROUPS = list(dict.fromkeys(option.group for option in OPTIONS))


def option_tables() -> str:
    """The section as it should be."""
    lines = []
    for group in GROUPS:
        lines += [f"### {group}", "", "| option | default | |", "|---|---|---|"]
        lines += ["| " + " | ".join(option_row(option)) + " |" for option in OPTIONS if option.group == group]
        lines.append("")
    return "\n".join(lines)


def test_every_option_of_serve_has_its_row_and_the_row_is_true() -> None:
    expected = [option_row(option) for group in GROUPS for option in OPTIONS if option.group == group]
    assert rows("Options of doorstep serve") == expected


def test_operations_lists_every_exit_code_limit_and_category() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    for code in Exit:
        assert re.search(rf"^\| {int(code)} \| ", text, re.MULTILINE), code
    for category in RESTRICTED_CATEGORIES:
        assert f"`{category}`" in text
    options = {o.target.partition(".")[2]: o for o in OPTIONS if o.target.startswith("limits.")}
    for name, default in ((n, getattr(WireLimits(), n)) for n in WireLimits.__dataclass_fields__):
        if name in options:
            assert f"`--{options[name].name}`" in text, name
            assert options[name].default == default, name


if __name__ == "__main__":  # writes the tables of options into the document
    kept, _, _ = REFERENCE.partition("### Models\n")
    (ROOT / "docs/configuration.md").write_text(kept + option_tables().rstrip() + "\n")
