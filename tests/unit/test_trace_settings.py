"""Which requests are traced: options, sampling, and settings that fall back on one another, as Triton's."""

from __future__ import annotations

from typing import Any

import pytest

from doorstep.config.trace_options import TraceOptions, parse_trace_options
from doorstep.errors import InvalidArgument
from doorstep.observability.trace_settings import Setting, TraceSettings
from doorstep.observability.w3c import parse_context
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.trace import HTTP, Record, Tracer

LEVEL = frozenset({"TIMESTAMPS"})
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01".encode()


class Sink:
    def __init__(self) -> None:
        self.records: list[tuple[Record, bool]] = []
        self.settled: list[Setting] = []

    def write(self, record: Record, ends_file: bool) -> None:
        self.records.append((record, ends_file))

    def settle(self, setting: Setting) -> None:
        self.settled.append(setting)


class Nobody:
    def send(self, response: InferenceResponse, final: bool) -> None:
        pass


class Made:
    """Settings with what they tell and write."""

    def __init__(self, **options: Any) -> None:
        options = {"level": LEVEL, "rate": 1, "file": "t", **options}
        self.sink = Sink()
        self.tracer: Tracer | None = None
        self.settings = TraceSettings(TraceOptions(**options), self.sink, self.tell)

    def tell(self, tracer: Tracer | None) -> None:
        self.tracer = tracer

    def takes(self, model: str = "m", **headers: bytes) -> bool:
        """Whether the next request is traced; it ends at once."""
        if self.tracer is None:
            return False
        request = InferenceRequest(model, {}, Nobody())
        self.tracer.begin(request, HTTP, {k.encode(): v for k, v in headers.items()})
        traced = request.trace is not None
        request.sender.send(InferenceResponse(model, "1", ""), True)
        return traced

    def shown(self, model: str = "") -> dict[str, str]:
        return {name: ",".join(values) for name, values in self.settings.describe(model).items()}


def options(*texts: str, **old: list[Any]) -> TraceOptions:
    given = {"trace-config": list(texts), **{f"trace-{name.replace('_', '-')}": value for name, value in old.items()}}
    return parse_trace_options({name: values for name, values in given.items() if values}, [])


def test_options_are_read_as_triton_reads_them() -> None:
    assert options() == TraceOptions()
    found = options(
        "level=timestamps", "level=TENSORS", "rate=5", "count=7", "triton,file=/x", "triton,log-frequency=3"
    )
    assert found == TraceOptions(frozenset({"TIMESTAMPS", "TENSORS"}), 5, 7, "triton", "/x", 3)
    assert options("level=TIMESTAMPS", "level=OFF").level == frozenset()  # off wins
    assert options("level=MAX").level == LEVEL


def test_deprecated_options_count_where_the_new_ones_say_nothing() -> None:
    found = options("rate=5", rate=[9], count=[8], file=["/old"], level=["TIMESTAMPS"], log_frequency=[2])
    assert found == TraceOptions(LEVEL, 5, 8, "triton", "/old", 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x", "--trace-config option format is '<trace mode>,<setting>=<value>'. Got x"),
        (",rate=1", "No trace mode specified"),
        ("rate=", "option format"),
        ("zipkin,url=x", 'invalid value for trace mode option: zipkin. Available options are "triton" and "opentel'),
        ("mode=zipkin", "invalid value for trace mode option: zipkin"),
        ("level=LOUD", "--trace-config=level=LOUD: invalid value for trace level option: LOUD"),
        ("rate=often", "--trace-config=rate=often: expected a whole number from 0"),
        ("rate=-1", "--trace-config=rate=-1"),
        ("count=-2", "--trace-config=count=-2"),
        ("triton,log-frequency=x", "--trace-config=triton,log-frequency=x"),
    ],
)
def test_options_that_are_wrong_are_named(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint.replace("(", r"\(")):
        options(text)


def test_span_processor_options_are_numbers_with_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "77")
    found = dict(options("mode=opentelemetry", "opentelemetry,bsp_max_queue_size=9").exporter)
    assert found == {"bsp_max_queue_size": "9", "bsp_schedule_delay": "77", "bsp_max_export_batch_size": "512"}
    with pytest.raises(InvalidArgument, match="opentelemetry,bsp_max_queue_size=x"):
        options("mode=opentelemetry", "opentelemetry,bsp_max_queue_size=x")


def test_nobody_is_asked_while_nothing_can_be_traced() -> None:
    assert Made(level=frozenset()).tracer is None
    assert Made(file="").tracer is None
    assert Made(rate=0).tracer is None
    made = Made(level=frozenset())
    made.settings.update("m", {"level": LEVEL})
    assert made.tracer is not None
    made.settings.update("m", {"level": None})
    assert made.tracer is None


def test_every_nth_request_is_taken_until_the_count_is_spent() -> None:
    made = Made(rate=3, count=2)
    assert [made.takes() for _ in range(6)] == [False, False, True] * 2
    assert made.tracer is None
    assert made.shown()["trace_count"] == "0"
    assert len(made.sink.records) == 2


def test_the_last_of_a_count_ends_its_file() -> None:
    made = Made(count=2)
    assert [made.takes() for _ in range(3)] == [True, True, False]
    assert [ends for _, ends in made.sink.records] == [False, True]


def test_a_models_own_fields_win_and_the_rest_follows_the_setting_of_all() -> None:
    made = Made()
    made.settings.update("m", {"rate": 5})
    made.settings.update("", {"rate": 7, "count": 9})
    assert (made.shown("m")["trace_rate"], made.shown("m")["trace_count"]) == ("5", "9")
    assert made.shown("other")["trace_rate"] == "7"
    made.settings.update("m", {"rate": None})
    assert made.shown("m") == made.shown()
    made.settings.update("", {"rate": None, "count": None})
    assert (made.shown()["trace_rate"], made.shown()["trace_count"]) == ("1", "-1")


def test_what_is_left_of_a_count_stays_when_something_else_changes() -> None:
    made = Made()
    made.settings.update("m", {"count": 3})
    assert made.takes()
    made.settings.update("m", {"log_frequency": 4})
    made.settings.update("", {"log_frequency": 5})
    assert (made.shown("m")["trace_count"], made.shown("m")["log_frequency"]) == ("2", "4")


def test_a_setting_under_which_nothing_could_be_traced_is_refused_and_changes_nothing() -> None:
    made = Made()
    before = made.shown()
    with pytest.raises(
        InvalidArgument, match=r"^Attempting to set invalid trace setting :sample rate must be non-zero$"
    ):
        made.settings.update("", {"rate": 0})
    with pytest.raises(InvalidArgument, match="trace file name is not given"):
        Made(file="", level=frozenset()).settings.update("", {"level": LEVEL})
    assert made.shown() == before
    made.settings.update("", {"rate": 0, "level": frozenset()})  # what is off may be anything


def test_a_setting_that_is_replaced_is_settled() -> None:
    made = Made()
    made.settings.update("m", {"rate": 2})
    made.settings.update("m", {"rate": 3})
    made.settings.update("", {"rate": 4})
    assert [setting.values.rate for setting in made.sink.settled] == [2, 1, 3]


def test_a_callers_context_is_followed_whatever_the_rate_and_the_count() -> None:
    made = Made(mode="opentelemetry", rate=0)
    assert not made.takes()
    assert made.takes(traceparent=PARENT)
    made = Made(mode="opentelemetry", count=0)
    assert made.takes(traceparent=PARENT)
    assert not made.takes()
    assert not Made(mode="opentelemetry", level=frozenset()).takes(traceparent=PARENT)


@pytest.mark.parametrize(
    "value",
    [
        b"", b"00", PARENT[:-1], PARENT + b"0", PARENT.upper(), b"ff" + PARENT[2:], PARENT + b"-more",
        b"00-" + b"0" * 32 + PARENT[35:], PARENT[:36] + b"0" * 16 + b"-01",
    ],
)  # fmt: skip
def test_a_context_that_the_standard_does_not_allow_is_none(value: bytes) -> None:
    assert parse_context({b"traceparent": value}) is None


def test_a_context_of_a_later_version_is_read() -> None:
    found = parse_context({b"traceparent": b"01" + PARENT[2:] + b"-more", b"tracestate": b"a=1"})
    assert found is not None
    assert (found.trace_id, found.tracestate) == (TRACE_ID, "a=1")
