"""The benchmark's arithmetic: percentiles, due times, and latencies on their way between processes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np
import pytest

from doorstep.cli.bench.arrivals import Arrivals
from doorstep.cli.bench.histogram import LatencyHistogram
from doorstep.cli.bench.plan import Plan
from doorstep.cli.bench.report import Title, as_json, line, notes, summarise
from doorstep.cli.bench.ring import CAPACITY, Ring, Slot, create_ring_file, remove_ring_file
from doorstep.cli.bench.runner import Moment, Outcome, split

WANTED = (1, 25, 50, 90, 95, 99, 99.9, 100)


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_numpys_to_a_tenth_of_a_per_cent(seed: int) -> None:
    latencies = np.random.default_rng(seed).lognormal(12, 1.5, 20_000).astype(np.int64) + 1_000
    histogram = LatencyHistogram()
    for part in np.array_split(latencies, 7):
        histogram.add(part)
    expected = np.percentile(latencies, WANTED, method="inverted_cdf")
    assert histogram.percentiles_ns(WANTED) == pytest.approx(expected.tolist(), rel=0.001)
    assert histogram.mean_ns == pytest.approx(latencies.mean())
    assert (histogram.min_ns, histogram.max_ns) == (latencies.min(), latencies.max())


def test_merged_histograms_say_what_one_would_have_said() -> None:
    first, second, both = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
    slow, fast = np.full(100, 5_000_000), np.arange(1, 901) * 1_000
    first.add(slow)
    second.add(fast)
    both.add(np.concatenate((slow, fast)))
    first.merge(second)
    assert first.percentiles_ns(WANTED) == both.percentiles_ns(WANTED)
    assert (first.count, first.min_ns, first.max_ns, first.mean_ns) == (1000, 1_000, 5_000_000, both.mean_ns)


def test_an_empty_histogram_has_an_answer_too() -> None:
    histogram = LatencyHistogram()
    histogram.add(np.zeros(0, np.int64))
    histogram.merge(LatencyHistogram())
    assert histogram.percentiles_ns((50, 99)) == [0.0, 0.0]
    assert histogram.mean_ns == 0


def test_extremes_stay_within_the_buckets() -> None:
    histogram = LatencyHistogram()
    histogram.add(np.array([1, 10**15]))
    assert histogram.percentiles_ns((50, 100)) == [pytest.approx(1_000, rel=0.001), pytest.approx(1e12, rel=0.01)]


def due_times(arrivals: Arrivals, until: int, step: int = 1_000_000) -> list[int]:
    due: deque[int] = deque()
    for now in range(0, until + step, step):
        arrivals.take(now, due)
    return list(due)


def test_constant_arrivals_are_evenly_spaced_and_begin_anywhere_in_the_first_gap() -> None:
    due = due_times(Arrivals(1000, "constant", 0, 10**9, seed=3), 2 * 10**9)
    assert set(np.diff(due)) <= {999_999, 1_000_000, 1_000_001}
    assert 0 <= due[0] < 1_000_000
    assert len(due) == 1000


def test_poisson_arrivals_have_the_rate_and_the_spread_that_the_name_promises() -> None:
    due = due_times(Arrivals(2000, "poisson", 0, 20 * 10**9, seed=3), 20 * 10**9)
    gaps = np.diff(due)
    assert len(due) == pytest.approx(40_000, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # an exponential's deviation is its mean
    assert np.mean(gaps > 500_000) == pytest.approx(np.exp(-1), rel=0.03)


def test_every_arrival_is_handed_out_once_however_late_one_looks() -> None:
    due: deque[int] = deque()
    arrivals = Arrivals(1000, "poisson", 0, 10**9, seed=1)
    arrivals.take(10**10, due)
    assert arrivals.over
    seldom = due_times(Arrivals(1000, "poisson", 0, 10**9, seed=1), 10**9, step=700_000_000)
    assert list(due) == seldom
    assert max(due) < 10**9


@pytest.fixture
def ring() -> Iterator[Ring]:
    path = create_ring_file()
    yield Ring(path)
    remove_ring_file(path)


def write(ring: Ring, values: range) -> None:
    for value in values:
        count = ring.slots[Slot.COUNT]
        ring.latencies[count % CAPACITY] = value
        ring.slots[Slot.COUNT] = count + 1


def read(ring: Ring, position: int) -> tuple[list[int], int]:
    pieces, position = ring.since(position)
    return [value for piece in pieces for value in piece], position


def test_the_reader_gets_each_latency_once(ring: Ring) -> None:
    write(ring, range(5))
    assert read(ring, 0) == ([0, 1, 2, 3, 4], 5)
    assert read(ring, 5) == ([], 5)
    write(ring, range(5, 7))
    assert read(ring, 5) == ([5, 6], 7)


def test_a_ring_goes_round(ring: Ring) -> None:
    ring.slots[Slot.COUNT] = CAPACITY - 2
    write(ring, range(5))
    assert read(ring, CAPACITY - 2) == ([0, 1, 2, 3, 4], CAPACITY + 3)


def test_a_writer_that_begins_again_is_followed_from_its_beginning(ring: Ring) -> None:
    write(ring, range(10))
    ring.slots[Slot.COUNT] = 0
    write(ring, range(100, 103))
    assert read(ring, 10) == ([100, 101, 102], 3)


def test_a_reader_that_comes_too_late_gets_what_is_left(ring: Ring) -> None:
    ring.slots[Slot.COUNT] = 3 * CAPACITY
    assert len(read(ring, 5)[0]) == CAPACITY


PLAN = Plan(
    protocol="http", host="h", port=1, tls=None, request=b"", method="", connections=10, streams=1, rate=100.0,
    arrivals="poisson", warm_up_s=1, duration_s=1, timeout_s=1, seed=5, ring="",
)  # fmt: skip


def test_processes_share_connections_and_rate() -> None:
    plans = split(PLAN, 3)
    assert [plan.connections for plan in plans] == [4, 3, 3]
    assert sum(plan.rate for plan in plans) == pytest.approx(100)
    assert len({plan.seed for plan in plans}) == 3
    assert len(split(PLAN, 50)) == 10


def outcome(count: int = 1000, cpu_share: float = 0.3, **errors: int) -> Outcome:
    found = Outcome(errors=Counter(errors), seconds=2.0, bytes_in=4_000_000, bytes_out=2_000_000, cpu_share=cpu_share)
    found.histogram.add(np.full(count, 2_000_000))
    return found


TITLE = Title("mlp", "http://h:1", "HTTP json, 1 connection, closed loop", ["input FP32 [1, 16]"])


def test_a_result_is_in_requests_per_second_milliseconds_and_megabytes() -> None:
    result = summarise(outcome(boom=3), TITLE, 0.0)
    assert result.requests_per_second == 500
    assert result.latency_ms["p99"] == result.latency_ms["max"] == 2.0
    assert (result.sent_mb_per_second, result.received_mb_per_second) == (1.0, 2.0)
    assert (result.error_count, result.errors) == (3, {"boom": 3})
    assert '"requests_per_second": 500.0' in as_json(result)


def test_doubtful_figures_are_pointed_out() -> None:
    assert notes(summarise(outcome(), TITLE, 0.0)) == []
    assert "--processes" in notes(summarise(outcome(cpu_share=0.95), TITLE, 0.0))[0]
    assert "1,000 requests/s were wanted" in notes(summarise(outcome(), TITLE, 1000.0))[0]


def test_the_progress_line_says_rate_latency_and_trouble() -> None:
    histogram = LatencyHistogram()
    histogram.add(np.full(10, 1_500_000))
    moment = Moment("measuring", 3.2, 12_345.6, errors=2, late=7, histogram=histogram)
    shown = line(moment, 1.0, 10.0)
    assert shown == "measuring 3/10 s   12,346 requests/s   p50 1.50 ms   p99 1.50 ms   7 due   2 errors"
