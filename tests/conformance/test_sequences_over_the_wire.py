"""Sequences as clients see them: ONNX and Python models, direct and oldest, over HTTP, gRPC and streams.

Every model adds up what its sequence sends, so that each answer tells whether the requests before it were seen, in
order, and no other sequence's."""

from __future__ import annotations

import queue
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from doorstep.testing.onnx_models import save_model
from doorstep.testing.server import ServerFailed, ServerProcess

pytestmark = pytest.mark.xdist_group("sequences-over-the-wire")

FLOAT = TensorProto.FLOAT
STRATEGIES = {"direct": "direct { }", "oldest": "oldest { max_candidate_sequences: 8 }"}
TENSORS = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
"""
TEXT_TENSORS = TENSORS.replace('"y" data_type: TYPE_FP32', '"y" data_type: TYPE_STRING')
CONTROLS = """control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1 ] } ] }
]"""
TEXT_CONTROLS = """control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ 10, 20 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } ] },
    { name: "ID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } ] }
]"""

KEEPS_STATE = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            total = pb_utils.get_input_tensor_by_name(request, "before").as_numpy() + x
            outputs = [pb_utils.Tensor("y", total), pb_utils.Tensor("after", total)]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""

KEEPS_ITS_OWN = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.said = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            seen = {t.name(): t.as_numpy() for t in request.inputs()}
            if seen["READY"][0, 0] == 0:
                responses.append(pb_utils.InferenceResponse([]))
                continue
            name = seen["ID"][0, 0].decode()
            said = [] if seen["START"][0, 0] else self.said[name]
            said.append(str(int(seen["x"][0, 0])))
            self.said[name] = said
            end = "." if seen["END"][0, 0] == 20 else ","
            text = f"{name}: " + "+".join(said) + end
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([[text.encode()]], object))]))
        return responses
"""

COUNTS_DOWN = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.left = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            seen = {t.name(): t.as_numpy() for t in request.inputs()}
            if seen["READY"][0, 0] == 0:
                responses.append(pb_utils.InferenceResponse([]))
                continue
            key = int(seen["ID"][0, 0])
            if seen["START"][0, 0]:
                self.left[key] = [int(seen["x"][0, 0]), 0]
            self.left[key][1] += 1
            if self.left[key][1] < self.left[key][0]:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
                responses.append(None)
                continue
            runs = np.array([[self.left.pop(key)[1]]], np.float32)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", runs)]))
        return responses
"""

COUNTS_UP = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def initialize(self, args):
        self.left = {}
    def execute(self, requests):
        for request in requests:
            seen = {t.name(): t.as_numpy() for t in request.inputs()}
            if seen["READY"][0, 0] == 0:
                request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            key = int(seen["ID"][0, 0])
            if seen["START"][0, 0]:
                self.left[key] = [int(seen["x"][0, 0]), 0]
            run = self.left[key]
            run[1] += 1
            last = run[1] >= run[0]
            sender = request.get_response_sender()
            response = pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([[run[1]]], np.float32))])
            if last:
                del self.left[key]
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                sender.send(response)
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
"""


def state(input_name: str = "before", output_name: str = "after", dims: str = "1", initial: str = "") -> str:
    return (
        f'state {{ input_name: "{input_name}" output_name: "{output_name}" data_type: TYPE_FP32 dims: [ {dims} ] '
        f"{initial} }}"
    )


def write(folder: Path, config: str, code: str = "") -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config)
    if code:
        (folder / "1" / "model.py").write_text(code)


def save_sum(folder: Path) -> None:
    """y = after = before + x"""
    column: list[Any] = ["N", 1]
    save_model(
        folder / "1" / "model.onnx",
        [helper.make_node("Add", ["x", "before"], ["after"]), helper.make_node("Identity", ["after"], ["y"])],
        [("x", FLOAT, column), ("before", FLOAT, column)],
        [("y", FLOAT, column), ("after", FLOAT, column)],
    )


def save_reset_sum(folder: Path) -> None:
    """y = after = (before·(1 - START) + x)·READY: the model itself starts over."""
    column: list[Any] = ["N", 1]
    one = numpy_helper.from_array(np.array([1], np.float32), "one")
    save_model(
        folder / "1" / "model.onnx",
        [
            helper.make_node("Sub", ["one", "START"], ["goes_on"]),
            helper.make_node("Mul", ["before", "goes_on"], ["kept"]),
            helper.make_node("Add", ["kept", "x"], ["sum"]),
            helper.make_node("Mul", ["sum", "READY"], ["after"]),
            helper.make_node("Identity", ["after"], ["y"]),
        ],
        [(name, FLOAT, column) for name in ("x", "before", "START", "READY")],
        [("y", FLOAT, column), ("after", FLOAT, column)],
        [one],
    )


def save_history(folder: Path) -> None:
    """after = before with x behind it; y = the sum of all, so that a state grows with its sequence."""
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    save_model(
        folder / "1" / "model.onnx",
        [
            helper.make_node("Concat", ["before", "x"], ["after"], axis=1),
            helper.make_node("ReduceSum", ["after", "axis"], ["y"], keepdims=1),
        ],
        [("x", FLOAT, ["N", 1]), ("before", FLOAT, ["N", "L"])],
        [("y", FLOAT, ["N", 1]), ("after", FLOAT, ["N", "M"])],
        [axis],
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("sequences")
    patient = "max_sequence_idle_microseconds: 60000000"
    for name, strategy in STRATEGIES.items():
        save_sum(root / f"onnx_{name}")
        write(root / f"onnx_{name}", f"{TENSORS} sequence_batching {{ {strategy} {patient} {state()} }}")
        save_reset_sum(root / f"onnx_controls_{name}")
        write(
            root / f"onnx_controls_{name}",
            f"{TENSORS} sequence_batching {{ {strategy} {patient} {CONTROLS} {state()} }}",
        )
        save_history(root / f"onnx_history_{name}")
        write(
            root / f"onnx_history_{name}",
            f"{TENSORS} sequence_batching {{ {strategy} {patient} {state(dims='-1')} }}",
        )
        write(
            root / f"python_{name}",
            f'backend: "python" {TENSORS} sequence_batching {{ {strategy} {patient} {state()} }}',
            KEEPS_STATE,
        )
        write(
            root / f"text_{name}",
            f'backend: "python" {TEXT_TENSORS} sequence_batching {{ {strategy} {patient} {TEXT_CONTROLS} }}',
            KEEPS_ITS_OWN,
        )
        ids = TEXT_CONTROLS.replace("TYPE_STRING", "TYPE_INT64")
        write(
            root / f"again_{name}",
            f'backend: "python" {TENSORS} sequence_batching {{ {strategy} {patient} {ids} iterative_sequence: true }}',
            COUNTS_DOWN,
        )
        write(
            root / f"loop_{name}",
            f'backend: "python" {TENSORS} model_transaction_policy {{ decoupled: true }} '
            f"sequence_batching {{ {strategy} {patient} {ids} iterative_sequence: true }}",
            COUNTS_UP,
        )
        # One slot, and sequences that are soon, or never, idle.
        one = strategy.replace("8", "1")
        for speed, idle in (("hasty", 300_000), ("patient", 600_000_000)):
            save_sum(root / f"{speed}_{name}")
            write(
                root / f"{speed}_{name}",
                TENSORS.replace("max_batch_size: 8", "max_batch_size: 1")
                + f"sequence_batching {{ {one} max_sequence_idle_microseconds: {idle} {state()} }}",
            )
    initial = 'initial_state { name: "ten" data_type: TYPE_FP32 dims: [ 1 ] data_file: "ten" }'
    save_sum(root / "from_file")
    write(root / "from_file", f"{TENSORS} sequence_batching {{ direct {{ }} {patient} {state(initial=initial)} }}")
    (root / "from_file" / "initial_state").mkdir()
    (root / "from_file" / "initial_state" / "ten").write_bytes(np.array([10], np.float32).tobytes())
    save_sum(root / "shown")
    listed = 'output { name: "after" data_type: TYPE_FP32 dims: [ 1 ] }'
    write(root / "shown", f"{TENSORS} {listed} sequence_batching {{ direct {{ }} {patient} {state()} }}")
    save_sum(root / "two_instances")
    write(
        root / "two_instances",
        f"{TENSORS} instance_group {{ count: 2 }} sequence_batching {{ oldest {{ max_candidate_sequences: 4 }} "
        f"{patient} {state()} }}",
    )
    zeros = " ".join(
        f'inputs {{ key: "{name}" value {{ data_type: TYPE_FP32 dims: [ 1 ] zero_data: true }} }}'
        for name in ("x", "before", "START", "READY")
    )
    save_reset_sum(root / "warm")
    write(
        root / "warm",
        f"{TENSORS} sequence_batching {{ direct {{ }} {patient} {CONTROLS} {state()} }} "
        f'model_warmup {{ name: "all of it" batch_size: 2 {zeros} }}',
    )
    save_sum(root / "completed")  # inputs and outputs come from the file, but for those of the sequence
    write(root / "completed", f"max_batch_size: 8 sequence_batching {{ direct {{ }} {patient} {state()} }}")
    with ServerProcess(root, "--exit-timeout-secs=1") as running:
        yield running


Send = Callable[
    ..., Any
]  # send(model, value, sequence, "se", outputs=…, timeout=…) → the output y, as a number or text


@pytest.fixture(params=["http", "grpc"])
def send(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Send]:
    if request.param == "grpc":
        with grpcclient.InferenceServerClient(server.grpc) as client:
            yield partial(_send, client, grpcclient)
        return

    def send(*arguments: Any, **options: Any) -> Any:
        # tritonclient.http is its thread's, and is closed there: what threads leave behind ends at any time.
        with httpclient.InferenceServerClient(server.http.removeprefix("http://")) as client:
            return _send(client, httpclient, *arguments, **options)

    yield send


def _send(
    client: Any, module: Any, model: str, value: float, sequence: int | str, flags: str = "", **options: Any
) -> Any:
    outputs = options.pop("outputs", ())
    result = client.infer(
        model,
        [_input(module, value)],
        outputs=[module.InferRequestedOutput(name) for name in outputs] or None,
        sequence_id=sequence,
        sequence_start="s" in flags,
        sequence_end="e" in flags,
        **options,
    )
    answer = result.get_response()
    described = answer["outputs"] if isinstance(answer, dict) else answer.outputs
    names = [o["name"] if isinstance(o, dict) else o.name for o in described]
    if outputs:
        return {name: result.as_numpy(name).tolist() for name in names}
    assert "before" not in names
    found = result.as_numpy("y").ravel()[0]
    return found.decode() if isinstance(found, bytes) else float(found)


def _input(module: Any, value: float) -> Any:
    array = np.full((1, 1), value, np.float32)
    return module.InferInput("x", [1, 1], "FP32").set_data_from_numpy(array)


MODELS = [f"{kind}_{name}" for kind in ("onnx", "onnx_controls", "onnx_history", "python") for name in STRATEGIES]


@pytest.mark.parametrize("model", MODELS)
def test_interleaved_sequences_each_add_up_their_own(send: Send, model: str) -> None:
    """More sequences than slots, all at once; each sends its next request when it has its answer."""

    def run(sequence: int) -> list[float]:
        values = range(sequence, sequence + 6)
        return [
            send(model, v, sequence, ("s" if i == 0 else "") + ("e" if i == 5 else "")) for i, v in enumerate(values)
        ]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(run, range(100, 112)))
    assert answers == [np.cumsum(range(s, s + 6)).tolist() for s in range(100, 112)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_text_ids_and_controls_in_other_words(send: Send, name: str) -> None:
    model = f"text_{name}"
    assert send(model, 1, "a", "s") == "a: 1,"
    assert send(model, 5, "ü b", "s") == "ü b: 5,"
    assert send(model, 2, "a") == "a: 1+2,"
    assert send(model, 6, "ü b", "e") == "ü b: 5+6."
    assert send(model, 3, "a", "e") == "a: 1+2+3."
    assert send(model, 9, "a", "se") == "a: 9."


def test_a_state_begins_as_its_file_says(send: Send) -> None:
    assert [send("from_file", 1, 4, "s"), send("from_file", 2, 4, "s"), send("from_file", 3, 4, "e")] == [11, 12, 15]


def test_a_state_that_is_listed_as_an_output_is_shown(send: Send) -> None:
    assert send("shown", 1, 4, "s", outputs=("y", "after")) == {"y": [[1]], "after": [[1]]}
    assert send("shown", 2, 4, "e", outputs=("y",)) == {"y": [[3]]}


def test_instances_keep_their_sequences(send: Send) -> None:
    for i in range(4):
        for sequence in range(1, 7):
            flags = ("s" if i == 0 else "") + ("e" if i == 3 else "")
            assert send("two_instances", sequence, sequence, flags) == sequence * (i + 1)


def test_completion_leaves_out_what_is_the_sequences(send: Send, server: ServerProcess) -> None:
    with httpclient.InferenceServerClient(server.http.removeprefix("http://")) as client:
        metadata = client.get_model_metadata("completed")
    assert [t["name"] for t in metadata["inputs"]] == ["x"]
    assert [t["name"] for t in metadata["outputs"]] == ["y"]
    assert send("completed", 3, 1, "se") == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stream_carries_whole_sequences(server: ServerProcess, name: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for step in range(5):
            for sequence in (21, 22, 23):
                client.async_stream_infer(
                    f"onnx_{name}",
                    [_input(grpcclient, sequence + step)],
                    request_id=str(sequence),
                    sequence_id=sequence,
                    sequence_start=step == 0,
                    sequence_end=step == 4,
                )
        got: dict[int, list[float]] = {21: [], 22: [], 23: []}
        for _ in range(15):
            result, error = answers.get(timeout=60)
            assert error is None
            got[int(result.get_response().id)].append(float(result.as_numpy("y")[0, 0]))
        client.stop_stream()
    assert got == {s: np.cumsum(range(s, s + 5)).tolist() for s in got}


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_idle_sequence_loses_its_slot_to_one_that_waits(send: Send, name: str) -> None:
    model = f"hasty_{name}"
    assert send(model, 1, 1, "s") == 1
    assert send(model, 2, 2, "se") == 2  # answered only once the first has been given up
    with pytest.raises(InferenceServerException) as caught:
        send(model, 3, 1)
    assert caught.value.message() == (
        f"inference request for sequence 1 to model '{model}' must specify the START flag on the first request of the "
        "sequence"
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_sequence_that_may_not_wait_so_long_is_refused(send: Send, name: str) -> None:
    model = f"patient_{name}"
    assert send(model, 1, 1, "s") == 1
    with pytest.raises(InferenceServerException) as caught:
        send(model, 2, 2, "s", timeout=20_000)
    assert caught.value.message() == "timeout of the corresponding sequence has been expired"
    assert caught.value.status() in ("503", "StatusCode.UNAVAILABLE")
    assert send(model, 2, 1, "e") == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_iterative_requests_run_until_their_model_answers(send: Send, name: str) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda n: send(f"again_{name}", n, 0), range(1, 13)))
    assert answers == list(range(1, 13))


@pytest.mark.parametrize("name", STRATEGIES)
def test_iterative_requests_may_answer_each_time(server: ServerProcess, name: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for count in range(1, 6):
            client.async_stream_infer(f"loop_{name}", [_input(grpcclient, count)], request_id=str(count))
        got: dict[str, list[float]] = {}
        for _ in range(1 + 2 + 3 + 4 + 5):
            result, error = answers.get(timeout=60)
            assert error is None
            got.setdefault(result.get_response().id, []).append(float(result.as_numpy("y")[0, 0]))
        client.stop_stream()
    assert got == {str(count): list(range(1, count + 1)) for count in range(1, 6)}


def test_a_warmed_up_model_knows_no_sequence(send: Send) -> None:
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        send("warm", 1, 1)
    assert send("warm", 1, 1, "se") == 1


@pytest.mark.parametrize("tensor", ["before", "START"])
def test_clients_cannot_send_what_is_the_sequences(server: ServerProcess, tensor: str) -> None:
    with httpclient.InferenceServerClient(server.http.removeprefix("http://")) as client:
        wrong = httpclient.InferInput(tensor, [1, 1], "FP32").set_data_from_numpy(np.zeros((1, 1), np.float32))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("onnx_controls_direct", [wrong], sequence_id=1, sequence_start=True)
    assert caught.value.message() == f"unexpected inference input '{tensor}' for model 'onnx_controls_direct'"


def test_states_are_no_outputs_one_can_ask_for(send: Send) -> None:
    with pytest.raises(InferenceServerException) as caught:
        send("onnx_direct", 1, 1, "s", outputs=("after",))
    assert caught.value.message() == "unexpected inference output 'after' for model 'onnx_direct'"


def test_after_all_that_nothing_is_in_flight(server: ServerProcess) -> None:
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    counts = re.findall(r'doorstep_inflight_requests\{model="([^"]+)",version="1"\} (\d+)', text)
    assert len(counts) == 2 * 9 + 5
    assert {count for _, count in counts} == {"0"}


BROKEN = {
    "no such input": (
        state("nowhere"),
        "configuration specified sequence control or state 'nowhere', but model does not provide that input",
    ),
    "another datatype": (
        'state { input_name: "before" output_name: "after" data_type: TYPE_INT32 dims: [ 1 ] }',
        "tensor 'before': the model expects data-type TYPE_FP32 but the model configuration specifies data-type "
        "TYPE_INT32",
    ),
    "no such file": (
        state(initial='initial_state { name: "i" data_type: TYPE_FP32 dims: [ 1 ] data_file: "none" }'),
        "failed to open text file for read m/initial_state/none: No such file or directory",
    ),
    "a file from elsewhere": (
        state(initial='initial_state { name: "i" data_type: TYPE_FP32 dims: [ 1 ] data_file: "../1/model.onnx" }'),
        "initial state file 'm/initial_state/../1/model.onnx' is outside the model's folder for them",
    ),
    "a short file": (
        state(initial='initial_state { name: "i" data_type: TYPE_FP32 dims: [ 1 ] data_file: "short" }'),
        "initial_state setting expects 4 bytes, but the data provided from shortonly has 2 bytes.",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_model_with_a_wrong_state_does_not_load(tmp_path: Path, fault: str) -> None:
    written, text = BROKEN[fault]
    save_sum(tmp_path / "m")
    write(tmp_path / "m", f"{TENSORS} sequence_batching {{ direct {{ }} {written} }}")
    (tmp_path / "m" / "initial_state").mkdir()
    (tmp_path / "m" / "initial_state" / "short").write_bytes(b"12")
    with pytest.raises(ServerFailed) as caught, ServerProcess(tmp_path):
        pass
    assert text in str(caught.value)


def test_a_reload_forgets_the_sequences_of_the_old_version(tmp_path: Path) -> None:
    save_sum(tmp_path / "m")
    config = f"{TENSORS} sequence_batching {{ direct {{ }} max_sequence_idle_microseconds: 600000000 {state()} }}"
    write(tmp_path / "m", config)
    options = ("--model-control-mode=explicit", "--load-model=m", "--exit-timeout-secs=1")
    with (
        ServerProcess(tmp_path, *options) as running,
        httpclient.InferenceServerClient(running.http.removeprefix("http://")) as client,
    ):
        ask = partial(_send, client, httpclient, "m")
        assert ask(1, 7, "s") == 1
        (tmp_path / "m" / "config.pbtxt").write_text(config + 'parameters { key: "k" value { string_value: "v" } }')
        client.load_model("m")
        with pytest.raises(InferenceServerException, match="must specify the START flag"):
            ask(2, 7)
        assert ask(3, 7, "s") == 3
        client.unload_model("m")
        assert not client.is_model_ready("m")


@pytest.mark.parametrize("module", [httpclient, grpcclient], ids=["http", "grpc"])
def test_a_server_that_stops_waits_for_the_end_of_sequences(tmp_path: Path, module: Any) -> None:
    save_sum(tmp_path / "m")
    idle = "max_sequence_idle_microseconds: 600000000"
    write(tmp_path / "m", f"{TENSORS} sequence_batching {{ oldest {{ }} {idle} {state()} }}")
    with ServerProcess(tmp_path, "--exit-timeout-secs=60") as running:
        assert running.process is not None
        address = running.grpc if module is grpcclient else running.http.removeprefix("http://")
        ask = partial(_send, client := module.InferenceServerClient(address), module, "m")
        assert ask(1, 5, "s") == 1
        running.process.send_signal(signal.SIGTERM)
        while client.is_server_ready():
            pass
        with pytest.raises(InferenceServerException):
            ask(1, 6, "s")
        assert ask(2, 5) == 3
        assert ask(3, 5, "e") == 6
        assert running.process.wait(30) == 0
        client.close()
