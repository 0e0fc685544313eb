"""What Python models and their repository promise, asked of a real server over HTTP and gRPC with Triton's own clients.

Everything is in one server. What is expected is the documentation of Triton's Python backend and checksum agent, and
the texts in their sources.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("python-features")

CONFIG = """
backend: "python"
input { name: "N" data_type: TYPE_INT32 dims: 1 }
output { name: "SAID" data_type: TYPE_STRING dims: 1 }
"""
HEAD = """
import sys
import numpy as np
import triton_python_backend_utils as pb_utils

def said(text):
    return pb_utils.InferenceResponse([pb_utils.Tensor("SAID", np.array([text.encode()], np.object_))])

class TritonPythonModel:
"""

# As many responses as N says.
REPEATS = """
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(request.inputs()[0].as_numpy()[0])
            for at in range(count):
                final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if at == count - 1 else 0
                sender.send(said(f"r{at}"), flags=final)
"""
ASKS = """
    def execute(self, requests):
        return [said(self.ask(request)) for request in requests]

    def ask(self, request):
        call = pb_utils.InferenceRequest(
            model_name="repeats", requested_output_names=["SAID"], inputs=request.inputs())
        response = call.exec()
        if response.has_error():
            return response.error().message()
        return response.output_tensors()[0].as_numpy()[0].decode()
"""
# Ready as long as the last N it saw was not 0.
MOODY = """
    ready = True

    def is_ready(self):
        return self.ready

    def execute(self, requests):
        for request in requests:
            self.ready = bool(request.inputs()[0].as_numpy()[0])
        return [said("seen") for _ in requests]
"""
WHERE = """
    def execute(self, requests):
        import only_here
        return [said(f"{only_here.VALUE} {sys.prefix}") for _ in requests]
"""


def save(models: Path, name: str, code: str, config: str = "") -> None:
    (models / name / "1").mkdir(parents=True)
    (models / name / "1" / "model.py").write_text(HEAD + code)
    (models / name / "config.pbtxt").write_text(CONFIG + config)


def in_environment(path: object) -> str:
    return f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{path}" }} }}'


def checksum(digest: str, key: str = "MD5:1/model.py") -> str:
    return (
        f'model_repository_agents {{ agents {{ name: "checksum" parameters {{ key: "{key}" value: "{digest}" }} }} }}'
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "only_here.py").write_text("VALUE = 'packed'\n")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, environment: Path) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    save(models, "repeats", REPEATS)
    save(models, "asks", ASKS)
    save(models, "moody", MOODY)
    save(models, "in_folder", WHERE, in_environment(environment))
    save(models, "in_archive", WHERE, in_environment("$$TRITON_MODEL_DIRECTORY/env.tar.gz"))
    with tarfile.open(models / "in_archive" / "env.tar.gz", "w:gz", compresslevel=1) as tar:
        for entry in sorted(environment.iterdir()):
            tar.add(entry, entry.name)
    save(models, "nowhere", WHERE, in_environment("/nope/env.tar.gz"))
    digest = hashlib.md5((HEAD + MOODY).encode(), usedforsecurity=False).hexdigest()
    save(models, "whole", MOODY, checksum(digest))
    save(models, "spoilt", MOODY + "\n", checksum(digest))
    save(models, "unsummed", MOODY, checksum(digest, "SHA1:1/model.py"))
    started = ["repeats", "asks", "moody"]
    cache = tmp_path_factory.mktemp("environments")
    with ServerProcess(
        models,
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in started),
        f"--backend-config=python,environment-directory={cache}",
    ) as found:
        found.environments = cache  # type: ignore[attr-defined]
        yield found


class Asker:
    """One of Triton's clients."""

    def __init__(self, server: ServerProcess, protocol: str) -> None:
        self.module: Any = triton_http if protocol == "http" else triton_grpc
        address = server.http.removeprefix("http://") if protocol == "http" else server.grpc
        self.client = self.module.InferenceServerClient(address)

    def ask(self, model: str, value: int = 1) -> str:
        tensor = self.module.InferInput("N", [1], "INT32")
        tensor.set_data_from_numpy(np.array([value], np.int32))
        return str(self.client.infer(model, [tensor]).as_numpy("SAID")[0].decode())

    def refusal(self, model: str) -> str:
        """Of a model that does not load, and is not there afterwards."""
        with pytest.raises(InferenceServerException) as caught:
            self.client.load_model(model)
        assert not self.client.is_model_ready(model)
        return str(caught.value.message())

    def load_repeats(self, *, decoupled: bool) -> None:
        config = {
            "backend": "python",
            "input": [{"name": "N", "data_type": "TYPE_INT32", "dims": [1]}],
            "output": [{"name": "SAID", "data_type": "TYPE_STRING", "dims": [1]}],
            "model_transaction_policy": {"decoupled": decoupled},
        }
        self.client.load_model("repeats", config=json.dumps(config))


@pytest.fixture(params=["http", "grpc"])
def asker(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Asker]:
    found = Asker(server, request.param)
    with found.client:
        yield found


# Calls of a model whose transaction policy a reload changes

REFUSED = (
    "Model repeats - Error when running inference: Model repeats is using the decoupled. The current BLS request call "
    "doesn't support models using the decoupled transaction policy. Please use 'decoupled=True' argument to the "
    "'exec' or 'async_exec' calls for decoupled models.'"
)


def test_exec_of_a_model_follows_its_transaction_policy_through_reloads(asker: Asker) -> None:
    asker.load_repeats(decoupled=True)
    assert [asker.ask("asks", 2), asker.ask("asks", 2)] == [REFUSED] * 2
    asker.load_repeats(decoupled=False)
    assert [asker.ask("asks"), asker.ask("asks")] == ["r0"] * 2
    asker.load_repeats(decoupled=True)
    assert [asker.ask("asks", 2), asker.ask("asks", 1)] == [REFUSED] * 2
    asker.load_repeats(decoupled=False)
    assert asker.ask("asks") == "r0"


# is_ready


def test_a_model_says_itself_whether_it_is_ready(asker: Asker) -> None:
    assert asker.client.is_model_ready("moody")
    asker.ask("moody", 0)
    assert not asker.client.is_model_ready("moody")
    assert not asker.client.is_model_ready("moody", "1")
    assert asker.client.is_model_ready("asks"), "no other model's business"
    assert asker.client.is_server_ready()
    assert asker.ask("moody", 1) == "seen", "it answers all the same"
    assert asker.client.is_model_ready("moody")


# EXECUTION_ENV_PATH


def test_a_model_runs_in_the_environment_of_a_folder(asker: Asker, environment: Path) -> None:
    asker.client.load_model("in_folder")
    assert asker.ask("in_folder") == f"packed {environment}"
    asker.client.unload_model("in_folder")


def test_a_model_runs_in_the_environment_of_an_archive_unpacked_once(asker: Asker, server: ServerProcess) -> None:
    asker.client.load_model("in_archive")
    kind, _, where = asker.ask("in_archive").partition(" ")
    [unpacked] = [f for f in server.environments.iterdir() if f.is_dir()]  # type: ignore[attr-defined]
    assert (kind, where) == ("packed", str(unpacked))
    asker.client.unload_model("in_archive")


def test_a_model_whose_environment_is_not_there_does_not_load(asker: Asker) -> None:
    assert "Failed to get the canonical path for /nope/env.tar.gz" in asker.refusal("nowhere")
    assert asker.ask("moody") == "seen"


# The agent `checksum`


def test_a_model_loads_only_with_the_sums_its_config_names(asker: Asker) -> None:
    asker.client.load_model("whole")
    assert asker.ask("whole") == "seen"
    asker.client.unload_model("whole")
    good, bad = (
        hashlib.md5((HEAD + code).encode(), usedforsecurity=False).hexdigest() for code in (MOODY, MOODY + "\n")
    )
    assert f"Mismatched MD5 hash for file 1/model.py, expect: {good}, got: {bad}" in asker.refusal("spoilt")
    assert "Unsupported checksum algorithm: SHA1" in asker.refusal("unsummed")
    assert asker.ask("moody") == "seen"
