"""Records frames: each becomes a line, or a part of one, on its way through the spool."""

from __future__ import annotations

import asyncio
import errno
from enum import Enum

from proxy import ids
from proxy.capture.event import LineFormat, content_range, json_string, source_of
from proxy.custom_logging.frame import Frame
from proxy.ledger import Discard
from proxy.settings import Settings
from proxy.spool.body_file import BodyFile
from proxy.spool.writer import Spool, Store

_PIECE_BYTES = 256 * 1024
_LINE_ENDS = b"\r\n"


class NotRecordedError(Exception):
    """A frame is discarded, and counted; the message says why."""


class Outcome(Enum):
    """How far a frame has come."""

    RECORDED = "recorded"
    ACCEPTED = "accepted; the disk has yet to confirm it"
    BATCHED = "accepted; it is recorded when custom_logging.batch_window is over"


class FrameRecorder:
    """The collections of custom logging. On the spool's loop; a frame's bytes are held of ``spool.memory``."""

    def __init__(self, settings: Settings, batch_window_seconds: float, spool: Spool) -> None:
        self.spool = spool
        self._source = source_of(settings)
        self._formats: dict[str, LineFormat] = {}
        self._max_inline_bytes = settings.capture.max_inline_bytes
        self._batch_window_seconds = batch_window_seconds
        self._batches: dict[str, _Batch] = {}

    def format_of(self, collection: str) -> LineFormat:
        if collection not in self._formats:
            self._formats[collection] = LineFormat(collection, self._source)
        return self._formats[collection]

    async def record(self, collection: str, frame: Frame, body: bytearray) -> Outcome:
        """Records a frame; ``body`` is a JSON array, held of the memory. Raises NotRecordedError."""
        if len(body) > self._max_inline_bytes:
            return await self._submit(await self._large(collection, frame, body))
        if self._batch_window_seconds:
            self._join(collection, frame, body)
            return Outcome.BATCHED
        size = len(body)
        entry = FrameEntry(self, collection, frame, _in_one_line(body), size)
        entry.held_bytes = size
        body.clear()  # while it is waited for, the frame is in memory but once
        return await self._submit(entry)

    def close(self) -> None:
        """Hands over what waits for its batch to be complete."""
        for collection in list(self._batches):
            self._close_batch(collection)

    async def _submit(self, entry: FrameEntry) -> Outcome:
        written = self.spool.submit(entry)
        # While a disk hangs, the first frame has waited for max_hold; the others need not.
        confirmed = written is not None and not self.spool.is_late and await written
        if entry.failure is not None:
            raise NotRecordedError(entry.failure)
        return Outcome.RECORDED if confirmed else Outcome.ACCEPTED

    async def _large(self, collection: str, frame: Frame, body: bytearray) -> FrameEntry:
        """An entry whose data is in a file of its own, named by an id of ours: a frame's may be anything."""
        file = BodyFile(self.spool, collection, ids.uuid4(), 0)
        size = len(body)
        try:
            for start in range(0, size, _PIECE_BYTES):
                piece = _in_one_line(body[start : start + _PIECE_BYTES])
                await (file.write(piece) or asyncio.sleep(0))  # others get on meanwhile
        except BaseException:
            file.discard()
            raise
        finally:
            self.spool.memory.release(size)
            body.clear()
        if file.gave_up:
            file.discard()
            self.spool.ledger.receive(1)
            self.spool.ledger.discard(Discard.MEMORY_FULL, 1)
            raise NotRecordedError("the disk is slower than the frames, or hangs")
        return FrameEntry(self, collection, frame, file, size)

    # --- batches ---

    def _join(self, collection: str, frame: Frame, body: bytearray) -> None:
        batch = self._batches.get(collection)
        if batch is not None and batch.held_bytes + len(body) > self._max_inline_bytes:
            self._close_batch(collection)
            batch = None
        if batch is None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._batch_window_seconds, self._close_batch, collection)
            batch = self._batches[collection] = _Batch(frame, timer)
            self.spool.ledger.receive(1)  # an event is a line
        batch.held_bytes += len(body)
        rows = _in_one_line(body).strip()[1:-1].strip()
        if rows:
            batch.rows.append(rows)

    def _close_batch(self, collection: str) -> None:
        batch = self._batches.pop(collection)
        batch.timer.cancel()
        data = b"[%b]" % b",".join(batch.rows)
        entry = FrameEntry(self, collection, batch.frame, data, len(data))
        entry.held_bytes = batch.held_bytes
        self.spool.submit(entry, received=True)


class _Batch:
    """Frames that are to share a line, with the ids of the first."""

    def __init__(self, frame: Frame, timer: asyncio.TimerHandle) -> None:
        self.frame = frame
        self.timer = timer
        self.rows: list[bytes] = []  # of each frame, without its brackets
        self.held_bytes = 0


class FrameEntry:
    """A line on its way to the disk, of ``length`` bytes of data: in memory, or in a file of its own."""

    __slots__ = ("_collection", "_data", "_frame", "_length", "_recorder", "events", "failure", "held_bytes")

    def __init__(
        self, recorder: FrameRecorder, collection: str, frame: Frame, data: bytes | BodyFile, length: int
    ) -> None:
        self._recorder = recorder
        self._collection = collection
        self._frame = frame
        self._data = data
        self._length = length
        self.events = 1
        self.held_bytes = 0
        self.failure: str | None = None

    def discard(self) -> None:
        if isinstance(self._data, BodyFile):
            self._data.discard()
        self.failure = "recording is behind, or stops"

    def not_written(self, collection: str, reason: str) -> None:
        if collection in ("", self._collection):
            self.failure = reason

    def render(self, store: Store) -> list[tuple[str, bytes]]:
        frame, data, data_name = self._frame, self._data, b"data"
        if isinstance(data, BodyFile):
            url = data.finish(frame.content_type, large=True)
            if url is None:  # a line without data would be one that readers fail on
                raise data.failure or OSError(errno.EIO, "the disk did not take it")
            data, data_name = json_string(url), b"dataref"
        line = self._recorder.format_of(self._collection).line(
            event_id=frame.event_id,
            content_type=frame.content_type,
            time=frame.time,
            data=data,
            data_name=data_name,
            range_=content_range(self._length, self._length),
            request_id=frame.request_id,
            extensions=frame.extensions,
        )
        return [(self._collection, line)]


def _in_one_line(json: bytearray) -> bytes:
    """Valid JSON without the line ends between its tokens."""
    return bytes(json.translate(None, _LINE_ENDS) if b"\n" in json or b"\r" in json else json)
