"""TRITONSERVER_DELAY_SCHEDULER and TRITONSERVER_BACKLOG_DELAY_SCHEDULER with sequences, over HTTP and gRPC.

Triton's own sequence tests are written with them: what must be there before the first batch runs, runs in one batch.
The models are those of test_queue_policies.py: they stop in every batch until the test lets them go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_queue_policies import Gated, answers, save

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("held-schedulers")

DIRECT = """
max_batch_size: 2
sequence_batching { direct { } max_sequence_idle_microseconds: 3600000000 }
"""


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def of(sequence: int, flags: str = "") -> dict[str, Any]:
    return {"sequence_id": sequence, "sequence_start": "s" in flags, "sequence_end": "e" in flags}


def test_slots_and_backlog_fill_before_the_first_batch_of_sequences(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "4")
    monkeypatch.setenv("TRITONSERVER_BACKLOG_DELAY_SCHEDULER", "2")
    save(tmp_path, "m", DIRECT)
    with ServerProcess(tmp_path) as server:
        gated = Gated(server, "m", protocol, tmp_path)
        one, two = gated.queued((1, of(1, "s")), (2, of(2, "s")))
        third, fourth = gated.queued((3, of(3, "se")), (11, of(1, "e")))  # no slot is free for sequence 3
        [fifth] = gated.queued((12, of(2, "e")))
        assert gated.is_quiet(), "four are in slots, but only one without"
        sixth = gated.send(4, **of(4, "se"))
        assert gated.seen()["x"] == [1, 2]
        gated.release(3)
        assert [gated.seen()["x"] for _ in range(2)] == [[11, 12], [3, 4]]
        assert answers([one, two, third, fourth, fifth, sixth]) == [10, 20, 30, 110, 120, 40]
        last = gated.send(5, **of(5, "se"))
        assert gated.seen()["x"] == [5], "only the first batch is held back"
        gated.release()
        assert answers([last]) == [50]
        gated.close()


def test_without_a_backlog_to_wait_for_the_slots_are_enough(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "3")
    save(tmp_path, "m", DIRECT)
    with ServerProcess(tmp_path) as server:
        gated = Gated(server, "m", protocol, tmp_path)
        futures = gated.queued((1, of(1, "s")), (11, of(1, "e")))
        assert gated.is_quiet()
        futures.append(gated.send(2, **of(2, "se")))
        assert gated.seen()["x"] == [1, 2]
        gated.release(2)
        assert gated.seen()["x"] == [11]
        assert answers(futures) == [10, 110, 20]
        gated.close()
