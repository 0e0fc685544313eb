# ruff: noqa: E501 (a table reads best with a row per line)
"""Every option of `doorstep serve`, one row each: Triton's (command_line_parser.cc) and our own. Parses nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

MIB = 1 << 20
INT32_MAX = 2**31 - 1
LARGEST = 2**63 - 1


class Kind(Enum):
    """What a value looks like; the value is how messages say it."""

    TEXT = "text"
    INTEGER = "a whole number"
    NUMBER = "a number"
    BOOL = "true or false"
    FLAG = "no value"
    CHOICE = "a choice"
    VERBOSITY = "a whole number, true or false"
    SETTING = "<backend>,<setting>=<value> or <setting>=<value>"
    POLICY = "<policy>,<setting>=<value>"
    RESOURCE = "<name>:<count>:<device> or <name>:<count>"
    PATTERN = "a regular expression"
    RANGE = "<first port>-<last port>"
    CACHE = "<cache>,<setting>=<value>"
    RESTRICTION = "<api>[,<api>…]:<header>=<value>"


class Status(Enum):
    SUPPORTED = "supported"
    WITHOUT_EFFECT = "without effect"  # taken, and a line in the log says why nothing comes of it


@dataclass(frozen=True, slots=True)
class Option:
    name: str
    group: str
    help: str
    kind: Kind = Kind.TEXT
    default: Any = ""
    field: str = ""  # of ServerOptions; `limits.x` and `http2.x` land in those maps; "" is the name with underscores
    least: float = 0
    most: float = LARGEST
    choices: tuple[str, ...] = ()
    repeats: bool = False
    scale: float = 1  # what one unit of the option is in the field's unit
    status: Status = Status.SUPPORTED
    why: str = ""  # not supported, or without effect
    instead: str = ""  # deprecated: what to write today

    @property
    def target(self) -> str:
        return self.field or self.name.replace("-", "_")


INT, NUM, BOOL = Kind.INTEGER, Kind.NUMBER, Kind.BOOL
NO_EFFECT = Status.WITHOUT_EFFECT
_PORT: dict[str, Any] = {"kind": INT, "most": 65535}
_NO_GPU_MEMORY: dict[str, Any] = {"status": NO_EFFECT, "why": "Doorstep keeps no memory pools"}


def _option(name: str, group: str, help: str, kind: Kind = Kind.TEXT, default: Any = "", **rest: Any) -> Option:
    return Option(name, group, help, kind, default, **rest)


OPTIONS: tuple[Option, ...] = (
    # Models
    _option("model-repository", "Models", "A folder of models. May be repeated; the same as a MODELS argument.", field="model_repositories", repeats=True),
    _option("model-store", "Models", "The same as --model-repository.", field="model_repositories", repeats=True),
    _option("model-control-mode", "Models", "none: load all models at start; poll: and follow changes of the folders; explicit: load what --load-model names and what clients ask for.", Kind.CHOICE, "none", choices=("none", "poll", "explicit")),
    _option("load-model", "Models", "A model to load at start in explicit mode; '*' loads all. May be repeated.", field="load_models", repeats=True),
    _option("repository-poll-secs", "Models", "Seconds between two looks at the repositories in poll mode.", INT, 15, least=1),
    _option("exit-on-error", "Models", "Do not start if a model fails to load.", BOOL, True),
    _option("strict-readiness", "Models", "Ready only when all models are.", BOOL, True),
    _option("disable-auto-complete-config", "Models", "Take configurations as they are written; every model needs one.", Kind.FLAG, False),
    _option("model-config-name", "Models", "Read configs/<name>.pbtxt instead of config.pbtxt in models that have it."),
    _option("model-load-thread-count", "Models", "Models that load at the same time.", INT, 4, least=1, most=1024),
    _option("model-load-retry-count", "Models", "How often to try again when a model fails to load.", INT, 0, most=1000),
    _option("backend-config", "Models", "A setting of a backend, or of all: onnxruntime,intra_op_thread_count=2. May be repeated.", Kind.SETTING, repeats=True),
    _option("model-namespacing", "Models", "Models of the same name may be in several repositories.", BOOL, False),
    _option("enable-peer-access", "Models", "Direct copies between GPUs.", BOOL, True, status=NO_EFFECT, why="Doorstep copies nothing between GPUs"),
    # Server
    _option("id", "Server", "The server's name in its metadata.", default="doorstep"),
    _option("exit-timeout-secs", "Server", "Seconds to wait for requests in flight after SIGTERM.", INT, 30, most=86400),
    # Listening
    _option("host", "Listening", "The address of all listeners; 0.0.0.0 is every interface, and whoever reaches it can use the models.", default="127.0.0.1"),
    _option("allow-http", "Listening", "Listen for HTTP.", BOOL, True),
    _option("allow-openai", "Listening", "Answer OpenAI's API (/v1/…) for language models and embeddings, where HTTP is answered.", BOOL, True),
    _option("sse-ping-secs", "Listening", "A stream of OpenAI's API in which nothing comes says so every so many seconds, so that nobody on the way gives it up; 0: never.", INT, 15, least=0),
    _option("http-address", "Listening", "The address for HTTP, if not --host."),
    _option("http-port", "Listening", "The port for HTTP (gRPC works on it too). 0 is any free port; two listeners with one number are one.", default=8000, **_PORT),
    _option("reuse-http-port", "Listening", "Share the HTTP port with other servers that say so too.", BOOL, False),
    _option("http-thread-count", "Listening", "Threads for HTTP.", INT, 8, least=1, status=NO_EFFECT, why="one event loop serves all connections"),
    _option("http-max-input-size", "Listening", "Largest request body in bytes, as sent and as decompressed.", INT, 64 * MIB, field="limits.body_bytes", least=1),
    _option("http-restricted-api", "Listening", "APIs that need a header: model-repository,logging:admin-key=secret. May be repeated.", Kind.RESTRICTION, repeats=True, field="http_restricted"),
    _option("http-header-forward-pattern", "Listening", "A regular expression: headers whose name it matches become parameters of the request.", Kind.PATTERN),
    _option("allow-metrics", "Metrics", "Listen for Prometheus at /metrics.", BOOL, True),
    _option("metrics-address", "Metrics", "The address for metrics, if not HTTP's."),
    _option("metrics-port", "Metrics", "The port for metrics.", default=8002, **_PORT),
    # gRPC
    _option("allow-grpc", "gRPC", "Listen for gRPC.", BOOL, True),
    _option("grpc-address", "gRPC", "The address for gRPC, if not --host."),
    _option("grpc-port", "gRPC", "The port for gRPC (HTTP works on it too).", default=8001, **_PORT),
    _option("reuse-grpc-port", "gRPC", "Share the gRPC port with other servers that say so too.", BOOL, False),
    _option("grpc-restricted-protocol", "gRPC", "As --http-restricted-api; the header is triton-grpc-protocol-<header>.", Kind.RESTRICTION, repeats=True, field="grpc_restricted"),
    _option("grpc-infer-response-compression-level", "gRPC", "Compress responses for clients that take it.", Kind.CHOICE, "none", choices=("none", "low", "medium", "high")),
    _option("grpc-max-message-bytes", "gRPC", "Largest gRPC message.", INT, INT32_MAX, field="limits.grpc_message_bytes", least=1, most=INT32_MAX),
    _option("grpc-keepalive-time", "gRPC", "Milliseconds of silence after which the client is pinged.", INT, 7_200_000, field="http2.keepalive_time_s", scale=0.001, most=INT32_MAX),
    _option("grpc-keepalive-timeout", "gRPC", "Milliseconds to wait for the answer before closing.", INT, 20_000, field="http2.keepalive_timeout_s", scale=0.001, most=INT32_MAX),
    _option("grpc-keepalive-permit-without-calls", "gRPC", "Ping also when no call is open.", BOOL, False, field="http2.keepalive_without_calls"),
    _option("grpc-http2-max-pings-without-data", "gRPC", "Pings to send with nothing between.", INT, 2, status=NO_EFFECT, why="a second ping is sent only after the first was answered", most=INT32_MAX),
    _option("grpc-http2-min-recv-ping-interval-without-data", "gRPC", "Milliseconds that must lie between a client's pings with nothing between.", INT, 300_000, field="http2.min_ping_interval_s", scale=0.001, most=INT32_MAX),
    _option("grpc-http2-max-ping-strikes", "gRPC", "Pings that come too soon before the connection is closed; 0 is any number.", INT, 0, field="http2.max_ping_strikes", most=INT32_MAX),
    _option("grpc-max-connection-age", "gRPC", "Milliseconds after which a connection is asked to go; 0 is never.", INT, 0, field="http2.max_age_s", scale=0.001, most=INT32_MAX),
    _option("grpc-max-connection-age-grace", "gRPC", "Milliseconds it then has for its open calls; 0 is as long as they take.", INT, 0, field="http2.max_age_grace_s", scale=0.001, most=INT32_MAX),
    _option("grpc-infer-thread-count", "gRPC", "Threads for inference calls.", INT, 2, least=2, most=128, status=NO_EFFECT, why="one event loop serves all connections"),
    _option("grpc-infer-allocation-pool-size", "gRPC", "Call states to keep.", INT, 8, status=NO_EFFECT, why="calls keep no state to reuse"),
    _option("grpc-max-response-pool-size", "gRPC", "Responses to keep.", INT, INT32_MAX, least=1, status=NO_EFFECT, why="responses are written as they come"),
    _option("grpc-header-forward-pattern", "gRPC", "As --http-header-forward-pattern, for metadata.", Kind.PATTERN),
    # Cloud vendors
    _option("allow-sagemaker", "Cloud vendors", "Listen for SageMaker.", BOOL, False),
    _option("sagemaker-port", "Cloud vendors", "The port for SageMaker; 0 is any free port.", default=8080, **_PORT),
    _option("sagemaker-safe-port-range", "Cloud vendors", "Ports that the other listeners may have, as 8000-8100.", Kind.RANGE, None),
    _option("sagemaker-thread-count", "Cloud vendors", "Threads for SageMaker.", INT, 8, least=1, status=NO_EFFECT, why="one event loop serves all connections"),
    _option("allow-vertex-ai", "Cloud vendors", "Listen for Vertex AI; by default where the environment has AIP_MODE=PREDICTION.", BOOL, False),
    _option("vertex-ai-port", "Cloud vendors", "The port for Vertex AI, if not AIP_HTTP_PORT; 0 is any free port.", default=8080, **_PORT),
    _option("vertex-ai-thread-count", "Cloud vendors", "Threads for Vertex AI.", INT, 8, least=1, status=NO_EFFECT, why="one event loop serves all connections"),
    _option("vertex-ai-default-model", "Cloud vendors", "The model that Vertex AI calls, if there are several."),
    # TLS
    _option("tls-cert", "TLS", "PEM file of the certificate (and its chain) for all listeners."),
    _option("tls-key", "TLS", "PEM file of its private key."),
    _option("tls-client-ca", "TLS", "PEM file of the authority that clients' certificates must come from."),
    _option("grpc-use-ssl", "TLS", "TLS on the gRPC listener.", BOOL, False),
    _option("grpc-use-ssl-mutual", "TLS", "And clients must have a certificate.", BOOL, False),
    _option("grpc-server-cert", "TLS", "PEM file of the gRPC listener's certificate."),
    _option("grpc-server-key", "TLS", "PEM file of its private key."),
    _option("grpc-root-cert", "TLS", "PEM file of the authority that clients' certificates must come from."),
    # Limits
    _option("max-connections", "Limits", "Connections of one listener.", INT, 4096, field="limits.connections", least=1),
    _option("max-streams", "Limits", "Open HTTP/2 streams (gRPC calls) of one connection.", INT, 1024, field="limits.streams", least=1, most=INT32_MAX),
    _option("max-header-bytes", "Limits", "Request line and headers together.", INT, 65_536, field="limits.header_bytes", least=256),
    _option("max-header-count", "Limits", "Headers of one request.", INT, 256, field="limits.header_count", least=1),
    _option("max-chunk-count", "Limits", "Non-empty chunks of a chunked body.", INT, 65_536, field="limits.chunk_count", least=1),
    _option("max-arriving-bytes", "Limits", "Bodies still arriving, all connections of a listener together.", INT, 2 * 1024 * MIB, field="limits.arriving_bytes", least=1),
    _option("header-timeout-secs", "Limits", "Seconds from a request's first byte to the end of its headers.", NUM, 30.0, field="limits.header_timeout_s", least=0.01),
    _option("body-timeout-secs", "Limits", "Longest wait for the next byte of a body.", NUM, 60.0, field="limits.body_timeout_s", least=0.01),
    _option("min-body-rate", "Limits", "Bytes per second that a body must average after that.", INT, 1024, field="limits.body_rate"),
    _option("idle-timeout-secs", "Limits", "Seconds a connection may be idle.", NUM, 300.0, field="limits.idle_timeout_s", least=0.01),
    _option("max-stream-bytes", "Limits", "Responses of a model that streams that may wait for a client that does not read.", INT, 64 * MIB, field="limits.stream_bytes", least=1),
    _option("write-timeout-secs", "Limits", "Longest a client may not read its answer.", NUM, 60.0, field="limits.write_timeout_s", least=0.01),
    # Logging
    _option("log-format", "Logging", "text: for people; json: one object per line; default, ISO8601: as tritonserver.", Kind.CHOICE, "text", choices=("text", "json", "default", "ISO8601")),
    _option("log-verbose", "Logging", "Log more: 0 is off, 1 and up is on.", Kind.VERBOSITY, 0, most=INT32_MAX),
    _option("log-info", "Logging", "Log what happens.", BOOL, True),
    _option("log-warning", "Logging", "Log warnings.", BOOL, True),
    _option("log-error", "Logging", "Log errors.", BOOL, True),
    _option("log-file", "Logging", "Log to this file instead of standard error."),
    _option("access-log", "Logging", "Log one line per request.", BOOL, False),
    # What Doorstep takes without effect
    _option("allow-gpu-metrics", "Other", "GPU metrics.", BOOL, True, status=NO_EFFECT, why="there are no GPU metrics"),
    _option("allow-cpu-metrics", "Metrics", "nv_cpu_* among the metrics.", BOOL, True),
    _option("metrics-interval-ms", "Other", "Interval of metrics.", NUM, 2000.0, status=NO_EFFECT, why="metrics are counted when they are asked for"),
    _option("metrics-config", "Metrics", "Which latencies are among the metrics: counter_latencies=, summary_latencies=, histogram_latencies= true or false, summary_quantiles=<quantile>:<error>,… May be repeated.", repeats=True),
    _option("trace-config", "Tracing", "What is traced and where to: level=TIMESTAMPS, rate=, count=, mode=triton or opentelemetry, triton,file=, triton,log-frequency=, opentelemetry,url=, opentelemetry,resource=<key>=<value> … May be repeated (docs/observability.md).", repeats=True),
    _option("backend-directory", "Models", "Folder of python-based backends: DIRECTORY/NAME/model.py runs the models of backend NAME."),
    _option("repoagent-directory", "Other", "Folder of repository agents.", status=NO_EFFECT, why="repository agents are Python functions, found by name"),
    _option("cache-directory", "Other", "Folder of caches.", status=NO_EFFECT, why="the caches, local and redis, are built in"),
    _option("cache-config", "Models", "The response cache, and its settings: local,size=<bytes>, or redis,host=… and redis,port=…; models ask for it with response_cache. May be repeated.", Kind.CACHE, repeats=True, field="cache"),
    _option("rate-limit", "Models", "execution_count: an instance runs when the resources of its rate_limiter are free and it is first by its priority and how often it has run; off: when it is idle.", Kind.CHOICE, "off", choices=("off", "execution_count")),
    _option("rate-limit-resource", "Models", "How much there is of a resource of the rate limiter, on every device or on one. If none is given, as much as the instance that needs most of it. May be repeated.", Kind.RESOURCE, repeats=True, field="rate_limit_resources"),
    _option("pinned-memory-pool-byte-size", "Other", "Pinned memory.", INT, 256 * MIB, **_NO_GPU_MEMORY),
    _option("cuda-memory-pool-byte-size", "Other", "CUDA memory.", repeats=True, **_NO_GPU_MEMORY),
    _option("cuda-virtual-address-size", "Other", "CUDA addresses.", repeats=True, **_NO_GPU_MEMORY),
    _option("min-supported-compute-capability", "Other", "Oldest GPU.", NUM, 6.0, status=NO_EFFECT, why="each backend's library decides which GPUs it can use"),
    _option("buffer-manager-thread-count", "Other", "Copy threads.", INT, 0, status=NO_EFFECT, why="instances gather their own inputs"),
    _option("host-policy", "Models", "Where instances run: <policy>,cpu-cores=0-3 or <policy>,numa-node=0. The policy is an instance group's host_policy; cpu and gpu_<n> are those of groups that name none. May be repeated.", Kind.POLICY, repeats=True, field="host_policies"),
    _option("model-load-gpu-limit", "Other", "GPU memory limit.", repeats=True, status=NO_EFFECT, why="GPU memory is not watched, so a model may take all there is"),
    _option("allow-client-shm", "Server", "Clients may hand over tensors in shared memory (/dev/shm), and have any of its objects read and written that the server may.", BOOL, False),
    # Deprecated by Triton, still parsed
    _option("strict-model-config", "Deprecated", "true is --disable-auto-complete-config.", BOOL, False, instead="--disable-auto-complete-config"),
    _option("response-cache-byte-size", "Deprecated", "Size of a response cache in memory.", INT, 0, instead="--cache-config=local,size=<bytes>"),
    _option("trace-file", "Deprecated", "The file for traces.", repeats=True, instead="--trace-config triton,file=<file>"),
    _option("trace-level", "Deprecated", "OFF, TIMESTAMPS or TENSORS. May be repeated.", default="OFF", repeats=True, instead="--trace-config level=<level>"),
    _option("trace-rate", "Deprecated", "Trace every n-th request.", INT, 1000, repeats=True, most=2 * INT32_MAX + 1, instead="--trace-config rate=<n>"),
    _option("trace-count", "Deprecated", "Traces to take; -1: any number.", INT, -1, repeats=True, least=-1, most=INT32_MAX, instead="--trace-config count=<n>"),
    _option("trace-log-frequency", "Deprecated", "Traces per file.", INT, 0, repeats=True, most=2 * INT32_MAX + 1, instead="--trace-config triton,log-frequency=<n>"),
)  # fmt: skip

BY_NAME = {option.name: option for option in OPTIONS}

# What --http-restricted-api and --grpc-restricted-protocol can name (restricted_features.h).
RESTRICTED_CATEGORIES = (
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)
