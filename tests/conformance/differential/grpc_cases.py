"""The same questions over gRPC: every RPC, every field, right and wrong. Knows no server."""

from __future__ import annotations

import struct
from typing import Any

import grpc
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as pb

from .wire import GrpcCase

CASES: list[GrpcCase] = []  # explicit mode, after the HTTP cases
MODE_CASES: list[GrpcCase] = []  # model-control-mode=none and =poll


def _call(
    name: str, rpc: str, message: Message | bytes, *metadata: tuple[str, str], to: list[GrpcCase] = CASES, **extra: Any
) -> None:
    to.append(GrpcCase(f"{rpc}: {name}", rpc, (message,), metadata, **extra))


def tensor(name: str, shape: list[int], datatype: str, **contents: Any) -> pb.ModelInferRequest.InferInputTensor:
    made = pb.ModelInferRequest.InferInputTensor(name=name, shape=shape, datatype=datatype)
    if contents:
        made.contents.CopyFrom(pb.InferTensorContents(**contents))
    return made


def request(
    model: str, *inputs: Any, raw: list[bytes] | None = None, outputs: tuple[Any, ...] = (), **fields: Any
) -> Any:
    wanted = [o if isinstance(o, Message) else pb.ModelInferRequest.InferRequestedOutputTensor(name=o) for o in outputs]
    return pb.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raw or [], outputs=wanted, **fields)


def _ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def _strings(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(v)) + v for v in values)


def _infer(name: str, message: Message | bytes, *metadata: tuple[str, str], **extra: Any) -> None:
    _call(name, "ModelInfer", message, *metadata, **extra)


def _param(**value: Any) -> pb.InferParameter:
    return pb.InferParameter(**value)


# --- reading ---
for _rpc, _message in (
    ("ServerLive", pb.ServerLiveRequest()),
    ("ServerReady", pb.ServerReadyRequest()),
    ("ServerMetadata", pb.ServerMetadataRequest()),
):
    _call("plain", _rpc, _message)
for _model, _version in (
    ("add_sub", ""),
    ("add_sub", "1"),
    ("add_sub", "2"),
    ("add_sub", "x"),
    ("add_sub", "-1"),
    ("add_sub", "01"),
    ("add_sub", "99999999999999999999"),
    ("multi", "3"),
    ("multi", "2"),
    ("every_type", ""),
    ("scalar", ""),
    ("nope", ""),
    ("on_demand", ""),
    ("", ""),
    ("nope", "1"),
    ("../add_sub", ""),
):
    for _rpc in ("ModelReady", "ModelMetadata", "ModelConfig"):
        _call(f"{_model}:{_version}", _rpc, getattr(pb, f"{_rpc}Request")(name=_model, version=_version))
for _model, _version in (
    ("nope", ""),
    ("nope", "1"),
    ("multi", "2"),
    ("multi", "x"),
    ("on_demand", ""),
    ("counted", ""),
    ("counted", "1"),
):
    _call(f"{_model}:{_version}", "ModelStatistics", pb.ModelStatisticsRequest(name=_model, version=_version))

# --- answers ---
A = tensor("INPUT0", [1, 4], "INT32")
B = tensor("INPUT1", [1, 4], "INT32")
A_TYPED = tensor("INPUT0", [1, 4], "INT32", int_contents=[1, 2, 3, 4])
B_TYPED = tensor("INPUT1", [1, 4], "INT32", int_contents=[10, 20, 30, 40])
_a, _b = _ints(1, 2, 3, 4), _ints(10, 20, 30, 40)
ONE = tensor("IN", [1], "INT32")
X = tensor("IN", [3], "FP32")
_x = struct.pack("<3f", 0.5, -1.5, 2)
_infer("raw", request("add_sub", A, B, raw=[_a, _b]))
_infer("raw, inputs in the other order", request("add_sub", B, A, raw=[_b, _a]))
_infer("typed contents", request("add_sub", A_TYPED, B_TYPED))
_infer("with a version", request("add_sub", A, B, raw=[_a, _b], model_version="1"))
_infer("with an id", request("add_sub", A, B, raw=[_a, _b], id="abc"))
_infer("one output asked for", request("add_sub", A, B, raw=[_a, _b], outputs=("OUTPUT1",)))
_infer("outputs in the other order", request("add_sub", A, B, raw=[_a, _b], outputs=("OUTPUT1", "OUTPUT0")))
_infer("an unknown output", request("add_sub", A, B, raw=[_a, _b], outputs=("NOPE",)))
_infer("the same output twice", request("add_sub", A, B, raw=[_a, _b], outputs=("OUTPUT0", "OUTPUT0")))
_infer("an output without a name", request("add_sub", A, B, raw=[_a, _b], outputs=("",)))
_infer("scalar shape", request("scalar", tensor("IN", [2, 1], "INT64"), raw=[struct.pack("<2q", 5, 6)]))
_infer("optional input left out", request("optional", tensor("A", [2], "INT32"), raw=[_ints(1, 2)]))
_infer("newest version", request("multi", ONE, raw=[_ints(0)]))
_infer("zero elements, raw", request("identity_fp32", tensor("IN", [0], "FP32"), raw=[b""]))
_infer("zero elements, typed", request("identity_fp32", tensor("IN", [0], "FP32", fp32_contents=[])))
_infer("NaN", request("identity_fp32", X, raw=[struct.pack("<3f", float("nan"), float("inf"), float("-inf"))]))
for _level in (grpc.Compression.Gzip, grpc.Compression.Deflate):
    _infer(f"compressed by {_level.name}", request("add_sub", A, B, raw=[_a, _b]), compression=_level)

_TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "FP32": ("fp32_contents", [0.1, -1.0]),
    "FP64": ("fp64_contents", [0.1, -1.0]),
    "BYTES": ("bytes_contents", [b"\xff\x00", b""]),
}
for _type, (_field, _values) in _TYPED.items():
    _input = "STRING" if _type == "BYTES" else _type
    _wanted = (f"OUT_{_input}",)
    _infer(
        f"{_type} typed",
        request("every_type", tensor(f"IN_{_input}", [2], _type, **{_field: _values}), outputs=_wanted),
    )
    _infer(
        f"{_type} typed, one too few",
        request("every_type", tensor(f"IN_{_input}", [3], _type, **{_field: _values}), outputs=_wanted),
    )
    _infer(
        f"{_type} typed, one too many",
        request("every_type", tensor(f"IN_{_input}", [1], _type, **{_field: _values}), outputs=_wanted),
    )
    _wrong = "fp32_contents" if _field != "fp32_contents" else "int_contents"
    _infer(
        f"{_type} in {_wrong}",
        request("every_type", tensor(f"IN_{_input}", [2], _type, **{_wrong: [1, 2]}), outputs=_wanted),
    )
for _value, _type, _field in (
    (256, "UINT8", "uint_contents"),
    (128, "INT8", "int_contents"),
    (-1, "INT8", "int_contents"),
    (70000, "INT16", "int_contents"),
):
    _infer(
        f"{_type} typed from {_value}",
        request("every_type", tensor(f"IN_{_type}", [1], _type, **{_field: [_value]}), outputs=(f"OUT_{_type}",)),
    )
for _type in ("FP16", "BF16"):
    _infer(
        f"{_type} typed",
        request("every_type", tensor(f"IN_{_type}", [1], _type, fp32_contents=[1.0]), outputs=("OUT_FP16",)),
    )
    _infer(
        f"{_type} raw",
        request("every_type", tensor(f"IN_{_type}", [1], _type), raw=[b"\x00\x3c"], outputs=("OUT_FP16",)),
    )
_infer(
    "two typed fields at once",
    request("add_sub", tensor("INPUT0", [1, 4], "INT32", int_contents=[1, 2, 3, 4], fp32_contents=[1.0]), B_TYPED),
)

# --- requests that do not fit ---
_infer("raw and typed contents", request("add_sub", A_TYPED, B, raw=[_a, _b]))
_infer("raw for one, typed for the other", request("add_sub", A, B_TYPED, raw=[_a]))
_infer("one raw too few", request("add_sub", A, B, raw=[_a]))
_infer("one raw too many", request("add_sub", A, B, raw=[_a, _b, _a]))
_infer("no contents at all", request("add_sub", A, B))
_infer("raw too short", request("add_sub", A, B, raw=[_a, _b[:-1]]))
_infer("raw too long", request("add_sub", A, B, raw=[_a, _b + b"x"]))
_infer("raw of nothing", request("add_sub", A, B, raw=[b"", b""]))
_infer("a missing input", request("add_sub", A, raw=[_a]))
_infer("an unknown input", request("add_sub", A, tensor("NOPE", [1, 4], "INT32"), raw=[_a, _b]))
_infer("an extra input", request("add_sub", A, B, tensor("NOPE", [1, 4], "INT32"), raw=[_a, _b, _a]))
_infer("the same input twice", request("add_sub", A, A, raw=[_a, _a]))
_infer("no inputs", request("add_sub"))
_infer("an input without a name", request("identity_fp32", tensor("", [3], "FP32"), raw=[_x]))
for _type in ("FP64", "fp32", "", "STRING", "NOPE"):
    _infer(f"datatype {_type!r}", request("identity_fp32", tensor("IN", [3], _type), raw=[_x]))
for _shape in ([], [2], [4], [0], [-1], [-3], [1, 3], [2**40, 2**40], [2**62, 4], [2**63 - 1]):
    _infer(f"shape {_shape}", request("identity_fp32", tensor("IN", _shape, "FP32"), raw=[_x]))
for _shape in ([2, 3], [3, 2], [6], [1, 2, 3]):
    _infer(f"shape {_shape} for [2,3]", request("matrix", tensor("IN", _shape, "FP64"), raw=[bytes(48)]))
for _shape in ([4], [0, 4], [9, 4], [1, 1, 4], [], [-1, 4]):
    _bytes = bytes(4 * max(0, (_shape[0] if len(_shape) > 1 else 1)) * 4)
    _infer(
        f"shape {_shape} for a batch of [4]",
        request("add_sub", tensor("INPUT0", _shape, "INT32"), tensor("INPUT1", _shape, "INT32"), raw=[_bytes, _bytes]),
    )
_infer("batches that differ", request("add_sub", A, tensor("INPUT1", [2, 4], "INT32"), raw=[_a, _a + _b]))
_infer("a message that is not protobuf", b"\xff\xff\xff")
_infer("an empty message", b"")
for _model, _version in (
    ("nope", ""),
    ("", ""),
    ("add_sub", "2"),
    ("add_sub", "x"),
    ("add_sub", "-1"),
    ("add_sub", "0"),
    ("add_sub", "01"),
    ("add_sub", "99999999999999999999"),
    ("on_demand", ""),
    ("multi", "2"),
):
    _infer(f"model {_model!r} version {_version!r}", request(_model, A, B, raw=[_a, _b], model_version=_version))
for _bytes, _shape, _name in (
    (_strings(b"abc", b""), [1, 2], "right"),
    (_strings(b"\xff\xfe", b""), [1, 2], "not UTF-8"),
    (_strings(b"abc"), [1, 2], "one too few"),
    (_strings(b"a", b"b", b"c"), [1, 2], "one too many"),
    (struct.pack("<I", 9) + b"abc", [1, 1], "length past the end"),
    (_strings(b"a") + b"\x01", [1, 2], "half a length"),
):
    _infer(f"BYTES raw, {_name}", request("identity_bytes", tensor("IN", _shape, "BYTES"), raw=[_bytes]))

# --- parameters ---
for _name, _value in (
    ("int", _param(int64_param=5)),
    ("bool", _param(bool_param=True)),
    ("string", _param(string_param="x")),
    ("double", _param(double_param=1.5)),
    ("uint64", _param(uint64_param=2**64 - 1)),
    ("unset", _param()),
):
    for _key in (
        "mine",
        "priority",
        "timeout",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "triton_mine",
        "triton_enable_empty_final_response",
        "binary_data_output",
        "headers",
    ):
        _infer(f"parameter {_key} as {_name}", request("params", ONE, raw=[_ints(0)], parameters={_key: _value}))
_infer("negative priority", request("params", ONE, raw=[_ints(0)], parameters={"priority": _param(int64_param=-1)}))
_infer("negative timeout", request("params", ONE, raw=[_ints(0)], parameters={"timeout": _param(int64_param=-1)}))
_infer(
    "sequence_id and start",
    request(
        "params",
        ONE,
        raw=[_ints(0)],
        parameters={"sequence_id": _param(int64_param=3), "sequence_start": _param(bool_param=True)},
    ),
)


def _output(name: str, **parameters: pb.InferParameter) -> pb.ModelInferRequest.InferRequestedOutputTensor:
    return pb.ModelInferRequest.InferRequestedOutputTensor(name=name, parameters=parameters)


SCORES = tensor("SCORES", [2, 5], "FP32")
_scores = struct.pack("<10f", 0.1, 0.5, 0.25, -1, 3, 9, 8, 7, 6, 5.5)
for _name, _value in (
    ("2", _param(int64_param=2)),
    ("0", _param(int64_param=0)),
    ("-1", _param(int64_param=-1)),
    ("9", _param(int64_param=9)),
    ("1000001", _param(int64_param=1000001)),
    ("a string", _param(string_param="2")),
    ("a uint64", _param(uint64_param=2)),
):
    _infer(
        f"classification {_name}",
        request("classifier", SCORES, raw=[_scores], outputs=(_output("PROB", classification=_value),)),
    )
_infer(
    "classification of BYTES",
    request("classifier", SCORES, raw=[_scores], outputs=(_output("NAME", classification=_param(int64_param=2)),)),
)
_infer(
    "output parameter unknown",
    request("classifier", SCORES, raw=[_scores], outputs=(_output("PROB", colour=_param(string_param="red")),)),
)
_infer(
    "output to shared memory",
    request(
        "classifier",
        SCORES,
        raw=[_scores],
        outputs=(
            _output(
                "PROB", shared_memory_region=_param(string_param="r"), shared_memory_byte_size=_param(int64_param=40)
            ),
        ),
    ),
)
_shared = tensor("IN", [3], "FP32")
_shared.parameters["shared_memory_region"].string_param = "r"
_shared.parameters["shared_memory_byte_size"].int64_param = 12
_infer("input from shared memory", request("identity_fp32", _shared))

# --- model errors ---
for _kind in range(16):
    _infer(f"model error {_kind}", request("raises", tensor("KIND", [1], "INT32"), raw=[_ints(_kind)], id="e"))

# --- streams ---
_good = request("add_sub", A, B, raw=[_a, _b], id="1")
_bad = request("add_sub", A, raw=[_a], id="2")
_lost = request("nope", A, B, raw=[_a, _b], id="3")
_final = request(
    "add_sub", A, B, raw=[_a, _b], id="4", parameters={"triton_enable_empty_final_response": _param(bool_param=True)}
)


def _stream(name: str, *messages: Message | bytes, metadata: tuple[tuple[str, str], ...] = ()) -> None:
    CASES.append(GrpcCase(f"ModelStreamInfer: {name}", "ModelStreamInfer", messages, metadata))


_stream("one request", _good)
_stream(
    "three requests",
    _good,
    request("add_sub", A, B, raw=[_a, _b], id="5"),
    request("add_sub", A, B, raw=[_b, _a], id="6"),
)
_stream("no request")
_stream("a bad request between good ones", _good, _bad, _good)
_stream("an unknown model", _lost)
_stream("an unknown model, then a good request", _lost, _good)
_stream("empty final response asked for", _final)
_stream("a model error", request("raises", tensor("KIND", [1], "INT32"), raw=[_ints(1)], id="e"))
_stream(
    "reserved parameter",
    request("params", ONE, raw=[_ints(0)], id="r", parameters={"triton_mine": _param(int64_param=1)}),
)
_stream("triton_grpc_error with a good request", _good, metadata=(("triton_grpc_error", "true"),))
_stream("triton_grpc_error with a bad request", _bad, metadata=(("triton_grpc_error", "true"),))
_stream("triton_grpc_error with an unknown model", _lost, metadata=(("triton_grpc_error", "true"),))
_stream("triton_grpc_error false", _lost, metadata=(("triton_grpc_error", "false"),))
_stream("triton_grpc_error, good then bad", _good, _bad, metadata=(("triton_grpc_error", "true"),))
_stream("not protobuf", b"\xff\xff\xff")

# --- repository ---
_call("everything", "RepositoryIndex", pb.RepositoryIndexRequest())
_call("ready only", "RepositoryIndex", pb.RepositoryIndexRequest(ready=True))
_call("another repository", "RepositoryIndex", pb.RepositoryIndexRequest(repository_name="other"))


def _load(name: str, model: str, *, repository: str = "", **parameters: pb.ModelRepositoryParameter) -> None:
    _call(
        name,
        "RepositoryModelLoad",
        pb.RepositoryModelLoadRequest(repository_name=repository, model_name=model, parameters=parameters),
    )


def _unload(name: str, model: str, *, repository: str = "", **parameters: pb.ModelRepositoryParameter) -> None:
    _call(
        name,
        "RepositoryModelUnload",
        pb.RepositoryModelUnloadRequest(repository_name=repository, model_name=model, parameters=parameters),
    )


for _model in ("nope", "", "..", "../add_sub", "a/b", "no_version", "bad_config"):
    _load(f"{_model!r}", _model)
_load("another repository", "on_demand", repository="other")
_load("unknown parameter", "on_demand", nope=pb.ModelRepositoryParameter(int64_param=1))
_load("config as an int", "on_demand", config=pb.ModelRepositoryParameter(int64_param=1))
_load("config not JSON", "on_demand", config=pb.ModelRepositoryParameter(string_param="nope"))
_call(
    "file without config",
    "RepositoryModelLoad",
    pb.RepositoryModelLoadRequest(
        model_name="on_demand", parameters={"file:1/model.py": pb.ModelRepositoryParameter(bytes_param=b"x")}
    ),
)
_load("on_demand", "on_demand")
_call("on_demand is ready", "ModelReady", pb.ModelReadyRequest(name="on_demand"))
_unload("unload_dependents as an int", "on_demand", unload_dependents=pb.ModelRepositoryParameter(int64_param=1))
_unload("unknown parameter", "on_demand", nope=pb.ModelRepositoryParameter(int64_param=1))
_unload("another repository", "on_demand", repository="other")
_unload("on_demand", "on_demand")
_unload("never loaded", "nope")
_unload("without a name", "")

# --- what other extensions offer ---
for _rpc, _message in (
    ("LogSettings", pb.LogSettingsRequest()),
    ("TraceSetting", pb.TraceSettingRequest()),
    ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
    ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="r", key="/nope", byte_size=4)),
    ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name="r")),
    ("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()),
    ("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"abc", byte_size=4)),
    ("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(name="r")),
):
    _call("plain", _rpc, _message)

# --- other services, RPCs that are not there ---
_call("check", "Check", b"", service="/grpc.health.v1.Health/")
_call("check a service", "Check", b"\x0a\x04nope", service="/grpc.health.v1.Health/")
_call("unknown", "Nope", b"")
_call("unknown service", "Nope", b"", service="/no.such.Service/")

for _rpc, _message in (
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="multi")),
    ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="multi")),
    ("RepositoryIndex", pb.RepositoryIndexRequest()),
    ("ServerReady", pb.ServerReadyRequest()),
):
    _call("control mode", _rpc, _message, to=MODE_CASES)
