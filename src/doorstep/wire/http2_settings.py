"""How HTTP/2 connections are tuned and when they are given up, with the defaults. Knows no frame."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Http2Settings:
    """Windows and frames are large because tensors are: a 600 KB message then costs one frame and no waiting."""

    stream_window: int = 8 * MIB  # bytes a client may send on a stream before it hears from us
    connection_window: int = 64 * MIB  # the same for all its streams together
    frame_bytes: int = 4 * MIB  # SETTINGS_MAX_FRAME_SIZE: 16,384 to 16,777,215
    reset_burst: int = 1000  # RST_STREAM frames a client may send at once (CVE-2023-44487) …
    reset_rate: int = 100  # … and per second after that
    control_frames: int = (
        2000  # PING, SETTINGS, WINDOW_UPDATE, empty DATA … in about a second, on top of what requests need
    )
    continuations: int = 16  # CONTINUATION frames of one header block
    keepalive_time_s: float = 7200.0  # PING a client that has been silent for so long; 0: never
    keepalive_timeout_s: float = 20.0  # and close the connection when it stays silent for so long after it
    keepalive_without_calls: bool = False  # also where no request is in flight
    max_age_s: float = 0.0  # GOAWAY for connections older than this; 0: never
    max_age_grace_s: float = 0.0  # and close them this much later, requests or not; 0: when they have finished
    min_ping_interval_s: float = 300.0  # a client's PINGs closer than this, with nothing sent between, are strikes
    max_ping_strikes: int = 0  # strikes before GOAWAY too_many_pings; 0: any number (control_frames still bounds them)
