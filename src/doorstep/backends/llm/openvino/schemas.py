"""Tries a JSON schema, or a grammar, before a request brings it. Knows OpenVINO GenAI, and no request.

A schema that cannot be compiled makes a pipeline's step fail, and every later step of that pipeline with it: whoever
sends one would end everybody's answers. So each is first tried on a model of a hundred kilobytes made for it; where
that fails, only the small one has to be made again.
"""

from __future__ import annotations

import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
import orjson

from doorstep.backends.llm.openvino.pipeline import last_line
from doorstep.errors import InvalidArgument

_REMEMBERED = 256  # of what was tried and was well
_UNHEEDED = frozenset(  # keywords that xgrammar reads and does not enforce
    ("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "multipleOf",
     "dependentRequired", "dependentSchemas")
)  # fmt: skip
_WIDTH = 64  # of the small model's vectors


class SchemaCheck:
    """Of any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipeline: Any = None  # under the lock
        self._tried: dict[tuple[str, str], None] = {}  # under the lock; the oldest first

    def schema(self, schema: Mapping[str, Any]) -> Any:
        """The StructuredOutputConfig of a JSON schema. Raises InvalidArgument."""
        _refuse_unheeded(schema)
        return self._checked("json_schema", orjson.dumps(schema).decode())

    def grammar(self, grammar: str) -> Any:
        """Of a grammar in EBNF, whose first rule is `root`."""
        return self._checked("grammar", grammar)

    def _checked(self, kind: str, text: str) -> Any:
        config = genai.StructuredOutputConfig(**{kind: text})
        with self._lock:
            if (kind, text) not in self._tried:
                self._try(config, kind)
                self._tried[kind, text] = None
                if len(self._tried) > _REMEMBERED:
                    del self._tried[next(iter(self._tried))]
        return config

    def _try(self, config: Any, kind: str) -> None:
        if self._pipeline is None:
            self._pipeline = _small_pipeline()
        wanted = self._pipeline.get_config()
        wanted.max_new_tokens = 1
        wanted.structured_output_config = config
        try:
            handle = self._pipeline.add_request(0, openvino.Tensor(np.array([[1]], np.int64)), wanted)
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            del handle  # without one, a request is dropped before it begins
        except RuntimeError as error:
            self._pipeline = None
            what = "JSON schema" if kind == "json_schema" else "grammar"
            raise InvalidArgument(f"the {what} cannot be enforced: {last_line(error)}") from None


def _refuse_unheeded(schema: Any) -> None:
    """Where a keyword stands as a property's name, it is none."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in _UNHEEDED:
                raise InvalidArgument(f"the JSON schema cannot be enforced: backend 'openvino' does not heed '{key}'")
            if key == "allOf" and isinstance(value, list) and len(value) > 1:
                raise InvalidArgument("the JSON schema cannot be enforced: 'allOf' may have one schema")
            if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
                for inner in value.values():
                    _refuse_unheeded(inner)
            elif key not in ("const", "enum", "default", "examples"):
                _refuse_unheeded(value)
    elif isinstance(schema, list):
        for inner in schema:
            _refuse_unheeded(inner)


def _small_pipeline() -> Any:
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = 8
    scheduler.max_num_seqs = 1
    with tempfile.TemporaryDirectory(prefix="doorstep-openvino-") as folder:
        path = Path(folder) / "small.gguf"
        path.write_bytes(small_model())
        return genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", {"INFERENCE_NUM_THREADS": 1})


def small_model() -> bytes:
    """A Llama of one layer and no knowledge, whose tokens are bytes, as a GGUF file (ggml's docs/gguf.md)."""
    tokens = ["<end>", *_characters_of_bytes(), "ab"]
    count = len(tokens)
    pairs: dict[str, Any] = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": _WIDTH,
        "llama.feed_forward_length": _WIDTH,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (count - 1),
        "tokenizer.ggml.merges": ["a b"],  # there must be one
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (count, _WIDTH), "output_norm.weight": (_WIDTH,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"] = (_WIDTH, _WIDTH)
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}.weight"] = (_WIDTH,)
    head, data = bytearray(), bytearray()
    for key, value in pairs.items():
        head += _string(key) + _value(value)
    for name, shape in shapes.items():
        kind = int(len(shape) == 2)  # F16; of vectors F32
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += (np.zeros(shape, np.float16) if kind else np.ones(shape, np.float32)).tobytes()
        data += bytes(-len(data) % 32)
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))) + head
    return bytes(head + bytes(-len(head) % 32) + data)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return _array(value)


def _array(values: Sequence[Any]) -> bytes:
    if isinstance(values[0], str):
        return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(_string, values))
    return struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)


def _characters_of_bytes() -> list[str]:
    """GPT-2's: printable ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
