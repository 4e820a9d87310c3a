"""The tee: a bounded copy of one body as it passes. It holds what fits in a line, and sends the rest to a file."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass

from proxy import ids
from proxy.spool.body_file import BodyFile
from proxy.spool.writer import Spool


@dataclass(frozen=True, slots=True)
class TeeLimits:
    """Bytes of a body that may stand in a line, and that are recorded at most (0: all)."""

    max_inline_bytes: int
    max_body_bytes: int


class Tee:
    """Keeps a copy of a body: in memory up to ``max_inline_bytes``, else in a file of its own.

    ``length`` bytes have passed; of those ``held_bytes`` are in ``pieces``, or some are in ``file``.
    """

    __slots__ = ("_limits", "_room", "collection", "event_id", "file", "held_bytes", "length", "pieces", "spool")

    def __init__(self, spool: Spool, collection: str, limits: TeeLimits) -> None:
        self.spool = spool
        self.collection = collection
        self.event_id = ids.uuid4()
        self.length = 0
        self.held_bytes = 0
        self.pieces: list[bytes] = []
        self.file: BodyFile | None = None
        self._limits = limits
        self._room = limits.max_inline_bytes

    def declare(self, length: int) -> None:
        """The body's length was announced, in bytes. One that is going to a file anyway goes there from its first byte."""
        if length > self._limits.max_inline_bytes:
            self._room = 0

    def add(self, data: bytes) -> Awaitable[None] | None:
        """One more piece has passed. What is returned, if anything, is to be awaited before the next one."""
        self.length += len(data)
        if self.file is not None:
            return self.file.write(data)
        limit = self._limits.max_body_bytes
        if limit and self.length > limit:
            data = data[: max(0, len(data) - (self.length - limit))]
        if self.length <= self._room and self.spool.memory.take(len(data)):
            self.pieces.append(data)
            self.held_bytes += len(data)
            return None
        return self._spill(data)

    def _spill(self, data: bytes) -> Awaitable[None] | None:
        self.file = file = BodyFile(self.spool, self.collection, self.event_id, self._limits.max_body_bytes)
        pieces, self.pieces = self.pieces, []
        self.spool.memory.release(self.held_bytes)
        self.held_bytes = 0
        for piece in pieces:
            file.write(piece)
        return file.write(data)

    @property
    def kept_bytes(self) -> int:
        return self.held_bytes if self.file is None else self.file.kept_bytes

    def whole(self) -> bytes:
        """What is held in memory."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    def discard(self) -> None:
        """Nothing of this body will be recorded."""
        if self.file is not None:
            self.file.discard()
