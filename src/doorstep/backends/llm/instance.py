"""A language model as an instance: each request runs in a thread of its own, on an engine that batches by itself.

Knows the engine's interface and no engine. A request is a job (from a front of this server) or the tensors of Triton's
vLLM backend; either is answered through `Batch.emit`, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from doorstep.backends.base import ModelInstance
from doorstep.backends.llm.counts import counts_tensor
from doorstep.backends.llm.engine import LONGEST_TOKEN_BYTES, LLMEngine, too_long
from doorstep.backends.llm.job import DELTA, GENERATES, JOB, Delta, Job, Usage
from doorstep.backends.llm.tensors import Generation, embed_job, rerank_job, value_outputs
from doorstep.errors import BackendError, DoorstepError, InvalidArgument
from doorstep.request import LATER, Batch, Emit, InferenceRequest
from doorstep.types import BYTES, Tensor, object_array

_BESIDE = 4  # threads for what needs no slot


class LLMInstance(ModelInstance):
    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(engine.settings.slots + _BESIDE, thread_name_prefix="doorstep-llm")

    def execute(self, batch: Batch) -> None:
        for i, request in enumerate(batch.requests):
            batch.results[i] = LATER
            self._pool.submit(self._run, request, batch.emit)

    def is_ready(self) -> bool:
        return self._engine.healthy()

    def unload(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._engine.drain()
        self._engine.unload()

    # A request, in its thread

    def _run(self, request: InferenceRequest, emit: Emit) -> None:
        try:
            if request.cancelled:
                emit(request, None, True)
            elif JOB in request.inputs:
                self._run_job(request, emit)
            elif self._engine.settings.task == "generate":
                self._run_generation(request, emit)
            else:
                self._run_value(request, emit)
        except DoorstepError as error:
            emit(request, error, True)
        except BaseException as error:
            self._engine.log("ERROR", f"{type(error).__name__}: {error}")
            emit(request, BackendError(f"the engine failed: {type(error).__name__}: {error}"), True)

    def _run_job(self, request: InferenceRequest, emit: Emit) -> None:
        job = Job.from_json(request.inputs[JOB].array.ravel()[0])
        request.inputs = {}
        if job.operation in GENERATES:
            self._stream(job, request, emit, lambda delta: [_delta_tensor(delta)])
        else:
            delta = self._answer(job, request)
            emit(request, [_delta_tensor(delta), counts_tensor(delta, 0.0)], True)

    def _run_generation(self, request: InferenceRequest, emit: Emit) -> None:
        generation = Generation(request)
        request.inputs = {}
        job = generation.job()
        settings = self._engine.settings
        size = len(job.body["prompt"])
        if size > settings.context_size * LONGEST_TOKEN_BYTES:
            raise too_long(settings.context_size, size // LONGEST_TOKEN_BYTES)
        adapters = list(settings.adapters)
        if job.adapter and not adapters:
            raise InvalidArgument("LoRA feature is not enabled.")
        if job.adapter and job.adapter not in adapters:
            raise InvalidArgument(f"LoRA {job.adapter} is not supported, we currently support {adapters}")
        self._stream(job, request, emit, generation.response)

    def _stream(
        self, job: Job, request: InferenceRequest, emit: Emit, outputs_of: Callable[[Delta], list[Tensor] | None]
    ) -> None:
        """`outputs_of` may have nothing to say to a piece."""
        engine = self._engine
        unsaid = 0  # tokens of pieces that nothing was said to
        ended = False

        def send(delta: Delta) -> None:
            nonlocal unsaid, ended
            outputs = outputs_of(delta)
            if outputs is None:
                unsaid += delta.tokens
                return
            delta.tokens += unsaid
            unsaid = 0
            ended = bool(delta.finish)
            emit(request, [*outputs, counts_tensor(delta, engine.metrics().kv_usage)], ended)

        engine.stream(job, lambda: request.cancelled, send)
        if ended:
            return
        if not request.cancelled:
            raise BackendError("the engine ended its answer without saying why")
        emit(request, None, True)

    def _run_value(self, request: InferenceRequest, emit: Emit) -> None:
        job = embed_job(request) if self._engine.settings.task == "embed" else rerank_job(request)
        request.inputs = {}
        delta = self._answer(job, request)
        emit(request, [*value_outputs(job.operation, delta), counts_tensor(delta, 0.0)], True)

    def _answer(self, job: Job, request: InferenceRequest) -> Delta:
        engine, body = self._engine, job.body
        match job.operation:
            case "embed":
                return engine.embed(job, lambda: request.cancelled)
            case "rerank":
                return engine.rerank(job, lambda: request.cancelled)
            case "tokenize":
                text = engine.render(body) if "messages" in body else body["text"]
                tokens = engine.tokenize(text)
                return Delta(finish="stop", usage=Usage(prompt=len(tokens)), value=tokens)
            case _:
                return Delta(finish="stop", usage=Usage(), value=engine.detokenize(body["tokens"]))


def _delta_tensor(delta: Delta) -> Tensor:
    return Tensor(DELTA, BYTES, object_array([delta.to_json()], (1,)))
