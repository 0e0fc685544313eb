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


class _Switches(logging.Filter):
    """--log-info, --log-warning and --log-error, each for its own level; the access log has a switch of its own."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__()
        switches = {
            logging.INFO: options.log_info,
            logging.WARNING: options.log_warning,
            logging.ERROR: options.log_error,
        }
        self._off = {level for level, on in switches.items() if not on}
        if not options.log_error:
            self._off.add(logging.CRITICAL)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno not in self._off or record.name == ACCESS_LOGGER


def set_up_logging(options: ServerOptions) -> LogHandler:
    """Replaces what was set up before. Raises InvalidArgument for a --log-file that cannot be opened.

    With a file, SIGHUP opens it anew, for log rotation."""
    formatter = FORMATTERS[options.log_format]()

    def notice(count: int) -> str:
        line = "%d log lines were dropped: whoever reads the log is too slow, or the disk is full"
        return formatter.format(logging.LogRecord("doorstep.log", logging.WARNING, __file__, 0, line, (count,), None))

    try:
        handler = LogHandler(LineWriter(options.log_file, notice=notice))
    except OSError as error:
        raise InvalidArgument(f"--log-file={options.log_file}: cannot be opened: {error.strerror}") from None
    handler.setFormatter(formatter)
    handler.addFilter(_Switches(options))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if options.log_verbose > 1 else logging.WARNING)
    logging.getLogger("doorstep").setLevel(logging.DEBUG if options.log_verbose else logging.INFO)
    logging.captureWarnings(True)
    if options.log_file and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda *_: handler.writer.reopen())
    return handler
