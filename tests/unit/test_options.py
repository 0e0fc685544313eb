"""The options of `doorstep serve`: every one of tritonserver's is known, and none is parsed and ignored."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from doorstep.config.option_table import BY_NAME, OPTIONS, Status
from doorstep.config.options import EVERY_DEVICE, OptionError, ServerOptions, TlsFiles, parse_options, parse_serve_args
from doorstep.config.usage import usage
from doorstep.model import LoadOptions
from doorstep.wire.http2_settings import Http2Settings
from doorstep.wire.limits import WireLimits

# tritonserver --help, all groups (server, command_line_parser.cc).
TRITONS = """
    id exit-timeout-secs log-verbose log-info log-warning log-error log-format log-file
    model-store model-repository exit-on-error disable-auto-complete-config strict-readiness model-control-mode
    repository-poll-secs load-model model-config-name model-load-thread-count model-load-retry-count model-namespacing
    enable-peer-access
    allow-http http-address http-port reuse-http-port http-header-forward-pattern http-thread-count
    http-max-input-size http-restricted-api
    allow-grpc grpc-address grpc-port reuse-grpc-port grpc-header-forward-pattern grpc-infer-thread-count
    grpc-infer-allocation-pool-size grpc-max-response-pool-size grpc-use-ssl grpc-use-ssl-mutual grpc-server-cert
    grpc-server-key grpc-root-cert grpc-infer-response-compression-level grpc-keepalive-time grpc-keepalive-timeout
    grpc-keepalive-permit-without-calls grpc-http2-max-pings-without-data
    grpc-http2-min-recv-ping-interval-without-data grpc-http2-max-ping-strikes grpc-max-connection-age
    grpc-max-connection-age-grace grpc-restricted-protocol
    allow-sagemaker sagemaker-port sagemaker-safe-port-range sagemaker-thread-count
    allow-vertex-ai vertex-ai-port vertex-ai-thread-count vertex-ai-default-model
    allow-metrics allow-gpu-metrics allow-cpu-metrics metrics-address metrics-port metrics-interval-ms metrics-config
    trace-config backend-directory backend-config repoagent-directory cache-config cache-directory
    rate-limit rate-limit-resource pinned-memory-pool-byte-size cuda-memory-pool-byte-size cuda-virtual-address-size
    min-supported-compute-capability buffer-manager-thread-count host-policy model-load-gpu-limit allow-client-shm
    strict-model-config response-cache-byte-size trace-file trace-level trace-rate trace-count trace-log-frequency
""".split()  # noqa: SIM905
FIELDS = {f.name: f for f in dataclasses.fields(ServerOptions)}


def parse(*argv: str) -> ServerOptions:
    return parse_options(["models/", *argv])


def test_every_option_of_tritonserver_is_in_the_table() -> None:
    assert set(TRITONS) <= set(BY_NAME)
    assert len(BY_NAME) == len(OPTIONS), "a name twice"


def test_every_option_is_supported_or_says_why_not() -> None:
    for option in OPTIONS:
        assert bool(option.why) == (option.status is not Status.SUPPORTED), option.name
        assert option.help, option.name


def test_without_options_the_server_is_on_this_machine_only() -> None:
    options = parse_options(["models/"])
    assert options == ServerOptions(model_repositories=("models/",))
    assert (options.http_address, options.http_port) == ("127.0.0.1", 8000)
    assert (options.grpc_address, options.grpc_port) == ("127.0.0.1", 8001)
    assert (options.metrics_address, options.metrics_port) == ("127.0.0.1", 8002)


def test_the_tables_defaults_are_those_that_apply() -> None:
    for option in OPTIONS:
        group, dot, key = option.target.partition(".")
        if option.status is not Status.SUPPORTED or option.repeats:
            continue
        if dot:
            owner: Any = {"limits": WireLimits, "http2": Http2Settings}[group]()
            assert float(option.default) * option.scale == pytest.approx(float(getattr(owner, key))), option.name
        elif option.target in FIELDS and FIELDS[option.target].default != "127.0.0.1":
            assert option.default == FIELDS[option.target].default, option.name


def test_every_limit_of_the_wire_can_be_set_and_no_other() -> None:
    settable = {o.target.partition(".")[2] for o in OPTIONS if o.target.startswith("limits.")}
    fixed = {"linger_timeout_s"}
    assert settable | fixed == {f.name for f in dataclasses.fields(WireLimits)}


def test_limits_given_build_the_wires_own() -> None:
    options = parse(
        "--max-connections=7", "--http-max-input-size=1000", "--idle-timeout-secs=1.5",
        "--grpc-keepalive-time=1500", "--grpc-keepalive-permit-without-calls=1", "--grpc-http2-max-ping-strikes=2",
    )  # fmt: skip
    limits, http2 = WireLimits(**options.limits), Http2Settings(**options.http2)  # type: ignore[arg-type]
    assert (limits.connections, limits.body_bytes, limits.idle_timeout_s) == (7, 1000, 1.5)
    assert (http2.keepalive_time_s, http2.keepalive_without_calls, http2.max_ping_strikes) == (1.5, True, 2)
    assert http2.keepalive_timeout_s == Http2Settings().keepalive_timeout_s


# arguments → field → value
GOOD: list[tuple[list[str], str, Any]] = [
    (["--http-port=9000"], "http_port", 9000),
    (["--http-port", "9000"], "http_port", 9000),
    (["--http-port=1", "--http-port=2"], "http_port", 2),
    (["--host=0.0.0.0"], "http_address", "0.0.0.0"),
    (["--host=0.0.0.0"], "grpc_address", "0.0.0.0"),
    (["--host=0.0.0.0"], "metrics_address", "0.0.0.0"),
    (["--host=0.0.0.0", "--grpc-address=10.0.0.1"], "grpc_address", "10.0.0.1"),
    (["--http-address=10.0.0.1"], "metrics_address", "10.0.0.1"),
    (["--http-address=10.0.0.1"], "grpc_address", "127.0.0.1"),
    (["--allow-metrics=False"], "allow_metrics", False),
    (["--allow-metrics", "off"], "allow_metrics", False),
    (["--access-log=on"], "access_log", True),
    (["--access-log"], "access_log", True),
    (["--access-log", "--id=x"], "id", "x"),
    (["--log-verbose=3"], "log_verbose", 3),
    (["--log-verbose=true"], "log_verbose", 1),
    (["--log-format=iso8601"], "log_format", "ISO8601"),
    (["--disable-auto-complete-config"], "auto_complete_config", False),
    (["--strict-model-config=true"], "auto_complete_config", False),
    (["--strict-model-config=false"], "auto_complete_config", True),
    (["--strict-model-config=false", "--disable-auto-complete-config"], "auto_complete_config", False),
    (["--model-control-mode=EXPLICIT", "--load-model=a", "--load-model", "b"], "load_models", ("a", "b")),
    (["--model-control-mode=explicit", "--load-model=*"], "load_models", ("*",)),
    (["more/"], "model_repositories", ("models/", "more/")),
    (["--model-repository=more/", "--model-store", "third/", "models/"], "model_repositories",
     ("models/", "more/", "third/")),
    (["--", "--odd/"], "model_repositories", ("models/", "--odd/")),
    (["--access-log", "more/"], "model_repositories", ("models/", "more/")),
    (["--backend-config=onnxruntime,a=1", "--backend-config=b=2,3", "--backend-config=onnxruntime,c=d=e"],
     "backend_config", {"onnxruntime": {"a": "1", "c": "d=e"}, "": {"b": "2,3"}}),
    (["--http-restricted-api=health,trace:Key=v:w=x", "--http-restricted-api=logging:K=v"], "http_restricted",
     {"health": ("key", "v:w=x"), "trace": ("key", "v:w=x"), "logging": ("k", "v")}),
    (["--grpc-restricted-protocol=inference:Key=v"], "grpc_restricted",
     {"inference": ("triton-grpc-protocol-key", "v")}),
    (["--tls-cert=c", "--tls-key=k"], "grpc_tls", TlsFiles("c", "k")),
    (["--tls-cert=c", "--tls-key=k", "--tls-client-ca=a"], "tls", TlsFiles("c", "k", "a")),
    (["--grpc-use-ssl=true", "--grpc-server-cert=c", "--grpc-server-key=k"], "grpc_tls", TlsFiles("c", "k")),
    (["--grpc-use-ssl=true", "--grpc-server-cert=c", "--grpc-server-key=k"], "tls", None),
    (["--grpc-use-ssl-mutual=true", "--grpc-server-cert=c", "--grpc-server-key=k", "--grpc-root-cert=r"], "grpc_tls",
     TlsFiles("c", "k", "r")),
    (["--tls-cert=a", "--tls-key=b", "--grpc-use-ssl", "--grpc-server-cert=c", "--grpc-server-key=k"], "tls",
     TlsFiles("a", "b")),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "field", "value"), GOOD)
def test_an_option_is_taken(argv: list[str], field: str, value: Any) -> None:
    assert getattr(parse(*argv), field) == value


# arguments → all of these in the message
BAD: list[tuple[list[str], list[str]]] = [
    (["--http-port=abc"], ["--http-port=abc", "a whole number from 0 to 65535"]),
    (["--http-port=65536"], ["--http-port=65536", "65535"]),
    (["--http-port="], ["--http-port=", "a whole number"]),
    (["--http-port"], ["--http-port needs a value"]),
    (["--http_port=1"], ["unknown option --http_port", "did you mean --http-port?"]),
    (["--model-repositry=x"], ["unknown option --model-repositry", "did you mean --model-repository?"]),
    (["--qqqqqqqq=1"], ["unknown option --qqqqqqqq"]),
    (["-p"], ["unknown option -p"]),
    (["--allow-http=maybe"], ["--allow-http=maybe", "true or false"]),
    (["--model-control-mode=some"], ["--model-control-mode=some", "one of none, poll, explicit"]),
    (["--log-format=xml"], ["one of text, json, default, ISO8601"]),
    (["--grpc-infer-response-compression-level=9"], ["one of none, low, medium, high"]),
    (["--disable-auto-complete-config=true"], ["takes no value"]),
    (["--http-max-input-size=0"], ["--http-max-input-size must be greater than 0."]),
    (["--http-max-input-size=-1"], ["--http-max-input-size must be greater than 0."]),
    (["--grpc-infer-thread-count=1"], ["a whole number from 2 to 128"]),
    (["--idle-timeout-secs=nan"], ["--idle-timeout-secs=nan", "a number"]),
    (["--exit-timeout-secs=-1"], ["--exit-timeout-secs=-1"]),
    (["--load-model=a"], ["Error: Use of '--load-model' requires setting '--model-control-mode=explicit' as well."]),
    (["--model-control-mode=explicit", "--load-model=*", "--load-model=a"],
     ["Wildcard model name '*' must be the ONLY startup model if specified at all."]),
    (["--http-restricted-api=x:k=v"], ["unknown restricted api 'x'", "health, metadata, inference"]),
    (["--grpc-restricted-protocol=x:k=v"], ["unknown restricted protocol 'x'"]),
    (["--http-restricted-api=health:k=v", "--http-restricted-api=health:k=v"],
     ["restricted api 'health' can not be specified in multiple config groups"]),
    (["--http-restricted-api=health,health:k=v"], ["can not be specified in multiple config groups"]),
    (["--http-restricted-api=health"], ["--http-restricted-api=health", "<header>=<value>"]),
    (["--http-restricted-api=health:k="], ["<header>=<value>"]),
    (["--backend-config=onnxruntime"], ["<setting>=<value>"]),
    (["--backend-config=,a=b"], ["<setting>=<value>"]),
    (["--backend-config=default-max-batch-size=four"], ["default-max-batch-size=four", "a whole number"]),
    (["--backend-config=onnxruntime,default-max-batch-size=x"], ["onnxruntime,default-max-batch-size=x"]),
    (["--tls-cert=c"], ["both the certificate and its key"]),
    (["--tls-client-ca=c"], ["both the certificate and its key"]),
    (["--grpc-use-ssl=true"], ["--grpc-server-cert and --grpc-server-key"]),
    (["--grpc-use-ssl-mutual=true", "--grpc-server-cert=c", "--grpc-server-key=k"], ["needs --grpc-root-cert"]),
    (["--allow-http=false", "--allow-grpc=false"], ["nothing to serve"]),
    (["--rate-limit=priority"], ["--rate-limit=priority", "one of off, execution_count"]),
    (["--rate-limit-resource=r"],
     ["option format is '<resource_name>:<count>:<device>' or '<resource_name>:<count>'. Got r"]),
    (["--rate-limit-resource=r:1:2:3"], ["--rate-limit-resource option format is", "Got r:1:2:3"]),
    (["--rate-limit-resource=r:many"], ["--rate-limit-resource option format is", "Got r:many"]),
    (["--rate-limit-resource=r:-1"], ["--rate-limit-resource=r:-1", "less than nothing of 'r'"]),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_a_bad_option_is_named_with_what_was_expected(argv: list[str], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse(*argv)
    for word in words:
        assert word in caught.value.message


def test_resources_of_the_rate_limiter_are_by_device_and_the_smaller_number_counts() -> None:
    options = parse(
        "--rate-limit=EXECUTION_COUNT",
        "--rate-limit-resource=R1:10",
        "--rate-limit-resource=R1:4:0",
        "--rate-limit-resource=R1:6",
        "--rate-limit-resource=r1:1",
    )
    assert options.rate_limit == "execution_count"
    assert options.rate_limit_resources == {EVERY_DEVICE: {"R1": 6, "r1": 1}, 0: {"R1": 4}}
    assert parse().rate_limit == "off"
    assert parse().rate_limit_resources == {}


def example(name: str) -> str:
    """A value of an option that is not its default."""
    option = BY_NAME[name]
    if isinstance(option.default, bool):
        return str(not option.default).lower()
    if isinstance(option.default, int | float):
        return str(int(option.default) + 1)
    return {
        "backend-config": "a,b=c",
        "host-policy": "a,cpu-cores=0-1",
        "http-restricted-api": "health:k=v",
        "rate-limit-resource": "a:1",
        "trace-config": "level=TIMESTAMPS",
        "trace-level": "TENSORS",
        "metrics-config": "summary_latencies=true",
        "cache-config": "local,size=1024",
        "sagemaker-safe-port-range": "8000-8002",
    }.get(name, "x")


@pytest.mark.parametrize("name", [o.name for o in OPTIONS if o.status is Status.WITHOUT_EFFECT])
def test_what_has_no_effect_is_said_in_the_log(name: str) -> None:
    [note] = parse(f"--{name}={example(name)}").notes
    assert note.startswith(f"--{name}={example(name)} has no effect: ")


@pytest.mark.parametrize("name", [o.name for o in OPTIONS if o.status is Status.SUPPORTED])
def test_what_is_supported_changes_what_the_server_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/predict")  # which Vertex AI says, and without which it is not served
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/health")
    together = {
        "load-model": ["--model-control-mode=explicit"],
        "tls-cert": ["--tls-key=k"],
        "tls-key": ["--tls-cert=c"],
        "tls-client-ca": ["--tls-cert=c", "--tls-key=k"],
        "grpc-use-ssl": ["--grpc-server-cert=c", "--grpc-server-key=k"],
        "grpc-use-ssl-mutual": ["--grpc-server-cert=c", "--grpc-server-key=k", "--grpc-root-cert=r"],
        "grpc-server-cert": ["--grpc-use-ssl=true", "--grpc-server-key=k"],
        "grpc-server-key": ["--grpc-use-ssl=true", "--grpc-server-cert=c"],
        "grpc-root-cert": ["--grpc-use-ssl-mutual=true", "--grpc-server-cert=c", "--grpc-server-key=k"],
    }.get(name, [])
    option = BY_NAME[name]
    value = option.choices[-1] if option.choices else example(name)
    value = {"grpc-restricted-protocol": "health:k=v", "grpc-max-message-bytes": "9"}.get(name, value)
    given = f"--{name}" if option.kind.name == "FLAG" else f"--{name}={value}"
    without = [a for a in together if name.startswith("load")]
    assert parse(given, *together) != parse(*without)


def test_certificates_that_nothing_uses_are_said_in_the_log() -> None:
    [note] = parse("--grpc-server-cert=c", "--grpc-use-ssl=false").notes
    assert "no effect without --grpc-use-ssl" in note


def test_a_backends_own_settings_win_over_those_for_all() -> None:
    given = parse("--backend-config=a=1", "--backend-config=x=1", "--backend-config=python,a=2").backend_config
    options = LoadOptions(given)
    assert options.settings_of("python") == {"a": "2", "x": "1"}
    assert options.settings_of("onnxruntime") == {"a": "1", "x": "1"}


def test_no_models_is_an_error() -> None:
    with pytest.raises(OptionError, match="doorstep serve MODELS/"):
        parse_options(["--http-port=1"])


def test_the_command_line_exits_2_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_serve_args(["m", "--http-port=x"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("doorstep serve: --http-port=x: expected a whole number")


def test_help_names_every_option_once_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_serve_args(["--help"], "doorstep tritonserver")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: doorstep tritonserver MODELS/")
    text = usage(width=90)
    for option in OPTIONS:
        assert any(
            f"--{option.name}" in line.replace("=", " ").replace(",", " ").split() for line in text.split("\n")
        ), option.name
    assert max(map(len, text.split("\n"))) <= 90


# As people write them: with and without an equals sign, numbers and capitals for yes and no. All but TLS's files.
A_COMMAND_LINE = """
    --id=mine --exit-timeout-secs=5 --log-verbose=0 --log-info=1 --log-warning=true --log-error=True
    --log-format=ISO8601 --log-file= --model-store=/models --model-repository /others --exit-on-error=false
    --strict-readiness=true
    --disable-auto-complete-config --model-control-mode=explicit --repository-poll-secs=15 --load-model=*
    --model-config-name=h100 --model-load-thread-count=8 --model-load-retry-count=1 --model-namespacing=false
    --enable-peer-access=true --allow-http=true --http-address=0.0.0.0 --http-port 18000 --reuse-http-port=0
    --http-header-forward-pattern=(?i)x-.* --http-thread-count=16 --http-max-input-size=134217728
    --http-restricted-api=shared-memory,trace:k=v --allow-grpc=1 --grpc-address=0.0.0.0 --grpc-port=18001
    --reuse-grpc-port=false --grpc-header-forward-pattern=x-.* --grpc-infer-thread-count=4
    --grpc-infer-allocation-pool-size=16 --grpc-max-response-pool-size=100 --grpc-use-ssl=false
    --grpc-use-ssl-mutual=false --grpc-infer-response-compression-level=low --grpc-keepalive-time=7200000
    --grpc-keepalive-timeout=20000 --grpc-keepalive-permit-without-calls=False --grpc-http2-max-pings-without-data=2
    --grpc-http2-min-recv-ping-interval-without-data=300000 --grpc-http2-max-ping-strikes=2
    --grpc-max-connection-age=100000 --grpc-max-connection-age-grace=10000
    --grpc-restricted-protocol=model-repository:k=v --allow-sagemaker=true --sagemaker-port=18080
    --sagemaker-safe-port-range=18000-18100 --sagemaker-thread-count=8 --allow-vertex-ai=false --vertex-ai-port=18081
    --vertex-ai-thread-count=8 --vertex-ai-default-model=add_sub --allow-metrics=true --allow-gpu-metrics=true
    --allow-cpu-metrics=true --metrics-address=127.0.0.1 --metrics-port=18002 --metrics-interval-ms=1000
    --metrics-config summary_latencies=true --metrics-config=summary_quantiles=0.5:0.05,0.9:0.01
    --metrics-config=counter_latencies=false --trace-config triton,file=/tmp/trace.json
    --trace-config=triton,log-frequency=50 --trace-config rate=1 --trace-config level=TIMESTAMPS
    --trace-config count=100 --trace-config mode=triton --backend-directory=/opt/tritonserver/backends
    --backend-config=python,shm-default-byte-size=16777216 --backend-config=default-max-batch-size=8
    --backend-config=tensorrt,version-compatible=true --repoagent-directory=/opt/tritonserver/repoagents
    --cache-config local,size=1048576 --cache-directory=/opt/tritonserver/caches --rate-limit=execution_count
    --rate-limit-resource=R1:10 --rate-limit-resource R2:5:0 --pinned-memory-pool-byte-size=268435456
    --cuda-memory-pool-byte-size=0:67108864 --cuda-virtual-address-size=0:16777216
    --min-supported-compute-capability=6.0 --buffer-manager-thread-count=2 --host-policy=near,numa-node=0
    --host-policy near,cpu-cores=0-1 --model-load-gpu-limit=0:0.8 --allow-client-shm=true
"""


def test_every_option_of_tritonserver_at_once() -> None:
    argv = A_COMMAND_LINE.split()
    deprecated = {option.name for option in OPTIONS if option.instead}
    secrets = {"grpc-server-cert", "grpc-server-key", "grpc-root-cert"}
    named = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    assert named >= set(TRITONS) - deprecated - secrets
    options = parse_options(argv, {})
    assert options.model_repositories == ("/models", "/others")
    assert options.load_models == ("*",)
    assert options.rate_limit_resources == {EVERY_DEVICE: {"R1": 10}, 0: {"R2": 5}}
    assert options.trace.rate == 1
    assert options.backend_config["tensorrt"] == {"version-compatible": "true"}
    without = {option.name for option in OPTIONS if option.status is Status.WITHOUT_EFFECT} | {"backend-config"}
    assert {note[2:].partition("=")[0] for note in options.notes} == without


@pytest.mark.parametrize("setting", ["python,shm-default-byte-size=1048576", "onnxruntime,enable-global-threadpool=1"])
def test_a_backends_setting_that_means_nothing_here_is_said_in_the_log(setting: str) -> None:
    [note] = parse(f"--backend-config={setting}").notes
    assert note.startswith(f"--backend-config={setting} has no effect: ")


def test_a_deprecated_option_that_asks_for_what_is_so_anyway_is_not_turned_around() -> None:
    assert parse("--strict-model-config=false").notes == ("--strict-model-config is deprecated; leave it out",)
    assert parse("--strict-model-config=true").notes == (
        "--strict-model-config is deprecated; write --disable-auto-complete-config",
    )


def test_the_limits_that_documents_name_are_there() -> None:
    documents = Path(__file__).parents[2].glob("docs/*.md")
    named = {name for text in documents for name in re.findall(r"--([a-z0-9-]+-(?:secs|bytes))\b", text.read_text())}
    assert len(named) > 5
    assert named <= set(BY_NAME)
