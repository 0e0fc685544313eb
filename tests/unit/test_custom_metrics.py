"""Metrics of models' own: Triton's rules, one number for what two models share, and nothing left of who is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from doorstep.errors import DoorstepError
from doorstep.observability import custom_metrics
from doorstep.observability.custom_metrics import CustomMetrics
from doorstep.services import OwnHandlers


def ask(own: OwnHandlers, what: str, **payload: Any) -> Any:
    return asyncio.run(own.handlers[what]("model", payload, b""))  # type: ignore[arg-type]


def family(own: OwnHandlers, name: str = "things", kind: str = "counter", description: str = "How many") -> int:
    return int(ask(own, "metric_family", name=name, kind=kind, description=description)["id"])


def metric(own: OwnHandlers, of: int, buckets: Any = None, **labels: Any) -> int:
    return int(ask(own, "metric", family=of, labels=labels, buckets=buckets)["id"])


def update(own: OwnHandlers, id: int, op: str, value: float) -> None:
    ask(own, "metric_update", id=id, op=op, value=value)


def samples(metrics: CustomMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(s.labels.items())): s.value for f in metrics.families() for s in f.samples}


@pytest.fixture
def metrics() -> CustomMetrics:
    return CustomMetrics()


def test_a_counter_counts_a_gauge_is_set_and_a_histogram_observes(metrics: CustomMetrics) -> None:
    own = metrics.own("m")
    counter = metric(own, family(own), kind="a")
    gauge = metric(own, family(own, "level", "gauge"))
    histogram = metric(own, family(own, "sizes", "histogram"), [1, 10])
    update(own, counter, "increment", 2)
    update(own, counter, "increment", 0.5)
    update(own, gauge, "set", 7)
    update(own, gauge, "increment", -3)
    for value in (1, 2, 100):
        update(own, histogram, "observe", value)
    assert ask(own, "metric_value", id=counter) == {"value": 2.5}
    assert ask(own, "metric_value", id=gauge) == {"value": 4.0}
    assert samples(metrics) == {
        ("things", (("kind", "a"),)): 2.5,
        ("level", ()): 4.0,
        ("sizes_bucket", (("le", "1"),)): 1,
        ("sizes_bucket", (("le", "10"),)): 2,
        ("sizes_bucket", (("le", "+Inf"),)): 3,
        ("sizes_count", ()): 3,
        ("sizes_sum", ()): 103.0,
    }


# (kind, operation, value, what Triton says: core, metric_family.cc)
WRONG_UPDATES = [
    ("counter", "set", 1, "TRITONSERVER_METRIC_KIND_COUNTER does not support Set"),
    ("counter", "observe", 1, "TRITONSERVER_METRIC_KIND_COUNTER does not support Observe"),
    ("counter", "increment", -1,
     "TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically by non-negative values."),
    ("gauge", "observe", 1, "TRITONSERVER_METRIC_KIND_GAUGE does not support Observe"),
    ("histogram", "set", 1, "TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Set"),
    ("histogram", "increment", 1, "TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Increment"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "operation", "value", "text"), WRONG_UPDATES)
def test_what_a_kind_cannot_do_is_refused_and_changes_nothing(
    metrics: CustomMetrics, kind: str, operation: str, value: float, text: str
) -> None:
    own = metrics.own("m")
    id = metric(own, family(own, kind=kind), [1.0] if kind == "histogram" else ())
    before = samples(metrics)
    with pytest.raises(DoorstepError) as raised:
        update(own, id, operation, value)
    assert raised.value.message == text
    assert samples(metrics) == before


def test_a_histogram_has_no_single_value(metrics: CustomMetrics) -> None:
    own = metrics.own("m")
    with pytest.raises(DoorstepError, match="TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Value"):
        ask(own, "metric_value", id=metric(own, family(own, kind="histogram"), [1]))


@pytest.mark.parametrize("name", ["", "1a", "a-b", "__a", "a b", "ü"])
def test_names_are_prometheus_names(metrics: CustomMetrics, name: str) -> None:
    with pytest.raises(DoorstepError, match="Invalid metric name"):
        family(metrics.own("m"), name)


@pytest.mark.parametrize("name", ["nv_inference_count", "doorstep_queue_depth", "process_open_fds", "nv_cache_util"])
def test_names_of_the_server_are_not_for_models(metrics: CustomMetrics, name: str) -> None:
    with pytest.raises(DoorstepError, match="Family name already exists"):
        family(metrics.own("m"), name)


def test_a_name_has_one_kind(metrics: CustomMetrics) -> None:
    family(metrics.own("a"), "x", "counter")
    with pytest.raises(DoorstepError, match="Family name already exists with different type"):
        family(metrics.own("b"), "x", "gauge")
    with pytest.raises(DoorstepError, match="Unsupported kind"):
        family(metrics.own("b"), "y", "summary")


def test_labels_and_buckets_are_checked(metrics: CustomMetrics) -> None:
    own = metrics.own("m")
    counter, histogram = family(own), family(own, "sizes", "histogram")
    for labels, text in (
        ({"a-b": "x"}, "Invalid label name"),
        ({"__a": "x"}, "Invalid label name"),
        ({"a": 1}, "must have a type of TRITONSERVER_PARAMETER_STRING"),
    ):
        with pytest.raises(DoorstepError, match=text):
            metric(own, counter, **labels)
    with pytest.raises(DoorstepError, match="Invalid label name"):
        metric(own, histogram, [1], le="x")
    with pytest.raises(DoorstepError, match="Unexpected args found in counter Metric constructor"):
        metric(own, counter, [1])
    with pytest.raises(DoorstepError, match="Bucket boundaries not found in Metric args"):
        metric(own, histogram)
    for bounds in ([2, 1], [1, 1], [float("nan"), 1]):
        with pytest.raises(DoorstepError, match="Bucket Boundaries must be strictly sorted"):
            metric(own, histogram, bounds)
    assert samples(metrics) == {}


def test_a_histogram_may_have_no_bound_and_bounds_are_written_as_in_triton(metrics: CustomMetrics) -> None:
    own = metrics.own("m")
    update(own, metric(own, family(own, "plain", "histogram"), []), "observe", 3)
    metric(own, family(own, "sizes", "histogram"), [0.1, 2.5, 1e6, 1e17])
    bounds = {name: [le for (n, ((_, le),)) in [k for k in samples(metrics) if k[1]] if n == f"{name}_bucket"]
              for name in ("plain", "sizes")}  # fmt: skip
    assert bounds == {"plain": ["+Inf"], "sizes": ["0.1", "2.5", "1000000", "1e+17", "+Inf"]}
    assert samples(metrics)["plain_sum", ()] == 3


def test_two_models_share_a_metric_until_both_are_gone(metrics: CustomMetrics) -> None:
    first, second = metrics.own("a"), metrics.own("b")
    ids = [(own, metric(own, family(own), x="1")) for own in (first, second)]
    for own, id in ids:
        update(own, id, "increment", 1)
    key = ("things", (("x", "1"),))
    assert samples(metrics) == {key: 2}
    first.close()
    assert samples(metrics) == {key: 2}
    second.close()
    assert samples(metrics) == {}
    assert metrics._families == {}


def test_a_value_survives_a_worker_that_makes_its_metrics_again(metrics: CustomMetrics) -> None:
    own = metrics.own("m")
    update(own, metric(own, family(own)), "increment", 5)
    again = metric(own, family(own))  # the next process of the same model
    update(own, again, "increment", 1)
    assert samples(metrics) == {("things", ()): 6}
    own.close()
    assert metrics._families == {}


def test_a_family_takes_its_metrics_with_it(metrics: CustomMetrics) -> None:
    own = metrics.own("m")
    of = family(own)
    id = metric(own, of)
    ask(own, "metric_forget", id=of)
    ask(own, "metric_forget", id=of)
    assert samples(metrics) == {}
    for operation in (lambda: update(own, id, "increment", 1), lambda: ask(own, "metric_value", id=id)):
        with pytest.raises(DoorstepError, match="Metric has been invalidated"):
            operation()
    with pytest.raises(DoorstepError, match="'MetricFamily' has been deleted"):
        metric(own, of)


def test_one_model_cannot_reach_anothers_metrics(metrics: CustomMetrics) -> None:
    first, second = metrics.own("a"), metrics.own("b")
    id = metric(first, family(first))
    with pytest.raises(DoorstepError, match="invalidated"):
        update(second, id, "increment", 1)


def test_there_is_a_most(metrics: CustomMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_metrics, "MOST_METRICS", 3)
    own = metrics.own("m")
    of = family(own)
    ids = [metric(own, of, x=str(number)) for number in range(3)]
    with pytest.raises(DoorstepError, match="3 custom metrics already"):
        metric(own, of, x="3")
    ask(own, "metric_forget", id=ids[0])
    metric(own, of, x="3")
    own.close()
    assert metrics._count == 0
