"""Finds OpenVINO's language model in a version's folder, and what its files say of it. Imports no OpenVINO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from doorstep.backends.llm.llamacpp.gguf import read_head
from doorstep.errors import BackendError

FILENAME = "openvino_model.xml"  # as optimum-intel writes it
_BESIDE = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # what OpenVINO GenAI can read


@dataclass(frozen=True, slots=True)
class OpenVinoFacts:
    context_length: int = 0


def find_model(path: Path) -> Path:
    """The folder of an OpenVINO model, or a GGUF file; `path` is where the config, or our default, expects it. Raises
    BackendError."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    folder = path.parent
    if (folder / FILENAME).is_file():
        for name in _BESIDE:
            if not (folder / name).is_file():
                raise BackendError(f"there is no {name} beside {FILENAME}: export the model with its tokenizer")
        return folder
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if path.is_file():
        raise BackendError(
            f"{path.name} is no language model: backend 'openvino' runs folders with {FILENAME} and its tokenizer, and "
            "GGUF files"
        )
    raise BackendError(f"there is neither {FILENAME} nor one GGUF file")


def survey(path: Path) -> OpenVinoFacts:
    """Raises BackendError."""
    model = find_model(path)
    if model.is_dir():
        return OpenVinoFacts(_context_of(model / "config.json"))
    head = read_head(model)
    if head.architecture not in GGUF_ARCHITECTURES:
        raise BackendError(
            f"{model.name} is of architecture '{head.architecture}'; OpenVINO reads GGUF files of "
            f"{', '.join(GGUF_ARCHITECTURES)}: use backend 'llamacpp', or export the model for OpenVINO"
        )
    return OpenVinoFacts(head.context_length)


def _context_of(config: Path) -> int:
    try:
        said: Any = orjson.loads(config.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return 0
    found = said.get("max_position_embeddings") if isinstance(said, dict) else None
    return found if isinstance(found, int) and found > 0 else 0
