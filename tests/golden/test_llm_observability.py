"""What is counted of language models, by our names and those that routers scrape; their spans, by OpenTelemetry's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from llm_server import SMOL, LLMServer, save_model

sys.path.append(str(Path(__file__).parents[1] / "conformance"))
from test_spans import SPAN_ID, TRACE_ID, TRACEPARENT, Collector

pytestmark = pytest.mark.xdist_group("llm")

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(smollm2: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMServer]:
    models = tmp_path_factory.mktemp("models")
    save_model(models, "smol", SMOL, smollm2)
    options = ["mode=opentelemetry", "rate=0", "level=TIMESTAMPS", f"opentelemetry,url={collector.url}",
               "opentelemetry,bsp_schedule_delay=10"]  # fmt: skip
    with LLMServer(models, *(f"--trace-config={option}" for option in options)) as running:
        yield running


def counted(server: LLMServer, name: str, **labels: str) -> float:
    return server.metric(f"doorstep_llm_{name}", model="smol", **labels)


def test_an_answer_is_counted_in_tokens_and_in_its_phases(server: LLMServer) -> None:
    names = ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count",
             "inter_token_latency_seconds_count", "queue_seconds_count", "prefill_seconds_count",
             "decode_seconds_count", "inference_seconds_count", "request_seconds_count", "request_prompt_tokens_sum",
             "request_generated_tokens_sum")  # fmt: skip
    before = {name: counted(server, name) for name in names}
    said = server.client().chat.completions.create(model="smol", messages=HELLO, max_tokens=7, temperature=0)
    assert said.usage is not None
    after = {name: counted(server, name) - before[name] for name in names}
    one = dict.fromkeys(names, 1.0)
    tokens = {"prompt_tokens_total": said.usage.prompt_tokens, "request_prompt_tokens_sum": said.usage.prompt_tokens,
              "generated_tokens_total": 7, "request_generated_tokens_sum": 7,
              "inter_token_latency_seconds_count": 6}  # fmt: skip
    assert after == one | tokens


def test_what_is_cached_is_counted(server: LLMServer) -> None:
    asked: Any = {"model": "smol", "messages": [{"role": "user", "content": "Count to a hundred. " * 20}]}
    server.client().chat.completions.create(**asked, max_tokens=1)
    before = counted(server, "cached_prompt_tokens_total")
    said = server.client().chat.completions.create(**asked, max_tokens=1)
    assert said.usage is not None
    assert said.usage.prompt_tokens_details is not None
    assert said.usage.prompt_tokens_details.cached_tokens
    assert counted(server, "cached_prompt_tokens_total") - before == said.usage.prompt_tokens_details.cached_tokens


def test_how_requests_end_is_counted(server: LLMServer) -> None:
    client = server.client()
    reasons = ("stop", "length", "tool_calls", "abort", "error")
    before = {reason: counted(server, "finished_requests_total", reason=reason) for reason in reasons}
    client.chat.completions.create(model="smol", messages=HELLO, max_tokens=2)
    client.chat.completions.create(model="smol", messages=HELLO, stop=["e", "o", "H", "l"], max_tokens=50)
    tool = {"type": "function", "function": {"name": "greet", "parameters": NOTHING}}
    client.chat.completions.create(
        model="smol",
        messages=HELLO,
        tools=[tool],
        tool_choice="required",
        max_tokens=60,  # type: ignore[list-item]
    )
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smol", messages=[{"role": "user", "content": "x " * 3000}])
    with client.chat.completions.create(
        model="smol", messages=HELLO, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.wait_for(lambda: counted(server, "running_requests") == 0, "no request runs")
    after = {reason: counted(server, "finished_requests_total", reason=reason) for reason in reasons}
    assert {reason: after[reason] - before[reason] for reason in reasons} == dict.fromkeys(reasons, 1.0)


def test_routers_find_the_names_they_scrape(server: LLMServer) -> None:
    with server.client().chat.completions.create(
        model="smol", messages=HELLO, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    ) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        assert server.metric("vllm:num_requests_running", model_name="smol") == 1
        assert 0 < server.metric("vllm:kv_cache_usage_perc", model_name="smol") < 1
        assert server.metric("vllm:num_requests_waiting", model_name="smol") == 0
    assert server.metric("vllm:cache_config_info", model_name="smol", block_size="1", num_gpu_blocks="2048") == 1
    assert server.metric("vllm:lora_requests_info", model_name="smol", max_lora="0") > 0
    assert counted(server, "slots") == 2
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "no request runs")
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_a_traced_chat_has_a_span_by_opentelemetrys_names_and_no_text(server: LLMServer, collector: Collector) -> None:
    said = server.client().chat.completions.create(
        model="smol", messages=HELLO, max_tokens=3, temperature=0.5, stop=["@"], seed=1,
        extra_headers={"traceparent": TRACEPARENT},
    )  # fmt: skip
    spans = {span.name: span for span in collector.spans(4)}
    span = spans["chat smol"]
    assert span.trace_id == bytes.fromhex(TRACE_ID)
    assert spans["InferRequest"].parent_span_id == bytes.fromhex(SPAN_ID)
    assert span.parent_span_id == spans["smol"].span_id
    attributes = {one.key: one.value for one in span.attributes}
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert attributes["gen_ai.request.model"].string_value == "smol"
    assert attributes["gen_ai.request.max_tokens"].int_value == 3
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    assert [v.string_value for v in attributes["gen_ai.request.stop_sequences"].array_value.values] == ["@"]
    assert [v.string_value for v in attributes["gen_ai.response.finish_reasons"].array_value.values] == ["length"]
    assert said.usage is not None
    assert attributes["gen_ai.usage.input_tokens"].int_value == said.usage.prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"].int_value == 3
    first = attributes["gen_ai.latency.time_to_first_token"].double_value
    assert 0 < first <= attributes["gen_ai.latency.e2e"].double_value
    assert b"Say hello" not in b"".join(span.SerializeToString() for span in spans.values())
