"""Reads a Hugging Face folder: what the model is, and whether its weights are whole. Knows no library to load it.

Every length is checked against the file's, so that a file that lies costs nothing. Only safetensors count as weights:
the older .bin are pickles, which run code when they are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from doorstep.errors import BackendError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "*.safetensors"
_LONGEST_JSON = 64 << 20
_LONGEST_HEADER = 100_000_000  # of a safetensors file, as its own library has it
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_length")
# How the class ends that the weights are of → task
_TASKS = {
    "ForSequenceClassification": "rerank",
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForConditionalGeneration": "generate",
    "ForMaskedLM": "embed",
    "ForPreTraining": "embed",
    "Model": "embed",
}
# What the folders of sentence-transformers say → our `pooling`
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path
    architecture: str = ""  # the class's name
    context_length: int = 0  # what it was trained with; 0: not said
    task: str = "generate"
    pooling: str = "mean"  # of embeddings
    ends: frozenset[int] = frozenset()  # the tokens that end an answer
    sampling: Mapping[str, float] = field(default_factory=dict)  # what its makers recommend, where requests say nothing


def folder_of(path: Path) -> Path:
    """Of what a config names: the folder, or its config.json."""
    return path if path.is_dir() else path.parent


def read_folder(path: Path) -> Folder:
    """`path` is the folder or its config.json. Raises BackendError, with what is wrong and what to do."""
    folder = folder_of(path)
    config = _object(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise BackendError(f"{CONFIG} does not say its model_type: it is not a model's of Hugging Face")
    if config.get("is_encoder_decoder"):
        raise BackendError(
            f"{CONFIG} is of an encoder-decoder ({config['model_type']}); decoders that answer, and encoders that "
            "embed or rerank, can be served"
        )
    check_weights(folder)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    generation = _object(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
    architectures = config.get("architectures") or [""]
    architecture = str(architectures[0]) if isinstance(architectures, list) else ""
    embeds = (folder / "modules.json").is_file()  # sentence-transformers wrote it, whatever the class
    return Folder(
        folder,
        architecture,
        next(filter(None, (_whole(config.get(key, text.get(key))) for key in _CONTEXT_KEYS)), 0),
        "embed" if embeds else _task(architecture),
        _pooling(folder),
        frozenset(e for e in (ends if isinstance(ends, list) else [ends]) if isinstance(e, int) and e >= 0),
        {key: value for key in SAMPLING if isinstance(value := generation.get(key), (int, float))},
    )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _task(architecture: str) -> str:
    if not architecture:
        return "generate"
    for end, task in _TASKS.items():
        if architecture.endswith(end):
            return task
    known = ", ".join(f"…{end}" for end in _TASKS)
    raise BackendError(f"{CONFIG} is of a {architecture}, which neither generates nor embeds nor reranks ({known} do)")


def _pooling(folder: Path) -> str:
    said = folder / "1_Pooling" / CONFIG
    if not said.is_file():
        return "mean"
    modes = _object(said)
    return next((ours for theirs, ours in _POOLINGS.items() if modes.get(theirs)), "mean")


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise BackendError(f"{path.name} has over {_LONGEST_JSON} bytes: it is no configuration")
        said = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise BackendError(f"there is no {path.name}: put the model's whole folder there") from None
    except OSError as error:
        raise BackendError(f"{path.name} cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise BackendError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise BackendError(f"{path.name} is not a JSON object")
    return said


# Weights


def check_weights(folder: Path) -> None:
    """Raises BackendError for weights that are missing, cut off, or not safetensors."""
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        if any(folder.glob("*.bin")):
            raise BackendError(
                f"the weights in {folder.name} are .bin files, pickles that run code when they are read; save them as "
                "safetensors: model.save_pretrained(folder, safe_serialization=True)"
            )
        raise BackendError(f"there are no weights in {folder.name}: put its *.safetensors there")
    if (folder / INDEX).exists():
        parts = _object(folder / INDEX).get("weight_map")
        if not isinstance(parts, dict):
            raise BackendError(f"{INDEX} has no weight_map")
        missing = sorted({str(part) for part in parts.values()} - {file.name for file in files})
        if missing:
            raise BackendError(f"{INDEX} names {missing[0]}, which is not there: fetch the folder again")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(path: Path) -> None:
    """Format: eight bytes, little-endian, of the header's length; the header, JSON; the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise _damaged(path, f"it has {size} bytes")
            (length,) = struct.unpack("<Q", head)
            if length > _LONGEST_HEADER or length > size - 8:
                raise _damaged(path, f"its header claims {length} bytes, and the file has {size}")
            header = orjson.loads(file.read(length))
    except OSError as error:
        raise BackendError(f"{path.name} cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError:
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    there = size - 8 - length
    claimed = max(_ends(path, header), default=0)
    if claimed != there:
        raise _damaged(path, f"its tensors claim {claimed} bytes, and it has {there}")


def _ends(path: Path, header: dict[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not (
            isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) for offset in offsets)
        ) or not (0 <= offsets[0] <= offsets[1]):
            raise _damaged(path, f"where the tensor '{name[:100]}' is, is not said")
        yield offsets[1]


def _damaged(path: Path, why: str) -> BackendError:
    return BackendError(f"{path.name} is damaged: {why}; fetch it again")
