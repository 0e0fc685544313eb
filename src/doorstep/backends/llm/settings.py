"""What a model's config says to its engine: the parameters of config.pbtxt as one frozen object. Imports no engine."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from doorstep.errors import ConfigError, Problem

Task = Literal["generate", "embed", "rerank"]
TASKS = ("generate", "embed", "rerank")
POOLINGS = ("", "none", "mean", "cls", "last", "rank")
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

DEFAULT_SLOTS = 4
DEFAULT_CONTEXT = 4096  # or what the model was trained with, if that is less
ADAPTERS_FOLDER = "adapters"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: fine-tuned weights beside the model's own, chosen by its name."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    model: str  # its name in the repository
    path: Path  # the model's file or folder
    task: Task = "generate"
    context_size: int = DEFAULT_CONTEXT  # tokens of prompt and answer, for each request
    slots: int = DEFAULT_SLOTS  # requests that run at once
    threads: int = 0  # 0: the cores that the instance may count on
    batch_tokens: int = 0  # of prompts, worked off between two tokens of those who are answered; 0: by the threads
    prompt_cache_mb: int = 256  # memory for prompts that no slot holds any more
    gpu_layers: int = -1  # -1: all, where there is a GPU that the engine can use
    cache_type: str = "f16"  # of the KV cache
    pooling: str = ""  # of embeddings; "": what the model says, or the mean
    draft_model: str = ""  # a smaller model's file beside the model's: speculative decoding
    chat_template: str = ""  # a Jinja file beside the model's, instead of its own
    device: str = ""  # of transformers and openvino: cpu, cuda …; "": the best there is
    dtype: str = ""  # of transformers and vllm: float32, bfloat16 …; "": the model's
    cache_gb: int = 1  # openvino's KV cache
    command: str = "vllm"  # of vllm: the program that serves
    load_timeout_s: int = 600  # of vllm
    gpu: int = -1  # the instance's; -1: none was said
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def prompt_batch(self) -> int:
        """`batch_tokens`, or what takes some tenths of a second on a CPU: more is hardly faster, and who is being
        answered waits for it."""
        return self.batch_tokens or min(max(32 * self.thread_count, 64), 2048)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return read


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return read


def _beside(text: str) -> str:
    """A file in the version's folder, or by an absolute path."""
    if not text or ".." in Path(text).parts:
        raise ValueError
    return text


# parameter → how to read it, and what is expected
PARAMETERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "task": (_one_of(*TASKS), "generate, embed or rerank"),
    "context_size": (_whole(16, 10_000_000), "a number of tokens, 16 or more"),
    "slots": (_whole(1, 256), "how many requests run at once, 1 to 256"),
    "threads": (_whole(0, 1024), "a number of threads, 0 for all cores"),
    "batch_tokens": (_whole(0, 16384), "a number of tokens, 0 for what the threads do in a moment"),
    "prompt_cache_mb": (_whole(0, 1 << 20), "megabytes, 0 for none"),
    "gpu_layers": (_whole(-1, 10_000), "a number of layers, 0 for none, -1 for all"),
    "cache_type": (_one_of(*CACHE_TYPES), f"one of {', '.join(CACHE_TYPES)}"),
    "pooling": (_one_of(*POOLINGS), f"one of {', '.join(filter(None, POOLINGS))}"),
    "draft_model": (_beside, "a file in the version's folder"),
    "chat_template": (_beside, "a file in the version's folder"),
    "device": (str, "cpu, cuda, …"),
    "dtype": (_one_of("", "float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
    "cache_gb": (_whole(1, 4096), "gigabytes, 1 or more"),
    "command": (_beside, "a program"),
    "load_timeout_s": (_whole(1, 86400), "seconds"),
}
_KNOWN = (*PARAMETERS, "adapters", "execution")
_NAMES = {f.name for f in fields(Settings)}
assert PARAMETERS.keys() <= _NAMES


def read_settings(
    name: str,
    parameters: Mapping[str, str],
    path: Path,
    version_directory: Path,
    backend_config: Mapping[str, str] | None = None,
) -> Settings:
    """`parameters` are config.pbtxt's; those of --backend-config count where it leaves one out.

    Raises ConfigError with every parameter that cannot be read, and every file that is not there."""
    problems: list[Problem] = []
    given: dict[str, Any] = {}
    for key, (read, expected) in PARAMETERS.items():
        text = parameters.get(key, (backend_config or {}).get(key.replace("_", "-")))
        if text is None:
            continue
        try:
            given[key] = read(text.strip())
        except ValueError:
            problems.append(Problem(f'parameters["{key}"]', f"is '{text}'", f"use {expected}"))
    for key in parameters:
        meant = [] if key in _KNOWN else difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.8)
        if meant:  # others may be somebody's own
            problems.append(Problem(f'parameters["{key}"]', "says nothing to an engine", f"did you mean '{meant[0]}'?"))
    for key in ("draft_model", "chat_template"):
        if key in given:
            file = version_directory / given[key]
            if file.is_file():
                given[key] = str(file)
            else:
                problems.append(
                    Problem(
                        f'parameters["{key}"]', f"there is no file '{given[key]}'", f"put it in {version_directory}"
                    )
                )
    adapters = _adapters(parameters.get("adapters", ""), version_directory, problems)
    if problems:
        raise ConfigError(name, problems)
    return Settings(model=name, path=path, adapters=adapters, **given)


_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}").fullmatch


def _adapters(text: str, version_directory: Path, problems: list[Problem]) -> dict[str, Adapter]:
    """`name=file` or `name=file@scale`, separated by commas; without any, what is in the folder `adapters`."""
    found: dict[str, Adapter] = {}
    if not text:
        folder = version_directory / ADAPTERS_FOLDER
        if folder.is_dir():
            for file in sorted(folder.iterdir()):
                name = file.stem if file.is_file() else file.name
                if _ADAPTER_NAME(name) and (file.is_dir() or file.suffix == ".gguf"):
                    found[name] = Adapter(file)
        return found
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = part.partition("=")
        file_name, _, scale = rest.partition("@")
        where = 'parameters["adapters"]'
        try:
            adapter = Adapter(version_directory / _beside(file_name), float(scale or 1))
        except ValueError:
            problems.append(Problem(where, f"'{part}' is no adapter", "write name=file or name=file@scale"))
            continue
        if not _ADAPTER_NAME(name):
            problems.append(Problem(where, f"'{name}' is no name", "use letters, digits, '.', '_' and '-'"))
        elif not adapter.path.exists():
            problems.append(Problem(where, f"there is no '{file_name}'", f"put it in {version_directory}"))
        else:
            found[name] = adapter
    return found


def adapter_names(parameters: Mapping[str, str]) -> list[str]:
    """Of a complete config."""
    return [part.partition("=")[0].strip() for part in parameters.get("adapters", "").split(",") if part.strip()]


def task_of(parameters: Mapping[str, str]) -> Task:
    """Of a complete config."""
    return cast(Task, parameters.get("task", "generate"))
