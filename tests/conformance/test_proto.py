"""Our .proto files say what the clients' say, field by field, both ways. The clients' generated code decides."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from doorstep import proto
from doorstep.proto import compile as proto_compile

AUTHORITIES = {
    "model_config.proto": model_config_pb2,
    "grpc_service.proto": service_pb2,
    "health.proto": health_pb2,
    "reflection_v1alpha.proto": reflection_pb2,
}


def described(file: descriptor_pb2.FileDescriptorProto) -> dict[str, Any]:
    """Everything a client can notice, by full name: fields, enum values and methods."""
    package = f".{file.package}"
    found: dict[str, Any] = {}
    for enum in file.enum_type:
        found[f"{package}.{enum.name}"] = {(v.name, v.number) for v in enum.value}
    for message in file.message_type:
        found.update(messages(message, package))
    for service in file.service:
        for method in service.method:
            found[f"{package}.{service.name}/{method.name}"] = (
                method.input_type,
                method.output_type,
                method.client_streaming,
                method.server_streaming,
            )
    return found


def messages(message: descriptor_pb2.DescriptorProto, scope: str) -> Iterator[tuple[str, Any]]:
    name = f"{scope}.{message.name}"
    oneofs = [o.name for o in message.oneof_decl]
    yield (
        name,
        {
            (
                f.name,
                f.number,
                f.type,
                f.label,
                f.type_name,
                oneofs[f.oneof_index] if f.HasField("oneof_index") else "",
                f.proto3_optional,
                f.json_name,
            )
            for f in message.field
        },
    )
    yield f"{name} is a map entry", message.options.map_entry
    for enum in message.enum_type:
        yield f"{name}.{enum.name}", {(v.name, v.number) for v in enum.value}
    for nested in message.nested_type:
        yield from messages(nested, name)


def theirs(module: Any) -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        fill_json_names(message)
    return described(file)


def fill_json_names(message: descriptor_pb2.DescriptorProto) -> None:
    """CopyToProto leaves out json_name where it is what protoc would derive."""
    for field in message.field:
        if not field.json_name:
            first, *rest = field.name.split("_")
            field.json_name = first + "".join(part[:1].upper() + part[1:] for part in rest)
    for nested in message.nested_type:
        fill_json_names(nested)


def ours(filename: str) -> dict[str, Any]:
    return described(descriptor_pb2.FileDescriptorProto.FromString(proto.FILES[filename]))


@pytest.mark.parametrize("filename", AUTHORITIES)
def test_every_message_enum_and_method_is_the_clients(filename: str) -> None:
    mine, their = ours(filename), theirs(AUTHORITIES[filename])
    if filename == "health.proto":  # some releases of the package have a List call, which no client needs
        their = {name: what for name, what in their.items() if "List" not in name}
    assert mine.keys() == their.keys()
    for name in their:
        assert mine[name] == their[name], name


def test_reflection_is_offered_under_both_of_its_names() -> None:
    old = descriptor_pb2.FileDescriptorProto.FromString(proto.FILES["reflection_v1alpha.proto"])
    file = descriptor_pb2.FileDescriptorProto.FromString(proto.FILES["reflection.proto"])
    renamed = str(file).replace("reflection.v1", "reflection.v1alpha")
    renamed = renamed.replace("reflection.proto", "reflection_v1alpha.proto")
    assert renamed == str(old)


@pytest.mark.parametrize("module", [model_config_pb2, service_pb2], ids=["model_config", "grpc_service"])
def test_every_message_of_the_clients_survives_a_trip_through_ours(module: Any) -> None:
    for name, descriptor in module.DESCRIPTOR.message_types_by_name.items():
        theirs_filled = filled(getattr(module, name), descriptor)
        wire = theirs_filled.SerializeToString(deterministic=True)
        mine = proto.message(f"inference.{name}").FromString(wire)
        assert mine.SerializeToString(deterministic=True) == wire
        assert str(mine) == str(theirs_filled)  # fields it did not know would have numbers for names


def filled(cls: Any, descriptor: Any) -> Any:
    """A message with something in every field; the last member of each oneof."""
    return cls(**values(descriptor, 0))


def values(descriptor: Any, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field in descriptor.fields:
        entry = field.message_type is not None and field.message_type.GetOptions().map_entry
        if entry:
            key, value = (field.message_type.fields_by_name[n] for n in ("key", "value"))
            made[field.name] = {one(key, depth): one(value, depth)}
        else:
            made[field.name] = [one(field, depth)] if proto.is_repeated(field) else one(field, depth)
    return made


def one(field: Any, depth: int) -> Any:
    if field.message_type is not None:
        return values(field.message_type, depth + 1) if depth < 8 else {}
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    kinds = {field.CPPTYPE_STRING: "x", field.CPPTYPE_BOOL: True, field.CPPTYPE_FLOAT: 0.5, field.CPPTYPE_DOUBLE: 0.5}
    value = kinds.get(field.cpp_type, 7)
    return b"x" if field.type == field.TYPE_BYTES else value


def test_the_descriptors_in_the_package_are_those_of_the_proto_files() -> None:
    fresh = descriptor_pb2.FileDescriptorSet.FromString(proto_compile.compile_descriptors())
    packed = descriptor_pb2.FileDescriptorSet.FromString(proto_compile.OUTPUT.read_bytes())
    assert [f.name for f in packed.file] == [f.name for f in fresh.file], "run `make proto`"
    assert packed == fresh, "run `make proto`"


def test_ours_and_the_clients_live_in_one_process() -> None:
    code = (
        "from doorstep import proto; from tritonclient.grpc import service_pb2;"
        "mine = proto.ModelInferRequest(model_name='m'); theirs = service_pb2.ModelInferRequest(model_name='m');"
        "assert type(mine) is not type(theirs); assert mine.SerializeToString() == theirs.SerializeToString()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_an_unknown_message_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"no message inference\.ModelInfer in"):
        _ = proto.ModelInfer
