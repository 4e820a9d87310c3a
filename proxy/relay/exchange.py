"""One exchange, from the first byte of the request to the last byte of the response.

``Exchange.run`` reads from top to bottom: open the recording, pass the request to the model server,
pass the answer to the client, hold back the end of the answer until it is recorded.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING

import orjson

from proxy import ids
from proxy.relay.faults import Fault, RequestFault, UpstreamFault, UpstreamInvalid, UpstreamLost
from proxy.relay.framing import BodyDecoder, ChunkedBody, CloseBody, FramingError, chunk, last_chunk
from proxy.relay.headers import allowed_trailers
from proxy.relay.recording import Ending, Witness
from proxy.relay.request import Request
from proxy.relay.response import Response
from proxy.relay.tunnel import tunnel
from proxy.relay.upstream import STALE_SECONDS, UpstreamConnection

if TYPE_CHECKING:
    from proxy.relay.server import Downstream, Relay

# A request body that came whole with its head is sent along with it, and can be sent again on a fresh connection.
_REPLAYABLE_BYTES = 256 * 1024
_ONE_WRITE_BYTES = 64 * 1024
ALLOWED = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"  # RFC 9110 §15.5.6; methods of other names pass, too
MAX_INTERIM_AT_ONCE = 64  # a read may hold thousands of them


class Exchange:
    """Carries one request to the model server and its response back. ``run`` is called once."""

    __slots__ = (
        "_began",
        "_body",
        "_client",
        "_keep_alive",
        "_relay",
        "_request",
        "_request_head",
        "_request_id",
        "_request_passed",
        "_response_begun",
        "_sent",
        "_upload",
        "_upstream",
        "_witness",
    )

    def __init__(self, relay: Relay, client: Downstream, request: Request) -> None:
        self._began = self._sent = perf_counter()
        self._relay = relay
        self._client = client
        self._request = request
        self._request_id = request.client_id or ids.uuid4()
        self._keep_alive = not request.last
        self._witness = Witness(relay.recording_failed)
        self._upstream: UpstreamConnection | None = None
        self._upload: asyncio.Task[None] | None = None
        self._response_begun = False
        self._body = request.body()
        self._request_head = b""
        self._request_passed = False  # the model server's connection has all of it, and nothing else of this client

    async def run(self) -> bool:
        """Whether the client's connection can take another request.

        Raises CancelledError when the client is gone; anything else that leaves this is a defect.
        """
        fault: Fault | None = None
        try:
            try:
                self._open()
                await self._pass_on()
            except Fault as found:
                fault = found
            # Not within the handler: compiled, an exception that is being handled would be every other task's, too.
            if fault is not None:
                await self._answer_fault(fault)
        finally:
            # If it is not finished yet, the client has left, or was made to.
            stopped = self._relay.draining and not self._client.left
            self._witness.finish(Ending.STOPPED if stopped else Ending.CLIENT_LEFT)
            self._client.expecting = False
            if self._upload is not None:
                self._upload.cancel()
            if self._upstream is not None:
                self._upstream.abort()
        return self._keep_alive

    # --- the request ---

    def _open(self) -> None:
        """Opens the recording, writes the head for the model server. Raises Fault."""
        request = self._request
        if request.method in ("CONNECT", "TRACE"):
            raise RequestFault(f"{request.method} is not passed on", HTTPStatus.METHOD_NOT_ALLOWED, "method")
        self._witness.open(
            self._relay.recorder, request.method, request.target, request.headers, self._request_id, request.length
        )
        self._request_head = request.head(self._request_id)

    async def _pass_on(self) -> None:
        first = await self._first_request_bytes()
        if self._body.done:
            self._request_read()
        upstream, response = await self._send(first)
        if response.status == HTTPStatus.SWITCHING_PROTOCOLS:
            await self._switch(upstream, response)
        else:
            await self._answer(upstream, response)

    async def _first_request_bytes(self) -> bytes:
        """What has come of the request's body, framed for the model server; sent in one piece with the head."""
        if self._body.done:
            return b""
        if not self._client.has_input:
            self._client.expecting = self._request.expects_continue
            return b""
        return await self._request_piece(await self._client.receive())

    async def _request_piece(self, data: bytes) -> bytes:
        """One piece of the request's body, recorded and framed for the model server. Raises RequestFault."""
        body = self._body
        try:
            payload = body.feed(data)
        except FramingError as error:
            raise RequestFault(f"the request's body is not valid: {error}") from None
        if body.rest and not body.done:
            self._client.unread(body.rest)
            await asyncio.sleep(0)  # the others' turn
        if payload:
            wait = self._witness.request_piece(payload)
            if wait is not None:
                await wait
        if not self._request.chunked:
            return payload
        framed = chunk(payload) if payload else b""
        return framed + last_chunk(allowed_trailers(body.trailers)) if body.done else framed

    def _request_read(self) -> None:
        self._request_passed = True
        if self._upstream is not None:
            self._upstream.sender = None
        self._client.unread(self._body.rest)
        self._witness.request_complete()

    async def _send(self, first: bytes) -> tuple[UpstreamConnection, Response]:
        """Sends the request, once more where a pooled connection was dead already; the head of the answer."""
        pool = self._relay.pool
        replayable = self._body.done and len(first) <= _REPLAYABLE_BYTES
        pooled = pool.take()
        self._upstream = upstream = pooled or await pool.connect()
        self._sent = perf_counter()
        self._write_request(upstream, first)
        try:
            return upstream, await self._response(upstream)
        except UpstreamLost:
            late = perf_counter() - self._sent > STALE_SECONDS
            if pooled is None or pooled.answering or late or not replayable:
                raise
        pooled.abort()  # half open for an upgrade, it may have ended one direction only
        self._upstream = upstream = await pool.connect()
        self._sent = perf_counter()
        self._write_request(upstream, first)
        return upstream, await self._response(upstream)

    def _write_request(self, upstream: UpstreamConnection, first: bytes) -> None:
        if self._request.upgrade:  # the answer may begin a tunnel, and end its direction at once
            upstream.half_open = True
        if len(first) <= _ONE_WRITE_BYTES:  # a system call costs more than this copy
            upstream.write(self._request_head + first)
        else:
            upstream.write(self._request_head)
            upstream.write(first)
        if not self._body.done:
            upstream.sender = self._client
            self._upload = self._relay.loop.create_task(self._pass_request_body(upstream), name="upload")
            self._upload.add_done_callback(lambda task: _uploaded(task, upstream))

    async def _pass_request_body(self, upstream: UpstreamConnection) -> None:
        while not self._body.done:
            data = await self._client.receive()
            if not data:
                return  # the client is gone, which cancels the exchange
            self._client.expecting = False
            upstream.write(await self._request_piece(data))
            if self._body.done:
                self._request_read()
            await upstream.drain()

    # --- the response ---

    async def _response(self, upstream: UpstreamConnection) -> Response:
        """The head of the final answer; interim ones are passed on. Raises Fault."""
        interim = 0
        while True:
            response = await upstream.receive_response()
            if response.status >= 200:
                self._relay.traffic.upstream.observe(perf_counter() - self._sent)
                return response
            if response.status == HTTPStatus.SWITCHING_PROTOCOLS:
                if response.switches_to(self._request.upgrade):
                    return response
                raise UpstreamInvalid("the model server switched protocols without being asked to")
            if not self._request.http10:
                self._client.write(response.interim_head())
                if response.status == HTTPStatus.CONTINUE:
                    self._client.expecting = False
                await self._client.drain()
            interim += 1
            if interim % MAX_INTERIM_AT_ONCE == 0:
                await asyncio.sleep(0)  # the others' turn

    async def _answer(self, upstream: UpstreamConnection, response: Response) -> None:
        """Passes the answer on, piece by piece as it comes, and its end when it is recorded."""
        client = self._client
        traffic = self._relay.traffic
        traffic.classes[response.status // 100] += 1
        self._relay.upstream_answered()
        body = response.body(self._request.method)
        until_close = isinstance(body, CloseBody)
        chunked_body = isinstance(body, ChunkedBody)
        chunked = chunked_body and not self._request.http10
        client.unframed = until_close or chunked_body is not chunked
        if client.unframed or not self._request_passed or client.closing:
            self._keep_alive = False
        head = response.head(self._request_id, chunked=chunked, connection=self._connection_header())
        self._witness.response_head(response.status, response.headers, not (until_close or chunked_body))

        # What is whole when its head is goes out whole, once it is recorded: the client could do nothing with a part of it.
        ready = head
        if not body.done and upstream.has_input:
            ready += await self._response_piece(upstream, body, chunked, await upstream.receive())
        while not body.done:
            if ready:
                self._response_begun = True
                client.write(ready)
                await client.drain()
            data = await upstream.receive()
            if not data:
                if not until_close or upstream.broken or not upstream.ended:
                    raise UpstreamLost("the model server closed the connection before its response was complete")
                ready = b""
                break
            ready = await self._response_piece(upstream, body, chunked, data)
            if body.done and chunked and ready:  # a token is never held
                self._response_begun = True
                client.write(ready)
                ready = b""

        ended = perf_counter()
        await self._hold(Ending.COMPLETE)
        traffic.added.observe(self._sent - self._began + perf_counter() - ended)
        self._response_begun = True
        client.write(ready + last_chunk(allowed_trailers(body.trailers)) if chunked else ready)
        client.unframed = False
        self._release(upstream, response, body)
        await client.drain()

    async def _response_piece(
        self, upstream: UpstreamConnection, body: BodyDecoder, chunked: bool, data: bytes
    ) -> bytes:
        """One piece of the response's body, recorded and framed for the client. Raises UpstreamInvalid."""
        try:
            payload = body.feed(data)
        except FramingError as error:
            raise UpstreamInvalid(f"the model server's response is not valid: {error}") from None
        if body.rest and not body.done:
            upstream.unread(body.rest)
            await asyncio.sleep(0)  # the others' turn
        if payload:
            wait = self._witness.response_piece(payload)
            if wait is not None:
                await wait
        return chunk(payload) if chunked and payload else payload

    async def _hold(self, ending: Ending) -> None:
        """Waits until the exchange is recorded, so that no client has seen the end of what a crash could lose."""
        held = self._witness.finish(ending)
        if held is not None:
            await held

    def _release(self, upstream: UpstreamConnection, response: Response, body: BodyDecoder) -> None:
        """Gives the upstream connection back if it is fit for another exchange."""
        self._upstream = None
        if (
            response.last
            or isinstance(body, CloseBody)
            or not self._request_passed
            or body.rest
            or self._request.method == "HEAD"  # of which some servers send the body
            or response.may_have_wrong_body
            or upstream.half_open
        ):
            upstream.close()
        else:
            self._relay.pool.give_back(upstream)

    def _connection_header(self) -> bytes | None:
        if not self._keep_alive:
            return b"close"
        return b"keep-alive" if self._request.http10 else None

    async def _switch(self, upstream: UpstreamConnection, response: Response) -> None:
        """Both sides change the protocol: what follows is passed on as it comes, and not recorded."""
        client = self._client
        self._relay.traffic.classes[1] += 1
        self._relay.upstream_answered()
        self._keep_alive = False
        self._witness.response_head(response.status, response.headers, True)
        await self._hold(Ending.COMPLETE)
        self._response_begun = True
        client.tunnelling = client.half_open = True
        client.write(response.switching_head(self._request_id))
        try:
            await tunnel(self._relay.loop, client, upstream)
        except UpstreamFault:  # silent for too long
            client.abort()
        self._upstream = None
        upstream.close()

    # --- what goes wrong ---

    async def _answer_fault(self, fault: Fault) -> None:
        self._relay.count_fault(fault)
        self._keep_alive = False
        ending = Ending.UPSTREAM_FAILED if isinstance(fault, UpstreamFault) else Ending.REQUEST_REFUSED
        if self._response_begun:  # all that is left is to make sure that nobody takes it for a whole answer
            self._witness.finish(ending)
            self._client.abort()
            return
        head, body = fault_answer(fault.status, str(fault), self._request_id, head_only=self._request.method == "HEAD")
        self._witness.response_head(fault.status, None, True)
        self._witness.response_piece(body)
        await self._hold(ending)
        self._response_begun = True
        self._client.write(head + body)


def _uploaded(task: asyncio.Task[None], upstream: UpstreamConnection) -> None:
    """An upload that failed ends the exchange, which may be waiting for an answer to it."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, Exception):
        upstream.fail(error)


def fault_answer(status: int, message: str, request_id: str, *, head_only: bool = False) -> tuple[bytes, bytes]:
    """Head and body of an answer that the relay gives by itself."""
    body = orjson.dumps({"error": {"code": status, "message": message, "request_id": request_id or None}}) + b"\n"
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        + (f"Allow: {ALLOWED}\r\n" if status == HTTPStatus.METHOD_NOT_ALLOWED else "")
        + (f"x-request-id: {request_id}\r\n" if request_id else "")
        + "Connection: close\r\n\r\n"
    )
    return head.encode(), b"" if head_only else body
