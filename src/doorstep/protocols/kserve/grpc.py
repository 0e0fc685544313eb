"""The service inference.GRPCInferenceService but for inference itself. Knows no wire format beyond protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from doorstep import proto
from doorstep.errors import Internal, InvalidArgument, Unsupported
from doorstep.protocols.kserve import metadata
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.grpc_infer import ModelInfer, echo_request_id
from doorstep.protocols.kserve.grpc_settings import log_settings, trace_setting
from doorstep.protocols.kserve.grpc_stream import stream_handler
from doorstep.protocols.kserve.texts import NO_REPOSITORY_NAME
from doorstep.repository.base import LoadRequest
from doorstep.wire.limits import WireLimits

if TYPE_CHECKING:
    from doorstep.server import InferenceServer
    from doorstep.wire.grpc import GrpcServer
    from doorstep.wire.grpc_call import UnaryCall

SERVICE = "inference.GRPCInferenceService"

Handler = Callable[["UnaryCall"], Any]


def add_methods(
    grpc: GrpcServer, server: InferenceServer, limits: WireLimits, forwarding: HeaderForwarding | None = None
) -> None:
    """Every rpc of the service."""
    for name, handler in unary_handlers(server, forwarding).items():
        grpc.add_unary(f"/{SERVICE}/{name}", handler)
    grpc.add_stream(f"/{SERVICE}/ModelStreamInfer", stream_handler(server, limits, forwarding))


def unary_handlers(server: InferenceServer, forwarding: HeaderForwarding | None = None) -> dict[str, Handler]:
    rpcs = Rpcs(server)
    return {
        "ModelInfer": ModelInfer(server, forwarding).infer,
        "ServerLive": answering(rpcs.server_live, "ServerLive"),
        "ServerReady": answering(rpcs.server_ready, "ServerReady"),
        "ModelReady": awaiting(rpcs.model_ready, "ModelReady"),
        "ServerMetadata": answering(rpcs.server_metadata, "ServerMetadata"),
        "ModelMetadata": answering(rpcs.model_metadata, "ModelMetadata"),
        "ModelConfig": answering(rpcs.model_config, "ModelConfig"),
        "ModelStatistics": answering(rpcs.model_statistics, "ModelStatistics"),
        "RepositoryIndex": awaiting(rpcs.repository_index, "RepositoryIndex"),
        "RepositoryModelLoad": awaiting(rpcs.load, "RepositoryModelLoad"),
        "RepositoryModelUnload": awaiting(rpcs.unload, "RepositoryModelUnload"),
        "SystemSharedMemoryStatus": answering(rpcs.system_shared_memory_status, "SystemSharedMemoryStatus"),
        "SystemSharedMemoryRegister": answering(rpcs.system_shared_memory_register, "SystemSharedMemoryRegister"),
        "SystemSharedMemoryUnregister": answering(rpcs.system_shared_memory_unregister, "SystemSharedMemoryUnregister"),
        "CudaSharedMemoryStatus": answering(rpcs.cuda_shared_memory_status, "CudaSharedMemoryStatus"),
        "CudaSharedMemoryRegister": answering(rpcs.cuda_shared_memory_register, "CudaSharedMemoryRegister"),
        "CudaSharedMemoryUnregister": answering(rpcs.cuda_shared_memory_unregister, "CudaSharedMemoryUnregister"),
        "TraceSetting": answering(partial(trace_setting, server), "TraceSetting"),
        "LogSettings": answering(partial(log_settings, server), "LogSettings"),
    }


def answering(method: Callable[[Any], Any], name: str) -> Handler:
    """Makes a function from request message to response message into a handler."""
    request_class = proto.message(f"inference.{name}Request")

    def handler(call: UnaryCall) -> None:
        echo_request_id(call)
        call.respond(method(_parsed(request_class, call)).SerializeToString())

    return handler


def awaiting(method: Callable[[Any], Any], name: str) -> Handler:
    """The same for a coroutine function; None stands for a response message without fields."""
    request_class = proto.message(f"inference.{name}Request")

    @wraps(method)
    async def handler(call: UnaryCall) -> None:
        echo_request_id(call)
        call.on_cancel = None  # what has been asked for is done, though nobody may hear of it
        response = await method(_parsed(request_class, call))
        call.respond(b"" if response is None else response.SerializeToString())

    return handler


def _parsed(request_class: Any, call: UnaryCall) -> Any:
    try:
        return request_class.FromString(call.message)
    except DecodeError:
        raise Internal("Unable to parse request") from None


class Rpcs:
    """One method per rpc: request message in, response message out. Touched only from the event loop."""

    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    def server_live(self, _: Any) -> Any:
        return proto.ServerLiveResponse(live=self._server.live)

    def server_ready(self, _: Any) -> Any:
        return proto.ServerReadyResponse(ready=self._server.ready)

    async def model_ready(self, request: Any) -> Any:
        return proto.ModelReadyResponse(ready=await metadata.model_ready(self._server, request.name, request.version))

    def server_metadata(self, _: Any) -> Any:
        return ParseDict(metadata.server_metadata(self._server), proto.ServerMetadataResponse())

    def model_metadata(self, request: Any) -> Any:
        found = metadata.model_metadata(self._server, request.name, request.version)
        return ParseDict(found, proto.ModelMetadataResponse())

    def model_config(self, request: Any) -> Any:
        config = self._server.model(request.name, request.version).config
        return proto.ModelConfigResponse(config=config.proto)

    def model_statistics(self, request: Any) -> Any:
        found = metadata.statistics(self._server, request.name, request.version)
        return ParseDict(found, proto.ModelStatisticsResponse())

    async def repository_index(self, request: Any) -> Any:
        _refuse_repository(request)
        await self._server.refresh_index()
        found = metadata.index(self._server.index(request.ready))
        return ParseDict({"models": found}, proto.RepositoryIndexResponse())

    async def load(self, request: Any) -> None:
        _refuse_repository(request)
        await self._server.load(request.model_name, load_request(request.parameters))

    async def unload(self, request: Any) -> None:
        _refuse_repository(request)
        dependents = False
        parameter = request.parameters.get("unload_dependents")
        if parameter is not None:
            if parameter.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
            dependents = parameter.bool_param
        await self._server.unload(request.model_name, dependents)

    def system_shared_memory_status(self, request: Any) -> Any:
        answer = proto.SystemSharedMemoryStatusResponse()
        for r in self._server.regions.status(request.name):
            region = answer.regions[r.name]
            region.name, region.key, region.offset, region.byte_size = r.name, r.key, r.offset, r.byte_size
        return answer

    def system_shared_memory_register(self, request: Any) -> Any:
        self._server.regions.register(request.name, request.key, request.offset, request.byte_size)
        return proto.SystemSharedMemoryRegisterResponse()

    def system_shared_memory_unregister(self, request: Any) -> Any:
        self._server.regions.unregister(request.name)
        return proto.SystemSharedMemoryUnregisterResponse()

    def cuda_shared_memory_status(self, request: Any) -> Any:
        self._server.regions.cuda_status(request.name)
        return proto.CudaSharedMemoryStatusResponse()

    def cuda_shared_memory_register(self, request: Any) -> Any:
        self._server.regions.register_cuda(request.name)
        return proto.CudaSharedMemoryRegisterResponse()

    def cuda_shared_memory_unregister(self, _: Any) -> Any:
        self._server.regions.unregister_cuda()
        return proto.CudaSharedMemoryUnregisterResponse()


def _refuse_repository(request: Any) -> None:
    if request.repository_name:
        raise Unsupported(NO_REPOSITORY_NAME)


def load_request(parameters: Mapping[str, Any]) -> LoadRequest:
    """What a RepositoryModelLoadRequest asks for beside the model."""
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, message in parameters.items():
        kind = message.WhichOneof("parameter_choice")
        if key == "config":
            config = _of_kind(key, message, kind, "string_param")
        elif key.startswith("file:"):
            files[key.removeprefix("file:")] = _of_kind(key, message, kind, "bytes_param")
        else:
            raise InvalidArgument(f"unrecognized load parameter '{key}'.")
    return LoadRequest(config, files)


def _of_kind(key: str, message: Any, kind: str | None, expected: str) -> Any:
    if kind != expected:
        raise InvalidArgument(f"invalid value type for load parameter '{key}', expected {expected}.")
    return getattr(message, expected)
