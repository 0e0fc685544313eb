"""transformers: Hugging Face folders on a CPU or a GPU, by its continuous batching. Knows no protocol.

Nothing is fetched and no code of a folder runs: the network is off, and weights are safetensors.
"""

from __future__ import annotations

import os

os.environ.update(  # the libraries read these when they are imported
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    USE_HUB_KERNELS="NO",
    TRANSFORMERS_VERBOSITY="critical",  # what it warns of has the beginning of prompts in it
    TOKENIZERS_PARALLELISM="false",  # each request has a thread already
)

import gc
import queue
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from doorstep.backends.llm import tools
from doorstep.backends.llm.engine import Aborted, EngineMetrics, LLMEngine, too_long
from doorstep.backends.llm.hf.batching import Batching
from doorstep.backends.llm.hf.chat import ChatTemplate
from doorstep.backends.llm.hf.folder import read_folder
from doorstep.backends.llm.hf.grammar import Grammars
from doorstep.backends.llm.hf.sampling import Chosen, Sampler
from doorstep.backends.llm.hf.text import Answer, TokenNames
from doorstep.backends.llm.hf.vectors import Vectors
from doorstep.backends.llm.hf.wishes import stops_of, wishes_of
from doorstep.backends.llm.job import Delta, Job, Usage
from doorstep.backends.llm.openai_chunks import split_calls
from doorstep.backends.llm.tool_plan import Split
from doorstep.errors import BackendError, DoorstepError, InvalidArgument

_POLL_S = 0.05  # how often a request that waits for a token is asked whether it still wants one
_OURS: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_CLASSES = {
    "generate": transformers.AutoModelForCausalLM,
    "embed": transformers.AutoModel,
    "rerank": transformers.AutoModelForSequenceClassification,
}


class TransformersEngine(LLMEngine):
    name = "transformers"

    def load(self) -> None:
        settings = self.settings
        self._folder = read_folder(settings.path)  # what is damaged is told in words, before a library reads it
        self._refuse()
        torch.set_num_threads(settings.thread_count)
        transformers.utils.logging.disable_progress_bar()
        self._batching: Batching | None = None
        self._tokens: dict[str, int] = {}  # request → tokens it has in the cache
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder.path, **_OURS)
            self._model = self._load_model()
        except DoorstepError:
            raise
        except Exception as error:  # whatever a folder makes a library do
            raise BackendError(
                f"transformers cannot load {self._folder.path.name}: {type(error).__name__}: {error}; it may lack a "
                f"file, or be of an architecture that transformers {transformers.__version__} does not know"
            ) from None
        self._inputs = int(self._model.get_input_embeddings().weight.shape[0])
        if settings.task == "generate":
            self._load_generation()
        else:
            pooling = "rank" if settings.task == "rerank" else settings.pooling or self._folder.pooling
            self._vectors = Vectors(self._model, pooling)

    def _refuse(self) -> None:
        """What other engines can and this one cannot."""
        settings, longest = self.settings, self._folder.context_length
        if settings.adapters:
            raise BackendError("backend 'transformers' serves no LoRA adapters: merge it, or use llamacpp or vllm")
        if settings.draft_model:
            raise BackendError("backend 'transformers' has no speculative decoding: leave out 'draft_model'")
        if settings.task == "embed" and settings.pooling in ("none", "rank"):
            raise BackendError(f"pooling '{settings.pooling}' makes no embedding: use mean, cls or last")
        if longest and settings.context_size > longest:
            raise BackendError(f"context_size is {settings.context_size}; the model was made for {longest} at most")

    def _load_model(self) -> Any:
        settings = self.settings
        best = f"cuda:{max(settings.gpu, 0)}" if torch.cuda.is_available() else "cpu"
        device = torch.device(settings.device or best)
        model, found = _CLASSES[settings.task].from_pretrained(
            self._folder.path, use_safetensors=True, dtype=settings.dtype or "auto", output_loading_info=True, **_OURS
        )
        # What is missing would be made up at random. Nobody asks the pooler of an encoder.
        missing = sorted(key for key in found["missing_keys"] if settings.task != "embed" or "pooler." not in key)
        if missing:
            raise BackendError(
                f"the weights lack {missing[0]} (and {len(missing) - 1} others) of a {type(model).__name__}"
            )
        if settings.task == "rerank" and model.config.num_labels != 1:
            raise BackendError(f"a reranker gives one score, and this model {model.config.num_labels}: it classifies")
        return model.eval().to(device)

    def _load_generation(self) -> None:
        settings, tokenizer = self.settings, self._tokenizer
        template = Path(settings.chat_template).read_text(encoding="utf-8") if settings.chat_template else ""
        self._template = ChatTemplate(tokenizer, template)
        self._names = TokenNames(tokenizer)
        own = tokenizer.eos_token_id
        self._ends = self._folder.ends or (frozenset() if own is None else frozenset((int(own),)))
        self._outputs = int(self._model.get_output_embeddings().weight.shape[0])
        self._grammars = Grammars(tokenizer, self._outputs, self._ends)
        self._batching = Batching(self._model, settings)
        self._batching.start()
        try:
            for _ in self.generate(Job("complete", {"prompt": [0], "max_tokens": 1}), lambda: False):
                pass  # whatever does not work fails now
            self._batching.count_cached()
        except BaseException:
            self.unload()
            raise

    def unload(self) -> None:
        if self._batching is not None:
            self._batching.stop()
        self._batching = None
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def healthy(self) -> bool:
        return self._batching.alive if self._batching is not None else self.settings.task != "generate"

    def metrics(self) -> EngineMetrics:
        room = self.settings.context_size * self.settings.slots
        return EngineMetrics(min(sum(self._tokens.copy().values()) / room, 1.0))

    # Generation

    def generate(self, job: Job, aborted: Aborted) -> Generator[Delta, None, None]:
        body = job.body
        if self._batching is None:
            raise InvalidArgument(f"model '{self.settings.model}' does not generate; {self._how('generate')}")
        if job.adapter:
            raise InvalidArgument(f"there is no adapter '{job.adapter}': backend 'transformers' serves none")
        split, schema = None, _schema(body)
        if job.operation == "chat":
            text, split, forced = self._template.prompt(body)
            schema = forced or schema
            prompt = self._ids(text, special=False)
        else:
            prompt = self._ids(body["prompt"])
        context = self.settings.context_size
        if len(prompt) >= context:
            raise too_long(context, len(prompt))
        wishes = wishes_of(
            body,
            chat=job.operation == "chat",
            left=context - len(prompt),
            vocabulary=self._outputs,
            ends=self._ends,
            usual=self._folder.sampling,
        )
        grammar = self._grammars.of_schema(schema) if schema is not None else None
        answer = Answer(self._tokenizer, prompt, stops_of(body))
        told: queue.SimpleQueue[Chosen | DoorstepError] = queue.SimpleQueue()
        sampler = Sampler(wishes, prompt, self._outputs, self._model.device, grammar, told.put)
        return self._deltas(prompt, sampler, told, answer, split, aborted)

    def _deltas(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        told: queue.SimpleQueue[Chosen | DoorstepError],
        answer: Answer,
        split: Split | None,
        aborted: Aborted,
    ) -> Generator[Delta, None, None]:
        batching = self._batching
        assert batching is not None
        begun = first = last = time.monotonic()
        finish, count = "", 0
        request = batching.submit(prompt, sampler, told.put)
        try:
            self._tokens[request] = len(prompt)
            yield Delta(usage=Usage(prompt=len(prompt)))
            while not finish:
                if aborted():
                    return
                try:
                    chosen = told.get(timeout=_POLL_S)
                except queue.Empty:
                    if not batching.alive:
                        raise batching.died() from None
                    continue
                if isinstance(chosen, DoorstepError):
                    raise chosen
                last = time.monotonic()
                first = first if count else last
                count += 1
                self._tokens[request] = len(prompt) + count
                finish = chosen.finish
                named = None
                if sampler.wishes.logprobs >= 0 and chosen.token not in sampler.wishes.ends:
                    named = self._names.entry(chosen.token, chosen.logprob, chosen.tops)
                delta = answer.feed(chosen.token, named)
                finish = "stop" if answer.stopped else finish
                if delta is not None:
                    yield from _split(split, delta)
            if (delta := answer.finish()) is not None:
                yield from _split(split, delta)
            if isinstance(split, tools.CallsInText):
                for words, calls in split.finish():
                    yield Delta(text=words, tool_calls=calls)
            if split is not None and split.count and finish == "stop":
                finish = "tool_calls"
            times = round((first - begun) * 1e6), round((last - first) * 1e6)
            yield Delta(finish=finish, usage=Usage(len(prompt), count, batching.cached(request), *times))
        finally:
            self._tokens.pop(request, None)
            batching.end(request)

    # The rest

    def embed(self, job: Job, aborted: Aborted) -> Delta:
        if self.settings.task != "embed":
            return super().embed(job, aborted)
        inputs = [self._fitting(self._ids(given)) for given in job.body["input"]]
        return _value(inputs, self._vectors.of(inputs, None, aborted))

    def rerank(self, job: Job, aborted: Aborted) -> Delta:
        if self.settings.task != "rerank":
            return super().rerank(job, aborted)
        inputs, kinds = [], []
        for document in job.body["documents"]:
            pair = self._tokenizer(job.body["query"], document, return_token_type_ids=True)
            inputs.append(self._fitting(list(pair["input_ids"])))
            kinds.append(list(pair["token_type_ids"]))
        typed = "token_type_ids" in self._tokenizer.model_input_names
        return _value(inputs, self._vectors.of(inputs, kinds if typed else None, aborted))

    def tokenize(self, text: str) -> list[int]:
        return self._ids(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(self._known(tokens), clean_up_tokenization_spaces=False))

    def render(self, body: dict[str, Any]) -> str:
        if self._batching is None:
            return super().render(body)
        return self._template.prompt(body)[0]

    def _ids(self, given: str | Sequence[int], *, special: bool = True) -> list[int]:
        """Token ids of a text, or of themselves. `special`: with what the tokenizer puts around a text, unless it is
        there already."""
        if isinstance(given, str):
            begins = self._tokenizer.bos_token
            special = special and not (begins and given.startswith(begins))
            found: Sequence[int] = self._tokenizer(given, add_special_tokens=special)["input_ids"]
        else:
            found = given
        if not found:
            raise InvalidArgument("the prompt is empty: it has no token")
        return self._known(found)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """A token that is none would end more than this request."""
        if not all(type(token) is int and 0 <= token < self._inputs for token in tokens):
            raise InvalidArgument(f"a token id is none of the model's, which are 0 to {self._inputs - 1}")
        return list(tokens)

    def _fitting(self, tokens: list[int]) -> list[int]:
        if len(tokens) > self.settings.context_size:
            raise too_long(self.settings.context_size, len(tokens))
        return tokens


def _schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    wanted = body.get("response_format") or {}
    match wanted.get("type"):
        case "json_schema":
            schema = wanted["json_schema"].get("schema", {})
            return schema if isinstance(schema, Mapping) else {}
        case "json_object":
            return {"type": "object"}
    return None


def _split(split: Split | None, delta: Delta) -> Sequence[Delta]:
    return [delta] if split is None else list(split_calls(split, delta))


def _value(inputs: Sequence[Sequence[int]], value: Any) -> Delta:
    return Delta(finish="stop", usage=Usage(prompt=sum(map(len, inputs))), value=value if value is not None else [])
