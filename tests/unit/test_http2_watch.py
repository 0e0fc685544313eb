"""Which streams a sweep of an HTTP/2 connection gives up. The clock is the test's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from doorstep.wire.flow import Outbox
from doorstep.wire.http2_watch import Watch
from doorstep.wire.limits import WireLimits

SECOND = 1_000_000_000


class World:
    """A connection with one open stream, whose client has sent what it wants and is still there."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.out = self.outbox.open(1, 1 << 20, None)
        self.broken_off = 0
        context: Any = SimpleNamespace(limits=WireLimits(write_timeout_s=60), counters=SimpleNamespace(timeouts=0))
        self.context = context
        owner: Any = SimpleNamespace(context=context)
        self.watch = Watch(owner, 0)
        self.exchange: Any = SimpleNamespace(
            out=self.out, ended=False, remote_done=False, patient=True, progress_ns=0, progress_mark=-1
        )
        self.exchange.break_off = self.break_off

    def break_off(self) -> None:
        self.broken_off += 1

    def sweep(self, at_s: int) -> None:
        self.watch._look_at(self.exchange, at_s * SECOND)

    def send(self) -> None:
        self.outbox.pump(1 << 20, [])
        assert self.out.queued == 0


@pytest.fixture
def world() -> World:
    return World()


def test_a_client_that_takes_nothing_is_given_up_after_the_write_timeout(world: World) -> None:
    world.outbox.put(world.out, b"x" * 57)
    for second in (100, 130, 160):
        world.sweep(second)
        assert world.broken_off == 0
    world.sweep(161)
    assert (world.broken_off, world.context.counters.timeouts) == (1, 1)


def test_messages_of_one_size_are_no_standstill(world: World) -> None:
    """A stream of equal messages, each seen by a sweep before it has left."""
    for second in range(100, 1000, 30):
        world.outbox.put(world.out, b"x" * 57)
        world.sweep(second)
        world.send()
    assert world.broken_off == 0


def test_silence_between_equal_messages_is_no_standstill(world: World) -> None:
    for second in range(1000, 2000, 100):
        world.outbox.put(world.out, b"x" * 57)
        world.sweep(second)
        world.send()
        world.sweep(second + 50)
    assert world.broken_off == 0
