"""GET /v1/models, and one by its name: what can be asked for here. Knows no engine."""

from __future__ import annotations

from typing import Any

from doorstep.backends.llm.settings import adapter_names, task_of
from doorstep.errors import DoorstepError
from doorstep.model import Model
from doorstep.protocols.openai.answer import now_s
from doorstep.protocols.openai.embeddings import text_to_vector
from doorstep.protocols.openai.front import Front, respond_error, respond_json
from doorstep.scheduler.slots import SlotScheduler
from doorstep.wire.exchange import Exchange

_STARTED = now_s()  # what a model was made at is not known; when it could first be asked for is near enough


class Models:
    def __init__(self, front: Front) -> None:
        self._front = front

    def all(self, exchange: Exchange) -> None:
        newest = {model.name: model for model in self._front.server.models() if usable(model)}  # lowest version first
        data = [entry for name in sorted(newest) for entry in _entries(newest[name])]
        respond_json(exchange, {"object": "list", "data": data})

    def one(self, exchange: Exchange) -> None:
        name = exchange.params["model"]
        try:
            model, adapter = self._front.resolve(name)
        except DoorstepError as error:
            respond_error(exchange, error)
            return
        respond_json(exchange, _adapter_entry(model, name) if adapter else _entry(model))


def usable(model: Model) -> bool:
    """Whether some route of this API can ask it."""
    return isinstance(model.scheduler, SlotScheduler) or text_to_vector(model.config) is not None


def _entries(model: Model) -> list[dict[str, Any]]:
    return [_entry(model), *(_adapter_entry(model, name) for name in adapter_names(model.config.parameters))]


def _entry(model: Model) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": model.name, "object": "model", "created": _STARTED, "owned_by": "doorstep",
                             "root": model.name, "parent": None}  # fmt: skip
    if isinstance(model.scheduler, SlotScheduler):
        entry["max_model_len"] = model.scheduler.llm.context_size
        entry["task"] = task_of(model.config.parameters)
    else:
        entry["task"] = "embed"
    return entry


def _adapter_entry(model: Model, name: str) -> dict[str, Any]:
    return {**_entry(model), "id": name, "parent": model.name}
