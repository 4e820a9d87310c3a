"""The endpoint that the ``azureml-ai-monitoring`` SDK posts its frames to, as Azure ML's collector sidecar has it.

``POST /modeldata/log``: one frame, a JSON array of objects, with what is known of it in the headers. The SDK waits for
the answer without a time-out, and logs what is no success: so each refusal is one sentence for the author of the
scoring script, and no answer waits for a disk that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping
from operator import itemgetter
from time import monotonic, time

from aiohttp import web

from proxy import listeners
from proxy.capture.payload import Kind, claim
from proxy.custom_logging import rows
from proxy.custom_logging.frame import TYPE_PREFIX, Frame, collection
from proxy.custom_logging.recorder import FrameRecorder, NotRecordedError, Outcome
from proxy.ledger import Refusal
from proxy.settings import PAYLOAD_COLLECTIONS, CustomLogging, Settings
from proxy.spool.writer import Memory, Spool

logger = logging.getLogger("payload_logger.custom_logging")

PATH = "/modeldata/log"
RECEIVE_SECONDS = 30.0  # for a frame to arrive
KEEPALIVE_SECONDS = 15.0  # the SDK takes a new connection for each frame
STOP_SECONDS = 2.0  # for what is under way when the proxy stops
_MOMENT_SECONDS = 0.1  # for its answer to leave
QUIET_SECONDS = 60.0  # after this long without a refusal for the same reason, the next one is news again
ASIDE_BYTES = 64 * 1024  # from here on a frame is checked in a thread aside
_SHOWN_CHARACTERS = 200
_COLLECTIONS = "data_collector.collections"
_COMPACT_TYPE = "application/octet-stream"


class RefusedError(Exception):
    """A frame is not taken. The message is a sentence for its sender; ``near``, a part of its data, for nobody else."""

    def __init__(self, status: int, reason: Refusal | None, words: str, near: str = "") -> None:
        super().__init__(words)
        self.status = status
        self.reason = reason
        self.near = near


class FrameEndpoint:
    """Use: ``await serve(sockets)``, ``await close()``, both on the spool's loop."""

    def __init__(self, settings: Settings, options: CustomLogging, spool: Spool) -> None:
        self._arriving = Memory(settings.capture.memory_bytes // 2)  # what arrives takes nothing of the traffic's
        self._max_body_bytes, self._limit = min(  # a frame is in memory as a whole
            (options.max_body_bytes, "custom_logging.max_body_bytes allows"),
            (self._arriving.limit_bytes, "capture.memory_bytes allows, half of it"),
            key=itemgetter(0),
        )
        self._spool = spool
        self._recorder = FrameRecorder(settings, options.batch_window, spool)
        self.enable(settings)
        self._aside = asyncio.Semaphore()
        self._told: dict[tuple[Refusal, str], float] = {}
        self._under_way = 0
        self._idle = asyncio.Event()
        self._receiving: set[asyncio.Timeout] = set()
        self._stopping = False
        quiet = logging.getLogger(f"{logger.name}.http")
        quiet.disabled = True  # it writes a traceback for whatever is no HTTP; who sent it gets an answer
        self._http = web.Server(
            self._answer,
            access_log=None,
            logger=quiet,
            keepalive_timeout=KEEPALIVE_SECONDS,
            auto_decompress=False,
        )
        self._servers: list[asyncio.Server] = []
        self._fractions = settings.capture.extended_fields  # of a second

    def enable(self, settings: Settings) -> None:
        """Takes frames of those collections that ``settings`` have enabled."""
        collections = settings.data_collector.collections
        # Names are compared without case: the SDK's own configuration has them in lower case.
        self._enabled = {
            name.lower(): name for name, one in collections.items() if one.enabled and name not in PAYLOAD_COLLECTIONS
        }
        self._disabled = {name.lower(): name for name, one in collections.items() if not one.enabled}

    async def serve(self, sockets: list[socket.socket]) -> str:
        """Takes connections from bound sockets; the address of the first. Raises OSError."""
        address = listeners.shown(sockets[0])
        self._servers += await listeners.serve(self._http, sockets)
        return address

    async def close(self) -> None:
        """Takes no more connections, ends what is under way, hands over the batches."""
        for server in self._servers:
            server.close()
        await self._finish(STOP_SECONDS)
        self._stopping = True
        for arriving in self._receiving:
            arriving.reschedule(0)
        await self._finish(_MOMENT_SECONDS)
        await self._http.shutdown(_MOMENT_SECONDS)
        self._recorder.close()

    async def _finish(self, seconds: float) -> None:
        """Waits until nothing is under way, for so long at most."""
        if self._under_way:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._under_way += 1
        try:
            outcome = await self._take(request)
            return web.Response(status=200 if outcome is Outcome.RECORDED else 202, text=outcome.value)
        except RefusedError as refused:
            return web.Response(status=refused.status, text=f"{refused}{refused.near}")
        except NotRecordedError as error:  # counted where it was discarded
            return web.Response(status=503, text=f"not recorded: {error}")
        except Exception:
            logger.exception("A frame was not taken, by a defect of payload-logger.")
            return web.Response(status=500, text="not recorded: a defect of payload-logger; its log says more")
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _take(self, request: web.BaseRequest) -> Outcome:
        """Receives a frame and records it. Raises RefusedError or NotRecordedError."""
        name = ""
        try:
            name = self._collection(request)
            self._check_type(request.headers)
            body = await self._receive(request)
            try:
                await self._check_rows(body, request.headers)
                frame = Frame.of(request.headers, time(), fractions=self._fractions)
                if not self._spool.memory.take(len(body)):
                    raise _unavailable(
                        "there is no memory for it (capture.memory_bytes): the disk is slower than the traffic"
                    )
            finally:
                self._arriving.release(len(body))
        except RefusedError as refused:
            self._count(refused, name)
            raise
        except asyncio.CancelledError:
            self._count(_unavailable("the proxy stops"), name)
            raise
        return await self._recorder.record(name, frame, body)

    def _collection(self, request: web.BaseRequest) -> str:
        """The collection that the frame is for, as it is configured."""
        if request.path != PATH:
            raise RefusedError(404, None, f"there is nothing at {_shown(request.path)}; frames go to POST {PATH}")
        if request.method != "POST":
            raise RefusedError(405, None, f"{_shown(request.method)} is not for frames; use POST")
        name = collection(request.headers)
        if name is None:
            raise RefusedError(
                400,
                Refusal.MALFORMED,
                f"the header ce-type has to be {TYPE_PREFIX}COLLECTION, not {_shown(request.headers.get('ce-type'))}",
            )
        found = self._enabled.get(name.lower())
        if found is not None:
            return found
        if name.lower() in PAYLOAD_COLLECTIONS:
            words = "is recorded of the traffic itself; give the Collector another name"
            raise RefusedError(403, Refusal.UNKNOWN_COLLECTION, f"the collection {_shown(name)} {words}")
        if name.lower() in self._disabled:
            words = f"is disabled; set {_COLLECTIONS}.{self._disabled[name.lower()]}.enabled to 'True'"
            raise RefusedError(403, Refusal.DISABLED_COLLECTION, f"the collection {_shown(name)} {words}")
        known = ", ".join(map(repr, self._enabled.values())) or "none"
        words = f"is not in {_COLLECTIONS} (enabled are: {known})"
        raise RefusedError(404, Refusal.UNKNOWN_COLLECTION, f"the collection {_shown(name)} {words}")

    def _check_type(self, headers: Mapping[str, str]) -> None:
        content_type, encoding = headers.get("content-type"), headers.get("content-encoding")
        if claim(content_type)[0] is Kind.TEXT or (claim(content_type)[0] is Kind.OTHER and not _is_compact(headers)):
            words = f"a frame is sent as application/json, not {_shown(content_type)}"
            raise RefusedError(415, Refusal.BAD_TYPE, words)
        if encoding is not None and encoding.lower() not in ("", "identity"):
            words = f"a frame is sent as it is, without Content-Encoding; here it is {_shown(encoding)}"
            raise RefusedError(415, Refusal.BAD_TYPE, words)

    async def _receive(self, request: web.BaseRequest) -> bytearray:
        """The body, held of the memory for what arrives."""
        if (request.content_length or 0) > self._max_body_bytes:
            raise self._too_large(f"a body of {request.content_length} bytes")
        if request.headers.get("expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = bytearray()
        arriving = asyncio.timeout(0 if self._stopping else RECEIVE_SECONDS)
        self._receiving.add(arriving)
        try:
            async with arriving:
                async for piece in request.content.iter_any():
                    if len(body) + len(piece) > self._max_body_bytes:
                        raise self._too_large("the body")
                    if not self._arriving.take(len(piece)):
                        raise _unavailable("too many frames arrive at once (half of capture.memory_bytes is for them)")
                    body += piece
        except BaseException as error:
            self._arriving.release(len(body))
            if isinstance(error, TimeoutError):
                if self._stopping:
                    raise _unavailable("the proxy stops") from None
                words = f"the frame did not arrive within {RECEIVE_SECONDS:g} s"
                raise RefusedError(408, Refusal.MALFORMED, words) from None
            if isinstance(error, OSError | ValueError | web.RequestPayloadError):  # cut, or not framed as it says
                raise RefusedError(400, Refusal.MALFORMED, "the frame did not arrive whole") from None
            raise
        finally:
            self._receiving.discard(arriving)
        return body

    def _too_large(self, what: str) -> RefusedError:
        words = f"{what} is more than {self._limit} ({self._max_body_bytes}); collect fewer rows at once"
        return RefusedError(413, Refusal.TOO_LARGE, words)

    async def _check_rows(self, body: bytearray, headers: Mapping[str, str]) -> None:
        try:
            if len(body) < ASIDE_BYTES:
                rows.check(body)
            else:
                async with self._aside:
                    await asyncio.to_thread(rows.check, body)
        except rows.NotRowsError as error:
            near = error.near and f", {error.near}"
            if not _is_compact(headers):
                raise RefusedError(422, Refusal.NOT_ROWS, str(error), near) from None
            words = (
                "; is it the SDK's compact format, a table for people to read? Set AZUREML_MDC_FORMAT_COMPACT to false, or "
                "use AZUREML_MDC_CONFIG_PATH"
            )
            raise RefusedError(415, Refusal.BAD_TYPE, f"{error}{words}") from None

    def _count(self, refused: RefusedError, collection: str) -> None:
        if refused.reason is None:  # it was no frame
            return
        self._spool.ledger.refuse(refused.reason)
        now, key = monotonic(), (refused.reason, collection)
        if now - self._told.get(key, -QUIET_SECONDS) >= QUIET_SECONDS:
            of = f" of {collection}" if collection else ""
            logger.warning("A frame%s was refused (%d): %s. Further ones are counted.", of, refused.status, refused)
        self._told[key] = now


def _is_compact(headers: Mapping[str, str]) -> bool:
    """Whether it may be the SDK's compact format: so it sends that, and not always the rows that we take."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == _COMPACT_TYPE


def _unavailable(why: str) -> RefusedError:
    return RefusedError(503, Refusal.UNAVAILABLE, f"not recorded: {why}")


def _shown(text: str | None) -> str:
    return "absent" if text is None else repr(text[:_SHOWN_CHARACTERS])
