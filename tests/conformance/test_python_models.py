"""Python models in worker processes: what a person may write, and what comes out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from doorstep.errors import ConfigError, DoorstepError, ErrorCode
from doorstep.testing.python_models import PythonModel, request
from doorstep.types import DTYPES

SHOUT = """
import doorstep
class Model(doorstep.Model):
    def predict(self, text: list[str]) -> list[str]:
        return [t.upper() for t in text]
"""


def strings(*values: str | bytes) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = [v.encode() if isinstance(v, str) else v for v in values]
    return array


def model(tmp_path: Path, source: str, **rest) -> PythonModel:
    return PythonModel(tmp_path / "model", source, **rest)


def config_of(served: PythonModel) -> tuple[list, list]:
    p = served.config.proto
    return (
        [(t.name, served.config.inputs[t.name].datatype.name, list(t.dims), t.optional) for t in p.input],
        [(t.name, served.config.outputs[t.name].datatype.name, list(t.dims)) for t in p.output],
    )


def test_the_shortest_model_of_the_readme_works(tmp_path):
    with model(tmp_path, SHOUT) as shout:
        assert config_of(shout) == ([("text", "BYTES", [-1], False)], [("output", "BYTES", [-1])])
        assert shout(text=strings("hello", "größe"))["output"].tolist() == [b"HELLO", "GRÖSSE".encode()]
        assert shout(text=strings())["output"].tolist() == []


def test_every_kind_of_hint_gives_the_config_and_the_values(tmp_path):
    source = """
import doorstep
from typing import Annotated, TypedDict
import numpy as np
import numpy.typing as npt

class Answer(TypedDict):
    types: list[str]
    total: float
    doubled: npt.NDArray[np.float32]
    table: list[list[int]]
    raw: bytes
    yes: bool

class Model(doorstep.Model):
    def predict(
        self,
        words: list[str],
        blob: bytes,
        count: int,
        ratio: float,
        flag: bool,
        table: list[list[int]],
        array: npt.NDArray[np.float32],
        image: Annotated[npt.NDArray[np.uint8], (3, -1, 4)],
        half: Annotated[np.ndarray, "FP16", (2,)],
        matrix: np.ndarray[tuple[int, int], np.dtype[np.int16]],
        names: npt.NDArray[np.str_],
        extra: str | None = None,
        more: int = 7,
    ) -> Answer:
        values = [words, blob, count, ratio, flag, table, array, image, half, matrix, names, extra, more]
        return {
            "types": [type(v).__name__ for v in values]
            + [names.dtype.kind, words[0], str(names[0]), str(extra), str(more)],
            "total": count + ratio,
            "doubled": array * 2,
            "table": [[x + 1 for x in row] for row in table],
            "raw": blob[::-1],
            "yes": not flag,
        }
"""
    with model(tmp_path, source) as served:
        inputs, outputs = config_of(served)
        assert inputs == [
            ("words", "BYTES", [-1], False),
            ("blob", "BYTES", [1], False),
            ("count", "INT64", [1], False),
            ("ratio", "FP64", [1], False),
            ("flag", "BOOL", [1], False),
            ("table", "INT64", [-1, -1], False),
            ("array", "FP32", [-1], False),
            ("image", "UINT8", [3, -1, 4], False),
            ("half", "FP16", [2], False),
            ("matrix", "INT16", [-1, -1], False),
            ("names", "BYTES", [-1], False),
            ("extra", "BYTES", [1], True),
            ("more", "INT64", [1], True),
        ]
        assert outputs == [
            ("types", "BYTES", [-1]),
            ("total", "FP64", [1]),
            ("doubled", "FP32", [-1]),
            ("table", "INT64", [-1, -1]),
            ("raw", "BYTES", [1]),
            ("yes", "BOOL", [1]),
        ]
        given = {
            "words": strings("a"),
            "blob": strings(b"\0\xff"),
            "count": np.array([2], np.int64),
            "ratio": np.array([0.5]),
            "flag": np.array([True]),
            "table": np.array([[1, 2], [3, 4]]),
            "array": np.array([1, 2], np.float32),
            "image": np.zeros((3, 2, 4), np.uint8),
            "half": np.zeros(2, np.float16),
            "matrix": np.zeros((1, 2), np.int16),
            "names": strings("ä"),
        }
        out = served(**given)
        assert out["types"].tolist() == [
            *(b"list", b"bytes", b"int", b"float", b"bool", b"list"),
            *([b"ndarray"] * 5),
            *(b"NoneType", b"int", b"U", b"a", "ä".encode(), b"None", b"7"),
        ]
        assert out["total"].tolist() == [2.5]
        assert out["doubled"].tolist() == [2, 4]
        assert out["table"].tolist() == [[2, 3], [4, 5]]
        assert out["raw"].tolist() == [b"\xff\0"]
        assert out["yes"].tolist() == [False]
        given |= {"extra": strings("x"), "more": np.array([9])}
        assert served(**given)["types"].tolist()[-2:] == [b"x", b"9"]


@pytest.mark.parametrize(
    "returned",
    [
        "-> Answer:\n        return Answer('a', 1)\n",
        "-> Named:\n        return Named('a', 1)\n",
        ":\n        return {'label': 'a', 'score': 1}\n    outputs = {'label': str, 'score': int}\n",
    ],
    ids=["dataclass", "NamedTuple", "dict and outputs"],
)
def test_several_outputs_can_be_written_in_several_ways(tmp_path, returned):
    source = f"""
from dataclasses import dataclass
from typing import NamedTuple
import doorstep
@dataclass
class Answer:
    label: str
    score: int
class Named(NamedTuple):
    label: str
    score: int
class Model(doorstep.Model):
    def predict(self, x: int) {returned}"""
    with model(tmp_path, source) as served:
        out = served(x=np.array([1]))
        assert (out["label"].tolist(), out["score"].tolist()) == ([b"a"], [1])


def test_a_model_may_load_unload_and_ask_about_itself(tmp_path):
    source = """
import doorstep
class Model(doorstep.Model):
    def __init__(self):
        self.greeting = self.context.parameters["greeting"]
    def load(self):
        self.words = (self.context.directory / "words.txt").read_text().split()
        self.context.log("loaded")
    def unload(self):
        (self.context.model_directory / "unloaded").write_text("yes")
    def predict(self) -> list[str]:
        c = self.context
        return [self.greeting, *self.words, c.name, c.version, c.instance, c.config["backend"]]
"""
    config = 'parameters { key: "greeting" value { string_value: "hi" } }'
    with model(tmp_path, source, config=config, files={"1/words.txt": "a b"}) as served:
        out = served()["output"].tolist()
        assert out == [b"hi", b"a", b"b", b"model", b"1", b"model_0", b"python"]
        assert ("INFO", "model_0 | loaded") in served.lines
    assert (served.folder / "unloaded").read_text() == "yes"


def test_with_max_batch_size_requests_are_one_call_and_get_their_own_rows(tmp_path):
    source = """
import doorstep
import numpy as np
import numpy.typing as npt
class Model(doorstep.Model):
    max_batch_size = 8
    outputs = {"text": list[str], "sums": npt.NDArray[np.float32], "calls": list[int]}
    calls = 0
    def predict(self, text: list[str], values: npt.NDArray[np.float32]):
        self.calls += 1
        return {"text": [t + "!" for t in text], "sums": values.sum(axis=1), "calls": [self.calls] * len(text)}
"""
    with model(tmp_path, source) as served:
        assert served.config.proto.HasField("dynamic_batching")
        assert served.config.inputs["text"].shape == (-1, 1)
        assert served.config.inputs["values"].shape == (-1, -1)
        a = request({"text": strings("a", "b").reshape(2, 1), "values": np.ones((2, 3), np.float32)})
        b = request({"text": strings("c").reshape(1, 1), "values": np.full((1, 3), 2, np.float32)})
        odd = request({"text": strings("d").reshape(1, 1), "values": np.full((1, 5), 2, np.float32)})
        results = served.run(a, odd, b)
        first, alone, second = [{t.name: t.array.tolist() for t in result} for result in results]
        assert first == {"text": [[b"a!"], [b"b!"]], "sums": [[3], [3]], "calls": [[1], [1]]}
        assert second == {"text": [[b"c!"]], "sums": [[6]], "calls": [[1]]}
        assert alone == {"text": [[b"d!"]], "sums": [[10]], "calls": [[2]]}  # its rows do not stack with the others'


def test_a_request_gets_only_the_outputs_it_asks_for(tmp_path):
    source = """
import doorstep
class Model(doorstep.Model):
    outputs = {"a": int, "b": int}
    def predict(self, x: int):
        return {"a": x, "b": -x}
"""
    with model(tmp_path, source) as served:
        (result,) = served.run(request({"x": np.array([3])}, requested_outputs=("b",)))
        assert [(t.name, t.array.tolist()) for t in result] == [("b", [-3])]


def test_predict_may_be_a_coroutine(tmp_path):
    source = """
import asyncio, doorstep
class Model(doorstep.Model):
    async def predict(self, x: int) -> int:
        await asyncio.sleep(0)
        return x + 1
"""
    with model(tmp_path, source) as served:
        assert served(x=np.array([1]))["output"].tolist() == [2]


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BYTES"])
@pytest.mark.parametrize("elements", [0, 5, 100_000], ids=["empty", "in the frame", "in shared memory"])
def test_every_datatype_comes_back_as_it_went(echo, name, elements):
    dtype = DTYPES[name].numpy
    values = (np.arange(elements) % 100).astype(dtype)
    out = echo(**{name: values})[name]
    assert out.dtype == dtype
    assert np.array_equal(out, values)


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    config = "".join(
        f'input {{ name: "{n}" data_type: {d.config_name} dims: -1 optional: true }}\n'
        f'output {{ name: "{n}" data_type: {d.config_name} dims: -1 }}\n'
        for n, d in DTYPES.items()
    )
    source = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(request.inputs()) for request in requests]
"""
    with PythonModel(tmp_path_factory.mktemp("echo") / "echo", source, config=config) as served:
        yield served


def test_nan_and_infinity_pass(echo):
    values = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    assert echo(FP32=values)["FP32"].tobytes() == values.tobytes()
    half = values.astype(ml_dtypes.bfloat16)
    assert echo(BF16=half)["BF16"].tobytes() == half.tobytes()


@pytest.mark.parametrize("size", [3, 200_000], ids=["in the frame", "in shared memory"])
def test_strings_keep_every_byte(echo, size):
    values = strings(b"", b"\0", b"\xff\xfe", "ü\n", b"x" * size, b"trailing\0")
    assert echo(BYTES=values)["BYTES"].tolist() == values.tolist()


def test_arrays_that_are_not_contiguous_or_scalars_pass(echo):
    assert echo(INT32=np.arange(10, dtype=np.int32)[::2])["INT32"].tolist() == [0, 2, 4, 6, 8]
    assert echo(INT32=np.array(5, np.int32))["INT32"].shape == ()
    assert echo(FP32=np.ones((0, 7), np.float32))["FP32"].shape == (0, 7)
    big = np.arange(200_000, dtype=np.int32).reshape(2, 100_000).T
    assert np.array_equal(echo(INT32=big)["INT32"], big)


def test_outputs_stay_as_they_are_while_the_next_batch_runs(echo):
    kept = [echo(INT32=np.full(50_000, i, np.int32))["INT32"] for i in range(8)]
    assert [array[0] for array in kept] == list(range(8))
    assert all((array == i).all() for i, array in enumerate(kept))


def test_a_model_may_keep_its_inputs(tmp_path):
    source = """
import doorstep, numpy as np, numpy.typing as npt
class Model(doorstep.Model):
    kept = []
    def predict(self, x: npt.NDArray[np.int32]) -> list[int]:
        self.kept.append(x)
        return [int(k[-1]) for k in self.kept]
"""
    with model(tmp_path, source) as served:
        for i in range(4):
            out = served(x=np.full(50_000, i, np.int32))["output"].tolist()
            assert out == list(range(i + 1))


def test_a_model_may_change_its_inputs_in_place(tmp_path):
    source = """
import doorstep, numpy as np, numpy.typing as npt
class Model(doorstep.Model):
    def predict(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        x /= 2
        return x
"""
    with model(tmp_path, source) as served:
        for size in (4, 100_000):
            given = np.full(size, 3, np.float32)
            assert served(x=given)["output"][-1] == 1.5
            assert given[-1] == 3  # the server's copy is another


# Errors


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such word')", "ValueError: no such word"),
        ("raise KeyError", "KeyError"),
        ("return None", "output 'output': expected list[int], got None (does predict `return` it?)"),
        ("return 'abc'", "output 'output': expected list[int], got a str"),
        ("return [1, 'a']", "output 'output': expected list[int], got one with a str in it"),
        ("return [1.5]", "output 'output': expected list[int], got one with a float in it"),
        ("return [2**63]", "output 'output' cannot be INT64: "),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_what_goes_wrong_in_predict_is_the_requests_error_and_no_more(tmp_path, body, message):
    source = f"""
import doorstep
class Model(doorstep.Model):
    def predict(self, x: int) -> list[int]:
        if x:
            {body}
        return [x]
"""
    with model(tmp_path, source) as served:
        with pytest.raises(DoorstepError) as error:
            served(x=np.array([1]))
        assert error.value.message.startswith(message)
        assert "Traceback" not in error.value.message
        assert error.value.code is ErrorCode.INTERNAL
        assert served(x=np.array([0]))["output"].tolist() == [0]
        assert served.restarts == 0


def test_the_traceback_is_in_the_log(tmp_path):
    source = SHOUT.replace("[t.upper() for t in text]", "1 + text")
    with model(tmp_path, source) as served:
        with pytest.raises(DoorstepError, match="TypeError"):
            served(text=strings("a"))
        served.wait_for_line('model.py", line 5, in predict')


def test_an_error_of_ours_keeps_its_code(tmp_path):
    source = """
import doorstep
from doorstep.errors import InvalidArgument
class Model(doorstep.Model):
    def predict(self, x: int) -> int:
        raise InvalidArgument("x must be even")
"""
    with model(tmp_path, source) as served, pytest.raises(DoorstepError, match=r"^x must be even$") as error:
        served(x=np.array([1]))
    assert error.value.code is ErrorCode.INVALID_ARG


@pytest.mark.parametrize(
    ("hint", "returned", "message"),
    [
        ("npt.NDArray[np.float32]", "np.zeros(2)", "output 'output' is an array of float64; expected float32"),
        ("Annotated[npt.NDArray[np.float32], (2, 3)]", "np.zeros((3, 2), np.float32)",
         "output 'output' has shape [3, 2]; expected [2, 3]"),
        ("list[list[int]]", "[[1], [2, 3]]",
         "output 'output': expected list[list[int]], got lists of different lengths (1, 2)"),
        ("list[list[int]]", "[1]",
         "output 'output': expected list[list[int]], got one with an int where a list belongs"),
        ("str", "b'a'", "output 'output': expected str, got a bytes"),
        ("int", "True", "output 'output': expected int, got a bool"),
    ],
)  # fmt: skip
def test_a_wrong_output_is_named_with_what_was_expected_and_what_came(tmp_path, hint, returned, message):
    source = f"""
import doorstep, numpy as np, numpy.typing as npt
from typing import Annotated
class Model(doorstep.Model):
    def predict(self) -> {hint}:
        return {returned}
"""
    with model(tmp_path, source) as served, pytest.raises(DoorstepError) as error:
        served()
    assert error.value.message.startswith(message)


def test_missing_unknown_and_too_few_outputs_are_named(tmp_path):
    source = """
import doorstep
class Model(doorstep.Model):
    max_batch_size = 4
    outputs = {"a": list[int], "b": list[int]}
    def predict(self, x: list[int]):
        return [{"a": x}, {"a": x, "c": x}, {"a": x, "b": x[:1]}, {"a": x, "b": x, "c": x}, 5][x[0]]
"""
    expected = [
        "predict returned no output 'b'; it returned: a",
        "predict returned no output 'b'; it returned: a, c",
        "output 'b' has 1 rows; the batch has 2, and each must get its own",
        "predict returned 'c', which is no output; the outputs are: a, b",
        "TypeError: predict must return a dict of its outputs, but returned a int",
    ]
    with model(tmp_path, source) as served:
        for i, message in enumerate(expected):
            with pytest.raises(DoorstepError) as error:
                served(x=np.array([[i], [i]]))
            assert error.value.message == message


def test_text_that_is_not_utf8_is_the_clients_fault(tmp_path):
    with model(tmp_path, SHOUT) as served, pytest.raises(DoorstepError, match="input 'text' holds bytes") as error:
        served(text=strings(b"\xff"))
    assert error.value.code is ErrorCode.INVALID_ARG


# What cannot be loaded

CLASS = "import doorstep\nclass Model(doorstep.Model):\n"


@pytest.mark.parametrize(
    ("source", "where", "what"),
    [
        ("import doorstep\nclass Model(doorstep.Model:\n", ":2", "SyntaxError"),
        ("x = 1\nimport no_such_package\n", ":2", "pip install no_such_package"),
        ("import not_there.sub\n", ":1", "pip install not_there"),
        ("def f():\n    raise ValueError('at import')\nf()\n", ":2", "ValueError: at import"),
        ("import sys\nsys.exit('stop')\n", ":2", "SystemExit: stop"),
        ("x = 1\n", "", "write `class Model(doorstep.Model)` with a `predict` method"),
        ("import doorstep\nclass A(doorstep.Model): ...\nclass B(doorstep.Model): ...\n", "", "several classes"),
        (CLASS + "  pass\n", ":2", "has no method `predict`"),
        (CLASS + "  def predict(self, x) -> int: ...\n", ":3", "argument 'x' of predict has no type hint"),
        (CLASS + "  def predict(self, x: int): ...\n", ":3", "nothing says what predict returns"),
        (CLASS + "  def predict(self, x: set[int]) -> int: ...\n", ":3", "set[int] is no tensor"),
        (CLASS + "  def predict(self, x: int | str) -> int: ...\n", ":3", "may be several types"),
        (CLASS + "  def predict(self, *x: int) -> int: ...\n", ":3", "cannot be an input"),
        (CLASS + "  def predict(self, x: Tensor) -> int: ...\n", ":3", "name 'Tensor' is not defined"),
        (CLASS + "  def predict(self, x: int) -> tuple[int, str]: ...\n", ":3", "for several outputs a TypedDict"),
        (CLASS + "  max_batch_size = 4\n  def predict(self, x: int) -> list[int]: ...\n", ":4", "write list[int]"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_says_where_what_and_what_to_do(tmp_path, source, where, what):
    with pytest.raises(ConfigError) as error:
        model(tmp_path, source)
    (problem,) = error.value.problems
    assert problem.where.endswith(f"model.py{where}")
    assert what in str(problem)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Python model file not found in '.*other.py'"):
        model(tmp_path, SHOUT, config='default_model_filename: "other.py"')


def test_the_config_file_has_the_last_word_where_it_does_not_contradict(tmp_path):
    config = """
    input { name: "x" data_type: TYPE_INT32 dims: 3 }
    output { name: "output" data_type: TYPE_FP32 dims: [-1] }
    """
    source = """
import doorstep
class Model(doorstep.Model):
    def predict(self, x: list[int]) -> list[float]:
        return [v / 2 for v in x]
"""
    with model(tmp_path, source, config=config) as served:
        assert config_of(served) == ([("x", "INT32", [3], False)], [("output", "FP32", [-1])])
        out = served(x=np.array([1, 2, 3], np.int32))["output"]
        assert (out.dtype, out.tolist()) == (np.float32, [0.5, 1, 1.5])


def test_every_contradiction_of_config_and_class_is_told(tmp_path):
    config = """
    input { name: "text" data_type: TYPE_FP32 dims: -1 }
    input { name: "other" data_type: TYPE_FP32 dims: -1 }
    output { name: "result" data_type: TYPE_STRING dims: -1 }
    """
    with pytest.raises(ConfigError) as error:
        model(tmp_path, SHOUT, config=config)
    texts = [problem.what for problem in error.value.problems]
    assert texts == [
        "config.pbtxt has input 'other', but predict has no such argument",
        "argument 'text' of predict is list[str], but config.pbtxt says TYPE_FP32",
        "config.pbtxt has output 'result', but predict returns 'output'",
    ]


def test_load_that_raises_is_told_with_its_line(tmp_path):
    source = SHOUT + "    def load(self):\n        open('/no/such/file')\n"
    with pytest.raises(DoorstepError, match=r"load\(\) of model 'model' failed: .*model.py:7: FileNotFoundError"):
        model(tmp_path, source)


# Triton's own models

ADD_SUB = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils
import helper                      # beside model.py
from .helper import SIGN           # as part of the version's package
import shared_code                 # in the model's folder

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        for name in ("INPUT0", "INPUT1"):
            config.add_input({"name": name, "data_type": "TYPE_FP32", "dims": [4]})
        for name in ("OUTPUT0", "OUTPUT1"):
            config.add_output({"name": name, "data_type": "TYPE_FP32", "dims": [4]})
        config.set_max_batch_size(8)
        config.set_dynamic_batching()
        return config

    def initialize(self, args):
        self.args = args
        self.config = json.loads(args["model_config"])
        output = pb_utils.get_output_config_by_name(self.config, "OUTPUT0")
        self.dtype = pb_utils.triton_string_to_numpy(output["data_type"])
        pb_utils.Logger.log_warn(json.dumps({k: v for k, v in args.items() if k != "model_config"}))

    def execute(self, requests):
        responses = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
            if request.request_id() == "bad":
                responses.append(pb_utils.InferenceResponse(
                    error=pb_utils.TritonError("bad id", pb_utils.TritonError.NOT_FOUND)))
                continue
            if request.request_id() == "raise":
                raise RuntimeError("everything failed")
            if request.request_id() == "short":
                return []
            responses.append(pb_utils.InferenceResponse([
                pb_utils.Tensor("OUTPUT0", (a + b).astype(self.dtype)),
                pb_utils.Tensor("OUTPUT1", (a - b).astype(self.dtype)),
            ]))
        return responses

    def finalize(self):
        print("finalized")
"""
ADD_SUB_FILES = {"1/helper.py": "SIGN = 1\n", "shared_code.py": ""}


def add_sub_request(value: float, **rest):
    return request({"INPUT0": np.full((1, 4), value, np.float32), "INPUT1": np.ones((1, 4), np.float32)}, **rest)


def test_tritons_models_run_as_they_are(tmp_path):
    with model(tmp_path, ADD_SUB, files=ADD_SUB_FILES) as served:
        assert config_of(served) == (
            [("INPUT0", "FP32", [4], False), ("INPUT1", "FP32", [4], False)],
            [("OUTPUT0", "FP32", [4]), ("OUTPUT1", "FP32", [4])],
        )
        assert served.config.max_batch_size == 8
        assert served.config.proto.HasField("dynamic_batching")
        results = served.run(add_sub_request(1), add_sub_request(2, requested_outputs=("OUTPUT1",)))
        assert [[(t.name, t.array.tolist()) for t in result] for result in results] == [
            [("OUTPUT0", [[2] * 4]), ("OUTPUT1", [[0] * 4])],
            [("OUTPUT1", [[1] * 4])],
        ]
        level, line = served.lines[0]
        args = json.loads(line.partition(" | ")[2])
        assert level == "WARNING"
        assert args == {
            "model_instance_kind": "CPU",
            "model_instance_name": "model_0",
            "model_instance_device_id": "0",
            "model_repository": str(served.folder),
            "model_version": "1",
            "model_name": "model",
        }
    assert ("INFO", "model_0 | finalized") in served.lines


def test_one_requests_error_is_its_own_in_a_triton_model(tmp_path):
    with model(tmp_path, ADD_SUB, files=ADD_SUB_FILES) as served:
        good, bad = served.run(add_sub_request(1), add_sub_request(1, id="bad"))
        assert good[0].array.tolist() == [[2] * 4]
        assert (bad.message, bad.code) == ("bad id", ErrorCode.NOT_FOUND)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("raise", "Failed to process the request(s) for model 'model_0', message: RuntimeError: everything failed"),
        (
            "short",
            "Failed to process the request(s) for model 'model_0', message: Number of InferenceResponse objects do "
            "not match the number of InferenceRequest objects. InferenceRequest(s) size is:2, and InferenceResponse(s) "
            "size is:0\n",
        ),
    ],
)
def test_what_execute_raises_fails_the_batch_in_tritons_words(tmp_path, id, message):
    with model(tmp_path, ADD_SUB, files=ADD_SUB_FILES) as served:
        results = served.run(add_sub_request(1), add_sub_request(1, id=id))
        assert [result.message for result in results] == [message, message]
        assert {result.code for result in results} == {ErrorCode.INTERNAL}


def test_requests_of_a_triton_model_carry_everything(tmp_path):
    source = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    async def execute(self, requests):
        (r,) = requests
        x = r.inputs()[0]
        text = json.dumps([r.request_id(), r.correlation_id(), r.flags(), r.timeout(), json.loads(r.parameters()),
            list(r.requested_output_names()), r.is_cancelled(), x.name(), x.triton_dtype(), list(x.shape()), x.is_cpu(),
            pb_utils.get_model_dir()])
        back = pb_utils.Tensor.from_dlpack("again", x)
        assert (back.as_numpy() == x.as_numpy()).all() and (np.from_dlpack(x) == x.as_numpy()).all()
        assert (pb_utils.Tensor.from_dlpack("again", x.to_dlpack()).as_numpy() == x.as_numpy()).all()
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([text], dtype=object))])]
"""
    config = """
    input { name: "X" data_type: TYPE_INT16 dims: -1 }
    output { name: "Y" data_type: TYPE_STRING dims: 1 }
    """
    with model(tmp_path, source, config=config) as served:
        one = request(
            {"X": np.array([1, 2], np.int16)},
            id="i7",
            requested_outputs=("Y",),
            parameters={"a": 1, "b": "c", "d": True},
        )
        one.correlation_id = "seq"
        one.sequence_start = True
        one.timeout_us = 500
        (result,) = served.run(one)
        directory = str(served.folder / "1")
        assert json.loads(result[0].array[0]) == [
            "i7", "seq", 1, 500, {"a": 1, "b": "c", "d": True}, ["Y"], False, "X", 7, [2], True, directory,
        ]  # fmt: skip


def test_auto_complete_config_that_raises_or_returns_nothing_is_told(tmp_path):
    source = """
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "X", "data_type": "TYPE_FP32", "dims": [4]})
"""
    with pytest.raises(ConfigError, match=r"must return a valid pb.ModelConfig object"):
        PythonModel(tmp_path / "a", source)
    with pytest.raises(
        ConfigError, match="configuration expects datatype TYPE_INT8 for input 'X', model provides TYPE_FP"
    ):
        PythonModel(tmp_path / "b", source, config='input { name: "X" data_type: TYPE_INT8 dims: 4 }')


@pytest.mark.parametrize("threads", [3, 0, None])
def test_libraries_in_the_process_are_told_how_many_threads_to_use(tmp_path, monkeypatch, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")  # said by the person who started the server
    source = """
import os, doorstep
class Model(doorstep.Model):
    def predict(self) -> list[str]:
        return [os.environ.get("OMP_NUM_THREADS", ""), os.environ["MKL_NUM_THREADS"]]
"""
    expected = {3: b"3", 0: b"", None: str(len(os.sched_getaffinity(0))).encode()}[threads]
    with model(tmp_path, source, threads=threads) as served:
        assert served()["output"].tolist() == [expected, b"7"]


def test_another_backend_runs_in_a_process_as_well(tmp_path):
    config = """
    input { name: "INPUT0" data_type: TYPE_FP32 dims: -1 }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: -1 }
    """
    with model(tmp_path, "", backend="identity", config=config) as served:
        assert served(INPUT0=np.array([1, 2], np.float32))["OUTPUT0"].tolist() == [1, 2]
