"""The tee: a bounded copy of one body as it passes. It holds what fits in a line, and sends the rest to a file."""

from __future__ import annotations

from collections.abc import Awaitable

from proxy.spool.body_file import BodyFile
from proxy.spool.writer import Memory, Spool


class Tee:
    """Keeps a copy of a body: in memory up to ``max_inline_bytes``, else in a file of its own."""

    __slots__ = (
        "_declared",
        "_file",
        "_inline",
        "_limit",
        "_pieces",
        "collection",
        "event_id",
        "held_bytes",
        "length",
        "spool",
    )

    def __init__(
        self,
        spool: Spool,
        collection: str,
        event_id: str,
        *,
        max_inline_bytes: int,
        max_body_bytes: int,
        declared_bytes: int | None,
    ) -> None:
        self.spool = spool
        self.collection = collection
        self.event_id = event_id
        self.length = 0  # bytes that have passed
        self.held_bytes = 0
        self._pieces: list[bytes] = []
        self._file: BodyFile | None = None
        self._limit = max_body_bytes
        # A body that is going to a file anyway goes there from its first byte.
        self._inline = max_inline_bytes
        self._declared = declared_bytes

    def add(self, data: bytes) -> Awaitable[None] | None:
        """One more piece has passed. What is returned, if anything, is to be awaited before the next one."""
        self.length += len(data)
        if self._file is not None:
            return self._file.write(data)
        memory: Memory = self.spool.memory
        if self._limit and self.length > self._limit:
            data = data[: max(0, len(data) - (self.length - self._limit))]
        if self.length <= self._inline and (self._declared or 0) <= self._inline and memory.take(len(data)):
            self._pieces.append(data)
            self.held_bytes += len(data)
            return None
        return self._spill(data)

    def declare(self, length: int) -> None:
        """The body's length was announced, in bytes."""
        self._declared = length

    def _spill(self, data: bytes) -> Awaitable[None] | None:
        self._file = file = BodyFile(self.spool, self.collection, self.event_id, self._limit)
        pieces, self._pieces = self._pieces, []
        self.spool.memory.release(self.held_bytes)
        self.held_bytes = 0
        for piece in pieces:
            file.write(piece)
        return file.write(data)

    @property
    def file(self) -> BodyFile | None:
        return self._file

    @property
    def kept_bytes(self) -> int:
        return self.held_bytes if self._file is None else self._file.kept_bytes

    @property
    def pieces(self) -> list[bytes]:
        return self._pieces

    def whole(self) -> bytes:
        """What is held in memory."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def discard(self) -> None:
        """Nothing of this body will be recorded."""
        if self._file is not None:
            self._file.discard()
