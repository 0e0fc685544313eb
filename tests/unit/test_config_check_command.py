"""`doorstep check`: what a person, and a program, is told about a folder of models."""

from __future__ import annotations

from pathlib import Path

import onnx
import orjson
import pytest
from onnx import TensorProto, helper

from doorstep.cli.check import run


def write_onnx(path: Path) -> None:
    """x (batch, 3) → y (batch, 3), both FP32."""
    path.parent.mkdir(parents=True)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph), path)


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of each kind of fault, and two good models."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "models"
    write_onnx(root / "resnet" / "1" / "model.onnx")
    write(root / "shout" / "1" / "model.py", "import nothing_that_exists\nraise SystemExit(9)\n")
    write_onnx(root / "typed" / "1" / "model.onnx")
    write(
        root / "typed" / "config.pbtxt",
        "max_batch_size: 4\n"
        'input [ { name: "x" data_type: TYPE_FP64 dims: [ 3 ] } ]\n'
        'output [\n  { name: "y" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" } ]\n'
        "instance_group [ { kind: KIND_GPU } ]\n",
    )
    write_onnx(root / "misnamed" / "2" / "net.onnx")
    write(root / "slip" / "config.pbtxt", 'backend: "python"\ninputs { }\nmax_batchsize: 3\n')
    write(root / "slip" / "1" / "model.py")
    write(root / "unfinished" / "1" / "model.py", "def f(:\n")
    (root / "empty").mkdir()
    return root


def test_each_problem_has_its_place_what_and_fix(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 1
    told = orjson.loads(capsys.readouterr().out)
    assert told["ok"] is False
    by_name = {m["name"]: m for m in told["models"]}
    assert {name: [p["where"] for p in m["problems"]] for name, m in by_name.items()} == {
        "empty": ["empty/"],
        "misnamed": ["misnamed/ backend"],
        "resnet": [],
        "shout": [],
        "slip": ["slip/config.pbtxt:2:1", "slip/config.pbtxt:3:1"],
        "typed": [
            "typed/config.pbtxt:2:9 input 'x'",
            "typed/config.pbtxt:4:48 output[0].label_filename",
            "typed/config.pbtxt:5:20 instance_group[0].kind",
        ],
        "unfinished": ["unfinished/1/model.py:1:7"],
    }
    assert by_name["misnamed"]["problems"][0]["fix"].startswith("rename misnamed/2/net.onnx to model.onnx")
    assert by_name["empty"]["problems"][0]["what"] == "failed to load 'empty', no version is available"
    assert by_name["resnet"]["backend"] == "onnxruntime"
    assert by_name["resnet"]["versions"] == [1]
    assert by_name["shout"]["notes"] == ["input, output: filled in from model.py when the model is loaded"]


def test_the_text_says_the_same_with_paths_from_here(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 1
    out = capsys.readouterr().out
    assert "resnet: ok (onnxruntime, version 1)\n" in out
    assert "typed: 3 problems (onnxruntime, version 1)\n  models/typed/config.pbtxt:2:9 input 'x'\n" in out
    assert "    fix: did you mean input?\n" in out
    assert out.endswith("7 models checked, 5 with problems\n")


def test_good_models_exit_0(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("typed", "misnamed", "slip", "unfinished", "empty"):
        (models / name).rename(models.parent / name)
    assert run(["models"]) == 0
    assert capsys.readouterr().out.endswith("2 models checked, all ok\n")


def test_without_completion_a_model_needs_a_config(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json", "--disable-auto-complete-config"]) == 1
    by_name = {m["name"]: m for m in orjson.loads(capsys.readouterr().out)["models"]}
    assert "failed to open text file for read resnet/config.pbtxt" in by_name["resnet"]["problems"][0]["what"]


def test_a_version_that_the_policy_names_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_onnx(tmp_path / "m" / "1" / "model.onnx")
    write(tmp_path / "m" / "config.pbtxt", "version_policy { specific { versions: [ 1, 3 ] } }")
    assert run([str(tmp_path)]) == 1
    assert "version 3 is specified for model 'm', but the version directory is not present" in capsys.readouterr().out


def test_a_model_in_two_folders_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write_onnx(tmp_path / folder / "m" / "1" / "model.onnx")
    assert run([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "failed to poll model 'm': not unique across all model repositories" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("models/resnet", ["is a model, not a folder of models", "fix: name"]),
        ("nowhere", ["nowhere", "there is no such folder", "fix: name a folder of models"]),
        ("models/empty", ["there is no model here"]),
    ],
)
def test_a_folder_that_holds_no_models_says_what_it_is(
    models: Path, path: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([path]) == 1
    out = capsys.readouterr().out
    for word in words:
        assert word in out


def test_a_faulty_field_is_a_problem_at_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "m" / "1" / "model.py")
    write(tmp_path / "m" / "config.pbtxt", "max_batch_size: 2\nsequence_batching { control_input { } }\n")
    assert run([str(tmp_path), "--json"]) == 1
    [model] = orjson.loads(capsys.readouterr().out)["models"]
    [problem] = model["problems"]
    assert problem["where"] == "m/config.pbtxt:2:21 sequence_batching.control_input[0]"
    assert problem["what"] == "sequence batching control tensor must have a name for m"


@pytest.mark.parametrize(("steps", "words"), [
    (["a"], []),
    (["nobody"], ["ensemble e contains models that are not available or ambiguous: nobody"]),
    (["ints"], ["ensemble tensor IN: inconsistent data type: TYPE_FP32 is inferred from model e while TYPE_INT32"]),
    (["e"], ["circular dependency between ensembles: e -> ... -> e -> e"]),
])  # fmt: skip
def test_an_ensembles_steps_must_be_there_and_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[str], words: list[str]
) -> None:
    for name, kind in (("a", "FP32"), ("ints", "INT32")):
        write(tmp_path / name / "1" / "model")
        io = f'name: "{{}}" data_type: TYPE_{kind} dims: [ 1 ]'
        config = f'backend: "identity" input {{ {io.format("INPUT0")} }} output {{ {io.format("OUTPUT0")} }}'
        write(tmp_path / name / "config.pbtxt", config)
    (tmp_path / "e" / "1").mkdir(parents=True)
    text = 'platform: "ensemble" input { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] } '
    text += 'output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] } ensemble_scheduling { '
    ends = ("IN", "OUT") if steps == ["e"] else ("INPUT0", "OUTPUT0")
    for name in steps:
        text += f'step {{ model_name: "{name}" model_version: -1 input_map {{ key: "{ends[0]}" value: "IN" }} '
        text += f'output_map {{ key: "{ends[1]}" value: "OUT" }} }} '
    write(tmp_path / "e" / "config.pbtxt", text + "}")
    assert run([str(tmp_path)]) == (1 if words else 0)
    out = capsys.readouterr().out
    for word in words:
        assert word in out


@pytest.mark.parametrize(
    ("config", "where", "words"),
    [
        (
            'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "$$TRITON_MODEL_DIRECTORY/env.tar.gz" } }',
            'parameters["EXECUTION_ENV_PATH"]',
            "there is no environment at",
        ),
        ('model_repository_agents { agents { name: "relocation" } }', "model_repository_agents", "'relocation'"),
        (
            'model_repository_agents { agents { name: "checksum" parameters { key: "MD5:1/model.py" value: "0" } } }',
            "model_repository_agents",
            "Mismatched MD5 hash for file 1/model.py, expect: 0, got: d41d8cd98f00b204e9800998ecf8427e",  # of no bytes
        ),
    ],
)
def test_what_a_load_would_miss_is_told_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, where: str, words: str
) -> None:
    write(tmp_path / "m" / "1" / "model.py")
    write(tmp_path / "m" / "config.pbtxt", f'backend: "python"\n{config}\n')
    assert run([str(tmp_path), "--json"]) == 1
    [problem] = orjson.loads(capsys.readouterr().out)["models"][0]["problems"]
    assert where in problem["where"]
    assert words in problem["what"]


def test_an_ensemble_needs_its_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path / "e" / "config.pbtxt",
        'platform: "ensemble" input { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] } '
        'output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] } '
        'ensemble_scheduling { step { model_name: "m" model_version: -1 input_map { key: "x" value: "IN" } '
        'output_map { key: "y" value: "OUT" } } }',
    )
    assert run([str(tmp_path), "--json"]) == 1
    [problem] = orjson.loads(capsys.readouterr().out)["models"][0]["problems"]
    assert problem["what"] == "failed to load 'e', no version is available"
    assert problem["fix"].startswith("make the folder e/1/")


def test_the_command_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run([])
    assert caught.value.code == 2
    assert "MODELS" in capsys.readouterr().err
