"""`doorstep models`: what a running server has loaded, what each model takes and gives, and how much it was used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from doorstep.cli.remote import add_server_options, make_client, reporting_errors
from doorstep.client.sync import Client
from doorstep.errors import DoorstepError


@dataclass(slots=True)
class Row:
    name: str
    version: str = ""
    state: str = ""
    reason: str = ""
    platform: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    mean_ms: float | None = None  # of a request, from arrival to answer


def run(argv: Sequence[str], prog: str = "doorstep models") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="List the models of a running server.")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    add_server_options(parser)
    given = parser.parse_args(argv)
    return reporting_errors(prog, lambda: _models(given))


def _models(given: argparse.Namespace) -> int:
    with make_client(given) as client:
        rows = read_rows(client)
    if given.json:
        document = orjson.dumps([asdict(row) for row in rows], option=orjson.OPT_INDENT_2)
        sys.stdout.write(document.decode() + "\n")
    elif not rows:
        print(f"{given.url} has no models.")
    else:
        show(rows)
    return 0


def read_rows(client: Client) -> list[Row]:
    """One row per line of the repository's index; what a model has to say is added where it is ready."""
    rows = []
    for entry in client.models():
        row = Row(entry["name"], entry.get("version", ""), entry.get("state", ""), entry.get("reason", ""))
        rows.append(row)
        if row.state != "READY":
            continue
        try:
            _describe(row, client.metadata(row.name, row.version), client.statistics(row.name, row.version))
        except DoorstepError as error:  # unloaded since
            row.reason = row.reason or str(error)
    return rows


def _describe(row: Row, metadata: Mapping[str, Any], statistics: Sequence[Mapping[str, Any]]) -> None:
    row.platform = metadata.get("platform", "")
    row.inputs = [_tensor(spec) for spec in metadata["inputs"]]
    row.outputs = [_tensor(spec) for spec in metadata["outputs"]]
    for entry in statistics:
        success, fail = entry["inference_stats"]["success"], entry["inference_stats"]["fail"]
        row.requests += int(success["count"]) + int(fail["count"])
        row.failed += int(fail["count"])
        if int(success["count"]):
            row.mean_ms = round(int(success["ns"]) / int(success["count"]) / 1e6, 3)


def _tensor(spec: Mapping[str, Any]) -> str:
    shape = ",".join("?" if int(dim) < 0 else str(dim) for dim in spec["shape"])
    return f"{spec['name']} {spec['datatype']}[{shape}]"


def show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MODEL", overflow="fold")
    table.add_column("VERSION", overflow="fold")
    table.add_column("STATE", overflow="fold")
    table.add_column("INPUTS", overflow="fold")
    table.add_column("OUTPUTS", overflow="fold")
    table.add_column("REQUESTS", justify="right")
    table.add_column("MEAN", justify="right")
    for row in rows:
        state = f"[green]{row.state}[/]" if row.state == "READY" else f"[red]{row.state or 'not loaded'}[/]"
        table.add_row(
            escape(row.name),
            row.version,
            state if row.state == "READY" or not row.reason else f"{state} {escape(row.reason)}",
            escape("\n".join(row.inputs)),
            escape("\n".join(row.outputs)),
            f"{row.requests:,}" + (f" ({row.failed:,} failed)" if row.failed else ""),
            "" if row.mean_ms is None else f"{row.mean_ms:.2f} ms",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has none of its own
    console.print(table)
