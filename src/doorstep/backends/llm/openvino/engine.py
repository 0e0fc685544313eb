"""OpenVINO GenAI: language models as OpenVINO lays them out, and some GGUF files, on Intel's CPUs and GPUs.

Knows no thread of the pipeline's (openvino_pipeline.py). What it cannot do as asked it refuses.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import openvino_genai as genai

from doorstep.backends.llm import tools
from doorstep.backends.llm.engine import Aborted, EngineMetrics, LLMEngine, too_long
from doorstep.backends.llm.hf.text import Answer
from doorstep.backends.llm.job import Delta, Job, Usage
from doorstep.backends.llm.openai_chunks import split_calls
from doorstep.backends.llm.openvino.files import find_model, survey
from doorstep.backends.llm.openvino.pipeline import Pipeline, Stream, last_line
from doorstep.backends.llm.openvino.schemas import SchemaCheck
from doorstep.backends.llm.tool_plan import Split, ToolPlan, plan_tools
from doorstep.backends.llm.upstream import POLL_S
from doorstep.errors import BackendError, DoorstepError, InvalidArgument

_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Ours → GenerationConfig's, where nothing else is to be thought of.
_FIELDS = {
    "top_p": "top_p",
    "min_p": "min_p",
    "min_tokens": "min_new_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "ignore_eos": "ignore_eos",
}
_ELSEWHERE = frozenset(
    ("messages", "prompt", "temperature", "top_k", "seed", "max_tokens", "stop", "logprobs", "top_logprobs", "tools",
     "tool_choice", "parallel_tool_calls", "response_format", "grammar", "chat_template_kwargs", "reasoning_effort")
)  # fmt: skip
_GREEDY_BELOW = 1e-5  # a temperature


class OpenVinoEngine(LLMEngine):
    name = "openvino"

    def load(self) -> None:
        s = self.settings
        path = find_model(s.path)
        survey(s.path)  # a damaged file is told in words, before native code reads it
        if s.task != "generate":
            raise BackendError(f"backend 'openvino' generates text; for task '{s.task}' use llamacpp or transformers")
        for name in ("draft_model", "adapters"):
            if getattr(s, name):
                raise BackendError(f"backend 'openvino' does not know the parameter '{name}'")
        try:
            pipeline = genai.ContinuousBatchingPipeline(
                str(path), self._scheduler(), self._device(), self._properties()
            )
            self._tokenizer = pipeline.get_tokenizer()
            if s.chat_template:
                self._tokenizer.set_chat_template(Path(s.chat_template).read_text(encoding="utf-8"))
            self._usual = pipeline.get_config()
            vocabulary = self._tokenizer.get_vocab()
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"OpenVINO cannot load {path.name}: {last_line(error)}") from None
        self._bytes_of = {token: text for text, token in vocabulary.items()}
        template = self._tokenizer.chat_template
        # Whose calls cannot be told from its words is not asked in its own way.
        self._knows_tools = tools.OPEN in template and "tools" in template
        self._schemas = SchemaCheck()
        self._pipeline = Pipeline(pipeline, self._on_broken)

    def _scheduler(self) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = self.settings.cache_gb
        scheduler.max_num_seqs = self.settings.slots
        scheduler.max_num_batched_tokens = self.settings.prompt_batch
        scheduler.dynamic_split_fuse = True  # a long prompt is worked off between the others' tokens
        scheduler.enable_prefix_caching = True
        return scheduler

    def _device(self) -> str:
        return self.settings.device.upper() or "CPU"

    def _properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        if self._device() == "CPU":
            properties["INFERENCE_NUM_THREADS"] = self.settings.thread_count
        if self.settings.dtype:
            properties["INFERENCE_PRECISION_HINT"] = _PRECISIONS[self.settings.dtype]
        return properties

    def _on_broken(self, error: Exception) -> None:
        """A pipeline that has failed once fails ever after: the server starts another process."""
        self.log("ERROR", f"OpenVINO failed: {error}")
        os._exit(1)

    def unload(self) -> None:
        self._pipeline.stop()

    # Generation

    def generate(self, job: Job, aborted: Aborted) -> Generator[Delta, None, None]:
        body = job.body
        if unknown := sorted(body.keys() - _FIELDS.keys() - _ELSEWHERE):
            raise InvalidArgument(f"backend 'openvino' cannot do '{unknown[0][:100]}'")
        plan = ToolPlan([])
        if job.operation == "chat":
            plan = plan_tools(body, knows_tools=self._knows_tools)
            prompt = self._encode(self._rendered(plan, body), special=False)
        elif isinstance(body["prompt"], str):
            prompt = self._encode(body["prompt"], special=True)
        else:
            prompt = self._known(body["prompt"])
        if not prompt:
            raise InvalidArgument("the prompt is empty")
        left = self.settings.context_size - len(prompt)
        if left < 1:
            raise too_long(self.settings.context_size, len(prompt))
        return self._deltas(Stream(prompt, self._config(job, plan, left)), _stops(body), plan.split, aborted)

    def _config(self, job: Job, plan: ToolPlan, left: int) -> Any:
        """What a request leaves out is what the model's makers recommend (generation_config.json)."""
        body = job.body
        config = genai.GenerationConfig()
        for name in ("eos_token_id", "stop_token_ids", "temperature", "top_p", "min_p", "top_k", "repetition_penalty"):
            setattr(config, name, getattr(self._usual, name))
        try:
            for ours, theirs in _FIELDS.items():
                if body.get(ours) is not None:
                    setattr(config, theirs, body[ours])
            if body.get("top_k") is not None:
                config.top_k = max(body["top_k"], 0)
            temperature = body.get("temperature")
            config.do_sample = temperature is None or temperature > _GREEDY_BELOW
            if temperature is not None and config.do_sample:
                config.temperature = temperature
            seed = body.get("seed")
            config.rng_seed = secrets.randbits(32) if seed is None or seed < 0 else seed
            config.max_new_tokens = min(body.get("max_tokens") or left, left)
            if _logprobs(job, greedy=not config.do_sample):
                config.logprobs = 1
            constraint = self._constraint(body, plan)
            if constraint is not None:
                config.structured_output_config = constraint
            config.validate()
        except (RuntimeError, TypeError) as error:
            raise InvalidArgument(f"OpenVINO does not take this request: {last_line(error)}") from None
        return config

    def _constraint(self, body: Mapping[str, Any], plan: ToolPlan) -> Any:
        """What the answer must look like."""
        wanted = body.get("response_format") or {}
        if plan.schema is not None:
            return self._schemas.schema(plan.schema)
        if wanted.get("type") == "json_schema":
            return self._schemas.schema(wanted["json_schema"].get("schema", {}))
        if wanted.get("type") == "json_object":
            return self._schemas.schema({"type": "object"})
        if body.get("grammar") is not None:
            return self._schemas.grammar(body["grammar"])
        return None

    def _deltas(
        self, stream: Stream, stops: Sequence[str], split: Split | None, aborted: Aborted
    ) -> Generator[Delta, None, None]:
        answer = Answer(_Decoder(self._tokenizer), stream.prompt, stops)
        usage = Usage(prompt=len(stream.prompt))
        greedy = not stream.config.do_sample
        finish = ""
        began = first = last = time.monotonic_ns()
        self._pipeline.submit(stream)
        try:
            while not finish:
                try:
                    found = stream.answers.get(timeout=POLL_S)
                except Empty:
                    found = None
                if aborted():
                    return
                if found is None:
                    continue
                if isinstance(found, DoorstepError):
                    raise found
                last = time.monotonic_ns()
                first = first if usage.completion else last
                finish = found.finish
                for token, logprob in zip(found.ids, found.logprobs, strict=False):
                    usage.completion += 1
                    entry = self._entry(token, logprob, greedy=greedy) if stream.config.logprobs else None
                    if (delta := answer.feed(token, entry)) is not None:
                        yield from _pieces(split, delta)
                    if answer.stopped:
                        finish = "stop"
                        break
        finally:
            self._pipeline.cancel(stream)
        if (delta := answer.finish()) is not None:
            yield from _pieces(split, delta)
        if isinstance(split, tools.CallsInText):
            for words, calls in split.finish():
                yield Delta(text=words, tool_calls=calls)
        if split is not None and split.count and finish == "stop":
            finish = "tool_calls"
        usage.prefill_us, usage.decode_us = (first - began) // 1000, (last - first) // 1000
        yield Delta(finish=finish, usage=usage)

    def _entry(self, token: int, logprob: float, *, greedy: bool) -> dict[str, Any]:
        data = self._bytes_of.get(token, b"")
        text = data.decode("utf-8", "replace")
        entry = {"id": token, "token": text, "logprob": logprob, "bytes": list(data)}
        return {**entry, "top_logprobs": [entry] if greedy else []}  # without chance, it is the likeliest

    # The rest

    def tokenize(self, text: str) -> list[int]:
        return self._encode(text, special=True)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(self._known(tokens), skip_special_tokens=False))

    def render(self, body: dict[str, Any]) -> str:
        return self._rendered(plan_tools(body, knows_tools=self._knows_tools), body)

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(self._pipeline.kv_usage)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        found = self._tokenizer.encode(text, add_special_tokens=special).input_ids.data  # (1, tokens)
        return [int(token) for token in found.ravel()]

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Native code would look for others outside of its tables."""
        for token in tokens:
            if token not in self._bytes_of:
                raise InvalidArgument(f"there is no token {token}; there are 0 to {max(self._bytes_of)}")
        return list(tokens)

    def _rendered(self, plan: ToolPlan, body: Mapping[str, Any]) -> str:
        variables = dict(body.get("chat_template_kwargs") or {})
        if (effort := body.get("reasoning_effort")) is not None:
            variables |= {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
        given = [{"type": "function", "function": dict(function)} for function in plan.functions]
        messages = [{**message, "content": message.get("content") or ""} for message in plan.messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, True, tools=given or None, extra_context=variables or None
                )
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise InvalidArgument(f"the model's chat template refuses these messages: {last_line(error)}") from None


class _Decoder:
    """A tokenizer as transformers has it, for what makes text of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _pieces(split: Split | None, delta: Delta) -> Generator[Delta, None, None]:
    if split is None or not delta.text:
        yield delta
    else:
        yield from split_calls(split, delta)


def _stops(body: Mapping[str, Any]) -> list[str]:
    given = body.get("stop") or []
    return [given] if isinstance(given, str) else list(given)


def _logprobs(job: Job, *, greedy: bool) -> bool:
    """Whether tokens come with their log probability. Raises InvalidArgument for those of others, which OpenVINO does
    not tell. (A completion's `logprobs` of 1 gets the token's own alone where it is not the likeliest by design.)"""
    asked = job.body.get("logprobs")
    chat = job.operation == "chat"
    tops = (job.body.get("top_logprobs") or 0) if chat else (asked or 0)
    if tops > 1 or (chat and tops and not greedy):
        raise InvalidArgument(
            "backend 'openvino' tells the log probability of the token it chose, and of no other: ask for logprobs "
            "without top_logprobs"
        )
    return bool(asked) if chat else asked is not None
