"""Fills in what a configuration leaves out and no model needs to be read for. Imports no backend, loads no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doorstep import proto as messages
from doorstep.errors import Problem

ENSEMBLE = "ensemble"
SEQUENCE_IDLE_DEFAULT_US = 1_000_000

# Triton starts two instances of an ONNX model on a CPU. Here one instance with all the cores for its operators is both
# faster and smaller: two sessions share the same cores, and a batch in the first already keeps them busy.
DEFAULT_INSTANCE_COUNT = 1


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file that says by its name which backend runs it. `platform` is Triton's legacy name for the pair, if any."""

    filename: str
    backend: str
    platform: str = ""
    is_file: bool = True  # False: a folder, or either


# In the order they are looked for; of a backend's several, the first is its default.
ARTEFACTS = (
    Artefact("model.savedmodel", "tensorflow", "tensorflow_savedmodel", is_file=False),
    Artefact("model.graphdef", "tensorflow", "tensorflow_graphdef"),
    Artefact("model.plan", "tensorrt", "tensorrt_plan"),
    Artefact("model.onnx", "onnxruntime", "onnxruntime_onnx", is_file=False),
    Artefact("model.xml", "openvino", is_file=False),
    Artefact("model.pt", "pytorch", "pytorch_libtorch"),
    Artefact("model.pt2", "pytorch", "torch_aoti"),
    Artefact("model.py", "python", is_file=False),
    Artefact("model.gguf", "llamacpp"),
    Artefact("openvino_model.xml", "openvino"),
    Artefact("model.json", "vllm"),
    Artefact("config.json", "transformers"),  # its folder is the model; last, as other formats keep one too
)
PLATFORMS = {a.platform: a.backend for a in ARTEFACTS if a.platform} | {"libtorch": "pytorch"}


def version_directories(model_directory: Path) -> list[Path]:
    """The folders that hold versions, newest first. Names must be whole numbers without leading zeros."""
    try:
        found = [d for d in model_directory.iterdir() if d.name.isascii() and d.name.isdigit() and d.is_dir()]
    except OSError:
        return []
    return sorted((d for d in found if d.name == str(int(d.name))), key=lambda d: int(d.name), reverse=True)


def is_ensemble(proto: Any) -> bool:
    """Made of other models: it has no backend and no file."""
    return bool(proto.platform == ENSEMBLE or proto.HasField("ensemble_scheduling"))


def complete_backend(
    proto: Any, name: str, model_directory: Path, version_directory: Path | None = None
) -> list[Problem]:
    """Fills in name, backend, platform and default_model_filename of `proto`, in place; also in strict mode, as Triton.

    Looks at the file names in `version_directory`, by default the newest there is. Returns what is wrong.
    """
    if not proto.name:
        proto.name = name
    if is_ensemble(proto):
        return []
    if version_directory is None:
        version_directory = next(iter(version_directories(model_directory)), None)
    if not proto.backend:
        proto.backend = _backend_by_name(proto, version_directory)
    if not proto.backend and not proto.platform and not proto.default_model_filename:
        _, dot, custom = name.partition(".")
        if not dot or not custom:
            return [_undetermined(name, version_directory)]
        proto.backend = custom
        proto.default_model_filename = f"model.{custom}"
    _complete_names(proto, version_directory)
    return []


def _backend_by_name(proto: Any, version_directory: Path | None) -> str:
    if proto.platform:
        return PLATFORMS.get(proto.platform, "")
    if proto.default_model_filename:
        return next((a.backend for a in ARTEFACTS if a.filename == proto.default_model_filename), "")
    found = _artefact_in(version_directory)
    if found is None and (named := only_gguf(version_directory)):
        proto.default_model_filename = named
        return "llamacpp"
    return found.backend if found else ""


def only_gguf(directory: Path | None) -> str:
    """The one GGUF file in a folder, or the first part of the one that comes in parts; "" where there is none such."""
    if directory is None or not directory.is_dir():
        return ""
    files = sorted(file.name for file in directory.glob("*.gguf") if file.is_file())
    if len(files) > 1 and all(re.fullmatch(r".+-\d{5}-of-\d{5}\.gguf", name) for name in files):
        files = files[:1]
    return files[0] if len(files) == 1 else ""


def _artefact_in(version_directory: Path | None, backend: str = "") -> Artefact | None:
    if version_directory is None:
        return None
    for artefact in ARTEFACTS:
        if backend and artefact.backend != backend:
            continue
        path = version_directory / artefact.filename
        if path.is_file() or (not artefact.is_file and path.is_dir()):
            return artefact
    return None


def _complete_names(proto: Any, version_directory: Path | None) -> None:
    """platform and default_model_filename of a known backend, each from the other where one is given."""
    ours = [a for a in ARTEFACTS if a.backend == proto.backend]
    if not ours:
        return
    fits = [a for a in ours if proto.platform in ("", a.platform) and proto.default_model_filename in ("", a.filename)]
    chosen = fits[0] if fits else ours[0]
    if len(fits) > 1:
        there = _artefact_in(version_directory, proto.backend)
        chosen = there if there in fits else fits[0]
    if not proto.platform:
        proto.platform = chosen.platform
    if not proto.default_model_filename:
        proto.default_model_filename = chosen.filename


def _undetermined(name: str, version_directory: Path | None) -> Problem:
    what = (
        f"Invalid model name: Could not determine backend for model '{name}' with no backend in model configuration. "
        "Expected model name of the form 'model.<backend_name>'."
    )
    if version_directory is None or not version_directory.is_dir():
        return Problem("backend", what, f"put the model's file in {name}/1/, as model.onnx or model.py")
    models = [a.filename for a in ARTEFACTS if a.filename.startswith("model.") and not a.filename.endswith(".json")]
    suffixes = {Path(name).suffix: name for name in models}
    near = sorted(p.name for p in version_directory.iterdir() if p.suffix in suffixes and not p.name.startswith("."))
    here = f"{name}/{version_directory.name}"
    if near:
        wanted = suffixes[Path(near[0]).suffix]
        fix = f"rename {here}/{near[0]} to {wanted}"
        if wanted != "model.py":
            backend = next(a.backend for a in ARTEFACTS if a.filename == wanted)
            fix += f', or write in config.pbtxt backend: "{backend}" and default_model_filename: "{near[0]}"'
    else:
        fix = f"put model.onnx or model.py in {here}/, or set 'backend' in config.pbtxt"
    return Problem("backend", what, fix)


def normalise(proto: Any, gpus: Sequence[int] = ()) -> None:
    """Sets Triton's defaults in `proto`, in place. `gpus` are the ids of those that instances may use."""
    if not proto.HasField("version_policy"):
        proto.version_policy.latest.num_versions = 1
    if proto.HasField("dynamic_batching"):
        _default_preferred(proto.dynamic_batching, proto.max_batch_size)
    if proto.HasField("sequence_batching"):
        if proto.sequence_batching.max_sequence_idle_microseconds == 0:
            proto.sequence_batching.max_sequence_idle_microseconds = SEQUENCE_IDLE_DEFAULT_US
        if proto.sequence_batching.HasField("oldest"):
            _default_preferred(proto.sequence_batching.oldest, proto.max_batch_size)
    if proto.HasField("ensemble_scheduling"):
        return
    for buffer in ("input_pinned_memory", "output_pinned_memory"):
        if not proto.optimization.HasField(buffer):
            getattr(proto.optimization, buffer).enable = True
    _default_instance_groups(proto, gpus)


def _default_preferred(batching: Any, max_batch_size: int) -> None:
    if not batching.preferred_batch_size and max_batch_size > 0:
        batching.preferred_batch_size.append(max_batch_size)


def _default_instance_groups(proto: Any, gpus: Sequence[int]) -> None:
    kind = messages.ModelInstanceGroup
    if not proto.instance_group:
        proto.instance_group.add(name=proto.name)
    for i, group in enumerate(proto.instance_group):
        if not group.name:
            group.name = f"{proto.name}_{i}"
        if group.kind == kind.KIND_AUTO:
            usable = bool(gpus) and all(gpu in gpus for gpu in group.gpus)
            group.kind = kind.KIND_GPU if usable else kind.KIND_CPU
            if not usable:
                del group.gpus[:]  # they were a wish; a CPU group that lists any is an error
        if group.count < 1:
            group.count = DEFAULT_INSTANCE_COUNT
        if group.kind == kind.KIND_GPU and not group.gpus:
            group.gpus.extend(gpus)
