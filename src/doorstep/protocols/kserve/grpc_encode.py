"""InferenceResponse → the bytes of a ModelInferResponse or ModelStreamInferResponse. Pure.

The message is put together by hand: what responses have in common is kept, and the tensors follow it as they are, not
copied unless small. Outputs are always raw, as Triton's are.
"""

from __future__ import annotations

from functools import lru_cache

from doorstep import proto
from doorstep.config.model import ModelConfig
from doorstep.errors import InvalidArgument
from doorstep.protocols.kserve.classification import classify
from doorstep.protocols.kserve.grpc_parameters import set_parameter
from doorstep.protocols.kserve.protobuf_wire import varint
from doorstep.protocols.kserve.tensor_bytes import tensor_bytes
from doorstep.protocols.kserve.wanted import Wanted
from doorstep.request import InferenceResponse, Parameter
from doorstep.types import DataType
from doorstep.wire.exchange import Buffer

Buffers = tuple[Buffer, ...]

_LARGEST = 2**31 - 1  # bytes of one message
_JOINED_BYTES = 16_384  # a smaller message goes out as one buffer

# Tags of length-delimited fields: number << 3 | 2.
_ID = b"\x1a"  # ModelInferResponse.id = 3
_OUTPUT = b"\x2a"  # ModelInferResponse.outputs = 5
RAW = b"\x32"  # ModelInferResponse.raw_output_contents = 6
_ERROR = b"\x0a"  # ModelStreamInferResponse.error_message = 1
STREAMED = b"\x12"  # ModelStreamInferResponse.infer_response = 2

# By its full name: protobuf without C has no attribute for it.
_OutputTensor = proto.message("inference.ModelInferResponse.InferOutputTensor")


def encode_infer(response: InferenceResponse, wanted: Wanted, config: ModelConfig, extra: bytes = b"") -> Buffers:
    """A successful response as a ModelInferResponse. `extra` is more of the same message, already encoded."""
    head = [opening(response.model_name, response.model_version, response.id)]
    if response.parameters:
        head.append(_parameters(response.parameters))
    head.append(extra)
    body: list[Buffer] = []
    forms = wanted.forms
    for tensor in response.outputs:
        if forms and tensor.name in forms:
            form = forms[tensor.name]
            if form.place is not None:
                form.place.put(tensor.name, tensor_bytes(tensor))
                head.append(output(tensor.name, tensor.datatype, tensor.array.shape))
                body += (RAW + b"\0", b"")  # the clients count on contents for every output
                continue
            spec = config.outputs[tensor.name]
            tensor = classify(tensor, form.classes, spec.labels, batched=config.max_batch_size > 0)
        head.append(output(tensor.name, tensor.datatype, tensor.array.shape))
        data = tensor_bytes(tensor)
        body += (RAW + varint(len(data)), data)
    size = sum(map(len, head)) + sum(map(len, body))
    if size <= _JOINED_BYTES:
        return (b"".join(head + body),)  # type: ignore[operator]
    if size > _LARGEST:
        raise InvalidArgument(f"Response has byte size {size} which exceeds gRPC's byte size limit {_LARGEST}.")
    # The first raw tensor's tag goes with the head, so that the buffers are head, tensor, tag, tensor …
    return (b"".join((*head, body[0])), *body[1:])


def encode_stream(message: Buffers) -> Buffers:
    """A ModelInferResponse inside a ModelStreamInferResponse."""
    first = b"".join((STREAMED, varint(sum(map(len, message))), message[0]))
    return (first, *message[1:])


def encode_stream_error(text: str, inner: bytes) -> bytes:
    """A failed request of a stream: the error, and a ModelInferResponse that says which request it was."""
    error = text.encode("utf-8", "replace")
    return b"".join((_ERROR, varint(len(error)), error, STREAMED, varint(len(inner)), inner))


def opening(name: str, version: str, request_id: str) -> bytes:
    """What a response says before its outputs."""
    made = _of_model(name, version)
    if request_id:
        text = request_id.encode()
        made = b"".join((made, _ID, varint(len(text)), text))
    return made


@lru_cache(maxsize=1024)
def _of_model(name: str, version: str) -> bytes:
    made: bytes = proto.ModelInferResponse(model_name=name, model_version=version).SerializeToString()
    return made


@lru_cache(maxsize=1024)
def output(name: str, datatype: DataType, shape: tuple[int, ...]) -> bytes:
    """One output without its values."""
    message = _OutputTensor(name=name, datatype=datatype.name, shape=shape)
    made: bytes = message.SerializeToString()
    return _OUTPUT + varint(len(made)) + made


def _parameters(parameters: dict[str, Parameter]) -> bytes:
    message = proto.ModelInferResponse()
    for key, value in parameters.items():
        set_parameter(message.parameters[key], value)
    made: bytes = message.SerializeToString()
    return made


def final_flag(final: bool) -> bytes:
    """The parameter `triton_final_response`, for the responses of a stream."""
    return _FINAL[final]


_FINAL = {final: _parameters({"triton_final_response": final}) for final in (False, True)}


def named(request_id: str, model_name: str = "", model_version: str = "") -> bytes:
    """A ModelInferResponse that only says whose it is."""
    made: bytes = proto.ModelInferResponse(
        id=request_id, model_name=model_name, model_version=model_version
    ).SerializeToString()
    return made
