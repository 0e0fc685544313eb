"""What SageMaker and Vertex AI say to a server: through its environment, for they start it. Knows no listener.

Names and defaults are Triton's (sagemaker_server.h, vertex_ai_server.cc, command_line_parser.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INFERENCE_TYPES = ("infer", "generate", "generate_stream")
NO_MODEL = "unspecified_SAGEMAKER_TRITON_DEFAULT_MODEL_NAME"


@dataclass(frozen=True, slots=True)
class Clouds:
    ping_mode: str = "ready"  # SageMaker's /ping: live, or else ready
    default_model: str = NO_MODEL  # of SageMaker's /invocations
    inference_type: str = "infer"  # what SageMaker's /invocations is
    predict_route: str = ""  # Vertex AI's two paths
    health_route: str = ""
    storage: str = ""  # Vertex AI's repository, where the command line names none
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of ServerOptions, where the command line is silent

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Clouds:
        get = environ.get
        defaults: dict[str, Any] = {}
        if get("AIP_MODE") == "PREDICTION":
            defaults = {"allow_vertex_ai": True, "allow_http": False, "allow_grpc": False}
        port = get("AIP_HTTP_PORT", "")
        if port.isdecimal():
            defaults["vertex_ai_port"] = int(port)
        return cls(
            ping_mode=get("SAGEMAKER_TRITON_PING_MODE", "ready"),
            default_model=get("SAGEMAKER_TRITON_DEFAULT_MODEL_NAME", NO_MODEL),
            inference_type=get("SAGEMAKER_TRITON_INFERENCE_TYPE", "infer"),
            predict_route=get("AIP_PREDICT_ROUTE", ""),
            health_route=get("AIP_HEALTH_ROUTE", ""),
            storage=get("AIP_STORAGE_URI", ""),
            defaults=defaults,
        )

    def problem(self, options: Any) -> str:
        """What keeps the fronts that `options` (ServerOptions) ask for from working; "" where nothing does."""
        if options.allow_sagemaker and self.inference_type not in INFERENCE_TYPES:
            return (
                f"Server has invalid inference type '{self.inference_type}'. Must be one of: "
                f"{', '.join(INFERENCE_TYPES)}."
            )
        if options.allow_vertex_ai:
            if not self.predict_route:
                return "API_PREDICT_ROUTE is not defined for Vertex AI endpoint"  # Triton's spelling of AIP_…
            if not self.health_route:
                return "AIP_HEALTH_ROUTE is not defined for Vertex AI endpoint"
            for route in (self.predict_route, self.health_route):
                if not route.startswith("/") or "{" in route:
                    return f"Vertex AI route '{route}' is not a path"
        return ""


def check_ports(options: Any) -> str:
    """A port that a front shares with another listener, or that SageMaker's range leaves no room for; "" for none."""
    ports = [("HTTP", options.http_port, options.allow_http), ("GRPC", options.grpc_port, options.allow_grpc),
             ("metrics", options.metrics_port, options.allow_metrics),
             ("SageMaker", options.sagemaker_port, options.allow_sagemaker),
             ("Vertex AI", options.vertex_ai_port, options.allow_vertex_ai)]  # fmt: skip
    allowed = [(name, port) for name, port, on in ports if on]
    for front, port in allowed[:]:
        if front not in ("SageMaker", "Vertex AI"):
            continue
        for name, other in allowed:
            if name != front and other == port and port:
                return f"The server cannot listen to {name} requests and {front} requests at the same port {port}"
    span = options.sagemaker_safe_port_range
    if options.allow_sagemaker and span is not None:
        for name, port in allowed:
            if name != "SageMaker" and not span[0] <= port <= span[1]:
                return (
                    f"The server cannot listen to {name} requests at port {port}, allowed port range is "
                    f"[{span[0]}, {span[1]}]"
                )
    return ""
