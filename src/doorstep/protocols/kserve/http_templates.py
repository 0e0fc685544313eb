"""Templates of HTTP requests: the JSON before one binary tensor is the key. Pure."""

from __future__ import annotations

from doorstep.protocols.kserve.templates import KEPT, Template, is_simple
from doorstep.protocols.kserve.wanted import Wanted
from doorstep.request import InferenceRequest
from doorstep.wire.exchange import Buffer

LARGEST = 2048  # bytes of JSON; a longer one is not worth keeping


class HttpTemplates:
    """Touched only from the event loop."""

    __slots__ = ("_by_json",)

    def __init__(self) -> None:
        self._by_json: dict[bytes, Template] = {}

    def find(self, body: Buffer, json_size: int) -> Template | None:
        if json_size > LARGEST:
            return None
        text = body[:json_size]
        template = self._by_json.get(text if type(text) is bytes else bytes(text))
        return template if template is not None and len(body) - json_size == template.size else None

    def learn(self, body: Buffer, json_size: int, request: InferenceRequest, wanted: Wanted) -> None:
        """Remembers a request that `decode_infer` has accepted, if it is of the simple kind."""
        if 0 < json_size <= LARGEST and is_simple(request):
            (tensor,) = request.inputs.values()
            if tensor.array.nbytes == len(body) - json_size:  # all of it is binary, and nothing else is
                if len(self._by_json) >= KEPT:
                    self._by_json.clear()
                self._by_json[bytes(body[:json_size])] = Template(request, wanted)
