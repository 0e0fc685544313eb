"""A load process: sends requests, as fast as they are answered or at a given rate, and writes down how long each took.

Its loop does as little as it can, because what it spends looks like the server's latency. Knows no model.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from multiprocessing.connection import Connection
from typing import Any

from doorstep.cli.bench.arrivals import Arrivals
from doorstep.cli.bench.connection import WRITABLE, LoadConnection, Lost, connect
from doorstep.cli.bench.plan import Plan
from doorstep.cli.bench.poller import Poller
from doorstep.cli.bench.ring import CAPACITY, Ring, Slot

_clock = time.monotonic_ns
COUNT, ERRORS, LATE = int(Slot.COUNT), int(Slot.ERRORS), int(Slot.LATE)
_RETRY_S = 0.1  # between attempts to connect again
_LONGEST_NS = 50_000_000  # without a look at the clock


def main(plan: Plan, result: Connection) -> None:
    """The process's whole life. Sends one dict: what was counted, or {"failure": text}."""
    try:
        loop = LoadLoop(plan)
        result.send(loop.run())
    except OSError as error:
        result.send({"failure": f"cannot reach {plan.host}:{plan.port}: {error.strerror or error}"})
    except KeyboardInterrupt:
        result.send({"failure": "interrupted"})


class LoadLoop:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._errors: Counter[str] = Counter()
        self._ring = Ring(plan.ring)
        self._poller = Poller()
        self._tls = plan.tls.context() if plan.tls is not None else None
        self._table: dict[int, LoadConnection] = {}
        self._dead = 0  # connections that could not be made again yet
        self._retry_ns = 0
        self._bytes = [0, 0]  # in, out, of connections that are gone
        for _ in range(plan.connections):
            self._connect()

    def _connect(self) -> LoadConnection:
        plan = self._plan
        sock = connect(plan.host, plan.port, self._tls, plan.timeout_s)
        made: LoadConnection
        if plan.protocol == "grpc":
            from doorstep.cli.bench.grpc import GrpcConnection
            from doorstep.cli.bench.grpc_wire import request_fields

            fields = request_fields(f"{plan.host}:{plan.port}", plan.method, secure=self._tls is not None)
            made = GrpcConnection(sock, self._poller, self._errors, fields=fields, message=plan.request)
        else:
            from doorstep.cli.bench.http import HttpConnection

            made = HttpConnection(sock, self._poller, self._errors, plan.request)
        self._table[made.fd] = made
        return made

    def run(self) -> dict[str, Any]:
        plan, slots = self._plan, self._ring.slots
        slots[Slot.CONNECTED] = 1
        while not slots[Slot.START_NS]:
            time.sleep(0.001)
        gc.collect()
        gc.disable()  # nothing here makes cycles, and a pause would be counted as the server's
        start = slots[Slot.START_NS]
        warm = start + int(plan.warm_up_s * 1e9)
        end = warm + int(plan.duration_s * 1e9)
        run = self._open_loop if plan.rate else self._closed_loop
        return run(start, warm, end)

    # As fast as answers come

    def _closed_loop(self, start: int, warm: int, end: int) -> dict[str, Any]:
        while _clock() < start:
            pass
        now = _clock()
        for connection in list(self._table.values()):
            for _ in range(self._plan.streams):
                self._start(connection, now)
        self._closed_until(warm)
        before = self._begin_measuring()
        self._closed_until(end)
        return self._result(before, _clock())

    def _closed_until(self, end: int) -> None:
        wait, table, latencies, slots = self._poller.wait_idly, self._table, self._ring.latencies, self._ring.slots
        streams = self._plan.streams
        position = slots[COUNT]
        done: list[int] = []
        now = _clock()
        while now < end:
            for fd, events in wait(0.1):
                connection = table[fd]
                fresh: LoadConnection | None = None
                try:
                    if events & WRITABLE:
                        connection.writable()
                    connection.readable(done)
                except Lost as loss:
                    fresh = self._replace(connection, loss)
                now = _clock()
                for started in done:
                    if started > 0:
                        latencies[position % CAPACITY] = now - started
                        position += 1
                    if fresh is None:
                        self._start(connection, now)
                done.clear()
                if fresh is not None:
                    for _ in range(streams):
                        self._start(fresh, now)
            self._publish(position)
            now = _clock()
            if self._dead:
                for connection in self._revive(now):
                    for _ in range(streams):
                        self._start(connection, now)

    # At a given rate

    def _open_loop(self, start: int, warm: int, end: int) -> dict[str, Any]:
        """Latency counts from when a request was due, so a server that stalls cannot hide what it kept waiting."""
        plan, wait, table = self._plan, self._poller.wait, self._table
        arrivals = Arrivals(plan.rate, plan.arrivals, start, end, seed=plan.seed)
        idle: deque[LoadConnection] = deque(c for c in table.values() for _ in range(plan.streams))
        due: deque[int] = deque()
        done: list[int] = []
        before: dict[str, Any] = {}
        give_up = end + int(plan.timeout_s * 1e9)
        now = _clock()
        while now < give_up:
            if not before and now >= warm:
                before = self._begin_measuring()
            arrivals.take(now, due)
            while due and idle:
                connection = idle.popleft()
                if table.get(connection.fd) is connection:  # else it is gone, and another took its place
                    self._start(connection, due.popleft())
            if arrivals.over and not due and not any(c.in_flight for c in table.values()):
                break  # every request that was due is answered
            self._ring.slots[LATE] = len(due)
            next_ns = now + _LONGEST_NS if arrivals.over or due else arrivals.next_ns
            for fd, events in wait(max(0, min(next_ns - now, _LONGEST_NS)) / 1e9):
                found = table[fd]
                try:
                    if events & WRITABLE:
                        found.writable()
                    found.readable(done)
                    idle.extend([found] * len(done))
                except Lost as loss:
                    fresh = self._replace(found, loss)
                    if fresh is not None:
                        idle.extend([fresh] * plan.streams)
                if done:
                    self._record([started for started in done if started >= warm and before])
                    done.clear()
            now = _clock()
            if self._dead:
                for connection in self._revive(now):
                    idle.extend([connection] * plan.streams)
        unanswered = sum(c.in_flight for c in table.values()) + len(due)
        if unanswered:
            self._errors[f"no answer within {plan.timeout_s:g} s"] += unanswered
        return self._result(before or self._begin_measuring(), end)

    def _record(self, done: list[int]) -> None:
        ring, now = self._ring, _clock()
        position = ring.slots[COUNT]
        for started in done:
            ring.latencies[position % CAPACITY] = now - started
            position += 1
        self._publish(position)

    # Both

    def _start(self, connection: LoadConnection, started_ns: int) -> None:
        try:
            connection.start(started_ns)
        except Lost:
            pass  # reading it will say so, and start anew

    def _publish(self, position: int) -> None:
        slots = self._ring.slots
        slots[COUNT] = position
        if self._errors:
            slots[ERRORS] = self._errors.total()

    def _replace(self, connection: LoadConnection, loss: Lost) -> LoadConnection | None:
        """A connection in place of one that is gone, with whatever was in flight on it; None: not now."""
        if connection.in_flight:
            self._errors[str(loss)] += connection.in_flight
        self._forget(connection)
        try:
            return self._connect()
        except OSError:
            self._dead += 1
            self._retry_ns = _clock() + int(_RETRY_S * 1e9)
            return None

    def _forget(self, connection: LoadConnection) -> None:
        self._table.pop(connection.fd, None)
        self._bytes[0] += connection.bytes_in
        self._bytes[1] += connection.bytes_out
        connection.close()

    def _revive(self, now: int) -> list[LoadConnection]:
        made: list[LoadConnection] = []
        if now < self._retry_ns:
            return made
        self._retry_ns = now + int(_RETRY_S * 1e9)
        while self._dead:
            try:
                made.append(self._connect())
            except OSError as error:
                self._errors[f"cannot connect: {error.strerror or error}"] += 1
                break
            self._dead -= 1
        return made

    def _begin_measuring(self) -> dict[str, Any]:
        slots = self._ring.slots
        self._errors.clear()
        slots[COUNT] = slots[ERRORS] = 0
        slots[Slot.MEASURING] = 1
        return {"cpu": time.process_time(), "bytes": self._bytes_so_far(), "at": _clock()}

    def _bytes_so_far(self) -> tuple[int, int]:
        alive = self._table.values()
        return self._bytes[0] + sum(c.bytes_in for c in alive), self._bytes[1] + sum(c.bytes_out for c in alive)

    def _result(self, before: dict[str, Any], end: int) -> dict[str, Any]:
        slots = self._ring.slots
        slots[Slot.DONE] = 1
        seconds = max(end - before["at"], 1) / 1e9
        incoming, outgoing = self._bytes_so_far()
        used = time.process_time() - before["cpu"]
        for connection in list(self._table.values()):
            self._forget(connection)
        self._poller.close()
        return {
            "seconds": seconds,
            "bytes_in": incoming - before["bytes"][0],
            "bytes_out": outgoing - before["bytes"][1],
            "cpu_share": used / ((_clock() - before["at"]) / 1e9),
            "errors": dict(self._errors),
        }
