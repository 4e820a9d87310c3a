"""The endpoint that the ``azureml-ai-monitoring`` SDK posts its frames to, as Azure ML's collector sidecar has it.

``POST /modeldata/log``: one frame, a JSON array of objects, with what is known of it in the headers. The SDK waits for
the answer without a time-out, and logs what is no success: so each refusal is one sentence for the author of the
scoring script, and no answer waits for a disk that hangs.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic, time
from typing import Any

from aiohttp import web

from proxy.capture.payload import Kind, claim
from proxy.custom_logging import rows
from proxy.custom_logging.frame import TYPE_PREFIX, Frame, collection
from proxy.custom_logging.recorder import FrameRecorder, NotRecordedError, Outcome
from proxy.ledger import Refusal
from proxy.settings import PAYLOAD_COLLECTIONS, CustomLogging, Settings
from proxy.spool.writer import Spool

logger = logging.getLogger("payload_logger.custom_logging")

PATH = "/modeldata/log"
RECEIVE_SECONDS = 30.0  # for a frame to arrive
KEEPALIVE_SECONDS = 15.0  # the SDK takes a new connection for each frame
STOP_SECONDS = 2.0  # for what is under way when the proxy stops
QUIET_SECONDS = 60.0  # after this long without a refusal for the same reason, the next one is news again
ASIDE_BYTES = 64 * 1024  # from here on a frame is checked in a thread aside
_MAX_HEADER_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 200
_COLLECTIONS = "data_collector.collections"


class RefusedError(Exception):
    """A frame is not taken; the message is a sentence for its sender."""

    def __init__(self, status: int, reason: Refusal | None, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.reason = reason


class FrameEndpoint:
    """Use: ``await listen()``, ``await close()``, both on the spool's loop."""

    def __init__(self, settings: Settings, options: CustomLogging, spool: Spool) -> None:
        self._listen_address = options.listen
        self._max_body_bytes, self._limit = min(  # a frame is in memory as a whole
            (options.max_body_bytes, "custom_logging.max_body_bytes"),
            (settings.capture.memory_bytes, "capture.memory_bytes"),
        )
        self._spool = spool
        self._recorder = FrameRecorder(settings, options.batch_window, spool)
        # Names are compared without case: the SDK's own configuration has them in lower case.
        self._enabled = {name.lower(): name for name in self._recorder.formats}
        self._disabled = {name.lower() for name, one in settings.data_collector.collections.items() if not one.enabled}
        self._aside = asyncio.Semaphore()
        self._told: dict[Refusal, float] = {}
        quiet = logging.getLogger(f"{logger.name}.http")
        quiet.disabled = True  # it writes a traceback for whatever is no HTTP; who sent it gets an answer
        self._http = web.Server(
            self._answer,
            access_log=None,
            logger=quiet,
            keepalive_timeout=KEEPALIVE_SECONDS,
            max_field_size=_MAX_HEADER_BYTES,
        )
        self._listener: Any = None

    async def listen(self) -> str:
        """The address as bound. Raises OSError."""
        host, _, port = self._listen_address.rpartition(":")
        self._listener = await asyncio.get_running_loop().create_server(self._http, host.strip("[]"), int(port))
        bound = self._listener.sockets[0].getsockname()
        return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def close(self) -> None:
        """Takes no more connections, ends what is under way, hands over the batches."""
        if self._listener is not None:
            self._listener.close()
        await self._http.shutdown(STOP_SECONDS)
        self._recorder.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            outcome = await self._take(request)
            return web.Response(status=200 if outcome is Outcome.RECORDED else 202, text=outcome.value)
        except RefusedError as refused:
            self._count(refused)
            return web.Response(status=refused.status, text=str(refused))
        except NotRecordedError as error:  # counted where it was discarded
            return web.Response(status=503, text=f"not recorded: {error}")
        except Exception:
            logger.exception("A frame was not taken, by a defect of payload-logger.")
            return web.Response(status=500, text="not recorded: a defect of payload-logger; its log says more")

    async def _take(self, request: web.BaseRequest) -> Outcome:
        """Receives a frame and records it. Raises RefusedError or NotRecordedError."""
        name = self._collection(request)
        content_type = request.headers.get("content-type")
        if claim(content_type)[0] is Kind.TEXT:
            raise RefusedError(
                415, Refusal.BAD_TYPE, f"a frame is sent as application/json, not {_shown(content_type)}"
            )
        body = await self._receive(request)
        try:
            await self._check(body, content_type)
            frame = Frame.of(request.headers, time())
        except BaseException:
            self._spool.memory.release(len(body))
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
            words = f"is disabled; set {_COLLECTIONS}.{name.lower()}.enabled to 'True'"
            raise RefusedError(403, Refusal.DISABLED_COLLECTION, f"the collection {_shown(name)} {words}")
        known = ", ".join(map(repr, self._enabled.values())) or "none"
        words = f"is not in {_COLLECTIONS} (enabled are: {known})"
        raise RefusedError(404, Refusal.UNKNOWN_COLLECTION, f"the collection {_shown(name)} {words}")

    async def _receive(self, request: web.BaseRequest) -> bytearray:
        """The body, held of the spool's memory."""
        if (request.content_length or 0) > self._max_body_bytes:
            raise self._too_large(f"a body of {request.content_length} bytes")
        if request.headers.get("expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = bytearray()
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                async for piece in request.content.iter_any():
                    if len(body) + len(piece) > self._max_body_bytes:
                        raise self._too_large("the body")
                    if not self._spool.memory.take(len(piece)):
                        words = "there is no memory for it (capture.memory_bytes): the disk is slower than the traffic"
                        raise RefusedError(503, Refusal.UNAVAILABLE, f"not recorded: {words}")
                    body += piece
        except BaseException as error:
            self._spool.memory.release(len(body))
            if isinstance(error, TimeoutError):
                words = f"the frame did not arrive within {RECEIVE_SECONDS:g} s"
                raise RefusedError(408, Refusal.MALFORMED, words) from None
            if isinstance(error, OSError | ValueError | web.RequestPayloadError):  # cut, or not coded as it says
                raise RefusedError(400, Refusal.MALFORMED, "the frame did not arrive whole") from None
            raise
        return body

    def _too_large(self, what: str) -> RefusedError:
        words = f"{what} is more than {self._limit} allows ({self._max_body_bytes}); collect fewer rows at once"
        return RefusedError(413, Refusal.TOO_LARGE, words)

    async def _check(self, body: bytearray, content_type: str | None) -> None:
        try:
            if len(body) < ASIDE_BYTES:
                rows.check(body)
            else:
                async with self._aside:
                    await asyncio.to_thread(rows.check, body)
        except rows.NotRowsError as error:
            if claim(content_type)[0] is Kind.JSON:
                raise RefusedError(422, Refusal.NOT_ROWS, str(error)) from None
            words = (
                "a frame is a JSON array of objects, sent as application/json; with AZUREML_MDC_FORMAT_COMPACT the SDK"
            )
            raise RefusedError(
                415, Refusal.BAD_TYPE, f"{words} sends a table for people to read instead: unset it ({error})"
            ) from None

    def _count(self, refused: RefusedError) -> None:
        if refused.reason is None:  # it was no frame
            return
        self._spool.ledger.refuse(refused.reason)
        now = monotonic()
        if now - self._told.get(refused.reason, -QUIET_SECONDS) >= QUIET_SECONDS:
            logger.warning("A frame was refused (%d): %s. Further ones are counted.", refused.status, refused)
        self._told[refused.reason] = now


def _shown(text: str | None) -> str:
    return "absent" if text is None else repr(text[:_SHOWN_CHARACTERS])
