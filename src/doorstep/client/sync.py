"""The blocking client. Knows no tensor's layout (messages.py) and no HTTP (connect.py)."""

from __future__ import annotations

import select
import socket
import ssl
import time
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


class Client:
    """A server, by its HTTP address. Threads may share one client: each call has a connection to itself while it lasts.

    Connections are kept for the next call. `timeout` is in seconds, for a whole call; None waits for ever. Errors are
    `doorstep.errors`: the server's own, `Unavailable` where it cannot be reached, `TimedOut` where it took too long.
    """

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
        self._idle: deque[socket.socket] = deque()  # its append and pop are atomic
        self._metadata: dict[tuple[str, str], Any] = {}
        self._closed = False

    # Inference

    def infer(
        self,
        model: str,
        inputs: Any = None,
        /,
        *,
        model_version: str = "",
        requested: Sequence[str] = (),
        request_id: str = "",
        parameters: Mapping[str, bool | int | float | str] | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """Runs the model once; the array if it has one output, else a dict of arrays by name.

        Inputs are given by name (`infer("mlp", input=x)`), as a dict, or, where there is only one, as they are. Arrays,
        nested lists, numbers, str and bytes are made what the model asks for; a missing batch dimension is added.
        """
        return one_or_all(
            self.infer_all(
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

    def infer_all(
        self,
        model: str,
        inputs: Any = None,
        /,
        *,
        model_version: str = "",
        requested: Sequence[str] = (),
        request_id: str = "",
        parameters: Mapping[str, bool | int | float | str] | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> dict[str, Array]:
        """As `infer`, but always a dict by output name."""
        metadata = self._known_metadata(model, model_version)
        try:
            tensors = to_tensors(metadata, named_inputs(metadata, inputs, named))
            call = infer_call(model, model_version, tensors, outputs=requested, id=request_id, parameters=parameters)
            return read_infer(self._send(call, timeout))
        except DoorstepError:
            self._metadata.pop((model, model_version), None)  # perhaps the model has changed
            raise

    def _known_metadata(self, model: str, version: str) -> Any:
        found = self._metadata.get((model, version))
        if found is None:
            found = self._metadata[model, version] = self.metadata(model, version)
        return found

    # The server and its models

    def live(self) -> bool:
        return self._send(Call("GET", "/v2/health/live")).status == 200

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or one model of it, can be used now."""
        path = f"{model_path(model, version)}/ready" if model else "/v2/health/ready"
        return self._send(Call("GET", path)).status == 200

    def server(self) -> Any:
        """Name, version and extensions of the server."""
        return self._json(json_call("/v2"))

    def metadata(self, model: str, version: str = "") -> Any:
        """Versions, inputs and outputs of a model."""
        return self._json(json_call(model_path(model, version)))

    def config(self, model: str, version: str = "") -> Any:
        """The model's complete configuration."""
        return self._json(json_call(f"{model_path(model, version)}/config"))

    def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        """Counts and nanoseconds since each model was loaded; of one model, or of all."""
        path = f"{model_path(model, version)}/stats" if model else "/v2/models/stats"
        return list(self._json(json_call(path))["model_stats"])

    def models(self, *, ready: bool = False) -> list[dict[str, Any]]:
        """The repository's index: name, version, state and reason of every model, or of those that are ready."""
        return list(self._json(json_call("/v2/repository/index", {"ready": ready})))

    def load(
        self,
        model: str,
        *,
        config: str | Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Loads or reloads a model, and waits for it. `files` are path in the model's folder → content."""
        read_json(self._send(load_call(model, config, files or {}), timeout))

    def unload(self, model: str, *, unload_dependents: bool = False, timeout: float | None = None) -> None:
        read_json(self._send(unload_call(model, unload_dependents), timeout))

    def _json(self, call: Call) -> Any:
        return read_json(self._send(call))

    # Connections

    def _send(self, call: Call, timeout: float | None = None) -> Answer:
        wait = self._timeout if timeout is None else timeout
        deadline = None if wait is None else time.monotonic() + wait
        while True:
            connection, used_before = self._take(deadline)
            try:
                return self._exchange(connection, call, deadline)
            except (OSError, Disconnected) as error:
                connection.close()
                if isinstance(error, TimeoutError):
                    raise TimedOut(f"no answer from {self._target.url} within {wait:g} s") from None
                # The server may close a connection that was idle, at any moment: that says nothing about the request.
                if used_before and not (isinstance(error, Disconnected) and error.answer_begun):
                    continue
                raise self._target.cannot_reach(error) from error
            except BaseException:
                connection.close()
                raise

    def _take(self, deadline: float | None) -> tuple[socket.socket, bool]:
        if self._closed:
            raise Unavailable("this client is closed")
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._connect(deadline), False
            watch = select.poll()
            watch.register(connection, select.POLLIN)
            if not watch.poll(0):
                return connection, True
            connection.close()  # readable while idle: the server has closed it

    def _connect(self, deadline: float | None) -> socket.socket:
        target = self._target
        try:
            connection = socket.create_connection((target.host, target.port), _left(deadline))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return target.tls.wrap_socket(connection, server_hostname=target.host) if target.tls else connection
        except TimeoutError:
            raise TimedOut(f"no connection to {target.url} in time") from None
        except OSError as error:
            raise target.cannot_reach(error) from error

    def _exchange(self, connection: socket.socket, call: Call, deadline: float | None) -> Answer:
        reader = AnswerReader()
        try:
            for part in request_bytes(self._target, call):
                connection.settimeout(_left(deadline))
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # perhaps it has refused the request already, and said why
        while reader.answer is None:
            connection.settimeout(_left(deadline))
            data = connection.recv(_READ)
            if data:
                reader.feed(data)
            else:
                reader.feed_eof()
        if reader.keep_alive and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()
        return reader.answer

    def close(self) -> None:
        """Closes the connections that are idle; calls that are under way finish."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self._target.url}{' closed' if self._closed else ''}>"


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
