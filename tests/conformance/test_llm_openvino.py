"""The engine `openvino` on a real model: its answers are the framework's own, and what it cannot do it refuses.

In this process but for the last tests, which ask a server over V2."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

genai = pytest.importorskip("openvino_genai")

from doorstep.backends.llm.engine import CONTEXT_LENGTH  # noqa: E402
from doorstep.backends.llm.job import Delta, Job  # noqa: E402
from doorstep.backends.llm.openvino.engine import OpenVinoEngine  # noqa: E402
from doorstep.backends.llm.openvino.schemas import SchemaCheck, small_model  # noqa: E402
from doorstep.backends.llm.settings import read_settings  # noqa: E402
from doorstep.errors import BackendError, InvalidArgument, Unsupported  # noqa: E402
from doorstep.testing.server import ServerProcess  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("llm-openvino")]

CONTEXT = 512
SECONDS = 60
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def folder_of(model: Path, directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.gguf").symlink_to(model)
    return directory


def engine_of(directory: Path, **parameters: str) -> OpenVinoEngine:
    # Prompts are worked off in one piece, as the framework does by itself: cut, sums are rounded in other places.
    given = {"context_size": str(CONTEXT), "threads": "1", "batch_tokens": "256", **parameters}
    path = directory / "openvino_model.xml"
    return OpenVinoEngine(read_settings("m", given, path, directory), lambda level, line: None)


@pytest.fixture(scope="module")
def engine(smollm2, tmp_path_factory) -> Iterator[OpenVinoEngine]:
    engine = engine_of(folder_of(smollm2, tmp_path_factory.mktemp("m") / "1"))
    engine.load()
    yield engine
    engine.unload()


class Framework:
    """The same model by OpenVINO GenAI's own hand."""

    def __init__(self, model: Path) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", {"INFERENCE_NUM_THREADS": 1})
        self.tokenizer = self.pipeline.get_tokenizer()

    def answer(self, prompt: str, **config: Any) -> str:
        wanted = self.pipeline.get_config()
        wanted.update_generation_config(**config)
        wanted.apply_chat_template = False
        (text,) = self.pipeline.generate(prompt, wanted)[0].m_generation_ids
        return str(text)

    def chat(self, messages: list[dict[str, Any]], **config: Any) -> str:
        return self.answer(self.tokenizer.apply_chat_template(messages, True), **config)


@pytest.fixture(scope="module")
def framework(smollm2) -> Framework:
    return Framework(smollm2)


def deltas(engine: OpenVinoEngine, operation: str, **body: Any) -> list[Delta]:
    return list(engine.generate(Job(operation, body), lambda: False))


def text_of(answer: list[Delta]) -> str:
    return "".join(delta.text for delta in answer)


def calls_of(answer: list[Delta]) -> list[tuple[str, Any]]:
    found: dict[int, list[str]] = {}
    for call in (call for delta in answer for call in delta.tool_calls):
        pair = found.setdefault(call["index"], ["", ""])
        pair[0] += call.get("name", "")
        pair[1] += call["arguments"]
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


def test_greedy_answers_are_the_frameworks_piece_by_piece(engine, framework):
    answer = deltas(engine, "chat", messages=STORY, max_tokens=40, temperature=0)
    assert text_of(answer) == framework.chat(STORY, max_new_tokens=40)
    assert len(answer) > 20
    assert answer[-1].finish == "length"
    prompt = framework.tokenizer.apply_chat_template(STORY, True)
    counted = framework.tokenizer.encode(prompt, add_special_tokens=False).input_ids.shape[1]
    assert (answer[-1].usage.prompt, answer[-1].usage.completion) == (counted, 40)
    assert sum(delta.tokens for delta in answer) == 40
    assert answer[-1].usage.prefill_us > 0
    assert answer[-1].usage.decode_us > 0


def test_a_completion_takes_text_or_tokens(engine, framework):
    prompt = "The capital of France is"
    wanted = framework.answer(prompt, max_new_tokens=12)
    assert text_of(deltas(engine, "complete", prompt=prompt, max_tokens=12, temperature=0)) == wanted
    tokens = engine.tokenize(prompt)
    assert text_of(deltas(engine, "complete", prompt=tokens, max_tokens=12, temperature=0)) == wanted
    assert engine.detokenize(tokens) == prompt


def test_an_answer_that_ends_by_itself_says_stop(engine):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = deltas(engine, "chat", messages=messages, max_tokens=60, temperature=0)
    assert answer[-1].finish == "stop"
    assert "Paris" in text_of(answer)
    assert "<|" not in text_of(answer)


def test_requests_run_at_once_and_each_gets_its_own_answer(engine, framework):
    topics = ["a fox", "the sea", "bread", "a clock"]
    chats = [[{"role": "user", "content": f"Say something of {topic}."}] for topic in topics]
    found: dict[int, list[Delta]] = {}

    def ask(i: int) -> None:
        found[i] = deltas(engine, "chat", messages=chats[i], max_tokens=24, temperature=0)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(topics))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for i, messages in enumerate(chats):
        assert text_of(found[i]) == framework.chat(messages, max_new_tokens=24)


def test_a_seed_repeats_an_answer_and_none_does_not(engine):
    def sampled(**body: Any) -> str:
        sampling = {"max_tokens": 24, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
        return text_of(deltas(engine, "chat", messages=STORY, **sampling, **body))

    first = sampled(seed=5)
    assert sampled(seed=5) == first
    assert sampled(seed=6) != first
    assert len({sampled() for _ in range(3)}) > 1


def test_stop_strings_end_the_answer_before_them_also_across_tokens(engine, framework):
    whole = framework.chat(STORY, max_new_tokens=40)
    stop = whole[20:29]  # of several tokens, and not at a token's beginning
    answer = deltas(engine, "chat", messages=STORY, max_tokens=40, temperature=0, stop=["no such text", stop])
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer[-1].finish == "stop"
    assert answer[-1].usage.completion < 40


def test_characters_of_several_tokens_arrive_whole(engine, framework):
    text = "héllo 東京 🎉 ok"
    assert len(engine.tokenize("🎉")) > 1
    answer_of_tokens = engine.tokenize(text)

    class Script:
        """The pipeline, were its model to say just this."""

        def submit(self, stream: Any) -> None:
            from doorstep.backends.llm.openvino.pipeline import Tokens

            for token in answer_of_tokens:
                stream.answers.put(Tokens([token], [0.0]))
            stream.answers.put(Tokens([2], [0.0], "stop"))

        def cancel(self, stream: Any) -> None:
            pass

    pipeline, engine._pipeline = engine._pipeline, Script()
    try:
        pieces = [delta.text for delta in deltas(engine, "complete", prompt="x", temperature=0)]
    finally:
        engine._pipeline = pipeline
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert "🎉" in "".join(pieces)


def test_logprobs_are_those_of_the_tokens_that_came(engine):
    answer = deltas(engine, "chat", messages=STORY, max_tokens=8, temperature=0, logprobs=True)
    entries = [entry for delta in answer for entry in delta.logprobs or ()]
    assert len(entries) == 8
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text_of(answer)
    assert all(entry["logprob"] <= 0 for entry in entries)
    assert engine.detokenize([entry["id"] for entry in entries]) == text_of(answer)
    sampled = deltas(engine, "complete", prompt="A", max_tokens=4, temperature=1.0, logprobs=1)
    assert all(entry["top_logprobs"] == [] for delta in sampled for entry in delta.logprobs or ())


def test_a_schema_is_obeyed(engine):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = json.loads(
        text_of(deltas(engine, "chat", messages=STORY, max_tokens=120, temperature=0, response_format=wanted))
    )
    assert set(answer) == {"name", "age"}
    assert isinstance(answer["age"], int)
    yes = text_of(deltas(engine, "complete", prompt="Is water wet?", max_tokens=5, grammar='root ::= "yes" | "no"'))
    assert yes in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_comes(engine, choice):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = deltas(
        engine, "chat", messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=80, temperature=0
    )
    ((name, arguments),) = calls_of(answer)
    assert name == "weather"
    assert list(arguments) == ["city"]
    assert (text_of(answer), answer[-1].finish) == ("", "tool_calls")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nonsense"}, "Unsupported type"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum greater than maximum"),
        ({"type": "string", "pattern": "("}, "parenthesis is not closed"),
        ({"$ref": "#/nope"}, "Cannot find field nope"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "does not heed 'not'"),
        ({"type": "array", "uniqueItems": True}, "does not heed 'uniqueItems'"),
        ({"allOf": [{"type": "object"}, {"type": "object"}]}, "'allOf' may have one schema"),
    ],
)
def test_a_schema_that_cannot_be_enforced_hurts_only_its_own_request(engine, schema, said):
    story = engine.generate(Job("chat", {"messages": STORY, "max_tokens": 30, "temperature": 0}), lambda: False)
    pieces = [next(story)]
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(InvalidArgument, match=said):
        deltas(engine, "chat", messages=STORY, max_tokens=5, response_format=wanted)
    pieces += story
    assert pieces[-1].usage.completion == 30


def test_a_property_may_be_called_like_a_keyword():
    check = SchemaCheck()
    check.schema({"type": "object", "properties": {"not": {"const": {"if": 1}}}})
    with pytest.raises(InvalidArgument, match='Rule "foo" is not defined'):
        check.grammar("root ::= foo")
    check.grammar('root ::= "a"')
    assert len(small_model()) < 120_000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"logit_bias": {"5": 1}}, "backend 'openvino' cannot do 'logit_bias'"),
        ({"logprobs": True, "top_logprobs": 5}, "of the token it chose, and of no other"),
        ({"logprobs": True, "top_logprobs": 1, "temperature": 1.0}, "of the token it chose, and of no other"),
        ({"frequency_penalty": 5.0}, r"must be within \[-2.0; 2.0\], but got 5"),
        ({"top_p": 2.0}, "top_p must be a positive float"),
    ],
)
def test_what_it_cannot_do_is_refused(engine, body, said):
    with pytest.raises(InvalidArgument, match=said):
        deltas(engine, "chat", messages=STORY, max_tokens=5, **body)


def test_tokens_that_do_not_exist_are_refused(engine):
    with pytest.raises(InvalidArgument, match="there is no token 49152; there are 0 to 49151"):
        deltas(engine, "complete", prompt=[1, 49152])
    with pytest.raises(InvalidArgument, match="the prompt is empty"):
        deltas(engine, "complete", prompt="")


def test_a_prompt_must_leave_room_and_an_answer_ends_where_the_context_does(engine):
    with pytest.raises(InvalidArgument, match=f"{CONTEXT_LENGTH} {CONTEXT} tokens. However, your request has"):
        deltas(engine, "complete", prompt="word " * CONTEXT)
    tokens = engine.tokenize("word " * CONTEXT)[: CONTEXT - 3]
    answer = deltas(engine, "complete", prompt=tokens, temperature=0, ignore_eos=True)
    assert (answer[-1].finish, answer[-1].usage.completion) == ("length", 3)


def test_nobody_waiting_frees_the_slot_and_the_cache(engine):
    gone: list[bool] = []
    job = Job("chat", {"messages": STORY, "max_tokens": 400, "temperature": 0, "ignore_eos": True})
    story = engine.generate(job, lambda: bool(gone))
    next(story)
    until(lambda: 0 < engine.metrics().kv_usage < 1)
    gone.append(True)
    assert not list(story)
    until(lambda: engine.metrics().kv_usage == 0.0)
    closed = engine.generate(job, lambda: False)
    next(closed)
    closed.close()
    until(lambda: engine.metrics().kv_usage == 0.0)
    assert not engine._pipeline._live


def test_prompts_are_shown(engine, framework):
    assert engine.render({"messages": STORY}) == framework.tokenizer.apply_chat_template(STORY, True)
    with pytest.raises(Unsupported):
        engine.embed(Job("embed", {"input": ["a"]}), lambda: False)


def test_a_folder_as_openvino_lays_it_out_answers_the_same(smollm2, framework, tmp_path):
    copy = tmp_path / "model.gguf"
    copy.write_bytes(smollm2.read_bytes())
    save = {"enable_save_ov_model": True}
    genai.Tokenizer(str(copy), **save)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    genai.ContinuousBatchingPipeline(str(copy), scheduler, "CPU", save)
    copy.unlink()
    engine = engine_of(tmp_path)
    engine.load()
    try:
        answer = text_of(deltas(engine, "chat", messages=STORY, max_tokens=20, temperature=0))
    finally:
        engine.unload()
    assert answer == framework.chat(STORY, max_new_tokens=20)


@pytest.mark.parametrize(
    ("files", "parameters", "said"),
    [
        ({}, {}, "there is neither openvino_model.xml nor one GGUF file"),
        ({"openvino_model.xml": b"<net/>"}, {}, "no openvino_tokenizer.xml beside openvino_model.xml"),
        ({"model.gguf": b"GGUFxxxx"}, {}, "model.gguf is GGUF version"),
        ({"model.gguf": small_model()[:500]}, {}, "model.gguf is damaged"),
        ({"model.gguf": small_model()}, {"task": "embed"}, "generates text; for task 'embed' use"),
        ({"model.gguf": small_model()}, {"device": "nowhere"}, "OpenVINO cannot load model.gguf: Device with"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path, files, parameters, said):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BackendError, match=said):
        engine_of(tmp_path, **parameters).load()


def until(true: Callable[[], Any]) -> None:
    waited = threading.Event()
    for _ in range(SECONDS * 50):
        if true():
            return
        waited.wait(0.02)
    raise AssertionError("not in time")


# Through a server


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("models")
    folder_of(smollm2, root / "m" / "1")
    (root / "m" / "config.pbtxt").write_text(
        'backend: "openvino" parameters { key: "context_size" value { string_value: "512" } }'
    )
    with ServerProcess(root) as server:
        yield server


def ask(server: ServerProcess, text: str, **sampling: Any) -> requests.Response:
    body = {"text_input": text, "sampling_parameters": json.dumps(sampling), "exclude_input_in_output": True}
    return requests.post(server.url("/v2/models/m/generate"), json=body, timeout=SECONDS)


def test_a_server_answers_over_http_and_streams_over_grpc(server, framework):
    prompt = "The capital of France is"
    wanted = framework.answer(prompt, max_new_tokens=12)
    assert ask(server, prompt, max_tokens=12, temperature=0).json()["text_output"] == wanted
    refused = ask(server, "word " * 600)
    assert refused.status_code == 400
    assert refused.json()["error"].startswith(f"{CONTEXT_LENGTH} 512 tokens")

    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        inputs = [
            grpcclient.InferInput("text_input", [1], "BYTES"),
            grpcclient.InferInput("stream", [1], "BOOL"),
            grpcclient.InferInput("sampling_parameters", [1], "BYTES"),
        ]
        inputs[0].set_data_from_numpy(np.array([prompt.encode()], object))
        inputs[1].set_data_from_numpy(np.array([True]))
        inputs[2].set_data_from_numpy(np.array([b'{"max_tokens": 12, "temperature": 0}'], object))
        client.async_stream_infer("m", inputs)
        pieces: list[str] = []
        while len("".join(pieces)) < len(wanted):
            found = answers.get(timeout=SECONDS)
            assert not isinstance(found, InferenceServerException), found
            pieces.append(found.as_numpy("text_output")[0].decode())
        client.stop_stream()
    assert "".join(pieces) == wanted
    assert len(pieces) > 5
