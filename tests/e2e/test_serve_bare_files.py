"""`doorstep serve model.gguf` as somebody with a file, or a folder of Hugging Face, and nothing else would use it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from doorstep.testing.server import ServerProcess, doorstep_command

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

SHOUT = """\
import doorstep

class Model(doorstep.Model):
    def predict(self, text: list[str]) -> list[str]:
        return [t.upper() for t in text]
"""
pytestmark = pytest.mark.xdist_group("bare models")


def completed(server: ServerProcess, model: str, **more: Any) -> dict[str, Any]:
    asked = {"model": model, "messages": [{"role": "user", "content": "What is 2+2?"}], "max_tokens": 16, **more}
    response = requests.post(server.url("/v1/chat/completions"), json={"temperature": 0, **asked}, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def shown_lines(server: ServerProcess) -> list[str]:
    """The commands that the log ends with."""
    return re.findall(r"^  (\S.*)$", server.logs().partition("Try it:")[2], re.MULTILINE)


def links(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink()]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """For the server's temporary files. Not pytest's folder: an engine's socket in there would have too long a name."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_file_is_a_chat_service_in_one_command(smollm2: Path, tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "my model.gguf").symlink_to(smollm2)
    with ServerProcess("my model.gguf", cwd=tmp_path, env={"TMPDIR": str(scratch)}) as server:
        assert " 4" in completed(server, "my-model")["choices"][0]["message"]["content"]
        assert [path.name for path in links(scratch)] == ["model.gguf"]
        curl, chat = shown_lines(server)
        assert chat.endswith(f" chat --url {server.url('')}")
        assert curl.startswith(f"curl -sN {server.url('/v1/chat/completions')} ")
        # As it is shown, but for its length
        shorter = curl.replace('"stream":true', '"stream":true,"max_tokens":4')
        events = subprocess.run(shorter, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
        assert events.startswith('data: {"id":"chatcmpl-')
        assert events.endswith("data: [DONE]\n\n")
        answered = subprocess.run(f"{chat} -m hello --max-tokens 4", shell=True, capture_output=True, text=True,
                                  timeout=60, check=True)  # fmt: skip
        assert answered.stdout.strip()
        assert server.stop() == 0
        assert links(scratch) == []


def test_its_links_are_gone_after_a_second_signal_too(smollm2: Path, scratch: Path) -> None:
    with ServerProcess(smollm2, env={"TMPDIR": str(scratch)}) as server:
        asked = {"model": smollm2.stem, "prompt": "Once", "stream": True, "max_tokens": 4000, "ignore_eos": True}
        with requests.post(server.url("/v1/completions"), json=asked, stream=True, timeout=60) as response:
            assert next(response.iter_lines())
            server.signal(signal.SIGINT)
            while "finishing what is in flight" not in server.logs():
                assert server.running
            server.signal(signal.SIGINT)
            assert server.wait() == 3
        assert links(scratch) == []


def test_files_and_repositories_are_served_together(smollm2: Path, tmp_path: Path) -> None:
    for repository, name in (("one", "first"), ("two", "second")):
        model = tmp_path / repository / name / "1/model.py"
        model.parent.mkdir(parents=True)
        model.write_text(SHOUT)
    (tmp_path / "a.gguf").symlink_to(smollm2)
    (tmp_path / "b.gguf").symlink_to(smollm2)
    options = ("--model-repository=two", "--model-repository", "b.gguf")
    with ServerProcess(["a.gguf", "one"], *options, cwd=tmp_path) as server:
        index = requests.post(server.url("/v2/repository/index"), timeout=60).json()
        assert {entry["name"]: entry["state"] for entry in index} == dict.fromkeys(
            ("a", "b", "first", "second"), "READY"
        )
        assert shown_lines(server)[-1].endswith(f" chat a --url {server.url('')}")


def test_a_file_that_is_named_is_loaded_in_explicit_mode(smollm2: Path) -> None:
    with ServerProcess(smollm2, "--model-control-mode=explicit", "--allow-openai=false") as server:
        assert requests.get(server.url(f"/v2/models/{smollm2.stem}/ready"), timeout=60).status_code == 200
        assert shown_lines(server) == []  # as nothing could be asked that way


def test_a_model_in_a_repository_needs_no_config(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "models/chat/1").mkdir(parents=True)
    (tmp_path / "models/chat/1/model.gguf").symlink_to(smollm2)
    with ServerProcess(tmp_path / "models") as server:
        assert " 4" in completed(server, "chat")["choices"][0]["message"]["content"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs doorstep[transformers]")
def test_a_folder_of_hugging_face_is_a_chat_service(tmp_path: Path) -> None:
    from hf_models import save_llama

    save_llama(tmp_path / "Tiny Llama")
    with ServerProcess("Tiny Llama", cwd=tmp_path) as server:
        answer = completed(server, "Tiny-Llama", max_tokens=4)
        assert answer["usage"]["completion_tokens"] <= 4
        assert '"model":"Tiny-Llama"' in shown_lines(server)[0]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("nothing.gguf", "nothing.gguf: there is no such file (did you mean noting.gguf?)"),
        ("empty.gguf", "empty.gguf: is empty (fetch it again)"),
        ("noting.gguf", "noting.gguf: is no GGUF file: it does not begin with 'GGUF'"),
        ("half", "half: has a model's config.json, but no weights that can be served"),
        ("nowhere", "nowhere: there is no such folder (name a folder of models)"),
    ],
)
def test_what_cannot_be_served_is_one_line_that_says_what_to_do(tmp_path: Path, named: str, told: str) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "noting.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text(json.dumps({"model_type": "llama"}))
    command = [*doorstep_command(), "serve", named, "--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
