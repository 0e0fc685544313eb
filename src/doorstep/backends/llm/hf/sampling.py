"""Chooses the next token of each request of a batch. Knows tensors and transformers' continuous batching; no text.

Continuous batching samples with one temperature for all, and tells of logits only its processors. So ours, one for the
whole batch, chooses every request's token by that request's own wishes, and leaves scores of which it is the greatest.
Order and meaning of what narrows the choice are those of transformers' `generate`; penalties of what was said are
OpenAI's. Log probabilities are of the model's own scores, before any of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from doorstep.backends.llm.hf.grammar import Grammar
from doorstep.backends.llm.hf.wishes import Wishes
from doorstep.errors import BackendError, DoorstepError

GREEDY_BELOW = 1e-5  # a temperature


class Chosen(NamedTuple):
    token: int
    finish: str  # stop, length; "": it goes on
    logprob: float = 0.0
    tops: Sequence[tuple[int, float]] = ()


class Sampler:
    """One request's choices; `tell` gets each, or what ends it. Touched only from the thread that generates."""

    def __init__(
        self,
        wishes: Wishes,
        prompt: Sequence[int],
        vocabulary: int,
        device: torch.device,
        grammar: Grammar | None,
        tell: Callable[[Chosen | DoorstepError], None],
    ) -> None:
        self.wishes = wishes
        self.over = False
        self._tell = tell
        self._grammar = grammar
        self._count = 0
        self._ends = torch.tensor(sorted(wishes.ends), device=device)
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if wishes.bias:
            tokens, values = list(wishes.bias), list(wishes.bias.values())
            self._bias = torch.tensor(tokens, device=device), torch.tensor(values, device=device)
        self._seen: torch.Tensor | None = None  # (vocabulary,): in the prompt or the answer
        if wishes.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt, device=device)] = True
        self._said: torch.Tensor | None = None  # (vocabulary,): how often in the answer
        if wishes.presence_penalty or wishes.frequency_penalty:
            self._said = torch.zeros(vocabulary, device=device)
        self._generator: torch.Generator | None = None
        if wishes.temperature >= GREEDY_BELOW:
            self._generator = torch.Generator(device)
            if wishes.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(wishes.seed)

    def __deepcopy__(self, memo: Any) -> Sampler:
        return self  # continuous batching copies what is a request's when it begins it anew; this goes on

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The token, a tensor without dimensions, by `scores`, (vocabulary,), which it may change."""
        self._weigh(scores)
        if self._generator is None:
            return scores.argmax()
        narrowed = narrow(scores, self.wishes)
        # The greatest of p/e with e ~ Exp(1) is a draw by p; unlike multinomial it waits for no device.
        noise = torch.empty_like(narrowed).exponential_(generator=self._generator)
        return (narrowed.softmax(-1) / noise).argmax()

    def _weigh(self, scores: torch.Tensor) -> None:
        wishes = self.wishes
        if self._seen is not None:
            penalty = wishes.repetition_penalty
            scores.copy_(torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores))
        if self._said is not None:
            scores -= self._said * wishes.frequency_penalty + (self._said > 0) * wishes.presence_penalty
        if self._bias is not None:
            tokens, values = self._bias
            scores[tokens] += values
        if self._count < wishes.least:
            scores[self._ends] = -math.inf
        if self._grammar is not None:
            allowed = torch.from_numpy(self._grammar.allowed()).to(scores.device)
            scores.masked_fill_(~allowed, -math.inf)

    def take(self, token: int, logprob: float, tops: Sequence[tuple[int, float]]) -> None:
        self._count += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._said is not None:
            self._said[token] += 1
        finish = "stop" if token in self.wishes.ends else ""
        if self._grammar is not None and not finish:
            self._grammar.take(token)
            finish = "stop" if self._grammar.complete else ""
        if not finish and self._count >= self.wishes.most:
            finish = "length"
        self.over = bool(finish)
        self._tell(Chosen(token, finish, logprob, tops))

    def fail(self, error: DoorstepError) -> None:
        self.over = True
        self._tell(error)


def narrow(scores: torch.Tensor, wishes: Wishes) -> torch.Tensor:
    """`scores`, (vocabulary,), with minus infinity for what is not to be drawn; the likeliest always is."""
    scores = scores / wishes.temperature
    if 0 < wishes.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(wishes.top_k).values[-1], -math.inf)
    if wishes.top_p < 1:
        ordered, order = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # how likely those are that come first
        out = before >= wishes.top_p
        out[0] = False
        scores = scores.index_fill(0, order[out], -math.inf)
    if wishes.min_p > 0:
        scores = scores.masked_fill(scores < scores.max() + math.log(wishes.min_p), -math.inf)
    return scores


class BatchSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Touched only from the thread that generates. A request's sampler comes with it, as the keyword `sampler`."""

    supported_kwargs = {"sampler": Sampler}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[Sampler] = []  # of the batch that is being made

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        self._rows = [request.state.logit_processor_kwargs["sampler"] for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """`scores`: (requests, vocabulary). What comes back has the chosen as each row's greatest.

        Requests whose prompt is not through yet choose nothing: rows beyond those that do are without meaning."""
        rows = self._rows
        if rows:
            tokens = self._choose_all(rows, scores[: len(rows)])
            scores[: len(rows)].scatter_(1, tokens[:, None], math.inf)
        return scores

    def _choose_all(self, rows: Sequence[Sampler], scores: torch.Tensor) -> torch.Tensor:
        most = max((sampler.wishes.logprobs for sampler in rows), default=-1)
        told = scores.log_softmax(-1) if most >= 0 else None
        chosen = [self._choose(sampler, row) for sampler, row in zip(rows, scores, strict=True)]
        tokens = torch.stack(chosen)
        listed = tokens.tolist()  # the one wait for the device, but for log probabilities
        logprobs, tops = _told(told, tokens, most) if told is not None else ([0.0] * len(rows), [])
        for i, (sampler, token) in enumerate(zip(rows, listed, strict=True)):
            if not sampler.over:
                try:
                    sampler.take(token, logprobs[i], tops[i][: sampler.wishes.logprobs] if tops else ())
                except DoorstepError as error:
                    sampler.fail(error)
        return tokens

    @staticmethod
    def _choose(sampler: Sampler, row: torch.Tensor) -> torch.Tensor:
        """Whatever goes wrong is that request's alone."""
        if not sampler.over:
            try:
                return sampler.choose(row)
            except DoorstepError as error:
                sampler.fail(error)
            except Exception as error:
                sampler.fail(BackendError(f"no token could be chosen: {type(error).__name__}: {error}"))
        return torch.zeros((), dtype=torch.int64, device=row.device)


def _told(logprobs: torch.Tensor, tokens: torch.Tensor, most: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Of each row: the chosen token's log probability, and the `most` likeliest with theirs."""
    own = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
    if most < 1:
        return own, [[] for _ in own]
    values, places = logprobs.topk(min(most, logprobs.shape[1]))
    return own, [
        list(zip(row_places, row_values, strict=True))
        for row_places, row_values in zip(places.tolist(), values.tolist(), strict=True)
    ]
