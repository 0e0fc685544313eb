"""Which endpoint answers a method and a path. Knows no connection and no model.

Paths are matched as they were sent, percent-encoding and all, so that no other spelling of a path reaches an endpoint
past a gate that knows only one; what stands in the place of a `{name}` is decoded afterwards and is never a path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from inspect import iscoroutinefunction
from typing import Any
from urllib.parse import unquote_to_bytes

from doorstep.wire.answers import JSON, error_body, spawn
from doorstep.wire.compression import ANY_CODING, ContentCodings
from doorstep.wire.exchange import Endpoint, Exchange

_CACHED_MATCHES = 4096
_CACHED_PATH_LENGTH = 512  # longer paths are matched every time: the cache stays below a few MB
_SEGMENTS = {"version": "([0-9]+)"}  # every other {name} is one segment of anything
_TEXTS = {404: "Not Found", 405: "Method Not Allowed"}


class Match:
    """What the router found. `endpoint` is never a coroutine function."""

    __slots__ = ("codings", "endpoint", "params", "route", "streaming")

    def __init__(
        self,
        endpoint: Endpoint,
        params: Mapping[str, str],
        route: str,
        *,
        streaming: bool = False,
        codings: ContentCodings | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.params = params  # shared between requests: not to be changed
        self.route = route  # the pattern; "" where nothing matched
        self.streaming = streaming  # the endpoint takes the body in pieces, undecoded
        self.codings = codings  # which content-encodings the wire undoes; None: the body is handed over as it came

    def __repr__(self) -> str:
        return f"<Match {self.route or 'none'} {dict(self.params)}>"


class _Route:
    __slots__ = ("methods", "names", "pattern", "regex")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.names = re.findall(r"\{(\w+)\}", pattern)
        parts = re.split(r"\{(\w+)\}", pattern)
        literals, names = parts[::2], parts[1::2]
        regex = re.escape(literals[0])
        for name, literal in zip(names, literals[1:], strict=True):
            regex += _SEGMENTS.get(name, "([^/]+)") + re.escape(literal)
        self.regex = re.compile(regex)
        self.methods: dict[str, tuple[Endpoint, bool, ContentCodings | None]] = {}


class Router:
    """Routes are added at start-up; touched only from the event loop after that."""

    def __init__(self) -> None:
        self._static: dict[str, _Route] = {}
        self._routes: dict[str, _Route] = {}
        self._cache: dict[tuple[str, str], Match] = {}

    def add(
        self,
        method: str,
        pattern: str,
        endpoint: Endpoint,
        *,
        streaming: bool = False,
        codings: ContentCodings | None = ANY_CODING,
    ) -> None:
        """Patterns without a {name} come before those with one; among the latter the first added wins.

        {version} is digits only, any other {name} one non-empty segment. HEAD is answered as GET, without the body."""
        table = self._routes if "{" in pattern else self._static
        route = table.get(pattern)
        if route is None:
            route = table[pattern] = _Route(pattern)
        if method in route.methods:
            raise ValueError(f"{method} {pattern} has an endpoint already")
        # partial and callable objects hide the coroutine function they call
        plain = not (iscoroutinefunction(endpoint) or iscoroutinefunction(getattr(endpoint, "__call__", None)))  # noqa: B004
        route.methods[method] = (endpoint if plain else spawn(endpoint), streaming, codings)
        self._cache.clear()

    def find(self, method: str, raw_path: str) -> Match:
        """The endpoint for a path without its query. Where there is none, the match's endpoint answers 404 or 405."""
        key = (method, raw_path)
        match = self._cache.get(key)
        if match is None:
            match = self._search(method, raw_path)
            if match.route and len(raw_path) <= _CACHED_PATH_LENGTH:
                if len(self._cache) >= _CACHED_MATCHES:
                    self._cache.clear()
                self._cache[key] = match
        return match

    def _search(self, method: str, raw_path: str) -> Match:
        allowed: set[str] = set()
        static = self._static.get(raw_path)
        for route in [static] if static is not None else self._routes.values():
            found = route.regex.fullmatch(raw_path)
            if found is None:
                continue
            entry = route.methods.get(method)
            if entry is None and method == "HEAD":
                entry = route.methods.get("GET")
            if entry is not None:
                endpoint, streaming, codings = entry
                params = dict(zip(route.names, map(_decode, found.groups()), strict=True))
                return Match(endpoint, params, route.pattern, streaming=streaming, codings=codings)
            allowed.update(route.methods)
        if allowed:
            return Match(partial(self.fallback, 405, tuple(sorted(allowed))), {}, "")
        return Match(partial(self.fallback, 404, ()), {}, "")

    def fallback(self, status: int, allowed: tuple[str, ...], exchange: Exchange) -> None:
        """Answers where no endpoint does; a listener may put its own function in this one's place."""
        headers = JSON if not allowed else (*JSON, (b"allow", ", ".join(allowed).encode()))
        exchange.respond(status, headers, error_body(_TEXTS[status]))

    def __repr__(self) -> str:
        return f"<Router {len(self._static) + len(self._routes)} patterns>"


def _decode(segment: Any) -> str:
    return unquote_to_bytes(segment.encode("latin-1", "replace")).decode("utf-8", "replace")
