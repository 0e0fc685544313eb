"""From a model's call of another model to a request that the server runs. Knows no socket, process or thread."""

from __future__ import annotations

import logging

from doorstep.backends.base import ModelCall
from doorstep.errors import DoorstepError, Internal
from doorstep.request import (
    InferenceRequest,
    InferenceResponse,
    Outputs,
    ResponseSender,
    cancelled_error,
    error_response,
)
from doorstep.services import Services

logger = logging.getLogger("doorstep.model")


def make_request(call: ModelCall, sender: ResponseSender) -> InferenceRequest:
    request = InferenceRequest(
        call.model_name,
        {tensor.name: tensor for tensor in call.inputs},
        sender,
        model_version=call.model_version,
        id=call.id,
        requested_outputs=tuple(call.requested_outputs),
        parameters=call.parameters,
    )
    request.correlation_id = call.correlation_id
    request.sequence_start = call.sequence_start
    request.sequence_end = call.sequence_end
    request.timeout_us = call.timeout_us
    request.priority = call.priority
    return request


def run(services: Services, request: InferenceRequest, parent: InferenceRequest | None) -> None:
    """On the loop. A refusal comes as the response."""
    try:
        if parent is not None:
            request.deadline_ns = parent.deadline_ns
            if parent.trace is not None:
                request.trace = parent.trace.child(request)
            if parent.cancelled:
                raise cancelled_error()
        services.infer(request)
    except DoorstepError as error:
        request.sender.send(error_response(request, error), True)
    except Exception as error:  # the server's own trouble; the caller would wait for ever
        logger.exception("a model's request to '%s' failed", request.model_name)
        request.sender.send(error_response(request, Internal(f"{type(error).__name__}: {error}")), True)


def outputs_of(request: InferenceRequest, response: InferenceResponse) -> Outputs | DoorstepError | None:
    """What the caller sees of a response."""
    if response.error is not None:
        return response.error
    if response.flag_only:
        return None
    asked = request.requested_outputs
    return Outputs([t for t in response.outputs if not asked or t.name in asked], response.parameters)
