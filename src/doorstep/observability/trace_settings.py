"""Which requests are traced, and how: a setting for all, and for single models what they have of their own.

Decides; writes no trace. Rules are Triton's (server, tracer.cc): a field that a model has not set is the global one's,
a global field that was cleared is the command line's, and a setting that changes begins to count anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from doorstep.config.trace_options import OPENTELEMETRY, TENSORS, TIMESTAMPS, TRITON, TraceOptions
from doorstep.errors import InvalidArgument
from doorstep.observability.w3c import parse_context
from doorstep.request import InferenceRequest
from doorstep.trace import Front, Record, SpanContext, Trace, Tracer


@dataclass(frozen=True, slots=True)
class Values:
    """The fields of a setting."""

    level: frozenset[str]
    rate: int
    count: int
    log_frequency: int


class Setting:
    """A setting in force, and how far it has counted. Touched only from the event loop."""

    __slots__ = ("collected", "count", "file", "mode", "sampled", "values")

    def __init__(self, values: Values, mode: str, file: str) -> None:
        self.values = values
        self.mode = mode
        self.file = file
        self.count = values.count  # traces still to take; -1: any number
        self.sampled = 0  # requests seen
        self.collected = 0  # traces that came to their end

    @property
    def flaw(self) -> str:
        """Why nothing can be traced under this setting; "" where something can."""
        if not self.values.level:
            return "tracing is disabled"
        if self.values.rate == 0:
            return "sample rate must be non-zero"
        if self.mode == TRITON and not self.file:
            return "trace file name is not given"
        return ""

    @property
    def active(self) -> bool:
        """Whether a request needs to be looked at."""
        if self.mode == OPENTELEMETRY:  # whoever sends a trace context is traced
            return bool(self.values.level)
        return not self.flaw and self.count != 0

    def samples(self, *, forced: bool) -> bool:
        """Counts a request; true if it is to be traced. `forced`: its caller traces it."""
        rate = self.values.rate
        hit = False
        if rate:
            if (self.flaw or self.count == 0) and not forced:
                return False
            self.sampled += 1
            hit = self.sampled % rate == 0
            if hit and self.count > 0:
                self.count -= 1
            elif hit and self.count == 0:
                hit = False
        return hit or forced


class Sink(Protocol):
    """Where finished records go."""

    def write(self, record: Record, ends_file: bool) -> None:
        """Takes it, and returns at once. `ends_file`: the last that its setting wanted."""

    def settle(self, setting: Setting) -> None:
        """A setting is no longer in force: what was gathered under it is to be written."""


class TraceSettings:
    """See the module. Touched only from the event loop."""

    def __init__(
        self, options: TraceOptions, sink: Sink, on_change: Callable[[Tracer | None], None] = lambda _: None
    ) -> None:
        """`on_change` is told who is to be asked about requests: None while there is nothing to trace."""
        self._default = Values(options.level, options.rate, options.count, options.log_frequency)
        self._mode = options.mode
        self._file = options.file
        self._exporter = options.exporter
        self._sink = sink
        self._on_change = on_change
        self._own: dict[str, dict[str, Any]] = {"": {}}  # model, "" for all → field → its own value
        self._global = Setting(self._default, options.mode, options.file)
        self._models: dict[str, Setting] = {}
        self._tell()

    # Tracer

    def begin(self, request: InferenceRequest, front: Front, headers: Mapping[bytes, bytes]) -> None:
        setting = self._models.get(request.model_name, self._global) if self._models else self._global
        spans = setting.mode == OPENTELEMETRY
        if not setting.active:
            return
        context = parse_context(headers) if spans else None
        if not setting.samples(forced=context is not None):
            return
        level = setting.values.level
        record = Record(
            self._finished,
            setting,
            front,
            timestamps=TIMESTAMPS in level,
            tensors=TENSORS in level and not spans,
            span=(context or SpanContext()) if spans else None,
        )
        Trace.begun(record, request)
        if setting.count == 0:
            self._tell()

    def _finished(self, record: Record) -> None:
        setting: Setting = record.setting
        setting.collected += 1
        self._sink.write(record, setting.count == 0 and setting.collected == setting.sampled)

    def _tell(self) -> None:
        active = self._global.active or any(setting.active for setting in self._models.values())
        self._on_change(self if active else None)

    # What the settings endpoints ask

    def update(self, model: str, changes: Mapping[str, Any]) -> None:
        """`model` "" is the global setting. None as a change clears the field. Raises InvalidArgument."""
        own = {**self._left(model), **changes}
        own = {name: value for name, value in own.items() if value is not None}
        fallback = self._global.values if model else self._default
        made = Setting(replace(fallback, **own), self._mode, self._file)
        if made.flaw and made.values.level:
            raise InvalidArgument(f"Attempting to set invalid trace setting :{made.flaw}")
        models = dict(self._models)
        if model and not own:
            self._own.pop(model, None)
            models.pop(model, None)
        else:
            self._own[model] = own
            if model:
                models[model] = made
            else:
                self._sink.settle(self._global)
                self._global = made
                for name in models:  # they may use what changed
                    self._own[name] = self._left(name)
                    models[name] = Setting(replace(made.values, **self._own[name]), self._mode, self._file)
        for name, setting in self._models.items():
            if models.get(name) is not setting:
                self._sink.settle(setting)
        self._models = models
        self._tell()

    def _left(self, model: str) -> dict[str, Any]:
        """A setting's own fields; of a count, what is left of it."""
        own = self._own.get(model, {})
        setting = self._models.get(model) if model else self._global
        return {**own, "count": setting.count} if setting is not None and "count" in own else own

    def describe(self, model: str) -> dict[str, list[str]]:
        """The setting in force for a model, "" for all, in the words of the protocol."""
        setting = self._models.get(model, self._global)
        values = setting.values
        described = {
            "trace_level": [level for level in (TIMESTAMPS, TENSORS) if level in values.level] or ["OFF"],
            "trace_rate": [str(values.rate)],
            "trace_count": [str(setting.count)],
        }
        if self._mode == TRITON:
            described["log_frequency"] = [str(values.log_frequency)]
            described["trace_file"] = [self._file]
        described["trace_mode"] = [self._mode]
        for name, value in self._exporter:
            described[name] = [value]
        return described
