"""What a request asks of sampling, checked, as one frozen object: nothing out of range gets to native code. Pure.

Names are OpenAI's and vLLM's; what a request leaves out is what the model's makers recommend (generation_config.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from doorstep.errors import InvalidArgument

MOST_LOGPROBS = 20
_ELSEWHERE = frozenset(  # read by others
    ("messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs",
     "reasoning_effort", "logprobs", "top_logprobs", "stop", "logit_bias")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wishes:
    """One request's, in range."""

    temperature: float = 1.0  # 0: always the likeliest
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    ends: frozenset[int] = frozenset()  # the tokens that end the answer
    most: int = 1  # tokens
    least: int = 0  # tokens before an end may come
    logprobs: int = -1  # how many of the likeliest are told with each token; -1: not even the token's own


def _number(least: float, most: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"a number from {least:g} to {most:g}")
        return float(value)

    return read


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return value

    return read


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 2**53),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-100, 100),
    "frequency_penalty": _number(-100, 100),
    "seed": _whole(-(2**63), 2**63 - 1),
    "max_tokens": _whole(1, 2**53),
    "min_tokens": _whole(0, 2**53),
    "ignore_eos": _flag,
}


def wishes_of(
    body: Mapping[str, Any], *, chat: bool, left: int, vocabulary: int, ends: frozenset[int], usual: Mapping[str, float]
) -> Wishes:
    """`left`: tokens that the context has room for; `usual`: the model's own values. Raises InvalidArgument."""
    unknown = sorted(body.keys() - _FIELDS.keys() - _ELSEWHERE)
    if unknown:
        raise InvalidArgument(f"backend 'transformers' does not know '{unknown[0][:100]}'")
    said: dict[str, Any] = {}
    for name, read in _FIELDS.items():
        value = body.get(name, usual.get(name))
        if value is None:
            continue
        if name in ("top_k",) and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            said[name] = read(value)
        except ValueError as expected:
            raise InvalidArgument(f"'{name}' must be {expected}, and is {value!r}") from None
    most = min(said.pop("max_tokens", left), left)
    least = min(said.pop("min_tokens", 0), most)
    said["top_k"] = max(said.get("top_k", 0), 0)
    return Wishes(
        most=most,
        least=least,
        ends=frozenset() if said.pop("ignore_eos", False) else ends,
        bias=_bias(body.get("logit_bias") or {}, vocabulary),
        logprobs=_logprobs(body, chat=chat),
        **said,
    )


def stops_of(body: Mapping[str, Any]) -> list[str]:
    given = body.get("stop") or []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidArgument("'stop' must be texts that are not empty")
    return stops


def _bias(given: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, value in given.items():
        number = int(token) if str(token).isascii() and str(token).isdecimal() and len(str(token)) < 10 else vocabulary
        if number >= vocabulary:
            raise InvalidArgument(f"'logit_bias' names the token {token}; the model's are 0 to {vocabulary - 1}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidArgument(f"'logit_bias' of token {token} must be a number")
        found[number] = float(value)
    return found


def _logprobs(body: Mapping[str, Any], *, chat: bool) -> int:
    wanted = body.get("logprobs")
    if chat:
        count = (body.get("top_logprobs") or 0) if wanted else -1
    else:
        count = -1 if wanted is None or wanted is False else int(wanted)
    if count > MOST_LOGPROBS:
        raise InvalidArgument(f"log probabilities of {count} tokens are asked for; {MOST_LOGPROBS} at most are told")
    return count
