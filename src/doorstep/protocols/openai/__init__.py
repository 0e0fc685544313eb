"""OpenAI's API, and Anthropic's messages, for language models and models that make embeddings. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doorstep.protocols.openai.embeddings import Embeddings
from doorstep.protocols.openai.front import Front
from doorstep.protocols.openai.messages import Messages
from doorstep.protocols.openai.models import Models
from doorstep.protocols.openai.rerank import Rerank
from doorstep.protocols.openai.responses import Responses
from doorstep.protocols.openai.tokens import Tokens
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

if TYPE_CHECKING:
    from doorstep.server import InferenceServer


def register(router: Router, server: InferenceServer, limits: WireLimits, *, ping_s: float) -> None:
    """Adds every route."""
    front = Front(server, limits, ping_s=ping_s)
    router.add("POST", "/v1/chat/completions", front.chat)
    router.add("POST", "/v1/completions", front.completions)
    router.add("POST", "/v1/responses", Responses(front).create)
    messages = Messages(front)
    router.add("POST", "/v1/messages", messages.create)
    router.add("POST", "/v1/messages/count_tokens", messages.count)
    embeddings = Embeddings(front)
    router.add("POST", "/v1/embeddings", embeddings.embed)
    models = Models(front)
    router.add("GET", "/v1/models", models.all)
    router.add("GET", "/v1/models/{model}", models.one)
    rerank = Rerank(front, embeddings)
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        router.add("POST", path, rerank.rerank)
    tokens = Tokens(front)
    router.add("POST", "/tokenize", tokens.tokenize)
    router.add("POST", "/detokenize", tokens.detokenize)
