"""What of the log can be changed while the server runs: what is written, and in which format. Not where to.

What changes counts for the next line. Triton's names and meaning (docs/protocol/extension_logging.md).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from doorstep.config.options import ServerOptions
from doorstep.observability.log_format import FORMATTERS
from doorstep.observability.logging import LogHandler, set_levels, switched_off


class LogSettings:
    """Touched only from the event loop."""

    def __init__(self, options: ServerOptions, handler: LogHandler | None) -> None:
        """`handler`: where the log goes, as `set_up_logging` made it; None: somebody else has set it up, and then
        only how much is logged can be changed."""
        self._handler = handler
        self._values: dict[str, str | bool | int] = {
            "log_file": options.log_file,
            "log_info": options.log_info,
            "log_warning": options.log_warning,
            "log_error": options.log_error,
            "log_verbose_level": options.log_verbose,
            "log_format": options.log_format,
        }

    def describe(self) -> dict[str, str | bool | int]:
        return dict(self._values)

    def update(self, changes: Mapping[str, Any]) -> None:
        """Takes checked changes, of any field but the file."""
        values = self._values
        values.update(changes)
        set_levels(int(values["log_verbose_level"]))
        if self._handler is not None:
            info, warning, error = (bool(values[name]) for name in ("log_info", "log_warning", "log_error"))
            self._handler.off = switched_off(info=info, warning=warning, error=error)
            if "log_format" in changes:
                self._handler.setFormatter(FORMATTERS[str(values["log_format"])]())


def current_handler() -> LogHandler | None:
    """The handler that `set_up_logging` put in place, if it did."""
    return next((h for h in logging.getLogger().handlers if isinstance(h, LogHandler)), None)
