"""Figures as a Markdown table and as JSON, with the machine they were taken on. Measures nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.goals import Figure
from benchmarks.measure import Series

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
BEGIN = "<!-- figures: begin (written by make bench) -->"
END = "<!-- figures: end -->"
NAMES = {
    "triton": "Triton",
    "mlserver": "MLServer",
    "one MLP": "one MLP",
    "onnxruntime": "bare loop",
    "engine": "the engine in process",
    "llama.cpp": "llama.cpp's server",
    "first": "the first time",
    "median": "the median",
    "limit": "limit",
    "all": "of all",
    "wrk": "wrk",
}


def machine() -> dict[str, str]:
    """Where the figures come from."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    packages = ("onnxruntime", "numpy", "uvloop", "httptools", "ngh2", "orjson", "protobuf")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{os.cpu_count()} cores, {cpu.group(1) if cpu else platform.machine()}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "doorstep": version("doorstep"),
        "libraries": ", ".join(f"{name} {version(name)}" for name in packages),
        "load": ", ".join([_first_line(["wrk", "-v"]).split(" [")[0], _first_line(["h2load", "--version"])]),
    }


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0]


def table(figures: list[Figure]) -> str:
    lines = [
        "| work | quantity | Doorstep | other | ratio (lowest to highest) | goal | met |",
        "|---|---|--:|--:|--:|--:|:-:|",
    ]
    for f in figures:
        goal = f"{'≥' if f.at == 'least' else '≤'} {f.goal:.3g}"
        lines.append(
            f"| {f.scenario} | {f.quantity} | {_number(f.doorstep)} | {_number(f.other)} {NAMES[f.other_name]} "
            f"| {f.ratio:.2f} ({f.low:.2f} to {f.high:.2f}) | {goal} | {'yes' if f.met else '**no**'} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def save(figures: list[Figure], raw: dict[str, Series], servers: dict[str, str], rounds: str) -> Path:
    """Writes results/<time>.json and the table of benchmarks/README.md."""
    found: dict[str, Any] = {
        "machine": machine(),
        "servers": servers,
        "rounds": rounds,
        "figures": [{**asdict(f), "ratio": f.ratio, "met": f.met} for f in figures],
        "samples": {
            scenario: {name: [asdict(s) for s in samples] for name, samples in series.samples.items()}
            for scenario, series in raw.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def write_readme(path: Path) -> None:
    """Puts the table of a results file into benchmarks/README.md, between its markers."""
    found = json.loads(path.read_text())
    figures = [Figure(**{k: v for k, v in f.items() if k not in ("ratio", "met")}) for f in found["figures"]]
    about = [f"- {name}: {text}" for name, text in {**found["machine"], **found["servers"]}.items()]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = "\n".join([BEGIN, "", table(figures), "", *about, f"- runs: {found['rounds']}", "", END])
    README.write_text(before + body + after)
