"""The wire's limits, with their defaults. Each protects the server from one kind of client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WireLimits:
    header_bytes: int = 65_536  # request line and header fields together
    header_count: int = 256
    body_bytes: int = 64 * 1024 * 1024  # as sent and as decompressed (--http-max-input-size)
    arriving_bytes: int = 2 * 1024**3  # of large and chunked bodies not yet complete, all connections of a listener
    grpc_message_bytes: int = 2**31 - 1  # Triton's: INT32_MAX both ways
    chunk_count: int = 65_536  # non-empty chunks of one chunked body
    header_timeout_s: float = 30.0  # from the first byte of a request to the end of its head
    body_timeout_s: float = 60.0  # longest wait for the next byte of a body
    body_rate: int = 1024  # bytes/s a body must average once body_timeout_s has passed
    idle_timeout_s: float = 300.0  # keep-alive between requests
    write_timeout_s: float = 60.0  # longest a client may refuse to read what it asked for
    linger_timeout_s: float = 2.0  # after an early answer, how long to read on so that the client gets to see it
    connections: int = 4096  # per listener
    stream_bytes: int = 64 * 1024 * 1024  # of responses one request may have waiting for a client that does not read
    streams: int = 1024  # concurrent HTTP/2 streams of one connection

    @property
    def sweep_interval_s(self) -> float:
        """How often time limits are looked at: a quarter of the shortest, between 20 ms and 1 s."""
        shortest = min(self.header_timeout_s, self.body_timeout_s, self.idle_timeout_s, self.write_timeout_s)
        return min(1.0, max(0.02, shortest / 4))
