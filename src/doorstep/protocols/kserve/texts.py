"""What this server answers to parts of the V2 protocol that it does not do, or does not do yet. Knows no endpoint."""

from __future__ import annotations

from doorstep.errors import NotFound

NO_REPOSITORY_NAME = "'repository_name' specification is not supported"
SHARED_MEMORY_DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
GENERATE_LATER = (
    "the generate extension is not supported by this version of Doorstep: use /v2/models/<name>/infer, or ModelInfer "
    "over gRPC"
)
TRACE_LATER = "the trace extension is not supported by this version of Doorstep: trace settings can not be read or set"
LOGGING_LATER = (
    "the logging extension is not supported by this version of Doorstep: log settings are those of the command line"
)


def no_shared_memory_region(kind: str, name: str) -> NotFound:
    """`kind` is system or cuda. (server, shared_memory_manager.cc: GetStatus)"""
    return NotFound(f"Unable to find {kind} shared memory region: '{name}'")
