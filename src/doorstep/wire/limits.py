"""The wire's limits, with their defaults. Each protects the server from one kind of client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WireLimits:
    header_bytes: int = 65_536  # request line and header fields together
    header_count: int = 256
    body_bytes: int = 64 * 1024 * 1024  # as sent and as decompressed (--http-max-input-size)
    grpc_message_bytes: int = 2**31 - 1  # Triton's: INT32_MAX both ways
    chunk_count: int = 65_536  # non-empty chunks of one chunked body
    json_depth: int = 100
    header_timeout_s: float = 30.0  # from the first byte of a request to the end of its head
    body_timeout_s: float = 60.0  # longest wait for the next byte of a body
    idle_timeout_s: float = 300.0  # keep-alive between requests
    write_timeout_s: float = 60.0  # longest a client may refuse to read what it asked for
    connections: int = 4096  # per listener
    streams: int = 1024  # concurrent HTTP/2 streams of one connection
