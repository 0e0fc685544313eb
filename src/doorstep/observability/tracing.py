"""Puts together what --trace-config asks for: the settings, and the sink that fits the mode. Decides nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from doorstep.config.trace_options import OPENTELEMETRY, TraceOptions
from doorstep.observability.trace_file import TraceFileWriter
from doorstep.observability.trace_settings import TraceSettings
from doorstep.trace import Tracer

if TYPE_CHECKING:
    from doorstep.observability.otlp_export import SpanExporter


class Tracing:
    """One per server."""

    def __init__(self, options: TraceOptions, on_change: Callable[[Tracer | None], None]) -> None:
        """See TraceSettings for `on_change`. Raises InvalidArgument."""
        self._sink: TraceFileWriter | SpanExporter
        if options.mode == OPENTELEMETRY:
            from doorstep.observability.otlp_export import SpanExporter  # and an HTTP client with it

            self._sink = SpanExporter(options.exporter)
        else:
            self._sink = TraceFileWriter()
        self.settings = TraceSettings(options, self._sink, on_change)

    def close(self, timeout_s: float) -> bool:
        """Gets out what there is, when nothing more comes. Blocks. False: it took too long."""
        return self._sink.close(timeout_s)
