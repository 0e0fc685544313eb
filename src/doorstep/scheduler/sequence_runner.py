"""Runs the batches of sequences: what a Runner does, and what follows from padding and from order within a sequence.

Decides nothing; knows no queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from doorstep.errors import DoorstepError
from doorstep.request import Batch, InferenceRequest
from doorstep.scheduler.runner import Runner
from doorstep.scheduler.sequence_parts import Ticket
from doorstep.types import Tensor


class Owner(Protocol):
    """What the runner tells the scheduler."""

    def before_answers(self, batch: Batch) -> list[Ticket]:
        """A batch is done. Returns those of its requests that had their last answer before."""

    def over(self, ticket: Ticket) -> None:
        """The last answer has gone, and no batch has the request any more."""


class SequenceRunner(Runner):
    """A runner whose batches may hold padding, and whose requests hold up the next of their sequence."""

    def __init__(self, scheduler: Owner, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._scheduler = scheduler

    def tell(self) -> None:
        """Something else than an answer may be what somebody waits for."""
        if self._empty:
            self._tell_empty()

    def _complete(self, batch: Batch) -> None:
        over = self._scheduler.before_answers(batch)
        super()._complete(batch)
        for ticket in over:
            self._scheduler.over(ticket)

    def _emit(self, request: InferenceRequest, outputs: Sequence[Tensor] | DoorstepError | None, final: bool) -> None:
        if request.slot is not None:
            super()._emit(request, outputs, final)
