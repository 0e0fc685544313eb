"""Repositories whose authors mean it ill, and disks without room: configs that never end, checksums, traces."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harm import Victim, attacked, row, save_python

from doorstep.testing.onnx_models import save_adder

TEXTS = """
backend: "python"
input { name: "x" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
"""
EMPTY = "class TritonPythonModel:\n    def execute(self, requests):\n        return None\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("hostile") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Victim]:
    with Victim(models, "--model-control-mode=explicit", "--load-model=add") as victim:
        yield victim
        victim.assert_sound()


def load(server: Victim, name: str, **parameters: Any) -> tuple[int, str]:
    status, answer = server.post(f"/v2/repository/models/{name}/load", {"parameters": parameters})
    return status, answer["error"] if status != 200 else ""


def agent(parameters: dict[str, str]) -> dict[str, Any]:
    return {"model_repository_agents": {"agents": [{"name": "checksum", "parameters": parameters}]}}


@pytest.mark.parametrize(
    "path",
    [
        "../../../../../../etc/passwd",
        "../add/1/model.onnx",
        "1/../../add/1/model.onnx",
        "zero",
        "pipe",
        "1",
        "out",
        "a\0b",
    ],
)
def test_a_checksum_is_of_the_models_own_files(server: Victim, models: Path, path: str) -> None:
    """Whoever may load a model need not learn what other files of the machine hold; and some never end."""
    folder = models / "summed"
    if not folder.exists():
        save_adder(folder / "1" / "model.onnx", 2)
        (folder / "zero").symlink_to("/dev/zero")
        (folder / "out").symlink_to("/etc/passwd")
        os.mkfifo(folder / "pipe")
    config = {"backend": "onnxruntime", **agent({f"MD5:{path}": "0" * 32})}
    with attacked(server):
        status, text = load(server, "summed", config=json.dumps(config))
        assert (status, "got:" in text) == (500, False), text  # as Triton has it: it could not be polled
        assert load(server, "summed")[0] == 200
        assert server.post("/v2/repository/models/summed/unload")[0] == 200


def test_a_config_that_never_ends_is_refused(server: Victim, models: Path) -> None:
    folder = models / "endless"
    save_adder(folder / "1" / "model.onnx", 1)
    os.mkfifo(folder / "config.pbtxt")
    with attacked(server):
        status, text = load(server, "endless")
        assert (status >= 400, "endless/config.pbtxt" in text) == (True, True), text


@pytest.mark.parametrize(
    "groups",
    [
        [{"count": 1_000_000, "kind": "KIND_CPU"}],
        [{"count": 2**31 - 1, "kind": "KIND_CPU"}],
        [{"count": -1, "kind": "KIND_CPU"}],
        [{"count": 2**40, "kind": "KIND_CPU"}],
        [{"count": 1, "kind": "KIND_CPU"}] * 5000,
    ],
)
def test_nobody_starts_a_million_processes(server: Victim, models: Path, groups: list[Any]) -> None:
    """By the config of a load call."""
    save_python(models, "many", EMPTY, TEXTS)
    config = {
        "backend": "python",
        "input": [{"name": "x", "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [{"name": "y", "data_type": "TYPE_STRING", "dims": [1]}],
        "instance_group": groups,
    }
    with attacked(server):
        status, text = load(server, "many", config=json.dumps(config))
        assert (status in (400, 500), "count" in text or "instance" in text) == (True, True), text


# Traces


def test_traces_on_a_disk_that_is_full_and_has_room_again(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    options = (f"--trace-config=triton,file={file}", "--trace-config=rate=1", "--trace-config=level=TIMESTAMPS")
    with Victim(models, "--model-control-mode=explicit", "--load-model=add", *options) as server, attacked(server):
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file may grow
        for _ in range(50):
            assert server.infer("add", row())[0] == 200
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        for _ in range(50):
            assert server.infer("add", row())[0] == 200
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        marker = "the last of them"
        server.wait_for(
            lambda: server.infer("add", row(), id=marker)[0] == 200 and marker in file.read_text(),
            "a trace is written",
        )
    json.loads(file.read_text())


def test_settings_that_flip_while_everything_is_traced(models: Path, tmp_path: Path) -> None:
    options = (
        f"--trace-config=triton,file={tmp_path / 't'}",
        "--trace-config=rate=1",
        "--trace-config=level=TIMESTAMPS",
    )
    with Victim(models, "--model-control-mode=explicit", "--load-model=add", *options) as server, attacked(server):
        done = threading.Event()

        def infer() -> None:
            while not done.is_set():
                server.infer("add", row())

        threads = [threading.Thread(target=infer) for _ in range(4)]
        for thread in threads:
            thread.start()
        changes: list[dict[str, Any]] = [
            {"trace_level": ["OFF"]},
            {"trace_level": ["TENSORS", "TIMESTAMPS"]},
            {"trace_count": "3"},
            {"log_frequency": "2"},
            {"trace_rate": "1", "trace_count": "-1"},
            {"log_frequency": "0"},
            {"trace_rate": None, "trace_level": None, "trace_count": None, "log_frequency": None},
        ]
        for i in range(140):
            where = "/v2/models/add/trace/setting" if i % 2 else "/v2/trace/setting"
            status, answer = server.post(where, changes[i % len(changes)])
            assert status == 200, answer
        done.set()
        for thread in threads:
            thread.join()
    for path in tmp_path.glob("t*"):
        json.loads(path.read_text())
