"""Embeddings and scores, by a model of transformers. Knows token ids, and nothing of text or generation.

Inputs of one request share batches; requests take turns, as one forward pass already uses all there is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from doorstep.types import Array

_BATCH_TOKENS = 4096  # of a forward pass, padding included


class Vectors:
    """`pooling`: mean, cls or last; rank for a reranker."""

    def __init__(self, model: Any, pooling: str) -> None:
        self._model = model
        self._pooling = pooling
        self._turn = threading.Lock()
        config = model.config
        self._pad = config.pad_token_id if config.pad_token_id is not None else 0
        # Without a padding token, the models that score find no last token but of one input at a time.
        self._pads = pooling != "rank" or config.pad_token_id is not None

    def of(
        self, inputs: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]] | None, aborted: Callable[[], bool]
    ) -> Array | None:
        """(inputs, dimensions) in order, of length 1, or (inputs,) scores; None once `aborted`. `kinds`: the token type
        ids of pairs."""
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        found: list[Any] = [None] * len(inputs)
        for batch in self._batches(order, inputs):
            with self._turn:
                if aborted():
                    return None
                rows = self._forward([inputs[i] for i in batch], [kinds[i] for i in batch] if kinds else None)
            for i, row in zip(batch, rows, strict=True):
                found[i] = row
        return np.stack(found)

    def _batches(self, order: Sequence[int], inputs: Sequence[Sequence[int]]) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in order:  # the shortest first: the newest is the longest of its batch
            full = not self._pads or not batches or (len(batches[-1]) + 1) * len(inputs[i]) > _BATCH_TOKENS
            if full:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _forward(self, inputs: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]] | None) -> Array:
        longest = max(map(len, inputs))
        ids = torch.full((len(inputs), longest), self._pad)
        mask = torch.zeros((len(inputs), longest), dtype=torch.int64)
        types = torch.zeros_like(mask)
        for i, tokens in enumerate(inputs):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            if kinds is not None:
                types[i, : len(tokens)] = torch.tensor(kinds[i])
        device = self._model.device
        asked = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if kinds is not None:
            asked["token_type_ids"] = types.to(device)
        with torch.inference_mode():
            said = self._model(**asked)
            if self._pooling == "rank":
                return np.asarray(said.logits.float().squeeze(-1).sigmoid().cpu().numpy())
            pooled = self._pool(said.last_hidden_state.float(), asked["attention_mask"])
            return np.asarray(torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy())

    def _pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden: (inputs, tokens, dimensions), mask: (inputs, tokens) → (inputs, dimensions)"""
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weights = mask[:, :, None].float()
        return (hidden * weights).sum(1) / weights.sum(1)
