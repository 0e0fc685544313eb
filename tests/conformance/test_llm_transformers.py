"""The backend `transformers` through a server, against what transformers itself answers."""

from __future__ import annotations

import json
import queue
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
import tritonclient.grpc as triton_grpc

from doorstep.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parent))

from hf_models import save_bert, save_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TIMEOUT_S = 60
PROMPTS = ["The quick brown", "What is the weather like in Zürich?", "{", "0 1 2 3 " * 30]
LONG_CONTEXT = 100_000
MANY = 90_000  # tokens: minutes of work


def config(folder: Path, **parameters: object) -> None:
    lines = [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    (folder / "config.pbtxt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "tiny" / "1")
    config(root / "tiny", context_size=512, threads=1, batch_tokens=32)
    save_llama(root / "long" / "1", max_position_embeddings=LONG_CONTEXT)
    config(root / "long", context_size=LONG_CONTEXT, slots=1, threads=1)
    save_bert(root / "encoder" / "1")
    save_bert(root / "judge" / "1", transformers.BertForSequenceClassification, num_labels=1)
    shutil.copytree(root / "tiny" / "1", root / "cut" / "1")
    weights = root / "cut" / "1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(root / "tiny" / "1", root / "lacking" / "1")
    _drop_a_tensor(root / "lacking" / "1" / "model.safetensors")
    return root


def _drop_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    with ServerProcess(models, "--exit-on-error=false", ready="live", start_timeout_s=300) as started:
        deadline = time.monotonic() + 300
        while set(states(started).values()) & {"", "LOADING"}:
            assert time.monotonic() < deadline, started.logs()
            time.sleep(0.2)
        ready = {model for model, state in states(started).items() if state == "READY"}
        assert ready == {"tiny", "long", "encoder", "judge"}, started.logs()
        yield started


def states(server: ServerProcess) -> dict[str, str]:
    index = requests.post(server.url("/v2/repository/index"), timeout=TIMEOUT_S).json()
    return {row["name"]: row.get("state", "") for row in index}


class Framework:
    """The same folder, asked without a server."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def tokens(self, prompt: str, most: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            found = self.model.generate(**ids, do_sample=False, max_new_tokens=most)
        return list(found[0, ids["input_ids"].shape[1] :].tolist())

    def text(self, prompt: str, most: int) -> str:
        return str(self.tokenizer.decode(self.tokens(prompt, most), skip_special_tokens=True))


@pytest.fixture(scope="module")
def framework(models: Path) -> Framework:
    return Framework(models / "tiny" / "1")


def ask(server: ServerProcess, prompt: str, model: str = "tiny", **rest: Any) -> requests.Response:
    body = {"text_input": prompt, "exclude_input_in_output": True, "temperature": 0, **rest}
    return requests.post(server.url(f"/v2/models/{model}/generate"), json=body, timeout=TIMEOUT_S)


def streamed(server: ServerProcess, prompt: str, model: str = "tiny", **rest: Any) -> list[dict[str, Any]]:
    body = {"text_input": prompt, "stream": True, "temperature": 0, **rest}
    answer = requests.post(server.url(f"/v2/models/{model}/generate_stream"), json=body, timeout=TIMEOUT_S)
    assert answer.ok, answer.text
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n") if event]


def over_grpc(server: ServerProcess, model: str, **inputs: object) -> list[Any]:
    """The responses of a decoupled stream, or the error that ended it."""
    tensors = []
    for name, value in inputs.items():
        array = np.array([value]) if isinstance(value, bool) else np.array(value, object, ndmin=1)
        datatype = "BOOL" if isinstance(value, bool) else "BYTES"
        tensors.append(triton_grpc.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array))
    found: queue.Queue[Any] = queue.Queue()
    results: list[Any] = []
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: found.put(error or result))
        client.async_stream_infer(model, tensors, enable_empty_final_response=True)
        final = False
        while not final:
            result = found.get(timeout=TIMEOUT_S)
            results.append(result)
            final = not isinstance(result, triton_grpc.InferResult) or (
                result.get_response().parameters["triton_final_response"].bool_param
            )
        client.stop_stream()
    return results


# Generation


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_greedy_answer_is_that_of_generate(server: ServerProcess, framework: Framework, prompt: str) -> None:
    answer = ask(server, prompt, max_tokens=40)
    assert answer.json()["text_output"] == framework.text(prompt, 40)


def test_streams_say_the_same_in_pieces(server: ServerProcess, framework: Framework) -> None:
    expected = framework.text(PROMPTS[0], 40)
    events = streamed(server, PROMPTS[0], max_tokens=40, return_finish_reason=True, return_num_output_tokens=True)
    assert "".join(event["text_output"] for event in events) == expected
    tokens = framework.tokens(PROMPTS[0], 40)
    ended = tokens[-1] == framework.tokenizer.eos_token_id
    assert [event["finish_reason"] for event in events[-2:]] == ["None", "stop" if ended else "length"]
    assert len(events) > 5
    assert sum(event["num_output_tokens"] for event in events) == len(tokens)
    sampling = json.dumps({"temperature": 0, "max_tokens": 40})
    results = over_grpc(server, "tiny", text_input=PROMPTS[0], stream=True, sampling_parameters=sampling)
    pieces = [result.as_numpy("text_output") for result in results]
    assert "".join(piece[0].decode() for piece in pieces if piece is not None) == expected
    assert len(pieces) > 5


def test_four_at_once_are_answered_as_one_by_one(server: ServerProcess, framework: Framework) -> None:
    lengths = [5, 60, 20, 120]
    expected = [framework.text(*pair) for pair in zip(PROMPTS, lengths, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            asked = [
                pool.submit(ask, server, prompt, max_tokens=most) for prompt, most in zip(PROMPTS, lengths, strict=True)
            ]
            assert [answer.result().json()["text_output"] for answer in asked] == expected


def test_an_answer_ends_before_a_stop_string(server: ServerProcess, framework: Framework) -> None:
    whole = framework.text(PROMPTS[0], 40)
    stop = whole[9:13]
    expected = whole[: whole.index(stop)]
    answer = ask(server, PROMPTS[0], max_tokens=40, stop=stop, return_finish_reason=True).json()
    assert (answer["text_output"], answer["finish_reason"]) == (expected, "stop")
    events = streamed(server, PROMPTS[0], max_tokens=40, stop=stop)
    assert "".join(event["text_output"] for event in events) == expected


def test_log_probabilities_are_those_of_the_models_scores(server: ServerProcess, framework: Framework) -> None:
    answer = ask(server, PROMPTS[0], max_tokens=6, logprobs=2, return_logprobs=True, return_cumulative_logprob=True)
    prompt, tokens = framework.tokenizer(PROMPTS[0])["input_ids"], framework.tokens(PROMPTS[0], 6)
    with torch.no_grad():
        scores = framework.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = scores.log_softmax(-1)  # (tokens, vocabulary)
    said = json.loads(answer.json()["logprobs"])
    assert [int(next(iter(entry))) for entry in said] == tokens  # the likeliest comes first, and was chosen
    for entry, row in zip(said, expected, strict=True):
        values, places = row.topk(2)
        assert [int(token) for token in entry] == places.tolist()
        assert [one["logprob"] for one in entry.values()] == pytest.approx(values.tolist(), abs=1e-4)
    total = sum(row[token].item() for row, token in zip(expected, tokens, strict=True))
    assert answer.json()["cumulative_logprob"] == pytest.approx(total, abs=1e-3)


def test_a_seed_gives_the_same_answer_again(server: ServerProcess) -> None:
    said = [ask(server, "The", temperature=1.5, seed=s, max_tokens=30).json()["text_output"] for s in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


# Endings


def test_whoever_leaves_frees_the_slot(server: ServerProcess) -> None:
    """There is one, and the answers would take minutes."""
    body = {"text_input": "The", "stream": True, "ignore_eos": True, "max_tokens": MANY}
    url = server.url("/v2/models/long/generate_stream")
    for _ in range(2):
        with requests.post(url, json=body, stream=True, timeout=TIMEOUT_S) as answer:
            assert next(answer.iter_content(16))
    assert ask(server, "The", "long", max_tokens=3).ok


def test_whoever_leaves_in_the_middle_of_a_prompt_frees_the_slot(server: ServerProcess) -> None:
    prompt = "".join(chr(33 + i * i % 90) for i in range(MANY))
    with pytest.raises(requests.ReadTimeout):
        requests.post(
            server.url("/v2/models/long/generate"), json={"text_input": prompt, "max_tokens": 1}, timeout=(TIMEOUT_S, 1)
        )
    assert ask(server, "The", "long", max_tokens=3).ok


# Errors


def test_a_prompt_that_does_not_fit_is_refused_in_openais_words(server: ServerProcess, framework: Framework) -> None:
    prompt = "0 1 2 3 " * 200
    count = len(framework.tokenizer(prompt)["input_ids"])
    answer = ask(server, prompt)
    assert answer.status_code == 400
    assert (
        f"This model's maximum context length is 512 tokens. However, your request has {count} input tokens."
        in answer.json()["error"]
    )


def test_an_answer_ends_where_the_context_does(server: ServerProcess, framework: Framework) -> None:
    count = len(framework.tokenizer(PROMPTS[3])["input_ids"])
    more = {"ignore_eos": True, "return_finish_reason": True, "return_num_output_tokens": True, "max_tokens": 512}
    answer = ask(server, PROMPTS[3], **more).json()
    assert (answer["finish_reason"], answer["num_output_tokens"]) == ("length", 512 - count)


@pytest.mark.parametrize(
    ("parameter", "why"),
    [
        ({"temperature": -1}, "'temperature' cannot be -1"),
        ({"top_p": 1.5}, "'top_p' cannot be 1.5"),
        ({"repetition_penalty": 0}, "'repetition_penalty' cannot be 0"),
        ({"max_tokens": 0}, "'max_tokens' must be a whole number from 1"),
        ({"logprobs": 21}, "'logprobs' cannot be 21"),
        ({"stop": ""}, "'stop' cannot be ''"),
    ],
)
def test_values_out_of_range_are_refused(server: ServerProcess, parameter: dict[str, Any], why: str) -> None:
    answer = ask(server, "The", **parameter)
    assert answer.status_code == 400
    assert why in answer.json()["error"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("cut", "model.safetensors is damaged: its tensors claim"),
        ("lacking", "the weights lack model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_model_that_is_damaged_says_so_and_harms_no_other(server: ServerProcess, model: str, why: str) -> None:
    index = requests.post(server.url("/v2/repository/index"), timeout=TIMEOUT_S).json()
    (row,) = [row for row in index if row["name"] == model]
    assert row["state"] == "UNAVAILABLE"
    assert why in row["reason"]
    assert ask(server, "The", max_tokens=1).ok


# Vectors


def test_embeddings_are_the_mean_of_the_frameworks_hidden_states(server: ServerProcess, models: Path) -> None:
    texts = ["The quick brown fox", "It rains", "What is the weather like in Paris? " * 3, "0"]
    found = over_grpc(server, "encoder", text_input=texts)[0].as_numpy("embedding")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "encoder" / "1")
    model = transformers.AutoModel.from_pretrained(models / "encoder" / "1").eval()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-5)


def test_scores_are_those_of_the_frameworks_classifier(server: ServerProcess, models: Path) -> None:
    query, documents = "the weather", ["It rains in Paris", "The fox", "The lazy dog does not mind " * 4]
    found = over_grpc(server, "judge", query=query, documents=documents)[0].as_numpy("scores")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "judge" / "1")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "judge" / "1").eval()
    for document, score in zip(documents, found, strict=True):
        with torch.no_grad():
            logit = model(**tokenizer(query, document, return_tensors="pt")).logits[0, 0]
        assert score == pytest.approx(logit.sigmoid().item(), abs=1e-5)


def test_an_input_that_does_not_fit_is_refused(server: ServerProcess) -> None:
    (error,) = over_grpc(server, "encoder", text_input=["It", "0 1 " * 200])
    assert "maximum context length is 128 tokens" in str(error)
