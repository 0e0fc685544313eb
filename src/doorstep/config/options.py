"""The server's options: from an argument list to `ServerOptions`. Knows the table of options, no server and no file.

Takes what tritonserver takes (`--opt=value`, `--opt value`), and folders of models as plain arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from doorstep.config.backend_settings import backend_settings
from doorstep.config.cache_options import CacheOptions, cache_options, parse_cache_setting
from doorstep.config.cloud import Clouds, check_ports
from doorstep.config.header_pattern import compile_pattern
from doorstep.config.host_policy import CORES, NUMA_NODE, HostPolicy, parse_host_policy
from doorstep.config.metrics_options import MetricsOptions, parse_metrics_options
from doorstep.config.option_table import BY_NAME, RESTRICTED_CATEGORIES, Kind, Option, Status
from doorstep.config.survey import suggest
from doorstep.config.trace_options import TraceOptions, parse_trace_options
from doorstep.config.usage import usage
from doorstep.errors import InvalidArgument

EXIT_BAD_OPTIONS = 2  # tritonserver's is 1
GRPC_RESTRICTED_PREFIX = "triton-grpc-protocol-"

EVERY_DEVICE = -1  # among the devices of rate_limit_resources
_TRUE = {"true", "on", "1"}
_FALSE = {"false", "off", "0"}


class OptionError(InvalidArgument):
    """An option, its value, and what was expected."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `client_ca`, clients must show a certificate that it has signed."""

    cert: str
    key: str
    client_ca: str = ""


Restriction = tuple[str, str]  # header name in lower case, the value it must have


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command line says, checked. Defaults are the server's; binds to 127.0.0.1 unless told."""

    model_repositories: tuple[str, ...]
    model_control_mode: str = "none"  # none, poll, explicit
    load_models: tuple[str, ...] = ()  # explicit mode; ("*",): all
    repository_poll_secs: int = 15
    exit_on_error: bool = True
    strict_readiness: bool = True
    auto_complete_config: bool = True
    model_config_name: str = ""
    model_load_thread_count: int = 4
    model_load_retry_count: int = 0
    model_namespacing: bool = False
    backend_config: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # backend, "" for all → key → value
    rate_limit: str = "off"  # off, execution_count
    rate_limit_resources: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # device or EVERY_DEVICE → name
    id: str = "doorstep"
    exit_timeout_secs: int = 30
    allow_http: bool = True
    allow_openai: bool = True
    sse_ping_secs: int = 15  # 0: never
    http_address: str = "127.0.0.1"
    http_port: int = 8000
    reuse_http_port: bool = False
    http_restricted: Mapping[str, Restriction] = field(default_factory=dict)  # category → the header it needs
    allow_grpc: bool = True
    grpc_address: str = "127.0.0.1"
    grpc_port: int = 8001
    reuse_grpc_port: bool = False
    grpc_restricted: Mapping[str, Restriction] = field(default_factory=dict)
    grpc_infer_response_compression_level: str = "none"  # none, low, medium, high
    host_policies: Mapping[str, HostPolicy] = field(default_factory=dict)  # by name
    allow_metrics: bool = True
    allow_cpu_metrics: bool = True
    metrics_address: str = "127.0.0.1"
    metrics_port: int = 8002
    http_header_forward_pattern: str = ""
    grpc_header_forward_pattern: str = ""
    allow_sagemaker: bool = False
    sagemaker_port: int = 8080
    sagemaker_safe_port_range: tuple[int, int] | None = None  # first and last port the other listeners may have
    allow_vertex_ai: bool = False
    vertex_ai_port: int = 8080
    vertex_ai_default_model: str = ""
    clouds: Clouds = field(default_factory=Clouds)  # what the environment says about both
    tls: TlsFiles | None = None  # every listener
    grpc_tls: TlsFiles | None = None  # the gRPC listener; `tls` where only that is given
    limits: Mapping[str, float] = field(default_factory=dict)  # those given, by the names of wire.limits.WireLimits
    http2: Mapping[str, float] = field(default_factory=dict)  # likewise, wire.http2_settings.Http2Settings
    log_format: str = "text"  # text, json, default, ISO8601
    log_verbose: int = 0
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_file: str = ""
    access_log: bool = False
    trace: TraceOptions = field(default_factory=TraceOptions)
    metrics: MetricsOptions = field(default_factory=MetricsOptions)
    allow_client_shm: bool = False
    cache: CacheOptions | None = None  # --cache-config
    notes: tuple[str, ...] = ()  # for the log: options without effect, deprecated ones


def parse_serve_args(argv: Sequence[str], prog: str = "doorstep serve") -> ServerOptions:
    """For the command line: prints help and exits 0, or says what is wrong and exits 2."""
    if "--help" in argv or "-h" in argv:
        print(usage(prog))
        raise SystemExit(0)
    try:
        return parse_options(argv)
    except OptionError as error:
        print(f"{prog}: {error}\n(`{prog} --help` lists all options)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_OPTIONS) from None


def parse_options(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> ServerOptions:
    """Raises OptionError for the first thing wrong: the option, its value, and what was expected."""
    repositories: list[str] = []
    given: dict[str, list[Any]] = {}
    notes: list[str] = []
    for option, text in _pairs(argv, repositories):
        value = _value(option, text)
        shown = f"--{option.name}" + ("" if option.kind is Kind.FLAG else f"={text}")
        if option.status is Status.WITHOUT_EFFECT:
            notes.append(f"{shown} has no effect: {option.why}")
        if option.instead:
            so_anyway = option.kind is Kind.BOOL and value == option.default
            notes.append(
                f"--{option.name} is deprecated; " + ("leave it out" if so_anyway else f"write {option.instead}")
            )
        if option.status is Status.SUPPORTED:
            if option.target == "model_repositories":
                repositories.append(value)
            else:
                given.setdefault(option.name, []).append(value)
    return _assemble(repositories, given, notes, environ)


def _pairs(argv: Sequence[str], repositories: list[str]) -> list[tuple[Option, str]]:
    """The options with their values, as text; plain arguments go to `repositories`."""
    pairs: list[tuple[Option, str]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            repositories.extend(rest)
            break
        if not argument.startswith("-") or argument == "-":
            repositories.append(argument)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        option = BY_NAME.get(name) if argument.startswith("--") else None
        if option is None:
            hint = suggest(name.lstrip("-").replace("_", "-"), list(BY_NAME)).replace(
                "did you mean ", "did you mean --"
            )
            raise OptionError(f"unknown option {argument.partition('=')[0]}" + (f"; {hint}" if hint else ""))
        if option.kind is Kind.FLAG:
            if equals:
                raise OptionError(f"--{name} takes no value, but got '{text}'")
        elif not equals:
            if option.kind is Kind.BOOL and not (rest and rest[0].lower() in _TRUE | _FALSE):
                text = "true"  # `--access-log MODELS/` means what it says
            elif not rest:
                raise OptionError(f"--{name} needs a value: {_expected(option)}")
            else:
                text = rest.pop(0)
        pairs.append((option, text))
    return pairs


def _value(option: Option, text: str) -> Any:
    match option.kind:
        case Kind.FLAG:
            return True
        case Kind.BOOL:
            return _bool(option, text)
        case Kind.VERBOSITY if text.lower() in ("true", "false"):
            return int(text.lower() == "true")
        case Kind.INTEGER | Kind.VERBOSITY:
            return _number(option, text, int)
        case Kind.NUMBER:
            return _number(option, text, float)
        case Kind.CHOICE:
            for choice in option.choices:
                if choice.lower() == text.lower():
                    return choice
            raise _bad(option, text)
        case Kind.SETTING:
            return _setting(option, text)
        case Kind.CACHE:
            try:
                return parse_cache_setting(text)
            except InvalidArgument as error:
                raise OptionError(f"--{option.name}: {error.message}") from None
        case Kind.POLICY:
            policy, key, value = _setting(option, text)
            if not policy:
                raise _bad(option, text)
            return policy, key, value
        case Kind.RESOURCE:
            return _resource(text)
        case Kind.RESTRICTION:
            return _restriction(option, text)
        case Kind.PATTERN:
            return _pattern(option, text)
        case Kind.RANGE:
            return _range(option, text)
    return text


def _bool(option: Option, text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise _bad(option, text)


def _number(option: Option, text: str, of: type[int] | type[float]) -> int | float:
    try:
        number = of(text)
    except ValueError:
        raise _bad(option, text) from None
    if not option.least <= number <= option.most:
        if option.name == "http-max-input-size":
            raise OptionError("Error: --http-max-input-size must be greater than 0.")
        raise _bad(option, text)
    return number


def _setting(option: Option, text: str) -> tuple[str, str, str]:
    """(backend or "", key, value). A comma after the equals sign belongs to the value."""
    head, equals, value = text.partition("=")
    backend, comma, key = head.partition(",")
    if not comma:
        backend, key = "", head
    if not equals or not key or not value or (comma and not backend):
        raise _bad(option, text)
    return backend, key, value


def _resource(text: str) -> tuple[str, int, int]:
    """(name, count, device); the text is Triton's."""
    name, *numbers = text.split(":")
    try:
        if not 1 <= len(numbers) <= 2:
            raise ValueError
        amount, device = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else EVERY_DEVICE
    except ValueError:
        what = "'<resource_name>:<count>:<device>' or '<resource_name>:<count>'"
        raise OptionError(f"--rate-limit-resource option format is {what}. Got {text}") from None
    if amount < 0:
        raise OptionError(f"--rate-limit-resource={text}: there cannot be less than nothing of '{name}'")
    return name, amount, device


def _resources(given: Sequence[tuple[str, int, int]]) -> dict[int, dict[str, int]]:
    """By device and name; of two numbers for one resource the smaller counts, as in Triton."""
    resources: dict[int, dict[str, int]] = {}
    for name, amount, device in given:
        there = resources.setdefault(device, {})
        there[name] = min(amount, there.get(name, amount))
    return resources


def _restriction(option: Option, text: str) -> tuple[tuple[str, ...], str, str]:
    """(categories, header, value)."""
    categories, colon, rest = text.partition(":")
    header, equals, value = rest.partition("=")
    if not colon or not equals or not categories or not header or not value:
        raise _bad(option, text)
    return tuple(categories.split(",")), header, value


def _pattern(option: Option, text: str) -> str:
    try:
        compile_pattern(text)
    except InvalidArgument as error:
        raise OptionError(f"--{option.name}: {error}") from None
    return text


def _range(option: Option, text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash or not first.isdecimal() or not last.isdecimal() or not int(first) <= int(last) <= 65535:
        raise _bad(option, text)
    return int(first), int(last)


def _bad(option: Option, text: str) -> OptionError:
    return OptionError(f"--{option.name}={text}: expected {_expected(option)}")


def _expected(option: Option) -> str:
    if option.kind is Kind.CHOICE:
        return "one of " + ", ".join(option.choices)
    if option.kind in (Kind.INTEGER, Kind.NUMBER) and option.most < 2**63 - 1:
        return f"{option.kind.value} from {option.least:g} to {option.most:.0f}"
    if option.kind in (Kind.INTEGER, Kind.NUMBER):
        return f"{option.kind.value}, {option.least:g} or more"
    return str(option.kind.value)


def _assemble(
    repositories: list[str], given: dict[str, list[Any]], notes: list[str], environ: Mapping[str, str]
) -> ServerOptions:
    values: dict[str, Any] = {"limits": {}, "http2": {}}
    for name, all_given in given.items():
        option = BY_NAME[name]
        value = all_given[-1]
        group, dot, key = option.target.partition(".")
        if dot:
            values[group][key] = value if option.kind is Kind.BOOL or option.scale == 1 else value * option.scale
        elif not option.repeats:
            values[option.target] = value
    clouds = values["clouds"] = Clouds.of(environ)
    for name, default in clouds.defaults.items():
        values.setdefault(name, default)
    if not repositories and values.get("allow_vertex_ai") and clouds.storage:
        repositories = [clouds.storage]
    if not repositories:
        raise OptionError("no models: name a folder of models, as in `doorstep serve MODELS/`, or --model-repository")
    values["model_repositories"] = tuple(dict.fromkeys(repositories))
    values["load_models"] = _load_models(values, given)
    try:
        values["trace"] = parse_trace_options(given, notes)
        values["metrics"] = parse_metrics_options(given.get("metrics-config", ()), notes)
    except InvalidArgument as error:
        raise OptionError(error.message) from None
    values["backend_config"] = _backend_settings(given.get("backend-config", ()), notes)
    if directory := values.pop("backend_directory", ""):  # a setting of every backend, as in Triton
        values["backend_config"].setdefault("", {})["backend-directory"] = directory
    values["rate_limit_resources"] = _resources(given.get("rate-limit-resource", ()))
    values["cache"] = _cache(values, given, environ)
    values["host_policies"] = _host_policies(given.get("host-policy", ()))
    values["http_restricted"] = _restricted(given.get("http-restricted-api", ()), "http-restricted-api", "api", "")
    values["grpc_restricted"] = _restricted(
        given.get("grpc-restricted-protocol", ()), "grpc-restricted-protocol", "protocol", GRPC_RESTRICTED_PREFIX
    )
    strict = values.pop("strict_model_config", False) or values.pop("disable_auto_complete_config", False)
    values.pop("disable_auto_complete_config", None)
    host = values.pop("host", "127.0.0.1")
    values["http_address"] = values.get("http_address") or host
    values["grpc_address"] = values.get("grpc_address") or host
    values["metrics_address"] = values.get("metrics_address") or values["http_address"]
    values["tls"], values["grpc_tls"] = _tls(values, notes)
    fronts = values.get("allow_sagemaker") or values.get("allow_vertex_ai")
    if not (values.get("allow_http", True) or values.get("allow_grpc", True) or fronts):
        raise OptionError("--allow-http=false and --allow-grpc=false leave nothing to serve")
    options = ServerOptions(auto_complete_config=not strict, notes=tuple(notes), **values)
    if wrong := clouds.problem(options) or check_ports(options):
        raise OptionError(wrong)
    return options


def _load_models(values: Mapping[str, Any], given: Mapping[str, list[Any]]) -> tuple[str, ...]:
    models = tuple(dict.fromkeys(given.get("load-model", ())))
    if models and values.get("model_control_mode", "none") != "explicit":
        raise OptionError("Error: Use of '--load-model' requires setting '--model-control-mode=explicit' as well.")
    if "*" in models and len(models) > 1:
        raise OptionError("Wildcard model name '*' must be the ONLY startup model if specified at all.")
    return models


def _backend_settings(settings: Sequence[tuple[str, str, str]], notes: list[str]) -> dict[str, dict[str, str]]:
    try:
        return backend_settings(settings, notes)
    except InvalidArgument as error:
        raise OptionError(error.message) from None


def _cache(values: dict[str, Any], given: Mapping[str, list[Any]], environ: Mapping[str, str]) -> CacheOptions | None:
    settings = given.get("cache-config", [])
    byte_size = values.pop("response_cache_byte_size", None)
    if byte_size is not None:
        if settings:
            raise OptionError(
                "Error: Incompatible flags --response-cache-byte-size and --cache-config both provided. Please provide "
                "one or the other."
            )
        if byte_size:
            settings = [("local", "size", str(byte_size))]
    try:
        return cache_options(settings, environ)
    except InvalidArgument as error:
        raise OptionError(error.message) from None


def _host_policies(settings: Sequence[tuple[str, str, str]]) -> dict[str, HostPolicy]:
    written: dict[str, dict[str, str]] = {}
    for policy, key, value in settings:
        if key not in (CORES, NUMA_NODE):
            raise OptionError(
                f"--host-policy={policy},{key}={value}: unknown setting; there are {CORES} and {NUMA_NODE}"
            )
        written.setdefault(policy, {})[key] = value
    policies = {}
    for policy, said in written.items():
        try:
            policies[policy] = parse_host_policy(said)
        except InvalidArgument as error:
            raise OptionError(f"--host-policy={policy},…: {error.message}") from None
    return policies


def _restricted(
    rules: Sequence[tuple[tuple[str, ...], str, str]], option: str, what: str, prefix: str
) -> dict[str, Restriction]:
    restricted: dict[str, Restriction] = {}
    for categories, header, value in rules:
        for category in categories:
            if category not in RESTRICTED_CATEGORIES:
                names = ", ".join(RESTRICTED_CATEGORIES)
                raise OptionError(f"--{option}: unknown restricted {what} '{category}'; expected one of {names}")
            if category in restricted:
                raise OptionError(
                    f"--{option}: restricted {what} '{category}' can not be specified in multiple config groups"
                )
            restricted[category] = ((prefix + header).lower(), value)
    return restricted


def _tls(values: dict[str, Any], notes: list[str]) -> tuple[TlsFiles | None, TlsFiles | None]:
    """(every listener's, the gRPC listener's)."""
    cert, key, ca = (values.pop(name, "") for name in ("tls_cert", "tls_key", "tls_client_ca"))
    if bool(cert) != bool(key) or (ca and not cert):
        raise OptionError("--tls-cert, --tls-key: TLS needs both the certificate and its key")
    tls = TlsFiles(cert, key, ca) if cert else None
    mutual = values.pop("grpc_use_ssl_mutual", False)
    wanted = values.pop("grpc_use_ssl", False) or mutual
    cert, key, ca = (values.pop(name, "") for name in ("grpc_server_cert", "grpc_server_key", "grpc_root_cert"))
    if not wanted:
        if cert or key or ca:
            notes.append(
                "--grpc-server-cert, --grpc-server-key, --grpc-root-cert have no effect without --grpc-use-ssl"
            )
        return tls, tls
    if not cert or not key:
        raise OptionError("--grpc-use-ssl: needs --grpc-server-cert and --grpc-server-key")
    if mutual and not ca:
        raise OptionError("--grpc-use-ssl-mutual: needs --grpc-root-cert")
    if ca and not mutual:
        notes.append("--grpc-root-cert has no effect without --grpc-use-ssl-mutual")
    return tls, TlsFiles(cert, key, ca if mutual else "")
