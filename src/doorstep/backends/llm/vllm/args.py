"""What `vllm serve` is told: the settings, and the engine's arguments in model.json. Starts nothing, imports no vLLM.

`model.json` is that of Triton's vLLM backend: the fields of vLLM's AsyncEngineArgs, of which `model` must be there.
Each becomes the option of that name. Without the file, the version's folder is the model, as Hugging Face lays it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from doorstep.backends.llm.settings import Settings
from doorstep.errors import BackendError

FILENAME = "model.json"
LORAS = "multi_lora.json"
DEFAULT_SLOTS = 64
_MOST_SLOTS = 256  # of the setting
_FILES = frozenset(("model", "tokenizer", "chat_template", "hf_config_path", "tool_parser_plugin"))
# Whoever could say these would open the engine to others, or show its key.
_OURS = frozenset(("uds", "host", "port", "api_key", "served_model_name", "root_path", "headless"))
_TASKS = {"embed": "embed", "embedding": "embed", "score": "rerank", "classify": "rerank", "reward": "embed"}


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """What the files say; `said` are parameters of a config."""

    context_length: int = 0
    task: str = "generate"
    said: Mapping[str, str] = field(default_factory=dict)


def read_engine_args(path: Path) -> dict[str, Any]:
    """`path` is model.json, or where it would be. `model` becomes a path where there is such a file or folder. Raises
    BackendError."""
    folder = path.parent
    if not path.is_file():
        if (folder / "config.json").is_file():
            return {"model": str(folder)}
        raise BackendError(f"there is neither {path.name}, with vLLM's engine arguments, nor a model's config.json")
    try:
        args = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise BackendError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(args, dict) or not isinstance(args.get("model"), str) or not args["model"]:
        raise BackendError(
            f'{path.name} must be a JSON object with "model": a folder, or a name on the Hugging Face hub'
        )
    if ours := sorted(_OURS & {_normal(key) for key in args}):
        raise BackendError(f"{path.name} says '{ours[0]}', which is the server's to say; take it out")
    read: dict[str, Any] = {}
    for key, value in args.items():
        key = _normal(key)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if key in _FILES and isinstance(value, str) and (folder / value).exists():
            value = str(folder / value)
        read[key] = value
    return read


def _normal(key: str) -> str:
    return key.replace("-", "_")


def survey(path: Path) -> VllmFacts:
    """What a config may leave out. Raises BackendError."""
    args = read_engine_args(path)
    said: dict[str, str] = {}
    config = _model_config(Path(args["model"]))
    if (context := args.get("max_model_len")) and isinstance(context, int):
        said["context_size"] = str(context)
    elif trained := _context_of(config):
        said["context_size"] = str(trained)  # vLLM's default; a slot costs nothing until it is used
    slots = args.get("max_num_seqs", DEFAULT_SLOTS)
    said["slots"] = str(min(slots, _MOST_SLOTS) if isinstance(slots, int) else DEFAULT_SLOTS)
    if args.get("enable_lora") is True:
        said["adapters"] = ",".join(f"{name}={where}" for name, where in _loras(path.parent).items())
    return VllmFacts(0, _task_of(args, config), said)


def _model_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return config if isinstance(config, dict) else {}


def _context_of(config: Mapping[str, Any]) -> int:
    text = config.get("text_config") or config
    found = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return found if isinstance(found, int) and found >= 16 else 0


def _task_of(args: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if (task := _TASKS.get(str(args.get("task")))) is not None:
        return task
    architectures = config.get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return "rerank"
    return "embed" if args.get("runner") == "pooling" else "generate"


def _loras(folder: Path) -> dict[str, str]:
    path = folder / LORAS
    try:
        found = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise BackendError(f"Triton backend cannot find {path}.") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise BackendError(f"{LORAS} cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(where, str) for where in found.values()):
        raise BackendError(f'{LORAS} must be a JSON object: {{"name": "folder"}}')
    return found


def command_line(settings: Settings, args: Mapping[str, Any], program: str, socket: str) -> list[str]:
    """What model.json says comes last, so that it counts where both say something."""
    line = [program, "serve", args["model"], "--uds", socket, "--served-model-name", settings.model]
    options: dict[str, Any] = {
        "max_num_seqs": settings.slots,
        "max_model_len": settings.context_size,
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    if settings.task != "generate":
        options["runner"] = "pooling"
    if settings.pooling and settings.task == "embed":
        options["pooler_config"] = {"pooling_type": settings.pooling.upper()}
    if settings.dtype:
        options["dtype"] = settings.dtype
    if settings.chat_template:
        options["chat_template"] = settings.chat_template
    if settings.adapters:
        modules = [f"{name}={adapter.path}" for name, adapter in settings.adapters.items()]
        options |= {"enable_lora": True, "max_loras": min(len(modules), 8), "lora_modules": modules}
    options |= {key: value for key, value in args.items() if key not in ("model", "task", "disable_log_requests")}
    if args.get("disable_log_requests") is False:  # of older versions, which logged them unless told not to
        options["enable_log_requests"] = True
    for key, value in options.items():
        line += _option(key, value)
    return line


def _option(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if value is None:
        return []
    if value is True:
        return [f"--{name}"]
    if value is False:
        return [f"--no-{name}"]
    if isinstance(value, Mapping):
        return [f"--{name}", orjson.dumps(value).decode()]
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}={value}"]  # in one, as a value may begin with '-'
