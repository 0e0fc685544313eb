"""`make bench`: Doorstep beside Triton and MLServer, the same work in one session, turn about.

`python -m benchmarks [--only mlp-json …] [--seconds 5] [--rounds 3] [--readme]`. Figures go to
benchmarks/results/; with --readme the table of benchmarks/README.md is written anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import models, report
from benchmarks.goals import Figure
from benchmarks.measure import Target
from benchmarks.payloads import write_payloads
from benchmarks.peers import mlserver, triton
from benchmarks.scenarios import PEERLESS, SCENARIOS, Bench, Plan
from doorstep.testing.server import ServerProcess

TOOLS = {"wrk": "wrk", "h2load": "nghttp2-client"}  # command → Debian package


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="scenarios to run")
    parser.add_argument("--seconds", type=float, default=Plan().seconds, help="length of one run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=Plan().rounds, help="runs of each server (default %(default)s)")
    parser.add_argument("--readme", action="store_true", help="write the table of benchmarks/README.md")
    arguments = parser.parse_args()
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        print(f"the benchmarks need {', '.join(TOOLS)}: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    plan = Plan(arguments.seconds, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="doorstep-bench-") as folder, ExitStack() as stack:
        figures, bench, servers = _run(Path(folder), stack, plan, arguments.only)
    path = report.save(figures, bench.raw, servers, f"{plan.rounds} of {plan.seconds:g} s each, turn about; medians")
    print(f"\n{report.table(figures)}\n\n{path}")
    if arguments.readme:
        report.write_readme(path)
    return 0


def _run(folder: Path, stack: ExitStack, plan: Plan, wanted: list[str]) -> tuple[list[Figure], Bench, dict[str, str]]:
    servers: dict[str, str] = {}
    targets: dict[str, Target] = {}
    if set(wanted) - PEERLESS:
        servers, targets = _start(folder, stack)
    bench = Bench(targets, write_payloads(folder / "payloads"), plan, {})
    figures: list[Figure] = []
    for name in wanted:
        print(f"{name} …", flush=True)
        found = SCENARIOS[name](bench)
        for f in found:
            print(f"  {f.scenario}: {f.quantity} {f.doorstep:.4g} / {f.other:.4g} = {f.ratio:.2f}", flush=True)
        figures += found
    return figures, bench, servers


def _start(folder: Path, stack: ExitStack) -> tuple[dict[str, str], dict[str, Target]]:
    """All servers at once; those not under load do nothing."""
    ours = stack.enter_context(ServerProcess(models.doorstep_repository(folder / "doorstep")))
    targets = {"doorstep": Target("doorstep", ours, ours.http_port, ours.grpc_port)}
    servers = {}
    if (venv := triton.find_venv()) is not None:
        process = stack.enter_context(triton.TritonProcess(venv, models.triton_repository(folder / "triton")))
        targets["triton"] = Target("triton", process, process.http_port, process.grpc_port)
        servers["Triton"] = f"{triton.version(venv)}; its ONNX model is a Python model that runs onnxruntime"
    else:
        print("no Triton to compare with: run `make peers`", file=sys.stderr)
    if (venv := mlserver.find_venv()) is not None:
        other = stack.enter_context(mlserver.MlserverProcess(venv, models.mlserver_folder(folder / "mlserver")))
        targets["mlserver"] = Target("mlserver", other, other.http_port, other.grpc_port)
        servers["MLServer"] = f"{mlserver.version(venv)}; a custom runtime in the server's process"
    else:
        print("no MLServer to compare with: run `make peers`", file=sys.stderr)
    return servers, targets


if __name__ == "__main__":
    sys.exit(main())
