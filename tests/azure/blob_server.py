"""A small Azure Blob server in memory, which goes wrong as a plan of ``tests.azure.faults`` says.

URLs are Azurite's: ``http://127.0.0.1:PORT/ACCOUNT/CONTAINER/BLOB``. It has append blobs with their positions and limits,
block blobs, and range reads; ``test_blob_server.py`` runs the same cases here and on Azurite. It checks no signature.

``python -m tests.azure.blob_server --port N`` runs it as a process of its own, for benchmarks; ``GET /_stats`` there.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import signal
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import uvloop
from aiohttp import web

from tests.azure.faults import Fault, Plan, Refusal, Silence, always, either, flaky, slow

ACCOUNT = "devstoreaccount1"
APPEND_BLOB, BLOCK_BLOB = "AppendBlob", "BlockBlob"
MAX_BLOCKS = 50_000
MAX_APPEND_BYTES = 100 * 1024 * 1024
_AUTHORIZATIONS_KEPT = 1000

_CONTAINER_OPERATIONS = {
    "PUT": "create_container",
    "DELETE": "delete_container",
    "HEAD": "look_container",
    "GET": "look_container",
}
_BLOB_OPERATIONS = {
    ("HEAD", ""): "look",
    ("GET", ""): "read",
    ("DELETE", ""): "delete",
    ("PUT", "appendblock"): "append",
    ("PUT", "block"): "put_block",
    ("PUT", "blocklist"): "put_block_list",
}
_WORDS = {
    "AppendPositionConditionNotMet": "The append position condition specified was not met.",
    "AuthenticationFailed": "Server failed to authenticate the request. Make sure the value of Authorization header is "
    "formed correctly including the signature.",
    "AuthorizationPermissionMismatch": "This request is not authorized to perform this operation using this permission.",
    "BlobAlreadyExists": "The specified blob already exists.",
    "BlobNotFound": "The specified blob does not exist.",
    "BlobTypeNotSupported": "Append blobs are not supported for this account type.",
    "BlockCountExceedsLimit": "The committed block count cannot exceed the maximum limit of 50,000 blocks.",
    "ContainerAlreadyExists": "The specified container already exists.",
    "ContainerNotFound": "The specified container does not exist.",
    "InternalError": "The server encountered an internal error. Please retry the request.",
    "InvalidBlobType": "The blob type is invalid for this operation.",
    "InvalidRange": "The range specified is invalid for the current size of the resource.",
    "OperationTimedOut": "The operation could not be completed within the permitted time.",
    "ServerBusy": "The server is busy.",
}


@dataclass(slots=True)
class StoredBlob:
    """A blob. ``blocks`` are the sizes in bytes of the appends, or of the blocks, that made it."""

    kind: str
    content_type: str
    etag: str = ""
    modified: str = ""
    data: bytearray = field(default_factory=bytearray)
    blocks: list[int] = field(default_factory=list)

    def append(self, block: bytes) -> None:
        self.data += block
        self.blocks.append(len(block))


class _Refused(Exception):
    """The request can't be done."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.refusal = Refusal(status, code)


@dataclass(slots=True)
class _Request:
    """What is asked for. ``key`` is ``container/blob``."""

    operation: str
    container: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    def number(self, header: str) -> int | None:
        return int(self.headers[header]) if header in self.headers else None


@dataclass(slots=True, eq=False)
class _Late:
    """A write that is done later, though its answer is out."""

    request: _Request
    after: float | str


class BlobServer:
    """The server, and what is in it. Set ``faults`` to a plan to make it go wrong, None to make it go well again.

    requests counts by operation: append, create, look, read, put, put_block, put_block_list, delete, create_container,
    look_container, delete_container, other. happened counts the faults that really happened: by ``Fault.name``, "slow",
    "foreign write", "late write applied" and "late write refused". authorizations are the last Authorization headers,
    or "sig=…" of a SAS.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.faults: Plan | None = None
        self.max_blocks = MAX_BLOCKS
        self.containers: set[str] = set()
        self.blobs: dict[str, StoredBlob] = {}
        self.requests: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.authorizations: deque[str] = deque(maxlen=_AUTHORIZATIONS_KEPT)
        self._tls = tls
        self._http = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._listener: asyncio.Server | None = None
        self._staged: dict[str, dict[str, bytes]] = {}
        self._late: list[_Late] = []
        self._go_on = asyncio.Event()
        self._versions = itertools.count(0x8DD000000000000)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def account_url(self) -> str:
        return f"{self.url}/{ACCOUNT}"

    def lines(self, prefix: str = "") -> list[dict[str, Any]]:
        """Every line of the append blobs whose ``container/name`` begins so, by name. Fails on one that is no JSON."""
        return [
            json.loads(line)
            for key, blob in sorted(self.blobs.items())
            if key.startswith(prefix) and blob.kind == APPEND_BLOB
            for line in bytes(blob.data).split(b"\n")
            if line.strip()
        ]

    def release(self) -> None:
        """Lets the requests go on that hang."""
        self._go_on.set()
        self._go_on = asyncio.Event()

    @property
    def late_writes(self) -> int:
        """Writes whose answer is out, and that are yet to be done."""
        return len(self._late)

    async def up(self) -> None:
        """Listens, again on the same port."""
        self._listener = await asyncio.get_running_loop().create_server(
            self._http, "127.0.0.1", self.port, ssl=self._tls, reuse_address=True, backlog=1024
        )

    async def down(self) -> None:
        """Breaks every connection and refuses new ones. What is stored stays."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in self._http.connections:
            if connection.transport is not None:
                _reset(connection.transport)
        while self._http.connections:
            await asyncio.sleep(0)

    async def close(self) -> None:
        await self.down()
        self._late.clear()
        await self._http.shutdown(0)

    # --- what goes wrong ---

    async def _handle(self, message: web.BaseRequest) -> web.StreamResponse:
        if message.path == "/_stats":
            return self._stats()
        request = _parse(message)
        self.requests[request.operation] += 1
        self.authorizations.append(message.headers.get("Authorization") or f"sig={request.query.get('sig', '')}")
        plan, number = self.faults, self.requests[request.operation]
        if (message.content_length or 0) > MAX_APPEND_BYTES and request.operation == "append":
            return self._error(request, Refusal(413, "RequestBodyTooLarge"))
        request.body = await message.content.read()
        fault = plan and plan(request.operation, request.key, number)
        waiting = [late for late in self._late if late.request.key == request.key and late.after == request.operation]
        try:
            return await self._answer(request, fault or Fault(), message)
        except _Refused as refused:
            return self._error(request, refused.refusal)
        finally:
            for late in waiting:
                self._apply_late(late)

    async def _answer(self, request: _Request, fault: Fault, message: web.BaseRequest) -> web.Response:
        if fault.slow_seconds:
            self.happened["slow"] += 1
            await asyncio.sleep(fault.slow_seconds)
        if fault.foreign and (blob := self.blobs.get(request.key)) is not None:
            self.happened["foreign write"] += 1
            blob.append(fault.foreign)
            self._touch(blob)
        if fault.answer is None:
            return self._apply(request)
        true_answer = None
        if fault.late is not None:
            self._do_later(_Late(request, fault.late))
        elif fault.applied:
            true_answer = self._apply(request)
        self.happened[fault.name] += 1
        if isinstance(fault.answer, Refusal):
            return self._error(request, fault.answer)
        if fault.answer is Silence.HANG:
            await self._go_on.wait()
            if fault.late is None:
                return true_answer or self._apply(request)
        if message.transport is not None:
            _reset(message.transport)
        return web.Response()  # nobody gets it

    def _do_later(self, late: _Late) -> None:
        self._late.append(late)
        if not isinstance(late.after, str):
            asyncio.get_running_loop().call_later(late.after, self._apply_late, late)

    def _apply_late(self, late: _Late) -> None:
        if late not in self._late:
            return
        self._late.remove(late)
        try:
            self._apply(late.request)
            self.happened["late write applied"] += 1
        except _Refused:
            self.happened["late write refused"] += 1

    # --- what goes right ---

    def _apply(self, request: _Request) -> web.Response:
        if request.operation == "create_container":
            if request.container in self.containers:
                raise _Refused(409, "ContainerAlreadyExists")
            self.containers.add(request.container)
            return self._done(request, 201)
        if request.operation == "other":
            raise _Refused(400, "InvalidUri")
        if request.container not in self.containers:
            raise _Refused(404, "ContainerNotFound")
        if request.operation == "delete_container":
            self.containers.remove(request.container)
            for key in [key for key in self.blobs if key.startswith(f"{request.container}/")]:
                del self.blobs[key]
            return self._done(request, 202)
        if request.operation == "look_container":
            return self._done(request, 200)
        _check_md5(request)
        apply = getattr(self, f"_{request.operation}")
        answer: web.Response = apply(request, self._conditions(request))
        return answer

    def _conditions(self, request: _Request) -> StoredBlob | None:
        """The blob that is there, if that is as the request wants it."""
        blob = self.blobs.get(request.key)
        wanted = request.headers.get("If-Match")
        if wanted is not None and (blob is None or wanted not in ("*", blob.etag)):
            raise _Refused(412, "ConditionNotMet")
        if blob is not None and request.headers.get("If-None-Match") == "*":
            raise _Refused(409, "BlobAlreadyExists")
        return blob

    def _create(self, request: _Request, _old: StoredBlob | None) -> web.Response:
        if request.body:
            raise _Refused(400, "InvalidOperation")
        return self._store(request, StoredBlob(APPEND_BLOB, _content_type(request)))

    def _append(self, request: _Request, blob: StoredBlob | None) -> web.Response:
        blob = _existing(blob)
        if blob.kind != APPEND_BLOB:
            raise _Refused(409, "InvalidBlobType")
        if len(blob.blocks) >= self.max_blocks:
            raise _Refused(409, "BlockCountExceedsLimit")
        offset = len(blob.data)
        if request.number("x-ms-blob-condition-appendpos") not in (None, offset):
            raise _Refused(412, "AppendPositionConditionNotMet")
        max_bytes = request.number("x-ms-blob-condition-maxsize")
        if max_bytes is not None and offset + len(request.body) > max_bytes:
            raise _Refused(412, "MaxBlobSizeConditionNotMet")
        blob.append(request.body)
        self._touch(blob)
        counts = {"x-ms-blob-append-offset": str(offset), "x-ms-blob-committed-block-count": str(len(blob.blocks))}
        return self._done(request, 201, blob, counts)

    def _put(self, request: _Request, _old: StoredBlob | None) -> web.Response:
        blob = StoredBlob(BLOCK_BLOB, _content_type(request), data=bytearray(request.body))
        return self._store(request, blob)

    def _put_block(self, request: _Request, blob: StoredBlob | None) -> web.Response:
        if blob is not None and blob.kind != BLOCK_BLOB:
            raise _Refused(409, "InvalidBlobType")
        self._staged.setdefault(request.key, {})[request.query.get("blockid", "")] = request.body
        return self._done(request, 201)

    def _put_block_list(self, request: _Request, blob: StoredBlob | None) -> web.Response:
        if blob is not None and blob.kind != BLOCK_BLOB:
            raise _Refused(409, "InvalidBlobType")
        staged = self._staged.get(request.key, {})
        wanted = [entry.text or "" for entry in ElementTree.fromstring(request.body)]
        if not all(name in staged for name in wanted):
            raise _Refused(400, "InvalidBlockList")  # blocks of an earlier list are not kept
        del self._staged[request.key]
        made = StoredBlob(BLOCK_BLOB, _content_type(request))
        for name in wanted:
            made.append(staged[name])
        return self._store(request, made)

    def _look(self, request: _Request, blob: StoredBlob | None) -> web.Response:
        blob = _existing(blob)
        return self._done(request, 200, blob, _properties(blob) | {"Content-Length": str(len(blob.data))})

    def _read(self, request: _Request, blob: StoredBlob | None) -> web.Response:
        blob = _existing(blob)
        wanted = request.headers.get("x-ms-range") or request.headers.get("Range")
        if wanted is None:
            return self._done(request, 200, blob, _properties(blob), bytes(blob.data))
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(blob.data)) + 1, len(blob.data))
        if start >= len(blob.data):
            raise _Refused(416, "InvalidRange")
        headers = _properties(blob) | {"Content-Range": f"bytes {start}-{end - 1}/{len(blob.data)}"}
        return self._done(request, 206, blob, headers, bytes(memoryview(blob.data)[start:end]))

    def _delete(self, request: _Request, blob: StoredBlob | None) -> web.Response:
        _existing(blob)
        del self.blobs[request.key]
        return self._done(request, 202)

    def _store(self, request: _Request, blob: StoredBlob) -> web.Response:
        self._touch(blob)
        self.blobs[request.key] = blob
        return self._done(request, 201, blob)

    def _touch(self, blob: StoredBlob) -> None:
        blob.etag = f'"0x{next(self._versions):X}"'
        blob.modified = formatdate(usegmt=True)

    # --- answers ---

    def _done(
        self,
        request: _Request,
        status: int,
        blob: StoredBlob | None = None,
        more: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> web.Response:
        headers = _common_headers(request) | {"x-ms-request-server-encrypted": "true"}
        if blob is not None:
            headers |= {"ETag": blob.etag, "Last-Modified": blob.modified}
        return web.Response(status=status, headers=headers | (more or {}), body=body)

    def _error(self, request: _Request, refusal: Refusal) -> web.Response:
        headers = _common_headers(request) | {"x-ms-error-code": refusal.code, "Content-Type": "application/xml"}
        if refusal.retry_after_seconds is not None:
            headers["Retry-After"] = str(refusal.retry_after_seconds)
        words = f"{_WORDS.get(refusal.code, refusal.code)}\nRequestId:{headers['x-ms-request-id']}"
        details = ""
        if refusal.status == 401:
            login = "https://login.microsoftonline.com/00000000-0000-0000-0000-000000000000/oauth2/authorize"
            headers["WWW-Authenticate"] = f"Bearer authorization_uri={login} resource_id=https://storage.azure.com"
        if refusal.code == "AuthenticationFailed":  # Azure repeats what it was given: it must not end up in a log
            given = escape(self.authorizations[-1])
            details = (
                f"<AuthenticationErrorDetail>The MAC signature found in the HTTP request '{given}' is not the same as "
                f"any computed signature.</AuthenticationErrorDetail>"
            )
        body = (
            f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{refusal.code}</Code>'
            f"<Message>{words}</Message>{details}</Error>"
        )
        return web.Response(status=refusal.status, headers=headers, body=body.encode())

    def _stats(self) -> web.Response:
        return web.json_response(
            {
                "requests": self.requests,
                "happened": self.happened,
                "blobs": len(self.blobs),
                "bytes": sum(len(blob.data) for blob in self.blobs.values()),
            }
        )


def _parse(message: web.BaseRequest) -> _Request:
    _, _, path = message.path.lstrip("/").partition("/")  # the account may have any name
    container, _, blob = path.partition("/")
    query, comp = message.rel_url.query, message.rel_url.query.get("comp", "")
    if blob and (message.method, comp) == ("PUT", ""):
        operation = "create" if message.headers.get("x-ms-blob-type") == APPEND_BLOB else "put"
    elif blob:
        operation = _BLOB_OPERATIONS.get((message.method, comp), "other")
    else:
        is_container = container and query.get("restype") == "container" and not comp
        operation = _CONTAINER_OPERATIONS.get(message.method, "other") if is_container else "other"
    return _Request(operation, container, path.rstrip("/") if not blob else path, query, message.headers)


def _existing(blob: StoredBlob | None) -> StoredBlob:
    if blob is None:
        raise _Refused(404, "BlobNotFound")
    return blob


def _check_md5(request: _Request) -> None:
    given = request.headers.get("Content-MD5")
    if given is not None and base64.b64decode(given) != hashlib.md5(request.body).digest():
        raise _Refused(400, "Md5Mismatch")


def _content_type(request: _Request) -> str:
    given = request.headers.get("x-ms-blob-content-type")
    return given or "application/octet-stream"


def _properties(blob: StoredBlob) -> dict[str, str]:
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Type": blob.content_type,
        "x-ms-blob-type": blob.kind,
        "x-ms-lease-state": "available",
        "x-ms-lease-status": "unlocked",
        "x-ms-server-encrypted": "true",
    }
    if blob.kind == APPEND_BLOB:
        headers["x-ms-blob-committed-block-count"] = str(len(blob.blocks))
    return headers


_request_ids = itertools.count(1)


def _common_headers(request: _Request) -> dict[str, str]:
    headers = {
        "x-ms-request-id": f"{next(_request_ids):08x}-0000-0000-0000-000000000000",
        "x-ms-version": request.headers.get("x-ms-version", "2025-07-05"),
    }
    if "x-ms-client-request-id" in request.headers:
        headers["x-ms-client-request-id"] = request.headers["x-ms-client-request-id"]
    return headers


def _reset(transport: asyncio.BaseTransport) -> None:
    """Ends the connection with a RST, as a machine does that is gone."""
    held: socket.socket | None = transport.get_extra_info("socket")
    assert held is not None
    with contextlib.suppress(OSError):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert isinstance(transport, asyncio.WriteTransport)
    transport.abort()


@contextlib.contextmanager
def reserved_port(port: int = 0) -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else gets, to listen on now and again (it wants SO_REUSEADDR, as servers set it).

    Without it, a client that keeps knocking at a port where nobody listens may get it as its own, and hear itself.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", port))
        yield held.getsockname()[1]


@contextlib.asynccontextmanager
async def blob_server(port: int = 0, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[BlobServer]:
    """Runs a server until the block ends."""
    server = BlobServer(tls=tls)
    with reserved_port(port) as server.port:
        await server.up()
        try:
            yield server
        finally:
            await server.close()


async def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.azure.blob_server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--container", action="append", default=[], help="one that is there from the beginning")
    parser.add_argument("--slow", type=float, default=0.0, metavar="SECONDS", help="that every request takes")
    parser.add_argument("--flaky", type=float, default=0.0, metavar="RATE", help="of requests that fail")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with blob_server(arguments.port) as server:
        server.containers.update(arguments.container)
        server.faults = either(flaky(arguments.seed, arguments.flaky), always(slow(arguments.slow)))
        print(server.port, flush=True)
        await stop.wait()


if __name__ == "__main__":
    uvloop.run(_main())
