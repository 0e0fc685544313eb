"""Work beside the event loop: what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from doorstep.protocols.kserve.aside import Outcome, aside


class Large:
    """Stands for a million numbers that were read."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_what_a_failed_reading_had_read_is_gone_with_its_answer() -> None:
    read: list[weakref.ref[Large]] = []
    told: list[str] = []

    def work() -> None:
        large = Large()
        read.append(weakref.ref(large))
        raise ValueError("no document")

    async def main() -> None:
        ended = asyncio.get_running_loop().create_future()

        def then(done: Outcome) -> None:
            try:
                done.result()
            except ValueError as error:
                told.append(str(error))
            ended.set_result(None)

        aside(then, work)
        await ended
        await asyncio.sleep(0)  # the loop lets go of the finished call

    asyncio.run(main())
    assert told == ["no document"]
    assert read[0]() is None
