"""The engine `vllm`: its child process, what it asks of it, and what clients get, over V2. Knows nothing of the inside.

The child is vllm_stand_in.py, which speaks vLLM's API and needs no model; the last test runs vLLM itself where it is
installed."""

from __future__ import annotations

import json
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from doorstep.backends.llm.engine import CONTEXT_LENGTH
from doorstep.backends.llm.job import Delta, Job, Usage
from doorstep.backends.llm.settings import read_settings
from doorstep.backends.llm.vllm.args import survey
from doorstep.backends.llm.vllm.engine import VllmEngine
from doorstep.errors import BackendError, InvalidArgument, NotFound, Unavailable, Unsupported
from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("llm-vllm")

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SECONDS = 30


def until(true: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("bin") / "vllm"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    file.chmod(0o755)
    return str(file)


def hf_folder(folder: Path, **how: Any) -> Path:
    """What the stand-in takes for a model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stand_in.json").write_text(json.dumps(how))
    return folder


def seen(folder: Path) -> list[dict[str, Any]]:
    file = folder / "seen.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def starts(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in seen(folder) if "argv" in entry]


def repository(
    root: Path, command: str, name: str = "m", engine_args: dict[str, Any] | None = None, **how: Any
) -> Path:
    """A repository with one model, as for Triton's vLLM backend: model.json, and the model beside it."""
    hf_folder(root / name / "1" / "hf", **how)
    (root / name / "1" / "model.json").write_text(json.dumps({"model": "hf", **(engine_args or {})}))
    (root / name / "config.pbtxt").write_text(
        f'backend: "vllm" parameters {{ key: "command" value {{ string_value: "{command}" }} }}\n'
        "instance_group [ { count: 1 kind: KIND_MODEL } ]\n"
    )
    return root


def runs(pid: int) -> bool:
    """Whether it has not ended; that nobody has reaped it yet does not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(*some: dict[str, Any]) -> bool:
    """Of what `starts` gives: neither the program nor what it has started."""
    return not any(runs(start[which]) for start in some for which in ("pid", "engine"))


# The engine, in this process


Make = Callable[..., VllmEngine]


@pytest.fixture(scope="module")
def make(command, tmp_path_factory) -> Iterator[Make]:
    made: list[VllmEngine] = []

    def make(
        engine_args: dict[str, Any] | None = None,
        how: dict[str, Any] | None = None,
        made_in: list[Path] | None = None,
        **parameters: str,
    ) -> VllmEngine:
        folder = tmp_path_factory.mktemp("m") / "1"
        if made_in is not None:
            made_in.append(folder / "hf")
        hf_folder(folder / "hf", **(how or {}))
        (folder / "model.json").write_text(json.dumps({"model": "hf", **(engine_args or {})}))
        settings = read_settings("m", {"command": command, **parameters}, folder / "model.json", folder)
        engine = VllmEngine(settings, lambda level, line: engine.lines.append((level, line)))
        engine.lines = []
        engine.folder = folder / "hf"
        engine.load()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.unload()


@pytest.fixture(scope="module")
def engine(make) -> VllmEngine:
    return make(context_size="64")


@pytest.fixture(scope="module")
def parsing(make) -> VllmEngine:
    """vLLM finds the calls itself."""
    return make({"enable_auto_tool_choice": True, "tool_call_parser": "hermes"})


def deltas(engine: VllmEngine, operation: str, adapter: str = "", **body: Any) -> list[Delta]:
    return list(engine.generate(Job(operation, body, adapter), lambda: False))


def chat(engine: VllmEngine, text: str, **body: Any) -> list[Delta]:
    return deltas(engine, "chat", messages=[{"role": "user", "content": text}], **body)


def text_of(answer: list[Delta]) -> str:
    return "".join(delta.text for delta in answer)


def calls_of(answer: list[Delta]) -> list[tuple[str, Any]]:
    found: dict[int, list[str]] = {}
    for call in (call for delta in answer for call in delta.tool_calls):
        name_and_arguments = found.setdefault(call["index"], ["", ""])
        name_and_arguments[0] += call.get("name", "")
        name_and_arguments[1] += call["arguments"]
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


def last_asked(engine: VllmEngine) -> dict[str, Any]:
    return seen(engine.folder)[-1]["body"]


def test_a_chat_comes_word_by_word_with_its_counts_in_the_end(engine):
    answer = chat(engine, "how are you today")
    assert [delta.text for delta in answer] == ["HOW", " ARE", " YOU", " TODAY", ""]
    assert [delta.tokens for delta in answer] == [1, 1, 1, 1, 0]
    assert answer[0].usage == Usage(prompt=5)  # known with the first word
    last = answer[-1]
    assert last.finish == "stop"
    assert (last.usage.prompt, last.usage.completion, last.usage.cached) == (5, 4, 1)
    assert last.usage.prefill_us > 0


def test_tokens_that_are_no_text_yet_are_counted_with_those_that_are(engine):
    answer = chat(engine, "HALF a word")
    assert [(delta.text, delta.tokens) for delta in answer] == [("HALF", 1), (" A", 2), (" WORD", 2), ("", 1)]
    assert answer[-1].usage.completion == 6


def test_what_a_client_asks_gets_there_by_vllms_names_and_nothing_else_does(engine):
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 3, "min_tokens": 1, "seed": 7,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logit_bias": {"5": 1},
        "ignore_eos": True, "stop": ["x"],
    }  # fmt: skip
    chat(engine, "a b c d", **sampling, reasoning_effort="low", chat_template_kwargs={"a": 1}, user="me", priority=9)
    asked = last_asked(engine)
    messages = [{"role": "user", "content": "a b c d"}]
    ours = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chats = {"reasoning_effort": "low", "chat_template_kwargs": {"a": 1}}
    assert asked == {"model": "m", "messages": messages, **sampling, **ours, **chats}


def test_a_completion_takes_text_or_tokens_and_ends_where_it_must(engine):
    answer = deltas(engine, "complete", prompt="one two three", max_tokens=2)
    assert (text_of(answer), answer[-1].finish) == ("ONE TWO", "length")
    answer = deltas(engine, "complete", prompt=list(b"one two three"), stop=["TWO"])
    assert (text_of(answer), answer[-1].finish) == ("ONE ", "stop")


def test_log_probabilities_of_chats_and_completions_have_one_form(engine):
    wanted = [
        {"token": "HI", "logprob": -0.25, "bytes": [72, 73]},
        {"token": "<other>", "logprob": -1.5, "bytes": list(b"<other>")},
    ]
    by_chat = chat(engine, "hi", logprobs=True, top_logprobs=2)[0].logprobs
    assert by_chat == [{**wanted[0], "top_logprobs": wanted}]
    assert deltas(engine, "complete", prompt="hi", logprobs=1)[0].logprobs == by_chat
    alone = chat(engine, "hi", logprobs=True)[0].logprobs
    assert alone == [{**wanted[0], "top_logprobs": []}]


def test_a_schema_is_vllms_to_enforce(engine):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(text_of(chat(engine, "hi", response_format=wanted))) == {"n": 21}
    assert json.loads(text_of(deltas(engine, "complete", prompt="hi", response_format=wanted))) == {"n": 21}
    assert json.loads(text_of(chat(engine, "hi", response_format={"type": "json_object"}))) == {"a": 21}
    chat(engine, "hi", grammar='root ::= "a"')
    assert last_asked(engine)["structured_outputs"] == {"grammar": 'root ::= "a"'}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_comes_with_or_without_a_parser(engine, parsing, choice):
    for one in (engine, parsing):
        answer = chat(one, "hello", tools=[WEATHER], tool_choice=choice)
        assert calls_of(answer) == [("weather", {"city": 'Par"is'})]
        assert (text_of(answer), answer[-1].finish) == ("", "tool_calls")


def test_several_calls_may_be_forced_at_once(engine):
    answer = chat(engine, "hello", tools=[WEATHER], tool_choice="required", parallel_tool_calls=True)
    assert calls_of(answer) == [("weather", {"city": 'Par"is'})]
    assert last_asked(engine)["response_format"]["json_schema"]["schema"]["type"] == "array"


def test_a_call_that_may_come_is_found_by_vllms_parser_where_there_is_one(parsing):
    answer = chat(parsing, "the weather?", tools=[WEATHER])
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    assert answer[-1].finish == "tool_calls"
    assert last_asked(parsing)["tools"] == [WEATHER]
    assert text_of(chat(parsing, "hello you", tools=[WEATHER])) == "HELLO YOU"


def test_a_call_that_may_come_is_found_in_words_where_there_is_none(engine):
    answer = chat(engine, "CALL it", tools=[WEATHER])
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    assert (text_of(answer), answer[-1].finish) == ("Let me see. ", "tool_calls")
    asked = last_asked(engine)
    assert "tools" not in asked
    assert '"name":"weather"' in asked["messages"][0]["content"]
    chat(engine, "CALL it", tools=[WEATHER], tool_choice="none")
    assert [message["role"] for message in last_asked(engine)["messages"]] == ["user"]


def test_tokens_and_prompts_are_shown(engine):
    assert engine.tokenize("hé") == list("hé".encode())
    assert engine.detokenize(list("hé".encode())) == "hé"
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hé"}]
    body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}}
    assert engine.render(body) == "<|system|>be kind\n<|user|>hé\n<|think|>\n<|assistant|>"


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(engine):
    with pytest.raises(InvalidArgument) as raised:
        chat(engine, "word " * 100)
    assert raised.value.message.startswith(f"{CONTEXT_LENGTH} 64 tokens. However, your request has 101 input tokens")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("BUSY", Unavailable, "The engine is currently busy and cannot accept new requests"),
        ("BROKEN", BackendError, "vLLM: EngineCore encountered an issue"),
        ("it breaks LATER", BackendError, "vLLM: Internal server error"),
    ],
)
def test_what_vllm_refuses_or_breaks_off_is_an_error_of_its_kind(engine, text, error, said):
    with pytest.raises(error, match=said):
        chat(engine, text)


def test_texts_of_vllms_errors_are_understood_whatever_their_form(engine):
    of = engine._error_of
    assert isinstance(of(404, {"error": {"message": "The model `x` does not exist.", "code": 404}}), NotFound)
    assert isinstance(of(422, {"detail": "no"}), InvalidArgument)
    assert isinstance(of(401, {"error": "Unauthorized"}), BackendError)
    assert isinstance(of(502, "<html>"), BackendError)
    length = of(
        400, {"error": {"message": "Input length (99) exceeds model's maximum context length (64).", "code": 400}}
    )
    assert length.message.startswith(f"{CONTEXT_LENGTH} 64 tokens. However, your request has 99 input tokens")
    characters = (
        "This model's maximum context length is 64 tokens. However, your prompt contains 999 characters (more …"
    )
    assert of(400, {"error": {"message": characters, "code": 400}}).message == characters
    other = of(400, {"error": {"message": "max_tokens must fit the context length", "code": 400}})
    assert other.message == f"{CONTEXT_LENGTH} 64 tokens. max_tokens must fit the context length"


def test_nobody_waiting_closes_the_connection_and_vllm_notices(engine):
    gone: list[bool] = []
    answer = engine.generate(Job("chat", {"messages": [{"role": "user", "content": "SLOW one"}]}), lambda: bool(gone))
    assert next(answer).text == " 0"
    gone.append(True)
    assert not list(answer)
    until(lambda: {"closed": "SLOW one"} in seen(engine.folder), "the stand-in notices")
    answer = engine.generate(Job("chat", {"messages": [{"role": "user", "content": "SLOW two"}]}), lambda: False)
    next(answer)
    answer.close()
    until(lambda: {"closed": "SLOW two"} in seen(engine.folder), "the stand-in notices")


def test_the_kv_cache_is_read_from_vllms_metrics(engine):
    answer = engine.generate(Job("chat", {"messages": [{"role": "user", "content": "SLOW three"}]}), lambda: False)
    next(answer)
    until(lambda: engine.metrics().kv_usage == 0.25, "a request fills a quarter")
    answer.close()
    until(lambda: engine.metrics().kv_usage == 0.0, "it has left")


def test_it_does_what_its_task_is_and_says_what_to_do_for_another(make, engine):
    with pytest.raises(Unsupported, match=r'parameters \{ key: "task" value \{ string_value: "embed" \} \}'):
        engine.embed(Job("embed", {"input": ["a"]}), lambda: False)
    embeds = make(task="embed")
    answer = embeds.embed(Job("embed", {"input": ["a", "b c"]}), lambda: False)
    assert answer.value == [[1.0, 0.5, -1.0], [3.0, 0.5, -1.0]]  # in the order of the inputs
    assert answer.usage.prompt == 3
    assert starts(embeds.folder)[0]["options"]["runner"] == "pooling"
    ranks = make(task="rerank")
    answer = ranks.rerank(Job("rerank", {"query": "red fox", "documents": ["a fox", "no", "red fox"]}), lambda: False)
    assert (answer.value, answer.usage.prompt) == ([0.5, 0.0, 1.0], 5)


def test_engine_arguments_become_options_and_adapters_modules(make, tmp_path):
    engine = make(
        {
            "gpu_memory_utilization": 0.5,
            "tensor_parallel_size": 1,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "dtype": "bfloat16",
            "quantization": "awq",
            "disable_log_requests": True,  # of older versions; those of today do not log them
            "speculative_config": {"model": "x", "num_speculative_tokens": 3},
        },
        dtype="float16",
        context_size="128",
        slots="5",
    )
    options = starts(engine.folder)[0]["options"]
    assert options["model"] == str(engine.folder)
    wanted = {
        "gpu_memory_utilization": 0.5, "enforce_eager": True, "enable_prefix_caching": False, "dtype": "bfloat16",
        "quantization": "awq", "speculative_config": {"model": "x", "num_speculative_tokens": 3}, "max_model_len": 128,
        "max_num_seqs": 5, "served_model_name": ["m"],
    }  # fmt: skip
    assert {key: options.get(key) for key in wanted} == wanted
    assert "enable_log_requests" not in options


def test_an_adapter_is_asked_for_by_its_name(command, tmp_path):
    hf_folder(tmp_path / "1")  # the version's folder is the model
    (tmp_path / "1" / "adapters" / "formal").mkdir(parents=True)
    parameters = {"command": command, "adapters": "formal=adapters/formal"}
    engine = VllmEngine(
        read_settings("m", parameters, tmp_path / "1" / "model.json", tmp_path / "1"), lambda level, line: None
    )
    engine.load()
    try:
        assert starts(tmp_path / "1")[0]["options"]["lora_modules"] == [f"formal={tmp_path}/1/adapters/formal"]
        answer = deltas(engine, "chat", "formal", messages=[{"role": "user", "content": "hi"}])
        assert text_of(answer) == "[formal] HI"
        with pytest.raises(NotFound, match="The model `slang` does not exist"):
            deltas(engine, "chat", "slang", messages=[{"role": "user", "content": "hi"}])
    finally:
        engine.unload()


def test_its_key_is_in_no_command_line_and_nobody_else_gets_in(engine):
    start = starts(engine.folder)[0]
    assert len(start["key"]) == 64
    assert start["offline"] == "1"
    for process in psutil.Process().children(recursive=True):
        assert start["key"] not in " ".join(process.cmdline())
    engine.upstream._key, kept = "another", engine.upstream._key
    try:
        with pytest.raises(BackendError, match="Unauthorized"):
            chat(engine, "hi")
    finally:
        engine.upstream._key = kept
    assert Path(start["options"]["uds"]).parent.stat().st_mode & 0o777 == 0o700


def test_its_log_lines_keep_their_level(engine):
    levels = {line.split("] ")[-1]: level for level, line in engine.lines}
    assert levels["Application startup complete."] == "INFO"
    assert levels["this is a stand-in"] == "WARNING"


def test_a_start_that_fails_or_lasts_too_long_tells_the_last_lines_and_leaves_nothing(make):
    made_in: list[Path] = []
    with pytest.raises(BackendError, match=r"(?s)vLLM did not start: .*ended while it started.*No available memory"):
        make(made_in=made_in, how={"fail": "ValueError: No available memory for the cache blocks."})
    with pytest.raises(BackendError, match=r"(?s)unrecognized arguments: --no-such-thing=1"):
        make({"no_such_thing": 1}, made_in=made_in)
    with pytest.raises(BackendError, match=r"not up after 1 s; the parameter 'load_timeout_s' allows more"):
        make(made_in=made_in, how={"start_s": 600}, load_timeout_s="1")
    assert gone(*(start for folder in made_in for start in starts(folder)))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "there is neither model.json, with vLLM's engine arguments, nor a model's config.json"),
        ({"model.json": "{"}, "model.json is not JSON"),
        ({"model.json": '{"dtype": "auto"}'}, 'must be a JSON object with "model"'),
        ({"model.json": '{"model": "x", "api-key": "k"}'}, "says 'api_key', which is the server's to say"),
    ],
)
def test_a_folder_that_is_no_model_is_told_before_anything_starts(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    engine = VllmEngine(read_settings("m", {}, tmp_path / "model.json", tmp_path), lambda level, line: None)
    with pytest.raises(BackendError, match=said):
        engine.load()


def test_what_the_files_say_is_what_a_config_may_leave_out(tmp_path):
    hf_folder(tmp_path)
    path = tmp_path / "model.json"
    assert survey(path).said == {"context_size": "2048", "slots": "64"}
    assert survey(path).task == "generate"
    (tmp_path / "config.json").write_text('{"architectures": ["XLMRobertaForSequenceClassification"]}')
    assert survey(path).task == "rerank"
    path.write_text('{"model": "org/name", "max_model_len": 8192, "max_num_seqs": 1024, "runner": "pooling"}')
    assert survey(path).said == {"context_size": "8192", "slots": "256"}
    assert survey(path).task == "embed"
    path.write_text('{"model": "org/name", "enable_lora": true}')
    with pytest.raises(BackendError, match=r"Triton backend cannot find .*multi_lora.json"):
        survey(path)
    (tmp_path / "multi_lora.json").write_text('{"a": "/loras/a", "b": "b"}')
    assert survey(path).said["adapters"] == "a=/loras/a,b=b"


def test_an_instance_of_one_gpu_sees_that_one(make, command, tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "model.json").write_text('{"model": "."}')
    settings = read_settings("m", {"command": command}, tmp_path / "model.json", tmp_path)
    engine = VllmEngine(replace(settings, gpu=3), lambda level, line: None)
    engine.load()
    engine.unload()
    assert starts(tmp_path)[0]["gpus"] == "3"
    (tmp_path / "model.json").write_text('{"model": ".", "tensor_parallel_size": 2}')
    with pytest.raises(BackendError, match="KIND_GPU is currently for single-GPU models, please specify KIND_MODEL"):
        VllmEngine(replace(settings, gpu=3), lambda level, line: None).load()


def test_a_missing_program_says_how_to_get_it(tmp_path):
    hf_folder(tmp_path)
    settings = read_settings("m", {"command": "no-such-vllm"}, tmp_path / "model.json", tmp_path)
    with pytest.raises(BackendError, match=r"no program 'no-such-vllm': pip install 'doorstep\[vllm\]', or name it by"):
        VllmEngine(settings, lambda level, line: None).load()


# Through a server


@pytest.fixture(scope="module")
def root(command, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    repository(root, command, engine_args={"max_model_len": 32, "max_num_seqs": 8, "enable_lora": "true"})
    (root / "m" / "1" / "lora").mkdir()
    (root / "m" / "1" / "multi_lora.json").write_text('{"formal": "lora"}')
    return root


@pytest.fixture(scope="module")
def server(root) -> Iterator[ServerProcess]:
    with ServerProcess(root, "--model-control-mode=explicit", "--load-model=m") as server:
        yield server


class Refused(Exception):
    """Over HTTP: the server's text."""


def ask(server: ServerProcess, text: str, sampling: dict[str, Any] | None = None) -> str:
    """Over HTTP, without streaming."""
    body = {"text_input": text, "sampling_parameters": json.dumps(sampling or {}), "exclude_input_in_output": True}
    answer = requests.post(server.url("/v2/models/m/generate"), json=body, timeout=SECONDS)
    if answer.status_code != 200:
        raise Refused(answer.json()["error"])
    return answer.json()["text_output"]


class Stream:
    """One gRPC stream's answers: texts, or the error."""

    def __init__(self, server: ServerProcess) -> None:
        self.client = grpcclient.InferenceServerClient(server.grpc)
        self._answers: queue.Queue[Any] = queue.Queue()
        self.client.start_stream(lambda result, error: self._answers.put(error or result))

    def send(self, text: str, **sampling: Any) -> None:
        texts = grpcclient.InferInput("text_input", [1], "BYTES")
        texts.set_data_from_numpy(np.array([text.encode()], object))
        stream = grpcclient.InferInput("stream", [1], "BOOL")
        stream.set_data_from_numpy(np.array([True]))
        given = grpcclient.InferInput("sampling_parameters", [1], "BYTES")
        given.set_data_from_numpy(np.array([json.dumps(sampling).encode()], object))
        self.client.async_stream_infer("m", [texts, stream, given])

    def next(self) -> str:
        found = self._answers.get(timeout=SECONDS)
        if isinstance(found, InferenceServerException):
            raise found
        return found.as_numpy("text_output")[0].decode()

    def rest(self) -> None:
        """Until the error."""
        while True:
            self.next()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def test_tritons_vllm_models_answer_over_http_and_grpc(server):
    assert ask(server, "to be or not", {"max_tokens": 3, "temperature": 0}) == "TO BE OR"
    assert ask(server, "to be", {"lora_name": "formal"}) == "[formal] TO BE"
    with Stream(server) as stream:
        stream.send("to be or not", max_tokens=10)
        assert [stream.next() for _ in range(4)] == ["TO", " BE", " OR", " NOT"]


def test_the_config_says_what_model_json_does(server):
    with httpclient.InferenceServerClient(server.http) as client:
        config = client.get_model_config("m")
    parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
    assert parameters["context_size"] == "32"
    assert parameters["slots"] == "8"
    assert parameters["adapters"] == "formal=lora"
    assert config["model_transaction_policy"] == {"decoupled": True}


def test_errors_arrive_with_their_text(server):
    with pytest.raises(Refused, match=f"{CONTEXT_LENGTH} 32 tokens"):
        ask(server, "word " * 40)
    with pytest.raises(Refused, match="LoRA slang is not supported"):
        ask(server, "hi", {"lora_name": "slang"})
    with pytest.raises(Refused, match="currently busy"):
        ask(server, "BUSY")


def test_a_client_that_leaves_is_noticed_by_vllm(server, root):
    with Stream(server) as stream:
        stream.send("SLOW leaver", max_tokens=10000)
        assert stream.next() == " 0"
    until(lambda: {"closed": "SLOW leaver"} in seen(root / "m" / "1" / "hf"), "the stand-in notices")


def test_a_child_that_dies_ends_the_stream_and_is_back_for_later_requests(server, root):
    before = starts(root / "m" / "1" / "hf")
    with Stream(server) as stream:
        stream.send("SLOW bystander", max_tokens=10000)
        assert stream.next() == " 0"
        with Stream(server) as dying:
            dying.send("to DIE now")
            assert dying.next() == "TO"
            with pytest.raises(InferenceServerException, match=r"broke off its answer|is not healthy"):
                dying.next()
        with pytest.raises(InferenceServerException, match=r"broke off its answer|is not healthy"):
            stream.rest()
    # One that comes while the process ends gets an error too; the next is held while the new one loads.
    assert until(lambda: _asked(server), "it is back") == "HI"
    after = starts(root / "m" / "1" / "hf")
    assert len(after) == len(before) + 1
    assert "vLLM ended: killed by SIGKILL" in server.logs()
    assert gone(*before)  # what they had started went with them


def test_one_that_keeps_dying_is_refused_between_two_attempts_and_comes_back(command, tmp_path):
    root = repository(tmp_path, command)
    how = root / "m" / "1" / "hf" / "stand_in.json"
    with ServerProcess(root) as server:
        how.write_text('{"fail": "no memory"}')
        psutil.Process(starts(how.parent)[-1]["pid"]).kill()
        until(lambda: len(starts(how.parent)) >= 3, "two more attempts")
        until(lambda: _refused(server), "it is refused between two attempts")
        how.write_text("{}")
        assert until(lambda: _asked(server), "it is back") == "HI"
    assert gone(*starts(how.parent))


def _asked(server: ServerProcess) -> str:
    try:
        return ask(server, "hi")
    except Refused:
        return ""


def _refused(server: ServerProcess) -> bool:
    try:
        ask(server, "hi")
    except Refused as error:
        return "no memory" in str(error)
    return False


def _index(server: ServerProcess) -> list[dict[str, Any]]:
    with httpclient.InferenceServerClient(server.http) as client:
        found: list[dict[str, Any]] = client.get_model_repository_index()
        return found


def test_a_load_that_fails_tells_what_vllm_wrote(command, tmp_path):
    repository(tmp_path, command, fail="ValueError: Free memory on device (3.1/79.2 GiB) is less than desired")
    with ServerProcess(tmp_path, "--exit-on-error=false", ready="live") as server:
        said = "Free memory on device (3.1/79.2 GiB) is less than desired"
        until(lambda: said in _index(server)[0].get("reason", ""), "it has failed")


def test_nothing_is_left_after_an_unload_or_a_killed_server(command, tmp_path):
    root = repository(tmp_path, command)
    folder = root / "m" / "1" / "hf"

    with ServerProcess(root, "--model-control-mode=explicit", "--load-model=m") as server:
        first = starts(folder)[-1]
        assert not gone(first)
        with httpclient.InferenceServerClient(server.http) as client:
            client.unload_model("m")
            until(lambda: gone(first), "the first ends with its model")
            assert not Path(first["options"]["uds"]).parent.exists()
            client.load_model("m")
        second = starts(folder)[-1]
        psutil.Process(server.pid).kill()
        until(lambda: gone(second), "the second ends with its server")


# vLLM itself


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed")
def test_the_real_vllm_serves_a_model(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parent))
    from hf_models import save_llama

    save_llama(tmp_path / "m" / "1" / "hf", hidden_size=128)  # 32 per head: what vLLM's kernels take
    args = {"model": "hf", "enforce_eager": True, "dtype": "float32", "disable_log_requests": True}
    (tmp_path / "m" / "1" / "model.json").write_text(json.dumps(args))
    prompt = "The quick brown fox"
    with ServerProcess(tmp_path, start_timeout_s=600, env={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        first = ask(server, prompt, {"max_tokens": 8, "temperature": 0, "ignore_eos": True})
        assert first
        assert ask(server, prompt, {"max_tokens": 8, "temperature": 0, "ignore_eos": True}) == first
        with Stream(server) as stream:
            stream.send(prompt, max_tokens=8, temperature=0, ignore_eos=True)
            streamed = ""
            while len(streamed) < len(first):
                streamed += stream.next()
        assert streamed == first
        with pytest.raises(Refused, match=f"{CONTEXT_LENGTH} 512 tokens. However, your request has 513 input tokens"):
            ask(server, "word " * 600)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
