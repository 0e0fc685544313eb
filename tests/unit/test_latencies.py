"""Quantiles of the last minute: right within what is promised, forgotten in time, bounded in memory."""

from __future__ import annotations

import math
import random

import pytest

from doorstep.config.metrics_options import QUANTILES, MetricsOptions, first_response_buckets, parse_metrics_options
from doorstep.errors import InvalidArgument
from doorstep.latencies import Latencies, Quantiles
from doorstep.proto import ModelConfig

SECOND = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def test_quantiles_are_those_of_the_values_within_two_in_a_thousand() -> None:
    rng = random.Random(7)
    values = [int(rng.lognormvariate(7, 2)) for _ in range(20_000)]
    found = Quantiles(Clock())
    for value in values:
        found.observe(value)
    ordered = sorted(values)
    wanted = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
    for quantile, value in zip(wanted, found.at(wanted), strict=True):
        true = ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]
        assert true * 0.998 <= value <= true
    assert (found.count, found.total) == (len(values), sum(values))


def test_small_values_are_exact_and_nothing_is_no_number() -> None:
    found = Quantiles(Clock())
    assert all(math.isnan(value) for value in found.at([0.5, 0.9]))
    for value in (3, 1, 2):
        found.observe(value)
    assert found.at([0.5, 1]) == [2, 3]


def test_what_is_older_than_a_minute_is_forgotten_but_counted() -> None:
    clock = Clock()
    found = Quantiles(clock)
    found.observe(100)
    clock.now = 47 * SECOND
    found.observe(1)
    assert found.at([1]) == [100]
    clock.now = 61 * SECOND
    assert found.at([1]) == [1]  # without another observation
    found.observe(2)
    assert found.at([1]) == [2]
    clock.now = 10_000 * SECOND
    assert math.isnan(found.at([1])[0])
    found.observe(5)
    assert found.at([0, 1]) == [5, 5]
    assert (found.count, found.total) == (4, 108)


def test_memory_is_bounded_whatever_comes() -> None:
    found = Quantiles(Clock())
    for value in range(0, 60_000_000, 601):
        found.observe(value)
    assert sum(map(len, found._slices)) < 10_000


def test_a_switch_that_is_off_costs_no_observation() -> None:
    only_first = Latencies((), (100, 500))
    only_first.record_successes([(1_000_000, 1000)], 1, 1, 1)
    assert only_first.request.count == 0
    only_first.first_response(250_000_000)
    assert only_first.first_response_ms is not None
    assert only_first.first_response_ms.counts == [0, 1, 0]
    only_summaries = Latencies((0.5,), ())
    only_summaries.first_response(1)
    only_summaries.record_successes([(9_000_000, 4000)], 1000, 2000, 3000)
    observed = (only_summaries.request, only_summaries.queue, only_summaries.compute_input)
    assert [one.total for one in observed] == [9000, 4, 1]


def test_the_options_are_tritons() -> None:
    notes: list[str] = []
    assert parse_metrics_options([], notes) == MetricsOptions()
    assert MetricsOptions().summary_quantiles == QUANTILES
    given = ["counter_latencies=false", "summary_latencies=true", "histogram_latencies=true"]
    found = parse_metrics_options([*given, "summary_quantiles=0.5:0.05,0.25:0.1", "what=1"], notes)
    assert found == MetricsOptions(False, True, True, ((0.5, 0.05), (0.25, 0.1)))
    assert notes == ["--metrics-config=what=1 has no effect: there is no such setting"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x", "--metrics-config option format is <setting>=<value>. Got x"),
        ("=x", "option format"),
        ("x=", "option format"),
        ("a,b=c", "option format"),
        ("summary_latencies=yes", "expected true or false"),
        ("summary_quantiles=0.5", r"Invalid option: \[0.5\]"),
        ("summary_quantiles=0.5:0.1,x:y", r"Invalid option: \[x:y\]"),
        ("summary_quantiles=2:0.1", r"Invalid option: \[2:0.1\]"),
    ],
)
def test_options_that_are_wrong_say_what_was_expected(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        parse_metrics_options([text], [])


def test_a_model_sets_the_buckets_of_its_first_responses() -> None:
    config = ModelConfig()
    assert first_response_buckets(config) == (100, 500, 2000, 5000)
    control = config.model_metrics.metric_control.add()
    control.metric_identifier.family = "nv_inference_first_response_histogram_ms"
    control.histogram_options.buckets.extend([1, 2.5])
    assert first_response_buckets(config) == (1, 2.5)
