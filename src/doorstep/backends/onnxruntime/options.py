"""Turns a model's config into onnxruntime's session options and providers. Knows no request.

Parameter names are those of Triton's onnxruntime backend (its README, "Model Config Options").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort

from doorstep.backends.base import InstanceContext
from doorstep.errors import ConfigError, Problem

# optimization { graph { level } }: 0, or nothing, is everything onnxruntime has.
_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_ACCELERATORS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


def _mode(text: str) -> ort.ExecutionMode:
    return {"0": ort.ExecutionMode.ORT_SEQUENTIAL, "1": ort.ExecutionMode.ORT_PARALLEL}[text]


# parameter → (attribute of SessionOptions, how to read it, what is expected)
_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "intra_op_thread_count": ("intra_op_num_threads", _count, "a number of threads, 0 for the default"),
    "inter_op_thread_count": ("inter_op_num_threads", _count, "a number of threads, 0 for the default"),
    "execution_mode": ("execution_mode", _mode, "0 (sequential) or 1 (parallel)"),
    "enable_mem_arena": ("enable_cpu_mem_arena", _flag, "true or false"),
    "enable_mem_pattern": ("enable_mem_pattern", _flag, "true or false"),
}
_RUN_OPTIONS = {"memory.enable_memory_arena_shrinkage"}
# Session config entries that Triton passes on by name; onnxruntime reads many more under these prefixes.
_ENTRY_PREFIXES = ("session.", "ep.", "optimization.")


def session_options(context: InstanceContext) -> ort.SessionOptions:
    """Raises ConfigError naming every parameter that cannot be read."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    config = context.config
    problems: list[Problem] = []
    level = config.proto.optimization.graph.level
    if level in _GRAPH_LEVELS:
        options.graph_optimization_level = _GRAPH_LEVELS[level]
    else:
        problems.append(Problem("optimization.graph.level", f"is {level}", "use -1, 0, 1 or 2"))
    if context.threads:
        options.intra_op_num_threads = context.threads
    # A pool that spins between runs takes the cores from the event loop and from other models; within a run, spinning
    # hands work over faster than sleeping.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    given = {**dict(context.backend_config), **dict(config.parameters)}
    for name, text in given.items():
        if name in _OPTIONS:
            attribute, read, expected = _OPTIONS[name]
            try:
                value = read(text)
            except (ValueError, KeyError):
                problems.append(Problem(f"parameters['{name}']", f"cannot be '{text}'", f"expected {expected}"))
                continue
            if value or attribute not in ("intra_op_num_threads", "inter_op_num_threads"):
                setattr(options, attribute, value)
        elif name.startswith(_ENTRY_PREFIXES):
            options.add_session_config_entry(name, text)
    problems += _register_operations(options, context)
    if problems:
        raise ConfigError(config.name, problems)
    return options


def _register_operations(options: ort.SessionOptions, context: InstanceContext) -> list[Problem]:
    """Custom operators (model_operations): libraries in the version's folder, the model's, or by a path, as in Triton,
    from where the server was started."""
    problems = []
    for i, name in enumerate(context.config.proto.model_operations.op_library_filename):
        where = f"model_operations.op_library_filename[{i}]"
        folders = (context.version_directory, context.model_directory, Path())
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            problems.append(Problem(where, f"there is no file '{name}'", "put it into the model's folder"))
            continue
        try:
            options.register_custom_ops_library(str(path))
        except Exception as error:
            problems.append(Problem(where, f"'{name}' is no library of onnxruntime operators: {_first_line(error)}"))
    return problems


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def run_options(context: InstanceContext) -> ort.RunOptions | None:
    shrink = context.config.parameters.get("memory.enable_memory_arena_shrinkage")
    if not shrink:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrink)
    return options


def providers(context: InstanceContext) -> list[Any]:
    """Execution providers, best first: those the config asks for, CUDA for a GPU instance, the CPU always."""
    available = set(ort.get_available_providers())
    chosen: list[Any] = []
    problems: list[Problem] = []
    accelerators = context.config.proto.optimization.execution_accelerators
    wanted = [
        *(accelerators.gpu_execution_accelerator if context.kind == "KIND_GPU" else ()),
        *accelerators.cpu_execution_accelerator,
    ]
    for accelerator in wanted:
        provider = _ACCELERATORS.get(accelerator.name)
        if provider is None or provider not in available:
            problems.append(
                Problem(
                    "optimization.execution_accelerators",
                    f"'{accelerator.name}' is not in this onnxruntime, which has {', '.join(sorted(available))}",
                    "install the onnxruntime build that has it, or take the accelerator out",
                )
            )
            continue
        chosen.append((provider, dict(accelerator.parameters)))
    if context.kind == "KIND_GPU":
        if "CUDAExecutionProvider" in available:
            chosen.append(("CUDAExecutionProvider", {"device_id": context.device_id}))
        else:
            problems.append(
                Problem(
                    "instance_group",
                    "KIND_GPU, but this onnxruntime has no CUDAExecutionProvider",
                    "pip install onnxruntime-gpu, or use kind: KIND_CPU",
                )
            )
    if problems:
        raise ConfigError(context.config.name, problems)
    return [*chosen, "CPUExecutionProvider"]
