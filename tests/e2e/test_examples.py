"""Every example, run as its README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from doorstep.client import Client
from doorstep.errors import InvalidArgument
from doorstep.testing.server import ServerProcess, doorstep_command

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def onnx_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    script = EXAMPLES / "onnx" / "make_model.py"
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "wrote models/flowers/1/model.onnx\n"
    return folder / "models"


@pytest.fixture(scope="module")
def server(onnx_models: Path) -> Iterator[ServerProcess]:
    repositories = [EXAMPLES / "python-model/models", EXAMPLES / "triton-python-model/models", onnx_models]
    env = {"PYTHONDONTWRITEBYTECODE": "1"}  # the examples stay as they are
    with ServerProcess(repositories, env=env) as running:
        yield running


def python(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / "client" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_example(server: ServerProcess) -> None:
    shown = python("call.py", f"http://{server.http}").splitlines()
    assert shown == [
        "models: add_sub, flowers, shout, statistics",
        "shout: [b'HELLO' b'WORLD']",
        "statistics: mean 3.0, largest 6.0",
        "error: Request for unknown model: 'nobody' is not found",
    ]


def test_the_asyncio_example(server: ServerProcess) -> None:
    assert python("call_async.py", f"http://{server.http}").startswith("['CALL 0', 'CALL 1', ")


def test_the_tritonclient_example(server: ServerProcess) -> None:
    shown = python("call_triton.py", server.http, server.grpc).splitlines()
    assert shown == ["tritonclient.http [b'HELLO' b'WORLD']", "tritonclient.grpc [b'HELLO' b'WORLD']"]


def test_the_requests_example(server: ServerProcess) -> None:
    assert python("call_requests.py", f"http://{server.http}") == "['HELLO', 'WORLD']\n"


def test_the_triton_model_adds_and_subtracts(server: ServerProcess) -> None:
    with Client(f"http://{server.http}") as client:
        both = client.infer("add_sub", INPUT0=[1, 2, 3, 4], INPUT1=[4, 3, 2, 1])
    assert both["OUTPUT0"].tolist() == [[5, 5, 5, 5]]
    assert both["OUTPUT1"].tolist() == [[-3, -1, 1, 3]]


def test_a_model_blames_the_client_where_it_is_to_blame(server: ServerProcess) -> None:
    with Client(f"http://{server.http}") as client, pytest.raises(InvalidArgument, match="no values, so no mean"):
        client.infer("statistics", values=[[]])


@pytest.mark.parametrize(
    ("command", "output", "expected"),
    [
        (["shout", "text=hello"], "output", ["HELLO"]),
        (["statistics", "values=[1,2,3]"], "mean", [[2.0]]),
        (["add_sub", "INPUT0=[[1,2,3,4]]", "INPUT1=[[4,3,2,1]]"], "OUTPUT0", [[5.0, 5.0, 5.0, 5.0]]),
        (["flowers", "features=[[5.1,3.5,1.4,0.2],[6.7,3.0,5.2,2.3]]"], "species", [[0], [2]]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_commands_in_the_examples_work(
    server: ServerProcess, command: list[str], output: str, expected: list[object]
) -> None:
    env = {**os.environ, "DOORSTEP_URL": f"http://{server.http}"}
    done = subprocess.run(
        [*doorstep_command(), "infer", *command, "--json"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)[output]
    assert got == expected


@pytest.fixture(scope="module")
def together() -> Iterator[ServerProcess]:
    """The examples of models that work with others, or with what came before."""
    repositories = [EXAMPLES / name / "models" for name in ("ensemble", "bls", "decoupled", "sequence")]
    with ServerProcess(repositories, env={"PYTHONDONTWRITEBYTECODE": "1"}) as running:
        yield running


def test_the_ensemble_counts_words(together: ServerProcess) -> None:
    with Client(f"http://{together.http}") as client:
        counts = client.infer("word_counts", TEXT=["To be or not to be"])
    assert counts["WORD"].tolist() == [b"to", b"be", b"or", b"not"]
    assert counts["TIMES"].tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "language", "asked"), [("The end", b"en", b"cheap"), ("Das ist neu", b"de", b"costly")]
)
def test_the_costly_model_is_asked_only_where_the_cheap_one_is_not_sure(
    together: ServerProcess, text: str, language: bytes, asked: bytes
) -> None:
    with Client(f"http://{together.http}") as client:
        answer = client.infer("cascade", text=[text])
    assert answer["language"].tolist() == [language]
    assert answer["asked"].tolist() == [asked]


def test_words_come_one_by_one_over_a_grpc_stream(together: ServerProcess) -> None:
    assert python("../decoupled/call.py", together.grpc) == "one\ntwo\nthree\n"


def test_words_come_one_by_one_as_events(together: ServerProcess) -> None:
    url = f"http://{together.http}/v2/models/words/generate_stream"
    with urlopen(url, b'{"TEXT": "one two three"}', timeout=60) as response:
        lines = response.read().decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [event["WORD"] for event in events] == ["one", "two", "three"]


def infer(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DOORSTEP_URL": f"http://{server.http}"}
    command = [*doorstep_command(), "infer", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_sequence_from_a_terminal(together: ServerProcess) -> None:
    for x, more, mean in ((1, ["sequence_start=true"], 1.0), (5, ["sequence_end=true"], 3.0)):
        flags = [f"--parameter={text}" for text in ("sequence_id=terminal", *more)]
        done = infer(together, "average", f"X=[[{x}]]", "--json", *flags)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"MEAN": [[mean]]}


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["words", "TEXT=a"], "/v2/models/words/generate_stream -d"),
        (["average", "X=[[1]]"], "--parameter sequence_id=7 --parameter sequence_start=true"),
        (["average", "X=[[1]]", "--parameter=sequence_id=nobody"], "sequence_start=true begins one"),
        (["average", "X=[[1]]", "--parameter=sequence_id"], "write NAME=VALUE"),
    ],
    ids=["decoupled", "no sequence", "not begun", "no value"],
)
def test_what_one_call_is_not_enough_for_is_explained(
    together: ServerProcess, arguments: list[str], advice: str
) -> None:
    done = infer(together, *arguments)
    assert done.returncode == 1
    assert advice in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_each_sequence_has_its_own_mean(together: ServerProcess) -> None:
    assert python("../sequence/call.py", together.http).splitlines() == [
        "morning: 1 → mean 1.0",
        "evening: 10 → mean 10.0",
        "morning: 2 → mean 1.5",
        "evening: 20 → mean 15.0",
        "morning: 6 → mean 3.0",
        "evening: 60 → mean 30.0",
    ]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("llm")
    (folder / "chat/1").mkdir(parents=True)
    (folder / "chat/1/model.gguf").symlink_to(smollm2)
    with ServerProcess(folder) as running:
        yield running


def test_a_language_model_answers_openais_client_and_a_reader_of_events(language_model: ServerProcess) -> None:
    streamed, counted = python("../llm/client.py", language_model.url("/v1")).splitlines()
    assert " 4" in streamed
    assert re.fullmatch(r"\(\d+ tokens after \d+ of prompt\)", counted)
    assert " 4" in python("../llm/read_events.py", language_model.http)


def test_the_reader_of_events_says_what_the_server_refuses(language_model: ServerProcess) -> None:
    command = [sys.executable, str(EXAMPLES / "llm/read_events.py"), language_model.http, "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("The model 'nobody' does not exist.")
