"""llama.cpp, by xllamacpp: GGUF models on a CPU, or a GPU its build knows.

xllamacpp runs llama.cpp's own server in this process. Answers are asked for by its calls, which tell the progress of a
prompt, so that one can be ended in the middle; for what has no call (tokens, templates) it is asked over its listener:
a Unix socket in a folder that only this user can enter, with a key that only this process knows.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import orjson

# llama.cpp's threads meet some hundred times a token. Where another process has one of the cores, those that wait spin
# for as long as the system lets them, and a token takes seconds; so they spin for a moment, and then sleep. Read when
# the library is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import xllamacpp

from doorstep.backends.llm.engine import Aborted, EngineMetrics, LLMEngine, Send, too_long
from doorstep.backends.llm.job import Delta, Job, Usage
from doorstep.backends.llm.llamacpp.answer import Answer
from doorstep.backends.llm.llamacpp.gguf import read_head
from doorstep.backends.llm.llamacpp.json_grammar import is_plain, json_grammar
from doorstep.backends.llm.tool_plan import Split, plan_tools
from doorstep.backends.llm.upstream import Upstream, socket_folder
from doorstep.errors import BackendError, DoorstepError, InvalidArgument, Unavailable

T = TypeVar("T")
_POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large").match
_AT_ONCE = 16  # texts to make vectors of, or documents to rank
_HTTP_THREADS_BESIDE = 4  # for what needs no slot
# Ours → llama.cpp's, where they differ. Nothing else of a client's body gets there.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_tokens": "max_tokens",
    "stop": "stop",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repeat_penalty",
    "logit_bias": "logit_bias",
    "ignore_eos": "ignore_eos",
}


class LlamaCppEngine(LLMEngine):
    name = "llamacpp"

    def load(self) -> None:
        settings = self.settings
        head = read_head(settings.path)  # a damaged file is told in words, before native code reads it
        self._vocabulary = head.count("tokenizer.ggml.tokens")
        self._folder = socket_folder("llama")
        self._key = secrets.token_hex(32)
        path = os.path.join(self._folder, "llama.sock")  # the name says that it is a socket
        self._answers: set[Answer] = set()  # under way
        self._kv_total = settings.context_size * settings.slots
        self._adapters = list(settings.adapters)
        try:
            self._server: Any = xllamacpp.Server(self._parameters(path))
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise BackendError(
                f"llama.cpp cannot load {settings.path.name}: {error}; it may be damaged, of an architecture that this "
                f"xllamacpp ({getattr(xllamacpp, '__version__', 'unknown')}) does not know, or too large for the memory"
            ) from None
        self.upstream = Upstream(path, self._key, self._error_of)
        caps = self.upstream.ask("GET", "/props").get("chat_template_caps", {})
        self._knows_tools = bool(caps.get("supports_tools") and caps.get("supports_tool_calls"))

    def _parameters(self, path: str) -> Any:
        s = self.settings
        p = xllamacpp.CommonParams()
        p.model.path = str(s.path)
        p.model_alias = {s.model}
        p.hostnames = [path]
        p.api_keys = [self._key]
        p.cors_origins = ""
        p.cors_credentials = False
        p.endpoint_slots = p.endpoint_props = p.endpoint_metrics = False
        p.ui = False
        p.offline = True
        p.verbosity = 1  # errors: prompts are in what is said beyond
        p.n_threads_http = s.slots + _HTTP_THREADS_BESIDE
        p.n_parallel = s.slots
        p.kv_unified = False  # a slot has what it needs: one long request cannot take the others' place
        p.n_ctx = s.context_size * s.slots
        p.ctx_shift = False
        p.fit_params = False
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = s.thread_count
        p.n_batch = p.n_ubatch = s.prompt_batch
        # What it keeps of a prompt does not say with which adapter it was worked off.
        p.cache_ram_mib = 0 if s.adapters else s.prompt_cache_mb
        p.n_gpu_layers = s.gpu_layers if s.gpu_layers >= 0 else 9999
        p.cache_type_k = p.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{s.cache_type.upper()}")
        p.use_jinja = True
        if s.chat_template:
            p.chat_template = Path(s.chat_template).read_text(encoding="utf-8")
        if s.draft_model:
            p.speculative.draft.mparams.path = s.draft_model
        if s.adapters:
            p.lora_init_without_apply = True
            p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(a.path), a.scale) for a in s.adapters.values()]
        if s.task != "generate":
            p.embedding = True
            p.n_batch = p.n_ubatch = s.context_size  # an input must fit into one batch
            pooling = "rank" if s.task == "rerank" else s.pooling
            if pooling:
                p.pooling_type = xllamacpp.llama_pooling_type(_POOLINGS[pooling])
        return p

    def unload(self) -> None:
        self._server = None
        shutil.rmtree(self._folder, ignore_errors=True)

    # Generation

    def stream(self, job: Job, aborted: Aborted, send: Send) -> None:
        if job.body.get("min_tokens"):
            raise InvalidArgument("backend 'llamacpp' cannot do 'min_tokens'")
        body = {theirs: job.body[ours] for ours, theirs in _FIELDS.items() if job.body.get(ours) is not None}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True, "n": 1}
        if self._adapters:
            body["lora"] = [
                {"id": i, "scale": self.settings.adapters[name].scale if name == job.adapter else 0.0}
                for i, name in enumerate(self._adapters)
            ]
        if job.operation == "chat":
            split = self._chat(job.body, body)
            handle = self._server.handle_chat_completions
        else:
            body["prompt"] = job.body["prompt"]
            if (logprobs := job.body.get("logprobs")) is not None:
                body["logprobs"] = max(logprobs, 1)
            _constrain(job.body, body)
            split = None
            handle = self._server.handle_completions
        answer = Answer(split, aborted, send, self._error_of)
        self._answers.add(answer)
        try:
            handle(orjson.dumps(body), answer.piece)
        except ValueError as error:  # so it says that a field is not as it must be
            raise InvalidArgument(str(error)) from None
        finally:
            self._answers.discard(answer)
        answer.end()

    def _chat(self, asked: Mapping[str, Any], body: dict[str, Any]) -> Split | None:
        """Fills in what is a chat's; gives what finds calls in the answer, where llama.cpp does not."""
        if asked.get("logprobs"):
            body["logprobs"] = True
            body["top_logprobs"] = max(asked.get("top_logprobs") or 0, 1)
        kwargs = dict(asked.get("chat_template_kwargs") or {})
        if (effort := asked.get("reasoning_effort")) is not None:
            kwargs |= {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
        if kwargs:
            body["chat_template_kwargs"] = kwargs
        plain = all(is_plain(tool["function"].get("parameters") or {}) for tool in asked.get("tools") or ())
        plan = plan_tools(asked, knows_tools=self._knows_tools and plain)
        if plan.schema is not None:
            _obey(plan.schema, body, compact=True)
        else:
            _constrain(asked, body)
        if plan.functions:
            body["tools"] = asked["tools"]
            body["tool_choice"] = "auto"
            body["parallel_tool_calls"] = asked.get("parallel_tool_calls", True)
        body["messages"] = plan.messages
        return plan.split

    # The rest

    def embed(self, job: Job, aborted: Aborted) -> Delta:
        if self.settings.task != "embed":
            return super().embed(job, aborted)
        vectors: list[Any] = []
        usage = Usage()
        for inputs in _some_at_a_time(job.body["input"]):
            said = self.upstream.ask_while_wanted("/v1/embeddings", {"input": inputs}, aborted)
            if said is None:
                break
            vectors += [row["embedding"] for row in sorted(said["data"], key=lambda row: row["index"])]
            usage.prompt += said["usage"]["prompt_tokens"]
        return Delta(finish="stop", usage=usage, value=vectors)

    def rerank(self, job: Job, aborted: Aborted) -> Delta:
        if self.settings.task != "rerank":
            return super().rerank(job, aborted)
        scores: list[float] = []
        usage = Usage()
        for documents in _some_at_a_time(job.body["documents"]):
            asked = {"query": job.body["query"], "documents": documents}
            said = self.upstream.ask_while_wanted("/v1/rerank", asked, aborted)
            if said is None:
                break
            scores += [row["relevance_score"] for row in sorted(said["results"], key=lambda row: row["index"])]
            usage.prompt += said.get("usage", {}).get("prompt_tokens", 0)
        return Delta(finish="stop", usage=usage, value=scores)

    def tokenize(self, text: str) -> list[int]:
        said = self.upstream.ask("POST", "/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return list(said["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        if tokens and self._vocabulary and max(tokens) >= self._vocabulary:
            raise InvalidArgument(f"there is no token {max(tokens)}: the model has {self._vocabulary}, from 0")
        return str(self.upstream.ask("POST", "/detokenize", {"tokens": list(tokens)})["content"])

    def render(self, body: dict[str, Any]) -> str:
        asked: dict[str, Any] = {}
        self._chat(body, asked)
        wanted = {key: asked[key] for key in ("messages", "tools", "chat_template_kwargs") if key in asked}
        return str(self.upstream.ask("POST", "/apply-template", wanted)["prompt"])

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(min(sum(answer.tokens for answer in self._answers.copy()) / self._kv_total, 1.0))

    def _error_of(self, status: int, said: Any) -> DoorstepError:
        error = said.get("error", said) if isinstance(said, dict) else said
        if not isinstance(error, dict):
            return BackendError(f"llama.cpp answers {status}: {error}")
        message, code = str(error.get("message", "")), error.get("code", status)
        if error.get("type") == "exceed_context_size_error":
            return too_long(error.get("n_ctx", self.settings.context_size), error.get("n_prompt_tokens", 0))
        if (large := _TOO_LARGE(message)) is not None:  # to make a vector of
            return too_long(self.settings.context_size, int(large[1]))
        if code == 400:
            return InvalidArgument(message)
        if code == 503:
            return Unavailable(message)
        return BackendError(f"llama.cpp: {message}")


def _some_at_a_time(inputs: Sequence[T]) -> Iterator[Sequence[T]]:
    """What llama.cpp has begun it does not give up, whoever leaves."""
    return (inputs[i : i + _AT_ONCE] for i in range(0, len(inputs), _AT_ONCE))


def _constrain(asked: Mapping[str, Any], body: dict[str, Any]) -> None:
    """What the answer must look like. Raises InvalidArgument."""
    wanted = asked.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        _obey(wanted["json_schema"].get("schema", {}), body)
    elif wanted.get("type") == "json_object":
        _obey({"type": "object"}, body)


def _obey(schema: Mapping[str, Any], body: dict[str, Any], *, compact: bool = False) -> None:
    body["grammar"] = json_grammar(schema, compact=compact)
    body["reasoning_format"] = "none"  # all of the answer is JSON, whatever the template has begun
