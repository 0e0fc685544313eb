"""`doorstep bench MODEL`: measures a running server's rate and latency, from processes of its own.

Reads the options, asks the server about the model, makes one request of it, and lets runner.py send it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from doorstep.cli.bench.payload import grpc_message, http_request, make_tensors, parse_shapes
from doorstep.cli.bench.plan import Plan, Tls
from doorstep.cli.remote import reporting_errors
from doorstep.cli.values import HELP, parse_inputs
from doorstep.client.connect import Target
from doorstep.client.sync import Client
from doorstep.errors import DoorstepError, InvalidArgument
from doorstep.types import Tensor

_EXAMPLES = """\
examples:
  doorstep bench mlp                                 # 32 connections, each with one request at a time
  doorstep bench mlp --protocol grpc --connections 1
  doorstep bench mlp --rate 5000 --plot latency.png  # 5,000 requests a second, whatever the server does
  doorstep bench minilm --input text="Hello, world" --connections 16 --duration 30
"""


def run(argv: Sequence[str], prog: str = "doorstep bench") -> int:
    given = _parser(prog).parse_args(argv)
    return reporting_errors(prog, lambda: _bench(given))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure a running server. Without --rate each connection sends its next request when the last is "
        "answered (closed loop). With --rate requests are due at that rate, and latency counts from when each was due "
        "(open loop), so that time spent waiting for a slow server is not left out.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="the model's name, or name:version")
    add(
        "--url",
        help="the server: http://, https://, grpc:// or grpcs:// (default: 127.0.0.1, port 8000, or 8001 for grpc)",
    )
    add("--protocol", choices=("http", "grpc"), help="default: what --url says, else http")
    add("--format", choices=("json", "binary"), default="json", help="of HTTP requests (default: json)")
    add("--connections", type=_positive, default=32, metavar="N", help="open to the server (default: 32)")
    add("--streams", type=_positive, default=1, metavar="N", help="requests in flight per gRPC connection (default: 1)")
    add(
        "--rate",
        type=float,
        default=0.0,
        metavar="R",
        help="requests per second, of all connections (default: no limit)",
    )
    add("--arrivals", choices=("poisson", "constant"), default="poisson", help="with --rate (default: poisson)")
    add("--duration", type=float, default=10.0, metavar="SECONDS", help="of measuring (default: 10)")
    add("--warmup", type=float, default=1.0, metavar="SECONDS", help="before measuring (default: 1)")
    add("--processes", type=_positive, default=1, metavar="N", help="load processes (default: 1)")
    add("--batch", type=_positive, default=1, metavar="N", help="rows per request, for models that batch (default: 1)")
    add("--input", action="append", default=[], metavar="NAME=VALUE", help=HELP.replace("%", "%%") + "; repeatable")
    add("--shape", action="append", default=[], metavar="NAME=1,16", help="of an input that is made up; repeatable")
    add("--timeout", type=float, default=30.0, metavar="SECONDS", help="for answers still due at the end (default: 30)")
    add("--json", metavar="FILE", help="write the result there as JSON; - for standard output")
    add("--plot", metavar="FILE.png", help="draw the latencies (needs matplotlib)")
    add("--quiet", action="store_true", help="no progress line")
    add("--tls-ca", default="", metavar="FILE", help="certificates to trust (default: the system's)")
    add("--insecure", action="store_true", help="trust any certificate")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


@dataclass(frozen=True, slots=True)
class Server:
    protocol: Literal["http", "grpc"]
    host: str
    port: int
    tls: Tls | None

    @property
    def url(self) -> str:
        scheme = self.protocol + ("s" if self.tls else "")
        return f"{scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def find_server(given: argparse.Namespace) -> Server:
    """What --url and --protocol mean together. Raises InvalidArgument."""
    url = given.url or (
        f"{given.protocol}://127.0.0.1" if given.protocol else os.environ.get("DOORSTEP_URL", "127.0.0.1")
    )
    if "://" not in url:
        url = f"{given.protocol or 'http'}://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
        raise InvalidArgument(f"--url {given.url}: write http://127.0.0.1:8000 or grpc://127.0.0.1:8001")
    protocol: Literal["http", "grpc"] = given.protocol or ("grpc" if parts.scheme.startswith("grpc") else "http")
    tls = Tls(given.tls_ca, not given.insecure, protocol == "grpc") if parts.scheme.endswith("s") else None
    return Server(protocol, parts.hostname, parts.port or (8001 if protocol == "grpc" else 8000), tls)


def _bench(given: argparse.Namespace) -> int:
    if given.plot:
        from doorstep.cli.bench.plot import require_matplotlib

        require_matplotlib()  # before the work, not after it
    for option, path in (("--plot", given.plot), ("--json", given.json)):
        if path and path != "-" and not Path(path).absolute().parent.is_dir():
            raise InvalidArgument(f"{option} {path}: there is no folder {Path(path).parent}")
    if given.rate < 0 or given.duration <= 0 or given.warmup < 0:
        raise InvalidArgument("--rate and --warmup are 0 or more, --duration is more than 0")
    server = find_server(given)
    plan, tensors = make_plan(given, server)

    from doorstep.cli.bench import report, runner

    title = report.Title(given.model, server.url, _how(given, server), [_shown(tensor) for tensor in tensors])
    with report.progress(title, given.warmup, given.duration, quiet=given.quiet) as watch:
        outcome = runner.run_plans(runner.split(plan, given.processes), watch)
    result = report.summarise(outcome, title, given.rate)
    if given.json == "-":
        sys.stdout.write(report.as_json(result))
    else:
        report.show(result)
    if given.json and given.json != "-":
        with open(given.json, "w", encoding="utf-8") as file:
            file.write(report.as_json(result))
    if given.plot:
        from doorstep.cli.bench.plot import draw

        draw(result, outcome, given.plot)
        print(f"plot: {given.plot}", file=sys.stderr)
    return 0 if result.requests and not result.errors else 1


def make_plan(given: argparse.Namespace, server: Server) -> tuple[Plan, list[Tensor]]:
    """Asks the server about the model, and makes the request."""
    name, _, version = given.model.partition(":")
    metadata, batches = ask_model(server, name, version)
    values = parse_inputs(given.input, metadata) if given.input else {}
    shapes = parse_shapes(given.shape, metadata)
    if given.batch > 1 and not batches:
        raise InvalidArgument(f"--batch {given.batch}: model '{name}' does not batch")
    tensors = make_tensors(metadata, values, shapes, given.batch, batches=batches)
    if server.protocol == "grpc":
        from doorstep.cli.bench.grpc_wire import framed

        request = framed(grpc_message(name, version, tensors))
    else:
        target = Target.parse(server.url.replace("https", "http"))
        request = http_request(target, name, version, tensors, binary=given.format == "binary")
    plan = Plan(
        protocol=server.protocol,
        host=server.host,
        port=server.port,
        tls=server.tls,
        request=request,
        method="/inference.GRPCInferenceService/ModelInfer",
        connections=given.connections,
        streams=given.streams if server.protocol == "grpc" else 1,
        rate=given.rate,
        arrivals=given.arrivals,
        warm_up_s=given.warmup,
        duration_s=given.duration,
        timeout_s=given.timeout,
        seed=random.SystemRandom().randrange(2**32),
        ring="",
    )
    return plan, tensors


def ask_model(server: Server, name: str, version: str) -> tuple[dict[str, Any], bool]:
    """(metadata, whether it batches), over the protocol that is measured."""
    if server.protocol == "http":
        with Client(server.url, timeout=10, tls=server.tls.context() if server.tls else None) as client:
            metadata = client.metadata(name, version)
            try:
                config = client.config(name, version)
            except DoorstepError:  # a server with less of the protocol
                return cast(dict[str, Any], metadata), False
        return cast(dict[str, Any], metadata), int(config.get("max_batch_size", 0)) > 0
    from doorstep import proto
    from doorstep.cli.bench.grpc_wire import call

    def ask(method: str, request: Any, answer: Any) -> Any:
        tls = server.tls.context() if server.tls else None
        path = f"/inference.GRPCInferenceService/{method}"
        return answer.FromString(call(server.host, server.port, tls, path, request.SerializeToString()))

    found = ask("ModelMetadata", proto.ModelMetadataRequest(name=name, version=version), proto.ModelMetadataResponse)
    inputs = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in found.inputs]
    config = ask("ModelConfig", proto.ModelConfigRequest(name=name, version=version), proto.ModelConfigResponse).config
    return {"name": name, "inputs": inputs}, config.max_batch_size > 0


def _how(given: argparse.Namespace, server: Server) -> str:
    what = f"HTTP {given.format}" if server.protocol == "http" else "gRPC"
    many = f"{given.connections} connection{'s' if given.connections > 1 else ''}"
    if server.protocol == "grpc" and given.streams > 1:
        many += f" with {given.streams} streams each"
    pace = f"open loop at {given.rate:g} requests/s ({given.arrivals})" if given.rate else "closed loop"
    return f"{what}, {many}, {pace}"


def _shown(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.datatype} {list(tensor.shape)}"
