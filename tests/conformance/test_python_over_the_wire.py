"""Python models as a user has them: files in a folder, a server started on it, clients. Knows nothing of the inside."""

from __future__ import annotations

import json
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from doorstep.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = pytest.mark.xdist_group("python-over-the-wire")

SHOUT = """
import doorstep
class Model(doorstep.Model):
    def predict(self, text: list[str]) -> list[str]:
        return [t.upper() for t in text]
"""

KINDS = '''
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypedDict
import doorstep
import numpy as np
import numpy.typing as npt

class Result(TypedDict):
    count: int
    mean: float
    any: bool
    joined: str
    raw: bytes
    matrix: Annotated[npt.NDArray[np.float32], (2, 2)]
    names: list[str]
    grid: list[list[float]]

class Model(doorstep.Model):
    def predict(
        self,
        number: int,
        share: float,
        flag: bool,
        name: str,
        blob: bytes,
        rows: list[list[float]],
        image: Annotated[npt.NDArray[np.float32], (2, 2)],
        pixels: npt.NDArray[np.uint8],
        times: int = 2,
    ) -> Result:
        """Every kind of argument, and of result."""
        assert type(number) is int and type(share) is float and type(flag) is bool
        assert type(name) is str and type(blob) is bytes and isinstance(rows, list)
        return {
            "count": number * times, "mean": share, "any": flag, "joined": name + "!", "raw": blob[::-1],
            "matrix": image @ image, "names": [name] * int(pixels.sum()), "grid": rows,
        }
'''

LIVING = """
import doorstep

class Model(doorstep.Model):
    def load(self) -> None:
        self.greeting = (self.context.directory / "greeting.txt").read_text().strip()
        print(f"loading {self.context.name} version {self.context.version} on {self.context.instance}")

    def predict(self, name: str) -> str:
        print(f"greeting {name}")
        self.context.log("by the log")
        if name == "nobody":
            raise ValueError("there is nobody")
        if name == "bad":
            from doorstep.errors import InvalidArgument
            raise InvalidArgument("a bad name")
        if name == "gone":
            from doorstep.errors import NotFound
            raise NotFound("nobody of that name")
        if name == "wrong":
            return 7
        return f"{self.greeting} {name}"

    def unload(self) -> None:
        print("goodbye")
"""

# In the style of Triton's own examples (python_backend, examples/add_sub): config and code side by side.
ADD_SUB_CONFIG = """
name: "add_sub"
backend: "python"

input [
  {
    name: "INPUT0"
    data_type: TYPE_FP32
    dims: [ 4 ]
  },
  {
    name: "INPUT1"
    data_type: TYPE_FP32
    dims: [ 4 ]
  }
]
output [
  {
    name: "OUTPUT0"
    data_type: TYPE_FP32
    dims: [ 4 ]
  },
  {
    name: "OUTPUT1"
    data_type: TYPE_FP32
    dims: [ 4 ]
  }
]

instance_group [{ kind: KIND_CPU }]
"""
ADD_SUB = """
import json
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.model_config = model_config = json.loads(args["model_config"])
        output0 = pb_utils.get_output_config_by_name(model_config, "OUTPUT0")
        self.dtype = pb_utils.triton_string_to_numpy(output0["data_type"])
        pb_utils.Logger.log_info("initialized as " + args["model_instance_name"])

    def execute(self, requests):
        responses = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
            responses.append(pb_utils.InferenceResponse(output_tensors=[
                pb_utils.Tensor("OUTPUT0", (a + b).astype(self.dtype)),
                pb_utils.Tensor("OUTPUT1", (a - b).astype(self.dtype)),
            ]))
        return responses

    def finalize(self):
        pb_utils.Logger.log_warn("finalizing")
"""
# Its config comes from the code, and its errors from the request.
ERRORS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        auto_complete_model_config.add_input({"name": "code", "data_type": "TYPE_STRING", "dims": [1]})
        auto_complete_model_config.add_output({"name": "rows", "data_type": "TYPE_INT32", "dims": [1]})
        auto_complete_model_config.set_max_batch_size(4)
        auto_complete_model_config.set_dynamic_batching()
        return auto_complete_model_config

    def execute(self, requests):
        responses = []
        for request in requests:
            codes = pb_utils.get_input_tensor_by_name(request, "code").as_numpy()
            code = codes[0, 0].decode()
            pb_utils.Logger.log_verbose("verbose " + code)
            if code == "raise":
                raise RuntimeError("all of them failed")
            if code == "ok":
                rows = np.full(codes.shape, len(codes), np.int32)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("rows", rows)]))
            else:
                error = pb_utils.TritonError(f"it was {code}", getattr(pb_utils.TritonError, code))
                responses.append(pb_utils.InferenceResponse(error=error))
        return responses
"""


def save(models: Path, name: str, source: str, config: str = "", **files: str) -> None:
    version = models / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(source)
    if config:
        (models / name / "config.pbtxt").write_text(config)
    for path, text in files.items():
        (version / path).write_text(text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("python")
    save(models, "shout", SHOUT)
    save(models, "kinds", KINDS)
    save(models, "living", LIVING)
    (models / "living" / "1" / "greeting.txt").write_text("Hello")
    save(models, "add_sub", ADD_SUB, ADD_SUB_CONFIG)
    save(models, "errors", ERRORS)
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=*") as found:
        yield found


def call(server: ServerProcess, path: str, body: Any = None) -> tuple[int, Any]:
    """A GET, or with a body a POST."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url(path), data), timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def tensor(name: str, datatype: str, shape: list[int], *data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": list(data)}


def infer(server: ServerProcess, model: str, *inputs: dict[str, Any], **rest: Any) -> tuple[int, Any]:
    return call(server, f"/v2/models/{model}/infer", {"inputs": list(inputs), **rest})


def greet(server: ServerProcess, name: str) -> tuple[int, Any]:
    return infer(server, "living", tensor("name", "BYTES", [1], name))


def lines_of(server: ServerProcess, text: str) -> list[str]:
    return [line for line in server.logs().splitlines() if text in line]


def wait_for_line(server: ServerProcess, text: str, count: int = 1) -> None:
    """What a model says reaches the log through a pipe and a thread, so it may come after the answer."""
    turn = threading.Event()
    for _ in range(3000):
        if len(lines_of(server, text)) >= count:
            return
        turn.wait(0.01)
    raise AssertionError(f"no line {text!r} in the log:\n{server.logs()}")


# doorstep.Model


def test_the_ten_line_model_answers_over_http_and_says_its_config(server: ServerProcess) -> None:
    status, answer = infer(server, "shout", tensor("text", "BYTES", [2], "hello", "grüß"))
    assert status == 200
    assert answer["outputs"] == [{"name": "output", "datatype": "BYTES", "shape": [2], "data": ["HELLO", "GRÜSS"]}]
    assert call(server, "/v2/models/shout") == (
        200,
        {
            "name": "shout",
            "versions": ["1"],
            "platform": "python",
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": "output", "datatype": "BYTES", "shape": [-1]}],
        },
    )


def test_the_ten_line_model_answers_over_grpc(server: ServerProcess) -> None:
    with grpcclient.InferenceServerClient(server.grpc) as client:
        text = np.array(["one", "two"], np.object_)
        result = client.infer("shout", [grpcclient.InferInput("text", [2], "BYTES").set_data_from_numpy(text)])
        assert result.as_numpy("output").tolist() == [b"ONE", b"TWO"]


def kinds_inputs() -> list[dict[str, Any]]:
    return [
        tensor("number", "INT64", [1], 3),
        tensor("share", "FP64", [1], 0.1),
        tensor("flag", "BOOL", [1], True),
        tensor("name", "BYTES", [1], "é"),
        tensor("blob", "BYTES", [1], "abc"),
        tensor("rows", "FP64", [2, 1], 1.5, 2.5),
        tensor("image", "FP32", [2, 2], 1, 1, 0, 1),
        tensor("pixels", "UINT8", [3], 1, 0, 1),
    ]


def test_every_kind_of_argument_and_result_crosses_the_wire(server: ServerProcess) -> None:
    status, answer = infer(server, "kinds", *kinds_inputs())
    assert status == 200, answer
    assert answer["outputs"] == [
        tensor("count", "INT64", [1], 6),
        tensor("mean", "FP64", [1], 0.1),
        tensor("any", "BOOL", [1], True),
        tensor("joined", "BYTES", [1], "é!"),
        tensor("raw", "BYTES", [1], "cba"),
        tensor("matrix", "FP32", [2, 2], 1.0, 2.0, 0.0, 1.0),
        tensor("names", "BYTES", [2], "é", "é"),
        tensor("grid", "FP64", [2, 1], 1.5, 2.5),
    ]


def test_an_argument_with_a_default_may_be_left_out_or_given(server: ServerProcess) -> None:
    status, answer = infer(server, "kinds", *kinds_inputs(), tensor("times", "INT64", [1], 10))
    assert (status, answer["outputs"][0]["data"]) == (200, [30])
    _, config = call(server, "/v2/models/kinds/config")
    assert {i["name"]: i["optional"] for i in config["input"]}["times"] is True


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (tensor("text", "INT32", [1], 1), "data-type is 'INT32', but model 'shout' expects 'BYTES'"),
        (tensor("text", "BYTES", [1, 1], "a"), "unexpected shape for input 'text' for model 'shout'. Expected [-1],"),
        (tensor("other", "BYTES", [1], "a"), "unexpected inference input 'other' for model 'shout'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_hints_is_refused_before_it_reaches_the_model(
    server: ServerProcess, wrong: dict[str, Any], text: str
) -> None:
    status, answer = infer(server, "shout", wrong)
    assert status == 400
    assert text in answer["error"]


def test_errors_of_a_model_have_their_status_and_leave_it_serving(server: ServerProcess) -> None:
    assert greet(server, "Ada")[1]["outputs"][0]["data"] == ["Hello Ada"]
    status, answer = greet(server, "nobody")
    assert status == 500
    assert "ValueError: there is nobody" in answer["error"]
    assert "Traceback" not in answer["error"]
    assert greet(server, "bad") == (400, {"error": "a bad name"})
    assert greet(server, "gone") == (404, {"error": "nobody of that name"})
    assert greet(server, "wrong") == (500, {"error": "output 'output': expected str, got an int"})
    assert greet(server, "Bob")[1]["outputs"][0]["data"] == ["Hello Bob"]


def test_the_traceback_of_a_models_error_is_in_the_log_with_its_line(server: ServerProcess) -> None:
    greet(server, "nobody")
    wait_for_line(server, "  | ValueError: there is nobody")
    log = server.logs()
    first = r"ERROR living_0 \| model 'living' raised at [^ ]*1/model.py:13\n"
    assert re.search(first + r"  \| Traceback \(most recent call last\):\n", log)
    assert re.search(r'\n  \|   File ".*living/1/model.py", line 13, in predict\n', log)


def test_what_a_model_prints_is_in_the_log_with_its_instances_name(server: ServerProcess) -> None:
    assert greet(server, "Eve")[0] == 200
    wait_for_line(server, "INFO living_0 | loading living version 1 on living_0")
    wait_for_line(server, "INFO living_0 | greeting Eve")
    wait_for_line(server, "INFO living_0 | by the log")


def test_load_and_unload_run_once_each(server: ServerProcess) -> None:
    folder = Path(next(word for word in server.argv if word.endswith("python0"))) / "living" / "1"
    said = len(lines_of(server, "living_0 | loading living version 1"))
    (folder / "greeting.txt").write_text("Welcome")
    assert call(server, "/v2/repository/models/living/unload", {})[0] == 200
    wait_for_line(server, "living_0 | goodbye")
    status, answer = greet(server, "Ada")
    assert (status, answer["error"]) == (404, "Request for unknown model: 'living' has no available versions")
    assert call(server, "/v2/repository/models/living/load", {})[0] == 200
    assert greet(server, "Ada")[1]["outputs"][0]["data"] == ["Welcome Ada"]
    wait_for_line(server, "living_0 | loading living version 1", said + 1)
    assert len(lines_of(server, "living_0 | loading living version 1")) == said + 1


def test_a_model_that_does_not_load_says_why_with_file_and_line(server: ServerProcess) -> None:
    models = Path(next(word for word in server.argv if word.endswith("python0")))
    save(
        models,
        "broken",
        SHOUT.replace("return", "import no_such_module; return", 1).replace(
            "import doorstep", "import doorstep, no_such_module"
        ),
    )
    status, answer = call(server, "/v2/repository/models/broken/load", {})
    assert status >= 400
    assert "model.py:2" in answer["error"]
    assert "No module named 'no_such_module'" in answer["error"]
    assert greet(server, "Ada")[0] == 200


# Triton's models


def add_sub_inputs() -> list[dict[str, Any]]:
    return [tensor("INPUT0", "FP32", [4], 1, 2, 3, 4), tensor("INPUT1", "FP32", [4], 4, 3, 2, 1)]


def test_a_repository_in_the_style_of_tritons_documentation_is_served_as_it_is(server: ServerProcess) -> None:
    status, answer = infer(server, "add_sub", *add_sub_inputs(), outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}])
    assert status == 200
    assert {o["name"]: o["data"] for o in answer["outputs"]} == {"OUTPUT0": [5] * 4, "OUTPUT1": [-3, -1, 1, 3]}
    wait_for_line(server, "INFO add_sub_0_0 | initialized as add_sub_0_0")


def test_auto_complete_config_gives_the_config(server: ServerProcess) -> None:
    _, config = call(server, "/v2/models/errors/config")
    assert (config["max_batch_size"], config["backend"]) == (4, "python")
    assert [(i["name"], i["data_type"], i["dims"]) for i in config["input"]] == [("code", "TYPE_STRING", [1])]
    assert "dynamic_batching" in config


CODES = {  # TritonError's code → HTTP status (http_server.cc), gRPC code (grpc_utils.cc)
    "UNKNOWN": (400, grpc.StatusCode.UNKNOWN),
    "INTERNAL": (500, grpc.StatusCode.INTERNAL),
    "NOT_FOUND": (404, grpc.StatusCode.NOT_FOUND),
    "INVALID_ARG": (400, grpc.StatusCode.INVALID_ARGUMENT),
    "UNAVAILABLE": (503, grpc.StatusCode.UNAVAILABLE),
    "UNSUPPORTED": (501, grpc.StatusCode.UNIMPLEMENTED),
    "ALREADY_EXISTS": (400, grpc.StatusCode.ALREADY_EXISTS),
    "CANCELLED": (400, grpc.StatusCode.CANCELLED),
}


@pytest.mark.parametrize("code", CODES)
def test_the_codes_of_triton_errors_are_statuses(server: ServerProcess, code: str) -> None:
    status, expected = CODES[code]
    assert infer(server, "errors", tensor("code", "BYTES", [1, 1], code)) == (status, {"error": f"it was {code}"})
    message = service_pb2.ModelInferRequest(model_name="errors")
    entry = message.inputs.add(name="code", datatype="BYTES", shape=[1, 1])
    entry.contents.bytes_contents.append(code.encode())
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=60)
    assert (caught.value.code(), caught.value.details()) == (expected, f"it was {code}")


def test_an_execute_that_raises_fails_its_requests_in_tritons_words(server: ServerProcess) -> None:
    status, answer = infer(server, "errors", tensor("code", "BYTES", [1, 1], "raise"))
    assert status == 500
    assert answer["error"].startswith("Failed to process the request(s) for model 'errors_0', message: ")
    assert "RuntimeError: all of them failed" in answer["error"]
    assert infer(server, "errors", tensor("code", "BYTES", [2, 1], "ok", "ok"))[1]["outputs"][0]["data"] == [2, 2]


def test_verbose_lines_are_in_the_log_only_where_they_are_asked_for(server: ServerProcess, tmp_path: Path) -> None:
    infer(server, "errors", tensor("code", "BYTES", [1, 1], "ok"))
    greet(server, "Zoe")
    wait_for_line(server, "greeting Zoe")
    assert not lines_of(server, "verbose ok")
    save(tmp_path, "errors", ERRORS)
    with ServerProcess(tmp_path, "--log-verbose=1") as talkative:
        infer(talkative, "errors", tensor("code", "BYTES", [1, 1], "ok"))
        wait_for_line(talkative, "errors_0 | verbose ok")


def test_finalize_runs_when_the_server_stops(tmp_path: Path) -> None:
    save(tmp_path, "add_sub", ADD_SUB, ADD_SUB_CONFIG)
    with ServerProcess(tmp_path) as server:
        assert server.stop() == 0
        wait_for_line(server, "WARNING add_sub_0_0 | finalizing")


def test_tritonclient_gives_the_models_error(server: ServerProcess) -> None:
    with grpcclient.InferenceServerClient(server.grpc) as client:
        name = grpcclient.InferInput("name", [1], "BYTES").set_data_from_numpy(np.array([b"bad"], np.object_))
        with pytest.raises(InferenceServerException, match="a bad name"):
            client.infer("living", [name])
