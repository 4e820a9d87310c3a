"""A body that goes to a file of its own piece by piece, as it passes."""

from __future__ import annotations

from collections.abc import Awaitable

from proxy.spool.files import BodyPart, SpoolFull
from proxy.spool.writer import Spool


class BodyFile:
    """``write``, ``give_up`` and ``discard`` are for the event loop, ``finish`` for the writer thread.

    At most ``limit_bytes`` are kept (0: all). ``kept_bytes`` were handed over; ``gave_up`` says that some were not, for want
    of memory; ``failure``, why some did not get to the disk.
    """

    def __init__(self, spool: Spool, collection: str, event_id: str, limit_bytes: int) -> None:
        self.collection = collection
        self.event_id = event_id
        self.kept_bytes = 0
        self.gave_up = False
        self.failure: SpoolFull | OSError | None = None
        self._spool = spool
        self._limit_bytes = limit_bytes
        self._given_up = False
        self._part: BodyPart | None = None  # on the thread only

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Hands a piece over. What is returned, if anything, is to be awaited before the next one."""
        if self._given_up:
            return None
        if self._spool.stalled or self._spool.is_full:
            self.give_up()
            return None
        if self._limit_bytes and self.kept_bytes + len(data) > self._limit_bytes:
            data = data[: self._limit_bytes - self.kept_bytes]
            self._given_up = True
            if not data:
                return None
        self.kept_bytes += len(data)
        return self._spool.hand_over(self, lambda: self._write(data), len(data))

    def give_up(self) -> None:
        """Keeps what was handed over, and takes no more."""
        if not self._given_up:
            self._given_up = self.gave_up = True

    @property
    def cut(self) -> bool:
        """Whether the file is not whole for want of memory or disk. Final once the file is finished."""
        return self.gave_up or self.failure is not None

    def discard(self) -> None:
        """No line will point to this body."""
        self._given_up = True
        if self.kept_bytes:
            self._spool.hand_over(self, self._drop, 0)

    def finish(self, content_type: str, *, large: bool) -> str | None:
        """The URL of the finished file, or None when the disk did not take it."""
        if self._part is None or self.failure is not None:
            self._drop()
            return None
        try:
            return self._spool.files.finish_body(self._part, self.collection, self.event_id, content_type, large=large)
        except OSError as error:
            self._fail(error)
            return None

    def _write(self, data: bytes) -> int:
        if self.failure is None:
            try:
                if self._part is None:
                    self._part = self._spool.files.open_body(self.collection, self.event_id)
                self._spool.files.write_body(self._part, data)
            except (SpoolFull, OSError) as error:
                self._fail(error)
        return len(data)

    def _fail(self, error: SpoolFull | OSError) -> None:
        self.failure = error
        self._drop()

    def _drop(self) -> int:
        if self._part is not None:
            self._spool.files.drop_body(self._part)
            self._part = None
        return 0
