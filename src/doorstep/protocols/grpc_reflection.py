"""gRPC server reflection, v1 and v1alpha: what a listener offers, for grpcurl and its like. Knows no service.

v1alpha has the same messages under another package; its descriptor is made from v1's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError

from doorstep import proto
from doorstep.errors import InvalidArgument
from doorstep.wire.exchange import Buffer
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.grpc_call import StreamCall
from doorstep.wire.grpc_status import Status

_V1, _V1ALPHA = "grpc.reflection.v1", "grpc.reflection.v1alpha"
_V1ALPHA_FILE = "reflection_v1alpha.proto"

_Request = proto.message(f"{_V1}.ServerReflectionRequest")
_Response = proto.message(f"{_V1}.ServerReflectionResponse")
_GRPC_ROUTE = re.compile(r"/[A-Za-z_]\w*(\.\w+)+/\w+")


def register(grpc: GrpcServer) -> None:
    reflection = Reflection(grpc)
    for package in (_V1, _V1ALPHA):
        grpc.add_stream(f"/{package}.ServerReflection/ServerReflectionInfo", reflection.info)


def is_grpc_route(route: str) -> bool:
    """Whether a route is `/package.Service/Method`."""
    return _GRPC_ROUTE.fullmatch(route) is not None


class Reflection:
    """Touched only from the event loop."""

    def __init__(self, grpc: GrpcServer) -> None:
        self._grpc = grpc
        self._files: dict[str, bytes] = {}  # by name
        self._imports: dict[str, list[str]] = {}
        self._file_of: dict[str, str] = {}  # by full name of a service, method, message, field …
        for data in proto.FILES.values():
            self._add(descriptor_pb2.FileDescriptorProto.FromString(data))

    def info(self, call: StreamCall) -> None:
        def answer(message: Buffer) -> None:
            try:
                request = _Request.FromString(bytes(message))
            except DecodeError:
                raise InvalidArgument("not a ServerReflectionRequest") from None
            response = _Response(valid_host=request.host, original_request=request)
            self.answer(request, response)
            call.send(response.SerializeToString())

        call.on_half_close = call.finish
        call.on_message = answer

    def answer(self, request: Any, response: Any) -> None:
        """Fills in a ServerReflectionResponse."""
        kind = request.WhichOneof("message_request")
        match kind:
            case "list_services":
                response.list_services_response.SetInParent()
                for name in self._grpc.services:
                    response.list_services_response.service.add(name=name)
                return
            case "file_by_filename":
                file = request.file_by_filename if request.file_by_filename in self._files else None
            case "file_containing_symbol":
                file = self._file_of.get(request.file_containing_symbol)
            case "all_extension_numbers_of_type" if request.all_extension_numbers_of_type in self._file_of:
                response.all_extension_numbers_response.base_type_name = request.all_extension_numbers_of_type
                return
            case None:
                _refuse(response, Status.INVALID_ARGUMENT, "message_request is not set")
                return
            case _:
                file = None  # there are no extensions in proto3
        if file is None:
            asked = getattr(request, kind)
            what = asked if isinstance(asked, str) else asked.containing_type
            _refuse(response, Status.NOT_FOUND, f"{kind.replace('_', ' ')}: '{what}' is not found")
            return
        response.file_descriptor_response.file_descriptor_proto.extend(self._with_imports(file))

    def _with_imports(self, file: str) -> list[bytes]:
        names = [file]
        for name in names:  # grows
            names.extend(n for n in self._imports[name] if n not in names)
        return [self._files[name] for name in names]

    def _add(self, file: Any) -> None:
        self._files[file.name] = file.SerializeToString()
        self._imports[file.name] = list(file.dependency)
        for name in _names(file):
            self._file_of[name] = file.name
        if file.package == _V1:
            self._add(_as_v1alpha(file))


def _refuse(response: Any, status: int, message: str) -> None:
    response.error_response.error_code = status
    response.error_response.error_message = message


def _names(file: Any) -> Iterator[str]:
    """Full names of everything that a file defines."""

    def of(message: Any, scope: str) -> Iterator[str]:
        name = f"{scope}{message.name}"
        yield name
        for member in (*message.field, *message.oneof_decl):
            yield f"{name}.{member.name}"
        for nested in message.nested_type:
            yield from of(nested, f"{name}.")
        for enum in message.enum_type:
            yield f"{name}.{enum.name}"

    package = f"{file.package}." if file.package else ""
    for message in file.message_type:
        yield from of(message, package)
    for enum in file.enum_type:
        yield f"{package}{enum.name}"
    for service in file.service:
        yield f"{package}{service.name}"
        for method in service.method:
            yield f"{package}{service.name}.{method.name}"


def _as_v1alpha(file: Any) -> Any:
    """The file with its package, and all references to it, renamed."""
    copy = descriptor_pb2.FileDescriptorProto()
    copy.CopyFrom(file)
    copy.name = _V1ALPHA_FILE
    copy.package = _V1ALPHA
    for message in copy.message_type:
        for field in message.field:
            field.type_name = field.type_name.replace(f".{_V1}.", f".{_V1ALPHA}.")
    for service in copy.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{_V1}.", f".{_V1ALPHA}.")
            method.output_type = method.output_type.replace(f".{_V1}.", f".{_V1ALPHA}.")
    return copy
