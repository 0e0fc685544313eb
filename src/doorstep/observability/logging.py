"""Sets up the log of a server process from its options. Knows no event; formats are in log_format.py.

Everything goes through the standard library's `logging`, so that models and libraries join in without knowing us.
"""

from __future__ import annotations

import logging
import signal
import threading

from doorstep.config.options import ServerOptions
from doorstep.errors import InvalidArgument
from doorstep.observability.log_format import FORMATTERS
from doorstep.observability.log_writer import LineWriter

ACCESS_LOGGER = "doorstep.access"
_FLUSH_S = 2.0  # how long the exit waits for a log that nobody reads


class LogHandler(logging.Handler):
    """Formats on the caller's thread, writes on the writer's."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer
        self.off: frozenset[int] = frozenset()  # levels that are not written; replaced when it changes
        self.addFilter(self._wanted)

    def _wanted(self, record: logging.LogRecord) -> bool:
        """--log-info, --log-warning and --log-error are for their own level each; the access log has its own switch."""
        return record.levelno not in self.off or record.name == ACCESS_LOGGER

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.write(self.format(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self.writer.flush(_FLUSH_S)

    def close(self) -> None:
        self.writer.close(_FLUSH_S)
        super().close()


def switched_off(*, info: bool, warning: bool, error: bool) -> frozenset[int]:
    """The levels that are not to be written."""
    switches = ((logging.INFO, info), (logging.WARNING, warning), (logging.ERROR, error), (logging.CRITICAL, error))
    return frozenset(level for level, on in switches if not on)


def set_levels(verbose: int) -> None:
    """0: what happens; 1: how; 2 and up: what libraries say about themselves, too."""
    logging.getLogger().setLevel(logging.DEBUG if verbose > 1 else logging.WARNING)
    logging.getLogger("doorstep").setLevel(logging.DEBUG if verbose else logging.INFO)


def set_up_logging(options: ServerOptions) -> LogHandler:
    """Replaces what was set up before. Raises InvalidArgument for a --log-file that cannot be opened.

    With a file, SIGHUP opens it anew, for log rotation."""

    def notice(count: int) -> str:
        line = "%d log lines were dropped: whoever reads the log is too slow, or the disk is full"
        return handler.format(logging.LogRecord("doorstep.log", logging.WARNING, __file__, 0, line, (count,), None))

    try:
        handler = LogHandler(LineWriter(options.log_file, notice=notice))
    except OSError as error:
        raise InvalidArgument(f"--log-file={options.log_file}: cannot be opened: {error.strerror}") from None
    handler.setFormatter(FORMATTERS[options.log_format]())
    handler.off = switched_off(info=options.log_info, warning=options.log_warning, error=options.log_error)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    set_levels(options.log_verbose)
    logging.captureWarnings(True)
    if options.log_file and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda *_: handler.writer.reopen())
    return handler
