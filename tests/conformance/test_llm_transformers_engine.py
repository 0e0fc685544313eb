"""The engine `transformers` without a server: what the V2 protocol cannot ask for, and what must not happen."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from transformers.generation import logits_process as theirs

from doorstep.backends.llm.hf.engine import TransformersEngine
from doorstep.backends.llm.hf.sampling import narrow
from doorstep.backends.llm.hf.wishes import Wishes
from doorstep.backends.llm.job import Delta, Job
from doorstep.backends.llm.settings import Adapter, Settings
from doorstep.errors import BackendError, InvalidArgument

sys.path.insert(0, str(Path(__file__).parent))

from hf_models import CHATML, CONTEXT, save_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

HI = [{"role": "user", "content": "What is the weather like?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
NEVER: Callable[[], bool] = lambda: False  # noqa: E731


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    save_llama(made)
    return made


def settings(folder: Path) -> Settings:
    return Settings("tiny", folder / "config.json", context_size=CONTEXT, threads=1)


def loaded(wanted: Settings) -> TransformersEngine:
    engine = TransformersEngine(wanted, lambda level, message: None)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TransformersEngine]:
    made = loaded(settings(folder))
    yield made
    made.unload()


def answer(engine: TransformersEngine, operation: Any, **body: Any) -> list[Delta]:
    deltas = list(engine.generate(Job(operation, body), NEVER))
    assert deltas[0].usage is not None
    assert deltas[-1].usage is not None
    assert deltas[0].tokens == 0
    assert sum(delta.tokens for delta in deltas) == deltas[-1].usage.completion
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def completed(engine: TransformersEngine, prompt: Any, **body: Any) -> str:
    return text_of(answer(engine, "complete", prompt=prompt, **{"max_tokens": 30, "temperature": 0, **body}))


def expected(folder: Path, prompt: str, **arguments: Any) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        found = model.generate(**ids, do_sample=False, **{"max_new_tokens": 30, **arguments})
    return str(tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


# Prompts


def test_a_chat_is_asked_by_its_template(engine: TransformersEngine, folder: Path) -> None:
    prompt = f"<|im_start|>user\n{HI[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert engine.render({"messages": HI}) == prompt
    assert text_of(answer(engine, "chat", messages=HI, temperature=0, max_tokens=30)) == expected(folder, prompt)
    parts = [{"role": "user", "content": [{"type": "text", "text": HI[0]["content"]}]}]
    assert engine.render({"messages": parts}) == prompt


def test_token_ids_are_a_prompt_too(engine: TransformersEngine) -> None:
    tokens = engine.tokenize("The quick brown")
    assert engine.detokenize(tokens) == "The quick brown"
    assert completed(engine, tokens) == completed(engine, "The quick brown")


def test_the_config_may_name_another_template(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% if not messages[0].content %}{{ raise_exception('say something') }}{% endif %}Q: ?\nA:")
    engine = loaded(replace(settings(folder), chat_template=str(template)))
    try:
        assert engine.render({"messages": HI}) == "Q: ?\nA:"
        with pytest.raises(InvalidArgument, match="chat template refuses these messages: say something"):
            answer(engine, "chat", messages=[{"role": "user", "content": ""}])
    finally:
        engine.unload()


def test_a_model_without_a_template_completes_and_chats_not(folder: Path, tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    engine = loaded(settings(tmp_path))
    try:
        assert completed(engine, "The") == completed(engine, "The")
        with pytest.raises(InvalidArgument, match="this model has no chat template"):
            answer(engine, "chat", messages=HI)
    finally:
        engine.unload()


def test_what_prompts_have_in_common_is_worked_off_once(engine: TransformersEngine) -> None:
    prompt = "A prompt that nobody had before: " + "9 8 7 6 " * 20
    cached = []
    for end in ("one", "two"):
        deltas = answer(engine, "complete", prompt=prompt + end, max_tokens=2)
        assert deltas[-1].usage is not None
        cached.append(deltas[-1].usage.cached)
    assert cached[0] == 0
    assert cached[1] >= 64


# Sampling


@pytest.mark.parametrize(
    ("wishes", "warpers"),
    [
        (Wishes(temperature=0.7), [theirs.TemperatureLogitsWarper(0.7)]),
        (Wishes(top_k=5), [theirs.TopKLogitsWarper(5)]),
        (Wishes(top_p=0.6), [theirs.TopPLogitsWarper(0.6)]),
        (Wishes(top_p=0.0), [theirs.TopKLogitsWarper(1)]),
        (Wishes(min_p=0.2), [theirs.MinPLogitsWarper(0.2)]),
        (
            Wishes(temperature=1.7, top_k=20, top_p=0.8, min_p=0.05),
            [
                theirs.TemperatureLogitsWarper(1.7),
                theirs.TopKLogitsWarper(20),
                theirs.TopPLogitsWarper(0.8),
                theirs.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_the_choice_is_narrowed_as_generate_narrows_it(wishes: Wishes, warpers: list[Any]) -> None:
    torch.manual_seed(3)
    for _ in range(20):
        scores = torch.randn(200) * 2
        by_them = scores[None]
        for warper in warpers:
            by_them = warper(None, by_them)
        torch.testing.assert_close(narrow(scores, wishes), by_them[0])


def test_draws_are_as_likely_as_the_model_says(engine: TransformersEngine) -> None:
    (delta,) = [d for d in answer(engine, "complete", prompt="The", max_tokens=1, logprobs=3) if d.logprobs]
    assert delta.logprobs is not None
    likely = delta.logprobs[0]["top_logprobs"][0]
    share = torch.tensor(likely["logprob"]).exp().item()
    draws = 400
    hits = 0
    for seed in range(draws):
        deltas = answer(engine, "complete", prompt="The", max_tokens=1, logprobs=0, seed=seed)
        hits += sum(entry["id"] == likely["id"] for d in deltas for entry in d.logprobs or ())
    # Five standard deviations; the seeds are fixed, so it holds always or never.
    assert abs(hits - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5


def test_a_repetition_penalty_is_generates(engine: TransformersEngine, folder: Path) -> None:
    prompt = "The quick brown fox"
    assert completed(engine, prompt, repetition_penalty=1.5) == expected(folder, prompt, repetition_penalty=1.5)


def test_biases_and_penalties_of_what_was_said_count(engine: TransformersEngine) -> None:
    (token,) = engine.tokenize("Q")
    assert completed(engine, "The", logit_bias={str(token): 100}, max_tokens=4) == "QQQQ"
    said = completed(engine, "The", logit_bias={str(token): 100}, max_tokens=4, presence_penalty=100)
    assert said.count("Q") == 1
    said = completed(engine, "The", logit_bias={str(token): 100}, max_tokens=4, frequency_penalty=45)
    assert said.startswith("QQ")
    assert said.count("Q") < 4


def test_an_end_may_be_put_off_and_passed_over(engine: TransformersEngine) -> None:
    end = {"2": 100}  # <|im_end|>, the tokenizer's third
    assert answer(engine, "complete", prompt="The", logit_bias=end)[-1].usage.completion == 1  # type: ignore[union-attr]
    deltas = answer(engine, "complete", prompt="The", logit_bias=end, min_tokens=5)
    assert deltas[-1].usage is not None
    assert (deltas[-1].usage.completion, deltas[-1].finish) == (6, "stop")
    deltas = answer(engine, "complete", prompt="The", logit_bias=end, ignore_eos=True, max_tokens=7)
    assert deltas[-1].usage is not None
    assert (deltas[-1].usage.completion, deltas[-1].finish) == (7, "length")


def test_what_the_folder_recommends_is_the_default(folder: Path, tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 1, "eos_token_id": 2}))
    engine = loaded(settings(tmp_path))
    try:
        said = text_of(answer(engine, "complete", prompt="The", max_tokens=30))
        assert said == expected(folder, "The")  # the likeliest of one
    finally:
        engine.unload()


# Schemas and tools


def test_an_answer_obeys_its_schema(engine: TransformersEngine) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"schema": CITY}}
    for seed in range(5):
        deltas = answer(engine, "chat", messages=HI, response_format=wanted, seed=seed, max_tokens=80)
        said = json.loads(text_of(deltas))
        assert said["city"] in ("Paris", "Rome")
        assert 0 <= said["days"] <= 9
        assert deltas[-1].finish == "stop"


def test_a_tool_that_must_be_called_is_called(engine: TransformersEngine) -> None:
    pytest.importorskip("llguidance")
    deltas = answer(engine, "chat", messages=HI, tools=TOOLS, tool_choice="required", seed=1, max_tokens=100)
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert (calls[0]["index"], calls[0]["name"]) == (0, "get_weather")
    assert json.loads("".join(call["arguments"] for call in calls))["city"] in ("Paris", "Rome")
    assert deltas[-1].finish == "tool_calls"
    assert not text_of(deltas)


def test_tools_that_may_be_called_are_told_in_words(engine: TransformersEngine) -> None:
    said = engine.render({"messages": HI, "tools": TOOLS})
    assert said.startswith("<|im_start|>system\nThese tools can be called")
    assert '"get_weather"' in said
    assert "get_weather" not in engine.render({"messages": HI, "tools": TOOLS, "tool_choice": "none"})


def test_a_template_that_knows_tools_is_given_them(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    knowing = "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    calls = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}[{{ c.function.arguments.city }}]{% endfor %}"
        "{% endfor %}"
    )
    template.write_text(knowing + calls + CHATML)
    engine = loaded(replace(settings(folder), chat_template=str(template)))
    try:
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
        said = engine.render({"messages": messages, "tools": TOOLS})
        told, _, rest = said.partition(" <tool_call>[Rome]")
        assert json.loads(told) == TOOLS
        assert rest.startswith("<|im_start|>user")
    finally:
        engine.unload()


# What must not happen


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"prompt": [5, 400_000]}, "a token id is none of the model's"),
        ({"prompt": [-1]}, "a token id is none of the model's"),
        ({"prompt": [True]}, "a token id is none of the model's"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": "x", "logit_bias": {"400000": 1}}, "'logit_bias' names the token 400000"),
        ({"prompt": "x", "logit_bias": {"-1": 1}}, "'logit_bias' names the token -1"),
        ({"prompt": "x", "logit_bias": {"1": float("nan")}}, "'logit_bias' of token 1 must be a number"),
        ({"prompt": "x", "seed": 2**70}, "'seed' must be"),
        ({"prompt": "x", "top_k": "5; drop"}, "'top_k' must be a whole number"),
        ({"prompt": "x", "grammar": "root ::= x"}, "backend 'transformers' does not know 'grammar'"),
        ({"prompt": "x", "stop": [1]}, "'stop' must be texts"),
    ],
)
def test_hostile_values_are_refused_before_native_code(
    engine: TransformersEngine, body: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why):
        answer(engine, "complete", **body)
    assert engine.healthy()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"type": "string", "pattern": "("},
        {"$ref": "#/definitions/missing"},
        {"allOf": [{"type": "string"}, {"type": "object"}]},
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(engine: TransformersEngine, schema: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(InvalidArgument, match="the JSON schema cannot be used"):
        answer(engine, "chat", messages=HI, response_format=wanted, max_tokens=5)
    assert engine.healthy()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(((a{1,1000}){1,1000}){1,1000})b"},
        {"type": "string", "pattern": "(.*a){20}(.*b){20}(.*c){20}"},
        {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(500)]},
    ],
)
def test_a_schema_that_is_hard_costs_its_own_request_at_most(
    engine: TransformersEngine, schema: dict[str, Any]
) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    with contextlib.suppress(InvalidArgument, BackendError):
        answer(engine, "chat", messages=HI, response_format=wanted, max_tokens=20)
    assert engine.healthy()
    assert completed(engine, "The")


def test_a_template_is_told_nothing_that_is_the_renderers(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidArgument, match="chat_template_kwargs cannot say 'chat_template'"):
        engine.render({"messages": HI, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}})


@pytest.mark.parametrize("way", ["aborted", "closed"])
def test_an_answer_that_nobody_wants_is_worked_on_no_more(engine: TransformersEngine, way: str) -> None:
    wanted = [True]
    deltas = engine.generate(
        Job("complete", {"prompt": "The", "ignore_eos": True}), lambda: way == "aborted" and not wanted[0]
    )
    assert next(deltas).usage is not None
    assert next(deltas).tokens >= 1  # a character may take several
    assert engine.metrics().kv_usage > 0
    wanted[0] = False
    if way == "aborted":
        assert not any(delta.finish for delta in deltas)
    else:
        deltas.close()
    assert engine.metrics().kv_usage == 0
    processor = engine._batching._manager.batch_processor  # type: ignore[union-attr]
    deadline = time.monotonic() + 10
    while processor.has_pending_requests():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_when_the_thread_that_generates_dies_nobody_waits_for_ever(folder: Path) -> None:
    engine = loaded(settings(folder))
    try:
        deltas = engine.generate(Job("complete", {"prompt": "The", "ignore_eos": True}), NEVER)
        next(deltas)

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        engine._model.forward = broken
        with pytest.raises(BackendError, match="the engine failed: CUDA error"):
            list(deltas)
        deadline = time.monotonic() + 10
        while engine.healthy():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(BackendError, match="the thread that generates has ended: RuntimeError: CUDA error"):
            list(engine.generate(Job("complete", {"prompt": "The"}), NEVER))
    finally:
        engine.unload()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"adapters": {"a": Adapter(Path("a"))}}, "serves no LoRA adapters"),
        ({"draft_model": "small"}, "has no speculative decoding"),
        ({"context_size": CONTEXT + 1}, "the model was made for 512 at most"),
        ({"device": "warp"}, "transformers cannot load"),
        ({"prompt_cache_mb": 1 << 20}, "the memory does not suffice for the context of all slots"),
    ],
)
def test_what_this_engine_cannot_do_is_said_when_it_loads(folder: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BackendError, match=why):
        loaded(replace(settings(folder), **changes))
