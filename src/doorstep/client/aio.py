"""The client for asyncio: the same calls as sync.py's, awaited. Knows no tensor's layout and no HTTP."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from doorstep.client.connect import AnswerReader, Disconnected, Target, TimedOut, request_bytes
from doorstep.client.messages import (
    Answer,
    Call,
    infer_call,
    json_call,
    load_call,
    model_path,
    named_inputs,
    one_or_all,
    read_infer,
    read_json,
    unload_call,
)
from doorstep.client.tensors import to_tensors
from doorstep.errors import DoorstepError, Unavailable
from doorstep.types import Array

_READ = 1 << 18  # bytes
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class AsyncClient:
    """`Client` for one event loop: tasks may share it, threads may not. See `Client` for what the calls mean."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout: float | None = 60.0,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._target = Target.parse(url, headers, tls)
        self._timeout = timeout
        self._idle: deque[_Streams] = deque()
        self._metadata: dict[tuple[str, str], Any] = {}
        self._closed = False

    # Inference

    async def infer(
        self,
        model: str,
        inputs: Any = None,
        /,
        *,
        model_version: str = "",
        requested: Sequence[str] = (),
        request_id: str = "",
        parameters: Mapping[str, bool | int | float | str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  the same as Client's
        **named: Any,
    ) -> Any:
        return one_or_all(
            await self.infer_all(
                model,
                inputs,
                model_version=model_version,
                requested=requested,
                request_id=request_id,
                parameters=parameters,
                timeout=timeout,
                **named,
            )
        )

    async def infer_all(
        self,
        model: str,
        inputs: Any = None,
        /,
        *,
        model_version: str = "",
        requested: Sequence[str] = (),
        request_id: str = "",
        parameters: Mapping[str, bool | int | float | str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        **named: Any,
    ) -> dict[str, Array]:
        metadata = self._metadata.get((model, model_version))
        if metadata is None:
            metadata = self._metadata[model, model_version] = await self.metadata(model, model_version)
        try:
            tensors = to_tensors(metadata, named_inputs(metadata, inputs, named))
            call = infer_call(model, model_version, tensors, outputs=requested, id=request_id, parameters=parameters)
            return read_infer(await self._send(call, timeout))
        except DoorstepError:
            self._metadata.pop((model, model_version), None)  # perhaps the model has changed
            raise

    # The server and its models

    async def live(self) -> bool:
        return (await self._send(Call("GET", "/v2/health/live"))).status == 200

    async def ready(self, model: str = "", version: str = "") -> bool:
        path = f"{model_path(model, version)}/ready" if model else "/v2/health/ready"
        return (await self._send(Call("GET", path))).status == 200

    async def server(self) -> Any:
        return await self._json(json_call("/v2"))

    async def metadata(self, model: str, version: str = "") -> Any:
        return await self._json(json_call(model_path(model, version)))

    async def config(self, model: str, version: str = "") -> Any:
        return await self._json(json_call(f"{model_path(model, version)}/config"))

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        path = f"{model_path(model, version)}/stats" if model else "/v2/models/stats"
        return list((await self._json(json_call(path)))["model_stats"])

    async def models(self, *, ready: bool = False) -> list[dict[str, Any]]:
        return list(await self._json(json_call("/v2/repository/index", {"ready": ready})))

    async def load(
        self,
        model: str,
        *,
        config: str | Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        read_json(await self._send(load_call(model, config, files or {}), timeout))

    async def unload(
        self,
        model: str,
        *,
        unload_dependents: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        read_json(await self._send(unload_call(model, unload_dependents), timeout))

    async def _json(self, call: Call) -> Any:
        return read_json(await self._send(call))

    # Connections

    async def _send(self, call: Call, timeout: float | None = None) -> Answer:  # noqa: ASYNC109
        if self._closed:
            raise Unavailable("this client is closed")
        wait = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(wait):
                return await self._send_patiently(call)
        except TimeoutError:
            raise TimedOut(f"no answer from {self._target.url} within {wait:g} s") from None

    async def _send_patiently(self, call: Call) -> Answer:
        while True:
            streams = self._take_idle()
            used_before = streams is not None
            try:
                if streams is None:
                    target = self._target
                    streams = await asyncio.open_connection(target.host, target.port, ssl=target.tls)
                return await self._exchange(streams, call)
            except TimeoutError:
                raise
            except (OSError, Disconnected) as error:
                # The server may close a connection that was idle, at any moment: that says nothing about the request.
                if used_before and not (isinstance(error, Disconnected) and error.answer_begun):
                    continue
                raise self._target.cannot_reach(error) from error

    def _take_idle(self) -> _Streams | None:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return None

    async def _exchange(self, streams: _Streams, call: Call) -> Answer:
        incoming, outgoing = streams
        reader = AnswerReader()
        keep = False
        try:
            outgoing.writelines(request_bytes(self._target, call))
            try:
                await outgoing.drain()
            except (BrokenPipeError, ConnectionResetError):
                pass  # perhaps it has refused the request already, and said why
            while reader.answer is None:
                data = await incoming.read(_READ)
                if data:
                    reader.feed(data)
                else:
                    reader.feed_eof()
            keep = reader.keep_alive and not self._closed
            return reader.answer
        finally:
            if keep:
                self._idle.append(streams)
            else:
                outgoing.close()

    async def close(self) -> None:
        """Closes the connections that are idle; calls that are under way finish."""
        self._closed = True
        while self._idle:
            _, writer = self._idle.pop()
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                pass  # it was closed from the other side

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._target.url}{' closed' if self._closed else ''}>"
