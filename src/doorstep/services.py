"""What a loaded model may ask of the server it runs in, passed down as callables. Knows no model and no protocol.

Ensembles call other models, Python models do too (BLS), and both are in lower rooms than the server. The application
makes one `Services` and hands it to every model it loads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from doorstep.cache.base import ResponseCache
from doorstep.config.host_policy import HostPolicy
from doorstep.config.model import ModelConfig
from doorstep.request import InferenceRequest

Handler = Callable[[str, Any, bytes], Awaitable[Any]]  # (the asking model, what it says as JSON, raw data) → JSON


def _no_server(*_: Any) -> Any:
    raise RuntimeError("this model runs without a server")


@dataclass(frozen=True, slots=True)
class OwnHandlers:
    """Handlers that belong to one loaded model, and what ends with it."""

    handlers: Mapping[str, Handler] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None  # on the loop: the model is unloaded, or did not load


def _no_handlers(_: str) -> OwnHandlers:
    return OwnHandlers()


@dataclass(slots=True)
class Services:
    """All but `handlers` are called on the event loop only. What is None is switched off."""

    infer: Callable[[InferenceRequest], None] = _no_server  # as InferenceServer.infer; raises what that raises
    config: Callable[[str, str], ModelConfig] = _no_server  # (name, version): of a ready version; raises NotFound …
    model: Callable[[str, str], Any] = _no_server  # as config, the Model itself: .infer, .config, .hold and .release
    ready: Callable[[str, str], bool] = _no_server  # (name, version)
    # What model code asks for by name (ServerAccess.ask, .tell): load_model, unload_model, model_ready, metrics …
    # Called on the loop; what one raises goes back to the asker.
    handlers: dict[str, Handler] = field(default_factory=dict)
    own_handlers: Callable[[str], OwnHandlers] = _no_handlers  # more of them, for each model loaded: its metrics
    cache: ResponseCache | None = None  # with --cache-config
    limiter: Any = None  # scheduler.rate_limiter.RateLimiter, with --rate-limit
    host_policies: Mapping[str, HostPolicy] = field(default_factory=dict)  # --host-policy, by name


NO_SERVICES = Services()
