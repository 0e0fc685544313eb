"""vLLM: models as Hugging Face lays them out, mostly on GPUs. Imports no vLLM, and so runs with any Python of its own.

`vllm serve` runs as a child of this process and is asked over a Unix socket in a folder that only this user can enter,
with a key that only the two know. Its own interface changes with each release; this one is OpenAI's.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import orjson

from doorstep.backends.llm import tools
from doorstep.backends.llm.engine import CONTEXT_LENGTH, Aborted, EngineMetrics, LLMEngine, too_long
from doorstep.backends.llm.job import Delta, Job, Usage
from doorstep.backends.llm.openai_chunks import delta_of, split_calls, usage_of
from doorstep.backends.llm.tool_plan import Split, plan_tools
from doorstep.backends.llm.upstream import Upstream, socket_folder
from doorstep.backends.llm.vllm.args import command_line, read_engine_args
from doorstep.backends.llm.vllm.child_program import ChildProgram, find_program
from doorstep.errors import BackendError, DoorstepError, InvalidArgument, NotFound, Unavailable, Unsupported

_HEALTH_TIMEOUT_S = 5.0
_KV_FRESH_S = 1.0
# vLLM's names are ours. Nothing else of a client's body gets there.
_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "stop", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "ignore_eos", "response_format",
)  # fmt: skip
_CHAT_FIELDS = ("chat_template_kwargs", "reasoning_effort")
_LENGTHS = (  # vLLM's words for a prompt that is too long: renderers/params.py and get_max_tokens
    re.compile(
        r"maximum context length is (?P<context>\d+) tokens.*? (?:at least )?(?P<prompt>\d+) input tokens", re.S
    ),
    re.compile(r"Input length \((?P<prompt>\d+)\) exceeds model's maximum context length \((?P<context>\d+)\)"),
)
_KV = re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^\n]*\})? ([0-9.eE+-]+)", re.M)


class VllmEngine(LLMEngine):
    name = "vllm"

    def load(self) -> None:
        settings = self.settings
        args = read_engine_args(settings.path)
        if settings.draft_model:
            raise BackendError("vLLM takes a draft model by speculative_config in model.json, not by draft_model")
        self._parses_tools = bool(args.get("enable_auto_tool_choice") and args.get("tool_call_parser"))
        try:
            program = find_program(settings.command)
        except BackendError as error:
            raise BackendError(
                f"{error}: pip install 'doorstep[vllm]', or name it by the parameter 'command'"
            ) from None
        self._folder = socket_folder("vllm")
        path = os.path.join(self._folder, "vllm.sock")
        key = secrets.token_hex(32)
        self.upstream = Upstream(path, key, self._error_of)
        self._loaded = False
        try:
            variables = self._variables(key, args)
            line = command_line(settings, args, program, path)
            self._program = ChildProgram(line, variables, self.log, self._on_end)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        try:
            self.upstream.wait_until_up("/health", lambda: self._program.alive, settings.load_timeout_s)
        except BackendError as error:
            words = self._program.last_words()
            self.unload()
            hint = "; the parameter 'load_timeout_s' allows more" if "not up after" in str(error) else ""
            raise BackendError(f"vLLM did not start: {error}{hint}; the last it wrote:\n{words}") from None
        self._loaded = True
        if not self._program.alive:  # between the two
            raise BackendError("vLLM ended as soon as it was up")
        self._kv = KvUsage(self.upstream)

    def _variables(self, key: str, args: Mapping[str, Any]) -> dict[str, str]:
        variables = {
            "VLLM_API_KEY": key,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_LOGGING_COLOR": "0",
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),  # a server fetches nothing unless it is let
            "PYTHONUNBUFFERED": "1",
        }
        if self.settings.gpu >= 0:
            size = int(args.get("tensor_parallel_size") or 1) * int(args.get("pipeline_parallel_size") or 1)
            if size > 1:
                raise BackendError(
                    "KIND_GPU is currently for single-GPU models, please specify KIND_MODEL in the model's "
                    "config.pbtxt for multi-GPU models"
                )
            variables["CUDA_VISIBLE_DEVICES"] = str(self.settings.gpu)
        return variables

    def _on_end(self, how: str) -> None:
        """Without its engine this process is of no use; the server starts another, later and later if that ends too."""
        if self._loaded:
            self.log("ERROR", f"vLLM ended: {how}")
            os._exit(1)

    def healthy(self) -> bool:
        if not self._program.alive:
            return False
        try:
            self.upstream.ask("GET", "/health", timeout_s=_HEALTH_TIMEOUT_S)
        except DoorstepError:
            return False
        return True

    def unload(self) -> None:
        self._program.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    # Generation

    def generate(self, job: Job, aborted: Aborted) -> Generator[Delta, None, None]:
        body = self._body(job) | {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if job.operation == "chat":
            split = self._chat(job.body, body)
            if job.body.get("logprobs"):
                body |= {"logprobs": True, "top_logprobs": job.body.get("top_logprobs") or 0}
            return self._deltas("/v1/chat/completions", body, split, aborted)
        body["prompt"] = job.body["prompt"]
        if (logprobs := job.body.get("logprobs")) is not None:
            body["logprobs"] = int(logprobs)
        return self._deltas("/v1/completions", body, None, aborted)

    def _body(self, job: Job) -> dict[str, Any]:
        asked = job.body
        body: dict[str, Any] = {key: asked[key] for key in _FIELDS if asked.get(key) is not None}
        if (grammar := asked.get("grammar")) is not None:
            body["structured_outputs"] = {"grammar": grammar}
        return body | {"model": job.adapter or self.settings.model}

    def _chat(self, asked: Mapping[str, Any], body: dict[str, Any]) -> Split | None:
        """Fills in what is a chat's; gives what finds calls in the answer, where vLLM has no parser for them."""
        body |= {key: asked[key] for key in _CHAT_FIELDS if asked.get(key) is not None}
        plan = plan_tools(asked, knows_tools=self._parses_tools)
        if plan.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "call", "schema": plan.schema}}
        if plan.functions:
            parallel = asked.get("parallel_tool_calls", True)
            body |= {"tools": asked["tools"], "tool_choice": "auto", "parallel_tool_calls": parallel}
        body["messages"] = plan.messages
        return plan.split

    def _deltas(
        self, path: str, body: dict[str, Any], split: Split | None, aborted: Aborted
    ) -> Generator[Delta, None, None]:
        finish, usage = "", Usage()
        counted = unsaid = 0  # tokens: of all chunks; of those that said nothing
        began = first = last = time.monotonic_ns()
        told_prompt = False
        for event in self.upstream.events(path, body, aborted):
            said = orjson.loads(event)
            if "error" in said:
                raise self._error_of(0, said)
            told = said.get("usage")
            if told is not None:
                usage = usage_of(told)
            for choice in said["choices"]:
                finish = choice.get("finish_reason") or finish
                delta = delta_of(choice)
                if told is not None:
                    delta.tokens, counted = usage.completion - counted, usage.completion
                if delta.tokens:
                    last = time.monotonic_ns()
                    first = last if first == began else first
                if not (delta.text or delta.reasoning or delta.tool_calls or delta.logprobs):
                    unsaid += delta.tokens
                    continue
                delta.tokens += unsaid
                unsaid = 0
                for piece in split_calls(split, delta) if split is not None and delta.text else (delta,):
                    if not told_prompt and usage.prompt:
                        piece.usage, told_prompt = Usage(prompt=usage.prompt), True
                    yield piece
        if aborted():
            return
        if finish in ("abort", "error"):
            raise BackendError("vLLM gave the request up")
        if isinstance(split, tools.CallsInText):
            for words, calls in split.finish():
                yield Delta(text=words, tool_calls=calls)
        if split is not None and split.count and finish == "stop":
            finish = "tool_calls"
        usage.prefill_us, usage.decode_us = (first - began) // 1000, (last - first) // 1000
        yield Delta(finish=finish or "stop", usage=usage, tokens=unsaid)

    # The rest

    def embed(self, job: Job, aborted: Aborted) -> Delta:
        if self.settings.task != "embed":
            return super().embed(job, aborted)
        body = {"model": job.adapter or self.settings.model, "input": job.body["input"], "encoding_format": "float"}
        if job.body.get("dimensions") is not None:
            body["dimensions"] = job.body["dimensions"]
        said = self.upstream.ask_while_wanted("/v1/embeddings", body, aborted)
        if said is None:
            return Delta(finish="stop", value=[])
        vectors = [row["embedding"] for row in sorted(said["data"], key=lambda row: row["index"])]
        return Delta(finish="stop", usage=usage_of(said.get("usage") or {}), value=vectors)

    def rerank(self, job: Job, aborted: Aborted) -> Delta:
        if self.settings.task != "rerank":
            return super().rerank(job, aborted)
        body = {"model": job.adapter or self.settings.model, **{key: job.body[key] for key in ("query", "documents")}}
        said = self.upstream.ask_while_wanted("/v1/rerank", body, aborted)
        if said is None:
            return Delta(finish="stop", value=[])
        scores = [row["relevance_score"] for row in sorted(said["results"], key=lambda row: row["index"])]
        return Delta(finish="stop", usage=usage_of(said.get("usage") or {}), value=scores)

    def tokenize(self, text: str) -> list[int]:
        said = self.upstream.ask("POST", "/tokenize", {"model": self.settings.model, "prompt": text})
        return list(said["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        said = self.upstream.ask("POST", "/detokenize", {"model": self.settings.model, "tokens": list(tokens)})
        return str(said["prompt"])

    def render(self, body: dict[str, Any]) -> str:
        """vLLM shows the tokens of a chat, and the text of tokens; what it would show as text are pieces of words."""
        asked: dict[str, Any] = {}
        self._chat(body, asked)
        wanted = {key: asked[key] for key in ("messages", "tools", "chat_template_kwargs") if key in asked}
        said = self.upstream.ask("POST", "/tokenize", {"model": self.settings.model, **wanted})
        return self.detokenize(said["tokens"])

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(self._kv.now())

    def _error_of(self, status: int, said: Any) -> DoorstepError:
        error = said.get("error", said) if isinstance(said, dict) else said
        if not isinstance(error, dict):
            return BackendError(f"vLLM answers {status}: {error}")
        message = str(error.get("message") or error.get("detail") or error)
        code = error.get("code") if isinstance(error.get("code"), int) else status
        for pattern in _LENGTHS:
            if found := pattern.search(message):
                return too_long(int(found["context"]), int(found["prompt"]))
        if "context length" in message and code == 400:
            if not message.startswith(CONTEXT_LENGTH):
                message = f"{CONTEXT_LENGTH} {self.settings.context_size} tokens. {message}"
            return InvalidArgument(message)
        made = _ERRORS.get(code)
        return made(message) if made is not None else BackendError(f"vLLM: {message}")


_ERRORS: dict[Any, type[DoorstepError]] = {
    400: InvalidArgument,
    404: NotFound,
    422: InvalidArgument,
    501: Unsupported,
    503: Unavailable,
}


class KvUsage:
    """How full the KV cache is, 0 to 1: asked of vLLM in a thread of its own, at most once a second, while somebody
    wants to know."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._usage = 0.0
        self._read_at = 0.0
        self._wanted = threading.Event()
        threading.Thread(target=self._read, name="doorstep-vllm-metrics", daemon=True).start()

    def now(self) -> float:
        """Never waits: what was last read."""
        if time.monotonic() - self._read_at > _KV_FRESH_S:
            self._wanted.set()
        return self._usage

    def _read(self) -> None:
        while True:
            self._wanted.wait()
            try:
                text = self._upstream.ask("GET", "/metrics", timeout_s=_HEALTH_TIMEOUT_S)
                found = [float(value) for value in _KV.findall(str(text).encode())]
                self._usage = min(max(found, default=0.0), 1.0)
            except (DoorstepError, ValueError):
                pass  # the next one says more
            self._read_at = time.monotonic()
            self._wanted.clear()
