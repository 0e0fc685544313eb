"""The demo: a repository of real models (build.py), and what to say about it once it is served. Knows no server."""

from __future__ import annotations

import json
from pathlib import Path

MARKER = ".doorstep-demo.json"  # in the repository's root; the name starts with a dot, so it is no model
CHAT = "chat"  # the language model's name in it

# What a language model is for → where it is asked, and with what besides its name.
_QUESTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "generate": (
        "/v1/chat/completions",
        {"stream": True, "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
    ),
    "embed": ("/v1/embeddings", {"input": "A cat sat on the mat."}),
    "rerank": ("/v1/rerank", {"query": "Where is the cat?", "documents": ["On the mat.", "Shares fell."]}),
}


def is_demo(repository: str | Path) -> bool:
    return (Path(repository) / MARKER).is_file()


def curl_lines(base_url: str, repository: str | Path) -> list[str]:
    """Commands to copy and paste: a sentence to its embedding, a file's bytes to its type, a chat. [] where it is no
    demo.

    `base_url` is the HTTP listener's, as in http://127.0.0.1:8000.
    """
    if not is_demo(repository):
        return []
    base = base_url.rstrip("/")
    # Where the server runs in a checkout, its README; elsewhere a file that every demo has.
    file = next(filter(Path.is_file, (Path("README.md"), Path(repository) / "magika/1/model.py")), "README.md")
    sentence = '{"inputs":[{"name":"text","shape":[1,1],"datatype":"BYTES","data":["A cat sat on the mat."]}]}'
    return [
        f"curl -s {base}/v2/models/minilm/infer -d '{sentence}' | cut -c -200",  # of 384 numbers
        # The header says that the whole body is the one input, as it is; the answer is binary too, hence tr.
        f"curl -s {base}/v2/models/magika/infer -H 'Inference-Header-Content-Length: 0' --data-binary @{file}"
        " | tr -c '[:print:]' ' '; echo",
        language_model_line(base, CHAT, "generate"),
    ]


def language_model_line(base_url: str, model: str, task: str) -> str:
    """A command that asks a language model for what it is for: generate, embed or rerank."""
    path, asked = _QUESTIONS[task]
    body = json.dumps({"model": model, **asked}, separators=(",", ":"))
    cut = " | cut -c -200" if task == "embed" else ""
    return f"curl -sN {base_url.rstrip('/')}{path} -H 'Content-Type: application/json' -d '{body}'{cut}"
