"""TraceSetting and LogSettings. Knows what the settings are called, not what comes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from doorstep import proto
from doorstep.errors import Unavailable
from doorstep.protocols.kserve import settings

if TYPE_CHECKING:
    from doorstep.server import InferenceServer


def trace_setting(server: InferenceServer, request: Any) -> Any:
    control = server.trace_settings
    if control is None:
        raise Unavailable("the server does not support trace")
    model = request.model_name
    if model:
        settings.check_model(server, model)
    if request.settings:
        control.update(model, settings.trace_changes_of_message(request.settings))
    response = proto.TraceSettingResponse()
    for name, values in control.describe(model).items():
        response.settings[name].value.extend(values)
    return response


def log_settings(server: InferenceServer, request: Any) -> Any:
    control = server.log_settings
    if control is None:
        raise Unavailable("the server does not support dynamic logging")
    if request.settings:
        control.update(settings.log_changes_of_message(request.settings))
    response = proto.LogSettingsResponse()
    for name, value in control.describe().items():
        choice = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(response.settings[name], choice, value)
    return response
