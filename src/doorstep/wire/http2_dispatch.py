"""From a request on an HTTP/2 stream to its endpoint: route, gates, size, coding. Knows no frame."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from doorstep.errors import InvalidArgument
from doorstep.wire.answers import fail, refusal
from doorstep.wire.compression import INLINE_BYTES, TooLarge, decompress
from doorstep.wire.exchange import Buffer, Endpoint, Refusal
from doorstep.wire.grpc_status import is_grpc, trailers_only
from doorstep.wire.router import Match

if TYPE_CHECKING:
    from doorstep.wire.http2 import Http2Connection
    from doorstep.wire.http2_exchange import Http2Exchange

_UNWANTED = 65_536  # bytes a client may send after its answer before its stream is reset
_CONTINUE = [(b":status", b"100")]
_BUSY = refusal(503, "the server is receiving too many large requests at once; try again later", grpc_status=8)


def dispatch(owner: Http2Connection, exchange: Http2Exchange, whole: bool) -> None:
    """A request's head is complete; `whole`: there is no body."""
    context, headers = owner.context, exchange.headers
    context.counters.requests += 1
    match = exchange.match = context.router.find(exchange.method, exchange.path)
    exchange.params = match.params
    exchange.route = match.route
    exchange.remote_done = whole
    for gate in context.gates:
        try:
            no = gate(exchange)
        except Exception as error:
            fail(exchange, error)
            return
        if no is not None:
            _instead(exchange, whole, partial(refuse, no=no))
            return
    streaming = match.streaming
    if match.codings is not None and not streaming:
        coding = headers.get(b"content-encoding")
        if coding is not None and coding not in match.codings.accepted:
            _instead(exchange, whole, partial(refuse, no=match.codings.refusal))
            return
    if not match.route:
        _instead(exchange, whole, match.endpoint)
        return
    if not whole:
        length = headers.get(b"content-length")
        if length is not None and not streaming and int(length) > context.limits.body_bytes:
            refuse(exchange, _too_large(context.limits.body_bytes))
            return
        if b"expect" in headers and headers[b"expect"].lower() == b"100-continue":
            owner.session.send_informational_response(exchange.stream_id, _CONTINUE)
    if streaming:
        exchange.paced = True
        call(match.endpoint, exchange)
    if whole:
        try:
            exchange.feed(b"", True)
        except Exception as error:
            fail(exchange, error)


def _instead(exchange: Http2Exchange, whole: bool, endpoint: Endpoint) -> None:
    """An answer that needs no body. A short one is waited for all the same: some clients (curl 7) do not understand an
    answer that comes while they are sending."""
    headers = exchange.headers
    if not whole and 0 < int(headers.get(b"content-length", b"0")) <= _UNWANTED and b"expect" not in headers:
        exchange.match = Match(endpoint, exchange.params, exchange.route)
    else:
        call(endpoint, exchange)


def admits(owner: Http2Connection, exchange: Http2Exchange, size: int) -> bool:
    """Whether the next bytes of a body are wanted; counts them where they have to be kept until there are more."""
    if exchange.ended:
        exchange.unwanted += size
        if exchange.unwanted > _UNWANTED and not exchange.disconnected and not exchange.remote_done:
            exchange.unwanted = 0
            owner.reset_rest(exchange)
        return False
    if exchange.paced and exchange.landing is None:
        return True
    limit = owner.context.limits.body_bytes
    if not exchange.match.streaming and exchange.received + size > limit:
        refuse(exchange, _too_large(limit))
        return False
    owner.context.held_bytes += size
    exchange.arriving += size
    held = owner.context.held_bytes
    if held > owner.context.limits.arriving_bytes and held > exchange.arriving:  # the only one may finish
        refuse(exchange, _BUSY)
        return False
    return True


def complete(owner: Http2Connection, exchange: Http2Exchange) -> None:
    """A buffered body is whole: undo its coding, then it is its endpoint's turn."""
    match, body = exchange.match, exchange.body
    coding = exchange.headers.get(b"content-encoding", b"identity") if match.codings is not None else b"identity"
    if coding == b"identity" or not len(body):
        call(match.endpoint, exchange)
        return
    limit = owner.context.limits.body_bytes
    if len(body) > INLINE_BYTES:
        work = owner.loop.run_in_executor(None, decompress, coding, body, limit)
        work.add_done_callback(partial(_decompressed, exchange))
        return
    try:
        exchange.body = decompress(coding, body, limit)
    except InvalidArgument as error:
        refuse(exchange, _undecodable(error))
    else:
        call(match.endpoint, exchange)


def _decompressed(exchange: Http2Exchange, work: asyncio.Future[Buffer]) -> None:
    error = work.exception()
    if exchange.ended:
        return
    if error is None:
        exchange.body = work.result()
        call(exchange.match.endpoint, exchange)
    elif isinstance(error, InvalidArgument):
        refuse(exchange, _undecodable(error))
    else:
        fail(exchange, error)


def call(endpoint: Endpoint, exchange: Http2Exchange) -> None:
    try:
        endpoint(exchange)
    except Exception as error:
        fail(exchange, error)


def refuse(exchange: Http2Exchange, no: Refusal) -> None:
    """Answers instead of the endpoint, which hears that it is over where it has been called already."""
    if exchange.started:
        exchange.reset()
    elif is_grpc(exchange.headers):
        exchange.grpc_status = no.grpc_status
        exchange.answer(trailers_only(no.grpc_status, no.grpc_message), 0, (), None)
    else:
        exchange.respond(no.status, no.headers, no.body)
    on_disconnect, exchange.on_disconnect = exchange.on_disconnect, None
    if on_disconnect is not None:
        on_disconnect()


def refuse_pieces(owner: Http2Connection, exchange: Http2Exchange) -> None:
    limit = owner.context.limits.chunk_count
    refuse(exchange, refusal(400, f"the request's body came in more than {limit} pieces", grpc_status=3))


def out_of_time(exchange: Http2Exchange) -> None:
    refuse(exchange, refusal(408, "the request's body did not arrive in time", grpc_status=4))


def _too_large(limit: int) -> Refusal:
    return refusal(
        413,
        f"Request body exceeds the maximum allowed value of {limit} bytes. "
        "Use --http-max-input-size to increase the limit.",
        grpc_status=8,
    )


def _undecodable(error: InvalidArgument) -> Refusal:
    return refusal(413 if isinstance(error, TooLarge) else 400, error.message, grpc_status=3)
