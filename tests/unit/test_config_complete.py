"""What a config gets without its model being read: its backend, Triton's defaults; and the way to ModelConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from doorstep import proto
from doorstep.config.complete import complete_backend, normalise, version_directories
from doorstep.config.load import parse_text_config
from doorstep.config.prepare import prepare_config
from doorstep.errors import ConfigError


@dataclass(frozen=True)
class Spec:
    name: str
    model_directory: Path
    version_directory: Path
    config: Any = field(default_factory=proto.ModelConfig)


def model(tmp_path: Path, name: str, *files: str) -> Path:
    """A model's directory with these files; a name that ends in / is a directory."""
    directory = tmp_path / name
    directory.mkdir()
    for file in files:
        path = directory / file
        if file.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return directory


# what is written, the files → backend, platform, default_model_filename (core, AutoCompleteBackendFields)
BACKENDS = [
    ("", ["1/model.onnx"], "onnxruntime", "onnxruntime_onnx", "model.onnx"),
    ("", ["1/model.onnx/"], "onnxruntime", "onnxruntime_onnx", "model.onnx"),
    ("", ["1/model.py"], "python", "", "model.py"),
    ("", ["1/model.plan"], "tensorrt", "tensorrt_plan", "model.plan"),
    ("", ["1/model.pt"], "pytorch", "pytorch_libtorch", "model.pt"),
    ("", ["1/model.pt2"], "pytorch", "torch_aoti", "model.pt2"),
    ("", ["1/model.xml", "1/model.bin"], "openvino", "", "model.xml"),
    ("", ["1/model.savedmodel/"], "tensorflow", "tensorflow_savedmodel", "model.savedmodel"),
    ("", ["1/model.graphdef"], "tensorflow", "tensorflow_graphdef", "model.graphdef"),
    ("", ["1/model.onnx", "1/model.py"], "onnxruntime", "onnxruntime_onnx", "model.onnx"),
    ("", ["1/model.py", "2/model.onnx"], "onnxruntime", "onnxruntime_onnx", "model.onnx"),
    ('platform: "onnxruntime_onnx"', [], "onnxruntime", "onnxruntime_onnx", "model.onnx"),
    ('platform: "pytorch_libtorch"', [], "pytorch", "pytorch_libtorch", "model.pt"),
    ('platform: "tensorflow_graphdef"', [], "tensorflow", "tensorflow_graphdef", "model.graphdef"),
    ('backend: "onnxruntime"', [], "onnxruntime", "onnxruntime_onnx", "model.onnx"),
    ('backend: "python"', [], "python", "", "model.py"),
    ('backend: "pytorch"', [], "pytorch", "pytorch_libtorch", "model.pt"),
    ('backend: "pytorch"', ["1/model.pt2"], "pytorch", "torch_aoti", "model.pt2"),
    ('default_model_filename: "model.py"', [], "python", "", "model.py"),
    ('backend: "onnxruntime" default_model_filename: "net.onnx"', [], "onnxruntime", "onnxruntime_onnx", "net.onnx"),
    ('backend: "mine"', ["1/model.onnx"], "mine", "", ""),
    ('platform: "strange"', ["1/model.onnx"], "", "strange", ""),
    ('platform: "ensemble"', ["1/model.onnx"], "", "ensemble", ""),
]


@pytest.mark.parametrize(("written", "files", "backend", "platform", "filename"), BACKENDS)
def test_the_backend_follows_from_the_files_as_in_triton(
    tmp_path: Path, written: str, files: list[str], backend: str, platform: str, filename: str
) -> None:
    directory = model(tmp_path, "m", *files)
    message = parse_text_config(written, name="m")
    assert complete_backend(message, "m", directory) == []
    assert (message.backend, message.platform, message.default_model_filename) == (backend, platform, filename)
    assert message.name == "m"


def test_a_model_called_something_dot_backend_has_that_backend(tmp_path: Path) -> None:
    directory = model(tmp_path, "model.identity", "1/")
    message = proto.ModelConfig()
    assert complete_backend(message, "model.identity", directory) == []
    assert (message.backend, message.default_model_filename) == ("identity", "model.identity")


@pytest.mark.parametrize(
    ("files", "fix"),
    [
        (
            ["1/resnet50.onnx"],
            'rename m/1/resnet50.onnx to model.onnx, or write in config.pbtxt backend: "onnxruntime"',
        ),
        (["1/main.py"], "rename m/1/main.py to model.py"),
        (["1/weights.bin"], "put model.onnx or model.py in m/1/"),
        ([], "put the model's file in m/1/"),
    ],
)
def test_an_undetermined_backend_says_tritons_words_and_what_to_do(tmp_path: Path, files: list[str], fix: str) -> None:
    [problem] = complete_backend(proto.ModelConfig(), "m", model(tmp_path, "m", *files))
    assert problem.what == (
        "Invalid model name: Could not determine backend for model 'm' with no backend in model configuration. "
        "Expected model name of the form 'model.<backend_name>'."
    )
    assert problem.fix.startswith(fix)


def test_version_folders_are_whole_numbers_without_leading_zeros(tmp_path: Path) -> None:
    directory = model(tmp_path, "m", "1/", "10/", "2/", "03/", "0/", "-1/", "x/", "1a/", "²/", "7")
    assert [d.name for d in version_directories(directory)] == ["10", "2", "1", "0"]


# written → what must be in it after (core, NormalizeModelConfig and NormalizeInstanceGroup)
DEFAULTS = [
    ("", "version_policy { latest { num_versions: 1 } }"),
    ("version_policy { all { } }", "version_policy { all { } }"),
    ("max_batch_size: 8 dynamic_batching { }", "dynamic_batching { preferred_batch_size: 8 }"),
    ("max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 2, 4 ] }",
     "dynamic_batching { preferred_batch_size: [ 2, 4 ] }"),
    ("dynamic_batching { }", "dynamic_batching { }"),
    ("max_batch_size: 3 sequence_batching { oldest { } }",
     "sequence_batching { max_sequence_idle_microseconds: 1000000 oldest { preferred_batch_size: 3 } }"),
    ("sequence_batching { max_sequence_idle_microseconds: 5 }",
     "sequence_batching { max_sequence_idle_microseconds: 5 }"),
    ("", "optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } }"),
    ("optimization { input_pinned_memory { enable: false } }",
     "optimization { input_pinned_memory { enable: false } output_pinned_memory { enable: true } }"),
    ("", 'instance_group { name: "m" kind: KIND_CPU count: 1 }'),
    ("instance_group [ { }, { count: 3 } ]",
     'instance_group { name: "m_0" kind: KIND_CPU count: 1 } instance_group { name: "m_1" kind: KIND_CPU count: 3 }'),
    ('instance_group { name: "g" kind: KIND_MODEL }', 'instance_group { name: "g" kind: KIND_MODEL count: 1 }'),
]  # fmt: skip


@pytest.mark.parametrize(("written", "expected"), DEFAULTS)
def test_defaults_are_tritons(written: str, expected: str) -> None:
    message = parse_text_config('name: "m" ' + written, name="m")
    normalise(message)
    wanted = parse_text_config(expected, name="m")
    for descriptor, value in wanted.ListFields():
        assert getattr(message, descriptor.name) == value


@pytest.mark.parametrize(
    ("group", "gpus", "expected"),
    [
        ("", (0, 1), "kind: KIND_GPU count: 1 gpus: [ 0, 1 ]"),
        ("gpus: [ 1 ]", (0, 1), "kind: KIND_GPU count: 1 gpus: [ 1 ]"),
        ("gpus: [ 5 ]", (0, 1), "kind: KIND_CPU count: 1"),
        ("kind: KIND_CPU", (0, 1), "kind: KIND_CPU count: 1"),
        ("gpus: [ 0 ]", (), "kind: KIND_CPU count: 1"),
    ],
)
def test_an_automatic_group_is_on_a_gpu_where_all_it_names_are_there(
    group: str, gpus: tuple[int, ...], expected: str
) -> None:
    message = parse_text_config(f'name: "m" instance_group {{ name: "g" {group} }}', name="m")
    normalise(message, gpus)
    assert (
        message.instance_group[0]
        == parse_text_config(f'instance_group {{ name: "g" {expected} }}', name="").instance_group[0]
    )


def test_defaults_are_set_once() -> None:
    message = parse_text_config("max_batch_size: 4 dynamic_batching { } instance_group { }", name="m")
    normalise(message)
    once = message.SerializeToString(deterministic=True)
    normalise(message)
    assert message.SerializeToString(deterministic=True) == once


def test_an_ensemble_gets_no_instances() -> None:
    message = parse_text_config('platform: "ensemble" ensemble_scheduling { }', name="m")
    normalise(message)
    assert not message.instance_group
    assert not message.HasField("optimization")


def add_tensors(message: Any) -> None:
    assert message.backend == "onnxruntime"  # known before the backend is asked
    message.max_batch_size = 4
    message.input.add(name="x", data_type=11, dims=[3])
    message.output.add(name="y", data_type=11, dims=[2])
    message.dynamic_batching.SetInParent()


def test_a_model_without_a_config_becomes_a_whole_one(tmp_path: Path) -> None:
    directory = model(tmp_path, "resnet", "1/model.onnx")
    written = proto.ModelConfig(name="resnet")
    config = prepare_config(Spec("resnet", directory, directory / "1", written), add_tensors)
    assert (config.name, config.backend, config.max_batch_size) == ("resnet", "onnxruntime", 4)
    assert config.inputs["x"].shape == (-1, 3)
    assert list(config.proto.dynamic_batching.preferred_batch_size) == [4]
    assert written == proto.ModelConfig(name="resnet")


def test_labels_come_with_the_output_they_belong_to(tmp_path: Path) -> None:
    directory = model(tmp_path, "m", "1/model.onnx")
    (directory / "labels.txt").write_bytes("cat\r\n\ndög\n".encode())

    def complete(message: Any) -> None:
        add_tensors(message)
        message.output[0].label_filename = "labels.txt"

    config = prepare_config(Spec("m", directory, directory / "1"), complete)
    assert config.outputs["y"].labels == ("cat", "", "dög")


def test_the_model_is_not_read_when_what_was_written_is_wrong(tmp_path: Path) -> None:
    directory = model(tmp_path, "m", "1/model.onnx")
    (directory / "config.pbtxt").write_text(
        'name: "other"\nmax_batch_size: -1\nsequence_batching { control_input { } }\n'
    )
    written = parse_text_config((directory / "config.pbtxt").read_text(), name="m")

    def complete(_: Any) -> None:
        raise AssertionError("read")

    with pytest.raises(ConfigError) as caught:
        prepare_config(Spec("m", directory, directory / "1", written), complete)
    assert [p.where for p in caught.value.problems] == [
        "m/config.pbtxt:1:1 name",
        "m/config.pbtxt:2:1 max_batch_size",
        "m/config.pbtxt:3:21 sequence_batching.control_input[0]",
    ]


def test_without_completion_everything_must_be_written(tmp_path: Path) -> None:
    directory = model(tmp_path, "m", "1/model.onnx")

    def complete(_: Any) -> None:
        raise AssertionError("completed")

    with pytest.raises(ConfigError, match="model configuration is not provided for model 'm'"):
        prepare_config(Spec("m", directory, directory / "1"), complete, complete=False)
    written = parse_text_config(
        "input { name: 'x' data_type: TYPE_FP32 dims: 1 } output { name: 'y' data_type: TYPE_FP32 dims: 1 }", name="m"
    )
    assert prepare_config(Spec("m", directory, directory / "1", written), complete, complete=False).max_batch_size == 0


def test_what_completion_makes_is_checked_as_well(tmp_path: Path) -> None:
    directory = model(tmp_path, "m", "1/model.onnx")
    for change, what in (
        (lambda m: m.input.add(name="x", data_type=11, dims=[0]), "dimension must be integer >= 1"),
        (lambda m: None, "model configuration is not provided"),
    ):
        with pytest.raises(ConfigError, match=what):
            prepare_config(Spec("m", directory, directory / "1"), change)
