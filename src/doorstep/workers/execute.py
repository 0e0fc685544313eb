"""Runs one batch on one instance, wherever that is: stamps the times and turns whatever is raised into results.

Knows no thread and no queue."""

from __future__ import annotations

import logging
import time

from doorstep.backends.base import ModelInstance
from doorstep.errors import BackendError, DoorstepError
from doorstep.request import Batch

logger = logging.getLogger("doorstep.model")


def execute(instance: ModelInstance, batch: Batch, name: str) -> None:
    """After this every request the instance answered has a result, and the others an error if it raised."""
    batch.compute_start_ns = time.monotonic_ns()
    try:
        instance.execute(batch)
    except DoorstepError as error:
        batch.fail(error)
    except Exception as error:  # whatever a library or a model raises ends its requests, never the server
        logger.exception("%s: the model failed on a batch of %d", name, batch.rows)
        batch.fail(BackendError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__))
    batch.compute_end_ns = time.monotonic_ns()


def is_ready(instance: ModelInstance, name: str) -> bool:
    """What the instance says; one that raises is not ready."""
    try:
        return instance.is_ready() is True
    except Exception:
        logger.exception("%s: is_ready failed", name)
        return False
