"""Everything wrong with a model's configuration, at once, each with what, where and how to mend it. Loads no model.

`Problem.where` is a field path (`input[0].dims`); load.locate turns it into a line. Where Triton has a text for a fault
(core, model_config_utils.cc), the text is Triton's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from doorstep.config.check_batching import check_batching
from doorstep.config.check_ensemble import check_ensemble
from doorstep.config.check_ragged import check_ragged
from doorstep.config.check_tensors import check_tensors, element_count
from doorstep.config.complete import ENSEMBLE, PLATFORMS
from doorstep.config.labels import read_labels
from doorstep.config.sequence import read_initial_states
from doorstep.config.survey import suggest
from doorstep.errors import Problem
from doorstep.types import BY_CONFIG_NUMBER

WARMUP_DIRECTORY = "warmup"
MOST_INSTANCES = 1024  # of one model version; more is a slip of the pen, and each takes a thread or a process
MOST_WARMUPS = 65_536  # runs, or requests of one run
EXECUTIONS = ("inline", "thread", "process", "auto")  # backends.base.Execution


def check(
    proto: Any,
    *,
    directory_name: str,
    model_directory: Path | None = None,
    backends: Collection[str] | None = None,
    gpus: Sequence[int] = (),
    partial: bool = False,
) -> list[Problem]:
    """What is wrong with `proto`, an inference.ModelConfig message; empty if nothing is.

    `partial`: it has not been completed from the model's file yet, so what that may supply is not missed. `backends`
    are the known names; without them, or without `model_directory`, what needs them is not checked.
    """
    problems = [
        *_check_identity(proto, directory_name, backends),
        *_check_version_policy(proto),
        *check_batching(proto, partial=partial),
        *check_ensemble(proto),
        *check_tensors(proto, partial=partial),
        *check_ragged(proto, partial=partial),
        *_check_instance_groups(proto, gpus),
        *_check_rest(proto),
        *_check_warmup(proto, partial=partial),
    ]
    if not partial and not proto.input and not proto.output and proto.platform != ENSEMBLE:
        fix = "list its inputs and outputs in config.pbtxt"
        problems.append(Problem("input", f"model configuration is not provided for model '{proto.name}'", fix))
    if model_directory is not None:
        problems += _check_files(proto, model_directory)
    return problems


def _check_identity(proto: Any, directory_name: str, backends: Collection[str] | None) -> Iterator[Problem]:
    name = proto.name
    if not name:
        yield Problem("name", "model configuration must specify 'name'", f'write name: "{directory_name}", or nothing')
    elif name != directory_name:
        what = f"unexpected directory name '{directory_name}' for model '{name}', directory name must equal model name"
        yield Problem("name", what, f'write name: "{directory_name}", take the line out, or rename the directory')
    if proto.platform == ENSEMBLE or proto.HasField("ensemble_scheduling"):
        return
    if not proto.backend:
        what = f"unexpected platform type '{proto.platform}' for {name}"
        fix = suggest(proto.platform, sorted(PLATFORMS)) if proto.platform else ""
        yield Problem("platform" if proto.platform else "backend", what, fix or "set 'backend' instead")
        return
    if PLATFORMS.get(proto.platform, proto.backend) != proto.backend or (
        not proto.platform and proto.backend in _PAIRED
    ):
        what = f"unexpected 'platform' and 'backend' pair, got:{proto.platform}, {proto.backend}"
        yield Problem("platform", what, "take out 'platform'; the backend is enough")
    if backends is not None and proto.backend not in backends:
        what = (
            f"unable to find backend library for backend '{proto.backend}', "
            "try specifying runtime on the model configuration."
        )
        there_are = f"there are: {', '.join(sorted(backends))}"
        fix = INSTEAD.get(proto.backend) or suggest(proto.backend, sorted(backends)) or there_are
        yield Problem("backend", what, fix)


_EXPORT = "export it to ONNX as model.onnx, or load it in a model.py of yours"
# Backends of Triton that a repository may well name, and what to do without them.
INSTEAD = {
    "pytorch": f"PyTorch files are not served as they are: {_EXPORT}",
    "tensorflow": f"TensorFlow models are not served as they are: {_EXPORT}",
    "tensorrt": f"TensorRT plans are not served: {_EXPORT}",
    "openvino": f"OpenVINO models are not served: {_EXPORT}",
    "fil": f"forests are not served as they are: {_EXPORT}",
    "dali": "DALI pipelines are not served: run the pipeline in a model.py of yours",
    "vllm": "language models are not served yet",
    "tensorrtllm": "language models are not served yet",
}
_PAIRED = frozenset(PLATFORMS.values())  # backends that Triton wants with their platform; completion sets it


def _check_version_policy(proto: Any) -> Iterator[Problem]:
    policy = proto.version_policy
    match policy.WhichOneof("policy_choice"):
        case "latest" if policy.latest.num_versions == 0:
            what = f"version policy 'latest' keeps 0 versions of {proto.name}, so none would be served"
            yield Problem("version_policy.latest", what, "write num_versions: 1 or more")
        case "specific" if not policy.specific.versions:
            what = f"version policy 'specific' lists no version of {proto.name}, so none would be served"
            yield Problem("version_policy.specific", what, "write versions: [ 1 ], or take the policy out")
        case "specific":
            for i, version in enumerate(policy.specific.versions):
                if version < 0:
                    what = f"version {version} of {proto.name} cannot exist"
                    yield Problem(f"version_policy.specific.versions[{i}]", what, "versions are whole numbers")
        case None if proto.HasField("version_policy"):
            what = f"must specify 'version policy' for {proto.name}"
            yield Problem(
                "version_policy", what, "one of latest { num_versions: 1 }, all { } and specific { versions: … }"
            )


def _check_instance_groups(proto: Any, gpus: Sequence[int]) -> Iterator[Problem]:
    if proto.HasField("ensemble_scheduling"):
        return
    total = sum(max(group.count, 0) for group in proto.instance_group)
    if total > MOST_INSTANCES:
        what = f"model {proto.name} asks for {total} instances, more than {MOST_INSTANCES}"
        yield Problem("instance_group", what, f"write at most {MOST_INSTANCES}")
    for i, group in enumerate(proto.instance_group):
        where = f"instance_group[{i}]"
        whose = f"instance group {group.name or i} of model {proto.name}"
        kind = group.Kind.Name(group.kind) if group.kind in group.Kind.values() else str(group.kind)
        if group.count < 0:
            yield Problem(f"{where}.count", f"{whose} has count {group.count}", "write 1 or more, or take it out")
        if kind in ("KIND_MODEL", "KIND_CPU") and group.gpus:
            yield Problem(f"{where}.gpus", f"{whose} has kind {kind} but specifies one or more GPUs", "take 'gpus' out")
        elif kind == "KIND_GPU" and not gpus:
            fix = "use KIND_CPU, or KIND_AUTO to use a GPU where there is one"
            yield Problem(f"{where}.kind", f"{whose} has kind KIND_GPU but no GPUs are available", fix)
        elif kind == "KIND_GPU":
            for gpu in group.gpus:
                if gpu not in gpus:
                    what = f"{whose} specifies invalid or unsupported gpu id {gpu}"
                    yield Problem(f"{where}.gpus", what, f"there are: {', '.join(map(str, gpus))}")
        elif not kind.startswith("KIND_"):
            yield Problem(
                f"{where}.kind", f"{whose} has unexpected kind {kind}", "one of KIND_AUTO, KIND_CPU, KIND_GPU"
            )
        if group.profile and proto.platform != "tensorrt_plan":
            what = f"{whose} and platform {proto.platform} specifies profile field which is only supported for "
            what += "TensorRT models"
            yield Problem(f"{where}.profile", what, "take it out")


def _check_rest(proto: Any) -> Iterator[Problem]:
    if proto.model_transaction_policy.decoupled and proto.response_cache.enable:
        what = (
            f"Response Cache does not currently support model {proto.name} with 'decoupled' transaction policy. "
            "Please disable the response cache."
        )
        yield Problem("response_cache", what)
    if "execution" in proto.parameters:
        value = proto.parameters["execution"].string_value
        if value not in EXECUTIONS:
            fix = suggest(value, list(EXECUTIONS)) or f"one of {', '.join(EXECUTIONS)}"
            yield Problem('parameters["execution"]', f"unknown execution '{value}' for {proto.name}", fix)
    if proto.default_model_filename and not _stays_inside(proto.default_model_filename):
        what = f"default_model_filename '{proto.default_model_filename}' of {proto.name} is outside its directory"
        yield Problem("default_model_filename", what, "name a file in the version's directory")
    for i, control in enumerate(proto.model_metrics.metric_control):
        where = f"model_metrics.metric_control[{i}]"
        if not control.HasField("metric_identifier"):
            yield Problem(where, "metric control must specify 'metric_identifier'")
        elif not control.metric_identifier.family:
            yield Problem(where, "metric identifier must specify non-empty 'family'")
        if not control.HasField("histogram_options"):
            yield Problem(where, "metric control must specify 'histogram_options'")
        elif not control.histogram_options.buckets:
            yield Problem(where, "histogram options must specify non-empty 'buckets'")


def _stays_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def _check_warmup(proto: Any, *, partial: bool) -> Iterator[Problem]:
    inputs = {io.name: io for io in proto.input}
    for i, warmup in enumerate(proto.model_warmup):
        where = f"model_warmup[{i}]"
        for name in sorted(warmup.inputs):
            yield from _check_warmup_input(
                warmup.inputs[name], name, inputs.get(name), f'{where}.inputs["{name}"]', proto
            )
            if name not in inputs and inputs and not proto.HasField("sequence_batching"):
                allowed = ", ".join(sorted(inputs))
                what = f"unexpected inference input '{name}' for model '{proto.name}'"
                yield Problem(f'{where}.inputs["{name}"]', what, f"its inputs are {allowed}")
        most = proto.max_batch_size or MOST_WARMUPS
        if warmup.batch_size > most and not partial:
            what = f"warmup '{warmup.name}' of {proto.name} has batch_size {warmup.batch_size}, more than {most}"
            yield Problem(f"{where}.batch_size", what, "write at most max_batch_size")
        if warmup.count > MOST_WARMUPS:
            what = f"warmup '{warmup.name}' of {proto.name} has count {warmup.count}, more than {MOST_WARMUPS}"
            yield Problem(f"{where}.count", what, f"write at most {MOST_WARMUPS}")
        missing = sorted(n for n, io in inputs.items() if not io.optional and n not in warmup.inputs)
        if missing and not partial and warmup.batch_size:
            what = f"warmup '{warmup.name}' of {proto.name} has no data for input {', '.join(map(repr, missing))}"
            yield Problem(where, what, "add it to 'inputs', with its data_type, dims and zero_data: true")


def _check_warmup_input(given: Any, name: str, io: Any, where: str, proto: Any) -> Iterator[Problem]:
    if given.WhichOneof("input_data_type") is None:
        what = f"warmup setting expects input '{name}' to have input_data_type set"
        yield Problem(where, what, 'write zero_data: true, random_data: true or input_data_file: "…"')
    if element_count(given.dims) == -1:
        what = f"warmup setting expects all variable-size dimensions are specified for input '{name}'"
        yield Problem(f"{where}.dims", what, "give the sizes to warm up with")
    if given.data_type not in BY_CONFIG_NUMBER:
        yield Problem(f"{where}.data_type", f"warmup input '{name}' of {proto.name} must specify 'data_type'")
        return
    if io is None or io.data_type not in BY_CONFIG_NUMBER or not io.dims:
        return
    ours, theirs = BY_CONFIG_NUMBER[io.data_type].config_name, BY_CONFIG_NUMBER[given.data_type].config_name
    if ours != theirs:
        what = f"warmup input '{name}' of {proto.name} is {theirs}, but the model expects {ours}"
        yield Problem(f"{where}.data_type", what)
    same = len(given.dims) == len(io.dims) and all(
        want in (-1, got) for want, got in zip(io.dims, given.dims, strict=True)
    )
    if not same and element_count(given.dims) != -1:
        what = (
            f"warmup input '{name}' of {proto.name} has dims {list(given.dims)}, but the model expects {list(io.dims)}"
        )
        yield Problem(f"{where}.dims", what, "without the batch dimension")


def _check_files(proto: Any, model_directory: Path) -> Iterator[Problem]:
    yield from read_labels(proto, model_directory)[1]
    yield from read_initial_states(proto, model_directory)[1]
    root = (model_directory / WARMUP_DIRECTORY).resolve()
    for i, warmup in enumerate(proto.model_warmup):
        for name in sorted(warmup.inputs):
            filename = warmup.inputs[name].input_data_file
            if not filename:
                continue
            path = (root / filename).resolve()
            shown = f"{model_directory.name}/{WARMUP_DIRECTORY}/{filename}"
            where = f'model_warmup[{i}].inputs["{name}"].input_data_file'
            if not path.is_relative_to(root):
                yield Problem(where, f"warmup data file '{shown}' is outside the model's warmup directory")
            elif not path.is_file():
                what = f"failed to open text file for read {shown}: No such file or directory"
                yield Problem(where, what, f"put the file in {model_directory.name}/{WARMUP_DIRECTORY}/")
