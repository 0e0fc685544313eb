"""What a load process is told: where, what bytes, how often, how long. Knows neither socket nor clock."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Tls:
    """For https:// and grpcs:// servers."""

    ca: str = ""  # PEM file; "": the system's
    verify: bool = True
    http2: bool = False

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca or None)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2" if self.http2 else "http/1.1"])
        return context


@dataclass(frozen=True, slots=True)
class Plan:
    """One load process's share. Sent to it pickled, so it holds plain data only."""

    protocol: Literal["http", "grpc"]
    host: str
    port: int
    tls: Tls | None
    request: bytes  # HTTP: the whole request; gRPC: the framed message
    method: str  # gRPC only
    connections: int
    streams: int  # requests in flight per connection; 1 for HTTP
    rate: float  # requests per second, started whether or not others are answered; 0: as fast as answers come
    arrivals: Literal["poisson", "constant"]
    warm_up_s: float
    duration_s: float
    timeout_s: float
    seed: int
    ring: str  # the file that the latencies go to
