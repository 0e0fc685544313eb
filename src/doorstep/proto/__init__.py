"""Our .proto files and the message classes made from them. Knows nothing of what the messages are for.

The classes live in a descriptor pool of their own, so that they and another package's copy of the same protocol
(tritonclient's, say) can be imported into one process; and they are made from descriptors, not from generated code, so
that one wheel works with protobuf 6 and 7. `make proto` writes descriptors.binpb from the .proto files.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

POOL = descriptor_pool.DescriptorPool()
FILES: dict[str, bytes] = {}  # file name → serialised FileDescriptorProto, for reflection

_set = descriptor_pb2.FileDescriptorSet.FromString(files(__name__).joinpath("descriptors.binpb").read_bytes())
for _file in _set.file:
    FILES[_file.name] = _file.SerializeToString()
    POOL.AddSerializedFile(FILES[_file.name])


def message(full_name: str) -> Any:
    """The class of a message, by its full name: `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name))


def is_repeated(field: Any) -> bool:
    """Whether a field holds a list or a map. protobuf before 6.31 says so by another name, which later ones warn of."""
    found = getattr(field, "is_repeated", None)
    return bool(field.label == field.LABEL_REPEATED if found is None else found)


def __getattr__(name: str) -> Any:
    """`proto.ModelInferRequest` is short for `message("inference.ModelInferRequest")`."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        found = message(f"inference.{name}")
    except KeyError:
        raise AttributeError(f"no message inference.{name} in doorstep's .proto files") from None
    globals()[name] = found
    return found
