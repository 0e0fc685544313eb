"""Listening sockets: opening them, greeting who connects, and closing in order. Knows no endpoint.

The first bytes of a connection, or ALPN under TLS, decide whether HTTP/1.1 or HTTP/2 has it from there on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from typing import Any

from doorstep.errors import InvalidArgument, Unavailable
from doorstep.wire import http1, http2
from doorstep.wire.answers import error_body
from doorstep.wire.context import ListenerContext
from doorstep.wire.tls import CertificateFiles, TlsOptions, make_context

log = logging.getLogger("doorstep.wire")

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_BACKLOG = 1024
_CERTIFICATE_CHECK_S = 5.0
_TOO_MANY_BODY = error_body("the server has too many connections; try again later")
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_TOO_MANY_BODY), _TOO_MANY_BODY)
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Either host and port, or the path of a Unix socket."""

    name: str  # "http", "grpc", "metrics"; what errors and logs call it
    host: str = "127.0.0.1"  # "" or "*": every address of this machine
    port: int = 0  # 0: any free one
    path: str = ""
    tls: TlsOptions | None = None
    reuse_port: bool = False  # several servers may share the port (--reuse-http-port)
    option: str = ""  # the command line option that changes the port, for error messages

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host or '*'}:{self.port}"


def share(addresses: list[Address]) -> list[tuple[Address, tuple[str, ...]]]:
    """One listener for each different address, with the names of all that asked for it, in order.

    Raises InvalidArgument where two want the same port in different ways."""
    shared: dict[tuple[str, int | str], tuple[Address, list[str]]] = {}
    for number, address in enumerate(addresses):
        key = (address.host, address.path or address.port or -number - 1)
        first, names = shared.setdefault(key, (address, []))
        if (first.tls, first.reuse_port) != (address.tls, address.reuse_port):
            raise InvalidArgument(
                f"'{first.name}' and '{address.name}' both want {address}, but with different TLS or reuse-port "
                "options; give them the same options or different ports"
            )
        names.append(address.name)
    return [(first, tuple(names)) for first, names in shared.values()]


class Greeting(asyncio.Protocol):
    """Has a connection until it is clear what it speaks. Touched only from the event loop."""

    __slots__ = ("_bytes", "_context", "_since_ns", "_transport")

    def __init__(self, context: ListenerContext) -> None:
        self._context = context
        self._since_ns = context.now_ns
        self._bytes = b""
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        context = self._context
        self._transport = transport
        context.counters.accepted += 1
        if len(context.connections) >= context.limits.connections:
            context.counters.refused += 1
            transport.write(_TOO_MANY)
            transport.close()
            return
        context.connections.add(self)
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is not None and ssl_object.selected_alpn_protocol() == "http/1.1":
            self._hand_over_to_http1(b"")
        # (Of a client that chose h2 the preface comes next, and its absence is an error there.)

    def data_received(self, data: bytes) -> None:
        if self not in self._context.connections:
            return  # refused, and on its way out
        data = self._bytes + data
        if data.startswith(PREFACE):
            self._context.connections.discard(self)
            self._transport.set_protocol(http2.Http2Connection(self._context, self._transport, data))
        elif PREFACE.startswith(data):
            self._bytes = data
        else:
            self._hand_over_to_http1(data)

    def _hand_over_to_http1(self, data: bytes) -> None:
        self._context.connections.discard(self)
        make = http1.SpellingConnection if self._context.keeps_spelling else http1.Connection
        connection = make(self._context, self._transport)
        self._transport.set_protocol(connection)
        if data:
            connection.data_received(data)

    def eof_received(self) -> None:
        """Nothing was asked: the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._context.connections.discard(self)

    def sweep(self, now_ns: int) -> None:
        limits = self._context.limits
        limit_s = limits.header_timeout_s if self._bytes else limits.idle_timeout_s
        if now_ns - self._since_ns > limit_s * 1e9:
            self._context.counters.timeouts += 1
            self._transport.abort()

    def drain(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()


class Listener:
    """One address, open or closed. Touched only from the event loop."""

    def __init__(
        self, context: ListenerContext, address: Address, *, certificate_check_s: float = _CERTIFICATE_CHECK_S
    ) -> None:
        self.context = context
        self.address = address
        self.port = address.port  # the real one once it is open
        self._certificate_check_s = certificate_check_s
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.AbstractServer] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listens. Raises Unavailable when the address is taken, InvalidArgument for a bad address or TLS file."""
        address = self.address
        tls = make_context(address.tls) if address.tls else None
        self._sockets = [_open_unix(address)] if address.path else await _open_tcp(address)
        if not address.path:
            self.port = self._sockets[0].getsockname()[1]
        self._servers = await self._serve(tls)
        self._sweep()
        if address.tls:
            files = CertificateFiles(address.tls)
            self._watcher = asyncio.get_running_loop().create_task(self._watch(files))

    async def _serve(self, tls: ssl.SSLContext | None) -> list[asyncio.AbstractServer]:
        loop = asyncio.get_running_loop()
        handshake_s = self.context.limits.header_timeout_s if tls else None
        options: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": handshake_s, "backlog": _BACKLOG}
        create = loop.create_unix_server if self.address.path else loop.create_server
        return [await create(self._greet, sock=sock.dup(), **options) for sock in self._sockets]

    def _greet(self) -> Greeting:
        return Greeting(self.context)

    def _sweep(self) -> None:
        self.context.sweep()
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self.context.limits.sweep_interval_s, self._sweep)

    async def _watch(self, files: CertificateFiles) -> None:
        """Accepts on the same sockets with the new certificate; connections made with the old one stay."""
        while True:
            await asyncio.sleep(self._certificate_check_s)
            tls = await asyncio.to_thread(files.changed)
            if tls is None:
                continue
            try:
                old, self._servers = self._servers, await self._serve(tls)
            except OSError as error:  # no file descriptor left, say
                log.error("%s: keeping the TLS certificate in use: %s", self, error)
                files.forget()
                continue
            for server in old:
                server.close()
            log.info("%s: TLS certificate reloaded from '%s'", self, files.options.certificate)

    def stop_accepting(self) -> None:
        """Lets go of the address; connections stay."""
        if self._watcher is not None:
            self._watcher.cancel()
        for server in self._servers:
            server.close()
        for sock in self._sockets:
            sock.close()
        if self._sockets and self.address.path:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)
        self._servers, self._sockets = [], []

    async def close(self, timeout_s: float) -> None:
        """Stops accepting, waits for the answers in progress up to `timeout_s`, then breaks what is left."""
        self.stop_accepting()
        self.context.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.context.connections.empty(), timeout_s)
        for connection in list(self.context.connections):
            connection.abort()
        await self.context.connections.empty()  # connection_lost comes in the loop's next turn
        if self._sweeper is not None:
            self._sweeper.cancel()

    @property
    def url(self) -> str:
        if self.address.path:
            return f"unix:{self.address.path}"
        host = self.address.host
        host = "localhost" if host in ("", "*") else f"[{host}]" if ":" in host else host
        return f"{'https' if self.address.tls else 'http'}://{host}:{self.port}"

    def __repr__(self) -> str:
        state = f"{len(self.context.connections)} connections" if self._servers else "closed"
        return f"<Listener {self.address.name} {self.url} [{state}]>"


async def _open_tcp(address: Address) -> list[socket.socket]:
    """Bound sockets, one for each address the host name stands for, all with the same port."""
    loop = asyncio.get_running_loop()
    host = None if address.host in ("", "*") else address.host
    try:
        found = await loop.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InvalidArgument(f"cannot listen for {address.name} on {address}: {error}") from None
    sockets: list[socket.socket] = []
    port = address.port
    for family, kind, protocol, _, where in dict.fromkeys(found):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError:
            continue  # no IPv6 here
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((where[0], port, *where[2:]))
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6 and (host is None or sockets):
                continue  # IPv6 is compiled in but switched off
            for other in sockets:
                other.close()
            raise Unavailable(_cannot_bind(address, port, error)) from None
        port = sock.getsockname()[1]
        sockets.append(sock)
    if not sockets:
        raise InvalidArgument(f"cannot listen for {address.name} on {address}: no usable address")
    return sockets


def _cannot_bind(address: Address, port: int, error: OSError) -> str:
    where = f"port {port} on {address.host or '*'}"
    another = f"choose another with {address.option}" if address.option else "choose another port"
    match error.errno:
        case errno.EADDRINUSE:
            return f"cannot listen for {address.name}: {where} is already in use; {another}, or stop what uses it"
        case errno.EACCES:
            return f"cannot listen for {address.name}: this user may not open {where}; {another}, above 1023"
        case _:
            return f"cannot listen for {address.name} on {where}: {error.strerror}; {another} or another address"


def _open_unix(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(address.path) and stat.S_ISSOCK(os.stat(address.path).st_mode):
            if sock.connect_ex(address.path) == 0:
                raise Unavailable(f"cannot listen for {address.name}: {address} is in use by another server")
            sock.close()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            os.unlink(address.path)  # left behind by a server that did not get to tidy up
        sock.bind(address.path)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise InvalidArgument(f"cannot listen for {address.name} on {address}: {error.strerror}") from None
    except Unavailable:
        sock.close()
        raise
    return sock
