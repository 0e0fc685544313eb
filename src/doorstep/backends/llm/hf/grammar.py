"""Answers that obey a JSON schema: which tokens may come next. Knows llguidance and a tokenizer, and no model.

llguidance is optional; without it such requests are refused. It bounds its own work for hostile schemas.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from doorstep.errors import BackendError, InvalidArgument
from doorstep.types import Array

_LOOSELY = {"whitespace_pattern": r"[ \n]?"}  # an answer must not be made of white space for ever
_INSTALL = "answers that obey a schema need llguidance: pip install 'doorstep[transformers]'"


class Grammar:
    """Where one answer is in its grammar. Touched only from the thread that generates, once it is made."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Array:
        """A bool per token of the vocabulary."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        found = np.unpackbits(bits, bitorder="little", count=self._vocabulary).astype(np.bool_)
        if not found.any():
            raise self._failed()
        return found

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise self._failed()

    def _failed(self) -> BackendError:
        return BackendError(
            f"the answer cannot go on as its schema asks: {self._matcher.get_error() or 'no token fits'}"
        )


class Grammars:
    """Makes them. The tokenizer is read when the first is asked for: that takes a second."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._read: Any = None  # under the lock

    def of_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Raises InvalidArgument for a schema that cannot be used."""
        try:
            import llguidance
        except ImportError:
            raise InvalidArgument(_INSTALL) from None
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(dict(schema), overrides=_LOOSELY)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArgument(f"the JSON schema cannot be used: {error}") from None
        matcher = llguidance.LLMatcher(self._tokens(), text, log_level=0)
        if matcher.is_error():
            raise InvalidArgument(f"the JSON schema cannot be used: {matcher.get_error()}")
        return Grammar(matcher, self._vocabulary)

    def _tokens(self) -> Any:
        with self._lock:
            if self._read is None:
                import llguidance.hf

                try:
                    self._read = llguidance.hf.from_tokenizer(
                        self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None
                    )
                except ValueError as error:
                    raise InvalidArgument(f"llguidance cannot read this model's tokenizer: {error}") from None
            return self._read
