"""What the V2 protocol says of the server, its models and its repository, as plain dicts. Knows neither HTTP nor gRPC.

The dicts are the JSON of the HTTP API; their keys are also the field names of the gRPC messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from doorstep.config.model import TensorSpec
from doorstep.errors import DoorstepError, ErrorCode, InvalidArgument
from doorstep.protocols.kserve.errors import checked_version
from doorstep.repository.base import IndexEntry

if TYPE_CHECKING:
    from doorstep.model import Model
    from doorstep.server import InferenceServer
    from doorstep.stats import ModelStatistics, ResponseStatistics

Json = dict[str, Any]


def server_metadata(server: InferenceServer) -> Json:
    return {"name": server.name, "version": server.version, "extensions": list(server.extensions)}


def model_metadata(server: InferenceServer, name: str, version: str) -> Json:
    """`version` "": the newest version's tensors, and all ready versions. Raises NotFound or Unavailable."""
    model = server.model(name, version)
    config = model.config
    return {
        "name": name,
        "versions": [model.version] if version else list(server.versions(name)),
        "platform": config.platform,
        "inputs": _tensors(config.inputs, config.max_batch_size > 0),
        "outputs": _tensors(config.outputs, config.max_batch_size > 0),
    }


async def model_ready(server: InferenceServer, name: str, version: str) -> bool:
    """Whether it can be called. A model nobody knows is not ready, which is no error: clients poll for it to appear."""
    try:
        return await server.check_ready(name, version)
    except DoorstepError as error:
        if error.code is ErrorCode.NOT_FOUND:
            return False
        raise


def _tensors(specs: Mapping[str, TensorSpec], batches: bool) -> list[Json]:
    lead = [-1] if batches else []
    return [{"name": s.name, "datatype": s.datatype.name, "shape": [*lead, *s.dims]} for s in specs.values()]


def index(entries: Iterable[IndexEntry]) -> list[Json]:
    """Empty fields are left out: a model that was never loaded has only a name."""
    fields = ("name", "version", "state", "reason")
    return [{f: getattr(entry, f) for f in fields if f == "name" or getattr(entry, f)} for entry in entries]


def statistics(server: InferenceServer, name: str = "", version: str = "") -> Json:
    """Of one version, of all of a model's, or of all models."""
    version = checked_version(version)
    if name:
        ready = server.versions(name)
        if not ready:
            raise InvalidArgument(f"requested model '{name}' is not available")
        if version and version not in ready:
            raise InvalidArgument(f"requested model version is not available for model '{name}'")
    return {"model_stats": [_of_model(model) for model in server.statistics(name, version)]}


def _of_model(model: Model) -> Json:
    s: ModelStatistics = model.stats
    computed = s.compute_count
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": s.last_inference_ms,
        "inference_count": s.inference_count,
        "execution_count": s.execution_count,
        "inference_stats": {
            "success": _duration(s.success_count, s.success_ns),
            "fail": _duration(s.fail_count, s.fail_ns),
            "queue": _duration(s.success_count, s.queue_ns),
            "compute_input": _duration(computed, s.compute_input_ns),
            "compute_infer": _duration(computed, s.compute_infer_ns),
            "compute_output": _duration(computed, s.compute_output_ns),
            "cache_hit": _duration(s.cache_hit_count, s.cache_hit_ns),
            "cache_miss": _duration(s.cache_miss_count, s.cache_miss_ns),
        },
        "response_stats": {str(number): _responses(r) for number, r in sorted(s.responses.items())},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(batch.count, batch.compute_input_ns),
                "compute_infer": _duration(batch.count, batch.compute_infer_ns),
                "compute_output": _duration(batch.count, batch.compute_output_ns),
            }
            for rows, batch in sorted(s.batches.items())
        ],
        "memory_usage": [],
    }


def _responses(r: ResponseStatistics) -> Json:
    return {
        "compute_infer": _duration(r.compute_infer_count, r.compute_infer_ns),
        "compute_output": _duration(r.compute_output_count, r.compute_output_ns),
        "success": _duration(r.success_count, r.success_ns),
        "fail": _duration(r.fail_count, r.fail_ns),
        "empty_response": _duration(r.empty_count, r.empty_ns),
        "cancel": _duration(r.cancel_count, r.cancel_ns),
    }


def _duration(count: int, ns: int) -> Json:
    return {"count": count, "ns": ns}
