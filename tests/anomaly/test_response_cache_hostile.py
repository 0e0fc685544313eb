"""A response cache whose clients, models and Redis lie: the answers are the model's, and the cache stays in bounds."""

from __future__ import annotations

import itertools
import json
import random
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harm import MIB, Victim, attacked, infer_stub, save_python, tensor

from doorstep import proto
from doorstep.testing.onnx_models import save_adder

# Says all that it was asked, so that two questions never have one answer; `size` bytes more where b is a number.
TELL = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            said = [request.parameters()]
            for name in "ab":
                array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                said.append([array.shape, [e.decode("latin-1") for e in array.ravel().tolist()]])
            text = json.dumps(said).encode()
            b = array.ravel()[0] if array.size else b""
            if b.isdigit():
                text += b"x" * int(b)
            parameters = {"odd": chr(0x10FFFF) * 3} if b == b"odd" else None
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([text], np.object_))],
                                                      parameters=parameters))
        return answers
"""
CONFIG = """
backend: "python"
input [ { name: "a" data_type: TYPE_STRING dims: [ -1 ] }, { name: "b" data_type: TYPE_STRING dims: [ -1 ] } ]
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
response_cache { enable: true }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("cached") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_python(models, "tell", TELL, CONFIG)
    return models


@pytest.fixture(scope="module")
def local(models: Path) -> Iterator[Victim]:
    with Victim(models, "--cache-config=local,size=4194304") as server:
        yield server
        server.assert_sound()


def ask(server: Victim, a: list[str], b: list[str], **rest: Any) -> str:
    inputs = [tensor("a", [len(a)], "BYTES", a), tensor("b", [len(b)], "BYTES", b)]
    status, answer = server.infer("tell", *inputs, **rest)
    assert status == 200, answer
    return str(answer["outputs"][0]["data"][0])


def truth(a: list[str], b: list[str]) -> list[Any]:
    return [[[len(a)], a], [[len(b)], b]]


def test_questions_that_look_alike_when_written_in_a_row(local: Victim) -> None:
    alike = [
        (["ab"], ["c"]),
        (["a"], ["bc"]),
        (["a", "b"], ["c"]),
        (["a"], ["b", "c"]),
        (["abc"], []),
        ([], ["abc"]),
        (["", "abc"], [""]),
        (["a\0b"], ["c"]),
        (["a\1\0\0\0b"], ["c"]),
        (['a","b'], ["c"]),
        (["a"], ['b"]],"x":[["c']),
        ([], []),
        ([""], []),
        ([], [""]),
        (["", ""], []),
    ]
    with attacked(local):
        for _ in range(3):
            for a, b in alike:
                assert json.loads(ask(local, a, b))[1:] == truth(a, b)


def parameters_of(local: Victim, fill: Callable[[Any], None]) -> str:
    message = proto.ModelInferRequest(model_name="tell", raw_input_contents=[b"\1\0\0\0p"] * 2)
    for name in "ab":
        message.inputs.add(name=name, datatype="BYTES", shape=[1])
    fill(message.parameters)
    with local.channel() as channel:
        answer = infer_stub(channel)(message, timeout=30)
    return str(json.loads(answer.raw_output_contents[0][4:])[0])


def test_parameters_that_look_alike(local: Victim) -> None:
    def other(kind: str, value: Any, name: str = "p") -> Callable[[Any], None]:
        return lambda parameters: setattr(parameters[name], kind, value)

    fills = [other("int64_param", v) for v in (0, 1, 2**53, 2**53 + 1, -(2**63))]
    fills += [other("bool_param", v) for v in (True, False)]
    fills += [other("string_param", v) for v in ("", "0", "1", "true", "NaN", "Infinity", "null", '"', "\0", "\u2028")]
    fills += [other("string_param", "1", name) for name in ('p":', "p\0", "\\", "q")]
    with attacked(local):
        first = [parameters_of(local, fill) for fill in fills]
        again = [parameters_of(local, fill) for fill in fills]
        assert first == again
        assert len(set(first)) == len(fills)


def test_more_than_it_holds(local: Victim) -> None:
    """Entries larger than the cache, and a thousand times what it has room for: it stays within its size."""
    with attacked(local, grown=96 * MIB):
        for size in ("8000000", "4194304", "4194000"):
            for _ in range(2):
                assert len(ask(local, [size], [size])) > int(size)
        dice = random.Random(5)
        for i in range(600):
            text = str(dice.randrange(20_000, 60_000))
            assert json.loads(ask(local, [str(i)], [text]).rstrip("x"))[1:] == truth([str(i)], [text])
        assert local.metric("nv_cache_util") <= 1.0


def test_a_hundred_clients_that_ask_the_same_at_once(local: Victim) -> None:
    with attacked(local):
        for round_ in range(5):
            answers: list[str] = []
            threads = [
                threading.Thread(target=lambda r=round_, to=answers: to.append(ask(local, [f"same {r}"], ["100"])))
                for _ in range(40)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(answers)) == 1


# A Redis that lies


def packed(
    heads: Any, body: bytes = b"", parameters: Any = None, magic: bytes = b"DSC1", length: int | None = None
) -> bytes:
    head = json.dumps([heads, parameters]).encode()
    return magic + struct.pack("<I", len(head) if length is None else length) + head + body


TEXT = b"\3\0\0\0lie"
LIES: dict[str, bytes] = {
    "empty": b"",
    "magic only": b"DSC1",
    "other magic": packed([["y", "BYTES", [1], 7]], TEXT, magic=b"XXXX"),
    "head longer than all": packed([["y", "BYTES", [1], 7]], TEXT, length=2**32 - 1),
    "cut": packed([["y", "BYTES", [1], 7]], TEXT[:-1]),
    "more": packed([["y", "BYTES", [1], 7]], TEXT + b"x"),
    "heads are none": packed(None),
    "heads are a number": packed(5),
    "heads are text": packed("abcd"),
    "name is a number": packed([[5, "BYTES", [1], 7]], TEXT),
    "name is a list": packed([[["y"], "BYTES", [1], 7]], TEXT),
    "name is none": packed([[None, "BYTES", [1], 7]], TEXT),
    "name is no output": packed([["z", "BYTES", [1], 7]], TEXT),
    "twice": packed([["y", "BYTES", [1], 7], ["y", "BYTES", [1], 7]], TEXT * 2),
    "no datatype": packed([["y", "FP31", [1], 4]], b"\0\0\0\0"),
    "datatype is a list": packed([["y", ["BYTES"], [1], 7]], TEXT),
    "negative shape": packed([["y", "UINT8", [-1], -1]], b"\0\0\0\0"),
    "negative size": packed([["y", "BYTES", [1], -7]], TEXT),
    "shape of text": packed([["y", "BYTES", ["1"], 7]], TEXT),
    "shape is none": packed([["y", "BYTES", None, 7]], TEXT),
    "shape is huge": packed([["y", "BYTES", [2**62, 2**62], 7]], TEXT),
    "shape is empty and huge": packed([["y", "BYTES", [0, 2**62], 0]]),
    "shape of floats": packed([["y", "BYTES", [1.0], 7]], TEXT),
    "a hundred dimensions": packed([["y", "BYTES", [1] * 100, 7]], TEXT),
    "element longer than all": packed([["y", "BYTES", [1], 7]], b"\xff\xff\xff\xfflie"),
    "deep": b"DSC1" + struct.pack("<I", 200_000) + b"[" * 200_000,
    "parameters are a list": packed([["y", "BYTES", [1], 7]], TEXT, [1]),
    "a parameter is an object": packed([["y", "BYTES", [1], 7]], TEXT, {"a": {"b": 1}}),
    "a parameter is none": packed([["y", "BYTES", [1], 7]], TEXT, {"a": None}),
}
# As the protocol's bytes, in place of the value.
NONSENSE: dict[str, bytes] = {
    "an error": b"-ERR no\r\n",
    "no key": b"-NOAUTH Authentication required.\r\n",
    "a number": b":5\r\n",
    "a list": b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",
    "endless": b"$2147483647\r\n" + b"x" * 1000,
    "negative": b"$-7\r\n",
    "no length": b"$x\r\n",
    "garbage": b"\0\xff\r\n" * 100,
    "deep lists": b"*1\r\n" * 5000 + b":1\r\n",
    "nothing, and gone": b"",
}


class LyingRedis(socketserver.ThreadingTCPServer):
    """Answers GET with `lie`, as it is; a hundred other commands with OK."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Liar)
        self.lie = b"$-1\r\n"
        self.told = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Liar(socketserver.StreamRequestHandler):
    server: LyingRedis

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2])
            if words[0].upper() != b"GET":
                self.wfile.write(b"+OK\r\n")
                continue
            self.server.told += 1
            if not self.server.lie:
                return
            self.wfile.write(self.server.lie)


@pytest.fixture(scope="module")
def redis() -> Iterator[LyingRedis]:
    with LyingRedis() as liar:
        yield liar
        liar.shutdown()


@pytest.fixture(scope="module")
def lied_to(models: Path, redis: LyingRedis) -> Iterator[Victim]:
    port = redis.server_address[1]
    options = ("host=127.0.0.1", f"port={port}", "socket_timeout=500")
    with Victim(models, *(f"--cache-config=redis,{option}" for option in options)) as server:
        yield server
        server.assert_sound()


_numbers = itertools.count()


@pytest.mark.parametrize("what", [*LIES, *NONSENSE])
def test_a_redis_that_lies_costs_a_run_and_no_answer(lied_to: Victim, redis: LyingRedis, what: str) -> None:
    lie = LIES.get(what)
    redis.lie = NONSENSE[what] if lie is None else b"$%d\r\n%b\r\n" % (len(lie), lie)
    with attacked(lied_to):
        told = redis.told
        lied_to.wait_for(
            lambda: _right(lied_to) and redis.told > told, "it has been lied to"
        )  # Redis may rest after a failure


def _right(server: Victim) -> bool:
    a, b = [f"q{next(_numbers)}"], ["z"]
    assert json.loads(ask(server, a, b))[1:] == truth(a, b)
    return True


def test_a_response_that_cannot_be_packed_is_only_not_kept(lied_to: Victim, redis: LyingRedis) -> None:
    redis.lie = b"$-1\r\n"
    with attacked(lied_to):
        for _ in range(20):
            assert json.loads(ask(lied_to, ["a"], ["odd"]))[1:] == truth(["a"], ["odd"])
