"""The life of a server process: start, serve, reload under load, stop; with real clients and real signals."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from doorstep.testing.onnx_models import save_adder, save_identity, save_model
from doorstep.testing.server import ServerFailed, ServerProcess, doorstep_command

SLOW_MODEL = """
import os, time
import doorstep

class Model(doorstep.Model):
    def predict(self, x: int) -> int:
        open(os.path.join(os.path.dirname(__file__), "started"), "w").close()
        time.sleep(1.0)
        return x + 1
"""


def post(url: str, body: Any = None) -> tuple[int, Any]:
    data = b"" if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, method="POST"), timeout=30) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text else None


def add_request(value: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [value]}]}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save_adder(tmp_path / "models" / "add" / "1" / "model.onnx", 1)
    return tmp_path / "models"


def slow_model(models: Path) -> Path:
    folder = models / "slow" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(SLOW_MODEL)
    return folder


def wait_for(path: Path, server: ServerProcess) -> None:
    while not path.exists():
        assert server.running, server.logs()
        threading.Event().wait(0.01)


def test_a_folder_with_one_model_and_no_config_serves_it(models: Path) -> None:
    with ServerProcess(models) as server:
        status, answer = post(server.url("/v2/models/add/infer"), add_request(41))
        assert status == 200
        assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [42.0]}]
        assert server.stop() == 0


def test_sigterm_answers_what_is_in_flight_and_exits_0(models: Path) -> None:
    folder = slow_model(models)
    with ServerProcess(models) as server:
        answers: list[Any] = []
        body = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": [1]}]}
        client = threading.Thread(target=lambda: answers.append(post(server.url("/v2/models/slow/infer"), body)))
        client.start()
        wait_for(folder / "started", server)
        server.signal(signal.SIGTERM)
        client.join()
        assert answers[0][0] == 200, answers
        assert answers[0][1]["outputs"][0]["data"] == [2]
        assert server.wait() == 0


def test_a_second_sigterm_ends_at_once(models: Path) -> None:
    folder = slow_model(models)
    (folder / "model.py").write_text(SLOW_MODEL.replace("time.sleep(1.0)", "time.sleep(60)"))
    with ServerProcess(models) as server:
        body = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": [1]}]}
        threading.Thread(target=lambda: _ignore(post, server.url("/v2/models/slow/infer"), body), daemon=True).start()
        wait_for(folder / "started", server)
        server.signal(signal.SIGTERM)
        while "finishing" not in server.logs():
            threading.Event().wait(0.01)
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 3


def test_the_exit_timeout_cuts_off_what_does_not_end(models: Path) -> None:
    folder = slow_model(models)
    (folder / "model.py").write_text(SLOW_MODEL.replace("time.sleep(1.0)", "time.sleep(60)"))
    with ServerProcess(models, "--exit-timeout-secs=1") as server:
        body = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": [1]}]}
        threading.Thread(target=lambda: _ignore(post, server.url("/v2/models/slow/infer"), body), daemon=True).start()
        wait_for(folder / "started", server)
        server.signal(signal.SIGTERM)
        assert server.wait(25) == 3


def states(client: httpclient.InferenceServerClient) -> set[tuple[str, str]]:
    return {(row["name"], row.get("state", "")) for row in client.get_model_repository_index()}


def _ignore(function: Any, *arguments: Any) -> None:
    try:
        function(*arguments)
    except OSError:
        pass


def test_ports_can_be_bound_again_at_once(models: Path) -> None:
    with ServerProcess(models) as server:
        post(server.url("/v2/models/add/infer"), add_request(1))
        first = server.argv
        assert server.stop() == 0
        again = subprocess.Popen(first, stderr=subprocess.PIPE, text=True)
        try:
            assert again.stderr is not None
            for line in again.stderr:
                assert "already in use" not in line
                if "metrics on" in line:
                    break
        finally:
            again.send_signal(signal.SIGTERM)
            again.communicate()
    assert again.returncode == 0


def test_a_taken_port_is_named_with_its_option(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*doorstep_command(), "serve", str(models), f"--http-port={port}"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--http-port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_load_ends_the_start_unless_told_otherwise(models: Path) -> None:
    broken = models / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ServerFailed) as caught, ServerProcess(models):
        pass
    assert "ended with 1" in str(caught.value)
    assert "cannot be read as an ONNX model" in str(caught.value)
    with ServerProcess(models, "--exit-on-error=false", "--strict-readiness=false") as server:
        assert post(server.url("/v2/models/add/infer"), add_request(1))[0] == 200
        _, index = post(server.url("/v2/repository/index"))
        states = {row["name"]: row for row in index}
        assert states["broken"]["state"] == "UNAVAILABLE"
        assert "cannot be read" in states["broken"]["reason"]


def test_one_port_speaks_everything(models: Path) -> None:
    with ServerProcess(models, one_port=True) as server:
        assert post(server.url("/v2/models/add/infer"), add_request(1))[0] == 200
        with grpcclient.InferenceServerClient(server.grpc) as client:
            assert client.is_server_ready()
        with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
            assert b"nv_inference_request_success" in answer.read()


def test_reload_under_load_loses_no_request_and_mixes_no_versions(models: Path) -> None:
    """Versions come and go while clients hammer; every answer is one of the versions' own."""
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=add") as server:
        stop = threading.Event()
        failures: list[Any] = []
        seen: set[tuple[str, float]] = set()

        def over_http() -> None:
            client = httpclient.InferenceServerClient(server.http)
            while not stop.is_set():
                x = httpclient.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.zeros((1, 1), np.float32))
                try:
                    result = client.infer("add", [x])
                    seen.add((result.get_response()["model_version"], float(result.as_numpy("y")[0, 0])))
                except Exception as error:
                    failures.append(error)
            client.close()

        def over_grpc() -> None:
            with grpcclient.InferenceServerClient(server.grpc) as client:
                while not stop.is_set():
                    x = grpcclient.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.zeros((1, 1), np.float32))
                    try:
                        result = client.infer("add", [x])
                        seen.add((result.get_response().model_version, float(result.as_numpy("y")[0, 0])))
                    except Exception as error:
                        failures.append(error)

        clients = [threading.Thread(target=t) for t in (over_http, over_grpc, over_http)]
        for thread in clients:
            thread.start()
        for version in range(2, 8):
            save_adder(models / "add" / str(version) / "model.onnx", version)
            assert post(server.url("/v2/repository/models/add/load"))[0] == 200
            if version > 3:
                shutil.rmtree(models / "add" / str(version - 2))
        stop.set()
        for thread in clients:
            thread.join()
        assert not failures, failures[:3]
        assert all(float(version) == value for version, value in seen), seen
        assert ("7", 7.0) in seen or len(seen) > 1
        assert server.stop() == 0


def test_a_broken_new_version_leaves_the_old_one_serving(models: Path) -> None:
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=add") as server:
        broken = models / "add" / "2"
        broken.mkdir()
        (broken / "model.onnx").write_bytes(b"rubbish")
        status, answer = post(server.url("/v2/repository/models/add/load"))
        assert status >= 400
        assert "cannot be read as an ONNX model" in answer["error"]
        status, answer = post(server.url("/v2/models/add/infer"), add_request(1))
        assert (status, answer["model_version"]) == (200, "1")


def test_an_unloaded_process_model_gives_its_memory_back(models: Path) -> None:
    import psutil

    folder = models / "fat" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(
        "import doorstep\nclass Model(doorstep.Model):\n"
        "    def load(self):\n        self.ballast = bytearray(b'x') * 200_000_000\n"
        "    def predict(self, x: int) -> int:\n        return x\n"
    )
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=fat") as server:
        process = psutil.Process(server.pid)

        def resident() -> int:
            return int(sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]))

        assert resident() > 200_000_000
        assert post(server.url("/v2/repository/models/fat/unload"))[0] == 200
        _, alive = psutil.wait_procs(process.children(recursive=True), timeout=20)
        assert not alive
        assert resident() < 200_000_000


def test_an_unloaded_onnx_model_gives_its_memory_back(models: Path) -> None:
    """A model in the server's own process: what it held must leave the resident size, not only malloc's books."""
    import psutil
    from onnx import TensorProto, helper, numpy_helper

    size = 4096  # 64 MB of weights
    save_model(
        models / "fat" / "1" / "model.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", size])],
        [("y", TensorProto.FLOAT, ["N", size])],
        [numpy_helper.from_array(np.ones((size, size), np.float32), "w")],
    )
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=add") as server:
        process = psutil.Process(server.pid)
        x = httpclient.InferInput("x", [4, size], "FP32").set_data_from_numpy(np.ones((4, size), np.float32))
        with httpclient.InferenceServerClient(server.http) as client:
            resident = []
            for _ in range(3):
                client.load_model("fat")
                client.infer("fat", [x])
                loaded = process.memory_info().rss
                client.unload_model("fat")
                while any(
                    row["name"] == "fat" and row["state"] != "UNAVAILABLE"
                    for row in client.get_model_repository_index()
                ):
                    threading.Event().wait(0.01)
                resident.append(process.memory_info().rss)
        assert loaded - resident[-1] > 50_000_000, (loaded, resident)
        assert resident[-1] - resident[0] < 20_000_000, resident


def test_warmup_runs_before_the_model_is_ready_and_a_failing_sample_fails_the_load(tmp_path: Path) -> None:
    models = tmp_path / "models"
    save_identity(models / "warm" / "1" / "model.onnx")
    config = models / "warm" / "config.pbtxt"
    sample = (
        'model_warmup {{ name: "s" batch_size: 2 count: 3 '
        'inputs {{ key: "x" value {{ data_type: TYPE_FP32 dims: {dims} {data} }} }} }}'
    )
    config.write_text(sample.format(dims=4, data="random_data: true"))
    with ServerProcess(models) as server:
        assert server.stop() == 0
    (models / "warm" / "warmup").mkdir()
    (models / "warm" / "warmup" / "x.bin").write_bytes(bytes(12))
    config.write_text(sample.format(dims=4, data='input_data_file: "x.bin"'))
    with pytest.raises(ServerFailed, match=r"holds 12 bytes, dims and datatype ask for 16"), ServerProcess(models):
        pass
