"""Runs transformers' continuous batching: one thread that generates for every request at once. Knows tokens, no text.

The paged cache is as large as all slots together may need at once, so no request is ever thrown out for another's sake
and begun anew.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from doorstep.backends.llm.hf.sampling import BatchSampler, Sampler
from doorstep.backends.llm.settings import Settings
from doorstep.errors import BackendError, DoorstepError

_PAGE = 32  # tokens: what prompts have in common is found by the page
_ACCELERATOR_BATCH = 1024  # tokens of prompts between two of an answer; fewer would leave most of a GPU idle
_STOP_S = 30.0

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # its warnings have beginnings of prompts

Failed = Callable[[DoorstepError], None]


class Batching:
    """Its methods may be called from any thread."""

    def __init__(self, model: Any, settings: Settings) -> None:
        """Raises BackendError for a model whose layers cannot be batched so."""
        try:
            self._manager = model.init_continuous_batching(
                # The samplers know when an answer ends; greedy takes what they chose.
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=_config(model, settings),
            )
        except (AttributeError, ImportError, ValueError, TypeError) as error:
            raise _cannot(model, error) from None
        self._router = self._manager.output_router = _Router()
        # The only way to processors of one's own: `generate`'s are made from the generation config.
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([BatchSampler()]))
        processors.tensors_required = 1
        self._manager.logit_processor = processors
        self._model = model
        self._ids = itertools.count()
        self._cached: dict[str, int] = {}  # request → tokens of its prompt that were in the cache

    def start(self) -> None:
        # A thread that a daemon thread starts is one too, and does not keep a process whose server died.
        starter = threading.Thread(target=self._start, daemon=True)
        starter.start()
        starter.join()

    def _start(self) -> None:
        with torch.inference_mode():
            self._manager.start()

    def count_cached(self) -> None:
        """To be called once the first request was answered: there is no cache before."""
        cache = self._manager.batch_processor.cache
        search = cache.search_prefix_match

        def counted(request_id: str, prompt_ids: list[int]) -> int:
            found = int(search(request_id, prompt_ids))
            if request_id in self._cached:
                self._cached[request_id] = found
            return found

        cache.search_prefix_match = counted

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running() and self._manager.background_thread_status.fatal_error is None)

    def died(self) -> BackendError:
        cause = self._manager.background_thread_status.fatal_error
        why = f"{type(cause).__name__}: {cause}" if cause is not None else "it was stopped"
        return _failure(f"the thread that generates has ended: {why}")

    def submit(self, prompt: Sequence[int], sampler: Sampler, failed: Failed) -> str:
        """The request's id, for `end`, which must be called however it goes."""
        request = f"r{next(self._ids)}"
        self._router.failed[request] = failed
        self._cached[request] = 0
        wishes = sampler.wishes
        accepted = self._manager.add_request(
            list(prompt),
            request_id=request,
            max_new_tokens=wishes.most,
            eos_token_id=sorted(wishes.ends) or -1,
            sampler=sampler,
        )
        if accepted is None:
            self.end(request)
            raise self.died()
        return request

    def cached(self, request: str) -> int:
        return self._cached[request]

    def end(self, request: str) -> None:
        """Cancels it, if it is under way still."""
        self._router.failed.pop(request, None)
        self._cached.pop(request, None)
        self._manager.cancel_request(request)

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=_STOP_S, hard_stop=True)


class _Router(OutputRouter):  # type: ignore[misc]
    """Tokens come from the samplers; what remains to be told is that a request failed."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, Failed] = {}

    def deliver(self, output: Any) -> None:
        failed = self.failed.get(output.request_id)
        if output.error is not None and failed is not None:
            failed(_failure(f"the engine failed: {output.error}"))

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


def _config(model: Any, settings: Settings) -> ContinuousBatchingConfig:
    batch = max(settings.prompt_batch, settings.slots)
    if model.device.type != "cpu":
        batch = max(batch, _ACCELERATOR_BATCH)
    step = math.ceil(batch / _PAGE) + settings.slots  # blocks that one step may need anew
    held = settings.slots * (math.ceil(settings.context_size / _PAGE) + 1)
    kept = (settings.prompt_cache_mb << 20) // (_bytes_per_token(model) * _PAGE)
    blocks = held + step + kept
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=blocks,
        max_batch_tokens=batch,
        max_requests_per_batch=settings.slots,
        # Below it, kept prompts are forgotten: there is room for a step at any time.
        safety_margin=step / blocks,
        allow_block_sharing=settings.prompt_cache_mb > 0,
        # The samplers must see each token before the next is scored, and are no part of a graph.
        use_async_batching=False,
        use_cuda_graph=False,
        max_blocks_per_request=0,
        auto_switch_to_flash=False,  # it may fetch kernels from the network
    )


def _bytes_per_token(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head * model.dtype.itemsize)


def _failure(why: str) -> BackendError:
    if "Memory footprint" in why:
        why = (
            "the memory does not suffice for the context of all slots: lower context_size, slots or prompt_cache_mb "
            f"({why})"
        )
    return BackendError(why)


def _cannot(model: Any, error: Exception) -> BackendError:
    return BackendError(
        f"transformers cannot batch a {type(model).__name__} continuously: {error}; llamacpp may serve it, as GGUF"
    )
