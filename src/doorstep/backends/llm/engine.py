"""What an LLM engine offers: one class to write, one row in `ENGINES` (backends/llm/engines.py). Knows no protocol.

An engine lives in the worker process of its model. Its methods block; the instance calls `generate` and the others
from a thread per request, at most `slots` of `generate`, `embed` and `rerank` at once. Whatever they raise as a
DoorstepError is the client's answer: InvalidArgument for what the client did wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from doorstep.backends.llm.job import Delta, Job
from doorstep.backends.llm.settings import Settings
from doorstep.errors import InvalidArgument, Unsupported

Send = Callable[[Delta], None]  # may block, where the client reads slowly
Aborted = Callable[[], bool]  # nobody wants the answer any more: to be asked at least ten times a second


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    kv_usage: float = 0.0  # 0 to 1


class LLMEngine(ABC):
    """One loaded model. `settings` are the model's, complete."""

    name: str  # the backend's, as in config.pbtxt

    def __init__(self, settings: Settings, log: Callable[[str, str], None]) -> None:
        self.settings = settings
        self.log = log  # log(level, message)

    @abstractmethod
    def load(self) -> None:
        """Loads the model. Raises BackendError, naming the file and what to do."""

    def stream(self, job: Job, aborted: Aborted, send: Send) -> None:
        """As `generate`, for a library that calls back: gives each piece to `send`, in this thread or another.

        Write the one that fits the library; the other follows from it."""
        with closing(self.generate(job, aborted)) as deltas:
            for delta in deltas:
                send(delta)

    def generate(self, job: Job, aborted: Aborted) -> Generator[Delta, None, None]:
        """Answers a chat or a completion, piece by piece; the last has `finish` and `usage`.

        Ends early, and frees its slot, once `aborted()` says so or the iterator is closed. Raises InvalidArgument,
        before any piece, for a prompt that does not fit (`too_long`) and for a schema that cannot be used."""
        raise NotImplementedError(f"{type(self).__name__} writes neither generate nor stream")

    def embed(self, job: Job, aborted: Aborted) -> Delta:
        """`value`: a vector (list or numpy) per input, in order."""
        raise Unsupported(f"model '{self.settings.model}' does not make embeddings; {self._how('embed')}")

    def rerank(self, job: Job, aborted: Aborted) -> Delta:
        """`value`: a score per document, in order; higher is more relevant."""
        raise Unsupported(f"model '{self.settings.model}' does not rerank; {self._how('rerank')}")

    def tokenize(self, text: str) -> list[int]:
        raise Unsupported(f"backend '{self.name}' does not show its tokens")

    def detokenize(self, tokens: Sequence[int]) -> str:
        raise Unsupported(f"backend '{self.name}' does not show its tokens")

    def render(self, body: dict[str, Any]) -> str:
        """The prompt that a chat's messages become."""
        raise Unsupported(f"backend '{self.name}' does not show its prompts")

    def metrics(self) -> EngineMetrics:
        """Cheap: asked with every piece."""
        return EngineMetrics()

    def healthy(self) -> bool:
        return True

    def drain(self) -> None:  # noqa: B027 (most have nothing to wait for)
        """No more jobs come; those under way have ended."""

    @abstractmethod
    def unload(self) -> None:
        """Gives everything back."""

    def _how(self, task: str) -> str:
        fix = f'parameters {{ key: "task" value {{ string_value: "{task}" }} }}'
        return f'it is loaded for "{self.settings.task}" (its config may say {fix})'


LONGEST_TOKEN_BYTES = 256  # no vocabulary has longer ones: a prompt of more bytes than so many each cannot fit
CONTEXT_LENGTH = "This model's maximum context length is"  # OpenAI's words, which clients look for


def too_long(context: int, prompt: int) -> InvalidArgument:
    return InvalidArgument(
        f"{CONTEXT_LENGTH} {context} tokens. However, your request has {prompt} input tokens. Please reduce the "
        "length of the input."
    )
