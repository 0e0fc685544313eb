"""The rooms: lower tiers never import higher ones, and rooms of one tier do not import each other (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "src" / "doorstep"

TIERS = {
    "_version": 0, "errors": 0, "types": 0, "stats": 0, "latencies": 1, "llm_stats": 1, "memory": 0, "proto": 0,
    "request": 1, "trace": 1, "client_memory": 1, "config": 1, "wire": 1,
    "backends": 2, "repository": 2, "cache": 2,
    "services": 3,
    "workers": 4,
    "scheduler": 5,
    "validation": 6, "instances": 6, "model": 6,
    "server": 7,
    "protocols": 8, "observability": 8, "security": 8, "model_control": 8,
    "app": 9,
    "cli": 10, "demo": 10, "client": 10, "testing": 10,
}  # fmt: skip

# Files that everyone imports, and pairs of one tier of which one is the other's foundation.
SHARED = {"_version", "errors", "types", "stats", "proto", "request"}
ALLOWED = {("model", "validation"), ("model", "instances"), ("cli", "client"), ("cli", "demo"), ("testing", "client")}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path) -> set[str]:
    """The rooms a file imports, imports inside functions and under TYPE_CHECKING included."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "doorstep" else [f"doorstep.{a.name}" for a in node.names]
        rooms |= {room_of(name) for name in names if name.startswith("doorstep.")}
    return rooms - {"__version__"}


def test_no_room_imports_a_higher_room_or_a_sibling() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in imports_of(path) - {room} - SHARED:
            if (room, other) in ALLOWED:
                continue
            if TIERS[other] >= TIERS[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other} (tier {TIERS[other]}, own tier {TIERS[room]})")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_tier() -> None:
    rooms = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= set(TIERS)
