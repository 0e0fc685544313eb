"""Model code that misbehaves, processes that die, loads that fail, clients that go: only those concerned are told."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from harm import (
    MIB,
    Victim,
    attacked,
    check_text,
    grpc_error,
    infer_stub,
    row,
    save_python,
    tensor,
)

from doorstep import proto
from doorstep.testing.http2_client import Http2Client, block, frame, rst_stream
from doorstep.testing.onnx_models import save_adder, save_identity

# One model does whatever its input says.
ROGUE = """
import ctypes, os, signal, sys, threading, time
import numpy as np
import doorstep

FOLDER = os.path.dirname(__file__)

class Model(doorstep.Model):
    def predict(self, what: str) -> str:
        open(os.path.join(FOLDER, "started"), "w").close()
        if what == "exit": os._exit(3)
        if what == "sys.exit": sys.exit(4)
        if what == "segfault": ctypes.string_at(0)
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
        if what == "abort": os.abort()
        if what == "raise": raise RuntimeError("what the model says")
        if what == "interrupt": raise KeyboardInterrupt
        if what == "recurse": return self.predict(what)
        if what == "memory": return str(len(bytearray(1 << 60)))
        if what == "print":
            for _ in range(20): print("x" * 200_000)
            sys.stderr.write("y" * 4_000_000)
        if what == "close": os.close(1); os.close(2)
        if what == "close all": os.closerange(0, 4096)
        if what == "wrong type": return 7
        if what == "none": return None
        if what == "threads":
            for _ in range(50): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        if what == "fork" and os.fork() == 0: time.sleep(60)
        if what == "evil text": raise RuntimeError("\\x00\\x1b[31m\\r\\nX-Evil: 1\\r\\n" + "z" * 5_000_000)
        if what == "slow": time.sleep(0.5)
        if what == "hang": time.sleep(3600)
        if what == "chdir": os.chdir("/")
        if what == "signals": [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]
        return what.upper()
"""

NUMBERS = """
import doorstep, numpy as np

class Model(doorstep.Model):
    max_batch_size = 8
    def predict(self, x: np.ndarray) -> np.ndarray:
        what = int(x[0, 0])
        if what == 1: return np.full(x.shape, np.nan, np.float32)
        if what == 2: return np.full(x.shape, np.inf, np.float32)
        if what == 3: return x[:0]
        if what == 4: return np.zeros((x.shape[0], 0), np.float32)
        if what == 5: return x.astype(np.float64)
        if what == 6: return np.zeros((x.shape[0], 4 << 20), np.float32)
        if what == 7: return np.concatenate([x, x])
        if what == 8: return np.array(["text"] * len(x), object)
        if what == 9: return {"nobody": x}
        if what == 10: return x[:, ::-1].T
        if what == 11: return np.float32(5)
        if what == 12: return x.astype(complex)
        return -x
"""
NUMBERS_CONFIG = """
backend: "python" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: -1 }
output { name: "output" data_type: TYPE_FP32 dims: -1 }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("faults") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_identity(models / "any" / "1" / "model.onnx", shape=["N", "M"])
    save_python(models, "rogue", ROGUE)
    save_python(models, "calm", ROGUE)  # the same, for tests that need a process that has not died young before
    save_python(models, "numbers", NUMBERS, NUMBERS_CONFIG)
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Victim]:
    with Victim(models, "--model-control-mode=explicit", "--load-model=*") as victim:
        yield victim
        victim.assert_sound()
        assert victim.stop() == 0


def ask(server: Victim, what: str) -> tuple[int, Any]:
    return server.infer("rogue", tensor("what", [1], "BYTES", [what]))


def rogue_message(what: str, model: str = "rogue") -> Any:
    data = what.encode()
    message = proto.ModelInferRequest(model_name=model, raw_input_contents=[struct.pack("<I", len(data)) + data])
    message.inputs.add(name="what", datatype="BYTES", shape=[1])
    return message


def wait_until_well(server: Victim) -> None:
    """The rogue answers again; it may be between two attempts to start it."""
    server.wait_for(lambda: ask(server, "x")[0] == 200, "a rogue that answers")


def renew(server: Victim) -> None:
    """A rogue with a new process and a clean record: one that died young before would be waited for."""
    for verb in ("unload", "load"):
        assert server.post(f"/v2/repository/models/rogue/{verb}")[0] == 200


DEATHS = {
    "exit": "exit code 3", "segfault": "SIGSEGV", "kill": "SIGKILL", "abort": "SIGABRT", "close all": "ended",
}  # fmt: skip


@pytest.mark.parametrize("what", DEATHS)
def test_a_model_that_ends_its_process_costs_its_own_request_and_is_back(server: Victim, what: str) -> None:
    renew(server)
    restarts = server.metric("doorstep_worker_restarts_total", model="rogue")
    with attacked(server):
        status, answer = ask(server, what)
        assert status == 500
        assert DEATHS[what] in answer["error"]
        wait_until_well(server)
        assert server.metric("doorstep_worker_restarts_total", model="rogue") > restarts


def test_a_process_killed_from_outside_costs_the_request_in_it_only(server: Victim, models: Path) -> None:
    with attacked(server), server.channel() as channel:
        (models / "calm" / "1" / "started").unlink(missing_ok=True)
        call = infer_stub(channel).future(rogue_message("hang", "calm"))
        server.wait_for((models / "calm" / "1" / "started").exists)
        behind = infer_stub(channel).future(rogue_message("behind", "calm"))  # in the queue: for the next process
        victim = next(p for p in server.workers if p.name().startswith("ds:calm"))
        victim.send_signal(signal.SIGKILL)
        code, text = grpc_error(call.result)
        assert (code, "killed by SIGKILL" in text) == ("INTERNAL", True)
        assert behind.result().raw_output_contents[0][4:] == b"BEHIND"


def test_a_process_that_is_stopped_and_goes_on_has_lost_nothing(server: Victim) -> None:
    with attacked(server), server.channel() as channel:
        victim = next(p for p in server.workers if p.name().startswith("ds:calm"))
        victim.send_signal(signal.SIGSTOP)
        call = infer_stub(channel).future(rogue_message("later", "calm"))
        server.wait_for(lambda: server.metric("doorstep_inflight_requests", model="calm") == 1)
        assert (
            grpc_error(lambda: infer_stub(channel)(rogue_message("x", "calm"), timeout=0.2))[0] == "DEADLINE_EXCEEDED"
        )
        victim.send_signal(signal.SIGCONT)
        assert call.result().raw_output_contents[0][4:] == b"LATER"


@pytest.mark.parametrize("what", ["sys.exit", "raise", "interrupt", "recurse", "memory", "wrong type", "none"])
def test_a_model_that_raises_says_so_to_its_client_over_both_protocols(server: Victim, what: str) -> None:
    wait_until_well(server)
    pid = next(p.pid for p in server.workers if p.name().startswith("ds:rogue"))
    with attacked(server), server.channel() as channel:
        status, answer = ask(server, what)
        assert status in {400, 500}
        code, text = grpc_error(lambda: infer_stub(channel)(rogue_message(what)))
        assert (code, text) == ("INTERNAL" if status == 500 else "INVALID_ARGUMENT", answer["error"])
        if what == "raise":
            assert "what the model says" in text
        assert ask(server, "x")[1]["outputs"][0]["data"] == ["X"]
        assert psutil.pid_exists(pid)


@pytest.mark.parametrize("what", ["print", "close", "threads", "fork", "chdir", "signals", "slow"])
def test_a_model_with_bad_manners_is_answered_for(server: Victim, what: str) -> None:
    renew(server)
    logged = len(server.logs())
    with attacked(server, workers=int(what == "fork")):
        assert ask(server, what)[1]["outputs"][0]["data"] == [what.upper()]
    assert len(server.logs()) - logged < 2 * MIB
    if what in ("fork", "close", "signals"):  # the process keeps what it did to itself; a new one has not
        with attacked(server, workers=-int(what == "fork")):
            renew(server)


def test_an_error_text_of_the_model_can_do_nothing_to_the_protocol_or_the_log(server: Victim) -> None:
    wait_until_well(server)
    with attacked(server), server.channel() as channel:
        status, answer = ask(server, "evil text")
        assert (status, answer["error"].startswith("RuntimeError: \0\x1b[31m\r\nX-Evil: 1")) == (500, True) or (
            status == 500 and "X-Evil" in answer["error"]
        )
        assert len(answer["error"]) < 100_000
        code, text = grpc_error(lambda: infer_stub(channel)(rogue_message("evil text")))
        assert code == "INTERNAL"
        assert "X-Evil" in text
    assert "\x1b" not in server.logs()


def number(value: float, rows: int = 1) -> dict[str, Any]:
    return tensor("x", [rows, 2], "FP32", [value] * (2 * rows))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("what", range(1, 13))
def test_outputs_of_every_kind_are_sent_or_refused(server: Victim, what: int, rows: int) -> None:
    with attacked(server, grown=256 * MIB), server.channel() as channel:
        status, text = server.call("POST", "/v2/models/numbers/infer", {"inputs": [number(what, rows)]})
        message = proto.ModelInferRequest(
            model_name="numbers", raw_input_contents=[struct.pack(f"<{2 * rows}f", *[what] * (2 * rows))]
        )
        message.inputs.add(name="x", datatype="FP32", shape=[rows, 2])
        code, _ = grpc_error(lambda: infer_stub(channel)(message))
        assert (status == 200) == (code == "OK"), (status, code, text[:300])
        if what in (1, 2):
            word = b"NaN" if what == 1 else b"Infinity"
            assert b'"data":[' + b",".join([word] * 2 * rows) in text
        elif what in (3, 7, 8, 9, 11, 12):
            assert status == 500
        elif what == 4:
            assert json.loads(text)["outputs"][0]["shape"] == [rows, 0]
        elif what == 6:
            assert len(text) > rows * (4 << 20) * 2
        assert server.infer("numbers", number(20))[1]["outputs"][0]["data"] == [-20, -20]


# Loading and unloading


def load(server: Victim, name: str, verb: str = "load") -> tuple[int, str]:
    return server.error(f"/v2/repository/models/{name}/{verb}")


BAD_MODELS = {
    "raises": "import doorstep\nclass Model(doorstep.Model):\n    def load(self): raise ValueError('no weights')\n"
    "    def predict(self, x: int) -> int: return x\n",
    "exits": "import os\nos._exit(9)\n",
    "segfaults": "import ctypes\nctypes.string_at(0)\n",
    "sys.exit": "import sys\nsys.exit(2)\n",
    "no syntax": "def def def\n",
    "no model": "x = 1\n",
    "missing import": "import nobody_has_this\n",
    "binary": "\0\1\2",
    "hints of nothing": "import doorstep\nclass Model(doorstep.Model):\n"
    "    def predict(self, x: 'nobody') -> int: return x\n",
    "recursion": "def f(): f()\nf()\n",
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_model_that_cannot_be_loaded_says_why_and_leaves_nothing(server: Victim, models: Path, what: str) -> None:
    save_python(models, "bad", BAD_MODELS[what])
    with attacked(server):
        status, text = load(server, "bad")
        assert status == 400
        assert text.startswith("load failed for model 'bad': version 1 is at UNAVAILABLE state:")
        index = {entry["name"]: entry for entry in server.post("/v2/repository/index")[1]}
        assert index["bad"]["state"] == "UNAVAILABLE"
        check_text(index["bad"].get("reason", ""))
        assert server.infer("bad", row())[0] in {400, 404, 503}


def test_an_unload_that_raises_or_never_ends_is_an_unload(server: Victim, models: Path) -> None:
    source = (
        "import doorstep, time\nclass Model(doorstep.Model):\n"
        "    def predict(self, x: int) -> int: return x\n    def unload(self): {}\n"
    )
    for what in ("raise ValueError('stuck')", "import os; os._exit(1)", "import os, signal; os.kill(os.getpid(), 9)"):
        save_python(models, "bad", source.format(what))
        with attacked(server):
            assert load(server, "bad")[0] == 200
            assert load(server, "bad", "unload")[0] == 200


def test_the_second_of_three_instances_fails_to_load_and_the_first_goes_again(server: Victim, models: Path) -> None:
    source = (
        "import doorstep, os\nclass Model(doorstep.Model):\n    def load(self):\n"
        "        path = os.path.join(os.path.dirname(__file__), 'count')\n"
        "        with open(path, 'a') as f: f.write('x')\n"
        "        if os.path.getsize(path) == 2: raise RuntimeError('the second one')\n"
        "    def predict(self, x: int) -> int: return x\n"
    )
    folder = save_python(models, "bad", source, 'backend: "python"\ninstance_group { count: 3 kind: KIND_CPU }\n')
    with attacked(server):
        status, text = load(server, "bad")
        assert (status, "the second one" in text) == (400, True)
        assert (folder / "count").read_text() == "xx"
    (models / "bad" / "config.pbtxt").unlink()


def test_a_process_killed_while_it_loads_fails_the_load(server: Victim, models: Path) -> None:
    folder = save_python(
        models,
        "bad",
        "import doorstep, os, time\nclass Model(doorstep.Model):\n    def load(self):\n"
        "        open(os.path.join(os.path.dirname(__file__), 'pid'), 'w').write(str(os.getpid()) + ' ')\n"
        "        time.sleep(3600)\n    def predict(self, x: int) -> int: return x\n",
    )
    answers: list[tuple[int, str]] = []
    with attacked(server):
        loader = threading.Thread(target=lambda: answers.append(load(server, "bad")))
        loader.start()
        server.wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text().endswith(" "))
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
        loader.join(30)
        assert answers[0][0] == 400
        assert "killed by SIGKILL" in answers[0][1]


RUBBISH = {
    "empty": b"", "zeros": bytes(10_000), "text": b"not a model" * 100,
    "a length that lies": b"\x08\x08\x3a\xff\xff\xff\xff\x0f",
    "another format": b"\x89HDF\r\n\x1a\n" + bytes(1000),
}  # fmt: skip


def test_model_files_of_every_wrong_kind_fail_to_load_and_nothing_else(server: Victim, models: Path) -> None:
    """N16: truncated and damaged files too."""
    good = (models / "any" / "1" / "model.onnx").read_bytes()
    samples = dict(RUBBISH)
    samples |= {f"cut at {n}": good[:n] for n in range(1, len(good), 17)}
    samples |= {f"changed at {n}": good[:n] + bytes((good[n] ^ 0x55,)) + good[n + 1 :] for n in range(0, len(good), 13)}
    path = models / "wrong" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    with attacked(server, grown=128 * MIB):
        for what, data in samples.items():
            path.write_bytes(data)
            status, text = load(server, "wrong")
            assert status in {200, 400} or "failed to poll" in text, (what, text)
            if status == 200:
                load(server, "wrong", "unload")


def test_a_file_replaced_by_rubbish_while_served_changes_nothing(server: Victim, models: Path) -> None:
    path = models / "any" / "1" / "model.onnx"
    good = path.read_bytes()
    with attacked(server):
        path.write_bytes(b"rubbish")
        assert load(server, "any")[0] == 400
        status, answer = server.infer("any", tensor("x", [1, 2], "FP32", [1, 2]))
        assert (status, answer["outputs"][0]["data"]) == (200, [1, 2])
        path.write_bytes(good)
        assert load(server, "any")[0] == 200


def test_a_storm_of_loads_and_unloads_ends_as_the_last_one_says(server: Victim, models: Path) -> None:
    save_adder(models / "storm" / "1" / "model.onnx", 2)
    save_python(
        models,
        "gust",
        "import doorstep\nclass Model(doorstep.Model):\n    def predict(self, x: int) -> int: return x\n",
    )
    seen: set[int] = set()
    wrong: list[Any] = []

    def storm(seed: int) -> None:
        for i in range(12):
            name = ("storm", "gust")[(seed + i) % 4 == 0]
            status, text = load(server, name, ("load", "unload")[(seed + i) % 2])
            if status not in {200, 400}:
                wrong.append((status, text))
            status, answer = server.infer("storm", row(1))
            seen.add(status)
            if (status == 200 and answer["outputs"][0]["data"] != [3]) or status not in {200, 400, 404, 503}:
                wrong.append((status, answer))

    with attacked(server, grown=128 * MIB):
        threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong, wrong[:3]
        assert load(server, "storm")[0] == 200
        assert server.infer("storm", row(1))[1]["outputs"][0]["data"] == [3]
        for name in ("storm", "gust"):
            assert load(server, name, "unload")[0] == 200
        assert server.infer("storm", row(1))[0] in {400, 404}


def test_new_versions_that_fail_under_load_never_reach_a_client(server: Victim, models: Path) -> None:
    broken = models / "add" / "2"
    with attacked(server):
        for content in (b"rubbish", b"", bytes(5000)):
            broken.mkdir(exist_ok=True)
            (broken / "model.onnx").write_bytes(content)
            assert load(server, "add")[0] == 400
            assert server.infer("add", row(1))[1]["model_version"] == "1"
        (broken / "model.onnx").unlink()
        broken.rmdir()
        assert load(server, "add")[0] == 200


# Clients that go


def body_of(what: str) -> bytes:
    return json.dumps({"inputs": [tensor("what", [1], "BYTES", [what])]}).encode()


def http_request(path: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), size, body)


def test_http_clients_that_go_at_any_moment_leave_nothing(server: Victim) -> None:
    wait_until_well(server)
    with attacked(server):
        for round_ in range(3):
            for data in (
                b"",
                b"POST /v2/models/rogue/infer HT",
                http_request("/v2/models/rogue/infer", b'{"inp', 5000),  # half a body
                http_request("/v2/models/rogue/infer", body_of("slow")),  # running, then queued
                http_request("/v2/models/rogue/infer", body_of("slow")) * 5,  # pipelined
                http_request("/v2/models/add/infer", json.dumps({"inputs": [row()]}).encode()) * 50,
            ):
                client = server.raw()
                client.send(data)
                if round_ == 1:  # a reset instead of an end
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif round_ == 2:
                    client.sock.shutdown(socket.SHUT_WR)
                client.close()
        cancelled = lambda: server.metric("nv_inference_request_failure", model="rogue", reason="CANCELED")  # noqa: E731
        server.wait_for(lambda: cancelled() >= 5, "cancelled requests")


def test_a_client_that_goes_while_it_reads_a_large_answer_leaves_nothing(server: Victim) -> None:
    size = 8 * MIB
    given = {"name": "x", "shape": [1, size], "datatype": "FP32", "parameters": {"binary_data_size": 4 * size}}
    wanted = [{"name": "y", "parameters": {"binary_data": True}}]
    document = json.dumps({"inputs": [given], "outputs": wanted}).encode()
    head = (
        b"POST /v2/models/any/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n"
        b"Inference-Header-Content-Length: %d\r\n\r\n"
    )
    with attacked(server, grown=256 * MIB):
        for _ in range(4):
            client = server.raw()
            client.send(head % (len(document) + 4 * size, len(document)) + document + bytes(4 * size))
            client.receive_exactly(100_000)
            client.close()


def test_grpc_clients_that_cancel_or_go_leave_nothing(server: Victim) -> None:
    wait_until_well(server)
    with attacked(server):
        for _ in range(3):
            channel = grpc.insecure_channel(server.grpc)
            calls = [infer_stub(channel).future(rogue_message("slow")) for _ in range(4)]
            calls.append(infer_stub(channel).future(rogue_message("slow"), timeout=0.05))
            server.wait_for(lambda: server.metric("doorstep_inflight_requests", model="rogue") >= 1)
            calls[1].cancel()
            channel.close()
        stream = "/inference.GRPCInferenceService/ModelStreamInfer"
        channel = grpc.insecure_channel(server.grpc)
        call = channel.stream_stream(stream, bytes, bytes)(iter([rogue_message("slow").SerializeToString()] * 20))
        next(call)
        call.cancel()
        channel.close()


def test_http2_clients_that_stop_half_way_leave_nothing(server: Victim) -> None:
    wait_until_well(server)
    fields = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
    head = block(b"POST", b"/inference.GRPCInferenceService/ModelInfer", fields)
    message = rogue_message("slow").SerializeToString()
    whole = struct.pack(">BI", 0, len(message)) + message
    http_head = block(b"POST", b"/v2/models/rogue/infer", [])
    with attacked(server):
        for frames in (
            [frame(1, 4, 1, head)],
            [frame(1, 4, 1, head), frame(0, 0, 1, whole[:10])],
            [frame(1, 4, 1, head), frame(0, 0, 1, whole)],
            [frame(1, 4, 1, head), frame(0, 1, 1, whole)],
            [frame(1, 4, 1, head), frame(0, 1, 1, whole), rst_stream(1)],
            [frame(1, 4, 1, head), frame(0, 1, 1, whole[:10])],
            [frame(1, 4, 1, http_head), frame(0, 1, 1, body_of("slow"))],
            [frame(1, 4, 1, http_head), frame(0, 0, 1, body_of("slow")[:5])],
        ):
            raw = server.raw(server.grpc_port)
            Http2Client(raw).send(*frames)
            raw.close()


def test_a_request_queued_behind_a_slow_one_is_not_run_when_its_client_is_gone(server: Victim, models: Path) -> None:
    wait_until_well(server)
    runs = lambda: server.metric("nv_inference_count", model="rogue")  # noqa: E731
    with attacked(server):
        before = runs()
        with server.raw() as first, server.raw() as second:
            first.send(http_request("/v2/models/rogue/infer", body_of("slow")))
            server.wait_for(lambda: server.metric("doorstep_inflight_requests", model="rogue") == 1)
            second.send(http_request("/v2/models/rogue/infer", body_of("never")))
            server.wait_for(lambda: server.metric("doorstep_inflight_requests", model="rogue") == 2)
            second.close()
            assert first.receive_answer()[0] == 200
        assert ask(server, "after")[0] == 200
        assert runs() == before + 2


def test_the_server_leaves_no_process_behind_however_it_ends(models: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with Victim(models, "--model-control-mode=explicit", "--load-model=rogue", "--load-model=numbers") as server:
            workers = server.workers
            assert len(workers) == 2
            ask(server, "signals")
            server.signal(number)
            server.wait()
            _, alive = psutil.wait_procs(workers, timeout=20)
            assert not alive
