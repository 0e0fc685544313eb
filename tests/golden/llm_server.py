"""Models for the golden tests of language models, and a server of them. All are SmolLM2, a real one of 135 M weights.

Knows how a LoRA adapter is written; expected answers come from elsewhere: xllamacpp in this process, by `Reference`.
"""

from __future__ import annotations

import json
import math
import re
import struct
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import xllamacpp

from doorstep.testing.server import ServerProcess

# One thread each: those of llama.cpp wait for each other by spinning, and other tests want the cores as well.
# SmolLM2-135M's sizes, as its GGUF says
WIDTH, LAYERS = 576, 30
CONTEXT = 1024
F32, U32, STRING = 6, 4, 8  # ggml's docs/gguf.md
ALIGNMENT = 32

SMOL = """
backend: "llamacpp"
parameters { key: "threads" value { string_value: "1" } }
parameters { key: "slots" value { string_value: "2" } }
parameters { key: "context_size" value { string_value: "1024" } }
"""
# One slot, and four places before it on each level
TINY = """
backend: "llamacpp"
parameters { key: "threads" value { string_value: "1" } }
parameters { key: "slots" value { string_value: "1" } }
parameters { key: "context_size" value { string_value: "1024" } }
dynamic_batching {
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { max_queue_size: 4 }
}
"""
EMBED = """
backend: "llamacpp"
parameters { key: "threads" value { string_value: "1" } }
parameters { key: "slots" value { string_value: "1" } }
parameters { key: "context_size" value { string_value: "512" } }
parameters { key: "task" value { string_value: "embed" } }
parameters { key: "pooling" value { string_value: "mean" } }
"""


PATIENCE_S = 60.0
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


class LLMServer(ServerProcess):
    """A server, its numbers, and OpenAI's clients for it."""

    @property
    def v1(self) -> str:
        return self.url("/v1")

    def client(self, key: str = "key", **rest: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.v1, api_key=key, max_retries=0, timeout=PATIENCE_S, **rest)

    def async_client(self, key: str = "key") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.v1, api_key=key, max_retries=0, timeout=PATIENCE_S)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=PATIENCE_S) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if re.match(rf"{name}[{{ ]", line) and all(want in line for want in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Looks again and again until `condition()`."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.running, self.logs()
            assert time.monotonic() < deadline, f"{what} never came\n{self.logs()[-4000:]}"
            threading.Event().wait(0.01)


def save_model(models: Path, name: str, config: str, gguf: Path) -> Path:
    """`<models>/<name>/1/model.gguf`, a link to `gguf`; returns the version's folder."""
    folder = models / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.gguf").symlink_to(gguf)
    (models / name / "config.pbtxt").write_text(config)
    return folder


def save_adapter(path: Path, *, seed: int = 1, strength: float = 0.3, rank: int = 4) -> Path:
    """A LoRA adapter of the query projections, with which the model says something else."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        # As llama.cpp has them: a (rank, width), b (width, rank), row by row
        a, b = random.normal(0, strength, (2, rank, WIDTH)).astype(np.float32)
        tensors[f"blk.{layer}.attn_q.weight.lora_a"] = a
        tensors[f"blk.{layer}.attn_q.weight.lora_b"] = np.ascontiguousarray(b.T)
    pairs: dict[str, str | float] = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf(pairs, tensors))
    return path


def gguf(pairs: dict[str, str | float], tensors: dict[str, Any]) -> bytes:
    """A GGUF file, version 3, of FP32 tensors."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs))]
    for key, value in pairs.items():
        out.append(_text(key))
        out.append(
            struct.pack("<I", STRING) + _text(value) if isinstance(value, str) else struct.pack("<If", F32, value)
        )
    offset = 0
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]  # the innermost first
        out.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset))
        offset += _padded(tensor.nbytes)
    head = b"".join(out)
    body = [tensor.tobytes().ljust(_padded(tensor.nbytes), b"\0") for tensor in tensors.values()]
    return b"".join([head.ljust(_padded(len(head)), b"\0"), *body])


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Reference:
    """xllamacpp in this process, asked directly: what the model says, apart from any server of ours."""

    def __init__(self, gguf: Path, *, embedding: bool = False, adapter: Path | None = None) -> None:
        p = xllamacpp.CommonParams()
        p.model.path = str(gguf)
        p.n_parallel = 1
        p.n_ctx = 512 if embedding else CONTEXT
        p.cache_ram_mib = 0
        p.ui = p.endpoint_slots = p.fit_params = False
        p.offline = p.use_jinja = True
        p.verbosity = -1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.n_batch = p.n_ubatch = 128
        if embedding:
            p.embedding = True
            p.pooling_type = xllamacpp.llama_pooling_type(1)
            p.n_batch = p.n_ubatch = 512
        if adapter is not None:
            p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(p)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer(self._server.handle_chat_completions, body)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer(self._server.handle_completions, body)

    def embed(self, *texts: str) -> list[list[float]]:
        found = self._answer(self._server.handle_embeddings, {"input": list(texts)})
        return [row["embedding"] for row in sorted(found["data"], key=lambda row: row["index"])]

    def _answer(self, handle: Any, body: dict[str, Any]) -> dict[str, Any]:
        answer = handle({**body, "cache_prompt": False} if "input" not in body else body)
        found = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        assert "error" not in found, found
        return found


def cosine(a: Any, b: Any) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
