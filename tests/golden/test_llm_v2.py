"""A language model over V2, as clients of Triton's vLLM backend ask it: tritonclient, generate and generate_stream.

Names, defaults and texts are vllm_backend's (src/model.py, src/utils/request.py); answers are xllamacpp's.
"""

from __future__ import annotations

import json
import math
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

sys.path.insert(0, str(Path(__file__).parent))

from llm_server import (
    CONTEXT,
    EMBED,
    PATIENCE_S,
    SMOL,
    TINY,
    WIDTH,
    LLMServer,
    Reference,
    cosine,
    save_adapter,
    save_model,
)

pytestmark = pytest.mark.xdist_group("llm-v2")
PROMPT = "The capital of France is"
SAMPLING: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
RETURNS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "pirate.gguf")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, adapter: Path) -> Iterator[LLMServer]:
    models = tmp_path_factory.mktemp("v2")
    folder = save_model(models, "smol", SMOL, smollm2)
    (folder / "adapters").mkdir()
    (folder / "adapters" / "pirate.gguf").symlink_to(adapter)
    save_model(models, "tiny", TINY, smollm2)
    save_model(models, "embed", EMBED, smollm2)
    with LLMServer(models) as found:
        yield found


@pytest.fixture(scope="module")
def said(smollm2: Path) -> dict[str, Any]:
    """What the model answers, with the log probabilities of its tokens."""
    return Reference(smollm2).complete({"prompt": PROMPT, "logprobs": 1, **SAMPLING})["choices"][0]


def inputs(text: str = PROMPT, sampling: Any = SAMPLING, **flags: bool) -> list[triton.InferInput]:
    found = []
    texts = {"text_input": text} | ({} if sampling is None else {"sampling_parameters": json.dumps(sampling)})
    for name, value in texts.items():
        found.append(triton.InferInput(name, [1], "BYTES"))
        found[-1].set_data_from_numpy(np.array([value.encode()], np.object_))
    for name, flag in flags.items():
        found.append(triton.InferInput(name, [1], "BOOL"))
        found[-1].set_data_from_numpy(np.array([flag]))
    return found


class Stream:
    """ModelStreamInfer by tritonclient."""

    def __init__(self, server: LLMServer) -> None:
        self.client = triton.InferenceServerClient(server.grpc)
        self.got: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __enter__(self) -> Stream:
        self.client.start_stream(lambda result, error: self.got.put((result, error)))
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream()
        self.client.close()

    def ask(self, asked: list[triton.InferInput], model: str = "smol", **rest: Any) -> list[Any]:
        """The responses to one request."""
        self.client.async_stream_infer(model, asked, **rest)
        found = []
        while True:
            result, error = self.got.get(timeout=PATIENCE_S)
            if error is not None:
                raise error
            found.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return found


@pytest.fixture(scope="module")
def stream(server: LLMServer) -> Iterator[Stream]:
    with Stream(server) as found:
        yield found


def text_of(result: Any) -> str:
    return str(result.as_numpy("text_output")[0].decode())


def generate(server: LLMServer, verb: str = "generate", model: str = "smol", **body: Any) -> requests.Response:
    return requests.post(server.url(f"/v2/models/{model}/{verb}"), json=body, timeout=PATIENCE_S)


def events(answer: requests.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n") if event]


# One answer


def test_the_prompt_comes_before_the_answer(stream: Stream, said: dict[str, Any]) -> None:
    (found,) = stream.ask(inputs())
    assert text_of(found) == PROMPT + said["text"]
    assert [output.name for output in found.get_response().outputs] == ["text_output"]


@pytest.mark.parametrize(("exclude", "before"), [(True, ""), (False, PROMPT)])
def test_the_prompt_is_left_out_where_that_is_asked(
    stream: Stream, said: dict[str, Any], exclude: bool, before: str
) -> None:
    (found,) = stream.ask(inputs(exclude_input_in_output=exclude))
    assert text_of(found) == before + said["text"]


def test_generate_takes_parameters_and_gives_one_object(server: LLMServer, said: dict[str, Any]) -> None:
    found = generate(server, text_input=PROMPT, parameters=SAMPLING)
    assert (found.status_code, found.json()) == (
        200, {"model_name": "smol", "model_version": "1", "text_output": PROMPT + said["text"]}
    )  # fmt: skip
    whole = generate(
        server, text_input=PROMPT, sampling_parameters=json.dumps(SAMPLING), exclude_input_in_output=True, stream=False
    )
    assert whole.json()["text_output"] == said["text"]


def test_a_request_may_say_its_parameters_in_the_protocols_own_place(stream: Stream, said: dict[str, Any]) -> None:
    (found,) = stream.ask(inputs(sampling=None), parameters={"max_tokens": 6, "temperature": "0"})
    assert text_of(found) == PROMPT + said["text"]


# A stream


def test_a_stream_has_no_prompt_and_comes_in_pieces(stream: Stream, said: dict[str, Any]) -> None:
    found = stream.ask(inputs(stream=True))
    assert "".join(text_of(result) for result in found) == said["text"]
    assert len(found) > 3
    (again,) = stream.ask(inputs(stream=False))
    assert text_of(again) == PROMPT + said["text"]


def test_generate_stream_is_the_same_as_events(server: LLMServer, said: dict[str, Any]) -> None:
    found = events(generate(server, "generate_stream", text_input=PROMPT, stream=True, parameters=SAMPLING))
    assert "".join(event["text_output"] for event in found) == said["text"]
    assert all(event.keys() == {"model_name", "model_version", "text_output"} for event in found)
    whole = events(generate(server, "generate_stream", text_input=PROMPT, stream=False, parameters=SAMPLING))
    assert [event["text_output"] for event in whole] == [PROMPT + said["text"]]


@pytest.mark.parametrize("streamed", [False, True])
def test_what_else_is_returned_where_it_is_asked_for(stream: Stream, said: dict[str, Any], streamed: bool) -> None:
    flags = {f"return_{name}": True for name in RETURNS}
    found = stream.ask(inputs(sampling={**SAMPLING, "logprobs": 1}, stream=streamed, **flags))
    wanted = said["logprobs"]["content"]
    assert {output.name for output in found[0].get_response().outputs} == {"text_output", *RETURNS}
    last = found[-1]
    assert [r.as_numpy("finish_reason")[0].decode() for r in found] == ["None"] * (len(found) - 1) + ["length"]
    assert last.as_numpy("cumulative_logprob")[0] == pytest.approx(
        math.fsum(entry["logprob"] for entry in wanted), abs=0.1
    ), "of the whole answer so far"
    entries = [entry for result in found for entry in json.loads(result.as_numpy("logprobs")[0])]
    assert [next(iter(entry.values()))["decoded_token"] for entry in entries] == [entry["token"] for entry in wanted]
    assert [next(iter(entry.values()))["rank"] for entry in entries] == [1] * len(wanted)
    assert [next(iter(entry.values()))["logprob"] for entry in entries] == pytest.approx(
        [entry["logprob"] for entry in wanted], abs=0.05
    )
    assert sum(int(result.as_numpy("num_output_tokens")[0]) for result in found) == len(wanted)
    assert {int(result.as_numpy("num_input_tokens")[0]) for result in found} == {5}


def test_only_wanted_outputs_come(stream: Stream) -> None:
    found = stream.ask(inputs(return_finish_reason=True), outputs=[triton.InferRequestedOutput("finish_reason")])
    assert [output.name for output in found[0].get_response().outputs] == ["finish_reason"]


def test_requests_of_one_stream_run_side_by_side(server: LLMServer, said: dict[str, Any]) -> None:
    with Stream(server) as several:
        for number in range(4):
            several.client.async_stream_infer("smol", inputs(exclude_input_in_output=True), request_id=str(number))
        found = [several.got.get(timeout=PATIENCE_S) for _ in range(4)]
    assert sorted(result.get_response().id for result, error in found if error is None) == list("0123")
    assert {text_of(result) for result, _ in found} == {said["text"]}


# Adapters and vectors


def test_an_adapter_is_chosen_by_its_name(stream: Stream, smollm2: Path, adapter: Path) -> None:
    wanted = Reference(smollm2, adapter=adapter).complete({"prompt": PROMPT, **SAMPLING})["choices"][0]["text"]
    (found,) = stream.ask(inputs(sampling={**SAMPLING, "lora_name": "pirate"}, exclude_input_in_output=True))
    assert text_of(found) == wanted


def test_vectors_of_several_texts(server: LLMServer, smollm2: Path) -> None:
    texts = ["a cat", "the stock market"]
    asked = triton_http.InferInput("text_input", [2], "BYTES")
    asked.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_))
    grpc_asked = triton.InferInput("text_input", [2], "BYTES")
    grpc_asked.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_))
    with Stream(server) as stream:
        (found,) = stream.ask([grpc_asked], model="embed")
    vectors = found.as_numpy("embedding")
    assert vectors.shape == (2, WIDTH)
    for vector, expected in zip(vectors, Reference(smollm2, embedding=True).embed(*texts), strict=True):
        assert cosine(vector.tolist(), expected) == pytest.approx(1, abs=1e-4)


# What it says of itself


def test_metadata_and_config_are_those_of_tritons_vllm_backend(server: LLMServer) -> None:
    with triton_http.InferenceServerClient(server.http) as client:
        metadata, config = client.get_model_metadata("smol"), client.get_model_config("smol")
    types = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"] + metadata["outputs"]}
    assert types == {
        "text_input": "BYTES", "sampling_parameters": "BYTES", "stream": "BOOL", "exclude_input_in_output": "BOOL",
        "text_output": "BYTES", "finish_reason": "BYTES", "logprobs": "BYTES", "cumulative_logprob": "FP32",
        "num_input_tokens": "UINT32", "num_output_tokens": "UINT32",
        **{f"return_{name}": "BOOL" for name in RETURNS},
    }  # fmt: skip
    optional = {tensor["name"]: tensor.get("optional", False) for tensor in config["input"]}
    assert [name for name, is_optional in optional.items() if not is_optional] == ["text_input"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config.get("max_batch_size", 0) == 0


# Errors


@pytest.mark.parametrize(
    ("model", "sampling", "flags", "text"),
    [
        ("smol", SAMPLING, {"stream": True, "exclude_input_in_output": False},
         "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."),
        ("smol", {**SAMPLING, "lora_name": "nobody"}, {},
         "LoRA nobody is not supported, we currently support ['pirate']"),
        ("tiny", {**SAMPLING, "lora_name": "pirate"}, {}, "LoRA feature is not enabled."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("over", ["grpc", "generate", "generate_stream"])
def test_errors_are_in_vllm_backends_words(
    server: LLMServer, model: str, sampling: Any, flags: dict[str, bool], text: str, over: str
) -> None:
    if over == "grpc":
        with Stream(server) as stream, pytest.raises(InferenceServerException) as caught:
            stream.ask(inputs(sampling=sampling, **flags), model=model)
        assert text in caught.value.message()
    else:
        found = generate(server, over, model, text_input=PROMPT, sampling_parameters=json.dumps(sampling), **flags)
        assert found.status_code == 400
        assert text in found.text


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ("not JSON", "sampling_parameters is not JSON"),
        (json.dumps([1]), "must be a JSON object"),
        (json.dumps({"max_tokens": "many"}), "'max_tokens' cannot be 'many'"),
        (json.dumps({"max_tokens": -5}), "'max_tokens'"),
        (json.dumps({"temperature": "nan"}), "'temperature'"),
        (json.dumps({"n_discard": -1}), "unknown sampling parameter 'n_discard'"),
        (json.dumps({"stop": [1]}), "'stop'"),
        (json.dumps({"stop": ["a"] * 17}), "'stop'"),
        (json.dumps({"stop": [""]}), "'stop' cannot be ['']: 16 texts of 1 to 256 characters at most"),
        (json.dumps({"stop": "a" * 257}), "'stop'"),
        (json.dumps({"max_tokens": 2**32 + 1}), "'max_tokens' cannot be 4294967297: it is 0 to 10000000"),
        (json.dumps({"logprobs": 21}), "'logprobs'"),
        (json.dumps({"top_k": 2**40}), "'top_k'"),
        (json.dumps({"top_k": "9" * 5000}), "'top_k' cannot be '999"),
        (json.dumps({"temperature": -1}), "'temperature'"),
        (json.dumps({"top_p": 1.5}), "'top_p'"),
        (json.dumps({"repetition_penalty": 0}), "'repetition_penalty'"),
        (json.dumps({"presence_penalty": 3}), "'presence_penalty'"),
        (json.dumps({"min_tokens": 3}), "backend 'llamacpp' cannot do 'min_tokens'"),
    ],
)
def test_bad_sampling_parameters_are_named(server: LLMServer, sampling: str, text: str) -> None:
    found = generate(server, text_input=PROMPT, sampling_parameters=sampling)
    assert found.status_code == 400
    assert text in found.json()["error"]


def test_a_prompt_that_does_not_fit_is_refused(server: LLMServer, stream: Stream) -> None:
    found = generate(server, text_input="word " * (CONTEXT + 10), parameters=SAMPLING)
    assert (found.status_code, f"maximum context length is {CONTEXT} tokens" in found.text) == (400, True)
    with pytest.raises(InferenceServerException) as caught:
        stream.ask(inputs("word " * (CONTEXT + 10)))
    assert f"maximum context length is {CONTEXT} tokens" in caught.value.message()
    assert stream.ask(inputs()), "the stream goes on"


def test_one_answer_is_not_what_a_decoupled_model_gives(server: LLMServer) -> None:
    asked = triton_http.InferInput("text_input", [1], "BYTES")
    asked.set_data_from_numpy(np.array([b"a"], np.object_))
    with triton_http.InferenceServerClient(server.http) as client, pytest.raises(InferenceServerException) as over_http:
        client.infer("smol", [asked])
    assert "doesn't support models with decoupled transaction policy" in over_http.value.message()
    with triton.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException) as over_grpc:
        client.infer("smol", inputs())
    assert "doesn't support models with decoupled transaction policy" in over_grpc.value.message()
