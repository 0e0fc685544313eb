"""Clients of a sequence model, one a connection, each with one sequence after the other: the next request goes out when
the last is answered. A process of its own, beside the server: `-m benchmarks.sequence_load PORT MODEL CLIENTS SECONDS`.

Every answer is checked: the model adds up what its sequence sends.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

import uvloop

LENGTH = 10  # requests of a sequence
_CONTENT_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Client(asyncio.Protocol):
    """One connection, and one sequence at a time."""

    def __init__(self, model: str, number: int) -> None:
        self.answered = 0
        self.failure = ""
        self._requests = [self._request(model, number, step) for step in range(LENGTH)]
        self._step = 0
        self._received = b""

    def _request(self, model: str, number: int, step: int) -> bytes:
        parameters = {"sequence_id": number, "sequence_start": step == 0, "sequence_end": step == LENGTH - 1}
        tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [number]}
        body = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
        head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._number = number
        return head.encode() + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # (uvloop's is no subclass)
        self._transport.write(self._requests[0])

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(head) if found else None
        if length is None or len(body) < int(length[1]):
            return
        self._received = b""
        expected = self._number * (self._step + 1)
        if not head.startswith(b"HTTP/1.1 200") or json.loads(body)["outputs"][0]["data"] != [expected]:
            self.failure = f"step {self._step} of sequence {self._number} is answered {body!r}, not {expected}"
            self._transport.close()
            return
        self.answered += 1
        self._step = (self._step + 1) % LENGTH
        self._transport.write(self._requests[self._step])


async def run(port: int, model: str, clients: int, seconds: float) -> int:
    """How many requests were answered. Raises RuntimeError where one was not, or not rightly."""
    loop = asyncio.get_running_loop()
    made = [Client(model, number) for number in range(1, clients + 1)]
    transports = [(await loop.create_connection(lambda c=client: c, "127.0.0.1", port))[0] for client in made]  # type: ignore[misc]
    await asyncio.sleep(seconds)
    answered = sum(client.answered for client in made)
    for transport in transports:
        transport.close()
    if not answered:
        raise RuntimeError("nothing is answered")
    if failures := [client.failure for client in made if client.failure]:
        raise RuntimeError(failures[0])
    return answered


def main() -> None:
    port, model, clients, seconds = sys.argv[1:5]
    print(uvloop.run(run(int(port), model, int(clients), float(seconds))))


if __name__ == "__main__":
    main()
