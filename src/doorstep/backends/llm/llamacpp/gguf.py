"""Reads the head of a GGUF file: what the model is, without loading it. Knows no engine.

The format is llama.cpp's (ggml's docs/gguf.md, version 2 and 3, little-endian). Every length is checked against the
file's, so that a file that lies costs nothing.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from doorstep.errors import BackendError

MAGIC = b"GGUF"
_MOST_PAIRS = 100_000
_MOST_TENSORS = 1_000_000
_LONGEST_STRING = 64 << 20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST_DIMENSIONS = 8
# type of a tensor → elements and bytes of a block (ggml.h, ggml_type; ggml-common.h)
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufHead:
    """What a model says of itself. Arrays are only counted, as a vocabulary is long: `(element type, length)`."""

    tensor_count: int
    pairs: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.pairs.get("general.architecture", ""))

    @property
    def name(self) -> str:
        return str(self.pairs.get("general.name", ""))

    def number(self, key: str) -> int:
        """`<architecture>.<key>`, 0 where it is not said."""
        value = self.pairs.get(f"{self.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    def count(self, key: str) -> int:
        """Of the elements of an array, 0 where there is none."""
        value = self.pairs.get(key)
        return value[1] if isinstance(value, tuple) else 0

    @property
    def context_length(self) -> int:
        """What it was trained with."""
        return self.number("context_length")

    @property
    def chat_template(self) -> str:
        return str(self.pairs.get("tokenizer.chat_template", ""))

    @property
    def task(self) -> str:
        """Embedding models say how they pool; 4 is the rank of a reranker (llama.h, llama_pooling_type)."""
        pooling = self.pairs.get(f"{self.architecture}.pooling_type")
        if pooling is None:
            return "embed" if self.architecture in _ENCODERS else "generate"
        return "rerank" if pooling == 4 else "embed" if pooling else "generate"


_ENCODERS = frozenset(
    ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert")
)


def read_head(path: Path) -> GgufHead:
    """Raises BackendError, with what is wrong, for what is no GGUF model."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return _Reader(file, size, path.name).head()
    except OSError as error:
        raise BackendError(f"{path.name} cannot be read: {error.strerror}") from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file = file
        self._size = self._left = size
        self._name = name

    def head(self) -> GgufHead:
        if self._take(4) != MAGIC:
            raise BackendError(f"{self._name} is no GGUF file: it does not begin with 'GGUF'")
        version = self._number("<I")
        if version not in (2, 3):
            raise BackendError(f"{self._name} is GGUF version {version}; versions 2 and 3 can be read")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        if tensors > _MOST_TENSORS or pairs > _MOST_PAIRS:
            raise self._damaged(f"it claims {tensors} tensors and {pairs} entries")
        found: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            found[key] = self._value(self._number("<I"))
        head = GgufHead(tensors, found)
        if not head.architecture:
            raise BackendError(f"{self._name} does not say its architecture (general.architecture): it is no model")
        self._check_tensors(tensors, head.pairs.get("general.alignment", _ALIGNMENT))
        return head

    def _check_tensors(self, count: int, alignment: Any) -> None:
        """Whether all of them are in the file: an engine that maps it would die on the first page that is not there."""
        end, last = 0, ""
        for _ in range(count):
            name, dimensions = self._string(), self._number("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise self._damaged(f"a tensor of {dimensions} dimensions")
            elements = math.prod(self._number("<Q") for _ in range(dimensions))
            block, size = _BLOCKS.get(self._number("<I"), (1, 0))  # of a type that is not known: as if it were empty
            here = self._number("<Q") + elements // block * size
            if here > end:
                end, last = here, name
        start = self._size - self._left
        step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
        end += -(-start // step) * step
        if count and end > self._size:
            raise self._damaged(f"it has {self._size} bytes, and its tensor '{last[:80]}' ends at {end}")

    def _take(self, size: int) -> bytes:
        if size > self._left:
            raise self._damaged("it ends too early")
        data = self._file.read(size)
        if len(data) != size:
            raise self._damaged("it ends too early")
        self._left -= size
        return data

    def _skip(self, size: int) -> None:
        if size > self._left:
            raise self._damaged("it ends too early")
        self._file.seek(size, 1)
        self._left -= size

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _string(self) -> str:
        size = self._number("<Q")
        if size > _LONGEST_STRING:
            raise self._damaged(f"a text of {size} bytes")
        return self._take(size).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        raise self._damaged(f"an entry of type {kind}")

    def _array(self) -> tuple[int, int]:
        kind, length = self._number("<I"), self._number("<Q")
        if kind in _SCALARS:
            self._skip(struct.calcsize(_SCALARS[kind]) * length)
        elif kind == _STRING:
            if length * 8 > self._left:
                raise self._damaged(f"a list of {length} texts")
            for _ in range(length):
                self._skip(self._number("<Q"))
        else:
            raise self._damaged(f"a list of type {kind}")
        return kind, length

    def _damaged(self, why: str) -> BackendError:
        return BackendError(f"{self._name} is damaged: {why}; fetch it again")
