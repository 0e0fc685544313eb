"""Text to BERT token ids: normalise, split into words, cut words into known pieces. Knows no model and no tensor.

The rules are those of BERT's uncased vocabularies; tests compare them, code point by code point, with the `tokenizers`
library, which would bring seventeen packages along.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

# Ranges that BERT treats as ideographs, each a word of its own. Hangul, Hiragana and Katakana are not among them.
_IDEOGRAPHS = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
)
_IDEOGRAPH = re.compile(f"([{_IDEOGRAPHS}])")
_ASCII_WORDS = re.compile(r"[0-9a-z]+|[!-/:-@\[-`{-~]")
_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_WHITESPACE = frozenset("\t\n\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}
_SPECIAL = re.compile(r"(\[PAD\]|\[UNK\]|\[CLS\]|\[SEP\]|\[MASK\])")
_MAX_WORD = 100  # characters; a longer word is unknown


class WordPiece:
    """A vocabulary, one piece a line, and the ids it gives to texts. Safe to share between threads."""

    def __init__(self, vocabulary: Sequence[str], *, max_tokens: int = 256) -> None:
        self._ids = {piece: number for number, piece in enumerate(vocabulary)}
        missing = [piece for piece in ("[UNK]", "[CLS]", "[SEP]") if piece not in self._ids]
        if missing:
            raise ValueError(f"not a BERT vocabulary: {', '.join(missing)} missing from its {len(self._ids)} pieces")
        self._unknown = self._ids["[UNK]"]
        self._first, self._last = self._ids["[CLS]"], self._ids["[SEP]"]
        self._special = {piece: number for piece, number in self._ids.items() if _SPECIAL.fullmatch(piece)}
        self._max_tokens = max_tokens
        self.pieces = lru_cache(maxsize=65_536)(self._pieces)  # most words come back

    def encode(self, text: str) -> list[int]:
        """Ids of `text` between [CLS] and [SEP], cut to `max_tokens`."""
        ids = [self._first]
        room = self._max_tokens - 1
        # A special token that stands in the text, in capitals, means itself: so the library has it.
        for part in _SPECIAL.split(text) if "[" in text else (text,):
            if part in self._special:
                ids.append(self._special[part])
                continue
            for word in split(part):
                ids.extend(self.pieces(word))
                if len(ids) >= room:
                    break
        del ids[room:]
        ids.append(self._last)
        return ids

    def _pieces(self, word: str) -> tuple[int, ...]:
        """The longest known piece from the left, again and again; one unknown part makes the whole word unknown."""
        if len(word) > _MAX_WORD:
            return (self._unknown,)
        found: list[int] = []
        start, prefix = 0, ""
        while start < len(word):
            end = len(word)
            while (number := self._ids.get(prefix + word[start:end])) is None:
                end -= 1
                if end == start:
                    return (self._unknown,)
            found.append(number)
            start, prefix = end, "##"
        return tuple(found)


def split(text: str) -> Iterable[str]:
    """Lower-case words and single punctuation marks, without accents and control characters."""
    if text.isascii():
        return _ASCII_WORDS.findall(_ASCII_CONTROL.sub("", text).lower())
    return _split_unicode(text)


def _split_unicode(text: str) -> list[str]:
    clean = "".join(" " if c in _WHITESPACE else c for c in text if c in _WHITESPACE or not _is_control(c))
    spaced = _IDEOGRAPH.sub(r" \1 ", clean)
    bare = (c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn")
    # Letter by letter: str.lower() would make a final sigma of Σ at the end of a word.
    lower = "".join(map(str.lower, bare))
    return "".join(f" {c} " if _is_punctuation(c) else c for c in lower).split()


@lru_cache(maxsize=4096)
def _is_control(c: str) -> bool:
    return c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs")


@lru_cache(maxsize=4096)
def _is_punctuation(c: str) -> bool:
    return c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(c)[0] == "P"
