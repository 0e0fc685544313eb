# ruff: noqa: E501 (tables read best with a row per line)
"""Everything that can be wrong with a config, a row each. Texts are those of Triton's model_config_utils.cc."""

from __future__ import annotations

from pathlib import Path

import pytest

from doorstep.backends.base import Execution
from doorstep.config.check import EXECUTIONS, check
from doorstep.config.complete import complete_backend, normalise
from doorstep.config.load import parse_text_config
from doorstep.config.support import WITHOUT_EFFECT, fields_without_meaning
from doorstep.errors import Problem

GOOD = """
    name: "m" backend: "onnxruntime" platform: "onnxruntime_onnx" max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: [ 2, -1 ] }
    output { name: "y" data_type: TYPE_FP32 dims: 2 }
"""
TENSORS = (
    "input {{ name: 'x' data_type: TYPE_FP32 dims: [ {dims} ] reshape {{ shape: [ {shape} ] }} }} "
    "output {{ name: 'y' data_type: TYPE_FP32 dims: 2 }}"
)


def found(text: str, *, base: str = GOOD, gpus: tuple[int, ...] = ()) -> list[Problem]:
    """What is wrong with `text` merged over a good config."""
    message = parse_text_config(base, name="m")
    message.MergeFrom(parse_text_config(text, name="m"))
    complete_backend(message, "m", Path("/nowhere/m"))
    return check(message, directory_name="m", backends=["onnxruntime"], gpus=gpus)


def problems(text: str, *, base: str = GOOD, gpus: tuple[int, ...] = ()) -> dict[str, str]:
    """where → what; the last of a place."""
    return {p.where: p.what for p in found(text, base=base, gpus=gpus)}


def test_a_good_config_has_no_problem() -> None:
    assert problems("") == {}


WRONG = [
    ("max_batch_size: -1", "max_batch_size", "'max_batch_size' must be non-negative value for m"),
    ('name: "n"', "name", "unexpected directory name 'm' for model 'n', directory name must equal model name"),
    ('backend: "onnx"', "backend", "unable to find backend library for backend 'onnx', try specifying runtime on the model configuration."),
    ('platform: "pytorch_libtorch"', "platform", "unexpected 'platform' and 'backend' pair, got:pytorch_libtorch, onnxruntime"),
    ("input { data_type: TYPE_FP32 dims: 1 }", "input[1]", "model input must specify 'name' for m"),
    ("input { name: 'z' dims: 1 }", "input[1].data_type", "model input 'z' must specify 'data_type' for m"),
    ("output { name: 'z' data_type: TYPE_FP32 }", "output[1].dims", "model output 'z' must specify 'dims' for m"),
    ("input { name: 'z' data_type: 99 dims: 1 }", "input[1].data_type", "model input 'z' must specify 'data_type' for m"),
    ("input { name: 'z' data_type: TYPE_FP32 dims: 0 }", "input[1].dims[0]", "model input 'z' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m"),
    ("input { name: 'z' data_type: TYPE_FP32 dims: [ 1, -2 ] }", "input[1].dims[1]", "model input 'z' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m"),
    ("input { name: 'z' data_type: TYPE_FP32 dims: [ 4294967296, 4294967296 ] }", "input[1].dims", "element count for tensor 'z dims' exceeds maximum size of 9223372036854775807 for m"),
    ("input { name: 'x' data_type: TYPE_FP32 dims: 1 }", "input[1].name", "model input 'x' is listed twice for m"),
    ("input { name: 'z' data_type: TYPE_FP32 dims: 1 format: FORMAT_NCHW }", "input[1].format", "model input NHWC/NCHW require 3 dims for m"),
    ("input { name: 'z' data_type: TYPE_INT32 dims: 1 is_shape_tensor: true }", "input[1].is_shape_tensor", "shape tensors are only supported for TensorRT platform for m"),
    ("output { name: 'z' data_type: TYPE_INT32 dims: 1 is_non_linear_format_io: true }", "output[1].is_non_linear_format_io", "Non-linear IO format is only supported for the TensorRT platform for m"),
    ("version_policy { }", "version_policy", "must specify 'version policy' for m"),
    ("version_policy { latest { } }", "version_policy.latest", "version policy 'latest' keeps 0 versions of m, so none would be served"),
    ("version_policy { specific { } }", "version_policy.specific", "version policy 'specific' lists no version of m, so none would be served"),
    ("version_policy { specific { versions: [ 1, -1 ] } }", "version_policy.specific.versions[1]", "version -1 of m cannot exist"),
    ("dynamic_batching { preferred_batch_size: [ 2, 0 ] }", "dynamic_batching.preferred_batch_size[1]", "dynamic batching preferred size must be positive for m"),
    ("dynamic_batching { preferred_batch_size: 8 }", "dynamic_batching.preferred_batch_size[0]", "dynamic batching preferred size must be <= max batch size for m"),
    ("dynamic_batching { priority_levels: 2 }", "dynamic_batching.default_priority_level", "default priority level must be in range [1, 2] for m"),
    ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "dynamic_batching.default_priority_level", "default priority level must be in range [1, 2] for m"),
    ("dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { } } }", 'dynamic_batching.priority_queue_policy["3"]', "priority queue policy must have priority level in range [1, 2] for m"),
    ("dynamic_batching { priority_levels: 2 default_priority_level: 1 preserve_ordering: true }", "dynamic_batching.preserve_ordering", "Only one priority level is allowed when 'preserve_ordering' is true for m"),
    ("dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }", "dynamic_batching.default_queue_policy", "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m"),
    ("instance_group { count: -1 }", "instance_group[0].count", "instance group 0 of model m has count -1"),
    ("instance_group { name: 'g' kind: KIND_CPU gpus: 0 }", "instance_group[0].gpus", "instance group g of model m has kind KIND_CPU but specifies one or more GPUs"),
    ("instance_group { name: 'g' kind: KIND_MODEL gpus: 0 }", "instance_group[0].gpus", "instance group g of model m has kind KIND_MODEL but specifies one or more GPUs"),
    ("instance_group { name: 'g' kind: KIND_GPU }", "instance_group[0].kind", "instance group g of model m has kind KIND_GPU but no GPUs are available"),
    ("instance_group { name: 'g' kind: 9 }", "instance_group[0].kind", "instance group g of model m has unexpected kind 9"),
    ("instance_group { name: 'g' profile: '0' }", "instance_group[0].profile", "instance group g of model m and platform onnxruntime_onnx specifies profile field which is only supported for TensorRT models"),
    ("response_cache { enable: true } model_transaction_policy { decoupled: true }", "response_cache", "Response Cache does not currently support model m with 'decoupled' transaction policy. Please disable the response cache."),
    ("response_cache { enable: true } sequence_batching { }", "response_cache", "Response Cache does not currently support model m with sequence batching scheduler. Please disable the response cache."),
    ("parameters { key: 'execution' value { string_value: 'inlne' } }", 'parameters["execution"]', "unknown execution 'inlne' for m"),
    ("default_model_filename: '../../etc/passwd'", "default_model_filename", "default_model_filename '../../etc/passwd' of m is outside its directory"),
    ("default_model_filename: '/etc/passwd'", "default_model_filename", "default_model_filename '/etc/passwd' of m is outside its directory"),
    ("model_metrics { metric_control { histogram_options { buckets: 1 } } }", "model_metrics.metric_control[0]", "metric control must specify 'metric_identifier'"),
    ("model_metrics { metric_control { metric_identifier { family: 'f' } } }", "model_metrics.metric_control[0]", "metric control must specify 'histogram_options'"),
    ("model_warmup { batch_size: 1 inputs { key: 'x' value { data_type: TYPE_FP32 dims: [ 2, 1 ] } } }", 'model_warmup[0].inputs["x"]', "warmup setting expects input 'x' to have input_data_type set"),
    ("model_warmup { batch_size: 1 inputs { key: 'x' value { data_type: TYPE_FP32 dims: [ 2, -1 ] zero_data: true } } }", 'model_warmup[0].inputs["x"].dims', "warmup setting expects all variable-size dimensions are specified for input 'x'"),
    ("model_warmup { batch_size: 1 inputs { key: 'x' value { data_type: TYPE_FP32 dims: [ 3, 1 ] zero_data: true } } }", 'model_warmup[0].inputs["x"].dims', "warmup input 'x' of m has dims [3, 1], but the model expects [2, -1]"),
    ("model_warmup { batch_size: 1 inputs { key: 'x' value { data_type: TYPE_INT8 dims: [ 2, 1 ] zero_data: true } } }", 'model_warmup[0].inputs["x"].data_type', "warmup input 'x' of m is TYPE_INT8, but the model expects TYPE_FP32"),
    ("model_warmup { name: 'w' batch_size: 1 }", "model_warmup[0]", "warmup 'w' of m has no data for input 'x'"),
    ("sequence_batching { control_input { } }", "sequence_batching.control_input[0]", "sequence batching control tensor must have a name for m"),
    ("sequence_batching { control_input { name: 's' control { kind: CONTROL_SEQUENCE_START } } }", "sequence_batching.control_input[0].control[0]", "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for CONTROL_SEQUENCE_START for m"),
    ("sequence_batching { control_input { name: 's' control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] fp32_false_true: [ 0, 1 ] } } }", "sequence_batching.control_input[0].control[0]", "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and 'bool_false_true' for CONTROL_SEQUENCE_END for m"),
    ("sequence_batching { control_input { name: 's' control { kind: CONTROL_SEQUENCE_READY int32_false_true: 0 } } }", "sequence_batching.control_input[0].control[0].int32_false_true", "sequence batching control 'int32_false_true' must have exactly 2 entries for CONTROL_SEQUENCE_READY for m"),
    ("sequence_batching { control_input { name: 's' control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } } }", "sequence_batching.control_input[0].control[0].data_type", "unexpected data type for control CONTROL_SEQUENCE_CORRID for m. Allowed data types are TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING"),
    ("sequence_batching { control_input [ { name: 's' control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }, { name: 's' control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } } ] }", "sequence_batching.control_input[1]", "sequence batching control tensor 's' is specified for multiple control kinds for m"),
    ("sequence_batching { control_input [ { name: 's' control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }, { name: 't' control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } } ] }", "sequence_batching.control_input[1].control[0]", "sequence batching specifies multiple CONTROL_SEQUENCE_START tensors for m"),
    ("sequence_batching { control_input { name: 's' control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 bool_false_true: [ false, true ] } } }", "sequence_batching.control_input[0].control[0]", "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for CONTROL_SEQUENCE_CORRID for m"),
    ("sequence_batching { state { output_name: 'o' data_type: TYPE_FP32 dims: 1 } }", "sequence_batching.state[0].input_name", "sequence batching state must specify 'input_name' for m"),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' dims: 1 } }", "sequence_batching.state[0].data_type", "sequence batching state 'i' must specify 'data_type'"),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 0 } }", "sequence_batching.state[0].dims[0]", "sequence batching state 'i' dimension must be integer >= 1, or -1"),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 1 initial_state { name: 'a' data_type: TYPE_FP32 dims: 1 zero_data: true } initial_state { name: 'b' data_type: TYPE_FP32 dims: 1 zero_data: true } } }", "sequence_batching.state[0].initial_state", "initial_state field for state input 'i' must contain exactly one or zero element. Found '2' elements."),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 1 initial_state { name: 'a' data_type: TYPE_INT32 dims: 1 zero_data: true } } }", "sequence_batching.state[0].initial_state[0].data_type", "The data type used for 'initial_state' field of state 'i' does not match the state data type."),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 1 initial_state { data_type: TYPE_FP32 dims: 1 zero_data: true } } }", "sequence_batching.state[0].initial_state[0].name", "Field 'name' must be set when using initial_state for state input 'i'."),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 1 initial_state { name: 'a' data_type: TYPE_FP32 dims: [ 1, 2 ] zero_data: true } } }", "sequence_batching.state[0].initial_state[0].dims", "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input 'i'. 2 != 1"),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: -1 initial_state { name: 'a' data_type: TYPE_FP32 dims: -1 zero_data: true } } }", "sequence_batching.state[0].initial_state[0].dims[0]", "'initial_state' field for state input name 'i' contains variable dimensions."),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 2 initial_state { name: 'a' data_type: TYPE_FP32 dims: 3 zero_data: true } } }", "sequence_batching.state[0].initial_state[0].dims[0]", "'initial_state' dim for input name 'i' doesn't match 'state' dim description. 3 != 2"),
    ("sequence_batching { state { input_name: 'i' output_name: 'o' data_type: TYPE_FP32 dims: 1 initial_state { name: 'a' data_type: TYPE_FP32 dims: 1 } } }", "sequence_batching.state[0].initial_state[0]", "initial_state setting expects state'i' to have state_data set"),
    ("sequence_batching { oldest { preferred_batch_size: 9 } }", "sequence_batching.oldest.preferred_batch_size[0]", "sequence batching preferred batch size must be <= max batch size for m"),
    ("sequence_batching { direct { minimum_slot_utilization: 1.5 } }", "sequence_batching.direct.minimum_slot_utilization", "sequence batching minimum slot utilization must be in range (0.0, 1.0] for m"),
    ("ensemble_scheduling { }", "ensemble_scheduling", "must specify 'step' for ensemble 'm'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "where", "what"), WRONG, ids=[f"{where}: {text[:60]}" for text, where, _ in WRONG])
def test_a_wrong_config_gets_tritons_text_at_the_field(text: str, where: str, what: str) -> None:
    assert problems(text).get(where) == what


RESHAPES = [
    ("4", "2, 2", ""),
    ("2, 4, -1, 6", "8, -1, 1, 6", ""),
    ("1", "", ""),
    ("-1", "-1, 1", ""),
    ("-1, -1", "-1, 1, -1", ""),
    ("4", "3", "has different size for dims and reshape"),
    ("4", "", "has different size for dims and reshape"),
    ("4", "-1", "has different size for dims and reshape"),
    ("-1", "4", "has different size for dims and reshape"),
    ("2, -1", "-1, 2", "has different size for dims and reshape"),
    ("-1, -1", "-1", "has different number of variable-size dimensions for dims and reshape"),
    ("4", "4, 0", "reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension"),
    ("4", "4, -2", "reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension"),
]


@pytest.mark.parametrize(("dims", "shape", "what"), RESHAPES)
def test_a_reshape_keeps_the_elements_between_variable_dimensions(dims: str, shape: str, what: str) -> None:
    base = 'name: "m" backend: "onnxruntime" max_batch_size: 4 '
    assert [p.what for p in found(TENSORS.format(dims=dims, shape=shape), base=base)] == (
        [f"model input 'x' {what} for m"] if what else []
    )


def test_an_empty_reshape_needs_a_batch_or_one_element() -> None:
    base = 'name: "m" backend: "onnxruntime" '
    assert problems(TENSORS.format(dims="1", shape=""), base=base) == {}  # a scalar
    assert problems(TENSORS.format(dims="2", shape=""), base=base) == {
        "input[0].reshape": "model input 'x' cannot have empty reshape for non-batching model as scalar tensors are not "
        "supported for m"
    }


def test_all_problems_come_at_once() -> None:
    text = "max_batch_size: -1 input { name: 'x' dims: 0 } instance_group { kind: KIND_GPU } version_policy { }"
    assert set(problems(text)) == {
        "max_batch_size",
        "version_policy",
        "input[1].data_type",
        "input[1].dims[0]",
        "input[1].name",
        "instance_group[0].kind",
    }


def test_a_gpu_group_may_name_gpus_that_are_there() -> None:
    assert problems("instance_group { kind: KIND_GPU gpus: [ 0, 1 ] }", gpus=(0, 1)) == {}
    [what] = problems("instance_group { name: 'g' kind: KIND_GPU gpus: [ 0, 7 ] }", gpus=(0, 1)).values()
    assert what == "instance group g of model m specifies invalid or unsupported gpu id 7"


def test_what_the_models_file_may_supply_is_not_missed_before_it_is_read() -> None:
    message = parse_text_config(
        'name: "m" backend: "python" input { name: "x" } dynamic_batching { preferred_batch_size: 8 }', name="m"
    )
    assert check(message, directory_name="m", partial=True) == []
    assert {p.where for p in check(message, directory_name="m")} == {
        "dynamic_batching.preferred_batch_size[0]",
        "input[0].data_type",
        "input[0].dims",
    }


def test_a_platform_nobody_knows_is_named() -> None:
    message = parse_text_config('name: "m" platform: "onnxruntime_onx"', name="m")
    [problem] = check(message, directory_name="m", partial=True)
    assert (problem.what, problem.fix) == (
        "unexpected platform type 'onnxruntime_onx' for m",
        "did you mean onnxruntime_onnx?",
    )


ENSEMBLE = """
    name: "m" platform: "ensemble"
    input { name: "IN" data_type: TYPE_FP32 dims: 1 } output { name: "OUT" data_type: TYPE_FP32 dims: 1 }
"""


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'input_map {{ key: "{k}" value: "{v}" }}' for k, v in inputs.items()]
    maps += [f'output_map {{ key: "{k}" value: "{v}" }}' for k, v in outputs.items()]
    return f'step {{ model_name: "{model}" {" ".join(maps)} }} '


FLOWS = [
    (step("a", {"x": "IN"}, {"y": "t"}) + step("b", {"x": "t"}, {"y": "OUT"}), []),
    (step("", {"x": "IN"}, {"y": "OUT"}), ["must specify 'model_name' in step 0 of ensemble 'm'"]),
    (step("a", {}, {"y": "OUT"}), ["must specify 'input_map' in step 0 of ensemble 'm'"]),
    (step("a", {"x": "IN"}, {}), ["must specify 'output_map' in step 0 of ensemble 'm'"]),
    (step("a", {"x": "IN"}, {"y": "OUT"}) + step("b", {"x": "IN"}, {"y": "OUT"}),
     ["ensemble tensor 'OUT' can appear in an output map only once for ensemble 'm' step 1"]),
    (step("a", {"x": "t"}, {"y": "OUT"}),
     ["ensemble input 'IN' for ensemble m is not used",
      "output 'OUT' for ensemble 'm' is not written: at least one of its depending tensors, 't', is not connected",
      "ensemble tensor 't' is unused in ensemble 'm'"]),
    (step("a", {"x": "IN"}, {"y": "t"}),
     ["ensemble output 'OUT' for ensemble m is not used", "ensemble tensor 't' is unused in ensemble 'm'"]),
    (step("a", {"x": "IN", "z": "u"}, {"y": "t"}) + step("b", {"x": "t"}, {"y": "u", "o": "OUT"}),
     ["output 'OUT' for ensemble 'm' is not written: at least one of its depending tensors, 'u', is not connected",
      "ensemble tensor 't' is unused in ensemble 'm'", "ensemble tensor 'u' is unused in ensemble 'm'"]),
    ("", ["ensemble scheduling must be set for ensemble m whose platform is ensemble"]),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "expected"), FLOWS)
def test_an_ensembles_tensors_must_flow_from_its_inputs_to_its_outputs(steps: str, expected: list[str]) -> None:
    text = f"ensemble_scheduling {{ {steps} }}" if steps else ""
    assert [p.what for p in found(text, base=ENSEMBLE)] == expected


def test_an_ensemble_has_no_instances_and_no_hints() -> None:
    assert {
        "instance group should not be specified for ensemble 'm'",
        "optimization should not be specified for ensemble 'm'",
    } <= set(problems("ensemble_scheduling { } instance_group { } optimization { }", base=ENSEMBLE).values())


def test_files_that_a_config_names_must_be_there_and_inside(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    (directory / "warmup").mkdir(parents=True)
    (directory / "warmup" / "good").touch()
    (directory / "labels.txt").touch()
    warm = "inputs {{ key: '{0}' value {{ data_type: TYPE_FP32 dims: [ 2, 1 ] input_data_file: '{0}' }} }}"
    text = (
        GOOD
        + "output { name: 'a' data_type: TYPE_FP32 dims: 1 label_filename: 'labels.txt' }"
        + "output { name: 'b' data_type: TYPE_FP32 dims: 1 label_filename: 'none.txt' }"
        + "output { name: 'c' data_type: TYPE_FP32 dims: 1 label_filename: '../../etc/passwd' }"
        + "model_warmup { batch_size: 0 "
        + "".join(warm.format(name) for name in ("good", "none", "../../x"))
        + "}"
    )
    message = parse_text_config(text, name="m")
    wrong = {p.where: p.what for p in check(message, directory_name="m", model_directory=directory)}
    assert (
        wrong["output[2].label_filename"] == "failed to open text file for read m/none.txt: No such file or directory"
    )
    assert wrong["output[3].label_filename"] == (
        "label file path 'm/../../etc/passwd' for output 'c' in model 'm' is outside model directory"
    )
    assert "m/warmup/none" in wrong['model_warmup[0].inputs["none"].input_data_file']
    assert "is outside" in wrong['model_warmup[0].inputs["../../x"].input_data_file']
    assert 'model_warmup[0].inputs["good"].input_data_file' not in wrong
    assert not any(str(tmp_path) in what for what in wrong.values())


def test_the_execution_values_are_the_backends() -> None:
    assert Execution.__args__ == EXECUTIONS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    ["model_transaction_policy { decoupled: false }", "dynamic_batching { priority_levels: 1 }", "response_cache { }"],
)
def test_a_field_that_asks_for_nothing_is_not_noted(text: str) -> None:
    message = parse_text_config("max_batch_size: 1 " + text, name="m")
    assert fields_without_meaning(message) == []


def test_fields_without_effect_are_said_once_each() -> None:
    message = parse_text_config(
        "optimization { cuda { graphs: true } priority: PRIORITY_MAX }"
        " instance_group [ { }, { passive: true } ]"
        " input { format: FORMAT_NHWC }",
        name="m",
    )
    lines = fields_without_meaning(message)
    assert [line.split(" has no effect: ")[0] for line in lines] == [
        "optimization.priority",
        "optimization.cuda",
        "instance_group[1].passive",
        "input[0].format",
    ]


def test_defaults_alone_are_nothing_to_note() -> None:
    message = parse_text_config(GOOD, name="m")
    normalise(message)
    assert fields_without_meaning(message) == []


def test_each_row_of_the_table_names_a_field_that_exists() -> None:
    for missing in WITHOUT_EFFECT:
        descriptor = parse_text_config("", name="m").DESCRIPTOR
        for part in missing.path.split("."):
            assert part in descriptor.fields_by_name, missing.path
            descriptor = descriptor.fields_by_name[part].message_type
