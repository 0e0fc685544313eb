"""Tokens become text as they come: whole characters, cut before a stop string. Knows a tokenizer, and no model.

What may still change is held back: the bytes of a character that is not whole yet, and what may begin a stop string.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from doorstep.backends.llm.job import Delta
from doorstep.backends.llm.tools import begins

_CONTEXT = 5  # tokens of the prompt that tell the first ones whether a space is theirs
_BROKEN = "�"
_MOST_BROKEN = 3  # bytes that a character may still lack its last one to
_LONGEST_WINDOW = 256  # tokens that give no whole text: it is no text
_LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON has not; OpenAI's


class Detokeniser:
    """The text of tokens that come one by one; in all, what the tokenizer makes of them at once."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        window = list(prompt[-_CONTEXT:])
        if self._text(window).endswith(_BROKEN):
            window = []
        self._window = window  # from a token on whose text is out
        self._said = len(self._text(window))  # characters of the window's text that are out
        self._clean = len(window)  # tokens of the window, all of whose text is out

    def feed(self, token: int) -> str:
        self._window.append(token)
        text = self._text(self._window)
        tail = len(text) - len(text.rstrip(_BROKEN))
        held = min(tail, _MOST_BROKEN)
        if len(self._window) > _LONGEST_WINDOW:
            held = 0
        piece = text[self._said : len(text) - held]
        self._said += len(piece)
        if not held and piece:
            self._window = self._window[self._clean :]
            self._clean = len(self._window)
            self._said = len(self._text(self._window))
        return piece

    def finish(self) -> str:
        piece = self._text(self._window)[self._said :]
        self._said += len(piece)
        return piece

    def _text(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Answer:
    """The deltas of one answer. `stopped`: a stop string came; it, and what follows, is no part of the answer."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._detokeniser = Detokeniser(tokenizer, prompt)
        self._stops = stops
        self._held = ""
        self._out = 0  # characters given out
        self._tokens = 0  # that came since
        self._logprobs: list[tuple[int, dict[str, Any]]] = []  # (where its text begins, what is said of the token)
        self.stopped = False

    def feed(self, token: int, logprob: dict[str, Any] | None) -> Delta | None:
        """None: nothing is certain yet."""
        if logprob is not None:
            self._logprobs.append((self._out + len(self._held), logprob))
        self._tokens += 1
        return self._piece(self._detokeniser.feed(token), last=False)

    def finish(self) -> Delta | None:
        if not self.stopped:
            return self._piece(self._detokeniser.finish(), last=True)
        return self._delta("") if self._tokens or self._logprobs else None

    def _piece(self, text: str, *, last: bool) -> Delta | None:
        self._held += text
        at = min((found for stop in self._stops if (found := self._held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            cut = self._out + at
            self._logprobs = [(start, entry) for start, entry in self._logprobs if start < cut]
            piece, self._held = self._held[:at], ""
        else:
            keep = 0 if last else max((begins(self._held, stop) for stop in self._stops), default=0)
            piece = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        if not piece and not (last and (self._tokens or self._logprobs)):
            return None
        return self._delta(piece)

    def _delta(self, text: str) -> Delta:
        logprobs = [entry for _, entry in self._logprobs]
        delta = Delta(text=text, logprobs=logprobs or None, tokens=self._tokens)
        self._out += len(text)
        self._tokens, self._logprobs = 0, []
        return delta


class TokenNames:
    """What log probabilities say of tokens: their text and bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = {char: byte for byte, char in _byte_level().items()}
        text = str(getattr(tokenizer, "backend_tokenizer", None) and tokenizer.backend_tokenizer.decoder)
        self._byte_level = "ByteLevel" in text

    def entry(self, token: int, logprob: float, tops: Sequence[tuple[int, float]]) -> dict[str, Any]:
        return {**self._one(token, logprob), "top_logprobs": [self._one(*top) for top in tops]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._names(token)
        return {
            "id": token,
            "token": text,
            "logprob": logprob if math.isfinite(logprob) else _LEAST_LOGPROB,
            "bytes": list(data),
        }

    def _names(self, token: int) -> tuple[str, bytes]:
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if _BROKEN not in text:
            return text, text.encode()
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._byte_level and all(char in self._bytes_of for char in name):
            return text, bytes(self._bytes_of[char] for char in name)
        if name.startswith("<0x") and len(name) == 6:
            return text, bytes([int(name[3:5], 16)])
        return text, text.encode()


def _byte_level() -> dict[int, str]:
    """GPT-2's characters for bytes: printable ones are themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
