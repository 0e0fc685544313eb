"""POST /v1/rerank, as Jina and Cohere have it: which documents fit a query best. By a reranker, or, where the model
makes embeddings, by the angle between vectors. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from doorstep.backends.llm.job import Job
from doorstep.protocols.openai import fields
from doorstep.protocols.openai.answer import new_id
from doorstep.protocols.openai.call import Call
from doorstep.protocols.openai.embeddings import Embeddings, ValueFormat, can_embed
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.front import Front
from doorstep.protocols.openai.identity import caller_of
from doorstep.wire.exchange import Exchange

MOST_DOCUMENTS = 1000


def read_documents(value: Any, where: str) -> list[str]:
    """Texts, or objects with a `text`."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_DOCUMENTS:
        raise BadField(f"'{where}' must be a list of 1 to {MOST_DOCUMENTS} documents", where, "invalid_type")
    found = [one.get("text") if isinstance(one, dict) else one for one in value]
    texts = [one for one in found if isinstance(one, str) and one]
    if len(texts) < len(found):
        raise BadField(f"'{where}' must have texts, none of them empty", where, "invalid_value")
    return texts


CHECKS: Mapping[str, fields.Check] = {
    **fields.WITHOUT_EFFECT,
    "model": fields.text(512),
    "query": fields.text(),
    "documents": read_documents,
    "top_n": fields.integer(1, 1_000_000),
    "return_documents": fields.boolean,
    "priority": fields.integer(0, 2**31),
}


class Rerank:
    def __init__(self, front: Front, embeddings: Embeddings) -> None:
        self._front = front
        self._embeddings = embeddings

    def rerank(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, partial(fields.read, checks=CHECKS), self._rerank)

    def _rerank(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        for name in ("model", "query", "documents"):
            if not body.get(name):
                raise BadField(f"'{name}' is missing", name, "missing")
        model, _ = self._front.resolve(body["model"])
        caller = caller_of(exchange, body)
        if can_embed(model):
            texts = [body["query"], *body["documents"]]
            self._embeddings.vectors_of(exchange, model, texts, caller, lambda v, n: _ranked(body, _cosines(v), n))
            return
        self._front.check_task(model, "rerank")
        job = Job("rerank", {"query": body["query"], "documents": body["documents"]})
        format = ValueFormat(lambda choice: _ranked(body, choice.value, choice.usage.prompt))
        Call(self._front, exchange, model, [job], format, caller, stream=False).begin()


def _cosines(vectors: Sequence[Any]) -> list[float]:
    """Of the first with each of the others."""
    rows = np.asarray(vectors, np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return [float(x) for x in rows[1:] @ rows[0]]


def _ranked(body: Mapping[str, Any], scores: Sequence[float], tokens: int) -> Any:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.get("top_n", len(scores))]
    results = []
    for i in order:
        result: dict[str, Any] = {"index": i, "relevance_score": scores[i]}
        if body.get("return_documents", True):
            result["document"] = {"text": body["documents"][i]}
        results.append(result)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": new_id("rerank-"), "model": body["model"], "usage": usage, "results": results}
