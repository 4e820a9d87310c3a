"""Records exchanges: the relay tells what passes, the writer thread asks for the lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable

from multidict import CIMultiDictProxy

from proxy.capture.body import Tee, TeeLimits
from proxy.capture.decoding import Undecodable, codings, decoded
from proxy.capture.event import LineFormat, content_range, header_fields, json_string, source_of, timestamp, trace_field
from proxy.capture.payload import Kind, claim, embedded
from proxy.capture.policy import Policy
from proxy.ledger import Discard
from proxy.relay.faults import RecordingRefused
from proxy.relay.recording import CLIENT_CLOSED_REQUEST, Ending
from proxy.settings import REQUEST, RESPONSE, Settings
from proxy.spool.writer import Spool, Store

_JSON = "application/json"
_BINARY = "application/octet-stream"
# The values of capturestatus beside those of Ending.
_TRUNCATED = "truncated"
_UNDECODABLE = "undecodable"
_LOST = "lost"


class PayloadRecorder:
    """Payload logging: the ``request`` and ``response`` collections. Settings are read once."""

    def __init__(self, settings: Settings, spool: Spool) -> None:
        self.spool = spool
        self.policy = Policy(settings.data_collector, settings.capture)
        self.formats = {name: LineFormat(name, source_of(settings)) for name in (REQUEST, RESPONSE)}
        self.extended = settings.capture.extended_fields
        names = settings.data_collector.request_logging.capture_headers if self.extended else ()
        self.header_fields = [(name, b',"%b":' % field.encode()) for name, field in header_fields(names).items()]
        self.max_inline_bytes = settings.capture.max_inline_bytes
        self.tee_limits = TeeLimits(settings.capture.max_inline_bytes, settings.capture.max_body_bytes)
        self.max_decoded_bytes = settings.capture.max_decoded_bytes

    def open(
        self, method: str, target: str, headers: CIMultiDictProxy[str], request_id: str, *, length: int | None
    ) -> ExchangeRecording | None:
        """See ``proxy.relay.recording.Recorder``."""
        collections = self.policy.collections(method, target, request_id)
        if not collections:
            return None
        if not self.spool.admits():
            raise RecordingRefused("requests are refused while they can't be recorded (spool.when_full: reject)")
        return ExchangeRecording(self, collections, method, target, headers, request_id, length)


class ExchangeRecording:
    """One exchange. Filled on the event loop, rendered on the writer thread; never both at once."""

    __slots__ = (
        "_began",
        "_ending",
        "_method",
        "_recorder",
        "_request",
        "_request_complete",
        "_request_headers",
        "_request_id",
        "_request_sized",
        "_request_time",
        "_response",
        "_response_headers",
        "_response_sized",
        "_response_time",
        "_status",
        "_target",
        "duration_seconds",
        "events",
        "held_bytes",
    )

    def __init__(
        self,
        recorder: PayloadRecorder,
        collections: frozenset[str],
        method: str,
        target: str,
        headers: CIMultiDictProxy[str],
        request_id: str,
        length: int | None,
    ) -> None:
        self._recorder = recorder
        self._method = method
        self._target = target
        self._request_id = request_id
        self._request_headers = headers
        self._request_sized = length is not None
        self._request_complete = False
        self._request_time = time.time()
        self._began = time.monotonic()
        self._request: Tee | None = None
        self._response: Tee | None = None
        if REQUEST in collections:
            self._request = Tee(recorder.spool, REQUEST, recorder.tee_limits)
            self._request.declare(length or 0)
        if RESPONSE in collections:
            self._response = Tee(recorder.spool, RESPONSE, recorder.tee_limits)
        self._response_headers: CIMultiDictProxy[str] | None = None
        self._response_sized = False
        self._response_time = 0.0
        self._status = CLIENT_CLOSED_REQUEST
        self._ending = Ending.COMPLETE
        self.duration_seconds = 0.0
        self.events = len(collections)
        self.held_bytes = 0

    # --- told by the relay, on the loop ---

    def request_piece(self, data: bytes) -> Awaitable[None] | None:
        return self._request.add(data) if self._request is not None else None

    def request_complete(self) -> None:
        self._request_complete = True

    def response_head(self, status: int, headers: CIMultiDictProxy[str] | None, *, sized: bool) -> None:
        self._status = status
        self._response_headers = headers
        self._response_sized = sized
        self._response_time = time.time()
        if sized and headers is not None and self._response is not None:
            self._response.declare(int(headers.get("content-length", 0)))

    def response_piece(self, data: bytes) -> Awaitable[None] | None:
        return self._response.add(data) if self._response is not None else None

    def finish(self, ending: Ending) -> asyncio.Future[bool] | None:
        self._ending = ending
        self.duration_seconds = time.monotonic() - self._began
        if ending is Ending.CLIENT_LEFT:
            self._status = CLIENT_CLOSED_REQUEST
        if not self._response_time:
            self._response_time = time.time()
        if self._request is not None:
            self.held_bytes += self._request.held_bytes
        if self._response is not None:
            self.held_bytes += self._response.held_bytes
        return self._recorder.spool.submit(self)

    def abandon(self) -> None:
        spool = self._recorder.spool
        for tee in (self._request, self._response):
            if tee is not None:
                spool.memory.release(tee.held_bytes)
        self.discard()
        spool.ledger.receive(self.events)
        spool.ledger.discard(Discard.RENDER_FAILED, self.events)

    def discard(self) -> None:
        for tee in (self._request, self._response):
            if tee is not None:
                tee.discard()

    def not_written(self, collection: str, reason: str) -> None:
        """See ``proxy.spool.writer.Entry``: nobody waits to hear of it."""

    # --- asked by the writer thread ---

    def render(self, store: Store) -> list[tuple[str, bytes]]:
        """The lines of this exchange, its request's first; bodies that don't fit in a line are put in ``store``."""
        lines: list[tuple[str, bytes]] = []
        if self._request is not None:
            lines.append((REQUEST, self._request_line(self._request, store)))
        if self._response is not None:
            lines.append((RESPONSE, self._response_line(self._response, store)))
        return lines

    def _request_line(self, tee: Tee, store: Store) -> bytes:
        recorder = self._recorder
        headers = self._request_headers
        body = RecordedBody(tee, headers, recorder.max_inline_bytes, recorder.max_decoded_bytes, store)
        extensions = b""
        if recorder.extended:
            status = self._ending.value
            if self._request_complete:
                status = Ending.COMPLETE.value
            elif self._ending is Ending.COMPLETE:
                status = _TRUNCATED  # the model server answered without reading it all
            extensions = body.extensions(status) + trace_field(headers)
            for name, field in recorder.header_fields:
                if name in headers:
                    extensions += field + json_string(", ".join(headers.getall(name)))
        return recorder.formats[REQUEST].line(
            event_id=tee.event_id,
            content_type=body.content_type,
            time=timestamp(self._request_time, fractions=recorder.extended),
            data=body.data,
            target=self._target,
            method=self._method,
            range_=self._range(body, tee, headers, sized=self._request_sized, complete=self._request_complete),
            in_blob=body.in_blob,
            request_id=self._request_id,
            extensions=extensions,
        )

    def _response_line(self, tee: Tee, store: Store) -> bytes:
        recorder = self._recorder
        headers = self._response_headers
        body = RecordedBody(tee, headers, recorder.max_inline_bytes, recorder.max_decoded_bytes, store)
        extensions = b""
        if recorder.extended:
            extensions = b',"statuscode":%d,"durationms":%d' % (
                self._status,
                round(self.duration_seconds * 1000),
            ) + body.extensions(self._ending.value)
            extensions += trace_field(self._request_headers)
        return recorder.formats[RESPONSE].line(
            event_id=tee.event_id,
            content_type=body.content_type,
            time=timestamp(self._response_time, fractions=recorder.extended),
            data=body.data,
            range_=self._range(
                body, tee, headers, sized=self._response_sized, complete=self._ending is Ending.COMPLETE
            ),
            in_blob=body.in_blob,
            request_id=self._request_id,
            extensions=extensions,
        )

    def _range(
        self, body: RecordedBody, tee: Tee, headers: CIMultiDictProxy[str] | None, *, sized: bool, complete: bool
    ) -> bytes:
        if not sized:
            return content_range(body.kept_bytes, None)
        if complete and tee.kept_bytes == tee.length and not body.lost:
            return content_range(body.kept_bytes, body.kept_bytes)
        declared = int(headers.get("content-length", 0)) if headers is not None else tee.length
        return content_range(body.kept_bytes, max(declared, tee.length))


class RecordedBody:
    """How one body stands in its line."""

    __slots__ = ("_encoding", "_flaw", "_tee", "content_type", "data", "in_blob", "kept_bytes")

    def __init__(
        self,
        tee: Tee,
        headers: CIMultiDictProxy[str] | None,
        max_inline_bytes: int,
        max_decoded_bytes: int,
        store: Store,
    ) -> None:
        content_type = headers.get("content-type") if headers is not None else _JSON
        self._tee = tee
        self._encoding = _content_encoding(headers) if headers is not None else None
        self._flaw: str | None = None if tee.kept_bytes == tee.length else _TRUNCATED
        self.content_type = content_type or _BINARY
        self.kept_bytes = tee.kept_bytes
        self.in_blob = False
        self.data = b"null"
        if tee.file is not None:
            # What is too large to hold stays as it was sent, packed or not.
            packed = self._encoding is not None and codings(self._encoding) != ()
            large = not packed and claim(content_type)[0] in (Kind.JSON, Kind.TEXT)
            self._point_to(tee.file.finish(self.content_type, large=large))
            if tee.file.cut:
                tee.spool.ledger.cut_body()
        elif tee.kept_bytes:
            self._hold(store, content_type, max_inline_bytes, max_decoded_bytes)
        else:
            self.content_type = content_type or _JSON

    def _hold(self, store: Store, content_type: str | None, max_inline_bytes: int, max_decoded_bytes: int) -> None:
        body = self._tee.whole()
        claimed = content_type
        encodings = codings(self._encoding) if self._encoding else ()
        if encodings is None:  # not known, or no coding at all, such as utf-8: the bytes tell what they are
            claimed = None
        elif encodings:
            try:
                unpacked = _within(decoded(self._tee.pieces, encodings, max_decoded_bytes), max_inline_bytes)
                if unpacked is None:  # too large for a line
                    large = claim(content_type)[0] in (Kind.JSON, Kind.TEXT)
                    counted = _Counted(decoded(self._tee.pieces, encodings, max_decoded_bytes))
                    url = store.keep_body(
                        self._tee.collection, self._tee.event_id, self.content_type, counted, large=large
                    )
                    self.kept_bytes = counted.total
                    self._point_to(url)
                    return
                body, self.kept_bytes = unpacked, len(unpacked)
            except Undecodable:
                self._flaw = self._flaw or _UNDECODABLE
                claimed = None
        value = embedded(body, claimed)
        if not body:
            self.content_type = content_type or _JSON
        elif value is not None:
            self.data, found_type = value
            self.content_type = content_type or found_type
        else:
            url = store.keep_body(self._tee.collection, self._tee.event_id, self.content_type, (body,), large=False)
            self._point_to(url)

    def _point_to(self, url: str | None) -> None:
        if url is None:
            self._flaw, self.kept_bytes = _LOST, 0
            return
        self.data = json_string(url)
        self.in_blob = True

    @property
    def lost(self) -> bool:
        """The disk did not take it."""
        return self._flaw == _LOST

    def extensions(self, status: str) -> bytes:
        """``status`` is how the exchange ended for this body; a flaw of its own comes first."""
        if self._flaw is not None and (self._flaw != _UNDECODABLE or status == Ending.COMPLETE.value):
            status = self._flaw  # that half a body can't be decoded is no flaw of its own
        fields = b',"capturestatus":"%b","bodybytes":%d' % (status.encode(), self._tee.length)
        return fields + b',"contentencoding":' + json_string(self._encoding) if self._encoding else fields


def _content_encoding(headers: CIMultiDictProxy[str]) -> str | None:
    """All codings in the order in which they were applied; a list may come in several lines (RFC 9110 §5.3)."""
    if "content-encoding" not in headers:
        return None
    return ", ".join(headers.getall("content-encoding")) or None


class _Counted:
    """Pieces that count their bytes as they are taken."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces
        self.total = 0

    def __iter__(self) -> _Counted:
        self._iterator = iter(self._pieces)
        return self

    def __next__(self) -> bytes:
        piece = next(self._iterator)
        self.total += len(piece)
        return piece


def _within(pieces: Iterable[bytes], limit_bytes: int) -> bytes | None:
    """All pieces joined, or None if they exceed ``limit_bytes``."""
    kept: list[bytes] = []
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > limit_bytes:
            return None
        kept.append(piece)
    return b"".join(kept)
