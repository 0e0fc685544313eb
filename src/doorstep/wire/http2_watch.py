"""When an HTTP/2 connection or a stream of it is given up: time limits, floods, keep-alive, age. Knows no frame.

Nothing here looks at a clock while frames come and go: they leave marks, and the sweep compares those with its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from doorstep.wire.http2_dispatch import out_of_time

if TYPE_CHECKING:
    from doorstep.wire.http2 import Http2Connection
    from doorstep.wire.http2_exchange import Http2Exchange

_SECOND = 1_000_000_000


class Watch:
    """Touched only from the event loop. Times are 0 while they do not run."""

    __slots__ = (
        "_aged_ns",
        "_block_ns",
        "_closing_ns",
        "_counted_ns",
        "_idle_ns",
        "_made_ns",
        "_owner",
        "_paused_ns",
        "_ping_ns",
        "_pinged_ns",
        "_strikes",
        "_unsent",
        "answered",
        "control",
        "requests",
        "touched",
    )

    def __init__(self, owner: Http2Connection, now_ns: int) -> None:
        self._owner = owner
        self.touched = True  # something was read since the last sweep
        self.answered = True  # since the client's last PING
        self.control = 0  # frames that cost us and bring nothing, of late
        self.requests = 0  # of late
        self._counted_ns = now_ns  # when these were last halved
        self._made_ns = now_ns
        self._idle_ns = now_ns  # nothing has been read since
        self._block_ns = 0  # a header block or a frame head has begun and not ended
        self._paused_ns = 0  # the client has read nothing of what is unsent
        self._unsent = 0
        self._closing_ns = 0
        self._aged_ns = 0
        self._pinged_ns = 0  # our PING is not answered
        self._ping_ns = 0  # the client's last PING
        self._strikes = 0

    def flooded(self) -> bool:
        """Whether there were more control frames than requests and bytes account for."""
        allowed = self._owner.settings.control_frames
        return self.control > allowed and self.control > allowed + 8 * self.requests + (self._owner.work >> 9)

    def pinged(self, now_ns: int) -> bool:
        """The client sent a PING; whether it was one too many."""
        settings = self._owner.settings
        if self.answered:
            self.answered = False
            self._strikes = 0
        elif now_ns - self._ping_ns < settings.min_ping_interval_s * _SECOND:
            self._strikes += 1
        self._ping_ns = now_ns
        return bool(settings.max_ping_strikes) and self._strikes > settings.max_ping_strikes

    def look(self, now_ns: int, *, in_block: bool, paused: bool) -> None:
        """The sweep."""
        owner = self._owner
        limits = owner.context.limits
        touched, self.touched = self.touched, False
        if touched:
            self._idle_ns = now_ns
        if now_ns - self._counted_ns >= _SECOND:
            self._counted_ns = now_ns  # half is kept: what a byte or a request entails comes a little later
            self.control >>= 1
            self.requests >>= 1
            owner.work >>= 1
        if owner.lost:  # closing, once all is sent
            self._closing_ns = self._closing_ns or now_ns
            if now_ns - self._closing_ns > limits.write_timeout_s * _SECOND:
                owner.abort()
        elif self._never_reads(now_ns, paused):
            self._give_up("the client does not read what it asked for")
        elif self._dawdles(now_ns, in_block):
            self._give_up("a header block was begun and not finished")
        elif self._is_silent(now_ns, touched):
            self._give_up("no answer to our PING")
        else:
            for exchange in list(owner.streams.values()):
                self._look_at(exchange, now_ns)
            if not owner.streams and now_ns - self._idle_ns > limits.idle_timeout_s * _SECOND:
                owner.drain()
            self._grow_old(now_ns)

    def _give_up(self, reason: str) -> None:
        self._owner.context.counters.timeouts += 1
        self._owner.calm(reason)

    def _never_reads(self, now_ns: int, paused: bool) -> bool:
        if not paused:
            self._paused_ns = 0
            return False
        unsent = self._owner.transport.get_write_buffer_size()
        if not self._paused_ns or unsent != self._unsent:
            self._paused_ns, self._unsent = now_ns, unsent
        return now_ns - self._paused_ns > self._owner.context.limits.write_timeout_s * _SECOND

    def _dawdles(self, now_ns: int, in_block: bool) -> bool:
        if not in_block:
            self._block_ns = 0
            return False
        self._block_ns = self._block_ns or now_ns
        return now_ns - self._block_ns > self._owner.context.limits.header_timeout_s * _SECOND

    def _is_silent(self, now_ns: int, touched: bool) -> bool:
        owner = self._owner
        settings = owner.settings
        if touched or not settings.keepalive_time_s:
            self._pinged_ns = 0
        elif self._pinged_ns:
            return now_ns - self._pinged_ns > settings.keepalive_timeout_s * _SECOND
        elif now_ns - self._idle_ns > settings.keepalive_time_s * _SECOND and (
            owner.streams or settings.keepalive_without_calls
        ):
            self._pinged_ns = now_ns
            owner.ping()
        return False

    def _look_at(self, exchange: Http2Exchange, now_ns: int) -> None:
        """Gives up a stream whose client neither sends what it began nor takes what it asked for."""
        limits = self._owner.context.limits
        out = exchange.out
        if out is not None and out.queued:
            if out.sent != exchange.progress_mark:
                exchange.progress_mark, exchange.progress_ns = out.sent, now_ns
            elif now_ns - exchange.progress_ns > limits.write_timeout_s * _SECOND:
                self._owner.context.counters.timeouts += 1
                exchange.break_off()
        elif exchange.ended and not exchange.remote_done:
            exchange.progress_ns = exchange.progress_ns or now_ns
            if now_ns - exchange.progress_ns > limits.linger_timeout_s * _SECOND:
                self._owner.reset_rest(exchange)
        elif exchange.remote_done or exchange.patient:
            exchange.progress_ns = 0
        elif exchange.touched or not exchange.progress_ns or (exchange.paced and exchange.unread):
            exchange.touched, exchange.progress_ns = False, now_ns
        elif now_ns - exchange.progress_ns > limits.body_timeout_s * _SECOND:
            self._owner.context.counters.timeouts += 1
            out_of_time(exchange)

    def _grow_old(self, now_ns: int) -> None:
        owner = self._owner
        settings = owner.settings
        owner.last_call()  # a PING that has not come back by now will not
        if self._aged_ns:
            if settings.max_age_grace_s and now_ns - self._aged_ns > settings.max_age_grace_s * _SECOND:
                owner.close()
        elif settings.max_age_s and now_ns - self._made_ns > settings.max_age_s * _SECOND:
            self._aged_ns = now_ns
            owner.drain()
